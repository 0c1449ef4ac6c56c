"""Device code of `triton_decode`: a few queries, keys split among programs, partial results merged.

One program takes a share of the keys that the queries of one KV head see, with the online softmax of `triton_fwd`, and
leaves its own (out, lse). Shares are disjoint, so with w_s = exp(lse_s - max lse) the whole is

    out = sum_s w_s out_s / sum_s w_s        lse = max lse + log sum_s w_s

A share without a visible key has lse -inf and weight 0. A learned sink belongs to the first share.
"""
# mypy: ignore-errors
# Device code is Triton, not Python: its types are those of the compiler.

from __future__ import annotations

import triton
import triton.language as tl

from hfpatch.kernels.triton_fwd import _FLOOR, _load_rows, _real_keys, _start, _step, _store

# Lengths change with every token.
_LENGTHS = ["q_len", "kv_len", "sink", "window", "max_blocks", "max_columns", "splits", "o_s"]


@triton.jit
def _range_keys(entry, sinks, start, kv_len):
    """Keys [N] of a list that is [0, sinks) and then [start, kv_len); `kv_len` and more past its end."""
    return tl.where(entry < sinks, entry, entry - sinks + start)


@triton.jit
def _listed_keys(ids, col_idx, entry, in_blocks, entries, kv_len, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr):
    """Keys [N] of a list of blocks, `in_blocks` tokens together, and columns; `kv_len` past its `entries`.

    Entries are tokens, so a tile takes several small pages or a part of a large block, whatever the block size.
    """
    listed = entry < in_blocks
    key = tl.load(ids + entry // BLOCK_K, mask=listed, other=0) * BLOCK_K + entry % BLOCK_K
    if COLUMNS:
        column = tl.load(col_idx + entry - in_blocks, mask=(entry >= in_blocks) & (entry < entries), other=kv_len)
        key = tl.where(listed, key, column)
    else:
        key = tl.where(listed, key, kv_len)
    return key


@triton.jit(do_not_specialize=_LENGTHS)
def decode_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    padding,
    blk_idx,
    blk_cnt,
    col_idx,
    col_cnt,
    scale,
    inner,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    o_b,
    o_h,
    o_t,
    o_s,
    q_len,
    kv_len,
    sink,
    window,
    max_blocks,
    max_columns,
    splits,
    GRID_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    LISTED: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    LIST_BATCHED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One list of keys for all queries, or the first `sink` keys and the last `window` of each.

    Grid: (splits * B * GRID_HEADS, tiles of q_len * HEADS rows). Split s writes to `out + s * o_s`, and to `lse` as
    [splits, B, heads, q_len].
    """
    programs = tl.num_programs(0) // splits
    split = tl.program_id(0) // programs
    batch = (tl.program_id(0) % programs // GRID_HEADS).to(tl.int64)
    group = tl.program_id(0) % GRID_HEADS
    # [M]: row -> query of this call, head
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // HEADS
    head = group * HEADS + row % HEADS
    inside = query < q_len
    q_offset = kv_len - q_len
    position = query + q_offset
    kv_head = (group * HEADS // GROUPS).to(tl.int64)
    k_base = k + batch * k_b + kv_head * k_h
    v_base = v + batch * v_b + kv_head * v_h
    query64, head64 = query.to(tl.int64), head.to(tl.int64)
    # [M, D]
    q_tile = _load_rows(q + batch * q_b, head64 * q_h + query64 * q_t, 1, inside, HEAD_DIM, BLOCK_D, True)
    m, l, acc = _start(sinks, head, BLOCK_M, BLOCK_D, HAS_SINKS)
    if HAS_SINKS:
        # the others keep the sink's logit as the place that they count from
        l = tl.where(split == 0, l, 0.0)
    if PADDED:
        # a padded query sees nothing
        real_query = tl.load(padding + batch * kv_len + position, mask=inside, other=0) != 0
        position = tl.where(real_query, position, -1)

    # what the rows see is a list of `entries` keys; this program takes [begin, end) of it
    if LISTED:
        which = group * LIST_HEADS // GRID_HEADS
        if LIST_BATCHED:
            which += batch * LIST_HEADS
        which = which.to(tl.int64)
        in_blocks = tl.load(blk_cnt + which) * BLOCK_K
        entries = in_blocks
        blk_idx += which * max_blocks
        if COLUMNS:
            entries += tl.load(col_cnt + which)
            col_idx += which * max_columns
    else:
        start = tl.maximum(q_offset - window + 1, 0)
        sinks_end = tl.minimum(sink, start)
        entries = sinks_end + kv_len - start
    oldest = position - window
    share = ((entries + splits - 1) // splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, entries)
    n = tl.arange(0, BLOCK_N)
    # Lists are read one tile ahead: the compiler pipelines the loads of keys well only if their addresses are at hand.
    if LISTED:
        next_key = _listed_keys(blk_idx, col_idx, begin + n, in_blocks, entries, kv_len, BLOCK_K, COLUMNS)
    else:
        next_key = _range_keys(begin + n, sinks_end, start, kv_len)
    for t in range(begin, end, BLOCK_N):
        key = next_key
        ahead = t + BLOCK_N + n
        if LISTED:
            next_key = _listed_keys(blk_idx, col_idx, ahead, in_blocks, entries, kv_len, BLOCK_K, COLUMNS)
        else:
            next_key = _range_keys(ahead, sinks_end, start, kv_len)
        exists = key < kv_len
        # [N, D]
        k_tile = _load_rows(k_base, key.to(tl.int64), k_t, exists, HEAD_DIM, BLOCK_D, True)
        v_tile = _load_rows(v_base, key.to(tl.int64), v_t, exists, HEAD_DIM, BLOCK_D, True)
        if PADDED:
            key = _real_keys(padding + batch * kv_len, key, exists, kv_len)
        keep = key[None, :] <= position[:, None]
        if not LISTED:
            keep &= (key[None, :] > oldest[:, None]) | (key < sink)[None, :]
        m, l, acc = _step(q_tile, k_tile, v_tile, keep, m, l, acc, scale, inner, CAPPED, True, PRECISION)

    out_row = head64 * o_h + query64 * o_t
    lse_row = ((split * (programs // GRID_HEADS) + batch) * (GRID_HEADS * HEADS) + head) * q_len + query
    _store(out + split.to(tl.int64) * o_s + batch * o_b, lse, out_row, lse_row, inside, m, l, acc, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["q_len", "splits"])
def merge_splits_kernel(
    parts,
    part_lse,
    out,
    lse,
    o_b,
    o_h,
    o_t,
    q_len,
    splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Join parts [splits, B, NUM_HEADS, q_len, HEAD_DIM] by their LSE. Grid: (B * NUM_HEADS * q_len, 1)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    s = tl.arange(0, MAX_SPLITS)
    top = tl.max(tl.load(part_lse + s * rows + row, mask=s < splits, other=float("-inf")), 0)
    # a row that saw nothing: any finite number gives weights of 0
    base = tl.maximum(top, _FLOOR)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for first in range(0, splits, BLOCK_M):
        at = first + tl.arange(0, BLOCK_M)
        known = tl.load(part_lse + at * rows + row, mask=at < splits, other=float("-inf"))
        weight = tl.exp(known - base)
        # [M, D]
        part = _load_rows(parts, at.to(tl.int64) * rows + row, HEAD_DIM, at < splits, HEAD_DIM, BLOCK_D, True)
        total += tl.sum(weight, 0)
        acc += tl.sum(weight[:, None] * part, 0)
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    batch, head, query = row // (NUM_HEADS * q_len), row // q_len % NUM_HEADS, row % q_len
    place = out + batch * o_b + head * o_h + query * o_t + d
    tl.store(place, (acc / safe).to(out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse + row, tl.where(seen, base + tl.log(safe), float("-inf")))
