"""Which heads copy from far away: retrieval scores of all heads, from needles in haystacks.

While the model writes an answer that stands in its prompt, a head copies where its strongest attention is on the very
token of the needle that is written next. A head's score in a run is the share of the needle's answer that it copied.

Source: Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574, equation 1, and its code;
the teacher-forced mode is our own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.anatomy import Anatomy, examine
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, ConflictError, HFPatchError
from hfpatch.evals import haystack, prompts, scoring
from hfpatch.evals.base import depths_of, token_counts
from hfpatch.evals.generation import cache_argument, cache_of, stop_ids
from hfpatch.evals.rows import read_rows
from hfpatch.methods._head_scores import about_path
from hfpatch.methods.base import Card, Method
from hfpatch.options import Options, option
from hfpatch.patch import is_patched, patch
from hfpatch.progress import Progress, Silent
from hfpatch.report.figures import save
from hfpatch.report.retrieval_heads import heads_chart
from hfpatch.report.run import write_atomically
from hfpatch.statistics import last_rows_probs

# Share of the answer's distinct tokens that a stretch of the prompt must hold to be the needle's answer.
_OVERLAP = 0.9
RETRIEVAL = 0.1
"""Mean score from which on a head counts as a retrieval head."""


@dataclass(frozen=True)
class Needle:
    """A sentence, the part of it that answers the question, and the question."""

    sentence: str
    answer: str
    question: str

    def __post_init__(self) -> None:
        if self.answer not in self.sentence:
            raise ConfigError(f"needle: the answer {self.answer!r} does not stand in the sentence {self.sentence!r}.")


NEEDLES = (
    Needle(
        "The survey of the Halden delta advises to plant mangroves on the seaward dykes, to pay farmers for flooded "
        "meadows and to close the gravel pits upstream.",
        "to plant mangroves on the seaward dykes, to pay farmers for flooded meadows and to close the gravel pits "
        "upstream",
        "What does the survey of the Halden delta advise?",
    ),
    Needle(
        "The best thing to do in Orsenna on a winter evening is to take the cable car up to the planetarium, drink hot "
        "cider and watch the ice skaters below.",
        "take the cable car up to the planetarium, drink hot cider and watch the ice skaters below",
        "What is the best thing to do in Orsenna on a winter evening?",
    ),
    Needle(
        "Mr Tarrant is disliked in his street because he plays the trombone at dawn, feeds the seagulls on the balcony "
        "and never brings back a borrowed drill.",
        "he plays the trombone at dawn, feeds the seagulls on the balcony and never brings back a borrowed drill",
        "Why is Mr Tarrant disliked in his street?",
    ),
)


@dataclass(frozen=True, kw_only=True)
class HeadScoring(Options):
    """How retrieval scores are measured.

    `mode="paper"`: the model answers by itself; runs whose answer is wrong do not count. `"forced"`: it reads its
    prompt and the right answer in one forward, so that every run counts; faster, deterministic, and also for models
    that do not answer. Scores of the two modes are not the same measure.
    """

    name: ClassVar[str] = "heads score"

    mode: str = option("paper", "the model answers by itself, or is given the answer", choices=("paper", "forced"))
    count: str = option(
        "set",
        'each token of the needle counts once, so that scores end at 1, or each step of decoding ("steps")',
        choices=("set", "steps"),
        paper="set; its code: steps",
    )
    lengths: tuple[int, ...] | int | str = option("1k,2k,3k,4k,5k", "prompt tokens", paper="20, from 1000 to 50000")
    depths: tuple[float, ...] | float | int | str = option(
        (0.0, 11.1, 22.2, 33.3, 44.4, 55.6, 66.7, 77.8, 88.9, 100.0), "per cent of the text before the needle"
    )
    needles: str | None = option(None, "JSON list of {sentence, answer, question}; None: three built-in ones")
    haystack: str = option("builtin", "builtin, essays, or the path of a text file")
    max_new_tokens: int = option(50, 'tokens of an answer at most, for mode="paper"', ge=1)
    success: float = option(
        0.5, 'a run counts if its answer has more than this share of the needle\'s words, for mode="paper"', ge=0, le=1
    )
    chat_template: str | bool = option("auto", "auto: if the tokenizer has one", choices=prompts.CHAT_TEMPLATE)
    seed: int = option(0, "of the haystacks", ge=0)

    def check(self) -> None:
        self.put("lengths", token_counts("heads score: lengths", self.lengths))
        self.put("depths", depths_of("heads score: depths", self.depths))
        self.put("chat_template", prompts.template_mode(self.chat_template))
        haystack.prepare(self.haystack)
        self.put("_needles", NEEDLES if self.needles is None else _read_needles(self.needles))

    def cells(self) -> list[tuple[int, float, int]]:
        """(length, depth, number of the needle) of each run."""
        needles: Sequence[Needle] = self._needles  # type: ignore[attr-defined]
        return [(n, depth, k) for n in self.lengths for depth in self.depths for k in range(len(needles))]  # type: ignore

    def prompt(self, tokenizer: Any, length: int, depth: float, number: int) -> Prompt:
        """The prompt of a run: `length` tokens or up to 1 % less."""
        needle: Needle = self._needles[number]  # type: ignore[attr-defined]
        text = haystack.Haystack(haystack.sentences(self.haystack, f"heads:{self.seed}:{number}"))
        mode = str(self.chat_template)
        chat = prompts.uses_template(tokenizer, mode)

        def ids_of(cut: str) -> list[int]:
            context = text.insert(cut, needle.sentence, depth)
            user = f"<book>{context}</book>" if chat else context
            user += f"\nBased on the content of the book, Question: {needle.question}\nAnswer:"
            ids: list[int] = prompts.render(tokenizer, user, mode=mode)[1]
            return ids

        ids = ids_of(haystack.fit(text, length, lambda cut: len(ids_of(cut))))
        answer = _encode(tokenizer, needle.answer if chat else f" {needle.answer}")
        return Prompt(ids, needle, find_span(ids, _encode(tokenizer, f" {needle.answer}")), answer)


def score_heads(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    progress: Progress | None = None,
    resume: bool = True,
    **options: Any,
) -> HeadTable:
    """Measure the retrieval score of every head and write it to `out` and to files beside it.

    `out`, for instance heads.json, has the public format `{"layer-head": [score of a run, ...]}`; heads.about.json says
    how it was made and how far heads look back; heads.csv, .svg and .png are the picture; heads.runs.jsonl has all
    runs, so that an interrupted measurement goes on.

    Args:
        model: a transformers model without patches.
        resume: False starts anew.
        options: of `HeadScoring`.

    Raises:
        ConfigError: a wrong option, or `out` belongs to another measurement.
        HFPatchError: no run counts.
    """
    how = HeadScoring.from_options(options)
    target = Path(out)
    if target.suffix != ".json":
        raise ConfigError(f"head scores are kept in a .json file, and {str(out)!r} has another ending.")
    if is_patched(model):
        raise ConflictError("scores are those of the model as it is, and this one is patched. unpatch(model) first.")
    anatomy, progress = examine(model), progress or Silent()
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(length for length, _, _ in how.cells())
    if context is not None and longest > context:
        raise ConfigError(
            f"heads score: prompts of {longest} tokens exceed the model's context of {context}. Take shorter lengths."
        )
    about = {
        "model": {
            "id": str(getattr(model.config, "_name_or_path", "") or ""),
            "type": type(model).__name__,
            **asdict(anatomy.sizes),
        },
        "options": how.options(),
    }
    runs = Runs.open(target.with_suffix(".runs.jsonl"), about, resume)
    cells = how.cells()
    progress.start(len(cells), "measuring heads")
    try:
        for cell in cells:
            label = f"{cell[0]} @ {cell[1]:g} %, needle {cell[2] + 1}"
            if cell not in runs.done:
                runs.add(cell, _run(model, tokenizer, anatomy, how, how.prompt(tokenizer, *cell)))
            progress.advance(label, float(runs.done[cell]["counts"]))
    except KeyboardInterrupt:
        progress.line(f"interrupted: the same command goes on with what is in {runs.path}.")
        raise
    finally:
        progress.stop()
    device = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    versions = {name: version(name) for name in ("hfpatch", "torch", "transformers")}
    table = HeadTable.of(list(runs.done.values()), anatomy, how, about | device | versions)
    table.write(target)
    return table


@dataclass(frozen=True)
class Prompt:
    """A prompt with a needle in it.

    Attributes:
        span: first token of the needle's answer and the one after its last; None where it was not found.
        answer: tokens of the right answer as the model would go on.
    """

    ids: list[int]
    needle: Needle
    span: tuple[int, int] | None
    answer: list[int]


def find_span(ids: Sequence[int], wanted: Sequence[int]) -> tuple[int, int] | None:
    """Where in `ids` the stretch is that shares most distinct tokens with `wanted`, if that is over 90 % of them.

    Inside a text, words may be cut into other tokens than alone, so that equality would be too much to ask. Of equally
    good places that one counts where most tokens stand in their own place.
    """
    size, kinds = len(wanted), set(wanted)
    best, place = (0.0, 0), None
    for start in range(len(ids) - size + 1):
        here = ids[start : start + size]
        share = len(kinds & set(here)) / len(kinds)
        if share > _OVERLAP and (found := (share, sum(map(int.__eq__, here, wanted)))) > best:
            best, place = found, start
    return None if place is None else (place, place + size)


def recall(answer: str, response: str) -> float:
    """Share of the words of `answer` that stand in `response`, each as often (ROUGE-1 recall, without stemming)."""
    wanted, said = (Counter(scoring.fold(text).split()) for text in (answer, response))
    return sum((wanted & said).values()) / max(sum(wanted.values()), 1)


# One run ------------------------------------------------------------------------------------------------------------


class Copies:
    """What heads copied in one run.

    Attributes:
        steps: how often each head copied a token of the needle, int64 [layers, heads].
        places: which tokens of the needle it copied, bool [layers, heads, tokens].
        distance: mean distance of its attention, summed over the steps.
    """

    def __init__(self, layers: int, heads: int, span: tuple[int, int]) -> None:
        self.span = span
        self.steps = torch.zeros(layers, heads, dtype=torch.int64)
        self.places = torch.zeros(layers, heads, span[1] - span[0], dtype=torch.bool)
        self.distance = torch.zeros(layers, heads)
        self.seen = 0

    def add(self, looks: Mapping[int, tuple[Tensor, Tensor]], ids: Tensor, written: Tensor) -> None:
        """One or more steps.

        Args:
            looks: by layer: slot with the strongest attention, int64 [heads, steps]; mean distance, [heads, steps].
            ids: of the text so far, int64 [n].
            written: token that came after each step, int64 [steps].
        """
        first, stop = self.span
        self.seen += len(written)
        for layer, (strongest, distance) in looks.items():
            copied = (strongest >= first) & (strongest < stop) & (ids[strongest] == written)
            self.steps[layer] += copied.sum(-1)
            head, step = copied.nonzero(as_tuple=True)
            self.places[layer, head, strongest[head, step] - first] = True
            self.distance[layer] += distance.sum(-1)

    def to_dict(self) -> dict[str, Any]:
        size = self.places.shape[-1]
        return {
            "set": _by_head(self.places.sum(-1) / size),
            "steps": _by_head(self.steps / size),
            "distance": [[round(x, 2) for x in row] for row in (self.distance / max(self.seen, 1)).tolist()],
        }


def _by_head(scores: Tensor) -> dict[str, float]:
    """The heads that have any."""
    return {f"{layer}-{head}": round(float(scores[layer, head]), 6) for layer, head in scores.nonzero().tolist()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch(Method):
    """Notes where the last `rows` queries of each head look, among the first `limit` keys. Changes nothing.

    `length`: tokens so far.
    """

    name: ClassVar[str] = "watch_heads"
    card: ClassVar[Card] = Card(family="heads", summary="", paper="")

    length: Callable[[], int]
    rows: int = 1
    limit: int | None = None
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        # ties of a 16-bit dtype would go to the first token
        wide = replace(call, query=call.query.float(), key=call.key.float())
        # [H, rows, n]
        probs = last_rows_probs(wide, self.rows)[0]
        # a windowed cache holds the last tokens only
        total = self.length()
        slots = torch.arange(total - call.kv_len, total, device=probs.device)
        own = slots[-probs.shape[1] :, None]
        distance = (probs * (own - slots).clamp(min=0)).sum(-1)
        if self.limit is not None:
            probs = probs.masked_fill(slots >= self.limit, 0.0)
        self.found[call.layer_idx] = slots[probs.argmax(-1)].cpu(), distance.cpu()
        return out


@torch.no_grad()
def _run(model: Any, tokenizer: Any, anatomy: Anatomy, how: HeadScoring, prompt: Prompt) -> dict[str, Any]:
    facts: dict[str, Any] = {"tokens": len(prompt.ids), "span": prompt.span, "response": "", "recall": None}
    if prompt.span is None:
        return facts | {"counts": how.mode == "forced", "set": {}, "steps": {}, "distance": None}
    copies = Copies(anatomy.num_layers, anatomy.num_heads, prompt.span)
    if how.mode == "forced":
        _forced(model, prompt, copies)
        return facts | {"counts": True} | copies.to_dict()
    written = _answer(model, tokenizer, prompt, copies, how.max_new_tokens)
    response = tokenizer.decode(written, skip_special_tokens=True)
    share = recall(prompt.needle.answer, response)
    facts |= {"response": response, "recall": round(share, 4), "counts": share > how.success}
    return facts | copies.to_dict()


def _forced(model: Any, prompt: Prompt, copies: Copies) -> None:
    """The queries that predict the answer, in one forward over prompt and answer."""
    ids = torch.tensor(prompt.ids + prompt.answer[:-1])
    watch = Watch(length=lambda: len(ids), rows=len(prompt.answer), limit=len(prompt.ids))
    with patch(model, watch):
        model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    copies.add(watch.found, ids, torch.tensor(prompt.answer))


def _answer(model: Any, tokenizer: Any, prompt: Prompt, copies: Copies, most: int) -> list[int]:
    """Greedy decoding, one token at a time; a line break or EOS ends it."""
    stops, name, device = stop_ids(model, tokenizer), cache_argument(model), model.device
    ids = torch.tensor(prompt.ids)
    cache = cache_of(model(input_ids=ids[None, :-1].to(device), use_cache=True, logits_to_keep=1))
    written: list[int] = []
    watch = Watch(length=lambda: len(ids))
    with patch(model, watch, phase="decode"):
        for _ in range(most):
            output = model(input_ids=ids[None, -1:].to(device), **{name: cache}, use_cache=True)
            token = output.logits[0, -1].argmax().cpu()
            copies.add(watch.found, ids, token[None])
            if int(token) in stops or (written and "\n" in tokenizer.decode([int(token)])):
                break
            written.append(int(token))
            ids = torch.cat([ids, token[None]])
    return written


# All runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """The runs of a measurement, a line each, written as soon as they are known. The first line says what they are."""

    path: Path
    done: dict[tuple[int, float, int], dict[str, Any]]

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any], resume: bool) -> Runs:
        """What is there of the same measurement. Raises ConfigError for another one's."""
        head = json.loads(json.dumps(about))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume or not path.is_file():
            write_atomically(path, json.dumps(head).encode())
            return cls(path, {})
        lines = list(_parsed(path.read_text(encoding="utf-8")))
        before = lines[0] if lines else {}
        # what is told of the same runs may differ
        for facts in (before, head):
            facts.get("options", {}).pop("count", None)
        if before != head:
            differs = [
                key
                for part in ("model", "options")
                for key in head[part]
                if before.get(part, {}).get(key) != head[part][key]
            ]
            raise ConfigError(
                f"{path} holds another measurement: {', '.join(differs) or 'all'} differ. Give --no-resume "
                "(resume=False) to start anew, or another name for the file."
            )
        return cls(path, {tuple(line.pop("cell")): line for line in lines[1:]})

    def add(self, cell: tuple[int, float, int], run: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # a line that a crash cuts off must not spoil the next one
            file.write("\n" + json.dumps({"cell": cell, **run}, ensure_ascii=False))
        self.done[cell] = run


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            # the line that was being written
            continue


@dataclass(frozen=True)
class HeadTable:
    """Scores of all heads.

    Attributes:
        scores: by "layer-head": a score for each run that counts.
        about: how they were measured, and what is to be said of them.
    """

    scores: dict[str, list[float]]
    about: dict[str, Any]

    @classmethod
    def of(
        cls, runs: Sequence[dict[str, Any]], anatomy: Anatomy, how: HeadScoring, about: Mapping[str, Any]
    ) -> HeadTable:
        counting = [run for run in runs if run["counts"]]
        if not counting:
            raise HFPatchError(
                f"none of {len(runs)} runs found its needle, so there is nothing to score. Try shorter lengths, or "
                "mode=forced, which needs no right answers."
            )
        names = [f"{layer}-{head}" for layer in range(anatomy.num_layers) for head in range(anatomy.num_heads)]
        scores = {name: [run[how.count].get(name, 0.0) for run in counting] for name in names}
        found = [torch.tensor(run["distance"]) for run in counting if run["distance"] is not None]
        distance = torch.stack(found).mean(0) if found else torch.zeros(anatomy.num_layers, anatomy.num_heads)
        facts = {
            "mode": how.mode,
            "count": how.count,
            "runs": len(runs),
            "counting": len(counting),
            "without_span": sum(run["span"] is None for run in runs),
            **summary(scores),
        }
        far = {name: round(float(value), 1) for name, value in zip(names, distance.flatten(), strict=True)}
        return cls(scores, {**about, **facts, "distance": far})

    def write(self, target: Path) -> None:
        model, about = self.about["model"], self.about
        name = Path(model["id"]).name or model["type"]
        title = f"{name} · retrieval scores, mode {about['mode']}, {about['counting']} runs"
        write_atomically(target, (json.dumps(self.scores) + "\n").encode())
        write_atomically(about_path(target), (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
        means = {name: sum(runs) / len(runs) for name, runs in self.scores.items()}
        caption = "Retrieval score of each query head, mean over the runs that count."
        save(heads_chart(target.stem, title, caption, means, "score"), target.parent)


def summary(scores: Mapping[str, Sequence[float]], most: int = 10) -> dict[str, Any]:
    """Shares of heads by mean score, how many are always active, and the strongest ones, `most` of them."""
    means = {name: sum(runs) / max(len(runs), 1) for name, runs in scores.items()}
    count = len(means)
    edges = {"0": (0.0, 0.0), "0-0.1": (0.0, 0.1), "0.1-0.5": (0.1, 0.5), ">=0.5": (0.5, float("inf"))}

    def inside(value: float, name: str) -> bool:
        low, high = edges[name]
        return value == 0 if name == "0" else low <= value < high and value > 0

    strongest = sorted(means, key=lambda name: -means[name])[:most]
    return {
        "heads": count,
        "shares": {name: round(sum(inside(m, name) for m in means.values()) / count, 4) for name in edges},
        "retrieval_heads": sum(m >= RETRIEVAL for m in means.values()),
        "retrieval_share": round(sum(m >= RETRIEVAL for m in means.values()) / count, 4),
        "always_active": sum(bool(runs) and min(runs) > 0 for runs in scores.values()),
        "strongest": {name: round(means[name], 3) for name in strongest},
    }


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _read_needles(path: str) -> tuple[Needle, ...]:
    names = ("sentence", "answer", "question")
    rows = read_rows(path, names)
    if rows.problems:
        raise ConfigError(f"heads score: needles={path!r}: {rows.problems[0]}.")
    return tuple(Needle(*(str(row[name]) for name in names)) for row in rows.rows)
