"""Does the answer follow the context when this says something else than the model has learnt?"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import DataMissingError
from hfpatch.evals import generation, metrics, prompts
from hfpatch.evals.base import Cell, Outcome, Sample, Task, option, register_task
from hfpatch.evals.logits import read
from hfpatch.evals.rows import Row, read_rows, skipped
from hfpatch.spans import Spans, find_spans, marked

_WHERE = (
    "NQ-Swap (pminervini/NQ-Swap: question, sub_context, sub_answer, org_answer), or questions of NQ-Open with their "
    "gold passages (nq-open-oracle.jsonl.gz in qa_data of nelson-liu/lost-in-the-middle), from which it is made"
)


_ASKED = ("who", "when", "where", "how")


@dataclass(frozen=True)
class Conflict:
    """A question whose context says `new`, where the world says one of `old`."""

    question: str
    context: str
    new: tuple[str, ...]
    old: tuple[str, ...]


@register_task
@dataclass(frozen=True, kw_only=True)
class Counterfactual(Task):
    """Questions on a passage in which the answer was replaced by that of another question.

    Scores: `context`, the replacement stands in the answer, both normalised as for QA F1; `memory`, the true answer
    does (less is better: it cannot be from the context); `prefers`, the replacement is likelier than the true answer,
    as means over their tokens; `nll`, mean negative log-likelihood in nats of running text
    (less is better), whose exponential is the perplexity: what a patch costs in fluency. The text is another passage
    after the context, and so far into it that it follows from there, not from the context.

    While a sample runs, its context is the marked span (`hfpatch.spans.marked`), so that `steer` and other patches that
    act on a span take it without being told.

    `data` is a file of NQ-Swap, which has replacements of the same type of entity, or of NQ-Open with gold passages
    (Longpre et al., Entity-Based Knowledge Conflicts in Question Answering, arXiv 2109.05052, make theirs so). Of the
    latter, questions of who, when, where and how are taken whose answer, a name or a number, stands in the passage; it
    is replaced by the answer to another question of the same kind, drawn from the seed.
    """

    name: ClassVar[str] = "counterfactual"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "questions on passages that contradict what the model has learnt (needs data)"
    metrics: ClassVar[tuple[str, ...]] = ("context", "memory", "prefers", "nll")
    lower_is_better: ClassVar[tuple[str, ...]] = ("memory", "nll")

    data: str | None = option(None, "File of NQ-Swap, or of NQ-Open with gold passages (.jsonl, .gz, .xz).")
    samples: int = option(50, "Questions.", ge=1)
    instruction: bool = option(False, "Tell the model to answer from the context.")
    fluency: int = option(64, "Tokens of running text for nll, and as many before them.", ge=2)
    max_new_tokens: int = option(24, "Tokens generated at most.", ge=1)
    chat_template: str | bool = option("auto", "auto: if the tokenizer has one.", choices=prompts.CHAT_TEMPLATE)
    allow_overlong: bool = option(False, "Run prompts longer than the model's context.")

    def check(self) -> None:
        self.put("chat_template", prompts.template_mode(self.chat_template))
        if self.data is None:
            raise DataMissingError(f"counterfactual needs data=FILE: {_WHERE}.")
        rows, problems = _rows(Path(self.data))
        self.put("_rows", rows)
        self.put("_problems", problems)
        self.put("_short", {})

    def cells(self) -> list[Cell]:
        assert self.data is not None
        return [{"subtask": Path(self.data).name.partition(".")[0]}]

    def count(self, cell: Cell) -> int:
        return min(self.samples, len(self._rows))

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.max_new_tokens

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        conflicts = self._conflicts(seed)
        if len(conflicts) < self.count(cell):
            self._short[seed] = f"counterfactual: only {len(conflicts)} of the rows found a replacement"
        for number, one in enumerate(conflicts[: self.samples]):
            other = conflicts[(number + 1) % len(conflicts)]
            head = "Answer the question from the text alone.\n\n" if self.instruction else ""
            user = f"{head}{one.context}\n\nQuestion: {one.question.rstrip('?')}?\nAnswer in a few words."
            text, ids = prompts.render(tokenizer, user, mode=self.chat_template)
            (span,) = find_spans(tokenizer, ids, text=one.context).ranges[:1]
            running = [tokenizer(one.context)["input_ids"]]
            running += [tokenizer(f"\n\n{other.context}", add_special_tokens=False)["input_ids"][: 2 * self.fluency]]
            meta = {"old": list(one.old), "span": list(span), "running": running}
            yield Sample(number, cell, seed, ids, cell["subtask"], text, list(one.new), meta=meta)

    def _conflicts(self, seed: int) -> list[Conflict]:
        """Questions in an order drawn from the seed."""
        rng = random.Random(f"counterfactual:{self.version}:{seed}")
        rows = list(self._rows)
        rng.shuffle(rows)
        if "sub_context" in rows[0]:
            return [
                Conflict(row["question"], row["sub_context"], _listed(row["sub_answer"]), _listed(row["org_answer"]))
                for row in rows
            ]
        pool: dict[Any, list[str]] = {}
        for row in rows:
            pool.setdefault(row["look"], []).append(row["found"])
        made = []
        for row in rows:
            true = {metrics.normalise(answer) for answer in row["answers"]}
            others = [other for other in pool[row["look"]] if _differs(other, true, metrics.normalise(row["text"]))]
            if not others:
                continue
            new = rng.choice(others)
            context = re.sub(_whole(row["found"]), lambda _, new=new: new, row["text"])
            if not _says(context, row["answers"]):
                made.append(Conflict(row["question"], context, (new,), tuple(row["answers"])))
        return made

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return {"context": _says(text, sample.gold), "memory": _says(text, sample.meta["old"])}

    def run_batch(
        self, model: Any, tokenizer: Any, samples: Sequence[Sample], prefix: generation.Prefix | None = None
    ) -> list[Outcome]:
        with marked(*[_span(sample) for sample in samples]):
            outcomes = super().run_batch(model, tokenizer, samples, prefix)
        made = []
        for outcome, sample in zip(outcomes, samples, strict=True):
            more = {"prefers": _prefers(model, tokenizer, sample), "nll": _nll(model, sample)}
            made.append(replace(outcome, scores=outcome.scores | more))
        return made

    def notes(self) -> list[str]:
        problems = [f"counterfactual: {skipped(self._problems)}"] if self._problems else []
        return [*problems, *self._short.values()]


def _span(sample: Sample) -> Spans:
    start, stop = sample.meta["span"]
    return Spans(((start, stop),), len(sample.ids))


def _says(text: str, answers: Sequence[str]) -> float:
    said = f" {metrics.normalise(text)} "
    return float(any(f" {plain} " in said for answer in answers if (plain := metrics.normalise(answer))))


def _prefers(model: Any, tokenizer: Any, sample: Sample) -> float:
    """Whether the first replacement is likelier than the first true answer, per token."""
    likely = []
    for answer in (sample.gold[0], sample.meta["old"][0]):
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with marked(_span(sample)):
            likely.append(-float(read(model, [*sample.ids, *tokens], len(tokens) + 1).nll(tokens).double().mean()))
    return float(likely[0] > likely[1])


def _nll(model: Any, sample: Sample) -> float:
    """Of the second half of what follows the context, in nats; the first half counts as prompt, as the context does."""
    context, following = sample.meta["running"]
    scored = following[len(following) // 2 :]
    text = [*context, *following]
    with marked(Spans(((0, len(context)),), len(text) - len(scored))):
        return float(read(model, text, len(scored) + 1).nll(scored).double().mean())


@lru_cache(maxsize=2)
def _rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of either kind, those of NQ-Open with the answer found in the gold passage, and malformed rows."""
    found = read_rows(path, ("question",), _wrong)
    rows = []
    for row in found.rows:
        if "sub_context" in row:
            rows.append(row)
            continue
        gold = next(c["text"] for c in row["ctxs"] if c.get("isgold"))
        answer = next((a for a in sorted(row["answers"], key=len, reverse=True) if re.search(_whole(a), gold)), None)
        if answer is not None and (look := _look(row["question"], answer)) is not None:
            rows.append({**row, "text": gold, "found": answer, "look": look})
    if not rows or len({"sub_context" in row for row in rows}) > 1:
        raise DataMissingError(f"counterfactual: {str(path)!r} has no usable rows of one kind. Expected: {_WHERE}.")
    return rows, found.problems


