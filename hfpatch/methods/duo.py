"""Retrieval heads keep the whole context, all others a window with sinks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods._head_scores import Head, HeadScores, by_layer, read_scores
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan, Window

# Tokens that assisted decoding may take back from a cache, see `hfpatch.eviction`.
_DRAFT = 64
_RANDOM = "random"


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Duo(Method):
    """The KV heads with the best retrieval scores see everything; the others the first `sink` and last `window` tokens.

    The query heads of one KV head are treated alike. `scores` is what `hfpatch heads score` writes, the authors' files
    of retrieval heads, or DuoAttention's gates (.tsv); `scores="random"` draws the heads, the control for a
    measurement. `heads=` names the query heads that get a window, in place of scores.

    Row i sees key j where `j < sink or i - j < window`, in the prompt as when decoding (`prefill="full"`: the first
    forward is dense, as in DuoAttention's deployment). With `kv="cut"` the cache of windowed heads is cut to what they
    still see, after each layer of the prompt and at each step. Layers that slide natively are left alone.

    Source: DuoAttention, arXiv 2410.10819 (its learned gates, windows and deployment); the ranking by retrieval scores:
    Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574.
    """

    name: ClassVar[str] = "duo"
    aliases: ClassVar[tuple[str, ...]] = ("duo-attention",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="retrieval heads see everything, the others sinks and a window; their KV cache is cut",
        paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv 2410.10819",
        needs=("calibration",),
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"scores": "random", "sink": 2, "window": 5},
        {"scores": "random", "sink": 0, "window": 6, "min_per_layer": 1, "kv": "keep"},
        {"scores": "random", "sink": 3, "window": 4, "full_heads": 0.25, "prefill": "full"},
    )

    scores: str | None = option(None, 'file of head scores, or "random" heads as a control')
    full_heads: float | None = option(
        None,
        "share of the KV heads that see everything; None: 0.5, or 0.25 if every query head has its own",
        ge=0,
        le=1,
    )
    group: str = option("max", "score of a KV head, from its query heads", choices=("max", "mean"))
    min_per_layer: int = option(0, "KV heads of each layer that see everything at least", ge=0)
    sink: int = option(64, "first tokens that the others see", ge=0)
    window: int = option(256, "last tokens that the others see, the query's own included", ge=1)
    prefill: str = option(
        "exact",
        'the prompt by the same rule, or its first forward dense ("full")',
        choices=("exact", "full"),
        paper="full",
    )
    kv: str = option("cut", "the cache of the others: only what they see, or whole", choices=("cut", "keep"))
    draw: int = option(0, 'which random draw, for scores="random"', ge=0)
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        if self.scores not in (None, _RANDOM):
            read_scores(self.scores, "scores")

    @property
    def decode_invariant(self) -> bool:
        return self.prefill == "exact"

    @classmethod
    def neutral(cls) -> Self:
        return cls(full_heads=1.0)

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]] | None:
        """Query heads with a window."""
        if self.full_heads == 1.0:
            return None
        size = sizes.num_heads // sizes.num_key_value_heads
        whole = self.whole_heads(sizes, layers)
        others = [
            (layer, kv) for layer in layers for kv in range(sizes.num_key_value_heads) if (layer, kv) not in whole
        ]
        return by_layer([(layer, head) for layer, kv in others for head in range(kv * size, (kv + 1) * size)])

    def whole_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> set[Head]:
        """(layer, KV head) of those that see everything, among these layers."""
        kv_heads = sizes.num_key_value_heads
        ranked = [head for head in self._scores(sizes).ranked() if head[0] in set(layers)]
        share = self.full_heads if self.full_heads is not None else 0.5 if kv_heads < sizes.num_heads else 0.25
        best = [head for layer in layers for head in [h for h in ranked if h[0] == layer][: self.min_per_layer]]
        rest = [head for head in ranked if head not in best]
        return {*best, *rest[: max(round(share * len(ranked)) - len(best), 0)]}

    def _scores(self, sizes: ModelSizes) -> HeadScores:
        if self.scores is None:
            raise ConfigError(
                f"{self.name}: which heads are retrieval heads? Measure them and give scores=FILE (hfpatch heads score "
                'MODEL -o FILE), name the others with heads=, or draw them with scores="random" as a control.'
            )
        if self.scores == _RANDOM:
            rng = random.Random(self.draw)
            every = [(layer, h) for layer in range(sizes.num_layers) for h in range(sizes.num_key_value_heads)]
            return HeadScores(_RANDOM, {head: rng.random() for head in every}, {}, True)
        found = read_scores(self.scores, f"{self.name}: scores")
        found.check_fits(sizes)
        return found.groups(sizes, self.group)

    def plan(self, call: AttentionCall) -> Plan:
        if self.full_heads == 1.0 or (call.phase == "prefill" and self.prefill == "full"):
            return Dense()
        return Window(self.sink, self.window)

    def forgets(self, call: AttentionCall) -> Window | None:
        if self.kv == "keep" or self.full_heads == 1.0:
            return None
        # shorter rows of a padded batch may still run dense
        if self.dense_below and (call.mask is not None or call.kv_len < self.dense_below + _DRAFT):
            return None
        return Window(self.sink, self.window)
