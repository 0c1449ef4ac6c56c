"""The synthetic retrieval tasks of InfiniteBench (arXiv 2402.13718, OpenBMB/InfiniteBench), at any length."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hfpatch.evals import retrieval
from hfpatch.evals.base import Cell, Sample, chosen_of, depths_of, option, register_task, token_counts
from hfpatch.evals.retrieval import DEPTHS, LENGTHS, Pair, Prompted, inserted
from hfpatch.evals.ruler_text import NOISE, Problem, Supply

GENERATE = {"passkey": 6, "number_string": 12, "kv": 50}
"""Tokens generated at most, as in the original: just enough where every digit is a token."""

_SENTENCES = NOISE.replace(". ", ".\n").split("\n")
_WHAT = {"passkey": "pass key", "number_string": "sequence of digits"}
_FIND = {"passkey": "Find it and memorize them.", "number_string": "Find it."}


@register_task
@dataclass(frozen=True, kw_only=True)
class InfiniteBench(Prompted):
    """`passkey` (5 digits) and `number_string` (10 digits, some repeated) in repeated noise; `kv`, a JSON object.

    `accuracy`: for the first two, the first integer of the output is the answer; for kv, the value is one of the words
    that are left when punctuation becomes spaces. Depth d puts the needle at d per cent of the lines of noise, of the
    other records for kv. The answers of the first two begin for the model, as in the original's prompts for base
    models: their few tokens leave no room for a phrase.
    """

    name: ClassVar[str] = "infinitebench"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "InfiniteBench: pass key, number string and key-value, by length and depth"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    lengths: tuple[int, ...] | int | str = option(LENGTHS, "Prompt tokens, chat template included.")
    depths: tuple[float, ...] | float | int | str = option(DEPTHS, "Per cent of the noise before the needle.")
    subtasks: tuple[str, ...] | str = option(tuple(GENERATE), "Which of the three; a list, or text with commas.")

    def check(self) -> None:
        super().check()
        self.put("lengths", token_counts("infinitebench: lengths", self.lengths))
        self.put("depths", depths_of("infinitebench: depths", self.depths))
        self.put("subtasks", chosen_of("infinitebench: subtasks", self.subtasks, tuple(GENERATE)))

    def cells(self) -> list[Cell]:
        return [
            {"length": length, "depth": depth, "subtask": name}
            for name in self.subtasks
            for length in self.lengths
            for depth in self.depths
        ]

    def tokens_to_generate(self, cell: Cell) -> int:
        return GENERATE[cell["subtask"]]

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number in range(self.samples):
            rng, subtask = random.Random(self.key(seed, cell, number)), cell["subtask"]
            if subtask == "kv":
                problem = _records(rng, cell["depth"])
            else:
                problem = _needle(subtask, digits(rng, subtask), cell["depth"])
            yield self.filled(tokenizer, cell, seed, number, problem)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        if sample.subtask == "kv":
            return {"accuracy": float(sample.gold in re.sub(r"[\n:\"'.,?!{}]", " ", text).split())}
        number = re.search(r"[0-9]+", text)
        return {"accuracy": float(number is not None and number[0] == sample.gold)}


def digits(rng: random.Random, subtask: str) -> str:
    """Five random digits; for number_string five times more one of those so far, beside itself."""
    made = [rng.choice("0123456789") for _ in range(5)]
    for _ in range(5 if subtask == "number_string" else 0):
        at = rng.randrange(len(made))
        made.insert(at, made[at])
    return "".join(made)


def noise_text(subtask: str, value: str, lines: Sequence[str], depth: float) -> str:
    """Prompt of passkey and number_string around lines of noise."""
    what = _WHAT[subtask]
    needle = f"The {what} is {value}. Remember it. {value} is the {what}."
    context = "".join(f"{line}\n" for line in inserted(needle, lines, depth))
    return (
        f"There is an important info hidden inside a lot of irrelevant text. {_FIND[subtask]} "
        f"I will quiz you about the important information there.\n\n{context}\n\nWhat is the {what}?"
    )


def _needle(subtask: str, value: str, depth: float) -> Problem:
    """Grows by sentences of noise, so that the last line may be a part of one."""

    def text(sentences: int) -> str:
        whole, rest = divmod(sentences, len(_SENTENCES))
        lines = [NOISE] * whole + ([" ".join(_SENTENCES[:rest])] if rest else [])
        return noise_text(subtask, value, lines, depth)

    return Problem(text, f"\n\nThe {_WHAT[subtask]} is", [value], least=0, step=100)


def kv_text(records: Sequence[Pair], key: str) -> str:
    """Prompt of kv: all records on one line."""
    data = ", ".join(f'"{k}": "{v}"' for k, v in records)
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{{{data}}}\n\nKey: "{key}"\nThe value associated with the specified key is: '
    )


def _records(rng: random.Random, depth: float) -> Problem:
    supply = Supply(retrieval.records(rng))
    (key, value) = supply.first(1)[0]

    def text(count: int) -> str:
        gold, *others = supply.first(count)
        return kv_text(inserted(gold, others, depth), key)

    return Problem(text, "", [value], least=2, step=8)
