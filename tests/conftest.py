"""What the tests share: the scripts, the demo, a hand-made tree, small runs of the six stages."""
import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU's numbers, also where there is a GPU
os.environ["OMP_NUM_THREADS"] = "1"  # here and in the stages: two threads spin while they wait on a busy machine
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch

DEMO = ROOT / "tests" / "demo"
MODEL, TRAIN, TEST = DEMO / "model", DEMO / "train.jsonl", DEMO / "test.jsonl"
SCRIPTS = ["01_sample.py", "02_surprisal.py", "03_tree.py", "04_advantage.py", "05_train.py",
           "06_eval.py"]

torch.set_num_threads(1)
sampling = import_module("01_sample")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning")  # of the libraries


def pytest_collection_finish(session):
    """What takes long and needs no fixture runs on the second core, beside the tests."""
    for module in {item.module for item in session.items}:
        if hasattr(module, "begin") and not session.config.option.collectonly:
            module.begin()


def call(script, *options):
    """Run a script in this process, as `python script options` would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def heard(script, *options):
    """What a script prints that runs in this process: .stdout, .stderr."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        call(script, *options)
    return SimpleNamespace(stdout=output.getvalue(), stderr=errors.getvalue())


def refusal(script, *options):
    """The one sentence with which a script ends that was called with a mistake."""
    with pytest.raises(SystemExit) as stop:
        call(script, *options)
    sentence = stop.value.code  # a string: printed on stderr, and the exit status is 1
    assert isinstance(sentence, str) and len(sentence.strip().splitlines()) == 1, sentence
    return sentence


def shell(script, *options):
    """Run a script as a user does, from the repository's root; the finished process."""
    return subprocess.run([sys.executable, script, *map(str, options)], cwd=ROOT, text=True,
                          capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL)


def parsed(script, *options):
    """The options of a script as its own parser reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        return import_module(Path(script).stem).parse_args()


def load(run, name):
    return torch.load(Path(run) / f"{name}.pt", weights_only=True)


def padded(rows, fill=0):
    """Ragged lists -> (K, T) tensor and lengths (K,)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows]), lengths


@pytest.fixture(scope="session")
def demo():
    """(model, processor) of the demo; tests leave them as they are."""
    return sampling.load_model(str(MODEL))


@pytest.fixture(scope="session")
def examples():
    return sampling.read_manifest(TEST)[:4]


@pytest.fixture(scope="session")
def prompt_embeds(demo, examples):
    """Embeddings of four test prompts, of different lengths."""
    model, processor = demo
    embeds = [sampling.embed_prompt(model, processor, sampling.load_audio(example["audio"], 16000),
                                    sampling.render_prompt(processor, example["prompt"]))
              for example in examples]
    assert len({len(e) for e in embeds}) > 1
    return embeds


# A tree that can be followed by hand: prompt 0 is nested, prompt 1 has identical responses that end
# before their node, prompt 2 has responses with equal rewards.

PIECES = {2: "", 5: "Sie", 6: " haben", 7: " zwei", 8: " drei", 9: " neue", 10: " alte",
          11: " Nachrichten.", 12: "Es", 13: " gibt", 14: " nur"}
NESTED = [[5, 6, 14, 7, 9, 11, 2], [5, 6, 14, 7, 10, 11, 2], [5, 6, 8, 9, 11, 2], [12, 13, 7, 11, 2]]
IDENTICAL = [[12, 2], [5, 6, 14, 7, 9, 11, 2], [12, 2], [5, 6, 14, 7, 10, 11, 2]]
EQUAL_REWARDS = [[12, 13, 2], [12, 13, 2], [12, 13, 2], [12, 13, 2]]
PEAKS = [{(2, 2): 3.0, (1, 4): 2.0}, {(3, 4): 3.0, (1, 2): 2.0}, {(0, 1): 1.0}]  # (response, token)


def handmade_prompt(rows, number=0):
    """One prompt of rollouts.pt from token lists."""
    responses, lengths = padded(rows)
    texts = ["".join(PIECES[token] for token in row) for row in rows]
    ends = torch.zeros_like(responses)
    for i, row in enumerate(rows):
        ends[i, :len(row)] = torch.tensor([len(PIECES[token]) for token in row]).cumsum(0)
    return {"id": f"made-{number}", "audio": "none.wav", "prompt": "How many messages?",
            "reference": "Sie haben nur zwei neue Nachrichten.", "embeds": torch.zeros(3, 4),
            "responses": responses, "lengths": lengths, "texts": texts, "ends": ends}


@pytest.fixture
def handmade(tmp_path):
    """A run's folder with rollouts.pt and surprisal.pt of three prompts made by hand."""
    prompts, scores = [], []
    for number, (rows, peaks) in enumerate(zip([NESTED, IDENTICAL, EQUAL_REWARDS], PEAKS)):
        prompt = handmade_prompt(rows, number)
        surprisal = torch.full(prompt["responses"].shape, 0.125)
        for place, nats in peaks.items():
            surprisal[place] = nats
        surprisal[torch.arange(surprisal.shape[1]) >= prompt["lengths"][:, None]] = 0.0
        prompts.append(prompt)
        scores.append({"surprisal": surprisal, "logp_old": -surprisal, "logp_ref": -surprisal})
    meta = {"id": "made", "round": 1, "seed": 0, "model": str(MODEL), "seen": 3,
            "system_prompt": "", "raw_prompt": False}
    sampling.save_stage(tmp_path, "rollouts", meta, prompts)
    sampling.save_stage(tmp_path, "surprisal", meta, scores)
    return tmp_path


# Runs of the stages.

SMALL = ["--manifest", TRAIN, "--model", MODEL, "--num-prompts", 2, "--num-responses", 4,
         "--max-new-tokens", 12]


def sampled_round(run, *options):
    """01 to 04 in this process. The rewards are made up, so that there is something to learn
    however well the demo model answers."""
    call("01_sample.py", "--run", run, *SMALL, *options)
    call("02_surprisal.py", "--run", run, "--device", "cpu")
    call("03_tree.py", "--run", run)
    advantage = import_module("04_advantage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advantage, "prompt_rewards", lambda prompt: [0.9, 0.2, 0.4, 0.0])
        advantage.main(parsed("04_advantage.py", "--run", run))


@pytest.fixture(scope="session")
def rounds(tmp_path_factory):
    """Two small rounds in this process, with copies of the folder on the way: .sampled before the
    first training, .trained after it, .ready before the second, .again after it."""
    base, run = tmp_path_factory.mktemp("rounds"), tmp_path_factory.mktemp("run")
    copies = {}
    for sampled, trained in (("sampled", "trained"), ("ready", "again")):
        sampled_round(run)
        copies[sampled] = shutil.copytree(run, base / sampled)
        call("05_train.py", "--run", run)
        copies[trained] = shutil.copytree(run, base / trained)
    return SimpleNamespace(**copies)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The six scripts, two rounds: the folder, a copy of it after the first round, and what either
    printed. (test_readme_commands.py runs them from the shell.)"""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    first, said = run.parent / "first", []
    for turn in range(2):
        said.append({})
        for script in SCRIPTS[:5] + SCRIPTS[5:] * turn:  # evaluated once, at the end
            options = {"01_sample.py": ["--num-prompts", 3, "--max-new-tokens", 24],
                       "06_eval.py": ["--num-prompts", 4, "--max-new-tokens", 24]}.get(script, [])
            said[turn][script] = heard(script, "--run", run, *options)
        if turn == 0:
            shutil.copytree(run, first)
    return SimpleNamespace(run=run, first=first, said=said)
