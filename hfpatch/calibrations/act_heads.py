"""Finds the heads in which calibrating attention sinks helps, for `act`: the method's offline filter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hfpatch.anatomy import examine
from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.methods.act import AttentionCalibration
from hfpatch.methods.base import Method, option
from hfpatch.patch import patch
from hfpatch.recipe import PatchSpec

if TYPE_CHECKING:
    from hfpatch.evals.base import Sample

Head = tuple[int, int]


@dataclass(frozen=True)
class Labelled:
    """A prompt and its right answer, by the first token of an answer.

    Attributes:
        gold: token ids with which the right answer may begin.
        options: those of all answers to choose from; empty where anything may be said.
    """

    ids: list[int]
    gold: frozenset[int]
    options: tuple[frozenset[int], ...] = ()

    def score(self, logits: Tensor) -> tuple[bool, float]:
        """(right, log-probability of the right answer) from the logits after the prompt, [vocabulary]."""
        logs = logits.float().log_softmax(-1)
        if not self.options:
            return int(logs.argmax()) in self.gold, _mass(logs, self.gold)
        masses = [_mass(logs, tokens) for tokens in self.options]
        best = self.options[max(range(len(masses)), key=masses.__getitem__)]
        return best == self.gold, _mass(logs, self.gold) - float(torch.tensor(masses).logsumexp(0))


def _mass(logs: Tensor, tokens: frozenset[int]) -> float:
    return float(logs[sorted(tokens)].logsumexp(0))


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Heads(Calibration):
    """Calibrates one head at a time on labelled prompts, and keeps the heads that are better for it.

    Data: JSON lines {"prompt", "answer", "options"} (`--data`; prompts as the model gets them, options may be missing),
    or evaluation tasks (`task`, for instance "babilong:data=DIR,subtasks=qa6,lengths=0k"). An answer is judged by its
    first token, against the other options, or against the whole vocabulary.

    Cheap, compared with the paper's full scan: of each prompt the states before each layer are kept, so that only later
    layers run again; heads that look little at sinks (`least_mass`) are not run at all; and with `by="logprob"`, a head
    is kept for the mean gain in log-probability of the right answer, which few prompts show (the paper counts right
    answers).

    Source: Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765, and its code, in which the rule by which
    heads are kept is missing.
    """

    patcher: ClassVar[str] = "act"
    name: ClassVar[str] = "heads"
    summary: ClassVar[str] = "the heads in which calibrating sinks helps"
    reads: ClassVar[str] = "files"
    use: ClassVar[str] = "act:head_list={file}"

    task: str | None = option(
        None,
        "evaluation task with its options, in place of data files; several with ' + ' between, as many prompts of each",
    )
    samples: int = option(50, "prompts", ge=1, paper=900)
    by: str = option("logprob", "what must rise", choices=("logprob", "accuracy"), paper="accuracy")
    min_gain: float = option(0.0, "a head is kept if it gains more than this", ge=0)
    top_k: int | None = option(None, "keep this many heads at most, those with the largest gains", ge=1)
    least_mass: float = option(
        0.01,
        "heads are run that have more of their attention on sinks, on average or from the last token",
        ge=0,
        le=1,
        paper=0,
    )
    seed: int = option(0, "of the choice of prompts", ge=0)

    def run(self, work: Work) -> Result:
        method: AttentionCalibration = work.method
        if method.head_list is not None:
            raise ConfigError("act: head_list names the heads already; leave it out to look for them.")
        prompts = self._prompts(work)
        anatomy = examine(work.model)
        free = tuple(n for n in anatomy.attention if n not in anatomy.windows)
        allowed = method.chosen_heads(work.sizes, free) or {}
        if not allowed:
            raise ConfigError("act: skip_first and skip_last leave no layer in which heads could be looked for.")
        work.progress.start(len(prompts), "calibrating single heads")
        gains: dict[Head, list[float]] = {(n, h): [] for n, heads in allowed.items() for h in heads}
        right: dict[Head, list[bool]] = {head: [] for head in gains}
        base: list[tuple[bool, float]] = []
        for number, prompt in enumerate(prompts, 1):
            found = work.once(f"prompt {number}", lambda: scan(work.model, method, prompt, self.least_mass))  # noqa: B023
            base.append((found["right"], found["logprob"]))
            for head in gains:
                # a head that does not look at sinks changes nothing to speak of
                changed = found["heads"].get(f"{head[0]}-{head[1]}", [found["right"], found["logprob"]])
                right[head].append(changed[0])
                gains[head].append(changed[1] - found["logprob"])
            tried = len(found["heads"])
            work.progress.advance(f"prompt {number} of {len(prompts)}, {tried} heads")
        accuracy = sum(hit for hit, _ in base) / len(base)
        rise = {
            head: sum(gains[head]) / len(base) if self.by == "logprob" else sum(right[head]) / len(base) - accuracy
            for head in gains
        }
        kept = sorted((head for head in rise if rise[head] > self.min_gain), key=lambda head: (-rise[head], head))
        kept = sorted(kept[: self.top_k])
        layers: dict[int, list[int]] = {}
        for n, h in kept:
            layers.setdefault(n, []).append(h)
        if not kept:
            raise ConfigError(
                f"act: none of {len(rise)} heads gains more than {self.min_gain:g} on {len(base)} prompts. Lower "
                "min_gain, or give other prompts: calibrating sinks does not help here."
            )
        together = work.once("all kept heads", lambda: _together(work.model, method, layers, prompts))
        every = work.once("all heads", lambda: _together(work.model, method, allowed, prompts))
        card = {
            "prompts": len(base),
            "heads tried": sum(any(x != 0 for x in gains[head]) for head in gains),
            "heads kept": len(kept),
            "by": self.by,
            "accuracy": {
                "dense": round(accuracy, 4),
                "kept heads": together["accuracy"],
                "all heads": every["accuracy"],
            },
            "logprob": {
                "dense": round(sum(x for _, x in base) / len(base), 4),
                "kept heads": together["logprob"],
                "all heads": every["logprob"],
            },
            "note": "accuracy and logprob are those of the prompts that the heads were chosen on",
        }
        listed = {str(layer): heads for layer, heads in layers.items()}
        return Result({"layers": listed, "gains": {f"{n}-{h}": round(x, 6) for (n, h), x in rise.items()}}, card)

    def _prompts(self, work: Work) -> list[Labelled]:
        tokenizer = work.tokenizer
        if self.task is not None:
            return self._of_tasks(work, self.task)
        if not work.files:
            raise DataMissingError(
                'act: the filter needs labelled prompts. Give --data FILE with JSON lines {"prompt": ..., "answer": '
                '..., "options": [...]}, or --set task="babilong:data=DIR,subtasks=qa6".'
            )
        found = [_labelled(tokenizer, row) for file in work.files for row in _rows(file)]
        random.Random(self.seed).shuffle(found)
        return found[: self.samples]

    def _of_tasks(self, work: Work, text: str) -> list[Labelled]:
        """As many prompts of each task, in an order drawn from the seed."""
        specs = text.split(" + ")
        each = [self._of_task(work, spec)[: -(-self.samples // len(specs))] for spec in specs]
        found = [prompt for prompts in each for prompt in prompts]
        random.Random(self.seed).shuffle(found)
        return found[: self.samples]

    def _of_task(self, work: Work, text: str) -> list[Labelled]:
        from hfpatch.evals.base import TASKS

        spec = PatchSpec.parse(text)
        task = TASKS.get(spec.use).from_options(spec.params)
        drawn = [s for cell in task.cells() for s in task.draw(work.tokenizer, cell, self.seed) if s.refused is None]
        if not task.generates() and not all("options" in s.meta for s in drawn):
            raise ConfigError(
                f"act: task {task.name} has no answers that could be right. Take one that generates or chooses."
            )
        random.Random(self.seed).shuffle(drawn)
        return [_of_sample(work.tokenizer, sample) for sample in drawn]


def scan(model: Any, method: AttentionCalibration, prompt: Labelled, least: float = 0.0) -> dict[str, Any]:
    """One prompt with every head calibrated alone that has more than `least` of its attention on sinks.

    Returns:
        right, logprob: without any.
        heads: by "layer-head": the same two.
    """
    anatomy = examine(model)
    record = _Sinks(method=method, least=least)
    with torch.no_grad(), _states(anatomy.decoder_layers) as states, patch(model, record):
        base = prompt.score(_last(model, prompt.ids))
    done: dict[str, tuple[bool, float]] = {}
    for layer, heads in sorted(record.found.items()):
        with torch.no_grad(), _from(anatomy.decoder_layers, layer, states):
            for head in heads:
                with patch(model, replace(method, skip_first=0, skip_last=0), heads={layer: [head]}):
                    done[f"{layer}-{head}"] = prompt.score(_last(model, prompt.ids))
    return {"right": base[0], "logprob": base[1], "heads": done}


@torch.no_grad()
def _together(model: Any, method: AttentionCalibration, heads: Any, prompts: Sequence[Labelled]) -> dict[str, float]:
    """Accuracy and mean log-probability with these heads calibrated at once."""
    with patch(model, replace(method, skip_first=0, skip_last=0), heads=heads):
        found = [prompt.score(_last(model, prompt.ids)) for prompt in prompts]
    return {
        "accuracy": round(sum(hit for hit, _ in found) / len(found), 4),
        "logprob": round(sum(x for _, x in found) / len(found), 4),
    }


def _last(model: Any, ids: list[int]) -> Tensor:
    """Logits after the prompt, [vocabulary]."""
    tokens = torch.tensor([ids], device=model.device)
    return model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sinks(Method):
    """Notes which heads look at sinks, on average or from the last token, and changes nothing."""

    name: ClassVar[str] = "record_sinks"
    card: ClassVar[Any] = AttentionCalibration.card

    method: AttentionCalibration
    least: float
    found: dict[int, list[int]] = field(default_factory=dict)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        layer, last = call.layer_idx, call.num_layers - self.method.skip_last
        if call.sliding_window is None and self.method.skip_first <= layer < last:
            mass = self.method.mass_on_sinks(call, lse)[0]
            heads = (torch.maximum(mass.mean(-1), mass[:, -1]) > self.least).nonzero().flatten().tolist()
            if heads:
                self.found[layer] = heads
        return out


@dataclass
class _States:
    """What enters each layer, and whether layers answer with a tuple."""

    before: dict[int, Tensor] = field(default_factory=dict)
    tuples: bool = False


@contextmanager
def _states(layers: Sequence[nn.Module]) -> Iterator[_States]:
    """States in the forward that runs inside."""
    states = _States()

    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.before[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.tuples = isinstance(output, tuple)

    hooks = [module.register_forward_pre_hook(note(n), with_kwargs=True) for n, module in enumerate(layers)]
    hooks.append(layers[0].register_forward_hook(see))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _from(layers: Sequence[nn.Module], first: int, states: _States) -> Iterator[None]:
    """Inside, layers before `first` do nothing, and what entered it before enters it again."""
    skipped = layers[:first]
    own = [vars(module).get("forward") for module in skipped]

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if states.tuples else hidden_states

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = states.before[first]
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    for module in skipped:
        module.forward = hand_on
    hook = layers[first].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for module, forward in zip(skipped, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


# Data ---------------------------------------------------------------------------------------------------------------


def _rows(file: Path) -> list[dict[str, Any]]:
    from hfpatch.evals.rows import read_rows

    found = read_rows(file, ("prompt", "answer"))
    if found.problems:
        raise ConfigError(f"act: {found.problems[0]}. Rows are {{prompt, answer, options}}.")
    rows: list[dict[str, Any]] = found.rows
    return rows


def _labelled(tokenizer: Any, row: dict[str, Any]) -> Labelled:
    answer, options = str(row["answer"]), [str(one) for one in row.get("options") or ()]
    if options and answer not in options:
        raise ConfigError(f"act: the answer {answer!r} is none of its options: {', '.join(options)}.")
    ids = list(tokenizer(str(row["prompt"]))["input_ids"])
    return Labelled(ids, _starts(tokenizer, answer), tuple(_starts(tokenizer, one) for one in options))


def _of_sample(tokenizer: Any, sample: Sample) -> Labelled:
    gold = sample.gold if isinstance(sample.gold, str) else sample.gold[0]
    options = sample.meta.get("options", ())
    return Labelled(sample.ids, _starts(tokenizer, gold), tuple(_starts(tokenizer, one) for one in options))


def _starts(tokenizer: Any, answer: str) -> frozenset[int]:
    """First tokens of an answer, with and without a space before it, as it is written and with a capital."""
    forms = {space + text for text in (answer, answer[:1].upper() + answer[1:]) for space in ("", " ")}
    return frozenset(tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms if form.strip())
