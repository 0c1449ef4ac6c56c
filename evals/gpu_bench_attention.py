"""Sections of `gpu_bench`: block-sparse prefill against the best dense kernel and flex_attention; decoding.

Efficiency = dense time x realised density / kernel time: 1.0 means that a kept pair costs what it costs in the best
dense kernel. 32 query heads, 8 KV heads and head_dim 128 are those of Llama-3.1-8B and Qwen3-8B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfpatch import kernels
from hfpatch.call import AttentionCall
from hfpatch.evals.gpu_bench_correct import compare
from hfpatch.evals.gpu_bench_rivals import best_dense, flex_run
from hfpatch.evals.gpu_bench_timing import Clock, Row, Run, Setup, Step, Times, attempt, memory_row, race, turn_s
from hfpatch.evals.kernel_bench import random_blocks
from hfpatch.kernels import flash, reference, triton_blocks, triton_decode
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window
from hfpatch.selection import compress, grid_of

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
FLEX_DENSITIES = (1.0, 0.25, 0.1)
_BLOCK = 128


@dataclass(frozen=True)
class Racer:
    """A kernel with a plan: what is timed against dense attention."""

    kernel: str
    label: str
    plan: Plan
    run: Run
    asked: float | None = None


# Calls and plans ------------------------------------------------------------------------------------------------------


def heads_of(setup: Setup) -> tuple[int, int, int]:
    """(query heads, KV heads, head_dim)."""
    return (4, 2, 64) if setup.toy else (32, 8, 128)


def random_call(setup: Setup, kv_len: int, q_len: int | None = None) -> AttentionCall:
    """Normal q, k, v, in the layout that a projection leaves."""
    heads, kv_heads, dim = heads_of(setup)
    generator = setup.generator()
    q, k, v = (
        torch.randn(1, n, h, dim, generator=generator, device=setup.device, dtype=setup.dtype).transpose(1, 2)
        for n, h in ((q_len or kv_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    )
    return AttentionCall(q, k, v, scaling=dim**-0.5, phase="decode" if q_len == 1 else "prefill")


def with_columns(call: AttentionCall, density: float, columns: int, block: int) -> Blocks:
    """Random blocks, and `columns` random keys outside them, for each KV head."""
    grid, generator = grid_of(call, block, block), torch.Generator(call.query.device).manual_seed(1)
    heads, device = call.key.shape[1], call.query.device
    keep = torch.rand(1, heads, *grid.causal.shape, generator=generator, device=device) < density
    chosen = torch.rand(1, heads, call.kv_len, generator=generator, device=device).argsort(-1) < columns
    return grid.plan(keep, chosen, columns)


def pages(call: AttentionCall, density: float, block: int) -> Blocks:
    """One list of random pages for each KV head, the first and the last one in it."""
    heads, device = call.key.shape[1], call.query.device
    number = call.kv_len // block
    order = torch.rand(heads, number, generator=torch.Generator(device).manual_seed(2), device=device)
    order[:, 0] = order[:, -1] = -1.0
    count = max(round(density * number), 2)
    keep = order.argsort(-1).argsort(-1) < count
    index, counts = compress(keep[None, :, None])
    return Blocks(index[..., :count].contiguous(), counts, 1, block)


# Races ----------------------------------------------------------------------------------------------------------------


def compete(setup: Setup, call: AttentionCall, racers: list[Racer], clock: Clock, **about: Any) -> Iterator[Row]:
    """Time racers against the best dense kernel. One row about that, then one for each racer."""
    dense_name, dense, row = best_dense(setup, call)
    about |= {"length": call.kv_len}
    yield {"kernel": "dense", **about, **row}
    if dense_name is None:
        return
    runs: dict[str, Run] = {"dense": dense}
    rows: dict[str, Row] = {}
    for number, racer in enumerate(racers):
        result, error, seconds = attempt(racer.run, call.query.device)
        row = {"kernel": racer.kernel, "plan": racer.label, **about, "density_asked": racer.asked, "dense": dense_name}
        if error is not None or result is None:
            yield {**row, "error": error}
            continue
        row |= {"first_call_s": seconds, "density": float(racer.plan.density(call))}
        row |= spot_check(call, racer.plan, result) | memory_row(racer.run, call)
        rows[f"{number}"], runs[f"{number}"] = row, racer.run
        del result
    times = race(setup, runs, clock.share(0.3, 12.0))
    for key, row in rows.items():
        yield row | speed(call, times["dense"], times[key], row["density"]) | {"turn_s": turn_s(times)}


def speed(call: AttentionCall, dense: Times, own: Times, density: float) -> Row:
    """Times, ratios, and rates: TFLOP/s of kept pairs, GB/s of kept keys and values."""
    batch, heads, q_len, dim = call.query.shape
    pairs = density * (q_len * call.q_offset + q_len * (q_len + 1) / 2)
    read = density * 2 * call.key.numel() * call.key.element_size()
    return {
        "n": len(own.device),
        "dense_ms": dense.ms,
        "ms": own.ms,
        "host_ms": own.host_ms,
        "speedup": dense.ms / own.ms,
        "efficiency": dense.ms * density / own.ms,
        "tflops": 4e-9 * batch * heads * dim * pairs / own.ms,
        "gb_s": 1e-6 * read / own.ms if q_len == 1 else None,
    }


def spot_check(call: AttentionCall, plan: Plan, result: Any) -> Row:
    """Errors of the last queries in the first and in the last KV head, where addresses are largest; `wrong` if any."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    groups, row = call.num_key_value_groups, Row()
    for head in (0, call.key.shape[1] - 1):
        queries, of_head = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
        last, part = _last_queries(call, plan, head)
        small = replace(
            call, query=call.query[:, queries, -last:], key=call.key[:, of_head], value=call.value[:, of_head]
        )
        exact = reference.run(small.to(torch.float32), part)
        eager = reference.run(small, part, compute_dtype=call.query.dtype)
        got_lse = None if lse is None else lse[:, queries, -last:]
        found = compare((out[:, queries, -last:], got_lse), eager, exact)
        if "wrong" in found or found["error"] > row.get("error", -1.0):
            row = found
        if "wrong" in row:
            break
    return row


