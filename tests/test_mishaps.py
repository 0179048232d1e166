"""Does anything go wrong without a word, or lose work? What once did, each on an input made here."""
import json
import math
import shutil
import sys
from importlib import import_module

import pytest
import soundfile
import torch
from conftest import MODEL, ROOT, SMALL, TEST, TRAIN, call, load, parsed, refusal
from safetensors.torch import load_file, save_file

sampling = import_module("01_sample")
training = import_module("05_train")

RATE = 16000
CLIP = TRAIN.parent / "train" / "000.ogg"
EVALUATION = ["--manifest", TEST, "--num-prompts", 1, "--passes", 1, "--max-new-tokens", 2]


# Recordings.

def written(path, wave, **settings):
    soundfile.write(str(path), wave.numpy(), RATE, **settings)
    return path


@pytest.mark.parametrize("name", ["a.aiff", "a.au", "a.w64"])
def test_other_formats_are_refused_since_nobody_checks_them(tmp_path, name):
    path = written(tmp_path / name, torch.ones(RATE) / 9)
    with pytest.raises(sampling.UserError, match=f"{path} .*not wav, flac, ogg or mp3"):
        sampling.load_audio(path, RATE)


def test_a_length_is_looked_at_before_anything_is_decoded(tmp_path, monkeypatch):
    """Hours of silence take little room in a file, and much in memory."""
    path = written(tmp_path / "long.flac", torch.zeros(31 * RATE))
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **named: pytest.fail("too late"))
    with pytest.raises(sampling.UserError, match=f"{path} lasts 31.00 s, more than 30 s"):
        sampling.load_audio(path, RATE, max_seconds=30)


@pytest.fixture
def corpus(tmp_path):
    """A manifest of four clips, of which the second cannot be read and the third has no position."""
    rows = []
    for number, audio in enumerate(["a.ogg", "empty.ogg", "short.wav", "d.ogg"]):
        rows.append(json.dumps({"id": str(number), "audio": audio, "prompt": "Translate.",
                                "reference": "Hallo."}))
    for name in ("a.ogg", "d.ogg"):
        shutil.copy(CLIP, tmp_path / name)
    (tmp_path / "empty.ogg").write_bytes(b"")
    written(tmp_path / "short.wav", torch.ones(RATE // 50) / 9)
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(rows))
    return path


def test_unreadable_clips_are_left_out_and_keep_their_place(corpus, capsys):
    """Without the flag they stop the round; with it the order of all others is what it was."""
    run = corpus.parent / "run"
    options = ["--run", run, *SMALL, "--manifest", corpus, "--num-prompts", 4]
    assert ".ogg" in refusal("01_sample.py", *options) or ".wav" in refusal("01_sample.py", *options)
    call("01_sample.py", *options, "--skip-unreadable")
    said = capsys.readouterr()
    assert all(f"left out: {corpus.parent / name}" in said.err for name in ("empty.ogg", "short.wav"))
    assert "Round 1: 2 of 4 prompts" in said.out
    rollouts = load(run, "rollouts")
    order = [str(n) for n in sampling.next_slice(4, 0, 4, 0)]
    assert [rollout["id"] for rollout in rollouts["prompts"]] == [n for n in order if n in "03"]
    assert rollouts["meta"]["seen"] == 4 and rollouts["meta"]["num_prompts"] == 2
    call("06_eval.py", "--run", run, *EVALUATION, "--manifest", corpus, "--num-prompts", 4,
         "--skip-unreadable")
    row = (run / "eval.csv").read_text().splitlines()[1]
    assert ",base," in row and row.endswith(",2,0.9")


def test_a_corpus_of_which_nothing_can_be_read(corpus):
    (corpus.parent / "a.ogg").write_bytes(b"")
    (corpus.parent / "d.ogg").unlink()
    assert "none of the 4" in refusal("01_sample.py", "--run", corpus.parent / "run", *SMALL,
                                      "--manifest", corpus, "--num-prompts", 4, "--skip-unreadable")


@pytest.mark.parametrize("where", ["load_audio", "soundfile.SoundFile", "resample", "encode", "check_ending"])
@pytest.mark.parametrize("error", [NameError("nmae"), TypeError("not callable"), AttributeError("no attribute"),
                                   torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
                         ids=lambda error: type(error).__name__)
def test_a_clip_is_not_left_out_because_of_a_bug_or_a_full_memory(tmp_path, monkeypatch, capsys, where, error):
    """In a load_audio or encode that someone has edited: the bug is to be seen, with its traceback."""
    def broken(*args, **named):
        raise error

    soundfile.write(tmp_path / "a.wav", torch.ones(8000).numpy() / 9, 8000)  # so that it is resampled
    (tmp_path / "manifest.jsonl").write_text(json.dumps(
        {"audio": "a.wav", "prompt": "Translate.", "reference": "Hallo."}))
    monkeypatch.setattr(f"01_sample.{where}", broken)
    options = ["--run", tmp_path / "run", *SMALL, "--manifest", tmp_path / "manifest.jsonl", "--skip-unreadable"]
    with pytest.raises(type(error)) as raised:
        sampling.main(parsed("01_sample.py", *options))
    assert raised.value is error and "left out" not in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


# Models and adapters.

def changed(path, change):
    """Rewrite a safetensors file with what change(dict of tensors) leaves."""
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})


