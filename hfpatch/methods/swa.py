"""Sliding windows with attention sinks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Blocks, Dense, Plan, Window
from hfpatch.selectors import select_layers


@register_patcher
@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Method):
    """Each query sees the first `sink` tokens and its last `window` tokens, itself included.

    Decoding follows the same rule (`decode="mask"`, StreamingLLM) or reads the whole cache (`"full"`); "auto" is "full"
    where `full_layers` keeps some layers dense, since only both together bring retrieval back. The KV cache stays whole
    and positions are not re-numbered, unlike in StreamingLLM, which evicts and counts positions inside the cache.
    Layers that slide natively keep their own window.

    Source: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.2; layer patterns and
    full decode: Sliding Window Attention Adaptation, arXiv 2512.10411.
    """

    name: ClassVar[str] = "swa"
    aliases: ClassVar[tuple[str, ...]] = ("sliding-window", "streaming-llm")
    card: ClassVar[Card] = Card(
        family="attention",
        summary="sliding window with attention sinks, optionally full in some layers or at decoding",
        paper="Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"window": 7, "sink": 2},
        {"window": 5, "sink": 0, "decode": "full"},
        {"window": 8, "sink": 3, "align": "block", "block_size": 4},
        {"window": 6, "sink": 1, "full_layers": "odd", "decode": "mask"},
    )

    window: int = option(2048, "last tokens seen, the query's own included", ge=1)
    sink: int = option(4, "first tokens always seen; tokens, not blocks", ge=0)
    align: str = option(
        "token",
        'edge of the window: exact ("token") or rounded up to whole blocks, faster ("block")',
        choices=("token", "block"),
    )
    block_size: int = option(128, 'tokens in a block, for align="block"', ge=1)
    full_layers: str | int | tuple[int, ...] | None = option(None, 'dense layers, e.g. "odd", "last:3", [1, 5]')
    decode: str = option(
        "auto",
        'decode steps: the same window ("mask"), dense ("full"), or dense if some layers are full ("auto")',
        choices=("auto", "mask", "full"),
    )
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    @property
    def full_decode(self) -> bool:
        """Whether decode steps read the whole cache."""
        return self.decode == "full" or (self.decode == "auto" and self.full_layers is not None)

    @property
    def decode_invariant(self) -> bool:
        return not self.full_decode

    @classmethod
    def neutral(cls) -> Self:
        return cls(window=1 << 30)

    def plan(self, call: AttentionCall) -> Plan:
        if self.full_layers is not None and call.layer_idx in select_layers(self.full_layers, call.num_layers):
            return Dense()
        if call.phase == "decode" and self.full_decode:
            return Dense()
        if self.align == "token":
            return Window(self.sink, self.window)
        return self._blocks(call)

    def _blocks(self, call: AttentionCall) -> Plan:
        """Whole key blocks: of the sinks, and of the window counted in blocks from the query's own."""
        size = self.block_size
        kept, sinks = -(-self.window // size), -(-self.sink // size)
        # a chunk that starts inside a block needs query blocks that end where key blocks end
        block_q = size if call.q_len == 1 else math.gcd(call.q_offset, size) or size
        device = call.query.device
        own = (call.q_offset + torch.arange(0, call.q_len, block_q, device=device)) // size
        width = min(kept + sinks, -(-call.kv_len // size))
        slot = torch.arange(width, device=device)
        first = (own - kept + 1).clamp(min=0)[:, None]
        in_sinks = first.clamp(max=sinks)
        index = torch.where(slot < in_sinks, slot, first + slot - in_sinks)
        count = in_sinks[:, 0] + own - first[:, 0] + 1
        return Blocks(index.int()[None, None], count.int()[None, None], block_q, size)


@register_patcher
@dataclass(frozen=True, kw_only=True)
class SlidingWindowQuality(SlidingWindow):
    """`swa` with the settings that keep most quality: every other layer full and 100 sinks, full decoding.

    Which half of the layers should stay full depends on the model: odd for Qwen3-4B, even for Llama-3.1-8B.

    Source: Sliding Window Attention Adaptation, arXiv 2512.10411, its training-free rows.
    """

    name: ClassVar[str] = "swa_quality"
    aliases: ClassVar[tuple[str, ...]] = ("swaa",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="swa preset: odd layers full, 100 sinks, full decoding",
        paper="Sliding Window Attention Adaptation, arXiv 2512.10411",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"window": 7, "sink": 2},)

    sink: int = option(100, "first tokens always seen", ge=0)
    full_layers: str | int | tuple[int, ...] | None = option("odd", 'dense layers, e.g. "even", "last:3", [1, 5]')
