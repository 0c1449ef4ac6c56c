"""MoBA: each query attends to the blocks whose mean key it likes best, and to its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Blocks, Dense, Plan
from hfpatch.selection import block_mean, dots
from hfpatch.selectors import select_layers

# Gate scores that exist at a time: 64 MiB in fp32.
_SCORES = 1 << 24
# Prompts up to here take blocks of 128 tokens, longer ones of 512.
_SHORT = 32768


@register_patcher
@dataclass(frozen=True, kw_only=True)
class MixtureOfBlocks(Method):
    """Keep the query's own block and the `topk - 1` earlier blocks whose mean key has the largest product with it.

    `select="query"` is the published rule, a choice for every query; no kernel runs it fast. "tile" chooses once for
    `tile` neighbouring queries, by their mean, so that blocks can be skipped. Numbers of the two are not comparable.
    A chunk of a prompt that starts inside a block gives the tile across the border both blocks as its own.

    Blocks are counted from the first token. The gate is in fp32, without scaling or softcap. As published, only prefill
    is sparse; `decode="moba"` chooses in every decode step too, from all cached keys, which saves attention but not the
    reading of keys. Unlike in the official code, `topk=1` is local to the block, prompts in chunks stay sparse, and the
    attention uses the model's own scale. The authors train models with MoBA; used without training it is a baseline,
    and `sink_block` is then needed.

    Source: MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189, section 2.
    """

    name: ClassVar[str] = "moba"
    aliases: ClassVar[tuple[str, ...]] = ("mixture-of-block-attention",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="own block and the best earlier blocks by their mean key, per query or tile of queries",
        paper="MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"block": 4, "topk": 2, "tile": 4},
        {"block": 5, "topk": 3, "select": "query", "decode": "moba"},
        {"block": 3, "topk": 2, "select": "query", "gqa": "shared", "sink_block": True, "local_blocks": 2},
        {"block": 4, "topk": 2, "tile": 2, "sink_block": True, "full_layers": "last:1", "decode": "moba"},
    )

    block: int | None = option(None, f"tokens in a block; None = 128 up to {_SHORT} tokens, 512 beyond", ge=1)
    topk: int = option(8, "blocks that a query sees, its own included; 1 = its own only", ge=1)
    select: str = option(
        "tile", "a choice of blocks for every query, or for a tile of queries, by their mean",
        choices=("query", "tile"), paper="query",
    )  # fmt: skip
    tile: int = option(64, 'queries in a tile, for select="tile"; should divide block', ge=1)
    gqa: str = option(
        "per_head", "lists per query head, or per KV head by the mean over its heads", choices=("per_head", "shared")
    )
    sink_block: bool = option(False, "keep the first block besides; recommended without training")
    local_blocks: int = option(1, "blocks always kept, the query's own and those before it, besides topk - 1", ge=1)
    full_layers: str | int | tuple[int, ...] | None = option(None, 'dense layers, e.g. "last:3", [1, 5]')
    decode: str = option("full", "decode steps: the whole cache, or the same rule", choices=("full", "moba"))
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    @property
    def decode_invariant(self) -> bool:
        # a tile's mean depends on where the chunk began
        return self.decode == "moba" and self.select == "query"

    @classmethod
    def neutral(cls) -> Self:
        return cls(topk=1 << 30)

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        if self.full_layers is not None and call.layer_idx in select_layers(self.full_layers, call.num_layers):
            return Dense()
        size = self.block or (128 if call.kv_len <= _SHORT else 512)
        always = self.local_blocks + self.sink_block
        if (call.phase == "decode" and self.decode == "full") or self.topk - 1 + always >= -(-call.kv_len // size):
            return Dense()
        block_q = 1 if self.select == "query" or call.q_len == 1 else self.tile
        query, device = call.query, call.query.device
        if self.gqa == "shared":
            shape = (query.shape[0], call.key.shape[1], -1, *query.shape[2:])
            query = query.reshape(shape).mean(2, dtype=torch.float32)
        first = call.q_offset + torch.arange(0, call.q_len, block_q, device=device)
        last = (first + block_q - 1).clamp(max=call.kv_len - 1)
        # a tile may lie across several blocks, unless both have common borders
        aligned = size % block_q == 0 and call.q_offset % block_q == 0
        near = self.local_blocks + (0 if aligned else (block_q + size - 2) // size)
        lists = self._lists(block_mean(query, block_q), block_mean(call.key, size), first // size, last // size, near)
        return _plan(*lists, last, block_q, size)

    def _lists(self, query: Tensor, means: Tensor, first: Tensor, last: Tensor, near: int) -> tuple[Tensor, Tensor]:
        """Kept blocks, ascending, int64 [B, Hs, NQ, M], and how many they are, int64 [B, Hs, NQ].

        Args:
            query: fp32 [B, Hs, NQ, D].
            means: fp32 [B, Hkv, NK, D].
            first, last: int64 [NQ], blocks of the first and of the last query of each row.
            near: how many blocks a row keeps at most without choosing, the sink block aside.
        """
        blocks, device = means.shape[2], means.device
        place, back = torch.arange(blocks, device=device), torch.arange(near, device=device)
        step = max(_SCORES // (query.shape[0] * query.shape[1] * blocks), 1)
        pieces = []
        for rows in (slice(start, start + step) for start in range(0, query.shape[2], step)):
            # blocks from here on are kept anyway
            edge = (first[rows] - self.local_blocks + 1).clamp(min=0)[:, None]
            routed = (place >= self.sink_block) & (place < edge)
            scores = dots(query[:, :, rows], means).masked_fill_(~routed, float("-inf"))
            picked = scores.topk(min(self.topk - 1, blocks), -1).indices
            # there may be fewer to choose from than topk - 1
            chosen = [torch.where(routed.expand_as(scores).gather(-1, picked), picked, blocks)]
            kept = last[rows, None] - back
            chosen.append(torch.where(kept >= edge, kept, blocks).expand(*scores.shape[:3], -1))
            if self.sink_block:
                chosen.append(torch.where(edge > 0, 0, blocks).expand(*scores.shape[:3], -1))
            pieces.append(torch.cat(chosen, -1).sort(-1).values)
        index = torch.cat(pieces, 2)
        return index, (index < blocks).sum(-1)


def _plan(index: Tensor, count: Tensor, last: Tensor, block_q: int, size: int) -> Blocks:
    """Lists of blocks of `size` tokens, in the sizes that kernels like; without what lies after the last query."""
    block_k = math.gcd(size, 256)
    if block_k < 16:
        block_k = size
    parts = size // block_k
    # the row's own block is the last one listed; its parts may lie in the future, or past the end
    count = count * parts - (parts - 1 - last // block_k % parts)
    index = (index[..., None] * parts + torch.arange(parts, device=index.device)).flatten(-2)
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    return Blocks(torch.where(listed, index, 0).int(), count.int(), block_q, block_k)
