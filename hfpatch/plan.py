"""What a method answers: which keys each query sees. Plain data; `mask()` is the meaning, kernels are the speed.

A plan only narrows what the call permits and never re-imposes causality; `visible()` joins the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError

# Rows of the mask that are counted where a plan has no closed form for its density.
_SAMPLED_ROWS = 64


class Plan(Protocol):
    def mask(self, call: AttentionCall) -> Tensor:
        """bool, broadcastable to [B, Hq, q_len, kv_len]: keys the method wants. Builds [q_len, kv_len]."""
        ...

    def density(self, call: AttentionCall) -> Tensor | float:
        """Kept share of the causal pairs of an unpadded call, in (0, 1]. No [q_len, kv_len] tensor, no device sync."""
        ...

    def keeps_all(self, call: AttentionCall) -> bool:
        """True where the plan is known, from shapes alone, to keep every permitted pair: then the model's own runs."""
        ...


def visible(call: AttentionCall, plan: Plan) -> Tensor:
    """bool, broadcastable to [B, Hq, q_len, kv_len]: pairs that enter the softmax.

    Where a 4-D mask lets a token look ahead (tokens of one image in Gemma 3), those pairs stay whatever the plan says.
    """
    keep = plan.mask(call)
    if call.mask is not None and call.mask.ndim == 4:
        keep = keep | ~call.causal()
    return call.permitted() & keep


@dataclass(frozen=True)
class Dense:
    """Everything that the model permits.

    Attributes:
        fastest: run the fastest kernel that there is for it; else the model's own attention runs.
    """

    fastest: bool = False

    def mask(self, call: AttentionCall) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=call.query.device)

    def density(self, call: AttentionCall) -> float:
        return 1.0

    def keeps_all(self, call: AttentionCall) -> bool:
        return not self.fastest


@dataclass(frozen=True)
class Window:
    """The first `sink` tokens and the last `window` tokens, the query's own included. Counts real tokens."""

    sink: int
    window: int

    def mask(self, call: AttentionCall) -> Tensor:
        q, k = call.positions()
        return (q - k < self.window) | (k < self.sink)

    def density(self, call: AttentionCall) -> float:
        return _window_density(self.sink, self.window, call.q_offset, call.q_len)

    def keeps_all(self, call: AttentionCall) -> bool:
        return self.window + self.sink >= call.kv_len


@lru_cache(maxsize=256)
def _window_density(sink: int, window: int, q_offset: int, q_len: int) -> float:
    rows = torch.arange(q_offset, q_offset + q_len)
    kept = (rows + 1).clamp(max=window) + (rows - window + 1).clamp(min=0, max=sink)
    return float(kept.sum() / (rows + 1).sum())


