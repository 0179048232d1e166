"""Do the six scripts write and print what they say, run as a user runs them, and the same again?"""
import contextlib
import csv
import itertools
import json
import re
import shutil
import statistics
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import MODEL, SCRIPTS, SMALL, TEST, TRAIN, call, load, parsed, sampled_round
from safetensors.torch import load_file, save_file

sampling = import_module("01_sample")
advantage = import_module("04_advantage")

N, K, LIMIT = 3, 8, 24
STAGES = ["rollouts", "surprisal", "tree", "advantages"]


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def adapter_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The files of a user's run.

def test_rollouts(pipeline):
    for prompt in load(pipeline.run, "rollouts")["prompts"]:
        T = int(prompt["lengths"].max())
        assert prompt["embeds"].ndim == 2 and prompt["embeds"].dtype == torch.float32
        assert prompt["responses"].shape == (K, T) and prompt["responses"].dtype == torch.int64
        assert prompt["lengths"].shape == (K,) and prompt["lengths"].dtype == torch.int64
        assert 1 <= prompt["lengths"].min() and T <= LIMIT
        assert len(prompt["texts"]) == K and all(isinstance(text, str) for text in prompt["texts"])
        assert all(isinstance(prompt[key], str) for key in ("id", "audio", "prompt", "reference"))
        assert prompt["responses"][torch.arange(T) >= prompt["lengths"][:, None]].eq(0).all()


def test_texts_are_the_decoded_responses(demo, pipeline):
    for prompt in load(pipeline.run, "rollouts")["prompts"]:
        for tokens, length, text in zip(prompt["responses"], prompt["lengths"], prompt["texts"]):
            assert demo[1].tokenizer.decode(tokens[:length], skip_special_tokens=True) == text


def test_rollouts_hold_the_examples_of_the_manifest(pipeline):
    known = {example["id"]: example for example in sampling.read_manifest(TRAIN)}
    for prompt in load(pipeline.run, "rollouts")["prompts"]:
        example = known[prompt["id"]]
        assert all(prompt[key] == example[key] for key in ("prompt", "reference"))
        assert example["audio"].endswith(prompt["audio"])


def test_every_column_of_a_manifest_reaches_the_rewards(tmp_path):
    """Whoever writes another reward may need more than the reference."""
    more = {"speaker": 7, "others": ["Hallo!", "Guten Tag."], "weight": 0.5, "checked": None}
    row = {"id": "a", "audio": str(TRAIN.parent / "train" / "000.ogg"), "prompt": "Translate.",
           "reference": "Hallo.", **more}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    call("01_sample.py", "--run", tmp_path / "run", *SMALL, "--manifest", tmp_path / "mine.jsonl")
    [prompt] = load(tmp_path / "run", "rollouts")["prompts"]
    assert {name: prompt[name] for name in row} == row


def test_surprisal(pipeline):
    rollouts, scores = load(pipeline.run, "rollouts"), load(pipeline.run, "surprisal")
    assert len(scores["prompts"]) == N
    for prompt, score in zip(rollouts["prompts"], scores["prompts"]):
        padding = torch.arange(prompt["responses"].shape[1]) >= prompt["lengths"][:, None]
        for name in ("logp_old", "logp_ref", "surprisal"):
            assert score[name].shape == prompt["responses"].shape and score[name].dtype == torch.float32
            assert score[name][padding].eq(0).all() and score[name].isfinite().all()
        assert (score["surprisal"][~padding] >= 0).all()
        assert torch.equal(score["surprisal"], -score["logp_old"])


def test_tree(pipeline):
    rollouts, tree = load(pipeline.run, "rollouts"), load(pipeline.run, "tree")
    assert len(tree["prompts"]) == N
    for prompt, found in zip(rollouts["prompts"], tree["prompts"]):
        boundaries, groups = found["boundaries"], found["groups"]
        assert found.keys() == {"boundaries", "groups"} and len(groups) == len(boundaries) <= 2
        assert boundaries == sorted(set(boundaries)) and all(type(b) is int for b in boundaries)
        for b, nodes in zip(boundaries, groups):
            members = [i for node in nodes for i in node]
            assert all(len(node) >= 2 for node in nodes)
            assert len(set(members)) == len(members) and set(members) <= set(range(K))
            for node in nodes:
                assert len({tuple(row[:b]) for row in prompt["responses"][node].tolist()}) == 1


