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
from conftest import MODEL, ROOT, TRAIN, call, handmade_prompt, load, parsed, refusal

sampling = import_module("01_sample")
tree = import_module("03_tree")
advantage = import_module("04_advantage")

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
        return json.loads(self.scripts[0])["prompts"]

    @property
    def ranked(self):
        return json.loads(self.scripts[0])["ranked"]


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


MADE_UP = {"made-0": [1.0, 0.6, 0.2, 0.2], "made-1": [0.1, 0.9, 0.1, 0.5], "made-2": [0.3] * 4}


def scored(run, monkeypatch, rewards=MADE_UP):
    """03, and 04 with these rewards. Those of made-0 are those of the example in 03 and 04."""
    call("03_tree.py", "--run", run)
    monkeypatch.setattr(advantage, "prompt_rewards", lambda rollout: rewards[rollout["id"]])
    advantage.main(parsed("04_advantage.py", "--run", run))
    return run


def stages_of(run):
    """What the stages say of each prompt: rollout, tree, advantages."""
    return zip(*[load(run, name)["prompts"] for name in ("rollouts", "tree", "advantages")])


def parents(prompt_tree, rollout):
    """The lines of 03's tree that have tokens, each with the members of its parent."""
    lengths = rollout["lengths"].tolist()
    above = {-1: list(range(len(lengths)))}
    for row in tree.tree_rows(prompt_tree["boundaries"], prompt_tree["groups"], lengths):
        above[row.level] = row.members
        if row.start < row.end:
            yield row, above[row.level - 1]


def text_of(shown, row):
    return "".join(shown["tokens"][row["members"][0]][row["start"]:row["end"]])


def test_each_prompts_tree_with_the_numbers_of_the_stages(run):
    prompts = Page(report.build_page([run])).prompts
    assert len(prompts) == 3
    for shown, (rollout, prompt_tree, credit) in zip(prompts, stages_of(run)):
        assert ["".join(tokens) for tokens in shown["tokens"]] == rollout["texts"]
        assert shown["rewards"] == pytest.approx(credit["rewards"].tolist(), abs=1e-6)
        assert shown["grpo"] == pytest.approx(credit["grpo"][:, 0].tolist(), abs=1e-6)
        root, *rows = shown["rows"]
        assert root["members"] == list(range(len(rollout["texts"]))) and root["level"] == -1
        assert root["value"] == pytest.approx(credit["rewards"].mean().item(), abs=1e-6)
        of_stages = {(row.members[0], row.start): row for row, _ in parents(prompt_tree, rollout)}
        for row in rows:
            expected = of_stages[row["members"][0], row["start"]]
            assert (row["end"], row["level"]) == (expected.end, expected.level)
            assert row["value"] == pytest.approx(credit["rewards"][row["members"]].mean().item(), abs=2e-6)
            for method in ("leaf", "grpo"):  # of one copy: the mean, and not the sum that 04 prints
                mean = credit[method][row["members"], row["start"]].mean().item()
                assert row[method] == pytest.approx(mean, abs=2e-6)
            credits = [credit["spans"][i][row["level"]][2] for i in row["members"]]
            assert row["credit"] == pytest.approx(sum(credits) / len(credits), abs=5.1e-4)
        for k, surprisal in enumerate(load(run, "surprisal")["prompts"][prompts.index(shown)]["surprisal"]):
            nats = torch.tensor(shown["surprisal"][k])
            assert len(nats) == len(shown["tokens"][k]) == rollout["lengths"][k]
            torch.testing.assert_close(nats, surprisal[:len(nats)], atol=0.0051, rtol=0)


def test_every_token_is_in_one_line_of_each_level_and_all_lines_together_are_the_responses(run):
    for shown in Page(report.build_page([run])).prompts:
        for k, tokens in enumerate(shown["tokens"]):
            rows = [row for row in shown["rows"] if k in row["members"]]
            assert "".join(text_of(shown, row) for row in rows) == "".join(tokens)
            assert [row["start"] for row in rows[2:]] == [row["end"] for row in rows[1:-1]]
            assert rows[1]["start"] == 0 and rows[-1]["end"] == len(tokens)
            assert [row["level"] for row in rows] == list(range(-1, len(rows) - 1))


