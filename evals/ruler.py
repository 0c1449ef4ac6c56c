"""RULER (arXiv 2404.06654): thirteen tasks of retrieval, tracing, counting and question answering at any length."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.evals import base, filler, haystack, prompts, rows, ruler_qa, ruler_text, sample_cache
from hfpatch.evals.base import Cell, Sample, Task, chosen_of, option, register_task, token_counts
from hfpatch.evals.ruler_text import Needles, Problem

NIAH = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", values=4),
    "niah_multiquery": Needles("essay", "words", "numbers", keys=4, queries=4),
}
GENERATE = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
"""Tokens generated at most, for each subtask in the paper's order."""

_ESSAY = [name for name, needles in NIAH.items() if needles.haystack == "essay"]
_WORDS = [name for name, needles in NIAH.items() if needles.key == "words"] + ["cwe"]
_QA = [*ruler_qa.FILES]
_SOURCES = (base, filler, haystack, prompts, rows, ruler_qa, ruler_text, sys.modules[__name__])

# the search for the size stops this close below the room; every further step costs a tokenisation of the whole prompt
_CLOSE_ENOUGH = 0.005
# a note says so where a prompt fills less of its length
_SHORT_OF = 0.9


@register_task
@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """Generated from the seed, for the tokenizer at hand: prompt and answer together take `length` tokens at most.

    `string_match` in [0, 1] (the paper's scores are a hundred times that): the share of the answers that the output
    contains; for qa_1 and qa_2 whether it contains one of them. Case does not matter. The paper has 500 samples per
    subtask, seed 42, and the mean of all thirteen as the result of a length. Departures are listed in
    docs/evals/ruler.md.
    """

    name: ClassVar[str] = "ruler"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "the 13 tasks of RULER: retrieval, tracing, counting, questions on documents"
    metrics: ClassVar[tuple[str, ...]] = ("string_match",)

    lengths: tuple[int, ...] | int | str = option((4096,), "Tokens of prompt and answer, chat template included.")
    subtasks: tuple[str, ...] | str = option(tuple(GENERATE), "Which of the 13; a list, or text with commas.")
    samples: int = option(5, "Samples per subtask and length.", ge=1, paper=500)
    haystack: str = option(
        "builtin", "Of the essay tasks: builtin, essays, or the path of a text file.", paper="essays"
    )
    data: str | None = option(
        None, "Folder with squad.json and hotpotqa.json for qa_1 and qa_2; None: generated documents."
    )
    chat_template: str | bool = option("auto", "auto: if the tokenizer has one.", choices=prompts.CHAT_TEMPLATE)
    system: str | None = option(None, "System prompt.")
    allow_overlong: bool = option(False, "Run prompts longer than the model's context.")

    def check(self) -> None:
        self.put("lengths", token_counts("ruler: lengths", self.lengths))
        self.put("subtasks", chosen_of("ruler: subtasks", self.subtasks, tuple(GENERATE)))
        self.put("chat_template", prompts.template_mode(self.chat_template))
        if self._has(_ESSAY):
            haystack.prepare(self.haystack)
        for subtask in self._has(_QA):
            self._corpus(subtask)
        # prompts far below their length, for want of a document that fits: cell as JSON -> tokens
        self.put("_short", {})

    def _has(self, names: Sequence[str]) -> list[str]:
        return [name for name in self.subtasks if name in names]

    def _corpus(self, subtask: str) -> ruler_qa.Corpus | None:
        return None if self.data is None else ruler_qa.corpus(subtask, self.data)

    def cells(self) -> list[Cell]:
        return [{"length": n, "subtask": name, **self._setting(name)} for n in self.lengths for name in self.subtasks]

    def _setting(self, subtask: str) -> dict[str, str]:
        """What tells this table from another one of the same run; only what is not the default."""
        return {"haystack": Path(self.haystack).name} if subtask in _ESSAY and self.haystack != "builtin" else {}

    def count(self, cell: Cell) -> int:
        found = self._corpus(cell["subtask"]) if cell["subtask"] in _QA else None
        return self.samples if found is None else min(self.samples, len(found.questions))

    def tokens_to_generate(self, cell: Cell) -> int:
        return GENERATE[cell["subtask"]]

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        """Samples are kept on disk (`sample_cache`) and read from there the next time."""
        make = partial(self._sample, tokenizer, cell, seed)
        tokenizer_sha = sample_cache.tokenizer_sha(tokenizer)
        ids = range(self.count(cell))
        if tokenizer_sha is None:
            drawn: Iterator[Sample] = map(make, ids)
        else:
            facts = self._facts(tokenizer, cell["subtask"]) | {"tokenizer": tokenizer_sha}
            drawn = sample_cache.kept(self.name, cell, seed, facts, ids, make)
        for sample in drawn:
            if len(sample.ids) + self.tokens_to_generate(cell) < _SHORT_OF * cell["length"]:
                self._short[json.dumps(cell)] = len(sample.ids)
            yield sample

    def _facts(self, tokenizer: Any, subtask: str) -> dict[str, Any]:
        """What a sample depends on besides tokenizer, cell and seed."""
        found = self._corpus(subtask) if subtask in _QA else None
        return {
            "version": self.version,
            "sources": sample_cache.source_sha(*_SOURCES),
            "python": sys.version_info[:2],
            "words": ruler_text.words().source,
            "haystack": _haystack_sha(self.haystack) if subtask in _ESSAY else None,
            "data": found.sha256 if found else None,
            # shows the chat template, which may hold a date
            "prompt": prompts.render(tokenizer, "a", system=self.system, prefix=" b", mode=self.chat_template),
        }

    def _sample(self, tokenizer: Any, cell: Cell, seed: int, number: int) -> Sample:
        subtask, length, generate = cell["subtask"], cell["length"], self.tokens_to_generate(cell)
        key = json.dumps([self.version, seed, cell, number], sort_keys=True)
        problem = self._problem(subtask, length, seed, number, key)

        def prompt(units: int) -> tuple[str, list[int]]:
            return prompts.render(
                tokenizer, problem.text(units), system=self.system, prefix=problem.prefix, mode=self.chat_template
            )

        text, ids = fill(problem, length - generate, prompt)
        refused = None
        if len(ids) > length - generate:
            refused = (
                f"length {length} is too short for {subtask}: the smallest prompt takes {len(ids)} tokens, "
                f"the answer {generate}"
            )
        return Sample(number, cell, seed, ids, subtask, text, problem.answers, refused=refused)

    def _problem(self, subtask: str, length: int, seed: int, number: int, key: str) -> Problem:
        rng = random.Random(f"ruler:{key}")
        if needles := NIAH.get(subtask):
            essay = haystack.sentences(self.haystack, key) if needles.haystack == "essay" else iter(())
            return ruler_text.niah(rng, needles, length, essay)
        if subtask == "vt":
            return ruler_text.vt(rng, length)
        if subtask == "cwe":
            return ruler_text.cwe(rng, length)
        if subtask == "fwe":
            return ruler_text.fwe(rng, length - GENERATE[subtask])
        found = self._corpus(subtask)
        if found is None:
            return ruler_qa.invented(rng, subtask)
        order = random.Random(f"ruler:{subtask}:{seed}").sample(found.questions, len(found.questions))
        return ruler_qa.from_corpus(rng, found, order[number])

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        match = string_match_part if sample.subtask in _QA else string_match_all
        return {"string_match": match(text, sample.gold if isinstance(sample.gold, list) else [sample.gold])}

    def notes(self) -> list[str]:
        said = []
        if self._has(_WORDS) and ruler_text.words().source is None:
            said.append(
                "words are invented; RULER's come from wonderwords, to be had with: pip install 'hfpatch[eval]'"
            )
        if self._has(_ESSAY) and self.haystack != "essays":
            said.append(f"the text of {', '.join(self._has(_ESSAY))} is {self.haystack}, not the essays of the paper")
        if self._has(_QA) and self.data is None:
            said.append(
                f"the documents of {', '.join(self._has(_QA))} are generated, so these are not RULER's official qa "
                "numbers; those take data=FOLDER"
            )
        for subtask in self._has(_QA):
            if (found := self._corpus(subtask)) and found.problems:
                shown = "; ".join(found.problems[:3]) + ("; ..." if len(found.problems) > 3 else "")
                said.append(f"{subtask}: {len(found.problems)} malformed entries are left out: {shown}")
        said += [
            f"{cell} has a prompt of only {tokens} tokens: the next document is too long, or there is none"
            for cell, tokens in self._short.items()
        ]
        return [f"ruler: {note}" for note in said]


