"""Does one sentence name each mistake and mishap, and is nothing lost that was written?"""
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, SCRIPTS, SMALL, TEST, TRAIN, call, load, parsed, refusal, shell

sampling = import_module("01_sample")

NEEDS = [("02_surprisal.py", "rollouts", "01_sample.py"), ("03_tree.py", "rollouts", "01_sample.py"),
         ("03_tree.py", "surprisal", "02_surprisal.py"), ("04_advantage.py", "rollouts", "01_sample.py"),
         ("04_advantage.py", "tree", "03_tree.py"), ("05_train.py", "rollouts", "01_sample.py"),
         ("05_train.py", "surprisal", "02_surprisal.py"), ("05_train.py", "advantages", "04_advantage.py")]
EVALUATION = ["--manifest", TEST, "--num-prompts", 1, "--passes", 1, "--max-new-tokens", 2]


@pytest.fixture
def sampled(tmp_path, rounds):
    """A copy of a folder with all stage files of the first round and no adapter yet."""
    return shutil.copytree(rounds.sampled, tmp_path / "run")


@pytest.fixture
def trained(tmp_path, rounds):
    return shutil.copytree(rounds.trained, tmp_path / "run")


@pytest.fixture
def ready(tmp_path, rounds):
    """A copy of a folder that is ready for the second training."""
    return shutil.copytree(rounds.ready, tmp_path / "run")


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


# Stages out of order.

@pytest.mark.parametrize("script, missing, writer", NEEDS)
def test_a_stage_before_the_one_it_needs(sampled, script, missing, writer):
    (sampled / f"{missing}.pt").unlink()
    before = contents(sampled)
    sentence = refusal(script, "--run", sampled)
    assert f"{missing}.pt" in sentence and writer in sentence
    assert contents(sampled) == before


@pytest.mark.parametrize("script, missing, writer", [need for need in NEEDS if need[1] != "rollouts"])
def test_files_of_another_round(sampled, rounds, script, missing, writer):
    shutil.copy(rounds.ready / f"{missing}.pt", sampled)
    before = contents(sampled)
    sentence = refusal(script, "--run", sampled)
    assert f"{missing}.pt" in sentence and writer in sentence and "other rollouts" in sentence
    assert contents(sampled) == before


def test_rollouts_with_other_references_are_other_rollouts(tmp_path, rounds):
    """The responses may be the same; the rewards are not."""
    ids = []
    for reference in ("Hallo.", "Guten Tag."):
        line = {"audio": str(TRAIN.parent / "train" / "000.ogg"), "prompt": "Translate.", "reference": reference}
        (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
        call("01_sample.py", "--run", tmp_path / "run", *SMALL, "--manifest", tmp_path / "manifest.jsonl")
        ids.append(load(tmp_path / "run", "rollouts")["meta"]["id"])
    assert ids[0] != ids[1]


def fingerprint(manifest):
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]


@pytest.mark.parametrize("option, value, now, before", [
    ("--system-prompt", "Be brief.", "Be brief.", ""), ("--seed", 3, "3", "0"), ("--raw-prompt", None, "True", "False"),
    ("--manifest", TEST, f"128 prompts, sha256 {fingerprint(TEST)}", f"256 prompts, sha256 {fingerprint(TRAIN)}"),
    ("--model", "some/other", "some/other", str(MODEL))])
def test_a_flag_that_contradicts_the_run(ready, option, value, now, before):
    """Each is part of what the adapter was trained with; a forgotten one would go unnoticed."""
    options = [option] if value is None else [option, value]
    files = contents(ready)
    sentence = refusal("01_sample.py", "--run", ready, *SMALL, *options)
    assert option in sentence and repr(now) in sentence and f"trained with {before!r}" in sentence
    assert contents(ready) == files


def test_other_credit_and_another_method_may_follow(ready):
    """A reader may try them in a trained run; train.csv and eval.csv say of each row what it was."""
    call("03_tree.py", "--run", ready, "--fork-budget", 4)
    call("04_advantage.py", "--run", ready, "--advantage-terms", "global", "--multiplicity", 0)
    call("05_train.py", "--run", ready, "--method", "grpo", "--learning-rate", 1e-3)
    state = json.loads((ready / "adapter" / "training.json").read_text())
    wanted = {"method": "grpo", "fork_budget": 4, "advantage_terms": "global", "multiplicity": 0, "round": 2}
    assert {name: state[name] for name in wanted} == wanted
    call("06_eval.py", "--run", ready, *EVALUATION)
    for table, methods in (("train.csv", ["leaf", "grpo"]), ("eval.csv", ["base", "grpo"])):
        assert [line.split(",")[2] for line in (ready / table).read_text().splitlines()[1:]] == methods