def test_identical_endings_are_one_line_and_identical_responses_too(run, monkeypatch):
    rollouts = load(run, "rollouts")
    identical = handmade_prompt([[5, 6, 7, 2]] * 5 + [[5, 6, 8, 11, 2]], 1)
    rollouts["prompts"][1] = identical
    sampling.save_file(run / "rollouts.pt", rollouts)
    surprisal = load(run, "surprisal")
    surprisal["prompts"][1]["surprisal"] = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0]] * 6)
    sampling.save_file(run / "surprisal.pt", surprisal)
    scored(run, monkeypatch, MADE_UP | {"made-1": [0.2] * 5 + [0.9]})
    shown = Page(report.build_page([run])).prompts[1]
    assert shown["responses"] == [[5], [0, 1, 2, 3, 4]]  # the better first
    assert [(text_of(shown, row), row["members"]) for row in shown["rows"][1:]] == [
        ("Sie haben", [0, 1, 2, 3, 4, 5]), (" zwei", [0, 1, 2, 3, 4]), (" drei Nachrichten.", [5])]


def test_a_poor_ending_in_a_good_branch_is_marked_and_nothing_else(run, monkeypatch):
    scored(run, monkeypatch)
    marked = 0
    for shown, (rollout, prompt_tree, credit) in zip(Page(report.build_page([run])).prompts, stages_of(run)):
        rewards = credit["rewards"].double()
        expected = set()
        for row, parent in parents(prompt_tree, rollout):
            value, parent_value = rewards[row.members].mean(), rewards[parent].mean()
            if value < parent_value - 1e-6 and parent_value > rewards.mean() + 1e-6:
                expected.add((row.members[0], row.start))
                marked += 1
        assert {(row["members"][0], row["start"]) for row in shown["rows"] if "against" in row} == expected
    assert marked >= 3


def test_rewards_that_are_equal_mark_nothing(run, monkeypatch):
    """The mean of three times 0.177 is not 0.177 to the last digit."""
    scored(run, monkeypatch, {"made-0": [0.177, 0.177, 0.177, 0.1], "made-1": [0.7] * 4, "made-2": [0.1] * 4})
    for shown in Page(report.build_page([run])).prompts:
        assert not any("against" in row for row in shown["rows"])
        assert "no poor ending" in shown["says"]


def test_how_far_leaf_goes_against_grpo(run, monkeypatch):
    scored(run, monkeypatch)
    shown = Page(report.build_page([run])).prompts[0]
    twelve = next(row for row in shown["rows"] if row["members"] == [1])
    assert twelve["leaf"] < 0 < twelve["grpo"]
    assert twelve["against"] == min(abs(twelve["leaf"]), abs(twelve["grpo"]))
    worst = next(row for row in shown["rows"] if row["members"] == [2])
    assert worst["leaf"] < 0 and worst["against"] == worst["grpo"] < 0  # both push it down


def test_the_sentence_on_a_prompt(run, monkeypatch):
    scored(run, monkeypatch)
    shown = Page(report.build_page([run])).prompts[0]
    row = next(row for row in shown["rows"] if row["members"] == [1])
    assert shown["says"] == (
        "After “Sie haben nur zwei” the ending “alte Nachrichten.” earns 0.60, the branch 0.80, all "
        f"responses 0.50. LEAF pushes it down ({row['leaf']:+.2f}), GRPO up ({row['grpo']:+.2f}).")


def lines(*against):
    return {"rows": [{"level": -1}, *[{"against": x} for x in against], {"leaf": 1.0, "grpo": -1.0}]}


def test_the_most_disputed_prompts_come_first():
    """Where LEAF goes farthest against GRPO; then where both push down; then the others, by number."""
    prompts = [{}, lines(), lines(-0.5), lines(0.01, 0.3), lines(0.2), lines(0.3), lines(-0.1, -0.9)]
    assert report.ranked(prompts) == [3, 5, 4, 6, 2, 0, 1]


def test_the_page_opens_on_the_first_of_them(run, monkeypatch):
    scored(run, monkeypatch, MADE_UP | {"made-0": MADE_UP["made-2"]})
    found = Page(report.build_page([run]))
    assert found.ranked == [1, 0, 2]
    assert "let current = ranked[0];" in report.PAGE


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
    write_table(hostile / "eval.csv", {"round": 1, "step": 1, "method": HOSTILE[1], "manifest": HOSTILE[0],
                                       "bleu_greedy": 1.0})
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


