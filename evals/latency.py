"""Times of prefill and of decode.

Prefill is one forward over the prompt with `logits_to_keep=1`, building the KV cache. Decode is the time per token of
some steps after that prompt, from the same cache contents each time; EOS ends nothing. Compilation and tuning fall into
the first call, which is told apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfpatch.evals.generation import cache_argument, cache_of, synchronize


class SelectionClock:
    """Sums the time in which layers choose their keys, for `PatchHandle.watched`: wall time on a CPU, on a GPU the time
    between two events around the choice, which does not wait for it.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, function: Callable[..., Any], bound: Any, call: Any) -> Any:
        if call.query.is_cuda:
            with torch.cuda.device(call.query.device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                made = function(bound, call)
                end.record()
            self._events.append((begin, end))
            return made
        started = time.perf_counter()
        made = function(bound, call)
        self._seconds = (self._seconds or 0.0) + time.perf_counter() - started
        return made

    def take_ms(self) -> float | None:
        """ms since it was last asked, None if no layer has chosen anything. Waits for the GPU."""
        parts = [] if self._seconds is None else [1e3 * self._seconds]
        for begin, end in self._events:
            end.synchronize()
            parts.append(begin.elapsed_time(end))
        self._seconds, self._events = None, []
        return sum(parts) if parts else None


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> tuple[float, Any, Tensor]:
    """(ms, cache, next token [B, 1]) of one forward over `tokens`, int64 [B, length]."""
    synchronize(tokens.device)
    started = time.perf_counter()
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    synchronize(tokens.device)
    ms = 1e3 * (time.perf_counter() - started)
    return ms, cache_of(output), output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def decode(model: Any, cache: Any, token: Tensor, steps: int) -> float:
    """ms per token of `steps` greedy steps after `cache`, which holds the same tokens afterwards."""
    name = cache_argument(model)
    before = [dict(layer.__dict__) for layer in cache.layers]
    synchronize(token.device)
    started = time.perf_counter()
    for _ in range(steps):
        output = model(input_ids=token, **{name: cache}, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    synchronize(token.device)
    ms = 1e3 * (time.perf_counter() - started) / steps
    # crop() refuses windowed layers; dynamic layers replace their tensors at every step, so the old ones are intact
    for layer, state in zip(cache.layers, before, strict=True):
        layer.__dict__.update(state)
    return ms


def best_dense(model: Any) -> str:
    """The fastest dense attention that can run here: flash > sdpa > eager, under transformers' names."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    if model.device.type == "cuda" and half and getattr(model, "_supports_flash_attn", False):
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            pass
        else:
            return "flash_attention_2"
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def dense_name(model: Any) -> str:
    """What the dense arm runs; a patched model's config keeps it behind the patch's own name."""
    name = model.config.get_text_config(decoder=True)._attn_implementation
    return str(getattr(name, "base", name))


def use_best_dense(model: Any) -> None:
    """Let the model's text part run `best_dense`; the vision part keeps what it has."""
    text, best = model.config.get_text_config(decoder=True), best_dense(model)
    if best not in ("eager", dense_name(model)):
        model.set_attn_implementation(best if text is model.config else {"text_config": best})
