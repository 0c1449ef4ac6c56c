"""Retrieval at a chosen place: the value of a key, the number of a line, the first topic, the passage with the answer.

`kv` and `multidoc` are those of Lost in the Middle (arXiv 2307.03172, nelson-liu/lost-in-the-middle), `lines` and
`topics` those of LongEval (DachengLi1/LongChat), with their prompts, answer lengths and scores.
"""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import metrics, prompts, ruler_text
from hfpatch.evals.base import Cell, Sample, Task, chosen_of, depths_of, option, register_task, token_counts
from hfpatch.evals.rows import SUFFIXES, Row, Rows, read_rows, skipped
from hfpatch.evals.ruler import fill
from hfpatch.evals.ruler_text import Problem, Supply

Pair = tuple[str, str]
Rendered = tuple[str, list[int]]

LENGTHS = "1k,2k,4k"
DEPTHS = "0:100:25"


@dataclass(frozen=True, kw_only=True)
class Prompted(Task):
    """What the tasks here share: one user turn, at times the start of the answer, an answer of a fixed length."""

    new_tokens: ClassVar[int]

    samples: int = option(2, "Samples in each cell.", ge=1)
    chat_template: str | bool = option("auto", "auto: if the tokenizer has one.", choices=prompts.CHAT_TEMPLATE)
    system: str | None = option(None, "System prompt.")
    allow_overlong: bool = option(False, "Run prompts longer than the model's context.")

    def check(self) -> None:
        self.put("chat_template", prompts.template_mode(self.chat_template))

    def count(self, cell: Cell) -> int:
        return self.samples

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.new_tokens

    def render(self, tokenizer: Any, text: str, prefix: str = "") -> Rendered:
        return prompts.render(tokenizer, text, system=self.system, prefix=prefix, mode=self.chat_template)

    def filled(self, tokenizer: Any, cell: Cell, seed: int, number: int, problem: Problem) -> Sample:
        """A prompt of at most `cell["length"]` tokens, with as many units as that lets in; refused if none does."""
        text, ids = fill(
            problem, cell["length"], lambda units: self.render(tokenizer, problem.text(units), problem.prefix)
        )
        sample = Sample(number, cell, seed, ids, cell.get("subtask"), text, problem.answers[0])
        return replace(sample, refused=too_short(cell, ids))

    def key(self, seed: int, cell: Cell, number: int) -> str:
        """Seed of a sample. From depth to depth, and with the query before or not, the content is the same."""
        place = {name: value for name, value in cell.items() if name not in ("depth", "query_aware")}
        return json.dumps([self.name, self.version, seed, place, number], sort_keys=True)