def figure_of(page, label):
    return page[page.index(f"<figcaption>{label}"):].partition("</figure>")[0]


def lines_of(figure):
    """What a chart shows: {name: (values, points of the line, different corners of the band)}."""
    found = re.findall(r'<polygon points="([^"]*)"/><polyline points="([^"]*)"/>', figure)
    names = re.findall(r'<li [^>]*><i></i>(.*?) <b>(.*?)</b>', figure)
    return {name: (values, [tuple(map(float, point.split(","))) for point in line.split()],
                   len(set(band.split())))
            for (name, values), (band, line) in zip(names, found, strict=True)}


def other_run(run, name, method="leaf", settings=None, rewards=(0.45, 0.55)):
    other = run.parent / f"{run.name}-{name}"
    other.mkdir()
    write_table(other / "train.csv", *[update(step, method, reward=reward)
                                       for step, reward in enumerate(rewards, start=1)])
    if settings is not None:
        (other / "adapter").mkdir()
        (other / "adapter" / "training.json").write_text(json.dumps(settings))
    return other


def test_each_run_has_its_own_line_with_its_name(run):
    runs = [run, other_run(run, "leaf-1"), other_run(run, "grpo-0", "grpo", rewards=(0.1, 0.2))]
    found = lines_of(figure_of(report.build_page(runs), "mean reward"))
    assert {name: values for name, (values, *_) in found.items()} == {
        f"{run.name}: leaf": "0.25 to 0.75", f"{run.name}-leaf-1: leaf": "0.45 to 0.55",
        f"{run.name}-grpo-0: grpo": "0.1 to 0.2"}
    assert all(corners == 2 for _, _, corners in found.values())  # no band


def test_folders_of_one_name_are_told_apart(tmp_path):
    runs = [tmp_path / name / "demo" for name in ("a", "b")]
    for one in runs:
        one.mkdir(parents=True)
        write_table(one / "train.csv", update(1))
    assert set(lines_of(figure_of(report.build_page(runs), "mean reward"))) == {"a/demo: leaf", "b/demo: leaf"}


def test_seeds_of_one_method_are_a_line_with_a_band(run):
    runs = [run, other_run(run, "leaf-1"), other_run(run, "grpo-0", "grpo")]
    found = lines_of(figure_of(report.build_page(runs, seeds=True), "mean reward"))
    leaf, grpo = f"{run.name}, {run.name}-leaf-1: leaf", f"{run.name}-grpo-0: grpo"
    assert {name: (values, corners) for name, (values, _, corners) in found.items()} == {
        leaf: ("0.35 to 0.65", 4), grpo: ("0.45 to 0.55", 2)}


@pytest.mark.parametrize("change, bands", [({"seed": 1, "id": "b", "policy_id": "b", "round": 2, "step": 9}, 1),
                                           ({"fork_budget": 4}, 2), ({"multiplicity": 0.0}, 2)])
def test_seeds_are_runs_whose_settings_are_equal_but_for_the_seed(run, change, bands):
    settings = {"seed": 0, "id": "a", "policy_id": "a", "round": 1, "step": 2, "seen": 3, "fork_budget": 2,
                "multiplicity": 0.5, "method": "leaf"}
    runs = [other_run(run, "one", settings=settings), other_run(run, "two", settings=settings | change)]
    assert len(lines_of(figure_of(report.build_page(runs, seeds=True), "mean reward"))) == bands
    assert len(lines_of(figure_of(report.build_page(runs), "mean reward"))) == 2


def test_settings_that_cannot_be_read_are_named(run):
    other = other_run(run, "one", settings={})
    (other / "adapter" / "training.json").write_text("{")
    report.build_page([run, other])
    with pytest.raises(sampling.UserError, match="training.json"):
        report.build_page([run, other], seeds=True)


