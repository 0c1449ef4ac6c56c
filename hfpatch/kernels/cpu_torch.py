"""The tasks of `cpu_blocks` with torch's matmuls: any dtype, any CPU.

The G query heads that share a KV head form one matrix [G * queries, head_dim], their keys another one [keys, head_dim].
Scores are in the model's dtype, softmax statistics in fp32, as in eager attention.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.plan import Blocks, Permuted, Plan, Window

# Rows of a score matrix for which one core's matmul is near its best rate.
_ROWS = 896
# Bytes of scores that one core works on at once: more would leave its cache between the two matmuls.
_SCORES = 5 << 20
# Gathered keys are padded to a multiple of this.
_KEYS = 64

# Calls a function that takes tasks until none of so many is left, from several threads, and waits.
InThreads = Callable[[Callable[[], object], int], None]


def run(call: AttentionCall, plan: Plan, out: Tensor, lse: Tensor | None, in_threads: InThreads) -> None:
    """Fill `out` and `lse`. Of a Permuted plan only the slot window: its local window and sinks are left out."""
    if isinstance(plan, Permuted):
        order = plan.order.expand(call.key.shape[1], -1)
        tasks = list(_band_tasks(call, plan, order))
        # keys of every KV head in its own slot order
        index = order[None, :, :, None]
        key, value = (x.gather(2, index.expand(x.shape[0], -1, -1, x.shape[-1])) for x in (call.key, call.value))
        call = replace(call, key=key, value=value)
    elif isinstance(plan, Window):
        tasks = list(_window_tasks(call, plan))
    else:
        assert isinstance(plan, Blocks)
        tasks = list(_block_tasks(call, plan))
    longest = max((task.size[1] for task in tasks), default=0)
    tickets = itertools.count()

    def work() -> None:
        with torch.inference_mode():
            buffers = _buffers(call, longest)
            while (ticket := next(tickets)) < len(tasks):
                _compute(tasks[ticket], call, buffers, out, lse)

    in_threads(work, len(tasks))


Hidden = list[tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class _Task:
    """Some queries of some heads of one sequence, and the keys that any of them sees.

    Attributes:
        heads: query heads; they share one KV head.
        queries: slots among the call's queries.
        keys: slots, int64 [N] or a slice.
        size: (queries, keys).
        hidden: what is not visible: (first column, [queries, columns] of 0 and -inf) to be added to the scores.
        may_be_empty: a query may see none of the keys.
    """

    row: int
    heads: slice
    queries: slice | Tensor
    keys: slice | Tensor
    size: tuple[int, int]
    hidden: Callable[[], Hidden]
    may_be_empty: bool = False


def _block_tasks(call: AttentionCall, plan: Blocks) -> Iterator[_Task]:
    batch, q_heads = call.query.shape[:2]
    lists = plan.blk_cnt.shape[1]
    blk_idx, blk_cnt = plan.blk_idx.numpy(), plan.blk_cnt.numpy()
    col_idx = plan.col_idx.numpy() if plan.col_idx is not None else None
    col_cnt = plan.column_counts().numpy() if plan.col_idx is not None else None
    # lists per KV head (or for all) serve the whole group at once
    width = call.num_key_value_groups if lists <= call.key.shape[1] else 1
    within = np.arange(plan.block_k)
    # the longest tasks first, so that no worker is left with one at the end
    for block in reversed(range(blk_cnt.shape[-1])):
        first = block * plan.block_q
        last = min(first + plan.block_q, call.q_len)
        for row in range(batch):
            for head in range(0, q_heads, width):
                at = (row if blk_cnt.shape[0] > 1 else 0, head * lists // q_heads, block)
                blocks = blk_idx[at][: blk_cnt[at]].astype(np.int64)
                keys = (blocks[:, None] * plan.block_k + within).reshape(-1)
                if col_idx is not None and col_cnt is not None:
                    keys = np.sort(np.concatenate([keys, col_idx[at][: col_cnt[at]]]))
                # keys after the last query are invisible to all of them
                keys = keys[: np.searchsorted(keys, call.q_offset + last)]
                may_be_empty = call.mask is not None or len(keys) == 0 or int(keys[0]) > call.q_offset + first
                if len(keys):
                    # every new number of keys costs the matmul library a kernel; keys that come after all are hidden
                    keys = np.pad(keys, (0, -len(keys) % _KEYS), constant_values=call.kv_len)
                index = torch.from_numpy(keys)
                yield _Task(
                    row,
                    slice(head, head + width),
                    slice(first, last),
                    index.clamp(max=call.kv_len - 1),
                    (last - first, len(keys)),
                    _hide_future(index, first + call.q_offset, last + call.q_offset, call.mask, row),
                    # a list may lack the query's own block, or hold padding only
                    may_be_empty,
                )


def _hide_future(keys: Tensor, first: int, last: int, mask: Tensor | None, row: int) -> Callable[[], Hidden]:
    """Causality on the tail of ascending keys that crosses the diagonal; padding everywhere."""

    def hidden() -> Hidden:
        queries = torch.arange(first, last)[:, None]
        if mask is not None:
            seen = mask[row][keys.clamp(max=mask.shape[1] - 1)] & mask[row][first:last, None]
            return [(0, _bias((keys > queries) | ~seen))]
        # the first query's own key is never hidden; starting at it keeps the columns aligned
        start = int(torch.searchsorted(keys, first))
        if len(keys) - start == last - first and int(keys[-1]) == last - 1:
            # the query block's own keys, nearly always
            return [(start, _later(last - first))]
        return [(start, _bias(keys[start:] > queries))] if start < len(keys) else []

    return hidden


def _bias(hide: Tensor) -> Tensor:
    return torch.zeros(hide.shape).masked_fill_(hide, float("-inf"))


@lru_cache(maxsize=16)
def _later(count: int) -> Tensor:
    """Hides from each of `count` queries in a row the keys of those after it: [count, count]."""
    return _bias(torch.ones(count, count, dtype=torch.bool).triu(1))


def _window_tasks(call: AttentionCall, plan: Window) -> Iterator[_Task]:
    batch, q_heads = call.query.shape[:2]
    groups = call.num_key_value_groups
    block_q = max(64, min(_ROWS // groups, max(128, plan.window // 2)))
    for first in reversed(range(0, call.q_len, block_q)):
        last = min(first + block_q, call.q_len)
        begin, end = first + call.q_offset, last + call.q_offset
        start = max(begin - plan.window + 1, 0)
        sink = min(plan.sink, start)
        keys: slice | Tensor = slice(start, end)
        if sink:
            keys = torch.cat([torch.arange(sink), torch.arange(start, end)])
        pieces = _outside(start, begin, end, sink, plan)
        for row in range(batch):
            for head in range(0, q_heads, groups):
                size = (last - first, sink + end - start)
                hidden = lambda p=pieces: p
                yield _Task(row, slice(head, head + groups), slice(first, last), keys, size, hidden)


def _outside(start: int, begin: int, end: int, sink: int, plan: Window) -> Hidden:
    """The window's left edge and the diagonal, for keys [start, end) that follow `sink` columns."""
    queries = torch.arange(begin, end)[:, None]
    # the last query's window begins here; keys from here on are inside every window
    edge = min(max(end - plan.window, start), begin)
    left, right = torch.arange(start, edge), torch.arange(begin, end)
    late = (right > queries) | (queries - right >= plan.window) & (right >= plan.sink)
    pieces = [(sink + begin - start, _bias(late))]
    if edge > start:
        pieces.append((sink, _bias((queries - left >= plan.window) & (left >= plan.sink))))
    return pieces


