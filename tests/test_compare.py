"""Does a run of tests/compare.py train as the scripts do? Are its tables those of its runs' files?"""
import json
import pickle
import statistics
import sys
from importlib import import_module

import peft
import pytest
import torch
from conftest import TRAIN, call, load

import compare

sampling = import_module("01_sample")


def test_two_rounds_are_those_of_the_scripts(tmp_path, monkeypatch):
    """The same prompts, responses and updates: the same LoRA, to the bit."""
    monkeypatch.setattr("sys.argv", ["compare.py"])
    examples = sampling.read_manifest("tests/demo/train.jsonl")
    numbers = {example["id"]: n for n, example in enumerate(examples)}
    embeds = [torch.zeros(1, 1)] * len(examples)
    for _ in range(2):
        call("01_sample.py", "--run", tmp_path, "--num-prompts", 5, "--num-responses", 2, "--seed", 3)
        for script in ("02_surprisal.py", "03_tree.py", "04_advantage.py"):
            call(script, "--run", tmp_path)
        call("05_train.py", "--run", tmp_path, "--learning-rate", 1e-3)
        rollouts = load(tmp_path, "rollouts")["prompts"]
        for rollout in rollouts:
            embeds[numbers[rollout["id"]]] = rollout["embeds"]

    trained = []
    real_round = compare.train_round
    monkeypatch.setattr(compare, "train_round",
                        lambda model, *rest: (real_round(model, *rest), trained.append(model)))
    test_set = (examples[:1], [rollouts[0]["embeds"]])
    sampling.save_file(tmp_path / "embeds-demo.pt", [(examples, embeds), test_set])
    start = {"N": 5, "K": 2, "reward": "bleu", "task": "demo", "seed": 3}
    monkeypatch.setattr("sys.stderr", sys.stderr)  # put back after prepare
    compare.prepare(tmp_path, torch.get_num_threads(), start)
    rewards = compare.one_run(tmp_path, method="leaf", rate=1e-3, rounds=2, **start)

    assert list(rewards) == [0, 1, 2] and all(0 <= reward <= 100 for reward in rewards.values())
    found = peft.get_peft_model_state_dict(trained[-1])
    wanted = peft.load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(weight.any() for name, weight in found.items() if "lora_B" in name)  # it has learned


def test_recordings_are_encoded_once_into_a_new_folder(tmp_path, monkeypatch):
    manifest = tmp_path / "mine.jsonl"
    manifest.write_text(json.dumps({"audio": str(TRAIN.parent / "train" / "000.ogg"), "prompt": "Translate.",
                                    "reference": "Hallo."}))
    monkeypatch.setitem(compare.TASKS, "demo", {**compare.TASKS["demo"], "manifest": manifest, "test": manifest})
    for name in ("do_all", "show", "best_rate"):
        monkeypatch.setattr(compare, name, lambda *args: None)
    monkeypatch.setattr("sys.argv", ["compare.py", "--out", str(tmp_path / "runs" / "new")])
    compare.main()
    [path] = (tmp_path / "runs" / "new").iterdir()
    (train, _), (test, embeds) = torch.load(path, weights_only=True)
    assert train == test == sampling.read_manifest(manifest) and embeds[0].ndim == 2
    monkeypatch.setattr(sampling, "load_model", None)
    compare.main()  # nothing is left to do


