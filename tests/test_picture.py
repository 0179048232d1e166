"""The picture of the tree in 03 and 04: whole, in order, on one line each, with the right numbers."""
import random
import re
from importlib import import_module

import pytest
import torch
from conftest import ALIKE, NESTED, TWINS, call, handmade_prompt, load, padded

sampling = import_module("01_sample")
forks = import_module("03_tree")

WIDE = 200


def tree_of(responses, lengths, boundaries):
    """One prompt of tree.pt with these boundaries."""
    nodes = [(b, members) for b in boundaries for members in forks.group_prefixes(responses, lengths, b)]
    members = torch.zeros(len(nodes), len(lengths), dtype=torch.bool)
    for row, (_, group) in zip(members, nodes):
        row[group] = True
    boundary = torch.tensor([b for b, _ in nodes], dtype=torch.int64)
    return {"boundaries": torch.tensor(boundaries, dtype=torch.int64),
            "nodes": {"boundary": boundary, "members": members}}


def rows_of(prompt, boundaries):
    return forks.tree_rows(*forks.unpack_tree(tree_of(prompt["responses"], prompt["lengths"], boundaries)),
                           prompt["lengths"])


def drawn(capsys, prompt, boundaries, width=WIDE):
    """The lines of the tree: [(indent, text, members)], the members written by `columns`."""
    capsys.readouterr()
    forks.draw_tree(prompt, tree_of(prompt["responses"], prompt["lengths"], boundaries), "",
                    lambda members, k, start: "|" + ",".join(map(str, members)), width)
    lines = [line for line in capsys.readouterr().out.split("\n") if "─ " in line]
    found = []
    for line in lines:
        before, members = line.rsplit("|", 1)
        indent = re.match(r"[│ ]*[├└]─ ", before).group()
        found.append((indent, before[len(indent):], [int(i) for i in members.split(",")]))
    return found


def texts_along(lines, K):
    """The texts of the lines that lead to each response, strung together."""
    texts, endings = [""] * K, [0] * K
    for _, text, members in lines:
        for i in members:
            texts[i] += "" if text.strip() == "(end)" else text.rstrip()
        if len(members) == 1:
            endings[members[0]] += 1
    return texts, endings


def test_unpacking_gives_back_boundaries_and_groups():
    responses, lengths = padded(NESTED)
    assert forks.unpack_tree(tree_of(responses, lengths, [2, 4])) == ([2, 4], [[[0, 1, 2]], [[0, 1]]])
    responses, lengths = padded(TWINS)
    assert forks.unpack_tree(tree_of(responses, lengths, [2, 4])) == ([2, 4], [[[0, 2], [1, 3]]] * 2)
    assert forks.unpack_tree(tree_of(responses, lengths, [])) == ([], [])
    responses, lengths = padded([[5, 6, 7], [8, 6, 7]])  # a boundary without a node
    assert forks.unpack_tree(tree_of(responses, lengths, [2])) == ([2], [[]])


def test_rows_of_a_nested_tree():
    assert rows_of(handmade_prompt(NESTED), [2, 4]) == [
        ("├─ ", [0, 1, 2], 0, 0, 2),
        ("│  ├─ ", [0, 1], 1, 2, 4),
        ("│  │  ├─ ", [0], 2, 4, 7),
        ("│  │  └─ ", [1], 2, 4, 7),
        ("│  └─ ", [2], 1, 2, 6),
        ("└─ ", [3], 0, 0, 5)]


def test_rows_of_twins_that_end_before_their_node():
    rows = rows_of(handmade_prompt(TWINS), [2, 4])
    assert [row[1:] for row in rows[:4]] == [
        ([0, 2], 0, 0, 2),    # the whole response
        ([0, 2], 1, 2, 2),    # the node past its end
        ([0], 2, 2, 2), ([2], 2, 2, 2)]
    assert sorted(members[0] for _, members, *_ in rows if len(members) == 1) == [0, 1, 2, 3]


def test_the_first_tree_as_it_is_printed(capsys):
    assert [indent + text.rstrip() for indent, text, _ in drawn(capsys, handmade_prompt(NESTED), [2, 4])] == [
        "├─ Sie haben",
        "│  ├─  nur zwei",
        "│  │  ├─  neue Nachrichten.",
        "│  │  └─  alte Nachrichten.",
        "│  └─  drei neue Nachrichten.",
        "└─ Es gibt zwei Nachrichten."]


@pytest.mark.parametrize("rows", [NESTED, TWINS, ALIKE, [[12, 2]], [[2], [2], [5, 6, 2]]])
@pytest.mark.parametrize("boundaries", [[], [1], [2, 4], [1, 3, 6]])
def test_every_response_is_drawn_once_and_whole(capsys, rows, boundaries):
    prompt = handmade_prompt(rows)
    texts, endings = texts_along(drawn(capsys, prompt, boundaries), len(rows))
    assert texts == prompt["texts"] and endings == [1] * len(rows)


@pytest.mark.parametrize("seed", range(20))
def test_random_trees(seed):
    """Each response's rows are its spans in order: from its first token to its last, without gaps."""
    draw = random.Random(seed)
    rows = [[draw.choice([5, 6]) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 8))]
    found = rows_of(handmade_prompt(rows), sorted(draw.sample(range(1, 9), draw.randint(0, 3))))
    for i, row in enumerate(rows):
        path = [(k, start, end) for _, members, k, start, end in found if i in members]
        assert [k for k, _, _ in path] == list(range(len(path)))
        assert [start for _, start, _ in path] == [0, *(end for _, _, end in path[:-1])]
        assert path[-1][2] == len(row)
    assert sorted(members[0] for _, members, *_ in found if len(members) == 1) == list(range(len(rows)))


