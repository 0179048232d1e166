"""LEAF on TRL is LEAF: trl_leaf.py against the six scripts, with a LoRA that changes the model.

Run as a script, this file is one process of a training in which a prompt's draws are its own, so
that they do not depend on how many processes there are.
"""
import csv
import json
import os
import runpy
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import MODEL, ROOT, TEST, call, load, parsed, refusal
from families import family_processor, published_config, random_model, stand_in_for_torchaudio
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

trl = pytest.importorskip("trl", reason="TRL is not installed")
if trl.__version__ != "1.16.0":
    pytest.skip("another TRL is installed", allow_module_level=True)
import trl_leaf

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
training = import_module("05_train")

K = 4
SMALL = ["--prompts-per-step", 2, "--num-responses", K, "--max-steps", 2, "--save-steps", 1]
ROWS = [{"prompt": str(n)} for n in (0, 1) for _ in range(K)]  # an update, as TRL asks for it
new_lora, sample_responses = training.add_lora, sampling.sample_responses


@pytest.fixture(autouse=True, scope="module")
def in_the_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def options_of(run, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trl_leaf.py", "--run", str(run), *map(str, options)])
        return trl_leaf.parse_args()


def trained_lora(model, *sizes):
    """The LoRA of 05, as if it had been trained."""
    model = new_lora(model, *sizes)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


class Built(Exception):
    """Ends main where training would begin."""


def build(run, *options):
    def stop(trainer, **_):
        raise Built(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "add_lora", trained_lora)
        patch.setattr(trl_leaf.LeafTrainer, "train", stop)
        with pytest.raises(Built) as built:
            trl_leaf.main(options_of(run, *SMALL, *options))
    return built.value.args[0]


def first_pass(trainer):
    """What TRL trains on in the first pass of an update: half of its rows, shuffled."""
    torch.manual_seed(0)
    trainer._step = 0
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()  # as TRL does before each pass
    return trainer._prepare_inputs(ROWS)


def by_trl(trainer, inputs):
    """Log-probabilities (rows, T), 0 at padding, in the layout of TRL."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    T = inputs["completion_ids"].shape[1]
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T)[0]
    return logps * inputs["completion_mask"]


def by_02(trainer, inputs):
    """The same, each row a trie of its own."""
    rows = []
    for n, length in enumerate(inputs["completion_mask"].sum(dim=1)):
        heard = trainer.heard[inputs["prompt_ids"][n, inputs["prompt_mask"][n].bool()]]
        rollout = {"embeds": heard, "responses": inputs["completion_ids"][n:n + 1, :length],
                   "lengths": length[None]}
        rows += scoring.score_responses(trainer.model, [rollout])[0]
    rows.append(torch.zeros(inputs["completion_ids"].shape[1]))
    return pad_sequence(rows, batch_first=True)[:-1]


def gradient_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return [weight.grad for weight in trainer.model.parameters() if weight.requires_grad]


@pytest.fixture
def granite(tmp_path_factory, demo):
    """A folder with a tiny Granite Speech: its logits are divided by 8."""
    folder = str(tmp_path_factory.mktemp("granite"))
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_torchaudio(lambda *change: patch.setattr(*change, raising=False))
        config = published_config("granite-speech-3.3-2b", demo[1].tokenizer, shrink=64)
        model = random_model(config, demo[1].tokenizer)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.normal_(table.weight)  # so that the scale makes a difference
        model.save_pretrained(folder)
        family_processor(config, demo[1].tokenizer).save_pretrained(folder)
        patch.setattr(sampling, "sample_responses", lambda model, embeds, K, limit, *nucleus:
                      sample_responses(model, embeds, K, 12, *nucleus))
        yield folder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("trainer"))


# Numbers.

@pytest.mark.parametrize("name", ["demo", "granite"])
def test_log_probabilities_are_those_of_02(trainer, granite, tmp_path, name):
    if name == "granite":
        trainer = build(tmp_path, "--model", granite)
    inputs = first_pass(trainer)
    trainer.model.get_base_model().eval()
    with torch.no_grad():
        wanted = by_02(trainer, inputs)
        torch.testing.assert_close(by_trl(trainer, inputs), wanted, atol=1e-4, rtol=0)
        with trainer.model.disable_adapter():  # the reference is the model without our LoRA
            reference = by_02(trainer, inputs)
    found = inputs["ref_per_token_logps"] * inputs["completion_mask"]
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=0)
    assert (wanted - reference).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["leaf", "grpo", "td", "tempo"])
def test_advantages_are_those_of_02_to_04(trainer, tmp_path, monkeypatch, method):
    """The scripts themselves, on what TRL has of an update."""
    prompts, args = trainer.work
    monkeypatch.setattr(args, "method", method)
    torch.manual_seed(5)
    output = trainer._generate_and_score_completions(ROWS)
    rollouts = []
    for n in (0, 1):
        rows = slice(n * K, n * K + K)
        lengths = output["completion_mask"][rows].sum(dim=1)
        responses = (output["completion_ids"] * output["completion_mask"])[rows, :lengths.max()]
        example, embeds = prompts[n]
        heard = trainer.heard[output["prompt_ids"][n * K, output["prompt_mask"][n * K].bool()]]
        assert torch.equal(heard, embeds)
        texts = sampling.decode_responses(trainer.processing_class, responses, lengths)
        ends = sampling.text_ends(trainer.processing_class, responses, lengths, texts)
        rollouts.append({**example, "embeds": embeds, "responses": responses, "lengths": lengths,
                         "texts": texts, "ends": ends})
    state = {"model": str(MODEL), "seed": 0, "round": 1, "policy_id": "made"}
    sampling.save_stage(tmp_path, "rollouts", {**state, "id": "made"}, rollouts)
    trainer.model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "training.json").write_text(json.dumps(state))
    for script in ("02_surprisal.py", "03_tree.py", "04_advantage.py"):
        call(script, "--run", tmp_path)
    wanted = [row for prompt in load(tmp_path, "advantages")["prompts"] for row in prompt[method]]
    wanted = pad_sequence(wanted, batch_first=True)
    torch.testing.assert_close(output["advantages"], wanted, atol=1e-5, rtol=0)
    assert wanted.unique().numel() > 4


def test_loss_and_gradient_are_those_of_05(trainer, monkeypatch):
    """Off policy, with a KL: the ratio of a token is anything from 0.6 to 1.2."""
    made = {}
    monkeypatch.setattr(trainer, "rollout_func",
                        lambda *asked: made.update(trainer.rollout(*asked)) or dict(made))
    inputs = dict(first_pass(trainer))
    mask = inputs["completion_mask"].bool()
    rows = {(*ids, *tokens): row for ids, tokens, row in zip(
        made["prompt_ids"], made["completion_ids"], trainer.advantages)}  # before TRL shuffled them
    advantages = [rows[(*ids[seen.bool()].tolist(), *tokens[here].tolist())]
                  for ids, seen, tokens, here in zip(inputs["prompt_ids"], inputs["prompt_mask"],
                                                     inputs["completion_ids"], mask)]
    advantages = pad_sequence([*advantages, torch.zeros(mask.shape[1])], batch_first=True)[:-1]
    assert len({ids[seen.bool()][0].item() for ids, seen in zip(
        inputs["prompt_ids"], inputs["prompt_mask"])}) == 2  # rows of both prompts

    logp = by_02(trainer, inputs)
    generator = torch.Generator().manual_seed(0)
    ratio = 0.6 + 0.6 * torch.rand(logp.shape, generator=generator)
    inputs["old_per_token_logps"] = logp.detach() - ratio.log()
    with trainer.model.disable_adapter(), torch.no_grad():
        logp_ref = by_02(trainer, inputs)
    args = parsed("05_train.py")
    wanted = training.policy_loss(logp, inputs["old_per_token_logps"], logp_ref, advantages, mask,
                                  args.clip_eps, args.kl_weight)
    found = trainer.compute_loss(trainer.model, inputs) * trainer.args.gradient_accumulation_steps
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(gradient_of(trainer, found), gradient_of(trainer, wanted)):
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(tmp_path):
    gradients, kept = [], []
    for options in ([], ["--gradient-checkpointing"]):
        trainer = build(tmp_path, "--lora-dropout", 0.25, *options)
        inputs = first_pass(trainer)
        sizes = {}

        def keep(tensor):
            memory = tensor.untyped_storage()
            sizes[memory.data_ptr()] = memory.nbytes()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trainer.compute_loss(trainer.model, inputs)
        gradients.append(gradient_of(trainer, loss))
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2
    assert all(one.any() and torch.equal(one, other) for one, other in zip(*gradients))


def own_draws(model, embeds, K, *limits):
    pairs = []
    for prompt in embeds:
        torch.manual_seed(int(1000 * prompt.abs().sum()))
        pairs += sample_responses(model, [prompt], K, *limits)
    return pairs


def gradients_of_a_run(run, *options):
    """Those of each update, while the run is trained with own_draws."""
    gradients, step = [], torch.optim.AdamW.step

    def spied(optimizer, *rest):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients.append([weight.grad.clone() for weight in weights])
        return step(optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "add_lora", trained_lora)
        patch.setattr(sampling, "sample_responses", own_draws)
        patch.setattr(torch.optim.AdamW, "step", spied)
        trl_leaf.main(options_of(run, *SMALL, *options))
    return gradients


def test_two_processes_are_as_one(tmp_path):
    processes = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                 "MASTER_PORT": "29517"}
        processes.append(subprocess.Popen(
            [sys.executable, __file__, tmp_path / "two", tmp_path / rank], cwd=ROOT,
            env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    one = gradients_of_a_run(tmp_path / "one")
    for process in processes:
        assert process.wait() == 0, process.stderr.read()
    for rank in "01":
        two = torch.load(tmp_path / rank)
        assert len(one) == len(two) == 2
        for update, other in zip(one, two):
            for gradient, expected in zip(other, update):
                assert (gradient - expected).norm() < 1e-3 * expected.norm()
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
               for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()


# What TRL would do otherwise.

def test_dropout_is_on_in_the_lora_alone_and_off_while_sampling(tmp_path, monkeypatch):
    trainer = build(tmp_path, "--lora-dropout", 0.25)
    modules = dict(trainer.model.get_base_model().named_modules())
    seen = []

    def watched(*asked):
        seen.append({name for name, module in modules.items() if module.training})
        return sample_responses(*asked)

    monkeypatch.setattr(sampling, "sample_responses", watched)
    inputs = first_pass(trainer)
    assert seen == [set()]
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *asked, **_: seen.append(
        {name for name, module in modules.items() if module.training}))
    trainer.model.train()
    with pytest.raises(TypeError):
        trainer.compute_loss(trainer.model, inputs)
    assert seen[1] == {name for name in modules if name.endswith("lora_dropout.default")} != set()


def test_sampling_is_that_of_01(trainer, monkeypatch):
    asked = []
    monkeypatch.setattr(sampling, "sample_responses", lambda model, embeds, *rest: asked.append(
        (len(embeds), *rest)) or sample_responses(model, embeds, *rest))
    first_pass(trainer)
    args = parsed("01_sample.py")
    assert asked == [(2, K, args.max_new_tokens, args.temperature, args.top_p)]


def test_branches_that_see_each_other_are_refused(trainer, monkeypatch):
    """Before the first update, as in 02: surprisal comes from a trie here, too."""
    score_responses = scoring.score_responses
    monkeypatch.setattr(scoring, "score_responses", lambda model, rollouts: [
        logp - 0.2 * (len(logp) > 1) for logp in score_responses(model, rollouts)])
    with pytest.raises(sampling.UserError, match="see each other"):
        first_pass(trainer)
    monkeypatch.setattr(trainer.state, "global_step", 1)
    first_pass(trainer)  # later ones are not checked


def test_defaults_are_the_demos_or_the_papers(tmp_path, trainer):
    demo = options_of(tmp_path)
    for script in ("01_sample.py", "03_tree.py", "05_train.py"):
        known = vars(parsed(script, "--run", tmp_path))
        assert {name: known[name] for name in known if name in vars(demo)} == {
            name: value for name, value in vars(demo).items() if name in known}
    paper = vars(options_of(tmp_path, "--model", "other"))
    assert paper.items() >= {
        "prompts_per_step": 6, "num_responses": 8, "fork_budget": 2, "learning_rate": 5e-6,
        "lora_rank": 64, "lora_alpha": 128, "lora_dropout": 0.05, "kl_weight": 0.02}.items()
    trainer.create_optimizer()
    [group] = [group for group in trainer.optimizer.param_groups if group["params"]]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (5e-4, (0.9, 0.95), 0)
    assert trainer.args.max_grad_norm == 1


# A run.

RUN = [*SMALL, "--lora-dropout", 0.1]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder, and what was said."""
    run = tmp_path_factory.mktemp("finished")
    done = subprocess.run([sys.executable, "tests/trl_leaf.py", "--run", run, *map(str, RUN)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run, done


def test_06_evaluates_the_run(finished):
    run, done = finished
    assert "2/2" in done.stderr and done.stdout.count("'grad_norm'") == 2
    assert f"2 updates -> {run}/adapter" in done.stdout
    call("06_eval.py", "--run", run, "--manifest", TEST, "--num-prompts", 2, "--passes", 1,
         "--max-new-tokens", 4)
    with open(run / "eval.csv", newline="") as file:
        base, trained = csv.DictReader(file)
    assert (trained["round"], trained["step"], trained["method"]) == ("2", "2", "leaf")
    assert base["method"] == "base"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 4 * 7 * 2 and all(weight.any() for weight in weights.values())
    assert not [path for path in (run / "adapter").iterdir() if path.is_dir()]


def test_a_finished_run_is_refused(finished):
    assert str(finished[0]) in refusal("tests/trl_leaf.py", "--run", finished[0], *RUN)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        train = trl_leaf.LeafTrainer.train
        patch.setattr(trl_leaf.LeafTrainer, "train",
                      lambda trainer, **more: trainer.add_callback(Stop) or train(trainer, **more))
        with pytest.raises(KeyboardInterrupt):
            trl_leaf.main(options_of(tmp_path, *RUN))
    assert not (tmp_path / "adapter").exists()
    updates = []
    monkeypatch.setattr(sampling, "sample_responses",
                        lambda *asked: updates.append(1) or sample_responses(*asked))
    trl_leaf.main(options_of(tmp_path, *RUN))
    assert len(updates) == 1  # not the first one again
    for name in ("adapter_model.safetensors", "training.json"):
        again, wanted = (run / "adapter" / name for run in (tmp_path, finished[0]))
        assert again.read_bytes().replace(str(tmp_path).encode(), str(finished[0]).encode()) == (
            wanted.read_bytes())


def test_an_update_is_split_evenly_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(sampling.UserError, match="--prompts-per-step"):
        trl_leaf.main(options_of(tmp_path, *SMALL))


def test_without_trl_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="pip install trl==1.16.0"):
        runpy.run_path("tests/trl_leaf.py")


if __name__ == "__main__":
    torch.save(gradients_of_a_run(sys.argv[1]), sys.argv[2])
