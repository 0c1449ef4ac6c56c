"""Device code of `column_sums`: attention received by each key, summed over queries.

A program holds one tile of keys of one query head and walks over the queries that see it, so no two programs write
to the same place and the result does not depend on their order. With the log-sum-exp at hand, probabilities need no
running maximum: p = 2^(s - lse log2 e) for logits s in units of log2.
"""
# mypy: ignore-errors
# Device code is Triton, not Python: its types are those of the compiler.

from __future__ import annotations

import triton
import triton.language as tl

from hfpatch.kernels.triton_fwd import _LOG2E, _load_rows, _real_keys


@triton.jit(do_not_specialize=["count", "kv_len", "first"])
def column_sums_kernel(
    q,
    k,
    lse,
    sums,
    padding,
    scale,
    inner,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    count,
    kv_len,
    first,
    step,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Query i of `count` is in slot first + i * step. Grid: (tiles of keys, B * HEADS)."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    key = begin + tl.arange(0, BLOCK_N)
    exists = key < kv_len
    q_base = q + batch * q_b + head * q_h
    k_base = k + batch * k_b + head // GROUPS * k_h
    lse += (batch * HEADS + head) * count
    # [N, D]
    k_tile = _load_rows(k_base, key.to(tl.int64), k_t, exists, HEAD_DIM, BLOCK_D, True)
    seen_from = key
    if PADDED:
        seen_from = _real_keys(padding + batch * kv_len, key, exists, kv_len)
    # earlier queries see none of these keys
    earliest = tl.maximum(begin - first + step - 1, 0) // step
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(earliest, count, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < count
        position = first + row * step
        known = tl.load(lse + row, mask=inside, other=float("inf")) * _LOG2E
        if PADDED:
            real_query = tl.load(padding + batch * kv_len + position, mask=inside, other=0) != 0
            position = tl.where(real_query, position, -1)
        # [M, D]
        q_tile = _load_rows(q_base, row.to(tl.int64), q_t, inside, HEAD_DIM, BLOCK_D, True)
        # [M, D] @ [D, N]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if CAPPED:
            # tanh(x) = 2 sigmoid(2 x) - 1; the cap itself is in `scale`
            s = 2.0 * tl.sigmoid(2.0 * inner * s) - 1.0
        p = tl.exp2(s * scale - known[:, None])
        total += tl.where(seen_from[None, :] <= position[:, None], p, 0.0)
    tl.store(sums + (batch * HEADS + head) * kv_len + key, tl.sum(total, 0), mask=exists)
