"""Device code of `triton_blocks`: one forward kernel per plan kind, all built from the same online-softmax step.

For one query row with logits s_j in units of log2 (q.k * scaling * log2 e), keys are visited in tiles. After some
tiles the state is

    m = max_j s_j        l = sum_j 2^(s_j - m)        acc = sum_j 2^(s_j - m) v_j

and a further tile with maximum m' turns it, with M = max(m, m') and a = 2^(m - M), into

    M        l a + sum_new 2^(s_j - M)        acc a + sum_new 2^(s_j - M) v_j

At the end out = acc / l and lse = (m + log2 l) ln 2. `m` starts at a finite floor instead of -inf, so a row that meets
only masked keys (s_j = -inf) adds 2^(-inf) = 0 and never computes -inf - -inf.

What is already known of a row is a start value: a learned sink logit is (m, l, acc) = (sink log2 e, 1, 0), and
attention over other keys with result (out, lse) is (lse log2 e, 1, out).

Rows of a program: the `HEADS` query heads that share a KV head and a list of keys lie next to each other, row
`i * HEADS + h` is query i of head h. A tile of keys is then read once for all of them, and a single query still fills
HEADS rows.
"""
# mypy: ignore-errors
# Device code is Triton, not Python: its types are those of the compiler.

from __future__ import annotations

import triton
import triton.language as tl

_FLOOR = tl.constexpr(-1.0e30)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# Lengths change from call to call; specialising on them would compile the same kernel again and again.
_LENGTHS = ["q_len", "kv_len", "sink", "window", "before", "after", "local", "num_lists", "max_blocks", "max_columns"]