def fill(problem: Problem, room: int, prompt: Callable[[int], tuple[str, list[int]]]) -> tuple[str, list[int]]:
    """The prompt with as many units as fit in `room` tokens; that with the fewest where even this is too long.

    Tokens are about linear in units: a bracketed secant search, which ends 0.5 % below the room or at the last unit.
    """
    low, best = problem.least, prompt(problem.least)
    high = None if problem.most is None else problem.most + 1
    units = low + problem.step
    while len(best[1]) < (1 - _CLOSE_ENOUGH) * room and (high is None or high - low > 1):
        units = units if high is None else min(units, high - 1)
        made = prompt(units)
        rate = max((len(made[1]) - len(best[1])) / (units - low), 1e-3)
        if len(made[1]) <= room:
            low, best = units, made
        else:
            high = units
        units = low + max(int((room - len(best[1])) / rate), 1)
        if high is not None:
            # keep off the ends of the bracket, or a curve would shrink it one unit at a time
            margin = max((high - low) // 8, 1)
            units = min(max(units, low + margin), high - margin)
    return best


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the prediction, in [0, 1]."""
    said = _plain(prediction)
    return sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references stands in the prediction, else 0."""
    said = _plain(prediction)
    return float(any(reference.lower() in said for reference in references))


def _plain(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()


def _haystack_sha(source: str) -> str:
    """What tells one text from another under the same name."""
    if source == "builtin":
        return source
    if source == "essays":
        # they go round long before that
        text = "\n".join(islice(haystack.sentences(source, 0), 20_000))
        return hashlib.sha256(text.encode()).hexdigest()
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()
