"""The README's commands; the data recipes of tests/recipes.md on made-up files in the original layout."""
import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
import soundfile
import torch
from conftest import ROOT, shell

sampling = import_module("01_sample")


TESTS = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python -m pytest"


def test_ci_runs_the_readmes_line():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    [line] = [line for block in blocks for line in block.splitlines() if line.startswith(TESTS)]
    assert line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def run_recipe(corpus, folder):
    """Write the manifests of a corpus as the command in tests/recipes.md does."""
    subprocess.run([sys.executable, "tests/recipes.py", corpus, folder], cwd=ROOT, check=True)


def write_clip(path, seconds=0.5, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, torch.sin(torch.arange(int(seconds * rate)) * 0.1).numpy() / 2, rate)


def test_librisqa(tmp_path):
    (tmp_path / "LibriSQA-PartI").mkdir()
    for split, part, name in (("train", "train-clean-360", "115-122944-0026"),
                              ("test", "test-clean", "1089-134686-0000")):
        speaker, chapter, _ = name.split("-")
        write_clip(tmp_path / "LibriSpeech" / part / speaker / chapter / f"{name}.flac")
        row = {"text": "HE HOPED THERE WOULD BE STEW", "duration": 0.5, "question": "What did he hope for — übrigens?",
               "answer": "He hoped for \"stew\".", "speech_path": f"{part}/{speaker}/{chapter}/{name}.wav"}
        (tmp_path / "LibriSQA-PartI" / f"LibriSQA-PartI-{split}.json").write_text(
            json.dumps([row], ensure_ascii=False), encoding="utf-8")
    run_recipe("librisqa", tmp_path)
    for split, name in (("train", "115-122944-0026"), ("test", "1089-134686-0000")):
        [example] = sampling.read_manifest(tmp_path / f"{split}.jsonl")
        assert example["id"] == name and example["reference"] == "He hoped for \"stew\"."
        assert example["prompt"] == ("Listen to the audio <audio> and answer the following question: "
                                     "What did he hope for — übrigens?")
        assert len(sampling.load_audio(example["audio"], 16000)) == 8000


def test_covost2(tmp_path):
    rows = [("a.mp3", "Wenn \"Wasser\" knapp ist.", "train"), ("b.mp3", "Zweitens.", "train_covost"),
            ("c.mp3", "Drittens.", "dev"), ("d.mp3", "Viertens.", "test"), ("e.mp3", " ", "train"),
            ("gone.mp3", "Ohne Aufnahme.", "train"), ("empty.mp3", "Leer.", "train"), ("f.mp3", "Ein \\\\ Strich.", "test")]
    for path, *_ in rows:
        if path != "gone.mp3":
            write_clip(tmp_path / "clips" / path, rate=48000)
    (tmp_path / "clips" / "empty.mp3").write_bytes(b"")
    with open(tmp_path / "covost_v2.en_de.tsv", "w", encoding="utf-8") as file:
        file.write("\n".join("\t".join(row) for row in [("path", "translation", "split"), *rows]) + "\n")
    run_recipe("covost2", tmp_path)
    found = {split: sampling.read_manifest(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    assert [(x["id"], x["reference"]) for x in found["train"]] == [
        ("a.mp3", "Wenn \"Wasser\" knapp ist."), ("b.mp3", "Zweitens.")]
    assert [(x["id"], x["reference"]) for x in found["test"]] == [
        ("d.mp3", "Viertens."), ("f.mp3", "Ein \\ Strich.")]
    for example in found["train"] + found["test"]:
        assert example["prompt"] == "<audio> Listen to the speech and translate it into German."
        assert len(sampling.load_audio(example["audio"], 16000)) > 7000


@pytest.mark.parametrize("corpus, missing", [("librisqa", "LibriSQA-PartI-train.json"),
                                             ("covost2", "covost_v2.en_de.tsv")])
def test_a_recipe_without_its_files_says_what_is_missing(tmp_path, corpus, missing):
    done = shell("tests/recipes.py", corpus, tmp_path)
    [sentence] = done.stderr.splitlines()
    assert done.returncode == 1 and missing in sentence and "tests/recipes.md" in sentence
    assert not list(tmp_path.iterdir())