def test_advantages(pipeline):
    rollouts, advantages = load(pipeline.run, "rollouts"), load(pipeline.run, "advantages")
    tree = load(pipeline.run, "tree")
    for prompt, found, earned in zip(rollouts["prompts"], tree["prompts"], advantages["prompts"]):
        check_advantages(prompt, found, earned)


def check_advantages(prompt, found, earned):
    """Keys, shapes, zeros at padding, and every token of a response in exactly one of its spans."""
    K, T = prompt["responses"].shape
    rewards = earned["rewards"]
    assert rewards.shape == (K,) and rewards.tolist() == pytest.approx(advantage.prompt_rewards(prompt))
    assert earned.keys() == {"rewards", "leaf", "grpo", "td", "tempo", "spans"}
    torch.testing.assert_close(earned["td"], advantage.td_advantages(prompt["responses"], rewards.tolist()))
    assert torch.equal(earned["tempo"], earned["grpo"] + earned["td"])
    spans = advantage.span_advantages(found["boundaries"], found["groups"], prompt["lengths"], rewards.tolist())
    for row, wanted in zip(earned["spans"], spans, strict=True):
        assert [number for span in row for number in span] == pytest.approx(
            [number for span in wanted for number in span], abs=1e-6)
    standard = advantage.zscore(earned["spans"])
    for i, length in enumerate(prompt["lengths"].tolist()):
        starts, ends = [[span[k] for span in earned["spans"][i]] for k in (0, 1)]
        assert starts == [0, *ends[:-1]] and ends[-1] >= length
        wanted = torch.zeros(T)
        for start, end, value in standard[i]:
            wanted[start:end] = value
        wanted[length:] = 0
        torch.testing.assert_close(earned["leaf"][i], wanted)
        assert earned["leaf"][i, length:].eq(0).all() and earned["grpo"][i, length:].eq(0).all()
        assert earned["grpo"][i, :length].tolist() == pytest.approx(
            [advantage.grpo_advantages(rewards)[i].item()] * length, abs=1e-6)
    assert earned["leaf"].dtype == earned["grpo"].dtype == torch.float32


def test_advantages_of_trees_made_by_hand(handmade):
    call("03_tree.py", "--run", handmade)
    call("04_advantage.py", "--run", handmade)
    stages = [load(handmade, name)["prompts"] for name in ("rollouts", "tree", "advantages")]
    for prompt, found, earned in zip(*stages):
        check_advantages(prompt, found, earned)
    nested, identical, _ = stages[1]
    assert nested == {"boundaries": [2, 4], "groups": [[[0, 1, 2]], [[0, 1]]]}
    assert identical == {"boundaries": [2, 4], "groups": [[[0, 2], [1, 3]]] * 2}
    assert stages[2][2]["leaf"].eq(0).all() and stages[2][2]["grpo"].eq(0).all()


def test_a_larger_budget_and_none(handmade):
    call("03_tree.py", "--run", handmade, "--fork-budget", 0)
    assert load(handmade, "tree")["prompts"] == [{"boundaries": [], "groups": []}] * 3
    call("04_advantage.py", "--run", handmade)  # LEAF without a tree: every response for itself
    assert all(len(row) == 1 for earned in load(handmade, "advantages")["prompts"] for row in earned["spans"])
    call("03_tree.py", "--run", handmade, "--fork-budget", 4)
    assert load(handmade, "tree")["prompts"][0]["boundaries"] != [2, 4]


@pytest.mark.parametrize("rewards", [[1, 0, 1, 1], [True, False, False, False]])
def test_rewards_may_be_whole_numbers(handmade, monkeypatch, rewards):
    """A unit test's, say; they are asked for once a prompt, and the picture shows the saved ones."""
    call("03_tree.py", "--run", handmade)
    advantage, asked = import_module("04_advantage"), []
    monkeypatch.setattr(advantage, "prompt_rewards", lambda prompt: (asked.append(prompt["id"]), rewards)[1])
    advantage.main(parsed("04_advantage.py", "--run", handmade))
    assert load(handmade, "advantages")["prompts"][0]["rewards"].tolist() == [float(reward) for reward in rewards]
    assert len(asked) == len(set(asked)) == 3


