"""Section of `gpu_bench`: prefill of models of published shapes with random weights, dense and under each method.

Weights are drawn, nothing is downloaded: times are those of the shapes, and answers would mean nothing. Language models
keep their full width and a few of their layers, so that all methods fit into the time; the row says how many. Prompts
are runs of 64 equal tokens, since a random text would leave no method anything to leave out.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfpatch.errors import HFPatchError
from hfpatch.evals import arms
from hfpatch.evals.generation import synchronize
from hfpatch.evals.gpu_bench_selection import method_of
from hfpatch.evals.gpu_bench_timing import MB, Clock, Row, Run, Setup, Step, attempt, race, turn_s, with_peak
from hfpatch.evals.latency import SelectionClock, dense_name, use_best_dense
from hfpatch.methods.base import Method
from hfpatch.patch import list_patchers, patch
from hfpatch.shapes import CLIP_L, SHAPES, llava

_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 128, "num_hidden_layers": 3,
}  # fmt: skip
_TINY_CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
_RUN = 64


@dataclass(frozen=True)
class Shape:
    """A model to build: the published sizes, how many of its layers, and how long a prompt.

    Attributes:
        vision: a CLIP tower in front, whose image tokens stand near the start of the prompt.
    """

    name: str
    layers: int
    length: int
    vision: bool = False

    def config(self, toy: bool) -> dict[str, Any]:
        text = SHAPES[self.name][0]
        text = text | (_TINY if toy else {}) | {"num_hidden_layers": self.layers, "tie_word_embeddings": False}
        if not self.vision:
            return text
        return llava(text, CLIP_L | (_TINY_CLIP if toy else {}), self.image_token(toy))

    def image_token(self, toy: bool) -> int:
        return 127 if toy else 32000

    @property
    def published_layers(self) -> int:
        return int(SHAPES[self.name][0]["num_hidden_layers"])


def shapes(setup: Setup) -> list[Shape]:
    """Most important first. A card with less than 30 GB gets part of LLaVA's layers too."""
    if setup.toy:
        return [Shape("llama-3.1-8b", 3, 96), Shape("qwen3-8b", 3, 96), Shape("llava-1.5-7b", 3, 40, vision=True)]
    large = torch.cuda.get_device_properties(setup.device).total_memory > 30e9
    return [
        Shape("llama-3.1-8b", 6, 32768),
        Shape("llava-1.5-7b", 32 if large else 16, 1024, vision=True),
        Shape("qwen3-8b", 6, 32768),
        Shape("llama-3.1-8b", 2, 131072),
    ]


def steps(setup: Setup) -> list[Step]:
    """A step for each shape and method. Methods of images only for models with images."""
    found = []
    for shape in shapes(setup):
        for cls in list_patchers():
            if shape.vision or "image tokens" not in cls.card.needs:
                work = shape.layers * (float(shape.length) ** 2 + 65536.0 * shape.length)
                name = f"{shape.name} {shape.layers} layers {shape.length} {cls.name}"
                found.append(Step(name, partial(measure, setup, shape, cls), work=work))
    return found


@dataclass(frozen=True)
class Built:
    """A model with its prompt; `peak_mb` is what its dense prefill allocates beyond the weights."""

    model: Any
    prompt: dict[str, Tensor]
    peak_mb: float | None
    first_s: float

    def run(self) -> Tensor:
        logits: Tensor = self.model(**self.prompt, use_cache=True, logits_to_keep=1).logits
        return logits


# one at a time
_BUILT: dict[Shape, Built] = {}


def built(setup: Setup, shape: Shape) -> Built:
    """The model of a shape, made once; the one before it is given up first."""
    if shape not in _BUILT:
        _BUILT.clear()
        gc.collect()
        torch.cuda.empty_cache()
        model = build(setup, shape)
        fresh = Built(model, inputs(setup, shape, model), None, 0.0)
        started = time.perf_counter()
        fresh.run()
        synchronize(setup.device)
        first_s = time.perf_counter() - started
        _, peak = with_peak(fresh.run, setup.device)
        _BUILT[shape] = replace(fresh, first_s=first_s, peak_mb=None if setup.toy else peak / MB)
    return _BUILT[shape]


def build(setup: Setup, shape: Shape) -> Any:
    """The model on the device, in eval mode, with the best dense attention that it can have."""
    import transformers

    fields = shape.config(setup.toy)
    config: Any = transformers.AutoConfig.for_model(**fields)
    cls: Any = transformers.AutoModelForImageTextToText if shape.vision else transformers.AutoModelForCausalLM
    # a CPU is slow in half precision
    dtype = setup.pick(gpu=setup.dtype, toy=torch.float32)
    torch.manual_seed(0)
    with setup.device:
        model = cls.from_config(config, dtype=dtype).eval()
    use_best_dense(model)
    return model


def inputs(setup: Setup, shape: Shape, model: Any) -> dict[str, Tensor]:
    """A prompt of runs of equal tokens; an image after the first four."""
    generator, n = setup.generator(), shape.length
    run = setup.pick(gpu=_RUN, toy=8)
    ids = torch.randint(3, 120, (1, math.ceil(n / run)), generator=generator, device=setup.device)
    ids = ids.repeat_interleave(run, 1)[:, :n]
    if not shape.vision:
        return {"input_ids": ids}
    images, size = model.config.image_seq_length, model.config.vision_config.image_size
    ids[:, 4 : 4 + images] = shape.image_token(setup.toy)
    pixels = torch.randn(1, 3, size, size, generator=generator, device=setup.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}


def measure(setup: Setup, shape: Shape, cls: type[Method], clock: Clock) -> Iterator[Row]:
    """One row: prefill under a method and without it, taking turns."""
    row: Row = {"model": shape.name, "layers": shape.layers, "of_layers": shape.published_layers}
    row |= {"length": shape.length, "method": cls.name, "family": cls.card.family}
    try:
        method = method_of(setup, cls)
    except HFPatchError as error:
        yield row | {"error": f"needs options: {error}"}
        return
    row["options"] = str(method)
    made = built(setup, shape)
    row |= {"dense": dense_name(made.model), "dense_peak_mb": made.peak_mb, "dense_first_s": made.first_s}
    try:
        handle = patch(made.model, method)
    except HFPatchError as error:
        yield row | {"error": str(error)}
        return
    with handle:
        yield row | _prefill(setup, handle, made.run, clock)


def _prefill(setup: Setup, handle: Any, run: Run, clock: Clock) -> Row:
    _, error, seconds = attempt(run, setup.device)
    if error is not None:
        return {"error": error}
    handle.reset()
    selection = SelectionClock()
    with handle.watched(selection):
        _, peak = with_peak(run, setup.device)
    report = handle.report()
    row: Row = {"first_s": seconds, "peak_mb": None if setup.toy else peak / MB, "selection_ms": selection.take_ms()}
    row |= {"density": report.density("prefill"), "kernels": arms.kernels_used(report.to_dict(), "prefill")}
    row["actions"] = sorted({layer.action for layer in report.layers if layer.phase == "prefill"})
    row["fallbacks"] = report.fallbacks
    racers = dict.fromkeys((arms.DENSE, arms.PATCHED), run)
    times = race(setup, racers, clock.share(0.05, 4.0), 2, 7, around=partial(arms.running, handle))
    dense, patched = times[arms.DENSE].ms, times[arms.PATCHED].ms
    row |= {"n": len(times[arms.DENSE].device), "dense_ms": dense, "ms": patched, "speedup": dense / patched}
    return row | {"turn_s": turn_s(times)}