def test_sampling_may_change_between_rounds(trained):
    options = [*SMALL, "--num-prompts", 1, "--num-responses", 2, "--max-new-tokens", 3, "--temperature", 0.5]
    call("01_sample.py", "--run", trained, *options, "--top-p", 0.5, "--skip-unreadable")
    assert load(trained, "rollouts")["meta"]["round"] == 2


def test_a_manifest_may_move_but_not_change(tmp_path, rounds):
    """It is known by its content, so that its corpus can be put elsewhere between two rounds."""
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    for number in range(3):
        shutil.copy(TRAIN.parent / "train" / f"00{number}.ogg", corpus)
    lines = [json.dumps({"audio": f"00{n}.ogg", "prompt": "Translate.", "reference": "Hallo."}) for n in range(3)]
    (corpus / "mine.jsonl").write_text("\n".join(lines))
    call("01_sample.py", "--run", run, *SMALL, "--manifest", corpus / "mine.jsonl")
    for script in SCRIPTS[1:5]:
        call(script, "--run", run)
    corpus = corpus.rename(tmp_path / "elsewhere")
    call("01_sample.py", "--run", run, *SMALL, "--manifest", corpus / "mine.jsonl")
    meta = load(run, "rollouts")["meta"]
    assert meta["round"] == 2 and meta["manifest"] == str(corpus / "mine.jsonl")
    for changed, count in ((lines[:2], 2), (lines[::-1], 3)):  # another order is other prompts, too
        (corpus / "mine.jsonl").write_text("\n".join(changed))
        sentence = refusal("01_sample.py", "--run", run, *SMALL, "--manifest", corpus / "mine.jsonl")
        assert f"is '{count} prompts, sha256 " in sentence and "trained with '3 prompts, sha256 " in sentence


def test_the_same_model_by_another_path(trained):
    call("01_sample.py", "--run", trained, *SMALL, "--model", f"{MODEL.parent}/./{MODEL.name}/")
    assert load(trained, "rollouts")["meta"]["round"] == 2


def test_what_was_made_of_an_earlier_tree_goes_with_it(tmp_path, rounds):
    """Or 05 would train on the old credit after another 03."""
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    call("03_tree.py", "--run", run, "--fork-budget", 4)
    assert (run / "surprisal.pt").exists() and not (run / "advantages.pt").exists()
    assert "run 04_advantage.py" in refusal("05_train.py", "--run", run)


def test_evaluation_takes_model_and_prompt_from_the_run(tmp_path, monkeypatch):
    """From the rollouts before the first training, from the adapter afterwards."""
    evaluation, run, seen = import_module("06_eval"), tmp_path / "run", []
    embed_examples = sampling.embed_examples

    def spied(model, processor, examples, args):
        seen.append((processor.tokenizer.name_or_path, args.system_prompt, args.raw_prompt))
        return embed_examples(model, processor, examples, args)

    monkeypatch.setattr(evaluation.sampling, "embed_examples", spied)
    model = str(shutil.copytree(MODEL, tmp_path / "model"))
    options = ["--run", run, *EVALUATION]
    call("01_sample.py", "--run", run, *SMALL, "--model", model, "--system-prompt", "Be brief.", "--raw-prompt")
    seen.clear()
    evaluation.main(parsed("06_eval.py", *options))
    for script in SCRIPTS[1:5]:
        call(script, "--run", run)
    (run / "rollouts.pt").unlink()
    evaluation.main(parsed("06_eval.py", *options))
    assert seen == [(model, "Be brief.", True)] * 2


def test_evaluation_before_anything_was_sampled(tmp_path):
    sentence = refusal("06_eval.py", "--run", tmp_path / "run", *EVALUATION)
    assert "rollouts.pt is missing" in sentence and f"run 01_sample.py with --run {tmp_path / 'run'}" in sentence
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("option", ["--model=tests/demo/model", "--system-prompt=Be brief.", "--raw-prompt"])
def test_evaluation_cannot_be_told_another_model_or_prompt(trained, capsys, option):
    with pytest.raises(SystemExit) as stop:
        call("06_eval.py", "--run", trained, option)
    assert stop.value.code == 2 and option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("script", ["02_surprisal.py", "05_train.py"])