def test_a_fork_shows_its_own_rows(run):
    """It has copied the tables of a run, and trained and evaluated again."""
    write_table(run / "train.csv", update(1, reward=0.2), update(1, reward=0.4))
    rows = [{"round": 1, "step": 1, "method": "leaf", "bleu_greedy": bleu, "manifest": "test.jsonl",
             "prompts": 128, "temperature": 0.9} for bleu in (40.0, 60.0)]
    write_table(run / "eval.csv", *rows)
    page = report.build_page([run])
    assert lines_of(figure_of(page, "mean reward"))[f"{run.name}: leaf"][0] == "0.4"
    assert lines_of(figure_of(page, "greedy BLEU"))[f"{run.name}: leaf"][0] == "60"


def test_a_run_that_changed_its_method_has_two_lines(run):
    write_table(run / "train.csv", update(1), update(2, "grpo", round=2))
    found = lines_of(figure_of(report.build_page([run]), "mean reward"))
    assert set(found) == {f"{run.name}: leaf", f"{run.name}: grpo"}


def test_a_line_of_an_evaluation_begins_at_the_base(run):
    found = lines_of(figure_of(report.build_page([run]), "sampled BLEU"))
    assert set(found) == {f"{run.name}: leaf"}
    values, points, _ = found[f"{run.name}: leaf"]
    assert values == "50 to 60" and len(points) == 2 and points[0][0] == report.LEFT


def test_an_untrained_model_is_a_dot(run):
    write_table(run / "eval.csv", {"round": 0, "step": 0, "method": "base", "bleu_greedy": 50.0})
    figure = figure_of(report.build_page([run]), "greedy BLEU")
    assert lines_of(figure)[f"{run.name}: base"][0] == "50" and '<circle r="3"' in figure


def test_a_small_difference_looks_small(run):
    """A difference of 0.2 BLEU is 1/500 of the height of its chart; 0 and 100 are on its axis."""
    write_table(run / "eval.csv", *[{"round": number, "step": number, "method": "leaf", "bleu_greedy": bleu}
                                    for number, bleu in enumerate((86.1, 86.3))])
    figure = figure_of(report.build_page([run]), "greedy BLEU")
    _, (first, last), _ = lines_of(figure)[f"{run.name}: leaf"]
    assert first[1] - last[1] == pytest.approx(0.002 * (report.BOTTOM - report.TOP), abs=0.11)
    assert re.findall(r'class="tick"[^>]*>(.*?)<', figure) == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize("values, least, ticks", [
    ([0.2, 0.9], 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), ([0.0], 0.2, [0, 0.05, 0.1, 0.15, 0.2]),
    ([-1.3, -0.2], 1, [-1.5, -1, -0.5, 0]), ([3.0, 34.0], 10, [0, 10, 20, 30, 40]),
    ([1e-6], 0.01, [0, 0.002, 0.004, 0.006, 0.008, 0.01]), ([-2.0, 5.0], 1, [-2, 0, 2, 4, 6])])
def test_ticks_are_round_and_0_is_one_of_them(values, least, ticks):
    assert report.round_numbers(values, least) == pytest.approx(ticks)


