"""Span search: jump search over the prefix, in spans that grow with their distance from the query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan
from hfpatch.selection import block_mean, dots, grid_of, top
from hfpatch.selectors import select_layers

# Scores that exist at a time: 64 MiB in fp64.
_SCORES = 1 << 23


@register_patcher
@dataclass(frozen=True, kw_only=True)
class SpanSearch(Method):
    """Keep a window, the first tile, and of the spans between them the `k` whose mean key fits the queries best.

    Spans end at distances 1, 2^(1/p), 3^(1/p), ... from the query, in whole tiles, and leave no position out. There are
    about n^p of them, the farthest about n^(1-p) / p tokens long. One choice serves `tile` neighbouring queries, by
    their mean. While spans are no longer than a tile (up to some 9,000 tokens with the defaults) this is MoBA by tiles
    with a window and sinks.

    It has the shape of Superlinear attention and none of its training: that model searches with a projection of its
    own, by single keys, and mixes spans by a gate. None of its published numbers apply here.

    Decode steps choose anew, from tile means of all cached keys, which saves attention but not the reading of keys.

    Source: shape of the spans: Superlinear Multi-Step Attention, arXiv 2601.18401; the training-free form is ours.
    """

    name: ClassVar[str] = "span_search"
    aliases: ClassVar[tuple[str, ...]] = ("span-search",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="window, sinks and the best spans between them, longer with distance; training-free, ours",
        paper="ours, in the shape of Superlinear Multi-Step Attention, arXiv 2601.18401",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"k": 2, "window": 5, "sinks": 2, "tile": 2, "dense_below": 0},
        {"k": 1, "window": 6, "sinks": 0, "tile": 4, "p": 0.5, "share": "kv", "dense_below": 0},
        {"k": 2, "window": 4, "sinks": 1, "tile": 2, "full_layers": "0", "decode": "full", "dense_below": 0},
    )

    p: float = option(0.6, "spans number about n^p; more of them are shorter", ge=0.1, le=1)
    k: int = option(8, "spans that a tile of queries sees", ge=1)
    window: int = option(1024, "last tokens seen, rounded up to whole tiles", ge=1)
    sinks: int = option(4, "first tokens always seen, rounded up to whole tiles", ge=0)
    tile: int = option(64, "tokens in a tile, of queries and of keys", ge=1)
    share: str = option(
        "head", "a choice per query head, or per KV head by the sum over its heads", choices=("head", "kv")
    )
    full_layers: str | int | tuple[int, ...] | None = option(None, 'dense layers, e.g. "last:3", [1, 5]')
    decode: str = option("plan", "decode steps: the same rule, or the whole cache", choices=("plan", "full"))
    dense_below: int = option(8192, "sequences shorter than this run dense; tokens", ge=0)

    @classmethod
    def neutral(cls) -> Self:
        return cls(window=1 << 30)

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        if self.full_layers is not None and call.layer_idx in select_layers(self.full_layers, call.num_layers):
            return Dense()
        if (call.phase == "decode" and self.decode == "full") or self.window >= call.kv_len:
            return Dense()
        size, device = self.tile, call.query.device
        block_q = 1 if call.q_len == 1 else size
        grid = grid_of(call, block_q, size)
        cuts = _cuts(self.p, self.window, self.sinks, size, call.q_offset, call.q_len, block_q, device)
        if self.k >= cuts.shape[1] - 1:
            return Dense()
        query = block_mean(call.query, block_q)
        if self.share == "kv":
            query = query.view(query.shape[0], call.key.shape[1], -1, *query.shape[2:]).mean(2)
        means = block_mean(call.key, size)
        place = torch.arange(means.shape[2], device=device)
        # cuts descend; span u holds the tiles cuts[u + 1] < tile <= cuts[u]
        between = (place <= cuts[:, :1]) & (place > cuts[:, -1:])
        span = torch.searchsorted(-cuts, -place.expand(len(cuts), -1), right=True) - 1
        keep = torch.empty(*query.shape[:3], len(place), dtype=torch.bool, device=device)
        step = max(_SCORES // (query.shape[0] * query.shape[1] * len(place)), 1)
        for rows in (slice(start, start + step) for start in range(0, query.shape[2], step)):
            chosen = self._choose(dots(query[:, :, rows], means), cuts[rows])
            of_tile = span[rows].clamp(min=0, max=chosen.shape[-1] - 1).expand(*chosen.shape[:3], -1)
            keep[:, :, rows] = chosen.gather(-1, of_tile)
        return grid.plan(keep | ~between)

    def _choose(self, scores: Tensor, cuts: Tensor) -> Tensor:
        """The best spans of each row, the nearer of equals: bool [B, Hs, rows, spans].

        Args:
            scores: of tiles, fp32 [B, Hs, rows, tiles].
            cuts: int64 [rows, spans + 1].
        """
        # a sum over a span is a difference of running sums, which fp32 would blur
        upto = pad(scores.cumsum(-1, dtype=torch.float64), (1, 0))
        sums = upto.gather(-1, (cuts + 1).expand(*scores.shape[:3], -1))
        tiles = cuts[:, :-1] - cuts[:, 1:]
        means = (sums[..., :-1] - sums[..., 1:]) / tiles.clamp(min=1)
        return top(means.masked_fill(tiles == 0, float("-inf")), self.k)


def stripe(t: int, p: float) -> int:
    """Distance of the t-th cut: floor(t^(1/p)), exact where that is a whole number."""
    return math.floor(math.pow(t, 1 / p) + 1e-9)


@lru_cache(maxsize=64)
def _cuts(
    p: float, window: int, sinks: int, size: int, q_offset: int, q_len: int, block_q: int, device: torch.device
) -> Tensor:
    """Last tile of each span, the nearest first, and the last tile of the sinks: int64 [NQ, spans + 1], descending.

    Where fewer tiles are left, neighbours are equal and the span between them is empty.
    """
    kv_len = q_offset + q_len
    t = 0
    # the window's edge, on the grid of the cuts
    while stripe(t + 1, p) - 1 < window:
        t += 1
    distances: list[int] = []
    while not distances or distances[-1] <= kv_len:
        t += 1
        distances.append(stripe(t, p))
    first = q_offset + torch.arange(0, q_len, block_q)
    last = (first + block_q - 1).clamp(max=kv_len - 1)
    floor = -(-sinks // size) - 1
    # the tile before the window's first; no span where the window meets the sinks
    edge = ((first - window + 1).clamp(min=0) // size - 1).clamp(min=floor)
    cuts = (last[:, None] + 1 - torch.tensor(distances)).div(size, rounding_mode="floor")
    cuts = torch.minimum(cuts.clamp(min=floor), edge[:, None])
    cuts = torch.cat([edge[:, None], cuts, torch.full_like(edge, floor)[:, None]], 1)
    # cuts in one tile are one cut: keep the places where some row has a span
    longest = (cuts[:, :-1] != cuts[:, 1:]).any(0)
    kept = torch.cat([longest.new_ones(1), longest])
    return cuts[:, kept].to(device, non_blocking=True)