@pytest.mark.parametrize("policy", [None, "another"])
def test_rollouts_of_another_policy(ready, script, policy):
    """Of the untouched model, or of the adapter of another run."""
    rollouts = load(ready, "rollouts")
    rollouts["meta"]["policy_id"] = policy
    sampling.save_file(ready / "rollouts.pt", rollouts)
    before = contents(ready)
    sentence = refusal(script, "--run", ready)
    assert "was not sampled by" in sentence and "01_sample.py" in sentence and contents(ready) == before


def test_rollouts_of_an_adapter_that_is_gone(ready):
    shutil.rmtree(ready / "adapter")
    assert "01_sample.py" in refusal("05_train.py", "--run", ready)


# Files that are not whole.

@pytest.mark.parametrize("script, name, writer", NEEDS)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_stage_file_that_is_cut_off(sampled, script, name, writer, share):
    path = sampled / f"{name}.pt"
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    sentence = refusal(script, "--run", sampled)
    assert str(path) in sentence and writer in sentence


def test_a_stage_file_that_is_something_else(sampled):
    torch.save([1, 2, 3], sampled / "tree.pt")
    assert "tree.pt" in refusal("04_advantage.py", "--run", sampled)
    (sampled / "tree.pt").write_text("hello")
    assert "tree.pt" in refusal("04_advantage.py", "--run", sampled)


def test_a_stage_file_with_more_than_tensors_says_why(sampled):
    """Who changes a stage may save what torch.load refuses: the reason has to be told."""
    torch.save({"meta": {"id": Path("mine")}, "prompts": []}, sampled / "tree.pt")
    assert "pathlib" in refusal("04_advantage.py", "--run", sampled)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "training.json", "optimizer.pt"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "missing"])
def test_an_adapter_that_is_not_whole(tmp_path, rounds, file, cut):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    path = run / "adapter" / file
    if cut:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    else:
        path.unlink()
    before = contents(run)
    assert str(run / "adapter") in refusal("05_train.py", "--run", run)
    assert contents(run) == before


@pytest.mark.parametrize("model", ["no/such/folder", "nobody/no-such-model"])
def test_a_model_that_is_not_there(model):
    with pytest.raises(sampling.UserError, match=model):
        sampling.load_model(model)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "missing"])
def test_a_model_that_is_not_whole(tmp_path, file, cut):
    model = shutil.copytree(MODEL, tmp_path / "model")
    path = model / file
    if cut:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(sampling.UserError, match=str(model)):
        sampling.load_model(str(model))


# Options.

@pytest.mark.parametrize("script, options, said", [
    ("03_tree.py", ["--fork-budget", -1], "-1"), ("03_tree.py", ["--fork-budget", "two"], "two"),
    ("03_tree.py", ["--show", -1], "-1"), ("04_advantage.py", ["--show", -1], "-1"),
    ("04_advantage.py", ["--advantage-terms", "all"], "all"), ("05_train.py", ["--method", "ppo"], "ppo"),
    ("01_sample.py", ["--num-prompts", 0], "0"), ("01_sample.py", ["--num-responses", 0], "0"),
    ("01_sample.py", ["--max-new-tokens", -3], "-3"), ("06_eval.py", ["--passes", 0], "0"),
    ("05_train.py", ["--prompts-per-step", 0], "0"), ("02_surprisal.py", ["--no-such-option"], "no-such"),
    ("05_train.py", ["--lora-dropout", 1.5], "1.5 is not from"), ("05_train.py", ["--kl-weight", "inf"], "inf is not"),
    ("01_sample.py", ["--seed", 10**30], "is not from"), ("01_sample.py", ["--top-p", "nan"], "nan is not from"),
])
def test_options_that_make_no_sense(capsys, script, options, said):
    with pytest.raises(SystemExit) as stop:
        call(script, *options)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and said in last and options[0] in last


@pytest.mark.parametrize("script", ["03_tree.py", "04_advantage.py"])
def test_a_prompt_that_is_not_there(sampled, script):
    before = contents(sampled)
    sentence = refusal(script, "--run", sampled, "--show", 2)  # there are 0 and 1
    assert "--show" in sentence and "2" in sentence
    assert contents(sampled) == before


