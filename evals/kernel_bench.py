"""Block-sparse kernels against dense SDPA on random data: is the work that a plan saves also time saved?

Efficiency = dense time × realised density ÷ kernel time: 1.0 means that a kept pair costs what it costs in dense SDPA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, HFPatchError, UnknownNameError
from hfpatch.evals.bench import device_name
from hfpatch.evals.generation import synchronize
from hfpatch.evals.memory import MB, Peak
from hfpatch.kernels import KERNELS, load, reference
from hfpatch.plan import Blocks, Dense, Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# the reference builds [q_len, kv_len] for every head, so correctness is checked at this length at most
_CHECKED_TOKENS = 1024


@torch.no_grad()
def bench_kernels(
    lengths: Sequence[int] = (8192,),
    dtype: str = "bf16",
    q_heads: int = 14,
    kv_heads: int = 2,
    head_dim: int = 64,
    block: int = 128,
    densities: Sequence[float] = (0.1, 0.2, 0.3),
    kernels: Sequence[str] = ("cpu_blocks",),
    lists: str = "kv",
    repeats: int = 10,
    warmup: int = 3,
    device: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per kernel, length and density; dense SDPA and the kernel take turns. Median times in ms.

    Plans hold random blocks with block 0 and the diagonal always in; `lists` says whether each "kv" head (shared by
    its query heads) or each "query" head has its own. A kernel is timed only after it was right on such a plan; one
    that declines has its reason in `refused` and no times. Density 1 is dense attention in the kernel. `extra_mb`
    (2**20 bytes) is the peak of memory in one call beyond inputs, plan and output: resident memory on the CPU, where
    scratch that a thread keeps counts only once.

    Raises:
        HFPatchError: a kernel's result is wrong.
        ConfigError, UnknownNameError: dtype, heads, densities or kernel names that cannot be.
    """
    _check(dtype, q_heads, kv_heads, densities, kernels, lists)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = {
        "dtype": dtype,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "block": block,
        "lists": lists,
        "device": str(place),
        "device_name": device_name(place),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": seed,
    }
    rows = []
    for length in lengths:
        call = _random_call(length, q_heads, kv_heads, head_dim, DTYPES[dtype], place, seed)
        dense_name, dense = _best_dense(call)
        for density in densities:
            plan = _plan(call, density, block, lists, seed)
            for name in kernels:
                row = {"kernel": name, "length": length, "density_asked": density, "density": float(plan.density(call))}
                row |= {"dense": dense_name, "refused": load(name).why_not(call, plan)} | about
                if row["refused"] is None:
                    row |= _check_result(name, call, density, block, lists, seed)
                    row |= {"inner_loop": _inner_loop(name, call, plan), "extra_mb": _extra_mb(name, call, plan)}
                    row |= _race(name, call, plan, dense, row["density"], repeats, warmup)
                rows.append(row)
    return rows


def _inner_loop(name: str, call: AttentionCall, plan: Plan) -> str | None:
    """What computes a kernel that has a choice there."""
    found = getattr(load(name), "inner_loop", None)
    return None if found is None else found(call, plan)


def _extra_mb(name: str, call: AttentionCall, plan: Plan) -> float:
    kernel = load(name)
    with Peak(call.query.device) as peak:
        out, lse = kernel.run(call, plan)
    returned = sum(x.numel() * x.element_size() for x in (out, lse) if x is not None)
    return max(peak.bytes - returned, 0) / MB


def _plan(call: AttentionCall, density: float, block: int, lists: str, seed: int) -> Plan:
    """Random blocks; for density 1 dense attention, as the patcher that leaves nothing out asks for it."""
    heads = call.query.shape[1] if lists == "query" else call.key.shape[1]
    return Dense(fastest=True) if density == 1 else random_blocks(call, density, block, seed, heads)


def random_blocks(call: AttentionCall, density: float, block: int, seed: int, heads: int | None = None) -> Blocks:
    """A plan that keeps about `density` of the causal pairs: block 0, the diagonal, and random blocks between.

    `heads` lists; by default one for each KV head.
    """
    generator = torch.Generator().manual_seed(seed)
    number, heads = -(-call.kv_len // block), heads or call.key.shape[1]
    counts, owed = [], 0.0
    for row in range(number):
        # in units of whole blocks; the diagonal one is half seen
        owed += density * (row + 0.5)
        off_diagonal = min(max(round(owed - 0.5), min(row, 1)), row)
        owed -= off_diagonal + 0.5
        counts.append(off_diagonal + 1)
    index = torch.zeros(1, heads, number, max(counts), dtype=torch.int32)
    for head in range(heads):
        for row, count in enumerate(counts):
            between = (torch.randperm(max(row - 1, 0), generator=generator) + 1)[: max(count - 2, 0)]
            listed = {0, row, *between.tolist()}
            index[0, head, row, :count] = torch.tensor(sorted(listed), dtype=torch.int32)
    lengths = torch.tensor(counts, dtype=torch.int32).expand(1, heads, -1).contiguous()
    device = call.query.device
    return Blocks(index.to(device), lengths.to(device), block, block)


def _random_call(
    length: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, length, head_dim, generator=generator).to(device, dtype)
        for heads in (q_heads, kv_heads, kv_heads)
    )
    return AttentionCall(q, k, v, scaling=head_dim**-0.5)


