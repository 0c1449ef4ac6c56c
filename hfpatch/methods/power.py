"""PowerAttention: the blocks 1, 2, 4, 8, ... back, and the static masks that it was compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Blocks, Dense, Plan
from hfpatch.selection import compress
from hfpatch.selectors import select_layers

# By pattern: blocks of the window, blocks of sinks. Each sees about ten blocks a query at 32K tokens.
_SIZES = {"power": (5, 1), "window": (9, 1), "stride": (6, 1), "dilated": (20, 0), "longnet": (1, 0)}
# LongNet's levels: (blocks in a segment, every how manieth of them is linked).
_LEVELS = ((8, 1), (16, 2), (32, 4), (64, 8), (128, 16))


@register_patcher
@dataclass(frozen=True, kw_only=True)
class PowerAttention(Method):
    """Each block of queries sees a window of blocks, the first block, and the blocks a power of `base` back.

    Any distance is then crossed in about log2 of it layers, without gaps. The lists are the same in all heads and
    layers; blocks are counted from the first token, also in chunks and when decoding.

    `pattern` puts one of the paper's baselines in its place, with about the same number of blocks at 32K tokens:
    "window" (window and sinks), "stride" (also every `stride`-th block back), "dilated" (every second block of the
    window, so that half of the blocks are out of reach; the paper's pseudocode adds an undefined window, its text does
    not) and "longnet" (links inside aligned segments of 8 to 128 blocks, ever sparser).

    The paper trains the model under the mask. Its long-context tests leave 2 of 7 layers dense; which ones is not
    published.

    Source: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention, arXiv 2503.03588,
    sections 3 and 4, appendix B.
    """

    name: ClassVar[str] = "power"
    aliases: ClassVar[tuple[str, ...]] = ("power-attention",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="window, sinks and the blocks 1, 2, 4, 8, ... back; strided, dilated and LongNet masks to compare",
        paper="PowerAttention: Exponentially Scaling of Receptive Fields, arXiv 2503.03588",
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"block": 2, "window_blocks": 2, "full_layers": None},
        {"block": 3, "window_blocks": 1, "sink_blocks": 0, "base": 3, "full_layers": "0", "decode": "full"},
        {"block": 2, "pattern": "window", "window_blocks": 3, "full_layers": None},
        {"block": 2, "pattern": "stride", "window_blocks": 2, "stride": 4, "full_layers": None},
        {"block": 2, "pattern": "dilated", "window_blocks": 6, "full_layers": None},
        {"block": 1, "pattern": "longnet", "full_layers": None},
    )

    pattern: str = option("power", "which blocks are seen", choices=tuple(_SIZES))
    block: int = option(256, "tokens in a block; 64 for prompts below 8K", ge=1)
    window_blocks: int | None = option(
        None, "last blocks seen, the query's own included; None = 5 (window 9, stride 6, dilated 20)", ge=1
    )
    sink_blocks: int | None = option(None, "first blocks always seen; None = 1 (dilated and longnet 0)", ge=0)
    base: int = option(2, 'blocks back are powers of this, for pattern="power"', ge=2)
    stride: int = option(32, 'every how manieth block back is seen, for pattern="stride"', ge=1)
    full_layers: str | int | tuple[int, ...] | None = option(
        "every7,every7+1", 'dense layers, e.g. "last:3", [1, 5]; None = none'
    )
    decode: str = option(
        "power", 'decode steps: the same blocks, or the whole cache ("full", better without training)',
        choices=("power", "full"),
    )  # fmt: skip
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    @property
    def decode_invariant(self) -> bool:
        return self.decode == "power"

    @classmethod
    def neutral(cls) -> Self:
        return cls(window_blocks=1 << 30)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether block `query` sees block `key`, int64, broadcast; meaningless where the key lies in the future."""
        window, sinks = _SIZES[self.pattern]
        window = self.window_blocks or window
        sinks = sinks if self.sink_blocks is None else self.sink_blocks
        distance = query - key
        step = 2 if self.pattern == "dilated" else 1
        near = (distance < window) & (distance % step == 0) | (key < sinks)
        if self.pattern == "power":
            powers = [self.base**m for m in range(63) if self.base**m < 1 << 31]
            near = near | torch.isin(distance, torch.tensor(powers, device=distance.device))
        elif self.pattern == "stride":
            near = near | (distance % self.stride == 0)
        elif self.pattern == "longnet":
            for size, step in _LEVELS:
                near = near | (query // size == key // size) & (query % step == 0) & (key % step == 0)
        return near

    def plan(self, call: AttentionCall) -> Plan:
        if self.full_layers is not None and call.layer_idx in select_layers(self.full_layers, call.num_layers):
            return Dense()
        if call.phase == "decode" and self.decode == "full":
            return Dense()
        return _plan(self, call.q_offset, call.q_len, call.query.device)


@lru_cache(maxsize=64)
def _plan(method: PowerAttention, q_offset: int, q_len: int, device: torch.device) -> Plan:
    """The same for all layers, heads and sequences."""
    size, kv_len = method.block, q_offset + q_len
    block_k = math.gcd(size, 256)
    if block_k < 16:
        block_k = size
    # a chunk that starts inside a block needs rows that end where blocks end
    block_q = 1 if q_len == 1 else math.gcd(q_offset, block_k) or block_k
    first = q_offset + torch.arange(0, q_len, block_q)
    last = (first + block_q - 1).clamp(max=kv_len - 1)[:, None]
    start = torch.arange(0, kv_len, block_k)
    causal = start <= last
    keep = causal & method.sees(first[:, None] // size, start // size)
    if torch.equal(keep, causal):
        return Dense()
    index, count = compress(keep[None, None])
    return Blocks(index.to(device, non_blocking=True), count.to(device, non_blocking=True), block_q, block_k)