@register_task
@dataclass(frozen=True, kw_only=True)
class KeyValue(Prompted):
    """A JSON object of UUIDs; the value of one key is asked for. `accuracy`: it stands in the answer, case folded.

    Objects are generated, with `lengths` tokens in the prompt or with a number of `keys`, or come from the official
    files. Depth d puts the record asked for at d per cent of the others; the other records are the same at all depths.
    With `questions_per_context` several neighbouring records of one object are asked for, one in each prompt.
    """

    name: ClassVar[str] = "kv"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "look up one key of a JSON object of UUIDs, by length and depth"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    new_tokens: ClassVar[int] = 100

    lengths: tuple[int, ...] | int | str | None = option(
        None, f"Prompt tokens, chat template included. None: {LENGTHS}, if neither keys nor data say how long."
    )
    keys: tuple[int, ...] | int | str | None = option(
        None, "Records in the object, in place of lengths.", paper=(75, 140, 300)
    )
    data: str | None = option(None, "Folder with kv-retrieval-N_keys.jsonl (.gz, .xz), or one such file.")
    subtasks: tuple[str, ...] | str | None = option(None, "Some of the files in the folder; None: all.")
    depths: tuple[float, ...] | float | int | str | None = option(
        None, f"Per cent of the records before the one asked for. None: {DEPTHS}, and for files where they have it."
    )
    query_aware: bool = option(False, "The key stands before the object too.")
    questions_per_context: int = option(1, "Prompts that share one object.", ge=1)

    def check(self) -> None:
        super().check()
        needs_data_for_subtasks(self)
        if one_of(self, "lengths", "keys", "data") is None:
            self.put("lengths", LENGTHS)
        if self.lengths is not None:
            self.put("lengths", token_counts("kv: lengths", self.lengths))
        if self.keys is not None:
            self.put("keys", token_counts("kv: keys", self.keys))
        if self.depths is None and self.data is None:
            self.put("depths", DEPTHS)
        if self.depths is not None:
            self.put("depths", depths_of("kv: depths", self.depths))
        if self.query_aware and self.questions_per_context > 1:
            raise ConfigError(
                "kv: with query_aware the prompts differ before the object, so none can be shared. Leave out "
                "query_aware, or questions_per_context."
            )
        self.put("_tables", self._read())
        sizes = [len(row["ordered_kv_records"]) for found in self._tables.values() for row in found.rows]
        fewest = min([*(self.keys or ()), *sizes], default=None)
        if fewest is not None and fewest <= self.questions_per_context:
            raise ConfigError(
                f"kv: {fewest} keys are too few for {self.questions_per_context} questions_per_context. Take more keys "
                "than questions."
            )

    def _read(self) -> dict[str, Rows]:
        if self.data is None:
            return {}
        where = "kv_retrieval_data of nelson-liu/lost-in-the-middle"
        required = ("ordered_kv_records", "key", "value")
        return tables(self.name, self.data, self.subtasks, r"kv-retrieval-\d+_keys", required, where, _wrong_records)

    def cells(self) -> list[Cell]:
        asked: Cell = {"query_aware": True} if self.query_aware else {}
        if self.data is not None:
            places: list[Cell] = [{"subtask": name} for name in self._tables]
        elif self.keys is not None:
            places = [{"keys": keys} for keys in self.keys]
        else:
            places = [{"length": length} for length in self.lengths]
        if self.depths is None:
            return [place | asked for place in places]
        return [place | {"depth": depth} | asked for place in places for depth in self.depths]

    def count(self, cell: Cell) -> int:
        if self.data is None:
            return self.samples
        return min(self.samples, len(self._tables[cell["subtask"]].rows) * self.questions_per_context)

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        count = self.count(cell)
        for first in range(0, count, self.questions_per_context):
            asked = range(first, min(first + self.questions_per_context, count))
            yield from self._samples(tokenizer, cell, seed, asked)

    def _samples(self, tokenizer: Any, cell: Cell, seed: int, numbers: range) -> Iterator[Sample]:
        """The prompts on one object."""
        gold, ordered, size = self._object(cell, seed, numbers)
        made: dict[str, list[Rendered]] = {}

        def longest(size: int) -> Rendered:
            records = ordered(size)
            turns = [self.render(tokenizer, kv_text(records, key, self.query_aware)) for key, _ in gold]
            text, ids = max(turns, key=lambda turn: len(turn[1]))
            made[text] = turns
            return text, ids

        if size is None:
            problem = Problem(lambda _: "", "", [], least=len(gold) + 1, step=8)
            text, _ = fill(problem, cell["length"], longest)
        else:
            text, _ = longest(size)
        shared = _common([ids for _, ids in made[text]]) if len(gold) > 1 else 0
        for number, (_, value), (prompt, ids) in zip(numbers, gold, made[text], strict=True):
            sample = Sample(number, cell, seed, ids, cell.get("subtask"), prompt, value, shared=shared)
            yield replace(sample, refused=too_short(cell, ids)) if size is None else sample

    def _object(
        self, cell: Cell, seed: int, numbers: range
    ) -> tuple[list[Pair], Callable[[int], list[Pair]], int | None]:
        """(the records asked for, all records of an object of a given size, its size if that is known)."""
        asked, depth, start = len(numbers), cell.get("depth"), 0
        if self.data is None:
            supply = Supply(records(random.Random(self.key(seed, cell, numbers.start))))
            size, gold = cell.get("keys"), supply.first(asked)
            others: Callable[[int], list[Pair]] = lambda count: supply.first(asked + count)[asked:]
        else:
            row = self._tables[cell["subtask"]].rows[numbers.start // self.questions_per_context]
            all_of_them: list[Pair] = [(key, value) for key, value in row["ordered_kv_records"]]
            size = len(all_of_them)
            start = min(all_of_them.index((row["key"], row["value"])), size - asked)
            gold = all_of_them[start : start + asked]
            others = lambda count: all_of_them[:start] + all_of_them[start + asked :]

        def ordered(size: int) -> list[Pair]:
            rest = others(size - asked)
            at = start if depth is None else place(depth, len(rest))
            return [*rest[:at], *gold, *rest[at:]]

        return gold, ordered, size

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        assert isinstance(sample.gold, str)
        return {"accuracy": float(sample.gold.lower() in text.lower())}

    def notes(self) -> list[str]:
        return skipped_rows(self.name, self._tables)


@register_task
@dataclass(frozen=True, kw_only=True)
class Lines(Prompted):
    """Numbered registers, one a line; one of them is asked for. `accuracy`: the answer's last integer is its number.

    Thousands separators split a number in two, as in the official score. Prompts come whole from the official files,
    or are generated in their layout with the line asked for at d per cent of the others.
    """

    name: ClassVar[str] = "lines"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "LongEval: the number in one of many lines, by length and depth"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    new_tokens: ClassVar[int] = 100

    lengths: tuple[int, ...] | int | str | None = option(
        None, f"Prompt tokens, chat template included. None: {LENGTHS}, without data."
    )
    depths: tuple[float, ...] | float | int | str | None = option(
        None, f"Per cent of the lines before the one asked for. None: {DEPTHS}, without data."
    )
    data: str | None = option(None, "Folder with N_lines.jsonl (.gz, .xz), or one such file; None: generated.")
    subtasks: tuple[str, ...] | str | None = option(None, "Some of the files in the folder; None: all.")

    def check(self) -> None:
        super().check()
        self.put("_tables", {})
        needs_data_for_subtasks(self)
        one_of(self, "lengths", "data")
        one_of(self, "depths", "data")
        if self.data is None:
            self.put("lengths", token_counts("lines: lengths", LENGTHS if self.lengths is None else self.lengths))
            self.put("depths", depths_of("lines: depths", DEPTHS if self.depths is None else self.depths))
        else:
            where = "longeval/evaluation/lines/testcases of DachengLi1/LongChat"
            required = ("prompt", "expected_number")
            self.put("_tables", tables(self.name, self.data, self.subtasks, r"\d+_lines", required, where, _no_number))

    def cells(self) -> list[Cell]:
        if self.data is not None:
            return [{"subtask": name} for name in self._tables]
        return [{"length": length, "depth": depth} for length in self.lengths for depth in self.depths]

    def count(self, cell: Cell) -> int:
        return self.samples if self.data is None else min(self.samples, len(self._tables[cell["subtask"]].rows))

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number in range(self.count(cell)):
            if self.data is None:
                problem = lines_problem(random.Random(self.key(seed, cell, number)), cell["depth"])
                yield self.filled(tokenizer, cell, seed, number, problem)
            else:
                row = self._tables[cell["subtask"]].rows[number]
                text, ids = self.render(tokenizer, row["prompt"])
                yield Sample(number, cell, seed, ids, cell["subtask"], text, str(row["expected_number"]))

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        numbers = re.findall(r"\d+", text)
        return {"accuracy": float(bool(numbers) and int(numbers[-1]) == int(str(sample.gold)))}

    def notes(self) -> list[str]:
        notes = skipped_rows(self.name, self._tables)
        if self.data is None and ruler_text.words().source is None:
            notes.append(
                "lines: the names of the lines are invented; LongEval's come from wonderwords, to be had with: "
                "pip install 'hfpatch[eval]'"
            )
        return notes


@register_task
@dataclass(frozen=True, kw_only=True)
class Topics(Prompted):
    """A record of conversations on several topics; the first topic is asked for. `accuracy`: the answer contains it.

    Only with the official files. The original lets people judge; here case does not matter and words must be the same.
    """

    name: ClassVar[str] = "topics"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "LongEval: the first topic of a long conversation (needs data)"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    new_tokens: ClassVar[int] = 50

    data: str | None = option(None, "Folder with N_topics.jsonl (.gz, .xz), or one such file.")
    subtasks: tuple[str, ...] | str | None = option(None, "Some of the files in the folder; None: all.")

    def check(self) -> None:
        super().check()
        where = "longeval/evaluation/topics/testcases of DachengLi1/LongChat"
        self.put(
            "_tables",
            tables(self.name, self.data, self.subtasks, r"\d+_topics", ("prompt", "topics"), where, _no_topic),
        )

    def cells(self) -> list[Cell]:
        return [{"subtask": name} for name in self._tables]

    def count(self, cell: Cell) -> int:
        return min(self.samples, len(self._tables[cell["subtask"]].rows))

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number in range(self.count(cell)):
            row = self._tables[cell["subtask"]].rows[number]
            text, ids = self.render(tokenizer, row["prompt"])
            yield Sample(number, cell, seed, ids, cell["subtask"], text, row["topics"][0])

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return {"accuracy": float(str(sample.gold).lower() in text.lower())}

    def notes(self) -> list[str]:
        return skipped_rows(self.name, self._tables)


@dataclass(frozen=True)
class Passage:
    """A document of multidoc. `plain`: its text normalised, to see whether an answer stands in it."""

    title: str
    text: str
    plain: str


@register_task
@dataclass(frozen=True, kw_only=True)
class MultiDoc(Prompted):
    """A question over many passages, one of which has the answer.

    `best_subspan_em`: an accepted answer stands in the first line of the output, both normalised as for QA F1. A row's
    own distractors (`ctxs` that are not gold) come first; more are drawn from `passages`, none with an accepted answer
    in it. A prompt of `lengths` tokens ends its last distractor early. Depth d puts the gold passage at d per cent of
    the others, which are the same at all depths.
    """

    name: ClassVar[str] = "multidoc"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "questions on many passages, one with the answer, by length and depth (needs data)"
    metrics: ClassVar[tuple[str, ...]] = ("best_subspan_em",)
    new_tokens: ClassVar[int] = 100

    lengths: tuple[int, ...] | int | str | None = option(
        None, f"Prompt tokens, chat template included. None: {LENGTHS}, without documents."
    )
    documents: tuple[int, ...] | int | str | None = option(
        None, "Passages in a prompt, in place of lengths.", paper=(10, 20, 30)
    )
    depths: tuple[float, ...] | float | int | str = option(DEPTHS, "Per cent of the others before the gold passage.")
    data: str | None = option(None, "Folder with nq-open-*.jsonl (.gz, .xz), or one such file: the questions.")
    passages: str | None = option(
        None, "File of {title, text} rows, for distractors; None: *corpus* or *passages* (.json, .jsonl) in the folder."
    )

    def check(self) -> None:
        super().check()
        self.put("depths", depths_of("multidoc: depths", self.depths))
        one_of(self, "lengths", "documents")
        if self.documents is None:
            self.put("lengths", token_counts("multidoc: lengths", LENGTHS if self.lengths is None else self.lengths))
        else:
            self.put("documents", token_counts("multidoc: documents", self.documents))
        where = "qa_data of nelson-liu/lost-in-the-middle (nq-open-oracle.jsonl.gz)"
        required = ("question", "answers", "ctxs")
        found = tables(self.name, self.data, None, r"nq-open-.*", required, where, _wrong_question)
        if len(found) > 1:
            raise ConfigError(
                f"multidoc: {self.data!r} has several question files: {', '.join(found)}. Give one of them as data."
            )
        self.put("_tables", found)
        passages, problems = self._other_passages()
        self.put("_passages", passages)
        self.put("_problems", problems)
        if not self._passages and all(len(row["ctxs"]) == 1 for row in self._questions):
            raise DataMissingError(
                f"multidoc: the rows of {self.data!r} have no passages but the gold ones. Give passages=FILE with "
                "{title, text} rows, .json or .jsonl: for instance 2wikimultihopqa_corpus.json, which is in "
                "reproduce/dataset of OSU-NLP-Group/HippoRAG."
            )
        self.put("_short", {})

    @property
    def _questions(self) -> list[Row]:
        found: list[Rows] = list(self._tables.values())
        return found[0].rows

    def _other_passages(self) -> tuple[tuple[Passage, ...], list[str]]:
        path = None if self.passages is None else Path(self.passages)
        if path is None and (folder := Path(str(self.data))).is_dir():
            named = re.compile(r".*(corpus|passages).*\.jsonl?(\.gz|\.xz)?")
            path = next((file for file in sorted(folder.iterdir()) if named.fullmatch(file.name)), None)
        return ((), []) if path is None else _passages(path)

    def cells(self) -> list[Cell]:
        if self.documents is not None:
            places: list[Cell] = [{"documents": n} for n in self.documents]
        else:
            places = [{"length": length} for length in self.lengths]
        return [place | {"depth": depth} for place in places for depth in self.depths]

    def count(self, cell: Cell) -> int:
        return min(self.samples, len(self._questions))

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number in range(self.count(cell)):
            row = self._questions[number]
            gold, others = self._documents(row, self.key(seed, cell, number))
            if "length" not in cell:
                yield self._with_documents(tokenizer, cell, seed, number, gold, others)
                continue
            text = lambda words, row=row, gold=gold, others=others: multidoc_text(
                inserted(gold, _first_words(others, words), cell["depth"]), row["question"]
            )
            words = sum(len(text.split()) for _, text in others)
            # a word is a token at least, so that more words than tokens are as good as endless
            most = words if words < cell["length"] else None
            problem = Problem(text, "", row["answers"], least=0, step=200, most=most)
            sample = replace(self.filled(tokenizer, cell, seed, number, problem), gold=row["answers"])
            if len(sample.ids) < _SHORT_OF * cell["length"]:
                self._short[cell["length"]] = f"multidoc: too few passages for prompts of {cell['length']} tokens"
            yield sample

    def _with_documents(
        self, tokenizer: Any, cell: Cell, seed: int, number: int, gold: Pair, others: list[Pair]
    ) -> Sample:
        row, wanted = self._questions[number], cell["documents"]
        made = multidoc_text(inserted(gold, others[: wanted - 1], cell["depth"]), row["question"])
        text, ids = self.render(tokenizer, made)
        refused = f"there are only {len(others) + 1} documents" if len(others) + 1 < wanted else None
        return Sample(number, cell, seed, ids, None, text, row["answers"], refused=refused)

    def _documents(self, row: Row, key: str) -> tuple[Pair, list[Pair]]:
        """(gold passage, all that can stand beside it)."""
        gold = next(c for c in row["ctxs"] if c.get("isgold"))
        own = [(c["title"], c["text"]) for c in row["ctxs"] if not c.get("isgold")]
        answers = [plain for answer in row["answers"] if (plain := metrics.normalise(answer))]
        free = [
            (passage.title, passage.text)
            for passage in self._passages
            if passage.title != gold["title"] and not any(answer in passage.plain for answer in answers)
        ]
        random.Random(key).shuffle(free)
        return (gold["title"], gold["text"]), own + free

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        assert isinstance(sample.gold, list)
        return {"best_subspan_em": best_subspan_em(text, sample.gold)}

    def notes(self) -> list[str]:
        problems = [f"multidoc: {skipped(self._problems)}"] if self._problems else []
        return skipped_rows(self.name, self._tables) + problems + list(self._short.values())


_SHORT_OF = 0.9


# Texts ---------------------------------------------------------------------------------------------------------------


def records(rng: random.Random) -> Iterator[Pair]:
    """Pairs of random UUIDs without end."""
    while True:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        yield key, value


def kv_text(records: Sequence[Pair], key: str, query_aware: bool = False) -> str:
    """Prompt of kv: one record a line."""
    data = ",\n ".join(f'"{k}": "{v}"' for k, v in records)
    before = f'Key: "{key}"\n\n' if query_aware else ""
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'{before}JSON data:\n{{{data}}}\n\nKey: "{key}"\nCorresponding value:'
    )


