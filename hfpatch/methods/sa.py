"""Stochastic attention: a sliding window in a random order of the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Blocks, Dense, Permuted, Plan


@register_patcher
@dataclass(frozen=True, kw_only=True)
class StochasticAttention(Method):
    """A window over randomly shuffled tokens, joined with a short local window and sinks.

    Each layer has its own order. Causality and RoPE stay those of the original positions. Prefill is sparse; decoding
    reads the whole cache (`decode="full"`, as published) or sinks, local window and random keys (`"hybrid"`).
    The published training-free mode has neither local window nor sinks as far as is known (`sa_paper`); without them
    causal models lose their text, see docs/methods/sa.md.

    Source: Stochastic Attention: Connectome-Inspired Randomized Routing for Expressive Linear-Time Attention,
    arXiv 2604.00754.
    """

    name: ClassVar[str] = "sa"
    aliases: ClassVar[tuple[str, ...]] = ("stochastic-attention",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="window over randomly permuted tokens, with local window and sinks",
        paper="Stochastic Attention, arXiv 2604.00754",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"window": 8, "sink": 2},
        {"window": 6, "sink": 0, "local": 0, "window_mode": "one_sided"},
        {"window": 8, "sink": 1, "local": 3, "per_head": True, "circular": True, "order": "hash"},
        {"window": 8, "sink": 1, "granularity": "block", "block_size": 4, "decode": "hybrid"},
    )

    window: int = option(
        256, "slots seen in the shuffled order; about half of them lie in the future and are lost", ge=1
    )
    sink: int = option(4, "first tokens always seen", ge=0, paper=0)
    local: int | None = option(None, "last tokens always seen; None = window // 2", ge=0, paper=0)
    window_mode: str = option(
        "two_sided", "slots on both sides of the query's own, or before it", choices=("two_sided", "one_sided")
    )
    granularity: str = option("token", 'shuffle tokens, or whole blocks ("block", faster)', choices=("token", "block"))
    block_size: int = option(64, 'tokens in a block, for granularity="block"', ge=1)
    per_head: bool = option(False, "one order per KV head instead of one per layer")
    circular: bool = option(False, "the shuffled order closes into a ring, as in the paper's theory")
    resample: str = option(
        "fixed", 'same order for the same seed, layer and length, or a new one each forward ("forward")',
        choices=("fixed", "forward"),
    )  # fmt: skip
    order: str = option(
        "randperm",
        'a fresh permutation for each length, or positions sorted by a hash: old tokens keep their order ("hash")',
        choices=("randperm", "hash"),
    )
    decode: str = option(
        "full", "decode steps: the whole cache, or sinks + local + random keys", choices=("full", "hybrid")
    )
    seed: int = option(0, "of the permutations", ge=0)
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        if self.granularity == "block" and (self.per_head or self.circular or self.window_mode == "one_sided"):
            raise ConfigError(
                f'{self.name}: granularity="block" takes neither per_head, circular nor window_mode="one_sided". '
                'Drop them, or use granularity="token".'
            )

    @classmethod
    def neutral(cls) -> Self:
        return cls(window=1 << 30)

    @property
    def half(self) -> int:
        """Slots seen on each side."""
        return self.window // 2

    @property
    def local_window(self) -> int:
        return self.window // 2 if self.local is None else self.local

    def plan(self, call: AttentionCall) -> Plan:
        draw = call.seq.forwards if self.resample == "forward" and call.seq is not None else 0
        if call.phase == "decode":
            return Dense() if self.decode == "full" else self._decode(call, draw)
        heads = call.key.shape[1] if self.per_head else 1
        device = call.query.device
        if self.granularity == "block":
            return _block_plan(self, call.layer_idx, draw, call.q_offset, call.q_len, device)
        return _token_plan(self, call.layer_idx, draw, heads, call.kv_len, device)

    def _decode(self, call: AttentionCall, draw: int) -> Plan:
        """Sinks, the last `local` keys and `window` random ones, drawn anew for each position."""
        n = call.kv_len
        first, last = min(self.sink, n), max(n - max(self.local_window, 1), 0)
        if last <= first or last - first <= self.window:
            return Dense()
        generator = np.random.default_rng((self.seed, call.layer_idx, n, draw))
        drawn = first + generator.choice(last - first, self.window, replace=False, shuffle=False)
        keys = np.concatenate([np.arange(first), np.sort(drawn), np.arange(last, n)])
        device = call.query.device
        columns = torch.from_numpy(keys.astype(np.int32)).to(device, non_blocking=True)
        empty = torch.zeros(1, 1, 1, 0, dtype=torch.int32, device=device)
        return Blocks(empty, empty.sum(-1, dtype=torch.int32), 1, 1, columns[None, None, None])


@register_patcher
@dataclass(frozen=True, kw_only=True)
class StochasticAttentionPaper(StochasticAttention):
    """`sa` as published for pretrained models: no local window, no sinks. For comparisons, not for use on long texts.

    Source: Stochastic Attention, arXiv 2604.00754, training-free experiments.
    """

    name: ClassVar[str] = "sa_paper"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="attention",
        summary="sa preset: the published mode, without local window and sinks",
        paper="Stochastic Attention, arXiv 2604.00754",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"window": 8},)

    sink: int = option(0, "first tokens always seen", ge=0)
    local: int | None = option(0, "last tokens always seen; None = window // 2", ge=0)


@lru_cache(maxsize=256)
def _token_plan(
    method: StochasticAttention, layer: int, draw: int, heads: int, kv_len: int, device: torch.device
) -> Permuted:
    orders = [_order(method, layer, draw, head, kv_len) for head in range(heads)]
    half = min(method.half, kv_len)
    two_sided = method.window_mode == "two_sided"
    return Permuted(
        torch.stack(orders).to(device, non_blocking=True),
        before=half if two_sided else min(method.window, kv_len) - 1,
        after=half if two_sided else 0,
        local=min(method.local_window, kv_len),
        sink=min(method.sink, kv_len),
        circular=method.circular,
    )


@lru_cache(maxsize=256)
def _block_plan(
    method: StochasticAttention, layer: int, draw: int, q_offset: int, q_len: int, device: torch.device
) -> Plan:
    """Blocks are shuffled instead of tokens; a block sees those that are near in the shuffled order."""
    size, kv_len = method.block_size, q_offset + q_len
    blocks = -(-kv_len // size)
    half = max(1, round(method.half / size))
    if half >= blocks:
        return Dense()
    slot = _order(method, layer, draw, 0, blocks).argsort()
    # a chunk that starts inside a block needs query blocks that end where key blocks end
    block_q = size if q_len == 1 else math.gcd(q_offset, size) or size
    own = (q_offset + torch.arange(0, q_len, block_q)) // size
    key = torch.arange(blocks)
    near = (slot[own][:, None] - slot[None, :]).abs() <= half
    local = own[:, None] - key < max(-(-method.local_window // size), 1)
    keep = (near | local | (key * size < method.sink)) & (key <= own[:, None])
    count = keep.sum(-1)
    index = keep.int().argsort(dim=-1, descending=True, stable=True)[:, : int(count.max())]
    index, count = (x.int()[None, None].to(device, non_blocking=True) for x in (index, count))
    return Blocks(index, count, block_q, size)


def _order(method: StochasticAttention, layer: int, draw: int, head: int, n: int) -> Tensor:
    """Permutation of 0..n-1 (position held by each slot), the same on every device."""
    key = ((method.seed * 1_000_003 + layer) * 1_009 + head) * 1_000_033 + draw
    if method.order == "hash":
        return _hash(torch.arange(n) ^ (key % 2**62)).argsort()
    return torch.randperm(n, generator=torch.Generator("cpu").manual_seed(key % 2**63))


def _hash(x: Tensor) -> Tensor:
    """64-bit mixing of int64 values (two rounds of multiply and xor-shift, wrapping on purpose)."""
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * factor
    return x ^ ((x >> 32) & 0xFFFFFFFF)