def _last_queries(call: AttentionCall, plan: Plan, head: int) -> tuple[int, Plan]:
    """How many queries to look at, and the plan for these in one KV head."""
    if isinstance(plan, Blocks):
        per_kv = plan.blk_idx.shape[1] // call.key.shape[1]
        lists = slice(head * per_kv, (head + 1) * per_kv) if per_kv else slice(None)
        cut: Callable[[Tensor | None], Any] = lambda x: None if x is None else x[:, lists, -1:]
        part = replace(
            plan, **{name: cut(getattr(plan, name)) for name in ("blk_idx", "blk_cnt", "col_idx", "col_cnt")}
        )
        return (call.q_len - 1) % plan.block_q + 1, part
    if isinstance(plan, Permuted) and plan.order.shape[0] > 1:
        plan = replace(plan, order=plan.order[head : head + 1])
    return min(call.q_len, _BLOCK), plan


# Prefill --------------------------------------------------------------------------------------------------------------


def throughput_steps(setup: Setup) -> list[Step]:
    """Block lists per KV head at all lengths; then other plans; then flex_attention with equal block masks."""
    lengths = setup.pick(gpu=(8192, 16384, 32768, 65536, 131072), toy=(64, 96))
    found = [_step(setup, "blocks", n, _lists) for n in lengths]
    found.append(_step(setup, "plans", setup.pick(gpu=32768, toy=64), _plans, extra=10.0))
    flex = setup.pick(gpu=(32768, 8192, 131072), toy=(64,))
    return found + [_step(setup, "flex", n, _flex_and_ours, extra=30.0) for n in flex]


def _step(setup: Setup, name: str, n: int, racers: Callable[[Setup, AttentionCall], list[Racer]], **rest: Any) -> Step:
    def run(clock: Clock) -> Iterator[Row]:
        call = random_call(setup, n)
        return compete(setup, call, racers(setup, call), clock)

    return Step(f"{name} {n}", run, work=float(n) ** 2, **rest)