@dataclass(frozen=True, eq=False)
class Blocks:
    """Lists of key blocks, and optionally of single key columns, for each block of queries.

    Query block `a` holds queries `a * block_q ...` of this call; key block `b` holds key slots `b * block_k ...`.
    Entries past the count are ignored. Ids in a list are ascending and distinct; columns lie outside the listed blocks.
    Causality and padding are applied token by token on top.

    Attributes:
        blk_idx: int32 [B or 1, Hs, NQ, MAXB].
        blk_cnt: int32 [B or 1, Hs, NQ].
        block_q, block_k: tokens in a block.
        col_idx: int32 [B or 1, Hs, NQ, MAXC], or None.
        col_cnt: int32 [B or 1, Hs, NQ]; None means that every entry of `col_idx` counts.

    `Hs` is 1, Hkv or Hq: query head h reads list `h * Hs // Hq`.
    """

    blk_idx: Tensor
    blk_cnt: Tensor
    block_q: int
    block_k: int
    col_idx: Tensor | None = None
    col_cnt: Tensor | None = None

    def mask(self, call: AttentionCall) -> Tensor:
        num_k = -(-call.kv_len // self.block_k)
        keep = _listed(self.blk_idx, self.blk_cnt, num_k).repeat_interleave(self.block_k, -1)[..., : call.kv_len]
        if self.col_idx is not None:
            keep = keep | _listed(self.col_idx, self.column_counts(), call.kv_len)
        keep = keep.repeat_interleave(self.block_q, -2)[..., : call.q_len, :]
        return keep.repeat_interleave(call.query.shape[1] // keep.shape[1], 1)

    def density(self, call: AttentionCall) -> Tensor:
        rows = torch.arange(self.blk_cnt.shape[-1], device=self.blk_idx.device)
        first = call.q_offset + rows * self.block_q
        last = (first + self.block_q - 1).clamp(max=call.kv_len - 1)
        start = self.blk_idx * self.block_k
        stop = (start + self.block_k).clamp(max=call.kv_len)
        listed = torch.arange(self.blk_idx.shape[-1], device=rows.device) < self.blk_cnt[..., None]
        kept = (_pairs(start, stop, first[:, None], last[:, None]) * listed).sum((-1, -2))
        if self.col_idx is not None:
            listed = torch.arange(self.col_idx.shape[-1], device=rows.device) < self.column_counts()[..., None]
            # a column is seen by the queries from its own place on
            pairs = (last[:, None] + 1 - torch.maximum(self.col_idx, first[:, None])).clamp(min=0)
            kept = kept + (pairs * listed).sum((-1, -2))
        total = call.q_len * call.q_offset + call.q_len * (call.q_len + 1) // 2
        return (kept / total).mean()

    def check(self, call: AttentionCall) -> None:
        """Raise ConfigError where the lists break the rules above. Waits for the device: for tests and `verify`.

        Kernels trust their plan: a key that is listed twice would count twice, and one past the end is read.
        """
        batch, heads, num_q = self.blk_cnt.shape
        rows, num_k = -(-call.q_len // self.block_q), -(-call.kv_len // self.block_k)
        if num_q != rows:
            raise ConfigError(f"Blocks lists {num_q} block{'s' * (num_q != 1)} of queries, the call has {rows}.")
        if batch not in (1, call.query.shape[0]) or heads not in (1, call.key.shape[1], call.query.shape[1]):
            queries = list(call.query.shape)
            raise ConfigError(f"Blocks has lists for {batch} rows and {heads} heads, queries are {queries}.")
        _check_lists("key blocks", self.blk_idx, self.blk_cnt, num_k)
        if self.col_idx is None:
            return
        count = self.column_counts()
        _check_lists("columns", self.col_idx, count, call.kv_len)
        counted = torch.arange(self.col_idx.shape[-1], device=count.device) < count[..., None]
        block = torch.where(counted, self.col_idx // self.block_k, 0).long()
        if bool((_listed(self.blk_idx, self.blk_cnt, num_k).gather(-1, block) & counted).any()):
            raise ConfigError("Blocks: columns lie in listed blocks, so that their keys would count twice.")

    def column_counts(self) -> Tensor:
        """int32 [B or 1, Hs, NQ]; only where there are columns."""
        assert self.col_idx is not None
        if self.col_cnt is not None:
            return self.col_cnt
        return self.col_idx.new_full(self.col_idx.shape[:-1], self.col_idx.shape[-1])

    def keeps_all(self, call: AttentionCall) -> bool:
        return False


def _check_lists(what: str, index: Tensor, count: Tensor, size: int) -> None:
    if {index.dtype, count.dtype} != {torch.int32} or index.shape[:-1] != count.shape:
        shapes = f"{index.dtype} {list(index.shape)} with counts {count.dtype} {list(count.shape)}"
        raise ConfigError(f"Blocks: {what} are {shapes}; both are int32, and counts lack the last dimension.")
    if int(count.min()) < 0 or int(count.max()) > index.shape[-1]:
        raise ConfigError(f"Blocks: {what} count from {int(count.min())} to {int(count.max())} of {index.shape[-1]}.")
    counted = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    ids = index[counted]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ConfigError(f"Blocks: {what} reach from {int(ids.min())} to {int(ids.max())}, there are {size}.")
    if bool(((index.diff() <= 0) & counted[..., 1:]).any()):
        raise ConfigError(f"Blocks: {what} are not ascending and distinct.")


def _listed(index: Tensor, count: Tensor, size: int) -> Tensor:
    """Lists [..., M] with counts [...] -> bool [..., size]."""
    valid = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    # slots past the count go to an extra column that is cut off again
    target = torch.where(valid, index.long(), size)
    return torch.zeros(*index.shape[:-1], size + 1, dtype=torch.bool, device=index.device).scatter_(-1, target, True)[
        ..., :size
    ]


def _pairs(start: Tensor, stop: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Causal pairs between keys [start, stop) and queries [first, last]."""

    def upto(row: Tensor) -> Tensor:
        """Pairs of all queries 0..row with these keys."""
        partial = (row + 1 - start).clamp(min=0)
        width = stop - start
        inside = torch.minimum(partial, width)
        return inside * (inside + 1) // 2 + (partial - inside) * width

    return upto(last) - upto(first - 1)


@dataclass(frozen=True, eq=False)
class Permuted:
    """A window in a permuted order, causal in the original one, joined with a local window and sinks.

    Query i sees key j <= i if `-after <= slot(i) - slot(j) <= before`, or `i - j < local`, or `j < sink`.

    Attributes:
        order: int64 [Hs, kv_len], the original position held by each slot; Hs is 1 or Hkv.
        before, after: how many slots before and after its own a query sees; both >= 0.
        local: last tokens seen in the original order, the query's own included (0 = none).
        sink: first tokens always seen.
        circular: slot distance wraps around.
    """

    order: Tensor
    before: int
    after: int
    local: int = 0
    sink: int = 0
    circular: bool = False

    def mask(self, call: AttentionCall) -> Tensor:
        rows = torch.arange(call.q_offset, call.kv_len, device=call.query.device)
        keep = self.rows(rows)
        return keep.repeat_interleave(call.query.shape[1] // keep.shape[0], 0)[None]

    def rows(self, rows: Tensor) -> Tensor:
        """bool [Hs, len(rows), kv_len]: the mask of some query positions, causality not applied."""
        n = self.order.shape[-1]
        slot = self.order.argsort(-1)
        distance = slot[:, rows, None] - slot[:, None, :]
        keep = (distance <= self.before) & (distance >= -self.after)
        if self.circular:
            keep |= (distance + n <= self.before) | (distance - n >= -self.after)
        keys = torch.arange(n, device=rows.device)
        return keep | (rows[:, None] - keys < self.local) | (keys < self.sink)

    def density(self, call: AttentionCall) -> Tensor:
        """Counted on 64 evenly spaced query rows."""
        count = min(_SAMPLED_ROWS, call.q_len)
        step = call.q_len / count
        rows = (call.q_offset + (torch.arange(count) + 0.5) * step).long().to(self.order.device)
        causal = torch.arange(self.order.shape[-1], device=rows.device) <= rows[:, None]
        return (self.rows(rows) & causal).sum() / (causal.sum() * self.order.shape[0])

    def nearest(self) -> int:
        """How many last tokens `local` and `sink` leave to a second part; 0: there is none.

        A token always sees itself, so a local window of one changes nothing and makes the second part a window.
        """
        return max(self.local, 1) if self.local or self.sink else 0

    def keeps_all(self, call: AttentionCall) -> bool:
        n = call.kv_len
        return min(self.before, self.after) >= n - 1 or self.local >= n or self.sink >= n


@dataclass(frozen=True)
class Neighbourhood:
    """Each patch of a vision tower sees the `kernel` patches nearest to it along each axis, in steps of a dilation.

    Patches i and j of one axis see each other only if `i % dilation == j % dilation`. An even kernel has one patch more
    before the query than behind it. Class and register tokens see everything and are seen by everything.

    Attributes:
        grid: rows and columns of patches, as in `AttentionCall.grid`.
        kernel: patches along a column and along a row, each at most `grid // dilation`.
        dilation: steps along a column and along a row.
        inward: at the border the window is moved inward, so that it always has `kernel` patches; else it is cut there.
    """

    grid: tuple[int, int]
    kernel: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    inward: bool = True

    def axes(self) -> tuple[Tensor, Tensor]:
        """bool [rows, rows] and [columns, columns], on the CPU: which places along an axis see each other."""
        rows, columns = (
            _axis(n, kernel, step, self.inward)
            for n, kernel, step in zip(self.grid, self.kernel, self.dilation, strict=True)
        )
        return rows, columns

    def mask(self, call: AttentionCall) -> Tensor:
        return _neighbours(self, call.kv_len, call.query.device)

    def density(self, call: AttentionCall) -> float:
        """Of all pairs: nothing is causal here."""
        rows, columns = self.axes()
        n = self.grid[0] * self.grid[1]
        return 1.0 - (n * n - int(rows.sum()) * int(columns.sum())) / call.kv_len**2

    def keeps_all(self, call: AttentionCall) -> bool:
        return all(bool(axis.all()) for axis in self.axes())


@lru_cache(maxsize=64)
def _axis(n: int, kernel: int, step: int, inward: bool) -> Tensor:
    place = torch.arange(n)
    # within the class of places that are a multiple of `step` apart, which has `size` members
    own, size = place // step, (n - place % step + step - 1) // step
    start = own - kernel // 2
    if inward:
        start = torch.minimum(start, size - kernel).clamp(min=0)
    same = place[:, None] % step == place % step
    return same & (own >= start[:, None]) & (own < start[:, None] + kernel)


@lru_cache(maxsize=16)
def _neighbours(plan: Neighbourhood, tokens: int, device: torch.device) -> Tensor:
    """bool [1, 1, tokens, tokens]."""
    rows, columns = (axis.to(device) for axis in plan.axes())
    first = tokens - plan.grid[0] * plan.grid[1]
    keep = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    keep[first:, first:] = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return keep[None, None]
