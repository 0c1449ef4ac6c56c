"""FlexPrefill: every head decides for every prompt which pattern it uses and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan
from hfpatch.selection import (
    Grid,
    block_mean,
    block_sum,
    count_to_cover,
    cover,
    dots,
    grid_of,
    line_mass,
    normalised,
    per_list,
    top,
)


@register_patcher
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Keep the fewest blocks whose estimated attention mass reaches `gamma`, with a pattern chosen per head.

    The last `block_size` queries give a true sample of attention. Where block means of queries and keys agree with it
    (Jensen-Shannon distance below `tau`), the head trusts them everywhere ("query-aware"); otherwise it keeps key
    columns and diagonals of the sample. The first key block and the diagonal always stay, and no row has fewer than
    `min_budget` tokens. Prompts up to `min_budget` or two blocks, chunks shorter than a block and decode steps are
    dense. Lists per KV group take the largest mass of the group's heads.

    Unlike in the official code, distances are pooled from the diagonal on, an underflow cannot turn a query-aware head
    into another one, `block_size=64` covers as much as 128, and gamma = 1 is dense. Learned sinks are not in the
    sample, nor softcaps in the pooled scores.

    Source: FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference,
    arXiv 2502.20766, section 3.
    """

    name: ClassVar[str] = "flexprefill"
    aliases: ClassVar[tuple[str, ...]] = ("flex-prefill",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="blocks that reach a share of the attention mass, pattern and budget chosen per head and prompt",
        paper="FlexPrefill: A Context-Aware Sparse Attention Mechanism, arXiv 2502.20766",
        phase="prefill",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"gamma": 0.5, "block_size": 4, "min_budget": 4, "max_budget": 8},
        {"gamma": 0.6, "tau": 1.0, "block_size": 3, "min_budget": 3, "share": "group"},
        {"gamma": 0.3, "tau": 0.0, "block_size": 4, "min_budget": 4, "max_budget": 4, "wide_slash": True},
    )

    gamma: float = option(0.9, "estimated attention mass to keep; 1 is dense", gt=0, le=1)
    tau: float = option(0.1, "distance below which block means are trusted; 0: never, above 0.833: always", ge=0)
    block_size: int = option(128, "tokens in a block, of queries and of keys", ge=1)
    min_budget: int = option(1024, "least tokens kept in every row; below it heads collapse", ge=1)
    max_budget: int | None = option(None, "most tokens in key columns, and in diagonals, of a head", ge=1)
    wide_slash: bool = option(False, "also the second block diagonal that a kept diagonal crosses", paper=False)
    share: str = option(
        "head", "block lists per query head, or per group of heads with one KV head", choices=("head", "group")
    )
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ConfigError(
                f"{self.name}: max_budget={self.max_budget} is below min_budget={self.min_budget}. Raise it, or lower "
                "min_budget."
            )

    @property
    def reads_ahead(self) -> bool:
        """Tokens after a query's own block take part in choosing what the query sees."""
        return True

    @classmethod
    def neutral(cls) -> Self:
        return cls(gamma=1.0)

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        size = self.block_size
        least = -(-self.min_budget // size)
        if call.phase == "decode" or self.gamma >= 1 or call.q_len < size or call.kv_len <= max(2, least) * size:
            return Dense()
        grid = grid_of(call, size, size)
        blocks = grid.causal.shape[1]
        most = blocks if self.max_budget is None else min(-(-self.max_budget // size), blocks)
        lists = call.query.shape[1] if self.share == "head" else call.key.shape[1]
        vertical, slash = (normalised(per_list(x, lists)) for x in line_mass(call, size))
        columns, diagonals = block_sum(vertical, size), block_sum(slash, size)
        keys = block_mean(call.key, size)
        # [B, lists, 1]
        aware = self._query_aware(call, keys, columns)[..., None]
        n_columns, n_diagonals = (
            torch.where(aware, least, (count_to_cover(x, self.gamma) // size + 1).clamp(least, most)[..., None])
            for x in (vertical, slash)
        )
        columns[..., 0] = diagonals[..., 0] = float("inf")
        keep = top(columns, n_columns)[:, :, None] | grid.diagonals(
            self._by_distance(grid, top(diagonals, n_diagonals))
        )
        # of the best diagonals of all, early rows may have none
        in_row = grid.diagonals(torch.cat([diagonals[..., :1], diagonals], -1))
        keep = keep | top(in_row.masked_fill(~grid.causal, float("-inf")), least)
        if self.tau > 0:
            keep = keep | (aware[..., None] & self._pooled(call, grid, keys, lists))
        return grid.plan(keep)

    def _query_aware(self, call: AttentionCall, keys: Tensor, columns: Tensor) -> Tensor:
        """bool [B, lists]: do pooled scores of the last queries agree with their true attention `columns`, by block?"""
        query = call.query[:, :, -self.block_size :].mean(2, keepdim=True, dtype=torch.float32)
        pooled = torch.softmax(dots(query, keys, call.scaling)[:, :, 0], -1)
        pooled = normalised(per_list(pooled, columns.shape[1]))
        middle = (pooled + columns) / 2
        # xlogy is 0 where a mass underflows to 0
        pair = torch.stack([pooled, columns])
        divergence = torch.xlogy(pair, pair / middle).nan_to_num(0.0).sum((0, -1)) / 2
        return divergence.clamp(min=0).sqrt() < self.tau

    def _by_distance(self, grid: Grid, kept: Tensor) -> Tensor:
        """Distances in blocks, bool [B, lists, NK] from 0 on -> [B, lists, NK + 1] from -1 on, see `Grid.diagonals`."""
        if self.wide_slash:
            kept = torch.cat([kept[..., :1], kept[..., 1:] | kept[..., :-1]], -1)
        by_distance = torch.cat([kept[..., :1], kept], -1)
        if grid.q_offset % self.block_size:
            # a query block across two key blocks has two distances to every key block
            by_distance[..., 1:-1] |= kept[..., 1:]
        return by_distance

    def _pooled(self, call: AttentionCall, grid: Grid, keys: Tensor, lists: int) -> Tensor:
        """bool [B, lists, NQ, NK]: the blocks that reach gamma of all rows together, by block means."""
        scores = dots(block_mean(call.query, self.block_size), keys, call.scaling)
        mass = torch.softmax(scores.masked_fill_(~grid.causal, float("-inf")), -1)
        mass = normalised(per_list(mass, lists))
        need = torch.full_like(mass[:, :, 0, :1], self.gamma * mass.shape[2])
        return cover(mass.flatten(-2), need).view_as(mass)
