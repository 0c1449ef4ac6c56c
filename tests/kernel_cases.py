"""Calls and plans that every kernel must get right, and the rule that says what right is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.kernels import reference
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window

# Relative root-mean-square error that a kernel may have on top of the rule
RMS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Stands in list entries past the count, which no kernel may look at
GARBAGE = 1 << 28


class Case(NamedTuple):
    id: str
    call: Callable[[torch.dtype], AttentionCall]
    plan: Callable[[AttentionCall], Plan]


def assert_as_accurate_as_eager(got: tuple[Tensor, Tensor | None], call: AttentionCall, plan: Plan) -> None:
    """Out and LSE: max error at most twice eager's in the same dtype, both against fp32, and a small relative RMS."""
    out, lse = got
    dtype = call.query.dtype
    exact, exact_lse = reference.run(call.to(torch.float32), plan)
    eager, eager_lse = reference.run(call, plan, compute_dtype=dtype)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    _within_twice("out", out, eager, exact)
    rms = (out.float() - exact).square().mean().sqrt()
    assert rms <= RMS[dtype] * exact.square().mean().sqrt(), f"relative RMS error of out: {rms:.2e} absolute"
    if lse is None:
        assert not call.need_lse
        return
    assert lse.dtype == torch.float32
    assert lse.shape == exact_lse.shape
    empty = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty), "not the same rows see nothing"
    assert not out[empty].any(), "rows that see nothing must be zero"
    _within_twice("lse", lse[~empty], eager_lse[~empty], exact_lse[~empty])


