"""A second run of a prompt that never sees its images, and contrast with it: guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hfpatch.errors import UnsupportedError
from hfpatch.methods.base import Stream


class Guidance:
    """What is known of one batch of prompts for their text-only run.

    Args:
        given: arguments of the prompt's forward.
        text: the same without images, see `Request.text_only`.
        image_mask: bool [B, n], of the prompt.
        mix: (logits, logits without the image), fp32 [B, m, V] -> logits.
        wanted: whether the prompt is to be guided at all; asked after its forward.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        text: dict[str, Any],
        image_mask: Tensor,
        mix: Callable[[Tensor, Tensor], Tensor],
        wanted: Callable[[], bool],
    ) -> None:
        self._text: dict[str, Any] | None = text
        self._mask: Tensor = text["attention_mask"]
        self._length = image_mask.shape[1]
        self._has_image = image_mask.any(-1)[:, None, None]
        self._image_id = given["input_ids"][image_mask][:1]
        mask = given.get("attention_mask")
        places = torch.arange(self._length, device=image_mask.device)[None]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            places = places * mask[:, : self._length].bool()
        self._last = places.argmax(-1)
        self._begun = False
        self._mix, self._wanted = mix, wanted

    def stream(self) -> Stream:
        return Stream(self._change, self._join)

    def _change(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._text is not None:
            text, self._text = self._text, None
            return text
        self._begun = True
        name = next(name for name, value in kwargs.items() if hasattr(value, "get_seq_length"))
        return self._later(kwargs, name)

    def _later(self, kwargs: dict[str, Any], name: str) -> dict[str, Any]:
        """Tokens after the prompt: what is new of them, with masks and positions of the text-only run."""
        past, ids, mask = kwargs[name].get_seq_length(), kwargs["input_ids"], kwargs.get("attention_mask")
        written = past - self._mask.shape[1]
        new, places = ids.shape[1], kwargs.get("position_ids")
        # generate repeats tokens where the model's own cache was shortened
        if isinstance(mask, Tensor) and mask.ndim == 2:
            new = mask.shape[1] - self._length - written
            later = mask[:, self._length :].to(self._mask)
        else:
            if new > 1 and isinstance(places, Tensor) and places.ndim == 2:
                # without a mask there is no padding: positions count tokens
                new = int(places[0, -1]) + 1 - self._length - written
            later = self._mask.new_ones(len(self._mask), written + new)
        ids = ids[:, -new:]
        if new > 1 and bool((ids == self._image_id.to(ids)).any()):
            raise UnsupportedError(
                "guidance knows the images of a cache's first prompt only, and another one came later. Give all images "
                "in one prompt, or set guidance=1."
            )
        positions = self._mask.sum(-1, keepdim=True) + written + torch.arange(new, device=ids.device)
        found = {name: kwargs[name], "input_ids": ids, "position_ids": positions}
        found["attention_mask"] = torch.cat([self._mask, later], 1)
        return found | {key: kwargs[key] for key in ("use_cache", "logits_to_keep") if key in kwargs}

    def _join(self, logits: Tensor, other: Tensor) -> Tensor:
        """Of a prompt only the last token's logits are guided."""
        if not self._wanted():
            return logits
        count = 1 if not self._begun else min(logits.shape[1], other.shape[1])
        place = torch.arange(logits.shape[1] - count, logits.shape[1], device=logits.device)[None]
        if not self._begun and logits.shape[1] == self._length:
            place = self._last.to(logits.device)[:, None]
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        own = logits[rows, place]
        mixed = self._mix(own, other[:, -count:].to(logits.device))
        changed = logits.clone()
        changed[rows, place] = torch.where(self._has_image.to(logits.device), mixed, own)
        return changed