def without(weights, part):
    return {name: weight for name, weight in weights.items() if part not in name}


def renamed(weights, part):
    return {name.replace(part, "other"): weight for name, weight in weights.items()}


def broken(weights, part):
    return {name: weight * math.nan if part in name else weight for name, weight in weights.items()}


@pytest.mark.parametrize("change", [without, renamed])
def test_weights_that_a_checkpoint_lacks(tmp_path, change):
    model = shutil.copytree(MODEL, tmp_path / "model")
    changed(model / "model.safetensors", lambda weights: change(weights, "layers.1.mlp.up_proj"))
    sentence = refusal("01_sample.py", "--run", tmp_path / "run", *SMALL, "--model", model)
    assert "layers.1.mlp.up_proj" in sentence and str(model) in sentence


@pytest.mark.parametrize("change", [without, renamed])
@pytest.mark.parametrize("script, options", [("06_eval.py", EVALUATION), ("05_train.py", []),
                                             ("01_sample.py", SMALL)])
def test_weights_that_an_adapter_lacks(tmp_path, rounds, change, script, options):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    changed(run / "adapter" / "adapter_model.safetensors",
            lambda weights: change(weights, "layers.1.mlp.up_proj.lora_B"))
    sentence = refusal(script, "--run", run, *options)
    assert "lora_B" in sentence or "other" in sentence
    assert str(run / "adapter") in sentence


def test_weights_that_are_no_numbers(tmp_path, rounds):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    changed(run / "adapter" / "adapter_model.safetensors",
            lambda weights: broken(weights, "layers.1.mlp.up_proj.lora_B"))
    for script, options in (("01_sample.py", SMALL), ("06_eval.py", EVALUATION)):
        assert "NaN" in refusal(script, "--run", run, *options)
    assert not (run / "eval.csv").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_ends_in_no_number_is_not_saved(tmp_path, rounds, monkeypatch, value):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    step = torch.optim.AdamW.step

    def overflowing(optimizer):
        step(optimizer)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(value)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(sampling.UserError, match="not saved.*--learning-rate"):
        training.main(parsed("05_train.py", "--run", run, "--prompts-per-step", 2))
    assert before == {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}


