"""Which label fits a text? Zero- or few-shot, from rows of texts and labels, or of texts with options of their own."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals.base import Cell, Outcome, Sample, chosen_of, option, register_task
from hfpatch.evals.retrieval import Prompted
from hfpatch.evals.rows import Row, Rows, read_rows, skipped

_SAMPLE = "classification_sample.json"
_KINDS = "CSV with the columns text and label (or category), or JSON rows {text, label} or {text, options, answer}"


@dataclass(frozen=True)
class Item:
    """A text, the labels to choose from, and the right one."""

    text: str
    options: tuple[str, ...]
    answer: str


@register_task
@dataclass(frozen=True, kw_only=True)
class Classification(Prompted):
    """A text, some labels, and which of them fits; with `shots`, solved examples before it.

    The answer is the label that the model finds likeliest, token by token among the labels that are still possible:
    the chance of a label is the product of its tokens' shares. Only the logits after the last token of a prompt are
    read, or after the beginning that labels have in common, which is then a part of the prompt: so it is fair to
    patches that look ahead in a prompt, and patches for decode steps alone do nothing here. Scores: `accuracy`; `nll`,
    negative log-likelihood of the right label in nats (less is better), which shows small effects with fewer samples.

    `data`: CSV or JSON rows of texts and labels (BANKING77's train.csv and test.csv as they are), or rows with options
    of their own. Without it, 96 short texts of six topics, written for this project. Underscores in labels are shown as
    spaces. Rows are drawn label by label, so that all labels are asked for equally often.
    """

    name: ClassVar[str] = "classification"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "which of some labels fits a text? zero- or few-shot, own data or a built-in sample"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "nll")
    lower_is_better: ClassVar[tuple[str, ...]] = ("nll",)
    new_tokens: ClassVar[int] = 0

    data: str | None = option(None, f"File: {_KINDS}. None: a built-in sample.")
    train: str | None = option(None, "File that examples are taken from; None: the other rows of data.")
    labels: tuple[str, ...] | str | None = option(None, "Some of the labels; None: all.")
    shots: int = option(
        0, "Examples before the text: of each label, or in all where rows have their own options.", ge=0
    )
    samples: int = option(48, "Texts.", ge=1)
    fold: int | None = option(
        None, "0 or 1: one half of each label's rows alone, so that the other half can serve for choices.", ge=0, le=1
    )

    def check(self) -> None:
        super().check()
        items, problems = _items(self.data)
        known = list(dict.fromkeys(item.answer for item in items))
        own = len({item.options for item in items}) > 1
        if own and self.labels is not None:
            raise ConfigError("classification: rows with options of their own have no common labels to choose from.")
        labels = tuple(known) if own else chosen_of("classification: labels", self.labels, known)
        if not own and len(labels) < 2:
            raise ConfigError("classification: with one label there is nothing to choose. Give two or more.")
        pool, more = (items, []) if self.train is None else _items(self.train)
        self.put("_items", _folded(_of(items, labels, own), self.fold))
        # examples come from the rows that are not asked, where there are such
        rest = None if self.fold is None else 1 - self.fold
        self.put("_pool", _folded(_of(pool, labels, own), rest if self.train is None else None))
        self.put("_own", own)
        self.put("_problems", [*problems, *more])
        if not self._items:
            raise DataMissingError(
                f"classification: no rows are left of {self.data!r} with these labels and this fold."
            )

    def cells(self) -> list[Cell]:
        name = "topics" if self.data is None else Path(self.data).name.partition(".")[0]
        return [{"subtask": name, "shots": self.shots}]

    def count(self, cell: Cell) -> int:
        return min(self.samples, len(self._items))

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        rng = random.Random(f"classification:{self.version}:{seed}")
        for number, item in enumerate(_by_turns(self._items, rng)[: self.count(cell)]):
            pool = [one for one in self._pool if one.text != item.text]
            text = "\n\n".join(
                [
                    "Which label fits the text?" if self._own else f"Labels: {', '.join(item.options)}.",
                    *(f"{_asked(one, self._own)}\nLabel: {one.answer}" for one in self._examples(pool, rng)),
                    _asked(item, self._own),
                ]
            )
            rendered, ids = self.render(tokenizer, text, "\nLabel:")
            meta = {"options": list(item.options)}
            yield Sample(number, cell, seed, ids, cell["subtask"], rendered, item.answer, meta=meta)

    def _examples(self, pool: Sequence[Item], rng: random.Random) -> list[Item]:
        if self._own:
            return rng.sample(pool, min(self.shots, len(pool)))
        found = _by_turns(pool, rng)[: self.shots * len({item.answer for item in pool})]
        rng.shuffle(found)
        return found

    def run(self, model: Any, tokenizer: Any, sample: Sample) -> Outcome:
        options = sample.meta["options"]
        logs = chances(model, sample.ids, label_tokens(tokenizer, options))
        chosen = options[int(logs.argmax())]
        nll = -float(logs[options.index(sample.gold)])
        return Outcome(output=chosen, scores={"accuracy": float(chosen == sample.gold), "nll": nll})

    def notes(self) -> list[str]:
        return [f"classification: {skipped(self._problems)}"] if self._problems else []


def label_tokens(tokenizer: Any, labels: Sequence[str]) -> list[tuple[int, ...]]:
    """Tokens of labels as they follow "Label:"; with the line break at their end none is the beginning of another."""
    return [tuple(tokenizer(f" {label}\n", add_special_tokens=False)["input_ids"]) for label in labels]


@torch.no_grad()
def chances(model: Any, ids: Sequence[int], labels: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Log-probability of each label after the prompt `ids`, among these labels: float64 [labels].

    One forward for each place where labels part; no label may be the beginning of another.
    """
    logs = torch.zeros(len(labels), dtype=torch.float64)
    waiting = [(0, list(range(len(labels))))]
    while waiting:
        place, here = waiting.pop()
        following: dict[int, list[int]] = {}
        for n in here:
            following.setdefault(labels[n][place], []).append(n)
        if len(following) > 1:
            tokens = torch.tensor([[*ids, *labels[here[0]][:place]]], device=model.device)
            last = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1].double().cpu()
            for share, some in zip(last[list(following)].log_softmax(-1), following.values(), strict=True):
                logs[some] += share
        waiting += [(place + 1, some) for some in following.values() if len(some) > 1]
    return logs


