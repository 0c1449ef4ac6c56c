"""LongBench (arXiv 2308.14508), LongBench-E and other rows of their form, with the official prompts, cuts and scores.

The official rows are not shipped: they come from a folder, the official data.zip, or the hub.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import metrics, prompts
from hfpatch.evals.base import Cell, Sample, Task, option, register_task
from hfpatch.evals.rows import SUFFIXES, Row, find, read_rows, skipped

_OFFICIAL = json.loads(Path(__file__).with_name("longbench_prompts.json").read_text("utf-8"))
PROMPTS: dict[str, str] = _OFFICIAL["prompts"]
"""Template of each task, with the fields `context` and `input`."""
MAX_NEW_TOKENS: dict[str, int] = _OFFICIAL["max_new_tokens"]

METRICS: dict[str, Callable[..., float]] = {
    "narrativeqa": metrics.qa_f1,
    "qasper": metrics.qa_f1,
    "multifieldqa_en": metrics.qa_f1,
    "hotpotqa": metrics.qa_f1,
    "2wikimqa": metrics.qa_f1,
    "musique": metrics.qa_f1,
    "gov_report": metrics.rouge_l,
    "qmsum": metrics.rouge_l,
    "multi_news": metrics.rouge_l,
    "trec": metrics.classification,
    "triviaqa": metrics.qa_f1,
    "samsum": metrics.rouge_l,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "lcc": metrics.code_similarity,
    "repobench-p": metrics.code_similarity,
}
TASKS = tuple(METRICS)
E_TASKS = tuple(task for task in TASKS if task not in ("narrativeqa", "musique", "qmsum"))
E_BINS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, float("inf"))}
"""Words of a row in each bin of LongBench-E, the upper end not included."""
RAW = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Never in a chat template: a model continues their examples, or their code."""
FIRST_LINE = ("trec", "triviaqa", "samsum")
"""Only the first line of the answer is scored; what follows is the next example."""

HUB = "THUDM/LongBench"
_KEYS = ("input", "context", "answers")
_EXPECTED = (
    f"Expected: data=FOLDER with files of rows, in it or in its folder data/, named as in the data set {HUB}: "
    f"hotpotqa.jsonl for the task hotpotqa, hotpotqa_e.jsonl with e=true ({', '.join(SUFFIXES)}); or data=data.zip, "
    f"the file of that name there. Keys of a row: input, context, answers, length, all_classes, _id."
)
# a shorter common start is not worth a cache of its own
_LEAST_SHARED = 256


@dataclass(frozen=True)
class Part:
    """One table: its rows with their index in the file, and the official task whose prompt and metric they take."""

    cell: Cell
    template: str
    rows: list[tuple[int, Row]]


