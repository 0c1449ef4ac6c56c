"""What methods see of a prompt's image tokens before the first layer, and what they answer. Plain data.

B sequences, n tokens each, V image tokens in each; H and D are the vision tower's heads and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
        first: queries and keys of the tower's first layer, each [images, H, 1 + P, head_dim].
    """

    attention: Tensor
    keys: Tensor
    states: Tensor
    project: Callable[[Tensor], Tensor]
    first: tuple[Tensor, Tensor] | None = None


def class_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the class token on the patches, fp32 [images, H, P], of a layer's [images, H, 1 + P, head_dim].

    Its share on itself is left out, so that rows sum to less than 1.
    """
    scores = query[:, :, :1].float() @ key.float().mT * query.shape[-1] ** -0.5
    attention: Tensor = scores.softmax(-1)[:, :, 0, 1:]
    return attention


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


def without_images(kwargs: Mapping[str, Any], image_mask: Tensor, marks: tuple[int, ...] = ()) -> dict[str, Any]:
    """A forward's arguments for the same prompts without images: text only, moved to the right, positions from 0.

    Args:
        kwargs: arguments with `input_ids` [B, n].
        image_mask: bool [B, n], True at image tokens.
        marks: ids of tokens that go with them.

    Raises UnsupportedError for a prompt that is nothing but images.
    """
    ids = kwargs["input_ids"]
    text = _real(kwargs.get("attention_mask"), ids) & ~image_mask
    for mark in marks:
        text &= ids != mark
    counts = text.sum(-1)
    if int(counts.min()) == 0:
        raise UnsupportedError(
            "a prompt is nothing but images, so there is no text-only prompt to compare it with. Add words to it."
        )
    order = text.int().argsort(dim=-1, stable=True)[:, -int(counts.max()) :]
    mask = text.gather(1, order)
    found: dict[str, Any] = {"attention_mask": mask.long()}
    for name, value in kwargs.items():
        per_token = isinstance(value, Tensor) and value.shape == ids.shape
        if per_token and name not in ("attention_mask", "position_ids", "labels"):
            found[name] = value.gather(1, order)
    # padding holds image tokens otherwise, which a model counts
    found["input_ids"] = found["input_ids"].where(mask, found["input_ids"][:, -1:])
    # told, so that models with positions in three dimensions do not work out and remember those of this prompt
    found["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return found | {name: kwargs[name] for name in ("use_cache", "logits_to_keep") if name in kwargs}


def _real(mask: Any, ids: Tensor) -> Tensor:
    """bool [B, n]: no padding. `mask`: as a forward takes it, prepared for a static cache too."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.ndim == 4:
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    real: Tensor = mask[:, : ids.shape[1]].bool()
    return real