def test_axes_have_rounds_and_updates(run):
    write_table(run / "train.csv", *[update(step, round=(step + 1) // 2) for step in range(1, 7)])
    figure = figure_of(report.build_page([run]), "mean reward")
    assert re.findall(r">(round \d|update \d)<", figure) == ["update 6", "update 1", "round 1", "round 2",
                                                              "round 3"]
    marks = [float(x) for x in re.findall(r'class="mark" d="M([\d.]+) ', figure)]
    middle = report.LEFT + (report.RIGHT - report.LEFT) * 2 / 5  # round 2 begins at update 3 of 1 to 6
    assert marks[:2] == pytest.approx([report.LEFT, middle], abs=0.06)


def luminance(color):
    parts = [x / 255 for x in color]
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def rgb(code):
    return [int(code[i:i + 2], 16) for i in (1, 3, 5)]


def palette(mode):
    """The colours of the page by name: 0 light, 1 dark."""
    found = re.findall(r"--([a-z]+): light-dark\((#\w{6}), (#\w{6})\)", report.PAGE)
    return {name: rgb(codes[mode]) for name, *codes in found}


@pytest.mark.parametrize("mode", [0, 1])
def test_contrast(mode):
    """4.5 to 1 for text, also on the strongest tint; 3 to 1 for lines."""
    colors = palette(mode)
    for name in ("ink", "dim"):
        assert min(contrast(colors[name], colors[ground]) for ground in ("card", "paper")) >= 4.5
    assert contrast(colors["rule"], colors["card"]) >= 3
    for pair in report.COLORS:
        assert contrast(rgb(pair.split(", ")[mode]), colors["card"]) >= 3
    least, more = map(int, re.search(r"number \? (\d+) \+ (\d+) \* Math.min\(1,", report.PAGE).groups())
    share = (least + more) / 100
    for tint in ("up", "down", "surprising"):
        mixed = [share * x + (1 - share) * y for x, y in zip(colors[tint], colors["card"])]
        assert contrast(colors["ink"], mixed) >= 4.5, tint


@pytest.mark.parametrize("mode", [0, 1])
def test_blue_is_up_and_orange_is_down(mode):
    colors = palette(mode)
    assert colors["up"][2] > 1.5 * colors["up"][0] and colors["down"][0] > 1.5 * colors["down"][2]
    assert '"nats" ? "surprising" : number < 0 ? "down" : "up"' in report.PAGE
    assert "Blue is pushed up, orange down." in report.PAGE


def test_evaluations_that_cannot_be_compared_are_named(run):
    rows = [{"round": 1, "step": 2, "method": "leaf", "bleu_sampled": bleu, "manifest": "<test>.jsonl",
             "prompts": prompts, "temperature": 0.9} for prompts, bleu in ((16, 90.0), (128, 60.0))]
    write_table(run / "eval.csv", *rows)
    page = report.build_page([run])
    first, second = page.split("<h2>Evaluation on ")[1:]
    assert first.startswith("16 prompts of &lt;test&gt;.jsonl, temperature 0.9</h2>")
    assert second.startswith("128 prompts of &lt;test&gt;.jsonl, temperature 0.9: not to be compared")
    assert lines_of(figure_of(first, "sampled BLEU"))[f"{run.name}: leaf"][0] == "90"
    assert lines_of(figure_of(second, "sampled BLEU"))[f"{run.name}: leaf"][0] == "60"


def test_tables_that_someone_wrote_into(run):
    (run / "train.csv").write_bytes(b"round,step,method,reward,kl\n1,1,leaf,0.5,1e+05\na note \xff\n"
                                    b"1,2,leaf,nan,1.2.3\n,,,,\n2,3\n")
    page = report.build_page([run])
    assert lines_of(figure_of(page, "mean reward"))[f"{run.name}: leaf"][0] == "0.5"
    assert lines_of(figure_of(page, "KL"))[f"{run.name}: leaf"][0] == "1e+05"


def test_rollouts_from_elsewhere_show_token_ids(run):
    rollouts = load(run, "rollouts")
    for rollout in rollouts["prompts"]:
        del rollout["ends"]
    sampling.save_file(run / "rollouts.pt", rollouts)
    tokens = Page(report.build_page([run])).prompts[0]["tokens"][0]
    assert "".join(tokens).split() == [str(token) for token in rollouts["prompts"][0]["responses"][0].tolist()
                                       ][:len(tokens)]


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


def test_128_prompts_are_small(tmp_path):
    rows = [[5, 6, 7, 8] * 40 + [k, 2] for k in (9, 10, 11, 12, 13, 14, 9, 10)]
    prompts = [handmade_prompt(rows, number) for number in range(128)]
    meta = {"id": "made", "round": 1, "seed": 0, "model": str(MODEL), "seen": 3}
    scores = [{"surprisal": torch.rand(8, 162) * 3} for _ in prompts]
    sampling.save_stage(tmp_path, "rollouts", meta, prompts)
    sampling.save_stage(tmp_path, "surprisal", meta, scores)
    page = report.build_page([tmp_path])
    assert len(Page(page).prompts) == 128 and len(page.encode()) < 2.5e6


def test_the_command(run, tmp_path):
    command = [sys.executable, "tests/report.py", "--run"]
    done = subprocess.run([*command, run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and str(run / "report.html") in done.stdout
    assert Path(run / "report.html").read_text(encoding="utf-8") == report.build_page([run])
    missing = tmp_path / "mistyped"
    assert str(missing) in refusal("tests/report.py", "--run", missing) and not missing.exists()
