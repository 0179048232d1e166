"""Boundaries, nodes, spans and advantages, on cases worked by hand."""
import math
import re
from importlib import import_module

import pytest
import torch
from conftest import ROOT, padded

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


def test_equal_surprisal_in_one_response_goes_to_the_earlier_token():
    assert boundaries_of([[0.0, 0.1, 2.0, 0.1, 2.0]], B=1) == [2]


def test_boundaries_keep_their_distance():
    # The shortest response has 9 tokens: D = max(2, 9 // 3) = 3. After 4, 6 is too close, 7 is not.
    row = [0.0, 0.1, 0.1, 0.1, 5.0, 0.1, 4.9, 4.8, 0.1]
    assert boundaries_of([row], B=2) == [4, 7]
    # With a response of 5 tokens beside it D = max(2, 5 // 3) = 2, and 6 is far enough.
    assert boundaries_of([row, [0.0] * 5], B=2) == [4, 6]
    # B = 3 makes D = max(2, 9 // 4) = 2; 7 is next to 6, and of the equal 0.1 the first is taken.
    assert boundaries_of([row], B=3) == [1, 4, 6]


def test_distance_is_never_below_two():
    # D = max(2, 3 // 4): neighbours 1 and 2 are not both kept.
    assert boundaries_of([[0.0, 3.0, 2.0]], B=3) == [1]


def test_no_budget_no_boundary():
    assert boundaries_of([[0.0, 3.0, 2.0, 5.0]], B=0) == []


def test_the_first_token_is_no_boundary():
    assert boundaries_of([[99.0, 0.1, 0.2, 0.1]], B=1) == [2]
    assert boundaries_of([[99.0], [98.0]], B=2) == []


def test_padding_is_no_boundary():
    assert boundaries_of([[0.0, 0.3, 0.1, 0.2, 0.1], [0.0, 0.1]], B=1, fill=1e30) == [1]


def test_boundaries_ascend_and_may_be_fewer_than_the_budget():
    assert boundaries_of([[0.0, 1.0, 0.1, 2.0]], B=2) == [1, 3]
    assert boundaries_of([[0.0, 1.0]], B=8) == [1]


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


def test_responses_that_ended_are_grouped_with_identical_ones():
    responses, lengths = padded([[5, 2], [6, 7, 8, 2], [5, 2]])
    assert tree.group_prefixes(responses, lengths, 3) == [[0, 2]]


# Step 4.

@pytest.mark.parametrize("multiplicity, shared", [(0, [0.2, 0.5]), (0.5, [0.2 / 3**0.5, 0.5 / 2**0.5]),
                                                  (1, [0.2 / 3, 0.5 / 2])])
def test_the_exponent_of_n(multiplicity, shared):
    """Shared spans are divided by n to this power; tails, whose n is 1, by nothing."""
    spans = advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS, multiplicity=multiplicity)
    assert [value for _, _, value in spans[0]] == pytest.approx([*shared, 0.7])
    assert [value for _, _, value in spans[3]] == pytest.approx([-0.6])


@pytest.mark.parametrize("terms, chosen", [("both", (1, 1)), ("global", (1, 0)), ("local", (0, 1))])
def test_spans_and_credit_of_nested_nodes(terms, chosen):
    def credit_of(global_term, local_term, n=1):
        return pytest.approx((chosen[0] * global_term + chosen[1] * local_term) / math.sqrt(n))

    spans = advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS, terms)
    shared = (0, 2, credit_of(0.1, 0.1, n=3))   # 0.6 against 0.5, and its parent is the root
    inner = (2, 5, credit_of(0.3, 0.2, n=2))    # 0.8 against 0.5, and against 0.6
    assert spans[0] == [shared, inner, (5, 8, credit_of(0.5, 0.2))]    # 1.0 against 0.5 and 0.8
    assert spans[1] == [shared, inner, (5, 8, credit_of(0.1, -0.2))]   # better than all, not than its branch
    assert spans[2] == [shared, (2, 8, credit_of(-0.3, -0.4))]         # 0.2 against 0.5 and 0.6
    assert spans[3] == [(0, 8, credit_of(-0.3, -0.3))]                 # no node: the root twice


