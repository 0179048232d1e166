"""Is the tree that 03 and 04 draw whole and in order, a line each, with the right numbers?"""
import random
import re
from importlib import import_module

import pytest
from conftest import EQUAL_REWARDS, IDENTICAL, NESTED, call, handmade_prompt, load, padded

sampling = import_module("01_sample")
tree = import_module("03_tree")

WIDE = 200


def rows_of(prompt, boundaries):
    """The rows of a prompt that is cut at these boundaries."""
    groups = [tree.group_prefixes(prompt["responses"], prompt["lengths"], b) for b in boundaries]
    return list(tree.tree_rows(boundaries, groups, prompt["lengths"]))


def drawn(prompt, boundaries, width=WIDE):
    """The lines of the tree: [(branch, text, members)]."""
    found = []
    for row in rows_of(prompt, boundaries):
        line = tree.span_text(prompt, row, width)
        assert "\n" not in line and len(line) >= width
        found.append((row.branch, line[len(row.branch):], row.members))
    return found


def texts_along(lines, K):
    """The texts of the lines that lead to each response, strung together."""
    texts, endings = [""] * K, [0] * K
    for _, text, members in lines:
        for i in members:
            texts[i] += "" if text.strip() in ("(end)", "(no text)") else text.rstrip()
        if len(members) == 1:
            endings[members[0]] += 1
    return texts, endings


def test_a_boundary_without_a_node_cuts_nothing():
    assert rows_of(handmade_prompt([[5, 6, 7], [12, 6, 7]]), [2]) == [
        ("├─ ", [0], 0, 0, 3), ("└─ ", [1], 0, 0, 3)]


def test_rows_of_a_nested_tree():
    assert rows_of(handmade_prompt(NESTED), [2, 4]) == [
        ("├─ ", [0, 1, 2], 0, 0, 2),
        ("│  ├─ ", [0, 1], 1, 2, 4),
        ("│  │  ├─ ", [0], 2, 4, 7),
        ("│  │  └─ ", [1], 2, 4, 7),
        ("│  └─ ", [2], 1, 2, 6),
        ("└─ ", [3], 0, 0, 5)]


def test_rows_of_identical_responses_that_end_before_their_node():
    rows = rows_of(handmade_prompt(IDENTICAL), [2, 4])
    assert [row[1:] for row in rows[:4]] == [
        ([0, 2], 0, 0, 2),    # the whole response
        ([0, 2], 1, 2, 2),    # the node past its end
        ([0], 2, 2, 2), ([2], 2, 2, 2)]
    assert sorted(members[0] for _, members, *_ in rows if len(members) == 1) == [0, 1, 2, 3]


def test_the_first_tree_as_it_is_printed():
    assert [indent + text.rstrip() for indent, text, _ in drawn(handmade_prompt(NESTED), [2, 4])] == [
        "├─ Sie haben",
        "│  ├─  nur zwei",
        "│  │  ├─  neue Nachrichten.",
        "│  │  └─  alte Nachrichten.",
        "│  └─  drei neue Nachrichten.",
        "└─ Es gibt zwei Nachrichten."]


def test_an_eos_without_text_is_not_the_end():
    """Of two answers that begin alike, one ends there; of two identical ones, no token is left."""
    lines = drawn(handmade_prompt([[5, 6, 2], [5, 6, 7, 2]]), [2])
    assert [text.strip() for _, text, _ in lines] == ["Sie haben", "(no text)", "zwei"]
    lines = drawn(handmade_prompt([[12, 2], [12, 2]]), [2])
    assert [text.strip() for _, text, _ in lines] == ["Es", "(end)", "(end)"]


@pytest.mark.parametrize("rows", [NESTED, IDENTICAL, EQUAL_REWARDS, [[12, 2]], [[2], [2], [5, 6, 2]]])
@pytest.mark.parametrize("boundaries", [[], [1], [2, 4], [1, 3, 6]])
def test_every_response_is_drawn_once_and_whole(rows, boundaries):
    prompt = handmade_prompt(rows)
    texts, endings = texts_along(drawn(prompt, boundaries), len(rows))
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
    branches = [row[0] for row in rows_of(handmade_prompt(NESTED + IDENTICAL[:1] * 2), [1, 2, 4])]
    for above, below in zip(branches, branches[1:]):
        for a, b in zip(above, below):
            assert b in {"├": "│├└", "│": "│├└", "└": " "}.get(a, "─ ├└│"), branches


