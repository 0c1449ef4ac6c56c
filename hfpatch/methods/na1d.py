"""Dilated causal neighbourhoods: the nearest tokens, and every 2nd, 4th or 8th one further back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window
from hfpatch.selection import compress
from hfpatch.selectors import select_layers


@register_patcher
@dataclass(frozen=True, kw_only=True)
class DilatedNeighbourhood(Method):
    """Each query sees the last `kernel` tokens in steps of a dilation, the last `local` tokens, and `sink` first ones.

    KV head g has dilation `dilation[g % len]` (`schedule="per_head"`), or layer l has `dilation[l % len]`
    ("per_layer"), so that one budget covers several spans. A dilation above 1 in all heads and layers with
    `local` below it would leave most tokens out of reach for ever. A dilation d whose span `kernel * d` is longer than
    the prompt is reduced to `length // kernel`, as the official kernels demand: short prompts are seen more densely.

    Neighbourhood attention is trained in its papers; this use is ours.

    Source: Dilated Neighborhood Attention Transformer, arXiv 2209.15001, section 3; causal, one-dimensional form:
    Faster Neighborhood Attention, arXiv 2403.04690. Local window and sinks are ours.
    """

    name: ClassVar[str] = "na1d"
    aliases: ClassVar[tuple[str, ...]] = ("neighborhood-1d", "dilated-neighborhood")
    card: ClassVar[Card] = Card(
        family="attention",
        summary="causal neighbourhood with a dilation per head or layer, local window and sinks",
        paper="Dilated Neighborhood Attention Transformer, arXiv 2209.15001",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"kernel": 4, "dilation": (1, 4), "local": 3, "sink": 2},
        {"kernel": 5, "dilation": 3, "local": 3, "sink": 0, "decode": "mask"},
        {"kernel": 4, "dilation": (2, 1, 5), "schedule": "per_layer", "local": 0, "sink": 1},
        {"kernel": 3, "dilation": (2, 4), "local": 4, "sink": 1, "full_layers": "0", "decode": "mask"},
    )

    kernel: int = option(512, "tokens seen in steps of the dilation, the query's own included", ge=1)
    dilation: int | tuple[int, ...] = option((1, 2, 4, 8), "steps between these tokens, handed out by schedule", ge=1)
    schedule: str = option(
        "per_head", "a dilation for each KV head, or for each layer", choices=("per_head", "per_layer")
    )
    local: int = option(128, "last tokens always seen, the query's own included", ge=0)
    sink: int = option(4, "first tokens always seen", ge=0)
    full_layers: str | int | tuple[int, ...] | None = option(None, 'dense layers, e.g. "last:3", [1, 5]')
    decode: str = option("full", "decode steps: the whole cache, or the same rule", choices=("full", "mask"))
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        for step in self.steps:
            if not isinstance(step, int) or isinstance(step, bool) or step < 1:
                raise ConfigError(f"{self.name}: dilation={self.dilation!r}: {step!r} is not a whole number from 1 up.")
        if not self.steps:
            raise ConfigError(f"{self.name}: dilation is empty. Give a number, or one for each head, e.g. [1, 2, 4].")

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.dilation,) if isinstance(self.dilation, int) else self.dilation

    @classmethod
    def neutral(cls) -> Self:
        return cls(kernel=1 << 30)

    def dilations(self, layer: int, kv_heads: int, kv_len: int) -> tuple[int, ...]:
        """Of each KV head, or one for all, after those that are too wide for the prompt were reduced."""
        widest = max(kv_len // self.kernel, 1)
        if self.schedule == "per_layer":
            return (min(self.steps[layer % len(self.steps)], widest),)
        heads = tuple(min(self.steps[head % len(self.steps)], widest) for head in range(kv_heads))
        return heads[:1] if len(set(heads)) == 1 else heads

    def plan(self, call: AttentionCall) -> Plan:
        if self.full_layers is not None and call.layer_idx in select_layers(self.full_layers, call.num_layers):
            return Dense()
        n, device = call.kv_len, call.query.device
        if (call.phase == "decode" and self.decode == "full") or max(self.kernel, self.local) >= n:
            return Dense()
        dilations = self.dilations(call.layer_idx, call.key.shape[1], n)
        if dilations == (1,):
            return Window(self.sink, max(self.kernel, self.local))
        if call.q_len == 1:
            return _columns(self, dilations, n, device)
        order = _orders(dilations, n, device)
        return Permuted(order, before=self.kernel - 1, after=0, local=min(self.local, n), sink=min(self.sink, n))


@lru_cache(maxsize=64)
def _orders(dilations: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """int64 [Hs, n]: positions class by class, 0, d, 2d, ..., 1, 1 + d, ...

    A window before a query's slot may reach into the class before its own, but only by tokens that come after the
    query, because no class is shorter than the window.
    """
    position = torch.arange(n)
    orders = torch.stack([(position % step * n + position).argsort() for step in dilations])
    return orders.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _columns(method: DilatedNeighbourhood, dilations: tuple[int, ...], n: int, device: torch.device) -> Blocks:
    """What the last token sees."""
    back = torch.arange(n - 1, -1, -1)
    steps = torch.tensor(dilations)[:, None]
    dilated = (back % steps == 0) & (back // steps < method.kernel)
    index, count = compress((dilated | (back < method.local) | (back > n - 1 - method.sink))[None, :, None])
    empty = torch.zeros(1, len(dilations), 1, 0, dtype=torch.int32)
    lists = (x.to(device, non_blocking=True) for x in (empty, empty.sum(-1, dtype=torch.int32), index, count))
    blk_idx, blk_cnt, col_idx, col_cnt = lists
    return Blocks(blk_idx, blk_cnt, 1, 1, col_idx, col_cnt)