@triton.jit
def _load_rows(base, index, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows `index` [N] of [*, HEAD_DIM] as [N, BLOCK_D]: zeros past HEAD_DIM and, if BOUNDED, where not `inside`."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index[:, None] * stride + d[None, :]
    if BOUNDED:
        rows = tl.load(pointers, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        rows = tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def _real_keys(padding, key, exists, kv_len):
    """`key` [N], and `kv_len`, which no query reaches, in place of padding."""
    return tl.where(tl.load(padding + key, mask=exists, other=0) != 0, key, kv_len)


@triton.jit
def _listed_keys(
    ids, tiles, col_idx, columns, t, n, kv_len, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr
):
    """Keys [N] of tile `t` of a list: the first `tiles` come from blocks, the others from columns."""
    SPLIT: tl.constexpr = BLOCK_K // BLOCK_N
    key = tl.load(ids + t // SPLIT, mask=t < tiles, other=0) * BLOCK_K + t % SPLIT * BLOCK_N + n
    if COLUMNS:
        at = (t - tiles) * BLOCK_N + n
        column = tl.load(col_idx + at, mask=(at >= 0) & (at < columns), other=kv_len)
        key = tl.where(t < tiles, key, column)
    return key


@triton.jit
def _keys_at(order, begin, place, count, kv_len):
    """Keys in the slots begin + place [N], which wrap around; `kv_len` for places past `count`."""
    slot = begin + place
    slot = tl.where(slot >= kv_len, slot - kv_len, slot)
    return tl.load(order + slot, mask=place < count, other=kv_len)


@triton.jit
def _start(sinks, head, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SINKS: tl.constexpr):
    """(m, l, acc) before the first tile."""
    if HAS_SINKS:
        m = tl.maximum(tl.load(sinks + head).to(tl.float32) * _LOG2E, _FLOOR)
        l = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        m = tl.full([BLOCK_M], _FLOOR, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    return m, l, acc


@triton.jit
def _step(q, k, v, keep, m, l, acc, scale, inner, CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take in one tile of keys: q [M, D], k and v [N, D], keep bool [M, N]."""
    # [M, D] @ [D, N]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAPPED:
        # tanh(x) = 2 sigmoid(2 x) - 1; the cap itself is in `scale`
        s = 2.0 * tl.sigmoid(2.0 * inner * s) - 1.0
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    # [M, N] @ [N, D]
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def _store(out, lse, out_row, lse_row, inside, m, l, acc, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write acc / l and the LSE; a row that saw nothing becomes (0, -inf)."""
    seen = l > 0.0
    total = tl.where(seen, l, 1.0)
    d = tl.arange(0, BLOCK_D)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_row[:, None] + d[None, :], result, mask=inside[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(lse + lse_row, tl.where(seen, (m + tl.log2(total)) * _LN2, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def blocks_fwd_kernel(
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
    schedule,
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
    q_len,
    kv_len,
    num_lists,
    max_blocks,
    max_columns,
    GRID_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    LIST_BATCHED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_Q: tl.constexpr,
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
    """Listed key blocks, then listed key columns. Grid: (query blocks * TILES_Q, B * GRID_HEADS)."""
    batch = (tl.program_id(1) // GRID_HEADS).to(tl.int64)
    group = tl.program_id(1) % GRID_HEADS
    part = tl.program_id(0) % TILES_Q
    which = group * LIST_HEADS // GRID_HEADS
    if LIST_BATCHED:
        which += batch * LIST_HEADS
    which = which.to(tl.int64) * num_lists
    block = tl.load(schedule + which + tl.program_id(0) // TILES_Q)
    which += block
    first = block * BLOCK_Q + part * BLOCK_M // HEADS
    if first >= q_len:
        return
    # [M]: row -> query of this call, head
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)
    query = block * BLOCK_Q + row // HEADS
    head = group * HEADS + row % HEADS
    inside = (row // HEADS < BLOCK_Q) & (query < q_len)
    q_offset = kv_len - q_len
    position = query + q_offset
    low = first + q_offset
    last = block * BLOCK_Q + tl.minimum((part * BLOCK_M + BLOCK_M - 1) // HEADS, BLOCK_Q - 1)
    high = tl.minimum(last, q_len - 1) + q_offset
    kv_head = (group * HEADS // GROUPS).to(tl.int64)
    k_base = k + batch * k_b + kv_head * k_h
    v_base = v + batch * v_b + kv_head * v_h
    query64, head64 = query.to(tl.int64), head.to(tl.int64)
    # [M, D]
    q_tile = _load_rows(q + batch * q_b, head64 * q_h + query64 * q_t, 1, inside, HEAD_DIM, BLOCK_D, True)
    m, l, acc = _start(sinks, head, BLOCK_M, BLOCK_D, HAS_SINKS)
    if PADDED:
        # a padded query sees nothing
        real_query = tl.load(padding + batch * kv_len + position, mask=inside, other=0) != 0
        position = tl.where(real_query, position, -1)

    ids = blk_idx + which * max_blocks
    count = tl.load(blk_cnt + which)
    # ids ascend: first the blocks that every row sees whole, then those on the diagonal, then the future
    whole = 0
    past = 0
    for c in range(0, count, 128):
        at = c + tl.arange(0, 128)
        start = tl.load(ids + at, mask=at < count, other=0) * BLOCK_K
        whole += tl.sum(((at < count) & (start + BLOCK_K - 1 <= low)).to(tl.int32))
        past += tl.sum(((at < count) & (start <= high)).to(tl.int32))
    if PADDED:
        whole = 0
    # Lists are read one tile ahead: the compiler pipelines the loads of keys well only if their addresses are at hand.
    n = tl.arange(0, BLOCK_N)
    SPLIT: tl.constexpr = BLOCK_K // BLOCK_N
    next_id = tl.load(ids, mask=whole > 0, other=0)
    for t in range(0, whole * SPLIT):
        start = next_id.to(tl.int64) * BLOCK_K + t % SPLIT * BLOCK_N
        next_id = tl.load(ids + (t + 1) // SPLIT, mask=t + 1 < whole * SPLIT, other=0)
        # [N, D]
        k_tile = _load_rows(k_base + start * k_t, n, k_t, n, HEAD_DIM, BLOCK_D, False)
        v_tile = _load_rows(v_base + start * v_t, n, v_t, n, HEAD_DIM, BLOCK_D, False)
        m, l, acc = _step(q_tile, k_tile, v_tile, n, m, l, acc, scale, inner, CAPPED, False, PRECISION)
    # the rest of the blocks, then the columns
    ids += whole
    tiles = (past - whole) * SPLIT
    columns = 0
    if COLUMNS:
        columns = tl.load(col_cnt + which)
        col_idx += which * max_columns
    next_key = _listed_keys(ids, tiles, col_idx, columns, 0, n, kv_len, BLOCK_K, BLOCK_N, COLUMNS)
    for t in range(0, tiles + (columns + BLOCK_N - 1) // BLOCK_N):
        key = next_key
        next_key = _listed_keys(ids, tiles, col_idx, columns, t + 1, n, kv_len, BLOCK_K, BLOCK_N, COLUMNS)
        exists = key < kv_len
        # [N, D]
        k_tile = _load_rows(k_base, key.to(tl.int64), k_t, exists, HEAD_DIM, BLOCK_D, True)
        v_tile = _load_rows(v_base, key.to(tl.int64), v_t, exists, HEAD_DIM, BLOCK_D, True)
        if PADDED:
            key = _real_keys(padding + batch * kv_len, key, exists, kv_len)
        keep = key[None, :] <= position[:, None]
        m, l, acc = _step(q_tile, k_tile, v_tile, keep, m, l, acc, scale, inner, CAPPED, True, PRECISION)

    out_row = head64 * o_h + query64 * o_t
    lse_row = (batch * (GRID_HEADS * HEADS) + head) * q_len + query
    _store(out + batch * o_b, lse, out_row, lse_row, inside, m, l, acc, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_LENGTHS)
def window_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    padding,
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
    q_len,
    kv_len,
    sink,
    window,
    GRID_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first `sink` keys and the last `window`. Grid: (tiles of q_len * HEADS rows, B * GRID_HEADS)."""
    # the last queries see most keys: start them first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // GRID_HEADS).to(tl.int64)
    group = tl.program_id(1) % GRID_HEADS
    # [M]: row -> query of this call, head
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // HEADS
    head = group * HEADS + row % HEADS
    inside = query < q_len
    q_offset = kv_len - q_len
    position = query + q_offset
    low = tile * BLOCK_M // HEADS + q_offset
    high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // HEADS, q_len - 1) + q_offset
    k_base = k + batch * k_b + group.to(tl.int64) * k_h
    v_base = v + batch * v_b + group.to(tl.int64) * v_h
    query64, head64 = query.to(tl.int64), head.to(tl.int64)
    # [M, D]
    q_tile = _load_rows(q + batch * q_b, head64 * q_h + query64 * q_t, 1, inside, HEAD_DIM, BLOCK_D, True)
    m, l, acc = _start(sinks, head, BLOCK_M, BLOCK_D, HAS_SINKS)
    if PADDED:
        # a padded query sees nothing
        real_query = tl.load(padding + batch * kv_len + position, mask=inside, other=0) != 0
        position = tl.where(real_query, position, -1)

    oldest = position - window
    # In tiles: [0, sinks_end) for the sinks, [begin, end) for the window, of which every row sees [whole, whole_end).
    begin = tl.maximum(low - window + 1, 0) // BLOCK_N
    end = high // BLOCK_N + 1
    sinks_end = tl.minimum((sink + BLOCK_N - 1) // BLOCK_N, begin)
    whole = tl.minimum((tl.maximum(high - window + 1, 0) + BLOCK_N - 1) // BLOCK_N, end)
    whole_end = tl.maximum((low + 1) // BLOCK_N, whole)
    if PADDED:
        whole_end = whole
    n = tl.arange(0, BLOCK_N)
    for t in range(whole, whole_end):
        start = tl.cast(t * BLOCK_N, tl.int64)
        # [N, D]
        k_tile = _load_rows(k_base + start * k_t, n, k_t, n, HEAD_DIM, BLOCK_D, False)
        v_tile = _load_rows(v_base + start * v_t, n, v_t, n, HEAD_DIM, BLOCK_D, False)
        m, l, acc = _step(q_tile, k_tile, v_tile, n, m, l, acc, scale, inner, CAPPED, False, PRECISION)
    for t in range(0, sinks_end + (whole - begin) + (end - whole_end)):
        at = tl.where(t < sinks_end, t, begin + t - sinks_end)
        at = tl.where(at >= whole, at + whole_end - whole, at)
        start = tl.cast(at * BLOCK_N, tl.int64)
        key = at * BLOCK_N + n
        exists = key < kv_len
        if PADDED:
            key = _real_keys(padding + batch * kv_len, key, exists, kv_len)
        keep = (key[None, :] > oldest[:, None]) | (key < sink)[None, :]
        keep &= key[None, :] <= position[:, None]
        # [N, D]
        k_tile = _load_rows(k_base + start * k_t, n, k_t, exists, HEAD_DIM, BLOCK_D, True)
        v_tile = _load_rows(v_base + start * v_t, n, v_t, exists, HEAD_DIM, BLOCK_D, True)
        m, l, acc = _step(q_tile, k_tile, v_tile, keep, m, l, acc, scale, inner, CAPPED, True, PRECISION)

    out_row = head64 * o_h + query64 * o_t
    lse_row = (batch * (GRID_HEADS * HEADS) + head) * q_len + query
    _store(out + batch * o_b, lse, out_row, lse_row, inside, m, l, acc, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_LENGTHS)
def permuted_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    order,
    queries,
    slots,
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
    q_len,
    kv_len,
    before,
    after,
    local,
    sink,
    GRID_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    ORDER_HEADS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    CONTINUE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A band in slot order, causal in the original one. Grid: (tiles of q_len * HEADS rows, B * GRID_HEADS).

    Rows and keys are gathered by their slot while loading. Keys of the local window and the sinks are left out; with
    CONTINUE, `out` and `lse` hold the attention over those and are taken up and overwritten.
    """
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // GRID_HEADS).to(tl.int64)
    group = tl.program_id(1) % GRID_HEADS
    which = (group * ORDER_HEADS // GRID_HEADS).to(tl.int64)
    # [M]: row -> place among the queries in slot order -> query of this call, slot, head
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place = row // HEADS
    inside = place < q_len
    query = tl.load(queries + which * q_len + place, mask=inside, other=0)
    slot = tl.load(slots + which * q_len + place, mask=inside, other=0)
    head = group * HEADS + row % HEADS
    newest = query + kv_len - q_len - local
    first_slot, last_slot = slot - before, slot + after
    low = tl.load(slots + which * q_len + tile * BLOCK_M // HEADS)
    high = tl.load(slots + which * q_len + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // HEADS, q_len - 1))
    k_base = k + batch * k_b + group.to(tl.int64) * k_h
    v_base = v + batch * v_b + group.to(tl.int64) * v_h
    query64, head64 = query.to(tl.int64), head.to(tl.int64)
    # [M, D]
    q_tile = _load_rows(q + batch * q_b, head64 * q_h + query64 * q_t, 1, inside, HEAD_DIM, BLOCK_D, True)
    out_row = head64 * o_h + query64 * o_t
    lse_row = (batch * (GRID_HEADS * HEADS) + head) * q_len + query
    if CONTINUE:
        known = tl.load(lse + lse_row, mask=inside, other=float("-inf"))
        m = tl.maximum(known * _LOG2E, _FLOOR)
        l = (known > float("-inf")).to(tl.float32)
        acc = _load_rows(out + batch * o_b, out_row, 1, inside, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    else:
        m, l, acc = _start(sinks, head, BLOCK_M, BLOCK_D, HAS_SINKS)

    begin = low - before
    if CIRCULAR:
        count = tl.minimum(high + after - begin + 1, kv_len)
        begin = (begin + kv_len) % kv_len
    else:
        begin = tl.maximum(begin, 0)
        count = tl.minimum(high + after + 1, kv_len) - begin
    n = tl.arange(0, BLOCK_N)
    # one tile ahead, as the lists of blocks
    next_key = _keys_at(order + which * kv_len, begin, n, count, kv_len)
    for t in range(0, count, BLOCK_N):
        key = next_key
        next_key = _keys_at(order + which * kv_len, begin, t + BLOCK_N + n, count, kv_len)
        listed = key < kv_len
        at = begin + t + n
        if CIRCULAR:
            at = tl.where(at >= kv_len, at - kv_len, at)
        # [N, D]
        k_tile = _load_rows(k_base, key.to(tl.int64), k_t, listed, HEAD_DIM, BLOCK_D, True)
        v_tile = _load_rows(v_base, key.to(tl.int64), v_t, listed, HEAD_DIM, BLOCK_D, True)
        near = (at[None, :] >= first_slot[:, None]) & (at[None, :] <= last_slot[:, None])
        if CIRCULAR:
            near |= at[None, :] - kv_len >= first_slot[:, None]
            near |= at[None, :] + kv_len <= last_slot[:, None]
        # causal, and covered neither by the local window nor by the sinks
        key = tl.where(key >= sink, key, kv_len)
        keep = near & (key[None, :] <= newest[:, None])
        m, l, acc = _step(q_tile, k_tile, v_tile, keep, m, l, acc, scale, inner, CAPPED, True, PRECISION)

    _store(out + batch * o_b, lse, out_row, lse_row, inside, m, l, acc, HEAD_DIM, BLOCK_D)
