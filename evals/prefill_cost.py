"""What the prefill of a prompt with one image costs, patched against dense: time, FLOPs, KV cache.

Needs no trained model: with `random:llava-1.5-7b` these are the costs of the published shape, see `hfpatch.shapes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.anatomy import examine
from hfpatch.dryrun import forecast
from hfpatch.errors import UnsupportedError
from hfpatch.evals.arms import DENSE, PATCHED, alternated, arm_names, running
from hfpatch.evals.base import Cell, Outcome, Sample, Task, option, register_task
from hfpatch.evals.generation import cache_of, synchronize
from hfpatch.evals.memory import kv_bytes


@dataclass(frozen=True)
class Measured:
    """One forward over the prompt: ms of all of it and of the language model's layers, bytes of the KV cache.

    `layers_cpu_ms`: of all threads of this process in those layers; on a busy machine the steadier number.
    """

    ms: float
    layers_ms: float
    layers_cpu_ms: float
    kv: int

    @classmethod
    def median(cls, several: Sequence[Measured]) -> Measured:
        """Of the times; the cache is the same each time."""
        times = (median(getattr(m, name) for m in several) for name in ("ms", "layers_ms", "layers_cpu_ms"))
        return cls(*times, several[0].kv)

    def scores(self, dense: Measured) -> dict[str, float]:
        """As shares of what dense takes."""
        return {
            "latency": self.layers_ms / dense.layers_ms,
            "latency_whole": self.ms / dense.ms,
            "kv": self.kv / dense.kv,
        }


@register_task
@dataclass(frozen=True, kw_only=True)
class PrefillCost(Task):
    """A sample is the same prefill a few times in either arm, the arms taking turns; scores are shares of dense.

    Times are medians over a sample's turns. `latency` is the time of the language model's layers, patch included, as
    papers on image tokens time it; `latency_whole` also has the vision tower, the projector and the vocabulary. `flops`
    are those of the language model (see `LayerCost.flops`), `kv` the bytes in the cache. `flops_at_depth` and
    `kv_at_depth` are not measured: they are what the method's schedule comes to in a model of the same width with
    `depth` layers.
    """

    name: ClassVar[str] = "prefill_cost"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "time, FLOPs and KV cache of a prompt with an image, as shares of dense; needs no weights"
    metrics: ClassVar[tuple[str, ...]] = (
        "latency",
        "latency_whole",
        "flops",
        "kv",
        "flops_at_depth",
        "kv_at_depth",
    )
    lower_is_better: ClassVar[tuple[str, ...]] = metrics
    paired: ClassVar[bool] = True

    samples: int = option(3, "Samples; the interval of a time is over these.", ge=1)
    turns: int = option(5, "Prefills of either arm in a sample.", ge=1)
    warmup: int = option(2, "Prefills of either arm before the first sample.", ge=0)
    before: int = option(35, "Text tokens before the image; LLaVA-1.5's system prompt has 35.", ge=1)
    after: int = option(29, "Text tokens behind it.", ge=1)
    depth: int | None = option(None, "Layers for which FLOPs and KV cache are forecast; None: the model's own.", ge=1)

    def cells(self) -> list[Cell]:
        return [{}]

    def count(self, cell: Cell) -> int:
        return self.samples

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        """The words; the image's tokens depend on the model."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 200, (self.before + self.after,), generator=generator).tolist()
        for number in range(self.samples):
            yield Sample(number, cell, seed, ids)

    def notes(self) -> list[str]:
        return [
            "prefill_cost: latency is the language model's layers alone; flops_at_depth and kv_at_depth are calculated "
            "from the method's schedule, not measured"
        ]

    def compare(self, model: Any, handle: Any, tokenizer: Any, sample: Sample) -> dict[str, Outcome]:
        inputs = self._inputs(model, sample)
        names = arm_names(handle)
        for _ in range(self.warmup if sample.id == 0 else 0):
            for arm in names:
                with running(handle, arm):
                    measure(model, inputs)
        if handle is not None:
            handle.reset()
        turns: dict[str, list[Measured]] = {arm: [] for arm in names}
        for turn in range(self.turns):
            for arm in alternated(names, turn):
                with running(handle, arm):
                    turns[arm].append(measure(model, inputs))
        found = {arm: Measured.median(each) for arm, each in turns.items()}
        outcomes = {}
        for arm in names:
            scores = found[arm].scores(found[DENSE]) | dict.fromkeys(("flops", "flops_at_depth", "kv_at_depth"), 1.0)
            extra: dict[str, Any] = {
                "layers_ms": found[arm].layers_ms,
                "layers_cpu_ms": found[arm].layers_cpu_ms,
                "kv_bytes": found[arm].kv,
            }
            if arm == PATCHED:
                scores |= self._counted(handle, inputs["input_ids"].shape[1])
            outcomes[arm] = Outcome(finish="length", prefill_ms=found[arm].ms, scores=scores, extra=extra)
        return outcomes

    def _inputs(self, model: Any, sample: Sample) -> dict[str, Tensor]:
        config = model.config
        images, token = getattr(config, "image_seq_length", None), getattr(config, "image_token_id", None)
        size = getattr(getattr(config, "vision_config", None), "image_size", None)
        if not isinstance(images, int) or token is None or not isinstance(size, int):
            raise UnsupportedError(
                "prefill_cost needs a model whose images all have the same number of tokens, as LLaVA-1.5: "
                f"{type(model).__name__} does not say how many (image_seq_length in its config). "
                "Take random:llava-1.5-7b, which needs no download."
            )
        # any token will do that is not the image's
        words = [n % min(model.get_input_embeddings().num_embeddings, max(token, 1)) for n in sample.ids]
        ids = torch.tensor([*words[: self.before], *[token] * images, *words[self.before :]])[None]
        generator = torch.Generator().manual_seed(sample.seed)
        pixels = torch.randn(1, 3, size, size, generator=generator)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
        return {name: tensor.to(model.device) for name, tensor in made.items()}

    def _counted(self, handle: Any, tokens: int) -> dict[str, float]:
        """What image tokens were dropped in the run, and what would be at another depth; nothing if none can be."""
        images = handle.report().images
        if images is None:
            return {}
        anatomy = examine(handle.model)
        methods = [part.method for part in handle.parts]
        depth = self.depth or anatomy.num_layers
        ahead = forecast(anatomy.layer_cost, methods, tokens, anatomy.model.config.image_seq_length, depth)
        return {"flops": images.flops_share, "flops_at_depth": ahead.flops_share, "kv_at_depth": ahead.kv_share}


@torch.no_grad()
def measure(model: Any, inputs: dict[str, Tensor]) -> Measured:
    """One forward with a new cache."""
    device = model.device
    with _layers_timed(model) as layers:
        synchronize(device)
        started = time.perf_counter()
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize(device)
        ms = 1e3 * (time.perf_counter() - started)
    wall, cpu = (1e3 * (stop - start) for start, stop in zip(layers["start"], layers["stop"], strict=True))
    return Measured(ms, wall, cpu, kv_bytes(cache_of(output)))


@contextmanager
def _layers_timed(model: Any) -> Iterator[dict[str, tuple[float, float]]]:
    """Clock readings (wall, CPU) in seconds around the language model, hooks of patches inside."""
    text, read = examine(model).text, dict[str, tuple[float, float]]()

    def look(name: str) -> None:
        synchronize(model.device)
        read[name] = time.perf_counter(), time.process_time()

    hooks = [
        text.register_forward_pre_hook(lambda *args: look("start"), prepend=True),
        text.register_forward_hook(lambda *args: look("stop")),
    ]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
