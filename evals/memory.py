"""Bytes of weights and KV cache, and peaks: exact on CUDA, elsewhere from resident memory and so approximate."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from hfpatch.evals.latency import decode, prefill

MB = 1024**2
# what a cache layer holds; short ones only where heads have forgotten, see hfpatch.eviction
_STORED = ("keys", "values", "short_keys", "short_values")


def weight_bytes(model: Any) -> int:
    """Parameters and buffers, shared storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kv_bytes(cache: Any) -> int:
    """Keys and values of all layers, as they are stored now."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in _STORED]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class Peak:
    """`with Peak(device) as peak:` then `peak.bytes`: the most memory used inside, above what was used before it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.bytes = 0

    def __enter__(self) -> Self:
        gc.collect()
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
            return self
        # freed memory that the C library holds back would hide what is allocated next
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *exc: object) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            self.bytes = torch.cuda.max_memory_allocated(self._cuda) - self._before
            return
        self._stop.set()
        self._sampler.join()
        self.bytes = max(self._highest, self._process.memory_info().rss) - self._before


def measure(model: Any, tokens: Tensor, steps: int) -> dict[str, float]:
    """Megabytes (2**20 bytes). Peaks are totals: the weights, and what prefill, or the KV cache and decode, add.

    Run the same shapes once before, so that no first call is measured. A method that evicts keys after the prefill
    lowers `kv_mb` and the decode peak; the prefill peak stays.
    """
    weights = weight_bytes(model)
    with Peak(tokens.device) as first:
        _, cache, token = prefill(model, tokens)
    kv = kv_bytes(cache)
    with Peak(tokens.device) as second:
        decode(model, cache, token, steps)
    return {
        "weights_mb": weights / MB,
        "kv_mb": kv / MB,
        "peak_prefill_mb": (weights + first.bytes) / MB,
        "peak_decode_mb": (weights + kv + second.bytes) / MB,
    }