def test_the_worked_tree():
    """Docstring of 04 and README draw the same tree, and its sums are those of the code."""
    drawing = re.search(r"^root  .*\n(?:.*\n)*?└─ y3 .*$", advantage.__doc__, re.MULTILINE).group()
    assert drawing in (ROOT / "README.md").read_text(encoding="utf-8")
    spans = {terms: advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS, terms)
             for terms in ("global", "local", "both")}
    root, *lines = drawing.splitlines()
    assert root.split() == ["root", "V", "0.50"] and advantage.mean_reward(REWARDS, range(4)) == 0.5
    nodes = [("A", [0, 1, 2], 0), ("B", [0, 1], 1), ("y0", [0], 2), ("y1", [1], 2), ("y2", [2], 1), ("y3", [3], 0)]
    for line, (name, members, k) in zip(lines, nodes, strict=True):
        GA, LA, both = [spans[terms][members[0]][k][2] for terms in spans]
        width = math.sqrt(len(members))
        assert re.search(r"\w+", line).group() == name
        assert float(re.search(r"[Vr] (\S+)", line).group(1)) == pytest.approx(advantage.mean_reward(REWARDS, members))
        assert f"{GA * width:.2f} {LA * width:+.2f}" in line.replace("+ ", "+").replace("- ", "-")
        assert f"= {both:+.2f}" in line and (f"n {len(members)} " in line) == (len(members) > 1)


def test_a_node_skipped_by_a_response_is_not_its_parent():
    # 0 and 1 share 4 tokens but the node at 2 holds 2 and 3: their parent is the root, worth 0.5.
    spans = advantage.span_advantages([2, 4], [[[2, 3]], [[0, 1]]], [6] * 4, [1.0, 0.8, 0.2, 0.0])
    assert spans[0] == [(0, 4, pytest.approx((0.4 + 0.4) / math.sqrt(2))),
                        (4, 6, pytest.approx(0.5 + 0.1))]


def test_identical_responses_that_end_before_their_node_have_no_tail():
    # Root (0.9 + 0.9 + 0.0) / 3 = 0.6. The node of the identical ones at 4 lies past their 2 tokens.
    spans = advantage.span_advantages([4], [[[0, 1]]], [2, 2, 6], [0.9, 0.9, 0.0])
    assert spans[0] == spans[1] == [(0, 4, pytest.approx(0.6 / math.sqrt(2)))]
    assert spans[2] == [(0, 6, pytest.approx(-1.2))]


def test_identical_responses_that_end_at_their_node_have_no_tail():
    spans = advantage.span_advantages([4], [[[0, 1]]], [4, 4, 6], [0.9, 0.9, 0.0])
    assert [span[:2] for span in spans[0]] == [(0, 4)]


def test_identical_responses_may_have_two_nodes_past_their_end():
    # Both nodes are worth 0.9: the second adds nothing to its parent, but stands out from the root.
    spans = advantage.span_advantages([3, 6], [[[0, 1]], [[0, 1]]], [2, 2, 9], [0.9, 0.9, 0.0])
    assert spans[0] == [(0, 3, pytest.approx(0.6 / math.sqrt(2))),
                        (3, 6, pytest.approx(0.3 / math.sqrt(2)))]


def test_without_boundaries_a_response_is_one_span():
    spans = advantage.span_advantages([], [], [3, 5], [1.0, 0.0])
    assert spans == [[(0, 3, 1.0)], [(0, 5, -1.0)]]


# Steps 5 and 6.

def test_zscore_counts_a_span_once_whatever_its_length():
    # 1, 3 and 5: mean 3, standard deviation (n - 1) 2. Token counts 1, 99 and 2 play no part.
    assert advantage.zscore([[(0, 1, 1.0), (1, 100, 3.0)], [(0, 2, 5.0)]]) == [
        [(0, 1, -1.0), (1, 100, 0.0)], [(0, 2, 1.0)]]


def test_zscore_counts_spans_without_tokens_too():
    # The two spans past the end of the identical ones stand in the mean: (2 * 3 + 0) / 3 = 2, deviation sqrt(3).
    standard = advantage.zscore([[(0, 4, 3.0)], [(0, 4, 3.0)], [(0, 6, 0.0)]])
    assert values_of(standard) == pytest.approx([1 / math.sqrt(3), 1 / math.sqrt(3), -2 / math.sqrt(3)])