def _within_twice(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    if exact.numel() == 0:
        return
    error = (got.float() - exact).abs().max()
    allowed = 2 * (eager.float() - exact).abs().max() + 1e-5 * exact.abs().max().clamp(min=1)
    assert error <= allowed, f"max error of {name} {error:.2e}, allowed {allowed:.2e}"


def make_call(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 63,
    kv_len: int | None = None,
    head_dim: int = 64,
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
) -> AttentionCall:
    """Random q, k, v as views of [B, n, H, D], as a projection leaves them.

    `padded`: row 0 starts with padding that covers more than a block of 16, the last row has a hole and ends padded.
    """
    kv_len = kv_len or q_len
    rng = torch.Generator().manual_seed(7)

    def heads_of(count: int, length: int) -> Tensor:
        return torch.randn(batch, length, count, head_dim, generator=rng).to(dtype).transpose(1, 2)

    mask = None
    if padded:
        mask = torch.ones(batch, kv_len, dtype=torch.bool)
        mask[0, : kv_len // 3] = False
        mask[-1, kv_len // 2 : kv_len // 2 + 3] = False
        mask[-1, -2:] = False
    return AttentionCall(
        # twice as sharp as usual, so that single keys matter
        2 * heads_of(heads, q_len),
        heads_of(kv_heads, kv_len),
        heads_of(kv_heads, kv_len),
        mask=mask,
        scaling=head_dim**-0.5,
        softcap=softcap,
        sinks=torch.randn(heads, generator=rng).to(dtype) if sinks else None,
        need_lse=True,
    )


def make_blocks(
    call: AttentionCall,
    heads: int,
    block_q: int,
    block_k: int,
    *,
    batch: int = 1,
    columns: bool = False,
    whole: bool = False,
    empty: bool = False,
) -> Blocks:
    """Random lists with the diagonal and sometimes a block of the future in them.

    `columns`: single keys from the blocks that are not listed. `whole`: every block. `empty`: no block for the first
    queries, so that rows see nothing.
    """
    rng = torch.Generator().manual_seed(3)
    rows, blocks = -(-call.q_len // block_q), -(-call.kv_len // block_k)
    first = call.q_offset + torch.arange(rows) * block_q
    last = (first + block_q - 1).clamp(max=call.kv_len - 1)
    block = torch.arange(blocks)
    listed = torch.rand(batch, heads, rows, blocks, generator=rng) < 0.4
    listed |= (block >= (first // block_k)[:, None]) & (block <= (last // block_k)[:, None])
    if whole:
        listed[:] = True
    if empty:
        listed[:, :, 0] = False
    key_listed = listed.repeat_interleave(block_k, -1)[..., : call.kv_len]
    single = (torch.rand(batch, heads, rows, call.kv_len, generator=rng) < 0.2) & ~key_listed
    if empty:
        single[:, :, 0] = False
    col_idx, col_cnt = _lists(single) if columns else (None, None)
    return Blocks(*_lists(listed), block_q, block_k, col_idx, col_cnt)


def all_columns(plan: Blocks) -> Blocks:
    """Without column counts every entry is a column: cut the lists to their shortest."""
    assert plan.col_idx is not None and plan.col_cnt is not None
    return replace(plan, col_idx=plan.col_idx[..., : int(plan.col_cnt.min())], col_cnt=None)


def _lists(member: Tensor) -> tuple[Tensor, Tensor]:
    """bool [..., n] -> (int32 [..., longest + 1] ascending, garbage past the count; int32 [...])."""
    count = member.sum(-1, dtype=torch.int32)
    ids = torch.where(member, torch.arange(member.shape[-1]), GARBAGE).sort(-1).values
    return ids[..., : int(count.max()) + 1].to(torch.int32).contiguous(), count


def make_permuted(call: AttentionCall, heads: int, before: int, after: int, **rest: int | bool) -> Permuted:
    rng = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(call.kv_len, generator=rng) for _ in range(heads)])
    return Permuted(order, before, after, **rest)


def _case(id: str, plan: Callable[[AttentionCall], Plan], **call: int | float | bool) -> Case:
    return Case(id, lambda dtype: make_call(dtype, **call), plan)


CASES = [
    _case("dense-1", lambda c: Dense(), q_len=1),
    _case("dense-63-mqa", lambda c: Dense(), kv_heads=1),
    _case("dense-65-mha", lambda c: Dense(), q_len=65, kv_heads=4),
    _case("dense-one-query", lambda c: Dense(), q_len=1, kv_len=77, heads=14),
    _case("dense-chunk", lambda c: Dense(), q_len=40, kv_len=111),
    _case("dense-padded", lambda c: Dense(), batch=2, q_len=49, padded=True),
    _case("dense-padded-sinks", lambda c: Dense(), batch=2, q_len=20, kv_len=49, padded=True, sinks=True),
    _case("dense-softcap-d256", lambda c: Dense(), q_len=33, heads=2, kv_heads=1, head_dim=256, softcap=3.0),
    _case("window-111", lambda c: Window(4, 20), q_len=111),
    _case("window-no-sink", lambda c: Window(0, 17), q_len=65, heads=6),
    _case("window-only-sink", lambda c: Window(5, 0), q_len=65),
    _case("window-nothing", lambda c: Window(0, 0), q_len=17),
    _case("window-self", lambda c: Window(0, 1), q_len=35),
    _case("window-wide-sink", lambda c: Window(40, 8), q_len=90),
    _case("window-all", lambda c: Window(0, 1 << 40), q_len=50),
    _case("window-chunk-d80", lambda c: Window(3, 25), q_len=21, kv_len=90, head_dim=80),
    _case("window-one-query-d96", lambda c: Window(3, 25), q_len=1, kv_len=90, head_dim=96),
    _case("window-softcap-sinks-d128", lambda c: Window(2, 30), q_len=49, head_dim=128, softcap=5.0, sinks=True),
    _case("blocks-shared", lambda c: make_blocks(c, 1, 32, 16), q_len=111),
    _case("blocks-per-kv-head", lambda c: make_blocks(c, 2, 16, 32), q_len=65, heads=6),
    _case("blocks-per-head", lambda c: make_blocks(c, 4, 16, 16), q_len=63),
    _case("blocks-batched", lambda c: make_blocks(c, 2, 32, 32, batch=2), batch=2, q_len=65),
    _case("blocks-large", lambda c: make_blocks(c, 2, 64, 128), q_len=130),
    _case("blocks-whole", lambda c: make_blocks(c, 1, 32, 32, whole=True), q_len=70),
    _case("blocks-many", lambda c: make_blocks(c, 1, 16, 16, whole=True), q_len=3, kv_len=2100, heads=2, kv_heads=1),
    _case("blocks-1", lambda c: make_blocks(c, 1, 16, 16), q_len=1),
    _case("blocks-one-query", lambda c: make_blocks(c, 2, 64, 16), q_len=1, kv_len=111),
    _case("blocks-chunk", lambda c: make_blocks(c, 2, 32, 16), q_len=37, kv_len=111),
    _case("blocks-empty-rows", lambda c: make_blocks(c, 2, 16, 16, empty=True, columns=True), q_len=50),
    _case("blocks-padded", lambda c: make_blocks(c, 2, 16, 16, batch=2), batch=2, q_len=65, padded=True),
    _case("blocks-softcap-sinks-d256", lambda c: make_blocks(c, 2, 32, 32, empty=True), q_len=65, head_dim=256,
          softcap=4.0, sinks=True),
    _case("columns-shared", lambda c: make_blocks(c, 1, 32, 16, columns=True), q_len=111),
    _case("columns-per-head", lambda c: make_blocks(c, 4, 16, 16, columns=True), q_len=63, head_dim=80),
    _case("columns-uncounted", lambda c: all_columns(make_blocks(c, 2, 16, 16, columns=True)), q_len=17),
    _case("columns-padded", lambda c: make_blocks(c, 2, 32, 16, batch=2, columns=True), batch=2, q_len=20, kv_len=65,
          padded=True, sinks=True),
    _case("columns-one-query", lambda c: make_blocks(c, 2, 16, 32, columns=True), q_len=1, kv_len=111),
    _case("permuted-pure", lambda c: make_permuted(c, 1, 10, 10), q_len=65),
    _case("permuted-pure-sinks", lambda c: make_permuted(c, 2, 9, 0), q_len=65, sinks=True),
    _case("permuted-hybrid", lambda c: make_permuted(c, 1, 12, 12, local=6, sink=4), q_len=111),
    _case("permuted-hybrid-per-head", lambda c: make_permuted(c, 2, 8, 3, local=16, sink=1), q_len=65, batch=2,
          softcap=5.0, sinks=True),
    _case("permuted-sink", lambda c: make_permuted(c, 2, 2, 2, sink=3), q_len=50, head_dim=128),
    _case("permuted-circular", lambda c: make_permuted(c, 2, 7, 11, circular=True), q_len=65),
    _case("permuted-circular-wide", lambda c: make_permuted(c, 1, 30, 30, local=2, circular=True), q_len=50),
    _case("permuted-all", lambda c: make_permuted(c, 1, 64, 64), q_len=50),
    _case("permuted-chunk", lambda c: make_permuted(c, 2, 9, 9, local=5, sink=2), q_len=21, kv_len=90),
    _case("permuted-one-query", lambda c: make_permuted(c, 2, 9, 9, local=5, sink=2), q_len=1, kv_len=90),
]  # fmt: skip
