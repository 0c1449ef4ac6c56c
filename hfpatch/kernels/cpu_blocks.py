"""Sparse plans on the CPU: one task is one tile of queries of the query heads that share a list of keys.

The listed keys are gathered, and attention over them is two dense matmuls with the softmax between them in the cache of
one core. `cpu_compiled` does that in one pass where a compiler and the CPU allow it, else `cpu_torch` with torch's
matmuls. Tasks go to a small pool of threads that run torch with one thread each; many small parallel regions inside the
matmuls would become very slow as soon as anything else used the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.kernels import cpu_compiled, cpu_torch, merge, sdpa
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window

# Longer dense prompts are as fast per pair as this, and the race should stay short.
_RACED_TOKENS = 4096


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    if call.query.device.type != "cpu":
        return "for tensors on the CPU"
    if isinstance(plan, Dense) and not plan.fastest:
        return "for sparse plans"
    if call.mask is not None and (call.mask.ndim == 4 or not isinstance(plan, Blocks)):
        return "takes padding masks with block lists only, and no 4-D masks"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value)):
        return "forward only, and gradients were asked for"
    if isinstance(plan, Dense) and not _beats_sdpa(call):
        return "torch's SDPA is faster for dense attention of this shape on this machine (measured)"
    return None


def _beats_sdpa(call: AttentionCall) -> bool:
    """Whether dense attention is faster here than in SDPA; raced once per shape, on random data."""
    if call.softcap is not None or call.sinks is not None:
        # SDPA has neither, so that the model's own attention is the slow eager one
        return True
    tokens = min(1 << (call.q_len.bit_length() - 1), _RACED_TOKENS)
    heads, kv_heads, dim = call.query.shape[1], call.key.shape[1], call.query.shape[-1]
    return _race(tokens, heads, kv_heads, dim, call.query.dtype, torch.get_num_threads())


@lru_cache(maxsize=64)
def _race(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, threads: int) -> bool:
    """`threads` is part of the key only: the race runs with as many as torch has now."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, tokens, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)
    )
    call = AttentionCall(query, key, value, scaling=dim**-0.5)
    racers: dict[str, Callable[[], object]] = {
        "sdpa": lambda: sdpa.run(call, Dense()),
        "ours": lambda: run(call, Dense(fastest=True)),
    }
    times = dict.fromkeys(racers, float("inf"))
    with torch.no_grad():
        for _ in range(3):
            for name, racer in racers.items():
                start = time.perf_counter()
                racer()
                times[name] = min(times[name], time.perf_counter() - start)
    return times["ours"] < times["sdpa"]


def run(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """(out [B, Hq, q_len, head_dim], LSE fp32 [B, Hq, q_len], or None unless `call.need_lse`)."""
    if isinstance(plan, Permuted) and plan.nearest():
        # joined by their LSE: the slot window, then local window and sinks in the original order
        far, far_lse = _run(replace(call, need_lse=True, sinks=None), plan)
        near, near_lse = _run(replace(call, need_lse=True), Window(plan.sink, plan.nearest()))
        assert far_lse is not None and near_lse is not None
        return merge(far, far_lse, near, near_lse)
    return _run(call, Window(0, call.kv_len) if isinstance(plan, Dense) else plan)


def inner_loop(call: AttentionCall, plan: Plan) -> str:
    """What computes the tasks: `compiled`, or `torch: ` and why."""
    refused = cpu_compiled.why_not(call, plan)
    return f"torch: {refused}" if refused else "compiled"


def _run(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor | None]:
    batch, heads, q_len, _ = call.query.shape
    # stored as [B, q_len, Hq, head_dim], which is what transformers wants back
    out = torch.empty(batch, q_len, heads, call.value.shape[-1], dtype=call.query.dtype).transpose(1, 2)
    lse = torch.empty(call.query.shape[:-1]) if call.need_lse else None
    kernel = cpu_torch if cpu_compiled.why_not(call, plan) else cpu_compiled
    kernel.run(call, plan, out, lse, _in_threads)
    return out, lse


def _in_threads(work: Callable[[], object], tasks: int) -> None:
    """Call `work`, which takes tasks until none is left, from as many threads as torch may use, and wait."""
    threads = torch.get_num_threads()
    if (workers := min(threads, tasks)) <= 1:
        work()
        return
    pool = _pool(threads)
    # MKL's thread count is global; the workers must not start threads of their own
    torch.set_num_threads(1)
    try:
        futures = [pool.submit(work) for _ in range(workers)]
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hfpatch-cpu", initializer=torch.set_num_threads, initargs=(1,))


# a forked child has none of the parent's threads
os.register_at_fork(after_in_child=_pool.cache_clear)