def test_all_files_of_a_round_belong_together(pipeline):
    for run, turn in ((pipeline.first, 1), (pipeline.run, 2)):
        metas = [load(run, name)["meta"] for name in STAGES]
        assert len({meta["id"] for meta in metas}) == 1
        assert all(meta["round"] == turn and meta["num_responses"] == K for meta in metas)
    assert load(pipeline.first, "tree")["meta"]["id"] != load(pipeline.run, "tree")["meta"]["id"]


def test_the_second_round_takes_the_next_prompts(pipeline):
    order = sampling.next_slice(256, 0, 2 * N, 0)
    ids = [prompt["id"] for run in (pipeline.first, pipeline.run) for prompt in load(run, "rollouts")["prompts"]]
    manifest = sampling.read_manifest(TRAIN)
    assert ids == [manifest[n]["id"] for n in order] and len(set(ids)) == 2 * N


def test_prompts_come_round_again_newly_shuffled():
    order = sampling.next_slice(5, 0, 15, 7)
    assert [sorted(order[i:i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert order[:5] != order[5:10] or order[5:10] != order[10:]
    assert order[3:11] == sampling.next_slice(5, 3, 8, 7) and order != sampling.next_slice(5, 0, 15, 8)


def test_train_csv(pipeline):
    rows = table(pipeline.run / "train.csv")
    assert list(rows[0]) == ["round", "step", "method", "reward", "alike", "kl", "clipped", "length",
                             "grad_norm", "seconds"]
    assert [(row["round"], row["step"], row["method"]) for row in rows] == [
        ("1", "1", "leaf"), ("2", "2", "leaf")]  # three prompts are one step
    for row, run in zip(rows, (pipeline.first, pipeline.run)):
        stages = [load(run, name)["prompts"] for name in ("rollouts", "advantages")]
        rewards = torch.stack([earned["rewards"] for earned in stages[1]])
        lengths = torch.stack([prompt["lengths"] for prompt in stages[0]]).float()
        assert float(row["reward"]) == pytest.approx(rewards.mean().item(), abs=1e-4)
        assert float(row["length"]) == pytest.approx(lengths.mean().item(), abs=0.06)
        alike = (rewards == rewards[:, :1]).all(dim=1).float().mean().item()
        assert float(row["alike"]) == pytest.approx(alike, abs=0.006)
        assert float(row["kl"]) >= 0 and 0 <= float(row["clipped"]) <= 1 and float(row["seconds"]) > 0
    assert float(rows[0]["kl"]) == 0 and float(rows[0]["clipped"]) == 0


def test_prompts_may_have_other_numbers_of_responses(tmp_path, rounds):
    """K is that of a prompt: here 4 and 3, through all stages; the statistics are over all 7."""
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    rollouts = load(run, "rollouts")
    second = rollouts["prompts"][1]
    second |= {name: second[name][1:] for name in ("responses", "lengths", "texts", "ends")}
    sampling.save_file(run / "rollouts.pt", rollouts)
    call("02_surprisal.py", "--run", run)
    call("03_tree.py", "--run", run, "--show", 1)
    call("04_advantage.py", "--run", run, "--show", 1)
    call("05_train.py", "--run", run, "--prompts-per-batch", 2)
    stages = [load(run, name)["prompts"] for name in ("rollouts", "surprisal", "tree", "advantages")]
    assert [len(score["logp_old"]) for score in stages[1]] == [len(found["leaf"]) for found in stages[3]] == [4, 3]
    for prompt, _, found, earned in zip(*stages):
        check_advantages(prompt, found, earned)
    [row] = table(run / "train.csv")
    rewards = torch.cat([earned["rewards"] for earned in stages[3]])
    lengths = torch.cat([prompt["lengths"] for prompt in stages[0]]).float()
    assert float(row["reward"]) == pytest.approx(rewards.mean().item(), rel=1e-4, abs=1e-6)
    assert float(row["length"]) == pytest.approx(lengths.mean().item(), rel=1e-4)
    assert any(weight.any() for name, weight in adapter_of(run).items() if "lora_B" in name)


def test_05_prints_a_line_per_update(tmp_path, rounds, capfd):
    """As the update happens, and with the numbers of train.csv."""
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    call("05_train.py", "--run", run, "--prompts-per-step", 1)
    found = re.findall(r"step (\d+) \| reward ([\d.]+) \| alike ([\d.]+) \| kl ([\d.]+) \| clipped ([\d.]+)% "
                       r"\| length ([\d.]+) \| grad ([\d.]+) \| ([\d.]+) s\n", capfd.readouterr().err)
    columns = "step reward alike kl clipped length grad_norm seconds".split()
    rows = table(run / "train.csv")
    assert [row["step"] for row in rows] == [line[0] for line in found] == ["1", "2"]
    for line, row in zip(found, rows):
        shown = dict(zip(columns, map(float, line)))
        shown["clipped"] /= 100
        assert shown == pytest.approx({name: float(row[name]) for name in columns}, abs=0.051)


def test_the_lines_of_05_stand_beside_its_bar(pipeline):
    """`05 > log` has the summary alone, and `05 | head` stops no training."""
    for turn in pipeline.said:
        assert turn["05_train.py"].stdout.startswith("Round ") and turn["05_train.py"].stdout.count("\n") == 1
        assert "step " in turn["05_train.py"].stderr


def test_a_log_file_has_each_line_at_once(tmp_path):
    log = tmp_path / "log"
    found = []

    def main(args):
        for line in ("one", "two"):
            print(line)
            found.append(log.read_text())

    with open(log, "w") as file, contextlib.redirect_stdout(file):
        sampling.run_stage(main, lambda: parsed("03_tree.py", "--run", tmp_path))
    assert found == ["one\n", "one\ntwo\n"]


def test_eval_csv(pipeline):
    rows = table(pipeline.run / "eval.csv")
    assert list(rows[0]) == ["round", "step", "method", "bleu_sampled", "bleu_sampled_std", "bleu_greedy",
                             "exact_match", "manifest", "prompts", "temperature"]
    assert [(row["round"], row["step"], row["method"]) for row in rows] == [
        ("0", "0", "base"), ("2", "2", "leaf")]
    for row in rows:
        assert (row["manifest"], row["prompts"], row["temperature"]) == ("tests/demo/test.jsonl", "4", "0.9")
        assert all(0 <= float(row[name]) <= 100 for name in list(row)[3:7])
        assert 4 * float(row["exact_match"]) / 100 in range(5)


def test_predictions(pipeline):
    lines = (pipeline.run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions, wanted = [json.loads(line) for line in lines], sampling.read_manifest(TEST)[:4]
    assert len(predictions) == 4
    for prediction, example in zip(predictions, wanted):
        assert list(prediction) == ["id", "prompt", "reference", "prediction"]
        assert all(prediction[key] == example[key] for key in ("id", "prompt", "reference"))
        assert isinstance(prediction["prediction"], str)


def test_the_table_agrees_with_the_predictions(pipeline):
    evaluation = import_module("06_eval")
    lines = (pipeline.run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    texts, references = zip(*((row["prediction"], row["reference"]) for row in map(json.loads, lines)))
    last = table(pipeline.run / "eval.csv")[-1]
    assert float(last["bleu_greedy"]) == pytest.approx(evaluation.corpus_bleu(texts, references, True), abs=0.006)
    exact = sum(a.split() == b.split() for a, b in zip(texts, references)) / len(texts)
    assert float(last["exact_match"]) == pytest.approx(100 * exact, abs=0.06)


def test_the_scores_are_those_of_either_models_answers(tmp_path, rounds):
    """Base and adapter (made strong, so that they differ), sampled and greedy, by the parts of 01.
    Two references are the base's answers, one of them in capitals: BLEU ignores case, exact match
    does not."""
    def load_and_ask(adapter, K, temperature):
        model, processor = sampling.load_model(str(MODEL), adapter)
        _, embeds = sampling.embed_examples(model, processor, examples, parsed("01_sample.py"))
        torch.manual_seed(1000 * 5)
        sampled = sampling.sample_all(model, embeds, 32, K, 24, temperature, 0.9)
        return [processor.tokenizer.batch_decode([r[k, :n[k]] for r, n in sampled], skip_special_tokens=True)
                for k in range(K)]

    evaluation, run = import_module("06_eval"), shutil.copytree(rounds.trained, tmp_path / "run")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({name: weight * 30 if "lora_B" in name else weight for name, weight in weights.items()},
              run / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    examples = sampling.read_manifest(TEST)[:4]
    [answered] = load_and_ask(None, 1, 0)
    examples[0]["reference"], examples[1]["reference"] = answered[0], answered[1].upper()
    manifest = tmp_path / 'my "test", 1.jsonl'
    manifest.write_text("\n".join(json.dumps(example) for example in [
        {**example, "audio": str(Path(example["audio"]).resolve())} for example in examples]))
    call("06_eval.py", "--run", run, "--manifest", manifest, "--passes", 3,
         "--max-new-tokens", 24, "--seed", 5)
    rows, references = table(run / "eval.csv"), [example["reference"] for example in examples]
    for row, adapter in zip(rows, (None, run / "adapter"), strict=True):
        assert row["manifest"] == str(manifest)
        passes, [greedy] = load_and_ask(adapter, 3, 0.9), load_and_ask(adapter, 1, 0)
        bleus = [evaluation.corpus_bleu(texts, references, lowercase=True) for texts in passes]
        exact = [text == reference for text, reference in zip(greedy, references)]
        for name, value in (("bleu_sampled", statistics.fmean(bleus)),
                            ("bleu_sampled_std", statistics.stdev(bleus)),
                            ("bleu_greedy", evaluation.corpus_bleu(greedy, references, lowercase=True)),
                            ("exact_match", 100 * statistics.fmean(exact))):
            assert float(row[name]) == pytest.approx(value, abs=0.051), (row["method"], name)
    assert float(rows[0]["exact_match"]) >= 25 and rows[0]["bleu_greedy"] != rows[1]["bleu_greedy"]


def test_evaluation_is_added_and_repeats(tmp_path, rounds):
    run = shutil.copytree(rounds.trained, tmp_path / "run")
    options = ["--manifest", TEST, "--num-prompts", 2, "--max-new-tokens", 8, "--passes", 2, "--run", run]
    call("06_eval.py", *options)
    first = (run / "eval.csv").read_text(), (run / "predictions.jsonl").read_text()
    assert len(table(run / "eval.csv")) == 2
    call("06_eval.py", *options)
    assert (run / "predictions.jsonl").read_text() == first[1]
    rows = table(run / "eval.csv")
    assert len({tuple(row.values()) for row in rows}) == 2  # the same numbers again


def test_every_stage_says_what_it_wrote_and_ends_in_an_example(pipeline):
    for turn in pipeline.said:
        for script, name in zip(SCRIPTS, [*STAGES, "adapter", "eval.csv"]):
            if script in turn:
                assert name in turn[script].stdout and "Traceback" not in turn[script].stderr
    evaluated = pipeline.said[1]["06_eval.py"].stdout
    assert "tests/demo/model on 4 prompts of tests/demo/test.jsonl" in evaluated
    *_, base, leaf, _, last = evaluated.splitlines()
    assert "base" in base and "leaf" in leaf and f"report.py --run {pipeline.run}" in last


def test_long_work_has_progress_bars_and_03_and_04_none(pipeline):
    for script, word in [("01_sample.py", "encoding audio"), ("01_sample.py", "sampling"),
                         ("02_surprisal.py", "scoring"), ("05_train.py", "training")]:
        assert word in pipeline.said[0][script].stderr and "100%" in pipeline.said[0][script].stderr
    assert pipeline.said[0]["03_tree.py"].stderr == pipeline.said[0]["04_advantage.py"].stderr == ""


def test_nothing_is_left_over(pipeline):
    assert {path.name for path in pipeline.run.iterdir()} == {
        *(f"{name}.pt" for name in STAGES), "adapter", "train.csv", "eval.csv", "predictions.jsonl"}


# The same again.

def test_the_same_seed_gives_the_same_files_bit_for_bit(tmp_path, rounds):
    sampled_round(tmp_path)
    call("05_train.py", "--run", tmp_path)
    for name in [f"{stage}.pt" for stage in STAGES] + ["adapter/adapter_model.safetensors",
                                                        "adapter/optimizer.pt", "adapter/training.json"]:
        assert (tmp_path / name).read_bytes() == (rounds.trained / name).read_bytes(), name


def test_other_methods_train_from_the_same_files(tmp_path, rounds):
    found = {}
    for method in ("leaf", "grpo", "td", "tempo"):
        run = shutil.copytree(rounds.sampled, tmp_path / method)
        call("05_train.py", "--run", run, "--method", method)
        found[method] = adapter_of(run)
        assert [row["method"] for row in table(run / "train.csv")] == [method]
        assert all((run / f"{name}.pt").read_bytes() == (rounds.sampled / f"{name}.pt").read_bytes()
                   for name in STAGES)
    assert same(found["leaf"], adapter_of(rounds.trained))
    assert not any(same(found[one], found[other]) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize("options, factors", [
    ([], [1, 1]),
    (["--learning-rate", 1e-3], [1, 1]),
    (["--total-steps", 40], [0.5, 1]),  # 5% of 40 steps are 2: half the peak, the peak
])
def test_the_learning_rate_reaches_the_optimizer(tmp_path, rounds, monkeypatch, options, factors):
    run, used, step = shutil.copytree(rounds.sampled, tmp_path / "run"), [], torch.optim.AdamW.step

    def spied(optimizer, *rest):
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    call("05_train.py", "--run", run, "--prompts-per-step", 1, *options)
    peak = parsed("05_train.py", *options).learning_rate
    assert used == pytest.approx([factor * peak for factor in factors])
    assert len(table(run / "train.csv")) == 2
    recorded = json.loads((run / "adapter" / "training.json").read_text())
    assert recorded["learning_rate"] == peak and recorded["seed"] == 0
    assert not {"run", "device", "lora_rank"} & recorded.keys()


@pytest.mark.parametrize("script, wanted", list(zip(SCRIPTS, (
    dict(num_prompts=64, num_responses=8, max_new_tokens=200, temperature=1.0, top_p=0.9,
         prompts_per_batch=16, seed=0),
    dict(prompts_per_batch=2),
    dict(fork_budget=2),
    dict(advantage_terms="both"),
    dict(method="leaf", prompts_per_step=4, prompts_per_batch=2, learning_rate=5e-4, total_steps=0,
         lora_rank=16, lora_alpha=32, lora_dropout=0.0, clip_eps=0.2, kl_weight=0.02, max_grad_norm=1.0,
         gradient_checkpointing=False),
    dict(passes=5, temperature=0.9, top_p=0.9, max_new_tokens=200, prompts_per_batch=32)))))
def test_defaults_are_those_of_the_paper_and_the_readme(script, wanted):
    found = vars(parsed(script))
    assert found["run"] == "runs/demo" and {name: found[name] for name in wanted} == wanted
    assert ("device" in found) == ("prompts_per_batch" in found) == (script[:2] not in ("03", "04"))


def test_defaults_on_a_gpu(monkeypatch):
    """A run is the same on every machine: only the device is another."""
    on_cpu = [vars(parsed(script)) for script in SCRIPTS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = [vars(parsed(script)) for script in SCRIPTS]
    assert [options.get("device") for options in on_gpu] == ["cuda", "cuda", None, None, "cuda", "cuda"]
    assert on_gpu == [{**options, "device": "cuda"} if "device" in options else options for options in on_cpu]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        call(script, "--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--run" in said and "default:" in said
    assert import_module(script[:-3]).__doc__.splitlines()[0].split("?")[0].split()[-1] in said
