"""FastKV: behind a middle layer a prompt goes on with the tokens that its end attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.methods._images import ascending
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.statistics import last_rows_probs


@register_patcher
@dataclass(frozen=True, kw_only=True)
class FastKV(Method):
    """Before decoder layer `layer`, keep the tokens of the prompt that its last `window` tokens attend to.

    A token's score is the attention that the layer before gives it from the window, summed over the window, averaged
    over the query heads and over `pool` neighbours. The window stays, and the first token, the usual sink. Kept tokens
    keep their positions; the layers before `layer` hold the whole prompt in their cache, later ones what was kept. So
    prefill, decoding and the cache cost less in the layers behind, whatever computes attention: it goes with a method
    that chooses keys. What an answer needs must be what the prompt's end attends to, or its decoding will not find it.

    Scores are dense attention, also where another method chooses the keys of the layer before. Tokens that were left
    out have no prediction of their own, so that perplexity on prompts has no meaning. The choice is made once, at the
    end of the first forward: give the prompt in one piece. Compressing each layer's cache on its own, the other half
    of the paper, is not offered.

    Source: FastKV: Decoupling of Context Reduction and KV Cache Compression for Prefill-Decoding Acceleration, arXiv
    2502.01068, token-selective propagation. `keep` is its TSP rate, `layer - 1` its TSP layer.
    """

    name: ClassVar[str] = "fastkv"
    aliases: ClassVar[tuple[str, ...]] = ("tsp",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="behind a middle layer, only the prompt tokens that its end attends to",
        paper="FastKV: Decoupling of Context Reduction and KV Cache Compression, arXiv 2502.01068",
        phase="prefill",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"layer": 1, "keep": 0.4, "window": 4, "pool": 3},
        {"budget": 12, "window": 2, "pool": 1},
    )
    whole_prompt: ClassVar[bool] = True

    layer: int | None = option(
        None, "first decoder layer without the dropped tokens; None: the middle one (paper: 16 of 32)", ge=1
    )
    keep: float = option(0.2, "share of the prompt's tokens that stays, window and first token among them", gt=0, le=1)
    budget: int | None = option(None, "how many tokens stay, in place of keep", ge=1)
    window: int = option(8, "tokens at the prompt's end that choose, and stay", ge=1)
    pool: int = option(7, "neighbouring tokens over which a score is averaged; odd", ge=1)

    def check(self) -> None:
        if self.pool % 2 == 0:
            raise ConfigError(f"{self.name}: pool={self.pool} must be odd, to have a middle. Use {self.pool + 1}.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def token_stages(self, num_layers: int, tokens: int) -> Mapping[int, int]:
        last = (num_layers // 2 if self.layer is None else self.layer) - 1
        return {last: self._left(tokens)}

    def _left(self, tokens: int) -> int:
        wanted = self.budget if self.budget is not None else round(self.keep * tokens)
        return min(max(wanted, self.window + 1), tokens)

    @torch.no_grad()
    def prune(self, call: AttentionCall) -> Tensor | None:
        if call.mask is None:
            count = self._left(call.kv_len)
            return _best(self._scores(call), count) if count < call.kv_len else None
        if call.mask.ndim == 4 and call.image_mask is None:
            raise UnsupportedError(
                f"{self.name} goes by the last tokens of one prompt in a row; this forward has a mask of its own, as "
                "packed sequences have. Give one prompt a row, with padding at most."
            )
        # with a 4-D mask, what the last query sees: image tokens that see each other are all there
        real = call.mask if call.mask.ndim == 2 else call.mask[:, 0, -1]
        rows = [mine.nonzero()[:, 0] for mine in real]
        counts = [self._left(len(slots)) for slots in rows]
        if (most := max(counts)) == call.kv_len:
            return None
        # every row keeps as many slots: shorter prompts fill up with padding, never with tokens that were to go
        stays = torch.zeros_like(real)
        for row, (slots, count) in enumerate(zip(rows, counts, strict=True)):
            if count:
                query, key = (x[row : row + 1, :, slots] for x in (call.query, call.key))
                alone = replace(call, query=query, key=key, value=key, mask=None, image_mask=None)
                stays[row, slots[_best(self._scores(alone), count)[0]]] = True
            stays[row, (~real[row]).nonzero()[: most - count, 0]] = True
        return ascending(stays, most)

    def _scores(self, call: AttentionCall) -> Tensor:
        """fp32 [B, n] of prompts without padding; what stays in any case has infinite ones."""
        window = min(self.window, call.kv_len)
        given = last_rows_probs(call, window).sum(2).mean(1)
        given[:, call.kv_len - window :] = 0.0
        scores = avg_pool1d(given[:, None], self.pool, stride=1, padding=self.pool // 2)[:, 0]
        scores[:, call.kv_len - window :] = float("inf")
        # also what places in the text are counted from, see `_spans`
        scores[:, 0] = float("inf")
        return scores


def _best(scores: Tensor, count: int) -> Tensor:
    """Slots of the `count` largest of scores [B, n], ascending: int64 [B, count]."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values
