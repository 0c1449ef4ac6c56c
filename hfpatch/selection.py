"""What methods that choose blocks share: the grid of blocks, estimates of attention mass on it, and block lists.

Nothing here copies from an accelerator to the host. Memory grows with the prompt's length times a few rows, or with the
number of *blocks* squared; there is no [q_len, kv_len] tensor. Shapes: B batch, H heads, NQ query and NK key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfpatch.call import AttentionCall
from hfpatch.plan import Blocks

# Scores that exist at a time while rows are sampled: what stays near a CPU's cache, and what fills a GPU.
_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Bits of an fp32 that name its bin in a histogram: sign, exponent, 3 bits of mantissa; 1.0 is in bin 1016.
_BIN_SHIFT, _BINS = 20, 1017
# A mass of 1 as a whole number.
_UNITS = 2.0**40


@dataclass(frozen=True, eq=False)
class Grid:
    """How a call falls into blocks of queries and keys. Query blocks start at the call's first query.

    Where `q_offset` is no multiple of `block_q`, a query block may lie across two key blocks; both are its own.

    Attributes:
        first, last: int64 [NQ], key slots of the first and the last query of each query block.
        causal: bool [NQ, NK], blocks that hold a key which some query of the row may see.
        own: bool [NQ, NK], blocks that hold a query of the row.
    """

    block_q: int
    block_k: int
    q_offset: int
    first: Tensor
    last: Tensor
    causal: Tensor
    own: Tensor

    def diagonals(self, values: Tensor) -> Tensor:
        """[..., NK + 1] by block distance -1, 0, 1, ... -> [..., NQ, NK], whatever stands in the future.

        Distance is the key block of a row's first query minus the key block; needs `block_q == block_k`.
        """
        blocks = torch.arange(self.causal.shape[1], device=values.device)
        distance = self.first[:, None] // self.block_k - blocks
        return values[..., (distance + 1).clamp(min=0)]

    def plan(self, keep: Tensor, columns: Tensor | None = None, most_columns: int | None = None) -> Blocks:
        """The causal part of `keep`, with every row's own blocks in it, as a plan.

        Args:
            keep: bool [B or 1, Hs, NQ, NK].
            columns: bool [B or 1, Hs, kv_len], single keys for all rows; those inside listed blocks are left out.
            most_columns: how many there are at most in a list.
        """
        keep = (keep & self.causal) | self.own
        index, count = compress(keep)
        if columns is None:
            return Blocks(index, count, self.block_q, self.block_k)
        ids, found = compress(columns)
        ids = ids[..., :most_columns]
        slot = torch.arange(ids.shape[-1], device=ids.device)
        # [B, Hs, NQ, C]: not past the list's end, not in the future, not in a listed block
        ids = torch.where(slot < found[..., None], ids, 0)[:, :, None]
        block = (ids // self.block_k).long().expand(*keep.shape[:3], -1)
        wanted = (slot < found[..., None])[:, :, None] & (ids <= self.last[:, None]) & ~keep.gather(-1, block)
        col_idx, col_cnt = compress(wanted, ids)
        return Blocks(index, count, self.block_q, self.block_k, col_idx, col_cnt)


def grid_of(call: AttentionCall, block_q: int, block_k: int) -> Grid:
    """The grid of a call without padding."""
    return _grid(call.q_len, call.kv_len, block_q, block_k, call.query.device)


@lru_cache(maxsize=32)
def _grid(q_len: int, kv_len: int, block_q: int, block_k: int, device: torch.device) -> Grid:
    offset = kv_len - q_len
    first = offset + torch.arange(0, q_len, block_q, device=device)
    last = (first + block_q - 1).clamp(max=kv_len - 1)
    start = torch.arange(0, kv_len, block_k, device=device)
    causal = start <= last[:, None]
    return Grid(block_q, block_k, offset, first, last, causal, causal & (start + block_k > first[:, None]))


def compress(keep: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """bool [..., N] -> (int32 [..., M] with the kept positions first and ascending, int32 [...] how many).

    M is N, or the longest list where that is known without waiting for a device. `ids`, broadcastable to `keep`, stand
    for the positions.
    """
    size = keep.shape[-1]
    position = torch.arange(size, device=keep.device)
    ids = position if ids is None else ids
    kept = keep.cumsum(-1)
    count = kept[..., -1].int()
    # a permutation: kept ones to the front, the others to the back
    slot = torch.where(keep, kept - 1, size - 1 - position + kept)
    index = torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    index.scatter_(-1, slot, ids.int().expand(keep.shape))
    return (index[..., : int(count.max())] if count.device.type == "cpu" else index), count


# Which entries --------------------------------------------------------------------------------------------------------


def cover(mass: Tensor, need: Tensor) -> Tensor:
    """The fewest largest entries of each row whose sum reaches `need`: bool [..., N]; none where nothing is needed.

    Args:
        mass: fp32 [..., N], not negative.
        need: [..., 1].
    """
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.empty_like(mass, dtype=torch.bool).scatter_(-1, index, before < need)


def top(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` [..., 1] largest entries of each row of `scores` [..., N], ties by position: bool [..., N]."""
    index = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < count
    return torch.empty_like(scores, dtype=torch.bool).scatter_(-1, index, chosen.expand(scores.shape))