def test_the_real_model_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.TASKS, "real", {**compare.TASKS["real"], "model": tmp_path / "none"})
    monkeypatch.setattr("sys.argv", ["compare.py", "--only", "real", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="make_real.py"):
        compare.main()


class OneProcess:
    """In place of a pool: what a pool would send goes through pickle here, too."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def map(self, function, items):
        return [pickle.loads(pickle.dumps(function))(item) for item in pickle.loads(pickle.dumps(items))]


def test_it_goes_on_and_compares_in_pairs(tmp_path, monkeypatch, capsys, prompt_embeds, examples):
    """All runs but one are there: that one is made, the others stay, and the table is theirs."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", OneProcess)
    monkeypatch.setattr(compare.os, "cpu_count", torch.get_num_threads)
    monkeypatch.setattr("sys.stderr", sys.stderr)  # put back afterwards
    methods, rates = ["grpo", "grpo-std", "leaf"], [5e-4, 1e-3]
    monkeypatch.setattr(compare, "EXPERIMENTS", {
        "bleu": {"N": 4, "K": 2, "seeds": 3, "reward": "bleu", "task": "demo", "rates": rates}})
    embeds = [prompt.clone() for prompt in prompt_embeds]
    sampling.save_file(tmp_path / "embeds-demo.pt", [(examples, embeds), (examples[:1], embeds[:1])])
    rewards = {("grpo", 5e-4): [60, 62, 64], ("grpo", 1e-3): [50, 52, 99],  # the third seed has no say
               ("grpo-std", 5e-4): [60, 60, 60], ("grpo-std", 1e-3): [60, 59, 99],
               ("leaf", 5e-4): [40, 42, 44], ("leaf", 1e-3): [63, 66, 69]}
    runs = compare.runs_of(compare.EXPERIMENTS["bleu"], dict.fromkeys(methods, rates), seeds=3, rounds=1)
    missing = runs[0]
    assert (missing["method"], missing["rate"], missing["seed"]) == ("grpo", 5e-4, 0)
    for run in runs[1:]:
        reward = rewards[run["method"], run["rate"]][run["seed"]]
        compare.run_file(tmp_path, run).write_text(f"round,reward\n0,10\n1,{reward}\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["compare.py", "--out", str(tmp_path), "--rounds", "1", "--jobs", "1",
                                     "--methods", *methods])
    compare.main()
    made = compare.read_run(tmp_path, missing)
    assert list(made) == [0, 1] and all(0 <= reward <= 100 for reward in made.values())

    compare.run_file(tmp_path, missing).write_text("round,reward\n0,10\n1,60\n", encoding="utf-8")
    capsys.readouterr()
    compare.main()  # nothing is left to do
    lines = capsys.readouterr().out.splitlines()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")]
    assert ("grpo", "0.0005", "10.0", "62.0") in rows and ("leaf", "0.001", "10.0", "66.0") in rows
    half = 4.303 * statistics.stdev([63 - 60, 66 - 62, 69 - 64]) / 3 ** 0.5
    of_grpo, of_grpo_std = rows.index(("minus grpo", "round 1")), rows.index(("minus grpo-std", "round 1"))
    assert rows[of_grpo + 3] == ("leaf", f"+4.0 ± {half:.1f}")
    half = 4.303 * statistics.stdev([63 - 60, 66 - 60, 69 - 60]) / 3 ** 0.5
    assert rows[of_grpo_std + 2:] == [("leaf", f"+6.0 ± {half:.1f}")]
    assert lines[-1].startswith("1 of 3 intervals exclude 0; about 0 would")

    sys.argv += ["--seeds", "1", "--rates", "5e-4"]
    compare.main()  # a single seed has no interval
    assert "exclude 0" not in capsys.readouterr().out


def test_a_kl_weight_of_ones_own(tmp_path, monkeypatch, capsys, prompt_embeds, examples):
    """It reaches the update, and has files of its own."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", OneProcess)
    monkeypatch.setattr(compare.os, "cpu_count", torch.get_num_threads)
    monkeypatch.setattr("sys.stderr", sys.stderr)  # put back afterwards
    monkeypatch.setattr(compare, "EXPERIMENTS", {
        "bleu": {"N": 4, "K": 2, "seeds": 1, "reward": "bleu", "task": "demo", "rates": [5e-4]}})
    seen = []
    monkeypatch.setattr(compare, "train_round", lambda *given: seen.append(given[-1].kl_weight))
    embeds = [prompt.clone() for prompt in prompt_embeds]
    sampling.save_file(tmp_path / "embeds-demo.pt", [(examples, embeds), (examples[:1], embeds[:1])])
    for option in (["--kl-weight", "0"], []):
        monkeypatch.setattr("sys.argv", ["compare.py", "--out", str(tmp_path), "--rounds", "1", "--jobs", "1",
                                         "--methods", "grpo", *option])
        compare.main()
    assert seen == [0, 0.02] and len(list(tmp_path.glob("*.csv"))) == 2
    assert "minus" not in capsys.readouterr().out


def test_a_task_in_bfloat16(tmp_path, monkeypatch, prompt_embeds, examples):
    """As on a GPU: weights in bfloat16, the LoRA and what positions are computed from in float32."""
    monkeypatch.setitem(compare.TASKS, "demo", {**compare.TASKS["demo"], "dtype": torch.bfloat16, "test_clips": 2})
    embeds = [prompt.bfloat16() for prompt in prompt_embeds]
    sampling.save_file(tmp_path / "embeds-demo.pt", [(examples, embeds), (examples, embeds)])
    learners = []
    real_learner = compare.Learner
    monkeypatch.setattr(compare, "Learner",
                        lambda *args, **given: learners.append(real_learner(*args, **given)) or learners[-1])
    monkeypatch.setattr("sys.stderr", sys.stderr)  # put back after prepare
    start = {"N": 4, "K": 3, "reward": "bleu", "task": "demo", "seed": 0}
    compare.prepare(tmp_path, torch.get_num_threads(), start)
    rewards = compare.one_run(tmp_path, method="td", rate=1e-2, rounds=1, **start)

    weights = dict(learners[-1].model.named_parameters())
    learned = {name for name in weights if "lora" in name}
    assert {weights[name].dtype for name in learned} == {torch.float32}
    assert {weights[name].dtype for name in weights.keys() - learned} == {torch.bfloat16}
    buffers = dict(learners[-1].model.named_buffers())
    assert {buffer.dtype for name, buffer in buffers.items() if "inv_freq" in name} == {torch.float32}
    assert len(learners[-1].test[0]) == 2 and rewards[1] != rewards[0]
