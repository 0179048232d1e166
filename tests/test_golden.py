"""Does the code compute what the published method and sacrebleu do? Every golden number, to 1e-6."""
import json
from importlib import import_module
from pathlib import Path

import pytest
from conftest import padded

tree = import_module("03_tree")
advantage = import_module("04_advantage")
evaluation = import_module("06_eval")

GOLDEN = Path(__file__).parent / "golden"
LEAF = json.loads((GOLDEN / "leaf.json").read_text(encoding="utf-8"))
BLEU = json.loads((GOLDEN / "bleu.json").read_text(encoding="utf-8"))


def near(values):
    return pytest.approx(values, abs=1e-6, rel=0)


def test_golden_files_are_whole():
    assert len(LEAF) == 162 and len(BLEU["sentence"]) == 300 and len(BLEU["corpus"]) == 4


def test_leaf():
    for number, case in enumerate(LEAF):
        responses, lengths = padded(case["responses"])
        surprisal, _ = padded(case["surprisal"], fill=50.0)  # padding has no say
        boundaries = tree.select_boundaries(surprisal, lengths, case["fork_budget"])
        assert boundaries == case["boundaries"], f"case {number}: boundaries"

        groups = [tree.group_prefixes(responses, lengths, b) for b in boundaries]
        spans = advantage.span_advantages(boundaries, groups, lengths, case["rewards"], case["terms"])
        standard = advantage.zscore(spans)
        for i, wanted in enumerate(case["spans"]):
            where = f"case {number}, response {i}"
            assert [span[:2] for span in spans[i]] == [tuple(span[:2]) for span in wanted], where
            assert [span[2] for span in spans[i]] == near([span[2] for span in wanted]), where
            assert [span[2] for span in standard[i]] == near(case["zscored"][i]), where
            assert [span[:2] for span in standard[i]] == [span[:2] for span in spans[i]], where
        assert advantage.grpo_advantages(case["rewards"]).tolist() == near(case["grpo"]), f"case {number}"


def test_sentence_bleu():
    for case in BLEU["sentence"]:
        pair = case["hypothesis"], case["reference"]
        assert advantage.sentence_bleu(*pair) == near(case["cased"]), case
        assert advantage.sentence_bleu(*pair, lowercase=True) == near(case["lowercased"]), case


def test_corpus_bleu():
    for number, case in enumerate(BLEU["corpus"]):
        texts = case["hypotheses"], case["references"]
        assert evaluation.corpus_bleu(*texts, False) == near(case["cased"]), f"corpus {number}"
        assert evaluation.corpus_bleu(*texts, True) == near(case["lowercased"]), f"corpus {number}"


def test_a_corpus_without_four_words_scores_nothing():
    """As sacrebleu's corpus_bleu; the effective order is for single sentences."""
    assert evaluation.corpus_bleu(["yes", "a b"], ["yes", "a b"]) == 0
    assert advantage.sentence_bleu("a b", "a b") == 1


def test_an_empty_corpus():
    assert evaluation.corpus_bleu([], []) == 0
