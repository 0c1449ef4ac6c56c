"""Metrics against values worked out by hand."""

from __future__ import annotations

import sys

import pytest

from hfpatch.errors import HFPatchError
from hfpatch.evals import metrics

CLASSES = ["pin", "pin blocked", "card", "card lost", "lost"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat,  a dog\nAN ant.", "cat dog ant"),
        ("U.S.A.", "usa"),
        ("a-the", "athe"),
        # only ASCII punctuation goes, and only whole articles
        ("“Théâtre” of the then", "“théâtre” of then"),
        ("a the an", ""),
    ],
)
def test_normalise(text, normal):
    assert metrics.normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        # 1 word common; P = 1/3, R = 1/2
        ("in Paris today", "Paris, France", 0.4),
        # bags: "no" counts twice in both; common 2, P = 2/3, R = 2/2
        ("no no no", "no no", 0.8),
        ("", "Paris", 0),
        ("Paris", "", 0),
        ("the", "a", 0),
        ("Zürich", "zürich!", 1),
        ("Zurich", "Zürich", 0),
        ("1,234", "1234", 1),
    ],
)
def test_qa_f1(prediction, gold, score):
    assert metrics.qa_f1(prediction, gold) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("the cat sat", "the cat sat", 1),
        # LCS a c: P = 2/2, R = 2/3
        ("a c", "a b c", 0.8),
        # LCS is one word whichever: P = R = 1/2
        ("b a", "a b", 0.5),
        # two predicted sentences, union of the LCS sets {a, b} and {c}: P = R = 3/3, though no LCS is that long
        ("c. a b", "a b c", 1),
        # distinct words only: both are {a}
        ("a a a", "a", 1),
        # case-sensitive, no stemming
        ("Cats", "cats", 0),
        ("cat", "cats", 0),
        # the dot is no word, the comma stays with its word: {x,} and {x}
        ("x,.", "x.", 0),
        ("Ärger über", "über", 2 / 3),
        ("", "a b", 0),
        (" . ...", "a b", 0),
        ("a", "", 0),
        # too long for the recursion of the package, or it would be 2/3 as for a b
        ("a" + " b" * 1100, "a", 0),
    ],
)
def test_rouge_l(prediction, gold, score):
    assert metrics.rouge_l(prediction, gold) == pytest.approx(score, abs=1e-7)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("card", "card", 1),
        # found: pin, pin blocked; pin is a part of the gold one
        ("It is: pin blocked", "pin blocked", 1),
        # found: pin, pin blocked; nothing is a part of pin
        ("pin blocked", "pin", 0.5),
        ("card or pin", "card", 0.5),
        # found: card, card lost, lost. card goes, so card lost is passed over; lost goes
        ("card lost", "card lost", 1),
        ("lost", "pin", 0),
        ("PIN", "pin", 0),
        ("", "pin", 0),
        ("pinball", "pin", 1),
    ],
)
def test_classification(prediction, gold, score):
    assert metrics.classification(prediction, gold, all_classes=CLASSES) == score


def test_classification_passes_over_the_name_after_a_removed_one():
    # found: card, lost, card lost. card goes, and with it the look at lost, which stays and counts
    assert metrics.classification("card lost", "card lost", all_classes=["card", "lost", "card lost"]) == 0.5
    assert metrics.classification("æ oder ß", "ß", all_classes=["ß", "ss"]) == 1
    assert metrics.classification("pin", "pin", all_classes=[]) == 0


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("Paragraph 12", "Paragraph 12", 1),
        ("12", "Paragraph 12", 1),
        ("Paragraph 1", "Paragraph 12", 0),
        ("Paragraph 3, or 4, or 3.", "Paragraph 3", 2 / 3),
        ("Paragraph 03", "Paragraph 3", 0),
        ("none of them", "Paragraph 3", 0),
        ("", "Paragraph 3", 0),
        ("段落3", "Paragraph 3", 1),
        ("3", "3", 0),
    ],
)
def test_retrieval(prediction, gold, score):
    assert metrics.retrieval(prediction, gold) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("17", "17", 1),
        ("There are 17 of 30 paragraphs.", "17", 0.5),
        ("1 2 3 4", "4", 0.25),
        ("17.0", "17", 0.5),
        ("seventeen", "17", 0),
        ("", "17", 0),
        ("１７", "17", 0),
        ("171", "17", 0),
    ],
)
def test_count(prediction, gold, score):
    assert metrics.count(prediction, gold) == score


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("return x", "return x", 1),
        # 2 · LCS 7 / (8 + 8) = 0.875, in whole per cent
        ("return x", "return y", 0.88),
        # the fence, the comment and the C++ comment are passed over
        ("```python\n# sum\n// sum\nreturn x\nreturn y", "return x", 1),
        ("\n\nreturn x", "return x", 1),
        # an empty line is a line
        ("```\n\nreturn x", "return x", 0),
        # the first line counts with its spaces: 2 · 1 / (3 + 1)
        ("  x\ny", "x", 0.5),
        ("# only a comment", "x", 0),
        ("", "return x", 0),
        # 2 · 3 / (4 + 4)
        ("größ", "groß", 0.75),
        # longest common *subsequence*: abd of abcd and abd: 2 · 3 / 7 = 0.857
        ("abcd", "abd", 0.86),
    ],
)
def test_code_similarity(prediction, gold, score):
    assert metrics.code_similarity(prediction, gold) == score


@pytest.mark.parametrize(("package", "metric"), [("rouge", metrics.rouge_l), ("rapidfuzz", metrics.code_similarity)])
def test_missing_package_says_how_to_install_it(monkeypatch, package, metric):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HFPatchError, match=rf"{package}.*pip install 'hfpatch\[eval\]'"):
        metric("a", "b")
