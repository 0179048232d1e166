"""The README's commands as pasted: its blocks in order, by `bash -e`, in one fresh copy of the project.

Left out are the installation (`python` is the interpreter of the tests), the block with the tests, and
those that say that they need a GPU, a network or hours.

The small form runs the same text with at most 4 prompts and one pass a script, in forks of one process
that has loaded the libraries (tests/warm_python.py): every command ends well, leaves the files that the
next ones read, and changes nothing outside runs/. Only the full form, minutes long, starts `python` as a
reader does, and holds the README's numbers: LEAF_FULL_README=1 python -m pytest -s tests/test_readme_commands.py
"""
import contextlib
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, load

FULL = os.environ.get("LEAF_FULL_README") == "1"
full_only = pytest.mark.skipif(not FULL, reason="minutes long: LEAF_FULL_README=1")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "


def is_left_out(code):
    return "python -m pytest" in code or bool(re.match("#.*(GPU|network|hours)", code))


def contents(project):
    """A digest of each file of the project outside runs/."""
    return {str(path.relative_to(project)): hashlib.sha256(path.read_bytes()).digest()
            for path in sorted(project.rglob("*"))
            if path.is_file() and path.relative_to(project).parts[0] != "runs" and path.suffix != ".pyc"}


@contextlib.contextmanager
def bash_in(project, folder, times):
    """A function that runs code by `bash -e` in the project. A `python` that fails is noticed, also in
    a loop that ends with `|| break`. It returns what is printed on stdout, and adds to `times`."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    failures = folder / "failures"
    warm = f"-IS {project / 'tests' / 'warm_python.py'} run {folder / 'socket'}"
    for name in ("python", "python3"):
        (folder / name).write_text(f'#!/bin/sh\n{sys.executable} {"" if FULL else warm} "$@" && exit\n'
                                   f'echo "python $*" >> {failures}\nexit 1\n')
        (folder / name).chmod(0o755)

    def run(code):
        began = time.time()
        done = subprocess.run(["bash", "-ec", code], cwd=project, env=environment, text=True, encoding="utf-8",
                              stdin=subprocess.DEVNULL, capture_output=True)
        times.append(f"{time.time() - began:6.1f} s  {code.splitlines()[0]}")
        failed = failures.read_text() if failures.exists() else ""
        assert done.returncode == 0 and not failed, f"{code}\n{done.stdout}{done.stderr}\nfailed: {failed}"
        return done.stdout

    if FULL:
        yield run
        return
    server = subprocess.Popen([sys.executable, "tests/warm_python.py", "serve", folder / "socket"], cwd=project,
                              env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "socket").exists():
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
        yield run
    finally:
        server.kill()
        server.wait()


def with_reward(project, bash, code):
    """Another reward, as the README says: in 04, on a copy of what stays valid of a first round."""
    script = project / "04_advantage.py"
    shipped = script.read_text(encoding="utf-8")
    changed, count = re.subn(r"^def prompt_rewards\(rollout\):\n(?:    .*\n)+", lambda _: code, shipped,
                             flags=re.MULTILINE)
    assert count == 1
    script.write_text(changed, encoding="utf-8")
    output = bash("mkdir runs/reward && cp runs/demo/rollouts.pt runs/demo/surprisal.pt runs/reward/\n"
                  "for stage in 03_tree 04_advantage 05_train 06_eval; do python $stage.py --run runs/reward; done")
    script.write_text(shipped, encoding="utf-8")
    return output


def rows_of(project, run):
    """(round, method, bleu_sampled) of each row of a run's eval.csv."""
    with open(project / "runs" / run / "eval.csv", newline="", encoding="utf-8") as file:
        return [(row["round"], row["method"], row["bleu_sampled"]) for row in csv.DictReader(file)]


def paste():
    """Runs all blocks in a copy of the .project: what each of them .printed, a dict by its code; the
    files .before and .after; the .times."""
    folder = Path(tempfile.mkdtemp(prefix="readme-"))
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    project = Path(shutil.copytree(ROOT, folder / "project", ignore=shutil.ignore_patterns(".git", *ignored)))
    before, printed, times = contents(project), {}, []
    with bash_in(project, folder, times) as bash:
        for language, code in BLOCKS:
            if language == "sh" and not is_left_out(code):
                printed[code] = bash(code.removeprefix(INSTALL))
            elif code.startswith("def prompt_rewards"):
                printed[code] = with_reward(project, bash, code)
            elif language == "python":
                printed[code] = bash(f"python << 'END'\n{code}END\n")
    return SimpleNamespace(project=project, printed=printed, before=before, after=contents(project), times=times)