def test_a_gpu_that_is_full_is_no_broken_adapter(rounds, monkeypatch):
    def full(*args, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    import peft
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    assert "fewer --prompts-per-batch" in refusal("05_train.py", "--run", rounds.ready)


def test_a_run_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    refusal("01_sample.py", "--run", tmp_path / "run", *SMALL)
    assert (tmp_path / "run").read_text() == "mine"


# As the shell sees it.

def test_a_mistake_in_the_shell(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"audio": "a", "prompt": "b", "reference": "c"}\noops\n')
    done = shell("01_sample.py", "--run", tmp_path / "run", "--manifest", tmp_path / "bad.jsonl")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert all(word in done.stderr.splitlines()[-1] for word in ("bad.jsonl", "line 2"))
    assert not list((tmp_path / "run").iterdir())


# Mishaps.

def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file on a disk that has room for half of what is written."""

    def write(self, content):
        super().write(bytes(content)[:len(content) // 2])
        full_disk()


WRITTEN = ["rollouts.pt", "surprisal.pt", "tree.pt", "advantages.pt", "train.csv", "eval.csv"]


def open_on_a_full_disk(path, mode="r", *rest, open=open, **named):
    new = str(path).endswith(".part")
    return FullDisk(path, "w") if new else open(path, mode, *rest, **named)


@pytest.mark.parametrize("script, file, where", [
    *[(script, file, ("builtins.open", open_on_a_full_disk)) for script, file in zip(SCRIPTS, WRITTEN)],
    *[(script, file, ("os.replace", full_disk)) for script, file in zip(SCRIPTS, WRITTEN)],
    ("05_train.py", "adapter", ("peft.PeftModel.save_pretrained", full_disk))])
def test_a_full_disk(tmp_path, rounds, monkeypatch, script, file, where):
    """The files are as before, and the sentence names file and disk."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    before = contents(run)
    monkeypatch.setattr(*where)
    options = {"01_sample.py": SMALL, "06_eval.py": EVALUATION}.get(script, [])
    sentence = refusal(script, "--run", run, *options)
    assert "No space left" in sentence and f"cannot write {run}/{file}" in sentence
    monkeypatch.undo()
    after = {path: content for path, content in contents(run).items() if path.suffix != ".part"}
    if file == "adapter":  # the updates are done: their rows stay
        assert after.pop(Path("train.csv")).startswith(before.pop(Path("train.csv")))
    assert after == before


LIMITED = """
import os, resource, signal, sys, torch
from importlib import import_module
sampling = import_module("01_sample")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (10, 4_000, 361_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        sampling.save_file(sys.argv[1], [torch.zeros(size) for size in (9, 90_000, 9)])
    except (sampling.UserError, RuntimeError) as error:  # that of torch may have come first
        print(limit, os.path.getsize(sys.argv[1] + ".part"))
"""


def test_a_disk_that_fills_up_halfway(tmp_path):
    """No file may grow beyond the limit; torch's archive is cut in its beginning, middle or end: the
    old file is whole."""
    path = tmp_path / "a.pt"
    sampling.save_file(path, "old\n")
    done = subprocess.run([sys.executable, "-c", LIMITED, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # not the signal of an abort
    sizes = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(sizes) == 3 and all(0 < size <= limit for limit, size in sizes)
    assert path.read_text() == "old\n"


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """Killed at the rename: the new content lies beside, complete, and the old file is untouched."""
    path, seen, replace = tmp_path / "a.txt", [], os.replace
    sampling.save_file(path, "old\n")

    def spied(source, target):
        seen.append((Path(source).read_bytes(), Path(target).read_bytes()))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", spied)
    sampling.save_file(path, "new\n")
    assert seen == [(b"new\n", b"old\n")] and path.read_bytes() == b"new\n"


@pytest.mark.parametrize("left_of_the_old", ["all", "half", "nothing"])
def test_a_kill_after_the_new_adapter_is_complete(tmp_path, rounds, left_of_the_old):
    """Its training.json, the last file, is there: the next stage finishes the replacement."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    shutil.copytree(rounds.again / "adapter", run / "adapter.part")
    if left_of_the_old == "half":
        (run / "adapter" / "training.json").unlink()
    if left_of_the_old == "nothing":
        shutil.rmtree(run / "adapter")
    assert sampling.read_state(run)["round"] == 2
    assert contents(run / "adapter") == contents(rounds.again / "adapter") and not (run / "adapter.part").exists()


def killed(*args, **named):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["peft.PeftModel.save_pretrained", "torch.save", "json.dumps"])
def test_a_kill_before_the_new_adapter_is_complete(tmp_path, rounds, monkeypatch, where):
    """The old adapter counts; what lies beside it is replaced by the next training."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    monkeypatch.setattr(where, killed)
    assert "stopped" in refusal("05_train.py", "--run", run)
    monkeypatch.undo()
    assert sampling.read_state(run)["round"] == 1
    assert contents(run / "adapter") == contents(rounds.ready / "adapter")
    call("05_train.py", "--run", run)
    assert sampling.read_state(run)["round"] == 2 and not (run / "adapter.part").exists()


def test_a_kill_in_the_middle_of_training(tmp_path, rounds, monkeypatch):
    """The rows so far stay; running on leaves each (round, step) once, and those of older rounds."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    before = (run / "train.csv").read_text()
    training, updates = import_module("05_train"), []
    train_step = training.train_step

    def killed_at_the_second(*args):
        updates.append(1)
        return killed() if len(updates) == 2 else train_step(*args)

    monkeypatch.setattr(training, "train_step", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        training.main(parsed("05_train.py", "--run", run, "--prompts-per-step", 1))
    monkeypatch.undo()
    after = (run / "train.csv").read_text()
    assert after.startswith(before) and after.splitlines()[-1].startswith("2,2,leaf,")
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    call("05_train.py", "--run", run, "--prompts-per-step", 1)
    steps = [line.split(",")[:2] for line in (run / "train.csv").read_text().splitlines()[1:]]
    assert steps == [["1", "1"], ["2", "2"], ["2", "3"]]


def test_bytes_that_are_no_text_in_a_table_cost_no_work(tmp_path, rounds):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    before = (run / "train.csv").read_bytes() + b"a note: \xff\n"
    (run / "train.csv").write_bytes(before)
    call("05_train.py", "--run", run)
    after = (run / "train.csv").read_bytes()
    assert after.startswith(before) and after[len(before):].startswith(b"2,2,leaf,")
    (run / "eval.csv").write_bytes(b"\xff\n")
    call("06_eval.py", "--run", run, *EVALUATION)
    lines = (run / "eval.csv").read_bytes().splitlines()
    assert lines[0] == b"\xff" and len(lines) == 4


def test_rows_of_this_round_and_later_go(tmp_path):
    """Of a training that was stopped, or of one that starts anew. What is no row stays."""
    training = import_module("05_train")
    path = tmp_path / "train.csv"
    assert training.earlier_lines(path, 1) == []
    path.write_text("round,step\n\n1,1\na note\n2,2\n3,3\n")
    assert training.earlier_lines(path, 2) == ["round,step", "", "1,1", "a note"]


@pytest.mark.parametrize("prompt", [0, 1])
def test_a_gradient_that_is_no_number_is_not_followed(tmp_path, rounds, prompt):
    """The adapter stays as it was; train.csv keeps the rows of the updates before, if there were any."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    advantages = torch.load(run / "advantages.pt", weights_only=True)
    advantages["prompts"][prompt]["leaf"][0, 0] = float("nan")
    torch.save(advantages, run / "advantages.pt")
    before = contents(run)
    assert "--learning-rate" in refusal("05_train.py", "--run", run, "--prompts-per-step", 1)
    after = contents(run)
    rows = after.pop(Path("train.csv")).decode().removeprefix(before.pop(Path("train.csv")).decode())
    assert after == before and [row.split(",")[:2] for row in rows.splitlines()] == [["2", "2"]] * prompt


def test_a_terminal_that_cannot_draw(rounds, tmp_path, monkeypatch):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    call("03_tree.py", "--run", run)
    assert b"??" in terminal.buffer.getvalue()


def test_a_reader_who_has_read_enough(rounds, monkeypatch):
    command = f"{sys.executable} 04_advantage.py --run {rounds.again} | true; exit ${{PIPESTATUS[0]}}"
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # all is written at the end
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.fixture
def nobody_reads(monkeypatch):
    """The output goes into a pipe whose reader has gone, as with `| true`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        yield


def test_sampling_goes_on_when_its_reader_has_read_enough(rounds, tmp_path, nobody_reads):
    """Exit status 0 says that the rollouts are there."""
    run = shutil.copytree(rounds.trained, tmp_path / "run")
    call("01_sample.py", "--run", run, *SMALL)
    assert load(run, "rollouts")["meta"]["round"] == 2


def test_training_goes_on_when_its_reader_has_read_enough(rounds, tmp_path, nobody_reads):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    call("05_train.py", "--run", run)
    assert json.loads((run / "adapter" / "training.json").read_text())["round"] == 2


def test_an_adapter_that_does_not_say_a_flag_contradicts_none(tmp_path, rounds):
    """As one of an earlier version, whose training.json knew fewer of them."""
    run = shutil.copytree(rounds.trained, tmp_path / "run")
    path = run / "adapter" / "training.json"
    state = json.loads(path.read_text())
    del state["manifest_content"], state["system_prompt"]
    path.write_text(json.dumps(state))
    call("01_sample.py", "--run", run, *SMALL)
    assert load(run, "rollouts")["meta"]["round"] == 2
