"""What a prompt costs that loses image tokens on its way through the layers, in the counts that papers use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer: widths of its hidden states, its MLP, its queries and its keys; bytes of a number."""

    hidden: int
    inner: int
    query: int
    key: int
    element: int

    @classmethod
    def of(cls, config: Any, heads: int, kv_heads: int, head_dim: int, element: int) -> LayerCost:
        """From a text config; of a mixture of experts the MLP that one token goes through."""
        experts = getattr(config, "num_experts_per_tok", None) or 0
        inner = (getattr(config, "moe_intermediate_size", None) or config.intermediate_size) * experts
        inner = inner or config.intermediate_size
        return cls(config.hidden_size, inner, heads * head_dim, kv_heads * head_dim, element)

    def flops(self, tokens: float) -> float:
        """Of a prefill, a multiply-add counting once: projections, attention over all pairs, a gated MLP."""
        projections = 2 * self.hidden * (self.query + self.key)
        return tokens * (projections + 3 * self.hidden * self.inner) + 2 * tokens**2 * self.query

    def kv_bytes(self, tokens: float) -> float:
        return 2 * tokens * self.key * self.element


@dataclass(frozen=True)
class ImageCost:
    """Means per prompt with images.

    Attributes:
        prompts: how many there were; 0 for a forecast.
        tokens: of the prompt, image tokens included.
        images: image tokens of the prompt.
        average: image tokens that a layer hands on, mean over the layers: one that prunes counts as pruned. So count
            FastV, SparseVLM and AdaptInfer.
        computed: image tokens that a layer computes with, mean over the layers: one that prunes counts as whole.
        pairs: share of the causal pairs of tokens that is left, mean over the layers.
        flops, dense_flops: of the prefill, language model only, see `LayerCost.flops`.
        kv_bytes, dense_kv_bytes: of the prompt's cache.
    """

    prompts: int
    tokens: float
    images: float
    average: float
    computed: float
    pairs: float
    flops: float
    dense_flops: float
    kv_bytes: float
    dense_kv_bytes: float

    @classmethod
    def of(cls, cost: LayerCost, tokens: float, images: float, layers: Sequence[float]) -> ImageCost:
        """Of one prompt. `layers`: the tokens that each layer computes with."""
        lost = [tokens - n for n in layers]
        handed = [*lost[1:], lost[-1]]
        return cls(
            1,
            tokens,
            images,
            images - sum(handed) / len(layers),
            images - sum(lost) / len(layers),
            sum(n * (n + 1) for n in layers) / (len(layers) * tokens * (tokens + 1)),
            sum(map(cost.flops, layers)),
            len(layers) * cost.flops(tokens),
            sum(map(cost.kv_bytes, layers)),
            len(layers) * cost.kv_bytes(tokens),
        )

    @classmethod
    def forecast(
        cls, cost: LayerCost, tokens: int, images: int, num_layers: int, stages: Mapping[int, int]
    ) -> ImageCost:
        """`stages`: image tokens left after a layer, see `Method.stages`."""
        layers, left = [], images
        for layer in range(num_layers):
            left = min(left, stages.get(layer - 1, left))
            layers.append(tokens - images + left)
        made = cls.of(cost, tokens, images, layers)
        return cls(0, *list(vars(made).values())[1:])

    @property
    def flops_share(self) -> float:
        return self.flops / self.dense_flops

    @property
    def kv_share(self) -> float:
        return self.kv_bytes / self.dense_kv_bytes

    def __str__(self) -> str:
        flops, kv = (f"{100 * share:.1f} %" for share in (self.flops_share, self.kv_share))
        return (
            f"image tokens: {self.average:.1f} of {self.images:.0f} on average (pruning layers counted as pruned; "
            f"{self.computed:.1f} counted as whole) · prefill FLOPs {self.flops:.3g} ({flops} of dense) · "
            f"KV cache {self.kv_bytes / 2**20:.3g} MB ({kv})"
        )


@dataclass(eq=False)
class ImageCosts:
    """Adds up prompts."""

    prompts: int = 0
    sums: list[float] | None = None

    def add(self, one: ImageCost, prompts: int) -> None:
        values = [prompts * value for value in list(vars(one).values())[1:]]
        self.sums = values if self.sums is None else [a + b for a, b in zip(self.sums, values, strict=True)]
        self.prompts += prompts

    def mean(self) -> ImageCost | None:
        return None if self.sums is None else ImageCost(self.prompts, *(value / self.prompts for value in self.sums))