def _best_dense(call: AttentionCall) -> tuple[str, Callable[[], Any]]:
    """The faster of SDPA's own head sharing and of repeated keys and values (repeated beforehand)."""
    groups = call.num_key_value_groups
    k, v = (x.repeat_interleave(groups, 1) for x in (call.key, call.value))
    q, scale = call.query, call.scaling
    candidates: dict[str, Callable[[], Any]] = {
        "sdpa, repeated KV": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),
        "sdpa, enable_gqa": lambda: F.scaled_dot_product_attention(
            q, call.key, call.value, is_causal=True, scale=scale, enable_gqa=True
        ),
    }
    times = {name: min(_ms(run, q.device) for _ in range(3)) for name, run in candidates.items()}
    best = min(times, key=lambda name: times[name])
    return best, candidates[best]


def _race(
    name: str,
    call: AttentionCall,
    plan: Plan,
    dense: Callable[[], Any],
    density: float,
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    kernel = load(name)
    times: dict[str, list[float]] = {"dense": [], "kernel": []}
    racers: dict[str, Callable[[], Any]] = {"dense": dense, "kernel": lambda: kernel.run(call, plan)}
    for turn in range(warmup + repeats):
        for racer in racers if turn % 2 == 0 else reversed(racers):
            ms = _ms(racers[racer], call.query.device)
            if turn >= warmup:
                times[racer].append(ms)
    medians = {racer: statistics.median(found) for racer, found in times.items()}
    return {
        "n": repeats,
        "dense_ms": medians["dense"],
        "kernel_ms": medians["kernel"],
        "dense_iqr_ms": _iqr(times["dense"]),
        "kernel_iqr_ms": _iqr(times["kernel"]),
        "speedup": medians["dense"] / medians["kernel"],
        "efficiency": medians["dense"] * density / medians["kernel"],
    }


def _ms(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _iqr(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def _check_result(
    name: str, call: AttentionCall, density: float, block: int, lists: str, seed: int
) -> dict[str, float]:
    """Error against fp32, at most twice that of plain attention in the same dtype; else HFPatchError."""
    length = min(call.kv_len, _CHECKED_TOKENS + 37)
    heads, kv_heads, head_dim = call.query.shape[1], call.key.shape[1], call.query.shape[-1]
    small = _random_call(length, heads, kv_heads, head_dim, call.query.dtype, call.query.device, seed)
    plan = _plan(small, density, min(block, length), lists, seed)
    got: Tensor = load(name).run(small, plan)[0].float()
    exact = reference.run(small.to(torch.float32), plan)[0]
    eager = reference.run(small, plan, compute_dtype=call.query.dtype)[0].float()
    error, allowed = float((got - exact).abs().max()), 2 * float((eager - exact).abs().max()) + 1e-5
    if not error <= allowed:
        raise HFPatchError(
            f"kernel {name} is wrong at {length} tokens, so it is not timed: error {error:.1e}, allowed {allowed:.1e} "
            "(twice that of plain attention). Use another kernel and report this with the output of `hfpatch doctor`."
        )
    return {"error": error, "error_allowed": allowed}


def _check(
    dtype: str, q_heads: int, kv_heads: int, densities: Sequence[float], kernels: Sequence[str], lists: str
) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of: {', '.join(DTYPES)}.")
    if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
        raise ConfigError(f"q_heads={q_heads} is no multiple of kv_heads={kv_heads}.")
    if lists not in ("kv", "query"):
        raise ConfigError(f"lists={lists!r}: a list of blocks belongs to each kv head or to each query head.")
    if wrong := [d for d in densities if not 0 < d <= 1]:
        raise ConfigError(f"density {wrong[0]} is outside (0, 1]: it is the fraction of the causal pairs that is kept.")
    if unknown := [name for name in kernels if name not in KERNELS]:
        raise UnknownNameError(f"unknown kernel {unknown[0]!r}. Available: {', '.join(KERNELS)}.")
