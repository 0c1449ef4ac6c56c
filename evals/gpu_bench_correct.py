"""Section of `gpu_bench`: every GPU kernel against the fp32 reference, its error beside eager attention's.

The rule is FlashAttention's: at most twice the error of eager attention in the same dtype, both against fp32. Rows that
see nothing must be 0 with log-sum-exp -inf. Behind the last key of every cache, and in the memory that a kernel gets
for its result, lie NaNs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfpatch import kernels
from hfpatch.call import AttentionCall
from hfpatch.evals.gpu_bench_timing import Row, Setup, Step, attempt
from hfpatch.kernels import column_sums, reference
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window, visible
from hfpatch.selection import compress

KERNELS = ("flash", "triton_decode", "triton_blocks")
# stands in list entries past the count, which no kernel may look at
_GARBAGE = 1 << 28
_BEHIND = 32


@dataclass(frozen=True)
class Case:
    """A call and a plan, or for column sums the rows; `every_dtype`: not only in the first one."""

    name: str
    call: dict[str, Any]
    plan: Callable[[AttentionCall], Plan] | None = None
    rows: slice | None = None
    every_dtype: bool = False


def steps(setup: Setup) -> list[Step]:
    """A step for each dtype and case."""
    found = []
    for dtype in setup.dtypes:
        for case in cases(setup):
            if case.every_dtype or dtype == setup.dtype:
                run = lambda clock, case=case, dtype=dtype: check(setup, case, dtype)
                found.append(Step(f"{case.name} {str(dtype).removeprefix('torch.')}", run, extra=1.0))
    return found


def cases(setup: Setup) -> list[Case]:
    """All plan kinds with everything that a call can have; tiles of all head_dims."""
    n, b = setup.pick(gpu=(1337, 64), toy=(52, 16))
    few, fewer = setup.pick(gpu=(9000, 4000), toy=(530, 90))
    chunk = {"q_len": n // 3, "kv_len": n}
    one, sixteen = {"q_len": 1, "kv_len": few}, {"q_len": 16, "kv_len": fewer}
    everything: dict[str, Any] = {"batch": 2, "padded": True, "sinks": True, "softcap": 4.0}
    pages = lambda call: blocks(call, call.key.shape[1], call.q_len, 16)
    return [
        Case("dense", {"q_len": n, "head_dim": 64}, lambda c: Dense(), every_dtype=True),
        Case("dense, one KV head", {"q_len": n, "kv_heads": 1}, lambda c: Dense()),
        Case("dense, KV head each", {"q_len": n, "heads": 4, "kv_heads": 4, "head_dim": 80}, lambda c: Dense()),
        Case("dense, padded, sinks, softcap", {"q_len": n, **everything}, lambda c: Dense(), every_dtype=True),
        Case("dense, softcap 50", {"q_len": n, "softcap": 50.0, "head_dim": 256}, lambda c: Dense()),
        Case("dense, chunk", chunk, lambda c: Dense(), every_dtype=True),
        Case("window", {"q_len": n}, lambda c: Window(0, n // 4), every_dtype=True),
        Case("window and sink tokens, chunk", {**chunk, "head_dim": 96}, lambda c: Window(4, n // 4)),
        Case("window, sinks, softcap", {"q_len": n, "softcap": 4.0, "sinks": True}, lambda c: Window(b + 3, b - 1)),
        Case("window, nothing", {"q_len": b}, lambda c: Window(0, 0)),
        Case("blocks, one list", {"q_len": n}, lambda c: blocks(c, 1, b, b)),
        Case("blocks, per KV head", {"q_len": n}, lambda c: blocks(c, 2, 2 * b, b), every_dtype=True),
        Case("blocks, per query head", {"q_len": n, "head_dim": 64}, lambda c: blocks(c, 8, b, 2 * b)),
        Case("blocks of 16, chunk", {**chunk, "head_dim": 256}, lambda c: blocks(c, 2, 16, 16), every_dtype=True),
        Case("blocks of 128", {"q_len": n}, lambda c: blocks(c, 2, 128, 128)),
        Case("blocks, all of them", {"q_len": n}, lambda c: blocks(c, 2, b, b, keep=1.0)),
        Case("blocks, padded", {"q_len": n, "batch": 2, "padded": True}, lambda c: blocks(c, 2, b, b, batch=2)),
        Case(
            "blocks and columns, empty rows",
            {"q_len": n},
            lambda c: blocks(c, 2, b, b, columns=True, empty=True),
            every_dtype=True,
        ),
        Case("columns, per query head", {"q_len": n, "head_dim": 96}, lambda c: blocks(c, 8, b, b, columns=True)),
        Case(
            "blocks, columns, everything",
            {**chunk, **everything},
            lambda c: blocks(c, 2, b, b, batch=2, columns=True),
            every_dtype=True,
        ),
        Case("permuted", {"q_len": n}, lambda c: permuted(c, 1, b, b), every_dtype=True),
        Case("permuted, local, sink tokens", {"q_len": n}, lambda c: permuted(c, 2, b, 5, local=b, sink=4)),
        Case("permuted, circular", {"q_len": n, "head_dim": 64}, lambda c: permuted(c, 2, 7, b, circular=True)),
        Case(
            "permuted, chunk, batch, sinks, softcap",
            {**chunk, "batch": 2, "sinks": True, "softcap": 4.0},
            lambda c: permuted(c, 2, b, b, local=b // 2, sink=2),
            every_dtype=True,
        ),
        Case("decode, dense", one, lambda c: Dense(), every_dtype=True),
        Case("decode, window", {**one, "head_dim": 80}, lambda c: Window(4, few // 2)),
        Case("decode, pages", one, pages, every_dtype=True),
        Case("decode, pages per query head", {**one, "head_dim": 64}, lambda c: blocks(c, 8, 1, 64, columns=True)),
        Case("decode, columns", {**one, "head_dim": 256}, lambda c: blocks(c, 2, 1, 16, columns=True, keep=0.0)),
        Case("16 queries, one KV head", {**sixteen, "kv_heads": 1}, lambda c: Dense()),
        Case("16 queries, pages", sixteen, pages),
        Case(
            "16 queries, everything",
            {**sixteen, **everything},
            lambda c: blocks(c, 2, 16, 16, batch=2, columns=True),
            every_dtype=True,
        ),
        Case("column sums", {"q_len": n}, every_dtype=True),
        Case("column sums, chunk, every 7th row", {**chunk, "head_dim": 64}, rows=slice(3, None, 7)),
        Case("column sums, last rows", {"q_len": n, "head_dim": 256}, rows=slice(-b, None)),
        Case("column sums, padded, softcap", {"q_len": n, **everything}, every_dtype=True),
    ]


def check(setup: Setup, case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """A row for each kernel that takes the case."""
    call = make_call(setup, dtype, **case.call)
    row: Row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "head_dim": call.query.shape[-1]}
    if case.plan is None:
        yield {**row, "kernel": "triton_columns"} | _check_columns(call, case.rows or slice(None))
        return
    plan = case.plan(call)
    exact = reference.run(call.to(torch.float32), plan)
    eager = reference.run(call, plan, compute_dtype=dtype)
    for name in KERNELS:
        kernel = kernels.load(name)
        if (reason := kernel.why_not(call, plan)) is not None:
            # a case of few queries is for the decoding kernel, one of many is not
            if name == "triton_decode" if call.q_len <= kernels.FEW_QUERIES else name == "triton_blocks":
                yield {**row, "kernel": name, "refused": reason}
            continue
        poison(eager)
        got, error, _ = attempt(lambda kernel=kernel: kernel.run(call, plan), setup.device)
        yield {**row, "kernel": name} | ({"wrong": error} if got is None else compare(got, eager, exact))


def _check_columns(call: AttentionCall, rows: slice) -> Row:
    if (reason := column_sums.why_not(call)) is not None:
        return {"refused": reason}
    lse = reference.run(call.to(torch.float32), Dense())[1][:, :, rows]
    lse = lse.masked_fill(lse.isneginf(), float("inf"))
    exact, eager = _received(call.to(torch.float32), lse, rows), _received(call, lse, rows)
    poison((exact,))
    got, error, _ = attempt(lambda: column_sums.run(call, lse, rows), call.query.device)
    return {"wrong": error} if got is None else _error("", got, eager, exact)


def _received(call: AttentionCall, lse: Tensor, rows: slice) -> Tensor:
    """Attention that each key receives: fp32 [B, Hq, kv_len], from a matrix of scores in the call's dtype."""
    keys = call.key.repeat_interleave(call.num_key_value_groups, 1)
    scores = call.query @ keys.mT * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.float().masked_fill(~visible(call, Dense()), float("-inf"))
    return (scores[:, :, rows] - lse[..., None]).exp().sum(2)