def lines_text(lines: Sequence[tuple[str, int]], asked: str) -> str:
    """Prompt of lines."""
    listed = "\n".join(f"line {label}: REGISTER_CONTENT is <{number}>" for label, number in lines)
    return (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        f"<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{listed}\n\n"
        f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {asked}? I need the number. "
    )


def lines_problem(rng: random.Random, depth: float) -> Problem:
    """A LongEval prompt that grows by lines."""
    supply = Supply((label, rng.randint(1, 50000)) for label in _labels(rng))
    asked, number = supply.first(1)[0]

    def text(count: int) -> str:
        gold, *others = supply.first(count)
        return lines_text(inserted(gold, others, depth), asked)

    return Problem(text, "", [str(number)], least=1, step=20)


def _labels(rng: random.Random) -> Iterator[str]:
    pool, seen = ruler_text.words(), set()
    while True:
        label = f"{rng.choice(pool.adjectives)}-{rng.choice(pool.nouns)}"
        if label not in seen:
            seen.add(label)
            yield label


def multidoc_text(documents: Sequence[Pair], question: str) -> str:
    """Prompt of multidoc: one document a line."""
    listed = "\n".join(f"Document [{n}](Title: {title}) {text}" for n, (title, text) in enumerate(documents, 1))
    return (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        f"might be irrelevant).\n\n{listed}\n\nQuestion: {question}\nAnswer:"
    )


