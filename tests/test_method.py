"""Are boundaries, nodes, spans and advantages right on cases worked by hand?"""
import math
import re
from importlib import import_module

import pytest
import torch
from conftest import padded

tree = import_module("03_tree")
advantage = import_module("04_advantage")

# Four responses of 8 tokens. 0, 1 and 2 share two tokens, 0 and 1 five. The root is worth
# (1.0 + 0.6 + 0.2 + 0.2) / 4 = 0.5, the node {0, 1, 2} 0.6, the node {0, 1} 0.8.
REWARDS = [1.0, 0.6, 0.2, 0.2]
BOUNDARIES, GROUPS, LENGTHS = [2, 5], [[[0, 1, 2]], [[0, 1]]], [8, 8, 8, 8]


def boundaries_of(rows, B, fill=99.0):
    return tree.select_boundaries(*padded(rows, fill), B)


def values_of(spans):
    return [value for row in spans for _, _, value in row]


# Step 2.

def test_equal_surprisal_goes_to_the_lower_response():
    assert boundaries_of([[0.0, 0.1, 0.1, 2.0], [0.0, 2.0, 0.1, 0.1]], B=1) == [3]
    assert boundaries_of([[99.0], [98.0]], B=1) == []  # there is no boundary before the first


def test_equal_surprisal_in_one_response_goes_to_the_earlier_token():
    assert boundaries_of([[0.0, 0.1, 2.0, 0.1, 2.0]], B=1) == [2]


# Step 3.

@pytest.mark.parametrize("boundary, groups", [
    (1, [[0, 1, 2, 3]]),
    (2, [[0, 1, 3]]),        # 3 is [5, 6], whole
    (3, [[0, 1]]),           # [5, 6] is not the beginning of three tokens
    (4, []),
])
def test_groups_share_the_tokens_before_the_boundary(boundary, groups):
    responses, lengths = padded([[5, 6, 7, 1], [5, 6, 7, 2], [5, 9, 7, 1], [5, 6]])
    assert tree.group_prefixes(responses, lengths, boundary) == groups


def test_padding_is_not_the_token_zero():
    responses, lengths = padded([[5, 0, 7], [5], [5, 0, 8]])
    assert tree.group_prefixes(responses, lengths, 2) == [[0, 2]]


def test_groups_come_in_order_of_their_first_member():
    responses, lengths = padded([[8, 1], [9, 1], [9, 2], [8, 3], [7, 1]])
    assert tree.group_prefixes(responses, lengths, 1) == [[0, 3], [1, 2]]


# Step 5.

@pytest.mark.parametrize("multiplicity, shared", [(0, [0.2, 0.5]), (0.5, [0.2 / 3**0.5, 0.5 / 2**0.5]),
                                                  (1, [0.2 / 3, 0.5 / 2])])
def test_the_exponent_of_n(multiplicity, shared):
    """Shared spans are divided by n to this power; tails, whose n is 1, by nothing."""
    spans = advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS, multiplicity=multiplicity)
    assert [value for _, _, value in spans[0]] == pytest.approx([*shared, 0.7])
    assert [value for _, _, value in spans[3]] == pytest.approx([-0.6])


def test_the_worked_tree():
    """The tree in the docstring of 04: its sums are those of the code."""
    drawing = re.search(r"^root  .*\n(?:.*\n)*?└─ .*\(y3\).*$", advantage.__doc__, re.MULTILINE).group()
    spans = {terms: advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS, terms)
             for terms in ("global", "local", "both")}
    root, *lines = drawing.splitlines()
    assert root.split() == ["root", "V", "0.50"] and advantage.mean_reward(REWARDS, range(4)) == 0.5
    nodes = [("n 3 ", [0, 1, 2], 0), ("n 2 ", [0, 1], 1), ("(y0)", [0], 2), ("(y1)", [1], 2), ("(y2)", [2], 1),
             ("(y3)", [3], 0)]
    for line, (name, members, k) in zip(lines, nodes, strict=True):
        GA, LA, both = [spans[terms][members[0]][k][2] for terms in spans]
        width = math.sqrt(len(members))
        assert float(re.search(r"[Vr] (\S+)", line).group(1)) == pytest.approx(advantage.mean_reward(REWARDS, members))
        assert f"{GA * width:.2f} {LA * width:+.2f}" in line.replace("+ ", "+").replace("- ", "-")
        assert name in line and f"= {both:+.2f}" in line and ("each" in line) == (len(members) > 1)