def test_the_lines_join_up():
    """A branch goes down until its last child: below ├ stands │ or ├ or └, below └ a blank."""
    branches = [row[0] for row in rows_of(handmade_prompt(NESTED + TWINS[:1] * 2), [1, 2, 4])]
    for above, below in zip(branches, branches[1:]):
        for a, b in zip(above, below):
            assert b in {"├": "│├└", "│": "│├└", "└": " "}.get(a, "─ ├└│"), branches


TEXTS = ["Grüße 😀 an dich", "Grüße 😃 an dich", "Grüße an\nalle\tTschüß\r\n", "Gr日本語, ja\u2028nein\x1b[31m"]


@pytest.mark.parametrize("boundaries", [[2], [3, 5], [2, 4, 7], [6, 8, 9]])
def test_characters_split_over_tokens_and_lines(demo, capsys, boundaries):
    tokenizer = demo[1].tokenizer
    rows = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in TEXTS]
    responses, lengths = padded(rows + rows[:1])
    texts, ends = sampling.spell(tokenizer, responses, lengths)
    assert texts == TEXTS + TEXTS[:1]
    prompt = {**handmade_prompt(NESTED), "responses": responses, "lengths": lengths, "texts": texts, "ends": ends}
    lines = drawn(capsys, prompt, boundaries)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for _, text, _ in lines)
    found, endings = texts_along(lines, len(texts))
    assert endings == [1] * len(texts)
    for text, line in zip(texts, found):
        shown = "".join(c if c.isprintable() else "·" for c in text)
        assert line.replace(" ", "") == shown.replace(" ", "")


def test_long_texts_are_shortened_and_columns_stay_in_place(capsys):
    prompt = handmade_prompt([[5] + [11] * 40 + [2], [5] + [10] * 3 + [2], [12, 2]])
    forks.draw_tree(prompt, tree_of(prompt["responses"], prompt["lengths"], [1]), "head",
                    lambda members, k, start: "|", 40)
    lines = [line for line in capsys.readouterr().out.splitlines() if "─ " in line]
    assert len(lines) == 4 and {line.index("|") for line in lines} == {40}
    assert "…" in lines[1] and "…" not in "".join(lines[2:])


# The numbers that 03 and 04 print.

def printed(capsys, script, run, number):
    """The lines of the tree a script prints, as (members, numbers) in the order of tree_rows."""
    capsys.readouterr()
    call(script, "--run", run, "--show", number)
    lines = [line for line in capsys.readouterr().out.splitlines() if "─ " in line]
    prompt, found = (load(run, name)["prompts"][number] for name in ("rollouts", "tree"))
    rows = forks.tree_rows(*forks.unpack_tree(found), prompt["lengths"])
    assert len(lines) == len(rows)
    return prompt, [(row, line, [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", line)])
                    for row, line in zip(rows, lines)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_03_prints_surprisal_and_rewards(capsys, handmade, number):
    prompt, lines = printed(capsys, "03_tree.py", handmade, number)
    nats = load(handmade, "surprisal")["prompts"][number]["surprisal"]
    rewards = import_module("04_advantage").prompt_rewards(prompt)
    for (_, members, _, start, end), line, numbers in lines:
        i, wanted = members[0], []
        if start < prompt["lengths"][i]:
            wanted.append(round(nats[i, start].item(), 2))
        wanted.append(rewards[i] if len(members) == 1 else len(members))
        assert numbers == pytest.approx(wanted, abs=0.0051), line
        assert ("share" in line) == (len(members) > 1)


@pytest.mark.parametrize("terms", ["both", "local"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_04_prints_the_credit_it_wrote(capsys, handmade, number, terms):
    """n, the value, and the sums over the n responses of what stands in advantages.pt."""
    call("03_tree.py", "--run", handmade)
    call("04_advantage.py", "--run", handmade, "--advantage-terms", terms)
    whole = (handmade / "advantages.pt").read_bytes()
    if terms == "local":  # --show must not change which terms are shown
        capsys.readouterr()
        call("04_advantage.py", "--run", handmade, "--advantage-terms", terms, "--show", number)
        lines = [line for line in capsys.readouterr().out.splitlines() if "─ " in line]
    else:
        _, found = printed(capsys, "04_advantage.py", handmade, number)
        lines = [line for _, line, _ in found]
    assert (handmade / "advantages.pt").read_bytes() == whole
    prompt, tree, earned = (load(handmade, name)["prompts"][number]
                            for name in ("rollouts", "tree", "advantages"))
    for (_, members, k, start, end), line in zip(
            forks.tree_rows(*forks.unpack_tree(tree), prompt["lengths"]), lines):
        numbers = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", line)]
        value = earned["rewards"][members].mean().item()
        assert numbers[:2] == pytest.approx([len(members), value], abs=0.00051), line
        spans = earned["spans"][members[0]]
        if k < len(spans):
            assert numbers[2] == pytest.approx(len(members) * spans[k][2], abs=0.00051), line
        if start < end:
            sums = [earned[name][members, start].sum().item() for name in ("leaf", "grpo")]
            assert numbers[3:] == pytest.approx(sums, abs=0.00051), line


def test_rollouts_without_ends_are_drawn_as_token_ids(capsys):
    prompt = handmade_prompt(NESTED)
    del prompt["ends"]
    assert [text.split() for _, text, _ in drawn(capsys, prompt, [2])][:2] == [["5", "6"], "14 7 9 11 2".split()]
