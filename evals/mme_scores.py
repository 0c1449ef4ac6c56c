"""The official scores of MME: how an answer is read, a subtask's score, and the sums that papers quote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)
_TOTALS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination subset": PERCEPTION[:4]}


def said(text: str) -> str:
    """An answer as yes, no or other: the whole of it, or its first four characters, as the official calculator does."""
    text = text.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


Answers = Mapping[str, Sequence[tuple[Sequence[str], Sequence[str]]]]
"""Subtask -> of each picture (labels, texts of the answers), two each."""


def official_scores(answers: Answers) -> dict[str, dict[str, float]]:
    """Subtask -> acc, acc+ and score (their sum, at most 200) in per cent; and the sums that are quoted, `score` alone.

    Perception is at most 2000, cognition 800; papers quote either perception or both together.
    """
    table: dict[str, dict[str, float]] = {}
    for subtask, pairs in answers.items():
        right = [[said(text) == label.lower() for label, text in zip(*pair, strict=True)] for pair in pairs]
        acc = 100 * sum(map(sum, right)) / (2 * len(right))
        plus = 100 * sum(map(all, right)) / len(right)
        table[subtask] = {"acc": acc, "acc+": plus, "score": acc + plus}
    sums = {
        name: {"score": sum(table[subtask]["score"] for subtask in parts)}
        for name, parts in _TOTALS.items()
        if set(parts) <= set(table)
    }
    if {"perception", "cognition"} <= set(sums):
        sums["both"] = {"score": sums["perception"]["score"] + sums["cognition"]["score"]}
    return table | sums