def _asked(item: Item, own: bool) -> str:
    return f"Text: {item.text}\nLabels: {', '.join(item.options)}" if own else f"Text: {item.text}"


def _by_turns(items: Sequence[Item], rng: random.Random) -> list[Item]:
    """In an order drawn at random, one of each answer in turn."""
    left: dict[str, list[Item]] = {}
    for item in rng.sample(items, len(items)):
        left.setdefault(item.answer, []).append(item)
    turns: list[Item] = []
    for turn in range(max(map(len, left.values()), default=0)):
        turns += [some[turn] for some in left.values() if turn < len(some)]
    return turns


def _folded(items: Sequence[Item], fold: int | None) -> list[Item]:
    """Every other row of each answer."""
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.answer] = seen.get(item.answer, -1) + 1
        if fold is None or seen[item.answer] % 2 == fold:
            kept.append(item)
    return kept


def _of(items: Sequence[Item], labels: tuple[str, ...], own: bool) -> list[Item]:
    return list(items) if own else [Item(i.text, labels, i.answer) for i in items if i.answer in labels]


# Data ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _items(path: str | None) -> tuple[list[Item], list[str]]:
    """Rows of a file, and what was left out."""
    if path is not None and path.endswith(".csv"):
        found = _csv(Path(path))
    else:
        found = read_rows(files("hfpatch.evals") / _SAMPLE if path is None else path, ("text",), _wrong)
    labels = tuple(dict.fromkeys(_shown(row["label"]) for row in found.rows if "options" not in row))
    own = {"options" in row for row in found.rows}
    if len(own) > 1:
        raise DataMissingError(f"classification: {path!r} has rows with options and rows without. Expected: {_KINDS}.")
    items = [
        Item(str(row["text"]).strip(), tuple(map(_shown, row["options"])), _shown(row["answer"]))
        if "options" in row
        else Item(str(row["text"]).strip(), labels, _shown(row["label"]))
        for row in found.rows
    ]
    return items, found.problems


def _csv(path: Path) -> Rows:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            read = [(n, {"text": r.get("text"), "label": r.get("label", r.get("category"))})
                    for n, r in enumerate(csv.DictReader(stream))]  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataMissingError(f"cannot read data file {str(path)!r}: {e}. Expected: {_KINDS}.") from e
    found = Rows([], [], [])
    for n, row in read:
        if row["text"] and row["label"]:
            found.rows.append(row)
            found.places.append(n)
        else:
            found.problems.append(f"{path.name}, row {n + 1}, lacks text or label")
    if not found.rows:
        raise DataMissingError(f"data file {str(path)!r} has no row that can be used. Expected: {_KINDS}.")
    return found


def _wrong(row: Row) -> str | None:
    if "options" not in row:
        return None if isinstance(row.get("label"), str) and row["label"].strip() else "has neither a label nor options"
    options = row["options"]
    if not isinstance(options, list) or len(set(map(str, options))) < 2:
        return "has options that are no list of two or more"
    return None if row.get("answer") in options else f"has the answer {row.get('answer')!r}, none of its options"


def _shown(label: Any) -> str:
    return str(label).replace("_", " ").strip()