POOL = ThreadPoolExecutor(1)
WORK = []


def begin():
    """conftest.py calls it before the first test: the second core has nothing else to do."""
    WORK.append(POOL.submit(paste))


@pytest.fixture(scope="module")
def pasted():
    found = WORK[0].result()
    print("\n".join(found.times))
    yield found
    shutil.rmtree(found.project.parent)


@pytest.fixture
def project(pasted):
    return pasted.project


def output_of(pasted, words):
    """What the one block printed that has these words."""
    [output] = [output for code, output in pasted.printed.items() if words in code]
    return output


def figure_in(sentence):
    """The figure that the README states with these words; a line break counts as a space."""
    [figure] = re.findall(re.escape(sentence).replace("N", r"([\d.]+\d)"), " ".join(README.split()))
    return figure


def readme_lines(heading, first):
    """The lines of the block without a language that begins so, below a heading."""
    [block] = re.findall(rf"^```\n({first}.*?)```", README.split(heading)[1], re.DOTALL | re.MULTILINE)
    return block.splitlines()


def test_only_the_tests_the_real_model_and_the_gpu_are_left_out():
    left_out = [code for _, code in BLOCKS if is_left_out(code)]
    words = ["python -m pytest", "make_real.py", "trl_leaf.py"]
    assert len(left_out) == 3 and all(word in code for word, code in zip(words, left_out))


def test_nothing_outside_runs_has_changed(pasted):
    assert pasted.before == pasted.after


def test_each_round_and_the_fork_are_evaluated(project, pasted):
    assert [row[:2] for row in rows_of(project, "demo")] == [("0", "base"), ("1", "leaf"), ("2", "leaf")]
    assert [row[:2] for row in rows_of(project, "fork")] == [("0", "base"), ("1", "grpo")]
    for run in ("small", "mine", "reward"):
        assert [row[:2] for row in rows_of(project, run)] == [("0", "base"), ("1", "leaf")]


def test_a_tree_and_a_report(project, pasted):
    output = output_of(pasted, "--show 39")
    assert re.search(r"n +value +credit +LEAF +GRPO\n[├└]─ .* [1-8] +[01]\.\d{3} ", output)
    assert (project / "runs" / "demo" / "report.html").stat().st_size > 10_000


def test_your_own_data_is_checked_first(pasted):
    output = output_of(pasted, "check_recordings.py $train")
    assert (output.index("32 recordings are fine") < output.rindex("32 recordings are fine")
            < output.index("Round 1: "))


def test_another_reward_is_minus_the_word_error_rate(project, pasted):
    [code] = [code for code in pasted.printed if code.startswith("def prompt_rewards")]
    names = {}
    exec(code, names)
    texts = ["a b c d", "a x c d", "a c d", "a b b c d", "", "x"]
    rewards = names["prompt_rewards"]({"reference": "a b c d", "texts": texts})
    assert rewards == [0, -0.25, -0.25, -0.25, -1, -1]
    saved = load(project / "runs" / "reward", "advantages")["prompts"]
    rollouts = load(project / "runs" / "reward", "rollouts")["prompts"]
    for earned, rollout in zip(saved, rollouts, strict=True):
        assert earned["rewards"].tolist() == pytest.approx(names["prompt_rewards"](rollout))


def test_the_trained_model_answers_and_is_merged(project, pasted):
    [answer] = output_of(pasted, "merge_and_unload").splitlines()
    assert len(answer.split()) > 1
    assert (project / "runs" / "merged" / "model.safetensors").exists()


@full_only
def test_the_readmes_figures(project, pasted):
    rows = [row[2] for row in rows_of(project, "demo")]
    table = readme_lines("# LEAF, in six scripts", " +round")
    assert rows[:2] == [line.split()[3] for line in table[1:]] == ["56.86", "70.01"]
    assert set(table) <= set(output_of(pasted, INSTALL).splitlines())
    assert rows[2] == figure_in("The second round ends in N")
    assert rows_of(project, "fork")[1][2] == figure_in("It ends in N for GRPO")


@full_only
def test_the_readmes_tree(pasted):
    tree = readme_lines("## A real tree", " +n +value")
    assert len(tree) > 8 and set(tree) <= set(output_of(pasted, "--show 39").splitlines())


@full_only
def test_the_readmes_answer(pasted):
    [code] = [code for code in pasted.printed if "merge_and_unload" in code]
    [answer] = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert output_of(pasted, "merge_and_unload").splitlines() == [answer]