TEXTS = ["Grüße 😀 an dich", "Grüße 😃 an dich", "Grüße an\nalle\tTschüß\r\n", "Gr日本語, ja\u2028nein\x1b[31m"]


@pytest.mark.parametrize("boundaries", [[2], [3, 5], [2, 4, 7], [6, 8, 9]])
def test_characters_split_over_tokens_and_lines(demo, boundaries):
    tokenizer = demo[1].tokenizer
    rows = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in TEXTS]
    responses, lengths = padded(rows + rows[:1])
    texts = sampling.decode_responses(tokenizer, responses, lengths)
    ends = sampling.text_ends(tokenizer, responses, lengths, texts)
    assert texts == TEXTS + TEXTS[:1]
    prompt = {**handmade_prompt(NESTED), "responses": responses, "lengths": lengths, "texts": texts, "ends": ends}
    lines = drawn(prompt, boundaries)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for _, text, _ in lines)
    found, endings = texts_along(lines, len(texts))
    assert endings == [1] * len(texts)
    for text, line in zip(texts, found):
        shown = "".join("·" if c in "\n\t\r\u2028\x1b" else c for c in text)
        assert line.replace(" ", "") == shown.replace(" ", "")


def test_long_texts_are_shortened_and_columns_stay_in_place():
    prompt = handmade_prompt([[5] + [11] * 40 + [2], [5] + [10] * 3 + [2], [12, 2]])
    lines = [tree.span_text(prompt, row, 40) for row in rows_of(prompt, [1])]
    assert len(lines) == 4 and {len(line) for line in lines} == {40}
    assert "…" in lines[1] and "…" not in "".join(lines[2:])


# The numbers that 03 and 04 print.

def printed(capsys, script, run, number):
    """The lines of the tree a script prints, as (members, numbers) in the order of tree_rows."""
    capsys.readouterr()
    call(script, "--run", run, "--show", number)
    lines = [line for line in capsys.readouterr().out.splitlines() if "─ " in line]
    prompt, found = (load(run, name)["prompts"][number] for name in ("rollouts", "tree"))
    rows = list(tree.tree_rows(found["boundaries"], found["groups"], prompt["lengths"]))
    assert len(lines) == len(rows)
    return prompt, [(row, line, [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", line)])
                    for row, line in zip(rows, lines)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_03_prints_members_and_surprisal(capsys, handmade, number):
    prompt, lines = printed(capsys, "03_tree.py", handmade, number)
    nats = load(handmade, "surprisal")["prompts"][number]["surprisal"]
    for row, line, numbers in lines:
        expected = [len(row.members)]
        if row.start < row.end:
            expected.append(nats[row.members[0], row.start].item())
        assert numbers == pytest.approx(expected, abs=0.0051), line


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
        _, rows = printed(capsys, "04_advantage.py", handmade, number)
        lines = [line for _, line, _ in rows]
    assert (handmade / "advantages.pt").read_bytes() == whole
    prompt, found, earned = (load(handmade, name)["prompts"][number]
                             for name in ("rollouts", "tree", "advantages"))
    rows = tree.tree_rows(found["boundaries"], found["groups"], prompt["lengths"])
    for (_, members, k, start, end), line in zip(rows, lines, strict=True):
        numbers = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", line)]
        value = earned["rewards"][members].mean().item()
        assert numbers[:2] == pytest.approx([len(members), value], abs=0.00051), line
        spans = earned["spans"][members[0]]
        assert len(numbers) == (5 if start < end else 2)
        if start < end:
            assert numbers[2] == pytest.approx(len(members) * spans[k][2], abs=0.00051), line
            sums = [earned[name][members, start].sum().item() for name in ("leaf", "grpo")]
            assert numbers[3:] == pytest.approx(sums, abs=0.00051), line


def test_rollouts_without_ends_are_drawn_as_token_ids():
    prompt = handmade_prompt(NESTED)
    del prompt["ends"]
    assert [text.split() for _, text, _ in drawn(prompt, [2])][:2] == [["5", "6"], "14 7 9 11 2".split()]