def _band_tasks(call: AttentionCall, plan: Permuted, order: Tensor) -> Iterator[_Task]:
    local = plan.nearest()
    batch, groups, n = call.query.shape[0], call.num_key_value_groups, call.kv_len
    block_q = max(64, min(_ROWS // groups, max(128, plan.before)))
    for kv_head in range(call.key.shape[1]):
        places = order[kv_head]
        # slots that hold a query of this call, ascending
        slots = (places >= call.q_offset).nonzero().flatten()
        for first in range(0, len(slots), block_q):
            mine = slots[first : first + block_q]
            low, high = int(mine[0]) - plan.before, int(mine[-1]) + plan.after + 1
            if plan.circular and high - low < n:
                keys: slice | Tensor = torch.arange(low, high) % n
            else:
                keys = slice(max(low, 0), min(high, n)) if not plan.circular else slice(0, n)
            hide = _hide_band(plan, places, mine, keys, local)
            size = (len(mine), high - low if isinstance(keys, Tensor) else keys.stop - keys.start)
            queries = places[mine] - call.q_offset
            heads = slice(kv_head * groups, (kv_head + 1) * groups)
            for row in range(batch):
                yield _Task(row, heads, queries, keys, size, hide, may_be_empty=local > 0)


def _hide_band(plan: Permuted, places: Tensor, slots: Tensor, keys: slice | Tensor, local: int) -> Callable[[], Hidden]:
    def hidden() -> Hidden:
        n = len(places)
        key_slots = keys if isinstance(keys, Tensor) else torch.arange(keys.start, keys.stop)
        distance = slots[:, None] - key_slots
        if plan.circular:
            # the shorter way round on the side that reaches further
            distance = (distance + plan.after) % n - plan.after
        query, key = places[slots][:, None], places[key_slots]
        outside = (distance > plan.before) | (distance < -plan.after) | (key > query)
        if local:
            outside |= (query - key < local) | (key < plan.sink)
        return [(0, _bias(outside))]

    return hidden


# Computing tasks ----------------------------------------------------------------------------------------------------


_LOCAL = threading.local()


def _buffers(call: AttentionCall, columns: int) -> Callable[[str, int, int, torch.dtype], Tensor]:
    """Scratch matrices that a worker keeps: fresh ones would cost more in page faults than in arithmetic."""
    store: dict[tuple[str, torch.dtype], Tensor] = _LOCAL.__dict__.setdefault("store", {})

    def take(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        flat = store.get((name, dtype))
        if flat is None or flat.numel() < rows * width:
            flat = store[name, dtype] = torch.empty(rows * max(width, min(columns, 2 * width)), dtype=dtype)
        return flat[: rows * width].view(rows, width)

    return take


def _compute(
    task: _Task,
    call: AttentionCall,
    take: Callable[[str, int, int, torch.dtype], Tensor],
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """softmax(Q K^T) V of one task, into its place in `out` and `lse`."""
    dtype, dim = call.query.dtype, call.query.shape[-1]
    count, columns = task.size
    if columns == 0:
        out[task.row, task.heads, task.queries] = 0
        if lse is not None:
            empty = torch.tensor(float("-inf")) if call.sinks is None else call.sinks[task.heads].float()[:, None]
            lse[task.row, task.heads, task.queries] = empty
        return
    kv_head = task.heads.start // call.num_key_value_groups
    key, value = call.key[task.row, kv_head], call.value[task.row, kv_head]
    if isinstance(task.keys, slice):
        key, value = key[task.keys], value[task.keys]
    else:
        key = torch.index_select(key, 0, task.keys, out=take("key", columns, dim, dtype))
        value = torch.index_select(value, 0, task.keys, out=take("value", columns, value.shape[-1], dtype))
    hidden = [(start, bias.to(dtype)) for start, bias in task.hidden()]
    # as many heads at a time as have scores that stay in the core's cache
    width = max(1, _SCORES // (count * columns * dtype.itemsize))
    for first in range(task.heads.start, task.heads.stop, width):
        heads = slice(first, min(first + width, task.heads.stop))
        groups = heads.stop - heads.start
        rows = groups * count
        query = take("query", rows, dim, dtype)
        query.view(groups, count, dim).copy_(call.query[task.row, heads, task.queries])
        scores = take("scores", rows, columns, dtype)
        # scaled before the scores are rounded
        torch.addmm(scores, query, key.t(), beta=0, alpha=call.scaling, out=scores)
        if call.softcap is not None:
            scores = scores.float().div_(call.softcap).tanh_().mul_(call.softcap)
        for start, bias in hidden:
            # adding -inf is vectorised where filling by a mask is not
            scores.view(groups, count, columns)[:, :, start : start + bias.shape[1]].add_(bias)
        probs, part_lse = _softmax(scores, call, heads, task, take, lse is not None)
        result = torch.mm(probs, value, out=take("out", rows, value.shape[-1], dtype))
        out[task.row, heads, task.queries] = result.view(groups, count, -1)
        if lse is not None:
            assert part_lse is not None
            lse[task.row, heads, task.queries] = part_lse.view(groups, count)


def _softmax(
    scores: Tensor,
    call: AttentionCall,
    heads: slice,
    task: _Task,
    take: Callable[[str, int, int, torch.dtype], Tensor],
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(probabilities in the model's dtype, LSE [rows, 1] or None) of scores [rows, columns]."""
    dtype = call.query.dtype
    rows, columns = scores.shape
    if not need_lse and call.sinks is None:
        probs = torch.softmax(scores, -1, out=scores)
        probs = probs.nan_to_num_(0.0) if task.may_be_empty else probs
        return (probs if probs.dtype == dtype else take("probs", rows, columns, dtype).copy_(probs)), None
    exact = scores if scores.dtype == torch.float32 else take("exact", rows, columns, torch.float32).copy_(scores)
    highest = exact.amax(-1, keepdim=True)
    exact = torch.softmax(exact, -1, out=exact)
    # the largest probability is exp(highest - lse)
    lse = highest - exact.amax(-1, keepdim=True).log_()
    if task.may_be_empty:
        exact.nan_to_num_(0.0)
        lse.masked_fill_(highest == float("-inf"), float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks[heads].float().repeat_interleave(task.size[0])[:, None]
        with_sinks = torch.logaddexp(lse, sinks)
        exact.mul_((lse - with_sinks).exp_())
        lse = with_sinks
    if dtype == torch.float32:
        return exact, lse
    return take("probs", rows, columns, dtype).copy_(exact), lse