def poison(like: tuple[Tensor, ...]) -> None:
    """Leave NaNs in memory that the allocator gives out next, so that what a kernel forgets to write shows."""
    for x in like:
        torch.full_like(x, float("nan"))


def compare(got: tuple[Tensor, Tensor | None], eager: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Row:
    """Largest errors of (out, LSE), eager's, the allowed one, and what is wrong."""
    (out, lse), (exact_out, exact_lse) = got, exact
    if out.shape != exact_out.shape:
        return {"wrong": f"shape {list(out.shape)} instead of {list(exact_out.shape)}"}
    row = _error("", out, eager[0], exact_out)
    if lse is None:
        return row
    empty = exact_lse.isneginf()
    if not torch.equal(lse.isneginf(), empty):
        return row | {"wrong": "not the same rows see nothing"}
    if bool(out[empty].any()):
        return row | {"wrong": "rows that see nothing are not 0"}
    return row | _error("lse_", *(x.masked_fill(empty, 0.0) for x in (lse, eager[1], exact_lse)))


def _error(prefix: str, got: Tensor, eager: Tensor, exact: Tensor) -> Row:
    error, eager_error = (float((x.float() - exact).abs().max()) for x in (got, eager))
    allowed = 2 * eager_error + 1e-5 * max(float(exact.abs().max()), 1.0)
    row: Row = {f"{prefix}error": error, f"{prefix}eager_error": eager_error, f"{prefix}allowed": allowed}
    # NaN is not below anything
    return row if error <= allowed else row | {"wrong": f"{prefix}error {error:.1e}, allowed {allowed:.1e}"}


# Calls and plans ------------------------------------------------------------------------------------------------------


def make_call(
    setup: Setup,
    dtype: torch.dtype,
    *,
    q_len: int,
    kv_len: int | None = None,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
) -> AttentionCall:
    """Random q, k, v in the layout that a projection leaves, with NaNs behind the last key.

    `padded`: row 0 begins with padding, the last row has a hole and ends with padding.
    """
    generator, kv_len = setup.generator(7), kv_len or q_len

    def heads_of(count: int, length: int) -> Tensor:
        shape = (batch, length, count, head_dim)
        return torch.randn(shape, generator=generator, device=setup.device).to(dtype).transpose(1, 2)

    def cached() -> Tensor:
        x = heads_of(kv_heads, kv_len)
        behind = torch.full_like(x[:, :, :1], float("nan")).expand(-1, -1, _BEHIND, -1)
        return torch.cat([x, behind], 2)[:, :, :kv_len]

    mask = None
    if padded:
        mask = torch.ones(batch, kv_len, dtype=torch.bool, device=setup.device)
        mask[0, : kv_len // 3] = False
        mask[-1, kv_len // 2 : kv_len // 2 + 3] = False
        mask[-1, -2:] = False
    logits = torch.randn(heads, generator=generator, device=setup.device).to(dtype) if sinks else None
    # twice as sharp as usual, so that single keys matter
    query = 2 * heads_of(heads, q_len)
    return AttentionCall(
        query, cached(), cached(), mask=mask, scaling=head_dim**-0.5, softcap=softcap, sinks=logits, need_lse=True
    )


def blocks(
    call: AttentionCall,
    heads: int,
    block_q: int,
    block_k: int,
    *,
    batch: int = 1,
    keep: float = 0.3,
    columns: bool = False,
    empty: bool = False,
) -> Blocks:
    """Random lists, the diagonal and sometimes a block of the future in them, garbage behind them.

    `keep`: the share that is listed; 0: not even the diagonal. `columns`: keys of blocks that are not listed besides.
    `empty`: the first queries see nothing.
    """
    device, generator = call.query.device, torch.Generator(call.query.device).manual_seed(3)
    first = call.q_offset + torch.arange(0, call.q_len, block_q, device=device)
    last = (first + block_q - 1).clamp(max=call.kv_len - 1)
    block = torch.arange(-(-call.kv_len // block_k), device=device)

    def draw(size: int) -> Tensor:
        return torch.rand(batch, heads, len(first), size, generator=generator, device=device)

    listed = draw(len(block)) < keep
    if keep > 0:
        listed |= (block >= (first // block_k)[:, None]) & (block <= (last // block_k)[:, None])
    single = (draw(call.kv_len) < 0.1) & ~listed.repeat_interleave(block_k, -1)[..., : call.kv_len]
    if empty:
        listed[:, :, 0] = single[:, :, 0] = False
    plan = Blocks(*_lists(listed), block_q, block_k)
    if not columns:
        return plan
    col_idx, col_cnt = _lists(single)
    return replace(plan, col_idx=col_idx, col_cnt=col_cnt)


def _lists(member: Tensor) -> tuple[Tensor, Tensor]:
    index, count = compress(member)
    place = torch.arange(index.shape[-1], device=index.device)
    return torch.where(place < count[..., None], index, _GARBAGE).contiguous(), count


def permuted(call: AttentionCall, heads: int, before: int, after: int, **rest: Any) -> Permuted:
    device, generator = call.query.device, torch.Generator(call.query.device).manual_seed(5)
    order = torch.stack([torch.randperm(call.kv_len, generator=generator, device=device) for _ in range(heads)])
    return Permuted(order, before, after, **rest)
