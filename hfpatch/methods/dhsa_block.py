"""The second version of dynamic hierarchical sparse attention: a share of fixed blocks for each block of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan
from hfpatch.selection import Grid, block_mean, block_sum, dots, grid_of, line_mass, per_list, top


@register_patcher
@dataclass(frozen=True, kw_only=True)
class DynamicHierarchicalBlocks(Method):
    """Keep, for each block of queries, the same number of key blocks: the share `density` of all blocks of the prompt.

    `generator` says which: "topk" those with the largest products of block means; "a" the first block besides; "vs"
    those that the most important key columns and diagonals run through, by the attention of the last query block;
    "vsb" the same from block means of the last query block, for very long prompts. The blocks of the queries
    themselves always stay; "vs" and "vsb" also keep the first block, and the last query block sees everything.

    `density` is of all key blocks, as in the paper: a row that sees no more blocks than that is dense, so that 0.125
    keeps 0.23 of the causal pairs. Unlike in the official code, blocks in the future are never ranked, and "vsb" ranks
    by a softmax, not by products that may be negative. Prompts of one block, chunks shorter than a query block and
    decode steps are dense. Lists per KV group take the largest score of the group's heads.

    Source: Dynamic Hierarchical Sparse Attention for Memory-Constrained LLM Inference, arXiv 2510.24606v2, and its
    code.
    """

    name: ClassVar[str] = "dhsa_block"
    aliases: ClassVar[tuple[str, ...]] = ("dhsa-block", "dhsa2")
    card: ClassVar[Card] = Card(
        family="attention",
        summary="a fixed share of key blocks, by block means or by columns and diagonals",
        paper="Dynamic Hierarchical Sparse Attention for Memory-Constrained LLM Inference, arXiv 2510.24606v2",
        phase="prefill",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"generator": "topk", "density": 0.2, "block_q": 4, "block_k": 2},
        {"generator": "a", "density": 0.3, "block_q": 2, "block_k": 3, "share": "group"},
        {"generator": "vs", "density": 0.3, "block_q": 4, "block_k": 2},
        {"generator": "vsb", "density": 0.3, "block_q": 2, "block_k": 2, "share": "group"},
    )

    density: float = option(0.125, "share of all key blocks that each row keeps; 1 is dense", gt=0, le=1)
    generator: str = option("vs", "how blocks are chosen", choices=("topk", "a", "vs", "vsb"))
    block_q: int = option(128, "queries in a block", ge=1)
    block_k: int = option(32, "keys in a block", ge=1)
    share: str = option(
        "head", "block lists per query head, or per group of heads with one KV head", choices=("head", "group")
    )
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    @property
    def reads_ahead(self) -> bool:
        """Tokens after a query's own block take part in choosing what the query sees."""
        return self.generator in ("vs", "vsb")

    @classmethod
    def neutral(cls) -> Self:
        return cls(density=1.0)

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        grid = grid_of(call, self.block_q, self.block_k)
        blocks = grid.causal.shape[1]
        kept = max(1, int(self.density * blocks))
        if call.phase == "decode" or call.q_len < self.block_q or blocks == 1 or kept == blocks:
            return Dense()
        lists = call.query.shape[1] if self.share == "head" else call.key.shape[1]
        forced = grid.own.clone()
        if self.generator != "topk":
            forced[:, 0] = True
        if self.generator in ("vs", "vsb"):
            forced[-1] = grid.causal[-1]
        scores = {"vs": self._by_lines, "vsb": self._by_block_lines}.get(self.generator, self._by_means)(
            call, grid, lists, kept
        )
        room = (kept - forced.sum(-1, keepdim=True)).clamp(min=0)
        return grid.plan(forced | top(scores.masked_fill(forced | ~grid.causal, float("-inf")), room))

    def _by_means(self, call: AttentionCall, grid: Grid, lists: int, kept: int) -> Tensor:
        """Products of block means: fp32 [B, lists, NQ, NK]."""
        return per_list(dots(block_mean(call.query, self.block_q), block_mean(call.key, self.block_k)), lists)

    def _by_lines(self, call: AttentionCall, grid: Grid, lists: int, kept: int) -> Tensor:
        """Mass of the best columns in each block and of the best diagonals that touch it: fp32 [B, lists, NQ, NK]."""
        tokens, size, n = kept * self.block_k, self.block_k, call.kv_len
        vertical, slash = (per_list(x, lists) for x in line_mass(call, self.block_q))
        columns = block_sum(_best(vertical, tokens - tokens // 2), size)
        upto = pad(_best(slash, tokens // 2).cumsum(-1), (1, 0))
        start = torch.arange(0, grid.causal.shape[1] * size, size, device=slash.device)
        # the distances from any query of a row to any key of a block
        high = (grid.last[:, None] - start + 1).clamp(0, n)
        low = (grid.first[:, None] - start - size + 1).clamp(0, n)
        return columns[:, :, None] + upto[..., high] - upto[..., low]

    def _by_block_lines(self, call: AttentionCall, grid: Grid, lists: int, kept: int) -> Tensor:
        """The same in whole blocks, from block means of the last queries: fp32 [B, lists, NQ, NK]."""
        query = call.query[:, :, -self.block_q :].mean(2, keepdim=True, dtype=torch.float32)
        mass = torch.softmax(dots(query, block_mean(call.key, self.block_k), call.scaling)[:, :, 0], -1)
        mass = per_list(mass, lists)
        # by distance from the block of the last query
        columns, diagonals = _best(mass, kept - kept // 2), _best(mass.flip(-1), kept // 2)
        blocks = torch.arange(mass.shape[-1], device=mass.device)
        distance = grid.last[:, None] // self.block_k - blocks
        return columns[:, :, None] + diagonals[..., distance.clamp(min=0)]


def _best(mass: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row of `mass` [..., n], zeros elsewhere."""
    values, index = mass.topk(min(count, mass.shape[-1]), -1)
    return torch.zeros_like(mass).scatter_(-1, index, values)