def _first_words(documents: Sequence[Pair], words: int) -> list[Pair]:
    """The first documents, as far as `words` words of text go."""
    taken: list[Pair] = []
    for title, text in documents:
        if words <= 0:
            break
        parts = text.split()
        taken.append((title, text if len(parts) <= words else " ".join(parts[:words])))
        words -= len(parts)
    return taken


def place(depth: float, others: int) -> int:
    """How many of the others come before what stands at `depth` per cent."""
    return round(depth / 100 * others)


def inserted(gold: Any, others: Sequence[Any], depth: float) -> list[Any]:
    """The others with `gold` at `depth` per cent of them."""
    at = place(depth, len(others))
    return [*others[:at], gold, *others[at:]]


def _common(ids: Sequence[list[int]]) -> int:
    """Tokens that all begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False)))


# Scores --------------------------------------------------------------------------------------------------------------


def best_subspan_em(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer stands in what comes before the first line break, both normalised; so may a part of a word.

    An answer that normalises to nothing (only punctuation and articles) does not count.
    """
    said = metrics.normalise(prediction.split("\n")[0])
    return float(any(plain in said for answer in answers if (plain := metrics.normalise(answer))))


# Options and files ---------------------------------------------------------------------------------------------------


def one_of(task: Task, *names: str) -> str | None:
    """Which of the options is given. Raises ConfigError where it is more than one."""
    given = [name for name in names if getattr(task, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{task.name}: {' and '.join(given)} exclude each other. Leave out one of them.")
    return given[0] if given else None


def needs_data_for_subtasks(task: KeyValue | Lines) -> None:
    """Raises ConfigError where subtasks are chosen and there are none."""
    if task.subtasks is not None and task.data is None:
        raise ConfigError(f"{task.name}: subtasks are the files of data, which is not given. Give it, or no subtasks.")


def tables(
    task: str,
    data: str | None,
    subtasks: tuple[str, ...] | str | None,
    name: str,
    required: Sequence[str],
    where: str,
    wrong: Callable[[Row], str | None],
) -> dict[str, Rows]:
    """Rows by file name without suffix: those of the file `data`, or of all files in it that are named like that.

    Args:
        name: regular expression of the name without suffix.
        where: the official place of the files.

    Raises:
        DataMissingError: there is no such file; says which are expected.
    """
    path, suffixes = Path(data or ""), "|".join(map(re.escape, SUFFIXES))
    files: dict[str, Path] = {}
    if data is not None and path.is_file():
        files[path.name.partition(".jsonl")[0]] = path
    elif data is not None and path.is_dir():
        named = re.compile(f"({name})({suffixes})")
        files = {match[1]: file for file in path.iterdir() if (match := named.fullmatch(file.name))}
    if not files:
        missing = "data=PATH is not given" if data is None else f"there are none at data={data!r}"
        raise DataMissingError(
            f"{task} needs its official files, but {missing}. Expected: a folder with files named like "
            f"{name.replace(chr(92) + 'd+', 'N').replace('.*', 'NAME')}.jsonl (.gz or .xz may be), or one such file. "
            f"They are in {where}."
        )
    wanted = chosen_of(f"{task}: subtasks", subtasks, sorted(files, key=_by_number))
    return {stem: read_rows(files[stem], required, wrong) for stem in wanted}


def _by_number(name: str) -> tuple[int, str]:
    number = re.search(r"\d+", name)
    return int(number[0]) if number else 0, name


def skipped_rows(task: str, files: Mapping[str, Rows]) -> list[str]:
    """The note on malformed rows, if there are any."""
    problems = [problem for found in files.values() for problem in found.problems]
    return [f"{task}: {skipped(problems)}"] if problems else []


def too_short(cell: Cell, ids: Sequence[int]) -> str | None:
    """Why a prompt does not have the length of its cell."""
    if len(ids) <= cell["length"]:
        return None
    return f"length {cell['length']} is too short: the smallest prompt takes {len(ids)} tokens"


@lru_cache(maxsize=2)
def _passages(path: Path) -> tuple[tuple[Passage, ...], list[str]]:
    """(passages, malformed rows)."""
    found = read_rows(path, ("title", "text"))
    made = (Passage(row["title"], row["text"], metrics.normalise(row["text"])) for row in found.rows)
    return tuple(made), found.problems


def _wrong_records(row: Row) -> str | None:
    pairs = row["ordered_kv_records"]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs
    ):
        return "has an ordered_kv_records that is no list of [key, value]"
    if [row["key"], row["value"]] not in pairs:
        return "has a key and value that are not among its records"
    return "has a key twice" if len({key for key, _ in pairs}) < len(pairs) else None


def _no_number(row: Row) -> str | None:
    return None if re.fullmatch(r"\d+", str(row["expected_number"])) else "has an expected_number that is no number"


def _no_topic(row: Row) -> str | None:
    topics = row["topics"]
    return None if isinstance(topics, list) and topics and isinstance(topics[0], str) else "has no first topic"


def _wrong_question(row: Row) -> str | None:
    answers, documents = row["answers"], row["ctxs"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return "has answers that are no list of texts"
    if not isinstance(documents, list) or not all(
        isinstance(c, dict) and isinstance(c.get("title"), str) and isinstance(c.get("text"), str) for c in documents
    ):
        return "has ctxs that are no list of {title, text}"
    return None if any(c.get("isgold") for c in documents) else "has no gold passage (isgold) in its ctxs"
