"""What methods see of a prompt's image tokens before the first layer, and what they answer. Plain data.

B sequences, n tokens each, V image tokens in each; H and D are the vision tower's heads and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfpatch.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Tower:
    """The vision tower's layer whose output becomes the image tokens. `images` pictures of P patches each.

    Attributes:
        attention: fp32 [images, H, P], attention of the class token on the patches, its share on itself left out.
        keys: [images, H, P, head_dim].
        states: [images, 1 + P, D], the layer's output, class token first.
        project: [..., D] -> [..., width of the language model].
    """

    attention: Tensor
    keys: Tensor
    states: Tensor
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Embedded:
    """Prompts as the language model is about to read them.

    Attributes:
        embeds: [B, n, width].
        image_mask: bool [B, n], True at image tokens.
        mask: bool [B, n], True at real tokens; None: all are.
        tower: None unless it was asked for.
    """

    embeds: Tensor
    image_mask: Tensor
    mask: Tensor | None
    tower: Tower | None = None

    @property
    def images(self) -> Tensor:
        """The image tokens of every row, [B, V, width]. Raises UnsupportedError if not all rows have as many."""
        counts = self.image_mask.sum(-1)
        if bool((counts != counts[0]).any()):
            raise UnsupportedError("the prompts of this batch have different numbers of image tokens")
        return self.embeds[self.image_mask].view(len(self.embeds), -1, self.embeds.shape[-1])

    @property
    def text_mask(self) -> Tensor:
        """bool [B, n]: real tokens after the last image token; the last token where there are none."""
        return text_mask(self.image_mask, self.mask)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Image tokens that go into the language model.

    Attributes:
        places: int64 [B, k], which of each row's image tokens, ascending.
        embeds: [B, k, width], what stands there instead of the tokens themselves; None: they do.
        compact: number positions anew, without gaps.
    """

    places: Tensor
    embeds: Tensor | None = None
    compact: bool = False


Look = Callable[[Embedded], Chosen | None]
"""Sees a prompt before its first layer; None: everything goes on. Raises UnsupportedError for what it cannot judge."""

Merge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states [B, n, width] after a layer -> (slots that stay [B, m], ascending; their states [B, m, width])."""


def text_mask(image_mask: Tensor, mask: Tensor | None) -> Tensor:
    """bool [B, n]: real tokens after the last image token; the last real token where there are none."""
    real = torch.ones_like(image_mask) if mask is None else mask
    # images at this place or behind it
    ahead = image_mask.flip(-1).cumsum(-1).flip(-1)
    text = real & (ahead == 0)
    places = torch.arange(image_mask.shape[-1], device=image_mask.device)
    last = (real * places).argmax(-1, keepdim=True)
    return torch.where(text.any(-1, keepdim=True), text, places == last)