def test_zscore_divides_by_no_less_than_a_millionth():
    assert values_of(advantage.zscore([[(0, 1, 1e-9)], [(0, 1, -1e-9)]])) == pytest.approx([1e-3, -1e-3])


def test_grpo_by_hand():
    # Mean 0.5, deviation (n - 1) sqrt(0.5).
    scale = math.sqrt(0.5) + 1e-6
    assert advantage.grpo_advantages([1.0, 0.0]).tolist() == pytest.approx([0.5 / scale, -0.5 / scale])
    # Mean 0.55, deviation 0.07: the floor of 1/3 takes its place.
    scale = 1 / 3 + 1e-6
    assert advantage.grpo_advantages([0.5, 0.6]).tolist() == pytest.approx([-0.05 / scale, 0.05 / scale])
    assert advantage.grpo_advantages(torch.tensor([1.0, 0.0])).dtype == torch.float32


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_rewards_all_alike_earn_nothing(K, reward):
    groups = [[list(range(K))] if K > 1 else []]
    spans = advantage.span_advantages([2], groups, [4] * K, [reward] * K)
    assert values_of(advantage.zscore(spans)) == pytest.approx([0.0] * len(values_of(spans)), abs=1e-9)
    assert advantage.grpo_advantages([reward] * K).tolist() == pytest.approx([0.0] * K, abs=1e-9)


# Paragraph 9: what the gradient of shared tokens carries.

def test_sums_over_the_members_of_a_node():
    spans = advantage.span_advantages(BOUNDARIES, GROUPS, LENGTHS, REWARDS)
    grpo = advantage.grpo_advantages(REWARDS).tolist()
    # Rewards 1, .6, .2, .2: squared distances .25 + .01 + .09 + .09 = .44, deviation sqrt(.44 / 3).
    scale = math.sqrt(0.44 / 3) + 1e-6
    for k, (members, value, parent) in enumerate([([0, 1, 2], 0.6, 0.5), ([0, 1], 0.8, 0.6)]):
        n = len(members)
        assert sum(grpo[i] for i in members) == pytest.approx(n * (value - 0.5) / scale, abs=1e-6)
        assert sum(spans[i][k][2] for i in members) == pytest.approx(
            math.sqrt(n) * ((value - 0.5) + (value - parent)))


def test_a_beginning_that_all_share_earns_nothing_from_either():
    spans = advantage.span_advantages([2], [[[0, 1, 2, 3]]], LENGTHS, REWARDS)
    assert sum(row[0][2] for row in spans) == pytest.approx(0, abs=1e-12)
    assert advantage.grpo_advantages(REWARDS).sum().item() == pytest.approx(0, abs=1e-6)


# Step 8.

@pytest.mark.parametrize("hypothesis, reference, score", [
    # 3 of 3, 1 of 2, then 0 of 1 smoothed to 1/2 of 1; the order 4 is left out, the lengths are equal.
    ("a b d", "b d a", (1 * 0.5 * 0.5) ** (1 / 3)),
    # Every n-gram matches, but 2 words stand for 4: penalty exp(1 - 4 / 2).
    ("a b", "a b c d", math.exp(-1)),
    # Of three "a" only one counts; bigrams 0 of 2 -> 1/2 of 2, trigrams 0 of 1 -> 1/4 of 1.
    ("a a a", "a b c", (1 / 3 * 1 / 4 * 1 / 4) ** (1 / 3)),
    ("one  two\nthree", "one two three", 1.0),
    ("One two three", "one two three", (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)),
    ("", "a b c", 0.0),
    ("x y", "a b c", 0.0),
])
def test_sentence_bleu_by_hand(hypothesis, reference, score):
    assert advantage.sentence_bleu(hypothesis, reference) == pytest.approx(score)


def test_lowercase_ignores_case():
    assert advantage.sentence_bleu("EINE Nachricht", "eine nachricht", lowercase=True) == pytest.approx(1)


def test_rewards_compare_texts_with_the_reference():
    prompt = {"texts": ["eins zwei", "drei"], "reference": "eins zwei"}
    assert advantage.prompt_rewards(prompt) == pytest.approx([1.0, 0.0])
