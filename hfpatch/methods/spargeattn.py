"""SpargeAttn's first stage: pooled scores where blocks are alike inside, everything where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan
from hfpatch.selection import block_mean, cover, dots, grid_of, normalised, per_list, top


@register_patcher
@dataclass(frozen=True, kw_only=True)
class SpargeAttn(Method):
    """Keep the key blocks with the largest pooled scores; blocks whose tokens differ too much are always computed.

    A block stands for its tokens only if these are alike: if the mean cosine of all pairs in it is above `similarity`.
    A query block that is not sees everything, a key block that is not is seen by all. Among the other blocks each row
    keeps a share `keep` of its causal blocks (`select="topk"`), or those that reach a share `mass` of a softmax over
    pooled scores (`"mass"`, the official cdf mode). The diagonal always stays. Chunks shorter than a query block and
    decode steps are dense.

    This is the selection only: the second stage, which skips P·V inside the kernel, and the INT8 arithmetic are not
    part of it. Softcaps and learned sinks are not in the pooled scores.

    Source: SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference,
    arXiv 2502.18137, section 3.
    """

    name: ClassVar[str] = "spargeattn"
    aliases: ClassVar[tuple[str, ...]] = ("sparge", "sparge-attention")
    card: ClassVar[Card] = Card(
        family="attention",
        summary="key blocks by pooled scores, except where a block's tokens are not alike",
        paper="SpargeAttention: Accurate and Training-free Sparse Attention, arXiv 2502.18137",
        phase="prefill",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"keep": 0.4, "similarity": -2.0, "block_q": 4, "block_k": 2, "smooth_k": False},
        {"select": "mass", "mass": 0.4, "similarity": 0.1, "block_q": 3, "block_k": 3, "share": "group"},
    )

    select: str = option("topk", "a fixed share of the blocks, or a share of the pooled mass", choices=("topk", "mass"))
    keep: float = option(0.5, 'share of the blocks that a row keeps, for select="topk"; 1 is dense', gt=0, le=1)
    mass: float = option(0.98, 'share of the pooled mass that a row keeps, for select="mass"', gt=0, le=1)
    similarity: float | None = option(
        None, "least mean cosine of a block that is trusted; None = -0.1 for topk, 0.6 for mass", ge=-2, le=2
    )
    share_of: str = option(
        "causal",
        'blocks that `keep` is a share of: those the row may see, or all, as in the official code ("all")',
        choices=("causal", "all"),
        paper="all",
    )
    smooth_k: bool = option(True, "subtract the mean key before blocks are judged")
    sink: bool = option(True, "the first key block always stays", paper=False)
    block_q: int = option(128, "queries in a block", ge=1)
    block_k: int = option(64, "keys in a block", ge=1)
    share: str = option(
        "head", "block lists per query head, or per group of heads with one KV head", choices=("head", "group")
    )
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    @property
    def reads_ahead(self) -> bool:
        """Tokens after a query's own block take part in choosing what the query sees."""
        return self.smooth_k

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    @property
    def threshold(self) -> float:
        """The similarity that is used."""
        if self.similarity is not None:
            return self.similarity
        return -0.1 if self.select == "topk" else 0.6

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        everything = (self.keep if self.select == "topk" else self.mass) >= 1
        if call.phase == "decode" or call.q_len < self.block_q or call.kv_len <= self.block_k or everything:
            return Dense()
        grid = grid_of(call, self.block_q, self.block_k)
        lists = call.query.shape[1] if self.share == "head" else call.key.shape[1]
        key = call.key - call.key.mean(2, keepdim=True) if self.smooth_k else call.key
        # [B, Hq, NQ], [B, Hkv, NK]
        odd_q = block_similarity(call.query, self.block_q) <= self.threshold
        odd_k = block_similarity(key, self.block_k) <= self.threshold
        odd_k = odd_k.repeat_interleave(call.num_key_value_groups, 1)[:, :, None]
        scores = dots(block_mean(call.query, self.block_q), block_mean(key, self.block_k), call.scaling)
        scores = scores.masked_fill(odd_k | ~grid.causal, float("-inf"))
        # a row that may trust no block has no softmax, and keeps all of them below
        mass = normalised(per_list(torch.softmax(scores, -1).nan_to_num(0.0), lists))
        if self.select == "topk":
            of = grid.causal.sum(-1) if self.share_of == "causal" else torch.full_like(grid.first, mass.shape[-1])
            chosen = top(mass, (of * self.keep).floor().clamp(min=1)[:, None])
        else:
            chosen = cover(mass, torch.full_like(mass[..., :1], self.mass))
        if self.sink:
            chosen[..., 0] = True
        odd_q, odd_k = (per_list(x, lists) for x in (odd_q, odd_k))
        return grid.plan(chosen | odd_q[..., None] | odd_k)


def block_similarity(x: Tensor, size: int) -> Tensor:
    """Mean cosine of all pairs of tokens in a block: fp32 [B, H, NB] of x [B, H, n, D]."""
    # the sum over all pairs of unit vectors is the square of their sum
    return block_mean(normalize(x, dim=-1), size).square().sum(-1)