def count_to_cover(mass: Tensor, share: float) -> Tensor:
    """How many of the largest entries make up `share` of a row: int64 [...]. Never too few; no sort.

    A histogram with eight bins an octave: inside the bin where the sum crosses, entries count as their mean, which the
    largest of them exceed.

    Args:
        mass: fp32 [..., N], not negative, each row summing to 1 at most.
        share: 0 to 1.
    """
    where = (mass.view(torch.int32) >> _BIN_SHIFT).long()
    # whole numbers: their sum does not depend on the order in which a GPU adds them
    units = (mass * _UNITS).long()
    shape = (*mass.shape[:-1], _BINS)
    sums = torch.zeros(shape, dtype=torch.int64, device=mass.device).scatter_add_(-1, where, units)
    counts = torch.zeros_like(sums).scatter_add_(-1, where, torch.ones_like(where))
    # from the bin of the largest values down
    sums, counts = sums.flip(-1), counts.flip(-1)
    need = (sums.sum(-1, keepdim=True) * share).ceil().long().clamp(min=1)
    total = sums.cumsum(-1)
    crossing = (total < need).sum(-1, keepdim=True).clamp(max=_BINS - 1)
    before = (total - sums).gather(-1, crossing)
    entries = counts.gather(-1, crossing)
    mean = sums.gather(-1, crossing) / entries
    inside = torch.minimum(((need - before) / mean).ceil(), entries)
    return ((counts.cumsum(-1) - counts).gather(-1, crossing) + inside.long())[..., 0]


# Estimates ------------------------------------------------------------------------------------------------------------


def block_sum(x: Tensor, size: int, dim: int = -1) -> Tensor:
    """Sums over `size` neighbours along `dim`, fp32; the last ones may be fewer."""
    dim %= x.ndim
    whole = x.shape[dim] // size
    parts = []
    if whole:
        blocks = x.narrow(dim, 0, whole * size)
        parts.append(blocks.reshape(*x.shape[:dim], whole, size, *x.shape[dim + 1 :]).sum(dim + 1, dtype=torch.float32))
    if rest := x.shape[dim] - whole * size:
        parts.append(x.narrow(dim, whole * size, rest).sum(dim, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, dim)


def block_mean(x: Tensor, size: int) -> Tensor:
    """[B, H, n, D] -> fp32 [B, H, NB, D]: means over `size` tokens; the last block has what is left."""
    n = x.shape[2]
    start = torch.arange(0, n, size, device=x.device)
    return block_sum(x, size, 2) / (n - start).clamp(max=size)[:, None]


def dots(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """scale * q·k of every query head with its KV head: [B, Hq, n, D], [B, Hkv, m, D] -> [B, Hq, n, m]."""
    batch, heads, rows, dim = query.shape
    # the query heads of one KV head are so many rows: keys are not repeated
    packed = query.reshape(batch * key.shape[1], -1, dim)
    scores = torch.baddbmm(query.new_zeros(1), packed, key.flatten(0, 1).mT, beta=0, alpha=scale)
    return scores.view(batch, heads, rows, -1)


def per_list(x: Tensor, num_lists: int) -> Tensor:
    """[B, Hq, ...] -> [B, num_lists, ...]: the largest value in each group of query heads that share a list."""
    return x if x.shape[1] == num_lists else x.reshape(x.shape[0], num_lists, -1, *x.shape[2:]).amax(2)


def normalised(mass: Tensor) -> Tensor:
    """Rows [..., N] that sum to 1, or to 0."""
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def line_mass(call: AttentionCall, rows: int) -> tuple[Tensor, Tensor]:
    """Mean attention of the last `rows` queries by key and by distance: two fp32 [B, Hq, kv_len], each summing to 1.

    The first is read by key slot ("vertical"), the second by `slot of the query - slot of the key` ("slash"). Learned
    sinks take no part.
    """
    rows = min(rows, call.q_len)
    batch, heads, _, _ = call.query.shape
    n, device = call.kv_len, call.query.device
    vertical, slash = torch.zeros(2, batch, heads, n, dtype=torch.float32, device=device)
    step = min(max(_SCORES.get(device.type, 1 << 20) // (batch * heads * n), 8), rows)
    for start in range(call.q_len - rows, call.q_len, step):
        stop = min(start + step, call.q_len)
        count, seen = stop - start, call.q_offset + stop
        scores = dots(call.query[:, :, start:stop], call.key[:, :, :seen], call.scaling)
        if call.softcap is not None:
            scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
        future = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
        scores[..., seen - count :].masked_fill_(future, float("-inf"))
        probs = torch.softmax(scores, -1, dtype=torch.float32)
        vertical[..., :seen] += probs.sum(2)
        slash[..., :seen] += _sum_by_distance(probs)
    return vertical / rows, slash / rows


def _sum_by_distance(probs: Tensor) -> Tensor:
    """[B, H, rows, n] of the last `rows` queries on n keys -> [B, H, n]: sums over the rows of equal distances."""
    rows, n = probs.shape[-2:]
    # a stride of one row and one column walks along a diagonal
    near = _diagonal_sums(probs, n - rows + 1)
    if rows == 1:
        return near
    # the largest distances lie within a corner, and some rows do not reach them
    return torch.cat([near, _diagonal_sums(pad(probs[..., : rows - 1], (rows - 1, 0)), rows - 1)], -1)


def _diagonal_sums(probs: Tensor, count: int) -> Tensor:
    """Sums along `count` neighbouring diagonals of [B, H, rows, width], the one from the top left corner last."""
    size = (*probs.shape[:-1], count)
    strides = (*probs.stride()[:2], probs.shape[-1] + 1, 1)
    return probs.as_strided(size, strides).sum(2).flip(-1)