def test_a_weight_that_never_had_a_gradient(tmp_path, rounds):
    """AdamW keeps no moments of it, which is no mishap: the next round trains."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    path = run / "adapter" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    del state["state"][0]
    torch.save(state, path)
    training.main(parsed("05_train.py", "--run", run))
    assert sampling.read_state(run)["round"] == 2


def test_the_code_that_a_model_brings_is_not_run(tmp_path, monkeypatch):
    model = shutil.copytree(MODEL, tmp_path / "model")
    mark = tmp_path / "ran"
    (model / "mine.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class Mine(PretrainedConfig):\n    model_type = 'mine'\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(sampling.UserError, match=str(model)):
        sampling.load_model(str(model))
    assert not mark.exists()


@pytest.mark.parametrize("template, said", [
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{% for message in messages %}{{ message.role }}{% endfor %}", "<|AUDIO|>")])
def test_templates_that_fail(tmp_path, template, said):
    model = shutil.copytree(MODEL, tmp_path / "model")
    for path in model.glob("*chat_template*"):
        path.unlink()
    (model / "chat_template.jinja").write_text(template)
    sentence = refusal("01_sample.py", "--run", tmp_path / "run", *SMALL, "--model", model)
    assert said in sentence and "--raw-prompt" in sentence


# Stage files.

@pytest.mark.parametrize("script, name", [("03_tree.py", "surprisal"), ("04_advantage.py", "tree"),
                                          ("05_train.py", "surprisal"), ("05_train.py", "advantages")])
def test_a_stage_file_with_fewer_prompts(tmp_path, rounds, script, name):
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    stage = load(run, name)
    sampling.save_file(run / f"{name}.pt", {**stage, "prompts": stage["prompts"][:-1]})
    assert f"{name}.pt" in refusal(script, "--run", run)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers(handmade, value):
    stage = load(handmade, "surprisal")
    stage["prompts"][1]["surprisal"][0, 1] = value
    sampling.save_stage(handmade, "surprisal", stage["meta"], stage["prompts"])
    assert "made-1" in refusal("03_tree.py", "--run", handmade)
    assert not (handmade / "tree.pt").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_manifest_in_the_encodings_of_windows(tmp_path, encoding):
    row = {"audio": "a.wav", "prompt": "Übersetze.", "reference": "Grüße."}
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding=encoding)
    assert sampling.read_manifest(path)[0]["reference"] == "Grüße."


# The terminal, the folder, the memory.

def test_all_languages_are_printed():
    text = "a\u00a0b\u3000c نمی\u200cخواهم 😀\n"
    assert sampling.printable(text) == text
    assert sampling.printable("\x1b[2J\x9b\r\x7f\u202e") == "·[2J····"


def test_what_comes_from_data_cannot_steer_the_terminal(handmade, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J"
    rollouts = load(handmade, "rollouts")
    for rollout in rollouts["prompts"]:
        rollout |= {"prompt": evil, "reference": evil, "texts": [evil] * len(rollout["texts"])}
    sampling.save_file(handmade / "rollouts.pt", rollouts)
    call("03_tree.py", "--run", handmade)
    call("04_advantage.py", "--run", handmade)
    (handmade / "manifest.jsonl").write_text(json.dumps(
        {"audio": f"{evil}.wav", "prompt": "Translate.", "reference": "Hallo."}))
    said = refusal("01_sample.py", "--run", handmade / "run", "--manifest",
                   handmade / "manifest.jsonl", "--model", MODEL)
    said += refusal("02_surprisal.py", "--run", handmade / f"a{evil}b")
    output = capsys.readouterr()
    assert not {"\x1b", "\x07"} & set(said + output.out + output.err)


def test_an_empty_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, options in (("01_sample.py", SMALL), ("03_tree.py", [])):
        assert "''" in refusal(script, "--run", "", *options)
    assert not list(tmp_path.iterdir())


def test_a_temperature_that_underflows_is_greedy(demo, prompt_embeds):
    model, _ = demo
    [(greedy, _)] = sampling.sample_responses(model, prompt_embeds[:1], 2, 12, 0, 0.9)
    [(cold, _)] = sampling.sample_responses(model, prompt_embeds[:1], 2, 12, 1e-38, 0.9)
    assert greedy.tolist() == cold.tolist()


def test_a_second_stage_in_the_same_folder(tmp_path, rounds):
    """Refused while the first is at work there, and not afterwards, even if that was stopped."""
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    other = shutil.copytree(run, tmp_path / "other")
    before = (run / "tree.pt").read_bytes()

    def main(args):
        assert f"another stage is at work in {run}" in refusal("03_tree.py", "--run", run)
        assert (run / "tree.pt").read_bytes() == before
        call("03_tree.py", "--run", other)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="stopped"):
        sampling.run_stage(main, lambda: parsed("03_tree.py", "--run", run))
    call("03_tree.py", "--run", run)
    assert not [path for path in run.iterdir() if "lock" in path.name]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_is_full(tmp_path, error):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        sampling.run_stage(main, lambda: parsed("03_tree.py", "--run", tmp_path))
    assert "memory" in stop.value.code and "--prompts-per-batch" in stop.value.code


def test_python_without_docstrings_and_without_output(rounds, tmp_path, monkeypatch):
    """As by `python -OO 03_tree.py >&- 2>&-`."""
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    (run / "tree.pt").unlink()
    script = compile((ROOT / "03_tree.py").read_text(encoding="utf-8"), "03_tree.py", "exec", optimize=2)
    monkeypatch.setattr(sys, "argv", ["03_tree.py", "--run", str(run)])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    exec(script, {"__name__": "__main__", "__doc__": None})
    assert (run / "tree.pt").exists()