def _wrong(row: Row) -> str | None:
    if "sub_context" in row:
        good = isinstance(row["sub_context"], str) and _listed(row.get("sub_answer")) and _listed(row.get("org_answer"))
        return None if good else "lacks sub_answer or org_answer"
    contexts, answers = row.get("ctxs"), row.get("answers")
    if not isinstance(contexts, list) or not any(isinstance(c, dict) and c.get("isgold") for c in contexts):
        return "has neither a sub_context nor a gold passage (isgold) in ctxs"
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        return "has answers that are no list of texts"
    return None


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value or ()))


def _whole(answer: str) -> str:
    """Pattern of an answer as whole words."""
    return rf"(?<!\w){re.escape(answer)}(?!\w)"


def _look(question: str, answer: str) -> tuple[str, str, int] | None:
    """What answers must have in common to be exchanged: what is asked, what they are, how many words (3: or more).

    None where an exchange would make no sense: for what and which, and for answers that are no names or numbers.
    """
    words = answer.split()
    asked = next((word for word in question.lower().split() if word in _ASKED), None)
    kind = "number" if any(map(str.isdigit, answer)) else "name" if all(w[0].isupper() for w in words) else None
    return None if asked is None or kind is None else (asked, kind, min(len(words), 3))


def _differs(other: str, true: set[str], passage: str) -> bool:
    """Whether a replacement says something else, which does not stand in the passage anyway."""
    other = metrics.normalise(other)
    alike = any(other in answer or answer in other for answer in true)
    return bool(other) and not alike and f" {other} " not in f" {passage} "
