"""Take away what chosen heads write, or what they look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes, read_tensors
from hfpatch.call import AttentionCall
from hfpatch.emphasis import attend_keys
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.methods._spans import Spanned, last_query
from hfpatch.methods.base import Card, Request, option, register_patcher
from hfpatch.methods.head_mask import MEANS


@register_patcher
@dataclass(frozen=True, kw_only=True)
class HeadAblate(Spanned):
    """Ablate chosen query heads: `amount` of what they write is replaced, out' = (1 - amount) out + amount * other.

    `mode="zero"`: by nothing. `"mean"`: by the head's mean over a calibration text (`means`, from `hfpatch calibrate
    MODEL -p head_mask`), closest to removing information. `"resample"`: by what the head writes at the same place of
    the row before in the batch (the first row takes the last one's), for pairs of prompts of one length that differ in
    a word. `"block"`: by attention that does not see a span, the rest renormalised; queries that see nothing else stay
    as they are.

    Source: ablations and blocking as in Circuit Component Reuse Across Tasks in Transformer Language Models,
    arXiv 2310.08744, sections 3 to 5.
    """

    name: ClassVar[str] = "head_ablate"
    aliases: ClassVar[tuple[str, ...]] = ("ablate",)
    card: ClassVar[Card] = Card(
        family="heads",
        summary="replace what chosen heads write: by nothing, a mean, another prompt's, or blind to a span",
        paper="Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv 2310.08744",
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"mode": "zero", "amount": 0.8},
        {"mode": "block", "spans": ((1, 7), (10, 12))},
        {"mode": "block", "spans": ((0, 7),), "rows": "last", "amount": 0.5},
    )

    mode: str = option("mean", "what takes the place", choices=("mean", "zero", "resample", "block"))
    amount: float = option(1.0, "share that is replaced", ge=0, le=1)
    means: str | None = option(None, 'file of mean outputs, for mode="mean"')
    rows: str = option("all", "queries: all, or the last token of the prompt", choices=("all", "last"))

    def check(self) -> None:
        super().check()
        if self.mode != "block" and any(x is not None for x in (self.spans, self.text, self.chars, self.role)):
            raise ConfigError(f'{self.name}: a span was given, and only mode="block" hides one; mode={self.mode!r}.')
        if self.mode == "mean" and self.amount > 0:
            if self.means is None:
                raise ConfigError(
                    f'{self.name}: mode="mean" needs means=FILE. Make it: hfpatch calibrate MODEL -p head_mask '
                    '-o FILE. Or take mode="zero".'
                )
            read_tensors(self.means, f"{self.name}: means", MEANS)

    def fits(self, sizes: ModelSizes) -> None:
        if self.means is not None:
            header, _, _ = read_tensors(self.means, f"{self.name}: means", MEANS)
            header.check_fits(f"{self.name}: means={self.means!r}", sizes, "num_layers", "num_heads", "head_dim")

    @property
    def decode_invariant(self) -> bool:
        return self.rows == "all"

    @classmethod
    def neutral(cls) -> Self:
        return cls(amount=0.0)

    def request(self, request: Request) -> None:
        if self.mode == "block":
            super().request(request)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        if self.amount == 0 or (self.rows == "last" and call.phase == "decode"):
            return out
        heads = torch.arange(out.shape[1], device=out.device)
        heads = heads if call.heads is None else torch.tensor(call.heads, device=out.device)
        mine = out[:, heads]
        changed = torch.lerp(mine, self._other(call, mine, heads).to(mine.dtype), self.amount)
        if self.rows == "last":
            changed = torch.where(last_query(call), changed, mine)
        return out.index_copy(1, heads, changed)

    def _other(self, call: AttentionCall, out: Tensor, heads: Tensor) -> Tensor:
        """What takes the place of `out`, the output of `heads`: [B, H, q_len, D]."""
        if self.mode == "zero":
            return torch.zeros_like(out)
        if self.mode == "mean":
            assert self.means is not None
            _, _, tensors = read_tensors(self.means, f"{self.name}: means", MEANS)
            return tensors["means"][call.layer_idx].to(out.device)[heads][:, None].expand_as(out)
        if self.mode == "resample":
            if len(out) < 2 or call.mask is not None:
                raise UnsupportedError(
                    f'{self.name}: mode="resample" takes outputs from the row before, so it needs a batch of two or '
                    "more prompts of one length, without padding."
                )
            return out.roll(1, 0)
        marked = self.marked(call, outside=True)
        if marked is None:
            return out
        rest, lse = attend_keys(call, marked.keys, call.heads)
        if call.sinks is not None:
            # they still take their part
            rest = rest * torch.sigmoid(lse - call.sinks[heads].float()[:, None])[..., None]
        return torch.where(lse.isneginf()[..., None], out, rest)