def _triton(call: AttentionCall, label: str, plan: Plan, asked: float | None = None) -> Racer:
    def run() -> Any:
        if (reason := triton_blocks.why_not(call, plan)) is not None:
            raise RuntimeError(f"refused: {reason}")
        return triton_blocks.run(call, plan)

    return Racer("triton_blocks", label, plan, run, asked)


def _lists(setup: Setup, call: AttentionCall) -> list[Racer]:
    block = setup.pick(gpu=_BLOCK, toy=16)
    label = f"blocks of {block}, list per KV head"
    densities = setup.pick(gpu=DENSITIES, toy=(1.0, 0.25))
    racers = [_triton(call, "dense", Dense())]
    return racers + [_triton(call, label, random_blocks(call, d, block, 0), d) for d in densities]


def _plans(setup: Setup, call: AttentionCall) -> list[Racer]:
    """What else methods ask for, about a tenth kept."""
    n, keep = call.kv_len, 0.1
    big, small = setup.pick(gpu=(128, 64), toy=(32, 16))
    window, columns = n // 20, n // 64
    order = torch.randperm(n, generator=setup.generator(), device=setup.device)[None]
    heads = call.query.shape[1]
    racers = [
        _triton(call, f"blocks of {small}, list per KV head", random_blocks(call, keep, small, 0), keep),
        _triton(call, f"blocks of {big}, list per query head", random_blocks(call, keep, big, 0, heads), keep),
        _triton(call, f"blocks of {small}, list per query head", random_blocks(call, keep, small, 0, heads), keep),
        _triton(call, f"blocks of {big} and {columns} columns", with_columns(call, keep / 2, columns, big)),
        _triton(call, f"window of {window}", Window(0, window)),
        _triton(call, f"window of {window} and sink tokens", Window(4, window)),
        _triton(call, "permuted band, local window", Permuted(order, window // 2, window // 2, local=n // 64, sink=4)),
        _triton(call, "permuted band, circular", Permuted(order, window // 2, window // 2, circular=True)),
    ]
    if flash.why_not(call, plan := Window(0, window)) is None:
        racers.append(Racer("flash-attn", f"window of {window}", plan, lambda: flash.run(call, plan)))
    return racers


def _flex_and_ours(setup: Setup, call: AttentionCall) -> list[Racer]:
    block = setup.pick(gpu=_BLOCK, toy=16)
    racers = []
    for density in setup.pick(gpu=FLEX_DENSITIES, toy=(0.25,)):
        plan = random_blocks(call, density, block, 0)
        racers.append(_triton(call, f"blocks of {block}, list per KV head", plan, density))
        run = flex_run(call, plan, compiled=not setup.toy)
        racers.append(Racer("flex_attention", f"blocks of {block}, list per KV head", plan, run, density))
    return racers


# Decoding -------------------------------------------------------------------------------------------------------------


def decode_steps(setup: Setup) -> list[Step]:
    def run(n: int, clock: Clock) -> Iterator[Row]:
        call = random_call(setup, n, 1)
        return compete(setup, call, _decoders(call), clock)

    lengths = setup.pick(gpu=(8192, 32768, 131072), toy=(530,))
    return [Step(f"decode {n}", partial(run, n), work=n) for n in lengths]


def _decoders(call: AttentionCall) -> list[Racer]:
    def racer(label: str, plan: Plan, asked: float | None = None) -> Racer:
        def run() -> Any:
            if (reason := triton_decode.why_not(call, plan)) is not None:
                raise RuntimeError(f"refused: {reason}")
            return triton_decode.run(call, plan)

        return Racer("triton_decode", label, plan, run, asked)

    window = call.kv_len // 16
    plans = [(f"pages of {block}", pages(call, d, block), d) for block in (16, 64) for d in DENSITIES[2:]]
    racers = [racer("dense", Dense()), racer(f"window of {window}", Window(4, window))]
    auto = kernels.choose(call, Dense())
    racers.append(Racer(auto.name, "dense, as hfpatch chooses", Dense(), lambda: auto.run(call, Dense())))
    return racers + [racer(*entry) for entry in plans]
