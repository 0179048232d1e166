"""Is the page of a run whole, escaped, of the stages' numbers, and on its own?"""
import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import report
import torch
from conftest import MODEL, ROOT, TRAIN, call, handmade_prompt, load

sampling = import_module("01_sample")
tree = import_module("03_tree")

VOID = {"meta", "input"}
HOSTILE = ['</script><script>alert(1)</script>', '<img src=x onerror=alert(1)>', "שלום & مرحبا", "@DATA@"]


class Page(HTMLParser):
    """The elements of a page: tags that are opened and closed in order, attributes, the data."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)

    @property
    def prompts(self):
        return json.loads(self.scripts[0])


def write_table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def update(step, method="leaf", **numbers):
    return {"round": 1, "step": step, "method": method, "reward": 0.5, "alike": 0.0, "kl": 0.001,
            "clipped": 0.0, "length": 20.0, "grad_norm": 0.1, "seconds": 1.0, **numbers}


@pytest.fixture
def run(handmade):
    """All that the stages leave, of three prompts made by hand."""
    call("03_tree.py", "--run", handmade)
    call("04_advantage.py", "--run", handmade)
    write_table(handmade / "train.csv", update(1, reward=0.25), update(2, reward=0.75))
    write_table(handmade / "eval.csv", *[{
        "round": number, "step": 2 * number, "method": method, "bleu_sampled": bleu, "bleu_greedy": bleu,
        "exact_match": 10.0} for number, method, bleu in ((0, "base", 50.0), (1, "leaf", 60.0))])
    return handmade


def test_the_page_is_whole_and_refers_to_nothing_outside(run):
    page = report.build_page([run])
    found = Page(page)
    assert not found.addresses and not re.search(r"https?:|url\(|@import|src=|href=", page)
    assert len(found.scripts) == 2 and {"html", "body", "style", "svg", "audio"} <= set(found.tags)


def test_each_prompts_tree_with_the_numbers_of_the_stages(run):
    prompts = Page(report.build_page([run])).prompts
    stages = [load(run, name)["prompts"] for name in ("rollouts", "tree", "advantages", "surprisal")]
    assert len(prompts) == len(stages[0]) == 3
    for shown, rollout, prompt_tree, credit, scores in zip(prompts, *stages):
        boundaries = prompt_tree["boundaries"]
        rows = list(tree.tree_rows(boundaries, prompt_tree["groups"], rollout["lengths"]))
        assert shown["boundaries"] == boundaries
        assert ["".join(tokens) for tokens in shown["tokens"]] == rollout["texts"]
        assert [(row["members"], row["start"], row["end"]) for row in shown["rows"]] == [
            (row.members, row.start, row.end) for row in rows]
        for row, data in zip(rows, shown["rows"]):
            assert data["value"] == pytest.approx(credit["rewards"][row.members].mean().item(), abs=5e-4)
            assert ("leaf" in data) == (row.start < row.end)
            for method in ("leaf", "grpo") if row.start < row.end else ():
                total = credit[method][row.members, row.start].sum().item()
                assert data[method] == pytest.approx(total, abs=5.1e-4)
        for k, length in enumerate(rollout["lengths"].tolist()):
            assert len(shown["tokens"][k]) == length
            nats = torch.tensor(shown["surprisal"][k])
            torch.testing.assert_close(nats, scores["surprisal"][k, :length], atol=0.0051, rtol=0)


def test_a_row_stands_below_that_of_its_parent(run):
    for shown in Page(report.build_page([run])).prompts:
        above = {}
        for row in shown["rows"]:
            above[row["level"]] = row
            if row["level"]:
                assert set(row["members"]) <= set(above[row["level"] - 1]["members"])


def test_text_is_only_text(run):
    rollouts = load(run, "rollouts")
    for rollout in rollouts["prompts"]:
        texts = (HOSTILE * 2)[:len(rollout["texts"])]
        rollout |= {"prompt": HOSTILE[0], "reference": HOSTILE[1], "id": HOSTILE[0], "texts": texts}
        for ends, length, text in zip(rollout["ends"], rollout["lengths"], texts):
            ends[:length] = len(text)
    rollouts["meta"]["model"] = HOSTILE[0]
    sampling.save_file(run / "rollouts.pt", rollouts)
    hostile = run.parent / "<img src=x>@DATA@"
    shutil.copytree(run, hostile)
    write_table(hostile / "train.csv", update(1, method=HOSTILE[1]))
    found = Page(report.build_page([hostile]))
    assert "img" not in found.tags and len(found.scripts) == 2
    texts = ["".join(tokens) for tokens in found.prompts[0]["tokens"]]
    assert texts == HOSTILE[:len(texts)]
    assert found.prompts[0]["prompt"] == HOSTILE[0]


def test_the_script_sets_text_and_no_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", report.PAGE)


@pytest.mark.parametrize("missing, script", [("rollouts", "01_sample.py"), ("surprisal", "02_surprisal.py"),
                                             ("tree", "03_tree.py"), ("advantages", "04_advantage.py")])
def test_what_is_there_is_shown_and_which_stage_to_run(run, missing, script):
    (run / f"{missing}.pt").unlink()
    page = report.build_page([run])
    assert script in page and "<svg" in page
    prompts = Page(page).prompts
    assert len(prompts) == (0 if missing == "rollouts" else 3)
    if prompts:
        assert ("rows" in prompts[0]) == (missing != "tree")
        assert ("surprisal" in prompts[0]) == (missing != "surprisal")


def test_several_runs_have_a_line_per_method_and_a_band_per_seed(run, tmp_path):
    others = [tmp_path / name for name in ("leaf-1", "grpo-0")]
    for other, method in zip(others, ("leaf", "grpo")):
        other.mkdir()
        write_table(other / "train.csv", update(1, method, reward=0.45), update(2, method, reward=0.55))
    page = report.build_page([run, *others])
    figure = page[page.index("mean reward"):page.index("</figure>", page.index("mean reward"))]
    assert figure.count("<polyline") == 2
    assert "leaf 0.65" in figure and "grpo 0.55" in figure  # the last mean over the runs of a method
    grpo, leaf = [re.search(rf'class="{name}"><polygon points="([^"]*)"', figure)[1].split()
                  for name in ("grpo", "leaf")]
    assert len(set(grpo)) == 2 and len(set(leaf)) == 4  # grpo has one run; leaf has a band


def figure_of(page, label):
    return page[page.index(f"<figcaption>{label}"):].partition("</figure>")[0]


@pytest.mark.parametrize("hits, total, low, high", [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634),
                                                    (59, 128, 0.3769, 0.5471)])
def test_wilson(hits, total, low, high):
    assert report.wilson(hits, total) == pytest.approx((low, high), abs=1e-4)


def test_a_single_evaluation_is_a_dot(run):
    figure = figure_of(report.build_page([run]), "BLEU, sampled")
    assert "leaf 60" in figure and "base 50" in figure
    assert re.search(r'<g class="leaf">.*?<circle r="3" transform="translate\(294.0,10.0\)"/></g>', figure)


def test_only_evaluations_with_the_same_settings_are_compared(run):
    rows = [{"round": 1, "step": 2, "method": "leaf", "bleu_sampled": bleu, "manifest": "test.jsonl",
             "prompts": prompts, "temperature": 0.9} for prompts, bleu in ((16, 90.0), (128, 60.0))]
    write_table(run / "eval.csv", *rows)
    page = report.build_page([run])
    assert "leaf 60" in figure_of(page, "BLEU, sampled") and "128 prompts of test.jsonl" in page


def test_tables_that_someone_wrote_into(run):
    (run / "train.csv").write_bytes(b"round,step,method,reward,kl\n1,1,leaf,0.5,1e+05\na note \xff\n"
                                    b"1,2,leaf,nan,1.2.3\n,,,,\n")
    page = report.build_page([run])
    assert "leaf 0.5" in page and "leaf 1e+05" in page


def test_rollouts_from_elsewhere_show_token_ids(run):
    rollouts = load(run, "rollouts")
    for rollout in rollouts["prompts"]:
        del rollout["ends"]
    sampling.save_file(run / "rollouts.pt", rollouts)
    tokens = Page(report.build_page([run])).prompts[0]["tokens"][0]
    assert "".join(tokens).split() == [str(token) for token in rollouts["prompts"][0]["responses"][0].tolist()
                                       ][:len(tokens)]


def test_forks(run, capsys):
    """Prompt 0: both boundaries usable; 1: both fork, one usable; 2: rewards are equal."""
    call("04_advantage.py", "--run", run)
    said = re.search(r"(\d+) of (\d+) boundaries have.*?;\sin (\d+) of them", capsys.readouterr().out, re.S)
    page = report.build_page([run])
    fork, boundaries, usable = map(int, said.groups())
    trees, credits = load(run, "tree")["prompts"], load(run, "advantages")["prompts"]
    counted = [0, 0, 0]
    for prompt_tree, credit in zip(trees, credits):
        for nodes in prompt_tree["groups"]:
            spreads = [credit["rewards"][node].max() - credit["rewards"][node].min() for node in nodes]
            counted = [x + y for x, y in zip(counted, (1, len(nodes) > 0, any(s > 0 for s in spreads)))]
    assert [boundaries, fork, usable] == counted and 0 < usable < fork
    assert f"{fork / boundaries:.1%}" in page and f"{usable / boundaries:.1%}" in page


def test_clips_are_linked_from_the_page_or_inside_it(run):
    rollouts = load(run, "rollouts")
    clip = run / "clips" / "a b#1.ogg"
    clip.parent.mkdir()
    shutil.copy(TRAIN.parent / "train" / "000.ogg", clip)
    for rollout in rollouts["prompts"]:
        rollout["audio"] = str(clip)
    sampling.save_file(run / "rollouts.pt", rollouts)
    assert Page(report.build_page([run])).prompts[0]["audio"] == "clips/a%20b%231.ogg"
    inside = Page(report.build_page([run], embed_audio=True)).prompts[0]["audio"]
    assert inside.startswith("data:audio/ogg;base64,T2dn")


def test_512_prompts_are_small(tmp_path):
    rows = [[5, 6, 7, 8] * 40 + [k, 2] for k in (9, 10, 11, 12, 13, 14, 9, 10)]
    prompts = [handmade_prompt(rows, number) for number in range(512)]
    meta = {"id": "made", "round": 1, "seed": 0, "model": str(MODEL), "seen": 3}
    scores = [{"surprisal": torch.rand(8, 162) * 3} for _ in prompts]
    sampling.save_stage(tmp_path, "rollouts", meta, prompts)
    sampling.save_stage(tmp_path, "surprisal", meta, scores)
    page = report.build_page([tmp_path])
    assert len(Page(page).prompts) == 512 and len(page.encode()) < 10e6


def test_the_command(run, tmp_path):
    command = [sys.executable, "tests/report.py", "--run"]
    done = subprocess.run([*command, run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and str(run / "report.html") in done.stdout
    assert Path(run / "report.html").read_text(encoding="utf-8") == report.build_page([run])
    missing = tmp_path / "mistyped"
    done = subprocess.run([*command, missing], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and str(missing) in done.stderr and not missing.exists()