@dataclass(frozen=True, kw_only=True)
class _Rows(Task):
    """What LongBench and files of the same form have in common. Subclasses say which files there are."""

    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("score",)

    data: str | None = option(None, "Folder with TASK.jsonl (.gz, .xz) or the official data.zip; None: from the hub.")
    subtasks: tuple[str, ...] | str | None = option(None, "Which tasks; None: all that there is data for.")
    samples: int | None = option(None, "Only the first so many rows of each table.", ge=1)
    max_words: int | None = option(None, "Only rows of at most so many words (context and input).", ge=1)
    max_length: int | None = option(
        None,
        "Prompt tokens, template not counted, above which the middle is cut out; None: what the model takes.",
        ge=2,
    )
    chat_template: str | bool = option(
        "auto", "auto: if the tokenizer has one, but never for few-shot and code tasks.", choices=prompts.CHAT_TEMPLATE
    )
    system: str | None = option(None, "System prompt of the chat template.")
    allow_overlong: bool = option(False, "Run prompts longer than the model's context.")

    def check(self) -> None:
        self.put("chat_template", prompts.template_mode(self.chat_template))
        if isinstance(self.subtasks, str):
            self.put("subtasks", tuple(name.strip() for name in self.subtasks.split(",") if name.strip()))
        # what is missing, data or a package, is said before a model is loaded
        for metric in {METRICS[part.template] for part in self._parts.values()}:
            metric("", "", all_classes=())

    def _files(self) -> tuple[dict[str, Path | Traversable], list[str]]:
        """(files by subtask, what the reader should know about those that are not there)."""
        raise NotImplementedError

    def _template(self, subtask: str, file: Path | Traversable) -> str:
        """The official task that the rows of a file are run as."""
        raise NotImplementedError

    def _tables(self, subtask: str, rows: list[tuple[int, Row]]) -> Iterator[tuple[Cell, list[tuple[int, Row]]]]:
        yield {"subtask": subtask}, rows

    @cached_property
    def _read(self) -> tuple[list[Part], list[str]]:
        """(tables, notes)."""
        files, notes = self._files()
        parts: list[Part] = []
        problems: list[str] = []
        shortest, too_long = None, 0
        for subtask, file in files.items():
            template = self._template(subtask, file)
            found = read_rows(file, _KEYS, partial(self._wrong, subtask, template))
            problems += found.problems
            all_rows = list(zip(found.places, found.rows, strict=True))
            rows = [(n, row) for n, row in all_rows if self.max_words is None or words(row) <= self.max_words]
            too_long += len(all_rows) - len(rows)
            shortest = min(words(row) for row in found.rows)
            for cell, of_cell in self._tables(subtask, rows):
                if of_cell:
                    parts.append(Part(cell, template, of_cell[: self.samples]))
        if not parts:
            raise ConfigError(
                f"{self.name}: max_words={self.max_words} leaves no row. The shortest here has {shortest}."
            )
        if problems:
            notes.append(skipped(problems))
        if too_long:
            notes.append(
                f"rows of more than {self.max_words} words left out ({too_long}): not comparable with whole tasks"
            )
        if self.samples is not None:
            notes.append(f"at most {self.samples} rows of each table: not comparable with whole tasks")
        return parts, [f"{self.name}: {note}" for note in notes]

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return {json.dumps(part.cell, sort_keys=True): part for part in self._read[0]}

    def _part(self, cell: Cell) -> Part:
        return self._parts[json.dumps(cell, sort_keys=True)]

    def _wrong(self, subtask: str, template: str, row: Row) -> str | None:
        if not all(isinstance(row[key], str) for key in ("input", "context")):
            return "has an input or a context that is no text"
        answers = row["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            return "has answers that are no list of texts"
        if METRICS[template] is metrics.classification and not row.get("all_classes"):
            return "lacks all_classes"
        if METRICS[template] is metrics.retrieval and not all(metrics.retrieval(a, a) for a in answers):
            return "has an answer that is no 'Paragraph N'"
        return None

    def cells(self) -> list[Cell]:
        return [part.cell for part in self._parts.values()]

    def count(self, cell: Cell) -> int:
        return len(self._part(cell).rows)

    def tokens_to_generate(self, cell: Cell) -> int:
        return MAX_NEW_TOKENS[self._part(cell).template]

    def stop_at_newline(self, cell: Cell) -> bool:
        return self._part(cell).template == "samsum"

    def notes(self) -> list[str]:
        return self._read[1]

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        """Rows in the order of the file, except that those on one context follow the first of them."""
        part = self._part(cell)
        groups: dict[str, list[tuple[int, Row]]] = {}
        for number, row in part.rows:
            groups.setdefault(row["context"], []).append((number, row))
        for group in groups.values():
            yield from _sharing([self._sample(tokenizer, part, number, row, seed, context) for number, row in group])

    def _sample(self, tokenizer: Any, part: Part, number: int, row: Row, seed: int, context: int | None) -> Sample:
        room = None if context is None else context - self.tokens_to_generate(part.cell)
        text, ids, truncated = self._prompt(tokenizer, part.template, row, room)
        refused = None
        if self.max_length is None and room is not None and len(ids) > room:
            refused = f"{context} tokens of context leave no room for a prompt beside the {part.template} answer"
        meta = {"_id": row.get("_id"), "all_classes": row.get("all_classes")}
        subtask, gold = part.cell["subtask"], row["answers"]
        return Sample(number, part.cell, seed, ids, subtask, text, gold, truncated, refused, meta=meta)

    def _prompt(self, tokenizer: Any, template: str, row: Row, room: int | None) -> tuple[str, list[int], bool]:
        """(text, token ids, whether the middle is cut out); whole, and too long, where nothing fits into `room` tokens.

        The official rule: tokenise the prompt without a chat template; of more than `max_length` tokens, decode the
        first and the last half; then wrap. Without `max_length`, as much is kept as `room` takes with the template.
        """

        def wrapped(text: str) -> tuple[str, list[int]]:
            # a system prompt is part of the template
            return prompts.render(tokenizer, text, system=self.system if mode == "on" else None, mode=mode)

        chat = self.chat_template == "on" or (self.chat_template == "auto" and template not in RAW)
        mode = "on" if chat and prompts.uses_template(tokenizer, str(self.chat_template)) else "off"
        whole = PROMPTS[template].format(context=row["context"], input=row["input"])
        text, ids = wrapped(whole)
        plain = ids if mode == "off" else prompts.render(tokenizer, whole, mode="off")[1]
        if self.max_length is not None:
            if len(plain) <= self.max_length:
                return text, ids, False
            return (*wrapped(_halves(tokenizer, plain, self.max_length)), True)
        keep = len(plain)
        # more than once, as two halves can take more tokens than they were cut at
        while room is not None and len(ids) > room:
            keep -= len(ids) - room
            if keep < 2:
                return (*wrapped(whole), False)
            text, ids = wrapped(_halves(tokenizer, plain, keep))
        return text, ids, keep < len(plain)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        """The best over all answers; official scores are 100 times the mean."""
        template = self._part(sample.cell).template
        if template in FIRST_LINE:
            text = text.lstrip("\n").split("\n")[0]
        metric, classes = METRICS[template], sample.meta["all_classes"]
        return {"score": max(metric(text, answer, all_classes=classes) for answer in sample.gold)}


@register_task
@dataclass(frozen=True, kw_only=True)
class LongBench(_Rows):
    """The 16 English and code tasks of LongBench, or the 13 of LongBench-E in three bins of length.

    Every task has its own metric (docs/evals/longbench.md), called `score`, in [0, 1]: the official number is 100 times
    that. Prompts that are too long lose their middle. Official `max_length`: 3500 for models of 4k tokens, 7500 for 8k,
    15500 for 16k, 31500 for 32k; without it as much is kept as the model takes.
    """

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "16 English and code tasks on real long texts, official rows needed; also LongBench-E"

    e: bool = option(False, "LongBench-E: files TASK_e.jsonl, one table per bin of length.")

    def _files(self) -> tuple[dict[str, Path | Traversable], list[str]]:
        tasks, suffix = (E_TASKS, "_e") if self.e else (TASKS, "")
        wanted = [name.removesuffix(suffix) for name in self.subtasks or ()]
        if unknown := [name for name in wanted if name not in tasks]:
            raise ConfigError(
                f"longbench: no subtask {unknown[0]!r}{' with e=true' if self.e else ''}. It has: {', '.join(tasks)}."
            )
        names = wanted or tasks
        folders = _folders(_from_hub() if self.data is None else self.data)
        found = {name: file for name in names if (file := _first(folders, f"{name}{suffix}")) is not None}
        missing = [f"{name}{suffix}.jsonl" for name in names if name not in found]
        if missing and (wanted or not found):
            raise DataMissingError(f"longbench: {self.data or HUB} lacks {', '.join(missing)}. {_EXPECTED}")
        notes = [f"{len(found)} of {len(tasks)} tasks: no {', '.join(missing)}"] if missing else []
        return {f"{name}{suffix}": file for name, file in found.items()}, notes

    def _template(self, subtask: str, file: Path | Traversable) -> str:
        return subtask.removesuffix("_e") if self.e else subtask

    def _tables(self, subtask: str, rows: list[tuple[int, Row]]) -> Iterator[tuple[Cell, list[tuple[int, Row]]]]:
        if not self.e:
            yield {"subtask": subtask}, rows
            return
        for name, (low, high) in E_BINS.items():
            yield {"subtask": subtask, "words": name}, [(n, row) for n, row in rows if low <= words(row) < high]


@register_task
@dataclass(frozen=True, kw_only=True)
class LongBenchStyle(_Rows):
    """Any rows in LongBench's form, run like the official task that they name. Its numbers are no LongBench scores.

    A row has `input`, `context`, `answers` (a list) and `prompt_task`, the official task whose prompt, answer length
    and metric it takes: the same in all rows of a file. The option `prompts` says it for files without, and goes first;
    failing both, it is the file's name.
    """

    name: ClassVar[str] = "longbench-style"
    summary: ClassVar[str] = "your own rows in LongBench's form; no LongBench scores"

    data: str | None = option(None, "A file of rows, or a folder of such files (.jsonl, .jsonl.gz, .jsonl.xz).")
    subtasks: tuple[str, ...] | str | None = option(None, "Which files of the folder, without suffix; None: all.")
    prompts: dict[str, str] | None = option(None, "Official task of a file, by its name without suffix.")

    def check(self) -> None:
        for stem, template in (self.prompts or {}).items():
            _known(template, f"prompts.{stem}={template!r}")
        super().check()

    def _files(self) -> tuple[dict[str, Path | Traversable], list[str]]:
        if self.data is None:
            raise DataMissingError(
                f"longbench-style runs your own rows: give data=FILE or data=FOLDER, JSON lines with the keys "
                f"{', '.join(_KEYS)} and prompt_task (or the option prompts)."
            )
        files = _stems(Path(self.data))
        if missing := [stem for stem in (*(self.subtasks or ()), *(self.prompts or ())) if stem not in files]:
            raise DataMissingError(
                f"longbench-style: no {missing[0]}.jsonl in {self.data}. There are: {', '.join(files)}."
            )
        return {stem: file for stem, file in files.items() if stem in (self.subtasks or files)}, []

    def _template(self, subtask: str, file: Path | Traversable) -> str:
        if asked := self._asked(subtask):
            return asked
        if named := next(filter(None, (row.get("prompt_task") for row in read_rows(file, _KEYS).rows)), None):
            return _known(named, f"{subtask}: prompt_task={named!r}")
        stem = subtask.removesuffix("_e")
        if stem not in TASKS:
            raise ConfigError(
                f"longbench-style: the rows of {subtask} do not say as which official task they are run. Add "
                f"prompt_task to them, or give prompts={{{subtask}: TASK}} with one of: {', '.join(TASKS)}."
            )
        return stem

    def _wrong(self, subtask: str, template: str, row: Row) -> str | None:
        named = self._asked(subtask) or row.get("prompt_task") or template
        if named != template:
            return f"has prompt_task {named!r}, the file's is {template!r}"
        return super()._wrong(subtask, template, row)

    def _asked(self, subtask: str) -> str | None:
        return (self.prompts or {}).get(subtask)


def words(row: Row) -> int:
    """`length` of a row, or what it means: words of context and input."""
    length = row.get("length")
    return length if isinstance(length, int) else len(f"{row['context']} {row['input']}".split())


def _halves(tokenizer: Any, ids: list[int], keep: int) -> str:
    """The first and the last `keep // 2` tokens as text."""
    half = keep // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))


def _sharing(samples: list[Sample]) -> list[Sample]:
    """Samples on one context, with the number of tokens that all of them begin with."""
    common = len(os.path.commonprefix([sample.ids for sample in samples]))
    # the last token of a prompt is always computed: it gives the first token of the answer
    shared = min(common, *(len(sample.ids) - 1 for sample in samples))
    if len(samples) < 2 or shared < _LEAST_SHARED:
        return samples
    return [replace(sample, shared=shared) for sample in samples]


def _known(task: Any, said: str) -> str:
    if task in TASKS:
        return str(task)
    near = get_close_matches(str(task), TASKS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"longbench-style: {said} is no official task.{hint} These are: {', '.join(TASKS)}.")


def _folders(data: str | Path) -> list[Path | Traversable]:
    """Where rows may lie: in the folder or zip itself, or in its folder `data`, as the official zip has it."""
    place = Path(data).expanduser()
    if place.suffix != ".zip":
        return [place, place / "data"]
    try:
        root = zipfile.Path(place)
    except (OSError, zipfile.BadZipFile) as e:
        raise DataMissingError(
            f"longbench: cannot read {str(data)!r}: {e}. Give a folder, or the official data.zip."
        ) from e
    return [root, root / "data"]


def _first(folders: Sequence[Path | Traversable], stem: str) -> Path | Traversable | None:
    return next((file for folder in folders if (file := find(folder, stem)) is not None), None)


def _from_hub() -> str:
    """The official data.zip, from the hub or its cache. The package datasets no longer runs the script beside it."""
    try:
        return hf_hub_download(HUB, "data.zip", repo_type="dataset")
    except (OSError, EntryNotFoundError) as e:
        raise DataMissingError(
            f"longbench: no data given, and {HUB} cannot be had from the hub ({str(e).strip(' .')}). Go online once "
            f"(unset HF_HUB_OFFLINE), or put the data on disk. {_EXPECTED}"
        ) from e


def _stems(place: Path) -> dict[str, Path | Traversable]:
    """The files of rows in a folder by their names without suffix, or the one file."""
    place = place.expanduser()
    files = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
    found: dict[str, Path | Traversable] = {}
    for file in files:
        stem = file.name.removesuffix(".gz").removesuffix(".xz")
        if place.is_file() or file.name.endswith(SUFFIXES):
            found.setdefault(stem.rpartition(".")[0], file)
    if not found:
        raise DataMissingError(
            f"longbench-style: no rows in {str(place)!r}. Expected: a file, or a folder with files, of JSON lines "
            f"({', '.join(SUFFIXES)}) with the keys {', '.join(_KEYS)}."
        )
    return found
