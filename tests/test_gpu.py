"""Do the six stages run on a real GPU? Where there is none, this is skipped.

The other tests are of the CPU's numbers, and conftest.py hides the GPUs from them.
"""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, TEST, TRAIN, load
from safetensors.torch import load_file

DEVICE = ["--device", "cuda"]
OPTIONS = {
    "01_sample.py": [*DEVICE, "--manifest", TRAIN, "--num-prompts", 4, "--num-responses", 4, "--max-new-tokens", 24],
    "02_surprisal.py": DEVICE,
    "05_train.py": DEVICE,
    "06_eval.py": [*DEVICE, "--manifest", TEST, "--num-prompts", 4, "--passes", 2, "--max-new-tokens", 24]}


@pytest.fixture
def environment():
    """The environment with the GPUs as they were when pytest started; skips if torch finds none."""
    if torch.version.cuda is None or shutil.which("nvidia-smi") is None:
        pytest.skip("there is no GPU, or this torch knows none")
    found = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    at_start = Path("/proc/self/environ")  # Linux; os.environ has changed since
    for entry in at_start.read_bytes().split(b"\0") if at_start.exists() else []:
        name, _, value = os.fsdecode(entry).partition("=")
        if name == "CUDA_VISIBLE_DEVICES":
            found[name] = value
    asked = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if subprocess.run(asked, env=found, capture_output=True).returncode != 0:
        pytest.skip("torch finds no GPU that it may use")
    return found


def test_two_rounds_on_a_gpu(tmp_path, environment):
    """In the second round the trained adapter lies on top of the model."""
    for script in SCRIPTS[:5] + SCRIPTS:  # evaluated once, at the end
        options = ["--run", tmp_path, *OPTIONS.get(script, [])]
        done = subprocess.run([sys.executable, script, *map(str, options)], cwd=ROOT, env=environment,
                              capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
    rollouts = load(tmp_path, "rollouts")
    assert rollouts["meta"]["round"] == 2
    assert {prompt["embeds"].dtype for prompt in rollouts["prompts"]} == {torch.bfloat16}
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.isfinite().all() for weight in weights.values())
    with open(tmp_path / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["base", "leaf"]
    assert all(0 <= float(row[name]) <= 100 for row in rows for name in ("bleu_sampled", "bleu_greedy"))
