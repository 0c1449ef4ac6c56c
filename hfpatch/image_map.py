"""Which image tokens a layer computed with, and which squares of a picture they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfpatch.call import SequenceState

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """A picture, or a piece of it, as the model saw it.

    Attributes:
        pixels: [height, width, 3].
        rows, columns: squares that it was cut into, an image token each.
        first: the image token of the upper left square; the others follow row by row.
    """

    pixels: Pixels
    rows: int
    columns: int
    first: int


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers, `first` to `last`, that computed with the same image tokens `kept`, bool [V]."""

    first: int
    last: int
    kept: Tensor

    @property
    def layers(self) -> str:
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"


def kept_by_layer(state: SequenceState, images: Tensor, num_layers: int) -> Tensor | None:
    """Image tokens that each layer computed with: bool [num_layers, B, V].

    `images`: bool [B, n], True at the image tokens of the prompt. None: there are none, or not as many in every row;
    what went in are mixtures of them; or the prompt that ran was another one.
    """
    batch, length = images.shape
    short, counts = state.shortened, images.sum(-1)
    left = length if short is None else short.kept.shape[1]
    if state.prompt_len != left or (short is not None and (short.mixed or short.length != length)):
        return None
    if not bool(counts.any()) or bool((counts != counts[0]).any()):
        return None
    entered = torch.arange(length, device=images.device).expand(batch, -1) if short is None else short.kept
    kept = []
    for layer in range(num_layers):
        slots = state.kept.get(layer)
        slots = entered if slots is None else entered.gather(1, slots.to(entered.device))
        stays = torch.zeros_like(images).scatter(1, slots.to(images.device), True)
        kept.append(stays[images].view(batch, -1))
    return torch.stack(kept)


def stages(kept: Tensor) -> list[Stage]:
    """Runs of layers that kept the same: of bool [num_layers, V]."""
    layers = kept.tolist()
    runs = [list(group) for _, group in groupby(range(len(layers)), key=lambda layer: layers[layer])]
    return [Stage(run[0], run[-1], kept[run[0]]) for run in runs]


def views(model: Any, processor: Any, inputs: Mapping[str, Any], pictures: Sequence[Any], tokens: int) -> list[View]:
    """What the image tokens of one prompt show, in their order; [] where they are no regular squares.

    Args:
        inputs: of the model, from its processor.
        pictures: that went into the processor, as PIL has them.
        tokens: image tokens of the prompt.
    """
    vision = getattr(model.config, "vision_config", None)
    grids = inputs.get("image_grid_thw")
    if grids is not None:
        # the whole picture, only resized
        merge = getattr(vision, "spatial_merge_size", 1)
        found, first = [], 0
        for picture, (_, height, width) in zip(pictures, grids.tolist(), strict=True):
            found.append(View(np.asarray(picture), height // merge, width // merge, first))
            first += height * width // merge**2
        return found if first == tokens else []
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
        return []
    seen = _shown(pixels.reshape(-1, *pixels.shape[-3:]), processor)
    height, width = seen.shape[1:3]
    if "image_sizes" in inputs and len(pictures) == 1 and isinstance(patch := getattr(vision, "patch_size", None), int):
        # the whole picture comes before its pieces, whose squares lose their borders
        rows, columns = height // patch, width // patch
        return [View(seen[0], rows, columns, 0)] if rows * columns <= tokens else []
    each = tokens // len(seen)
    rows = round(math.sqrt(each * height / width))
    if rows == 0 or each * len(seen) != tokens or each % rows:
        return []
    return [View(picture, rows, each // rows, n * each) for n, picture in enumerate(seen)]


def _shown(pixels: Tensor, processor: Any) -> Pixels:
    """Pixel values [n, 3, H, W] as they were before they were normalised: [n, H, W, 3]."""
    how = processor.image_processor
    pixels = pixels.float().cpu()
    if getattr(how, "do_normalize", False):
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (how.image_mean, how.image_std))
        pixels = pixels * std + mean
    shown: Pixels = (255 * pixels).round().clamp(0, 255).byte().movedim(1, -1).numpy()
    return shown
