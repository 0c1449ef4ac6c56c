"""PAI: whoever writes looks more at the image, at all of it alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.methods._boost import Boosting
from hfpatch.methods.base import Card, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Pai(Boosting):
    """In the attention of the token that decides what is written next, raise all image tokens by `alpha` times |score|.

    A score z, scaled, becomes z + alpha * |z| before the softmax: for the last token of the prompt, and for every token
    that is written. All other rows stay, and so do the keys and values of earlier tokens. Prompts without images pass.

    With `guidance` the answer is contrasted with one that has not seen the image, as in the paper.

    Source: Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs, arXiv
    2407.21771.
    """

    name: ClassVar[str] = "pai"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="calibration",
        summary="raise all image tokens in the attention of the token that writes",
        paper="Paying More Attention to Image, arXiv 2407.21771",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({}, {"alpha": 1.0, "start_layer": 0, "guidance": 1.0})

    alpha: float = option(0.5, "by how much of its size a score grows", ge=0)

    @classmethod
    def neutral(cls) -> Self:
        return cls(alpha=0.0, guidance=1.0)

    def gain(self, call: AttentionCall) -> Tensor | None:
        if self.alpha == 0 or call.image_mask is None:
            return None
        return self.alpha * call.image_mask.float()
