"""Is the repository what it says: six short scripts, true examples, few imports, a small demo?"""
import ast
import doctest
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import DEMO, MODEL, ROOT, SCRIPTS, TEST, TRAIN

sampling = import_module("01_sample")

MEGABYTE = 1e6


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_six_scripts_are_short():
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
    lines = [line for script in SCRIPTS for line in (ROOT / script).read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= 1565
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_story_comes_first(script):
    """A reader finds main below the imports, above every other function and class."""
    body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    defined = [part.name for part in body if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
    assert defined[0] == "main"


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_examples(script):
    assert doctest.testmod(import_module(script[:-3])).failed == 0


def test_docstring_examples_are_found():
    examples = [test for script in SCRIPTS
                for test in doctest.DocTestFinder().find(import_module(script[:-3])) if test.examples]
    assert {"build_trie", "select_boundaries", "group_prefixes", "04_advantage"} <= {
        test.name.split(".")[-1] for test in examples}


IMPORTED = """
import runpy, sys
from importlib import import_module
run = sys.argv[1]
sys.argv = ["x", "--nonsense"]
for script in {scripts}:
    import_module(script[:-3])
print("imported", flush=True)
for script in ("03_tree.py", "04_advantage.py"):
    sys.argv = [script, "--run", run]
    runpy.run_path(script, run_name="__main__")
assert not {{"transformers", "peft"}} & set(sys.modules)
"""


def test_importing_does_nothing_and_03_and_04_need_no_transformers(handmade):
    """No import reads options, prints, or waits for transformers before there is work."""
    code = IMPORTED.format(scripts=SCRIPTS)
    done = subprocess.run([sys.executable, "-c", code, handmade], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 0 and done.stdout.startswith("imported\n"), done.stderr
    assert (handmade / "advantages.pt").exists()


# The demo.

def test_the_demo_has_256_and_128_clips_of_its_own():
    train, test = sampling.read_manifest(TRAIN), sampling.read_manifest(TEST)
    assert (len(train), len(test)) == (256, 128)
    both = train + test
    assert len({example["id"] for example in both}) == len({example["audio"] for example in both}) == 384
    clips = {path for path in DEMO.rglob("*.ogg")}
    assert {str(clip) for clip in clips} == {example["audio"] for example in both}


def test_no_translation_of_the_test_is_in_the_training():
    """They spell out the whole announcement; two announcements may well have the same short answer."""
    train, test = ({example["reference"] for example in sampling.read_manifest(path)
                    if example["prompt"].startswith("Translate")} for path in (TRAIN, TEST))
    assert train and test and not train & test


def test_no_recording_is_in_the_demo_twice():
    contents = [path.read_bytes() for path in DEMO.rglob("*.ogg")]
    assert len(set(contents)) == len(contents)


def test_clips_can_be_read_and_are_short():
    examples = sampling.read_manifest(TRAIN) + sampling.read_manifest(TEST)
    for example in examples[::19]:
        wave = sampling.load_audio(example["audio"], 16000, max_seconds=8)
        assert 1 < len(wave) / 16000 <= 8 and 0.01 < wave.abs().max() <= 1.5


def test_both_tasks_are_there():
    for path in (TRAIN, TEST):
        prompts = [example["prompt"] for example in sampling.read_manifest(path)]
        translations = sum("Translate" in prompt for prompt in prompts)
        assert 0.2 < translations / len(prompts) < 0.8
        assert len({prompt for prompt in prompts if prompt.endswith("?")}) >= 10


def test_the_demo_is_small():
    assert size_of(DEMO / "train") + size_of(DEMO / "test") < 8 * MEGABYTE
    assert size_of(MODEL) < 6 * MEGABYTE
    assert {path.name for path in DEMO.iterdir() if path.name != "__pycache__"} == {
        "train", "test", "model", "train.jsonl", "test.jsonl", "make_demo.py", "report.png", "real",
        "make_real.py"}
    assert size_of(DEMO) < 16 * MEGABYTE


def test_the_demo_model_is_of_the_class_of_qwen2_audio(demo):
    model, processor = demo
    assert type(model).__name__ == "Qwen2AudioForConditionalGeneration"
    assert 2e6 < sum(weight.numel() for weight in model.parameters()) < 3e6
    assert processor.chat_template and len(processor.tokenizer) == 512