def worked_responses():
    """The four responses in the docstring of 03: their rows, tokens (K, T), and lengths."""
    rows = re.findall(r"^    y\d +(.*)$", tree.__doc__, re.MULTILINE)
    words = [row.replace("|", " ").split() for row in rows]
    number = {word: n for n, word in enumerate(sorted({word for row in words for word in row}))}
    return rows, *padded([[number[word] for word in row] for row in words])


def test_the_worked_responses():
    """They are cut as the code cuts them."""
    rows, responses, lengths = worked_responses()
    assert lengths.tolist() == LENGTHS
    assert [tree.group_prefixes(responses, lengths, b) for b in BOUNDARIES] == GROUPS
    spans = advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS)
    for row, response_spans in zip(rows, spans, strict=True):
        sizes = [len(part.split()) for part in row.split("|")]
        assert sizes == [end - start for start, end, _ in response_spans]


# td.

def test_changes_of_value_on_the_worked_tree():
    """V is 0.5 at the root, 0.6 for y0 to y2, 0.8 for y0 and y1. Where nobody parts, nothing changes."""
    _, responses, _ = worked_responses()
    wanted = torch.zeros(4, 8)
    wanted[:3, 0] = 0.6 - 0.5
    wanted[3, 0] = 0.2 - 0.5
    wanted[:2, 2] = 0.8 - 0.6
    wanted[2, 2] = 0.2 - 0.6
    wanted[0, 5] = 1.0 - 0.8
    wanted[1, 5] = 0.6 - 0.8
    scale = torch.tensor(REWARDS).std()  # 0.38, more than 1/3
    found = advantage.td_advantages(responses, REWARDS)
    torch.testing.assert_close(found * scale, wanted)
    torch.testing.assert_close((found * scale).sum(dim=1), torch.tensor(REWARDS) - 0.5)
    assert not found[wanted == 0].any()


def test_changes_of_value_of_responses_of_other_lengths():
    """The first and the third are identical. The deviation is less than 1/3."""
    responses, lengths = padded([[5, 2], [5, 7, 2], [5, 2], [5, 7, 8, 2]])
    found = advantage.td_advantages(responses, [1.0, 0.7, 1.0, 0.5])
    wanted = [[0, 0.2, 0, 0], [0, -0.2, 0.1, 0], [0, 0.2, 0, 0], [0, -0.2, -0.1, 0]]
    torch.testing.assert_close(found, 3 * torch.tensor(wanted))


def test_alike_responses_or_rewards_change_no_value():
    responses, _ = padded([[5, 6, 2], [5, 6, 2], [5, 6, 2]])
    assert not advantage.td_advantages(responses, [0.7, 0.7, 0.7]).any()
    assert not advantage.td_advantages(responses[:1], [0.7]).any()
    responses, _ = padded([[5, 6, 2], [5, 2], [7, 2]])
    assert advantage.td_advantages(responses, [0.7, 0.7, 0.7]).abs().max() < 1e-9


# Steps 6 and 7.

def test_zscore_divides_by_no_less_than_a_millionth():
    assert values_of(advantage.zscore([[(0, 1, 1e-9)], [(0, 1, -1e-9)]])) == pytest.approx([1e-3, -1e-3])


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_rewards_all_alike_earn_nothing(K, reward):
    groups = [[list(range(K))] if K > 1 else []]
    spans = advantage.span_advantages([2], groups, [4] * K, [reward] * K)
    assert values_of(advantage.zscore(spans)) == pytest.approx([0.0] * len(values_of(spans)), abs=1e-9)
    assert advantage.grpo_advantages([reward] * K).tolist() == pytest.approx([0.0] * K, abs=1e-9)


# Step 4.

def test_rewards_compare_texts_with_the_reference():
    prompt = {"texts": ["eins zwei", "drei"], "reference": "eins zwei"}
    assert advantage.prompt_rewards(prompt) == pytest.approx([1.0, 0.0])
