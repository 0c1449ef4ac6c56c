"""Regions of a picture, and the cut that shows them large. Pictures are [3, H, W], normalised; maps are [H, W]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hfpatch.errors import ConfigError, UnsupportedError

# values that interpolation made of equal ones differ by less
_TIE = 1e-5
# how much of the light the parts keep that were masked out, in a saved picture
_DIM = 0.3

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, the last two not included."""


def best_regions(saliency: Tensor, keep: float, regions: int) -> Tensor:
    """bool [H, W]: of the share `keep` with the highest values, the connected regions with the largest sums.

    Args:
        saliency: fp32 [H, W], not negative.
        regions: that stay, at least; of many, the share `keep` stays.
    """
    least = saliency.flatten().quantile(1 - keep)
    high = saliency >= least - _TIE * least.abs()
    labels, region = torch.unique(components(high)[high], return_inverse=True)
    sums = torch.zeros(len(labels), device=saliency.device).index_add(0, region, saliency[high])
    count = max(regions, math.floor(keep * len(labels)))
    stays = torch.zeros(len(labels), dtype=torch.bool, device=saliency.device)
    stays[sums.argsort(descending=True, stable=True)[:count]] = True
    return high.masked_scatter(high, stays[region])


def components(mask: Tensor) -> Tensor:
    """Regions of bool [H, W] whose pixels touch by their sides, numbered by their first pixel: int64 [H, W].

    Pixels outside have the number H * W.
    """
    outside = mask.numel()
    labels = torch.arange(outside, device=mask.device).view_as(mask).where(mask, outside)
    while True:
        near = labels.clone()
        near[1:] = near[1:].minimum(labels[:-1])
        near[:-1] = near[:-1].minimum(labels[1:])
        near[:, 1:] = near[:, 1:].minimum(labels[:, :-1])
        near[:, :-1] = near[:, :-1].minimum(labels[:, 1:])
        near = near.where(mask, outside)
        # a pixel goes on to the number that its own number has by now
        near = torch.cat([near.flatten(), near.new_tensor([outside])])[near]
        if torch.equal(near, labels):
            return labels
        labels = near


def box_of(mask: Tensor) -> Box:
    """The smallest box around what is true in bool [H, W] that has the proportions of the whole; all if nothing is."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    if not rows:
        return 0, 0, width, height
    share = max((columns[-1] + 1 - columns[0]) / width, (rows[-1] + 1 - rows[0]) / height)
    left, right = _widened(columns[0], columns[-1] + 1, math.ceil(round(share * width, 6)), width)
    top, bottom = _widened(rows[0], rows[-1] + 1, math.ceil(round(share * height, 6)), height)
    return left, top, right, bottom


def _widened(start: int, stop: int, size: int, limit: int) -> tuple[int, int]:
    """A range of `size` around [start, stop), inside [0, limit)."""
    start = min(max((start + stop - size) // 2, 0), limit - size)
    return start, start + size


def magnified(picture: Tensor, box: Box) -> Tensor:
    """What is in the box, at the size of the picture; bicubic, and no brighter or darker than it was."""
    left, top, right, bottom = box
    cut = picture[None, :, top:bottom, left:right]
    if cut.shape[-2:] == picture.shape[-2:]:
        return picture
    large = interpolate(cut.float(), picture.shape[-2:], mode="bicubic", align_corners=False)
    return large.clamp(cut.min(), cut.max())[0].to(picture.dtype)


# Pictures for people --------------------------------------------------------------------------------------------------


def save(folder: Path, name: str, picture: Tensor, mask: Tensor, shown: Tensor, scales: Any) -> Path:
    """Write NAME-0001.png and so on: the picture, dark where it was masked out, beside what is shown instead.

    `scales`: mean and standard deviation of each channel; None: the darkest and the brightest value are the ends.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("images need the pillow package: pip install 'hfpatch[vision]'") from error
    low, high = picture.min().item(), picture.max().item()
    mean, std = scales if scales is not None else ([low], [max(high - low, 1e-6)])
    light = [
        (p.float().cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1))
        for p in (picture, shown)
    ]
    light[0] = light[0] * torch.where(mask.cpu(), 1.0, _DIM)
    pixels = (255 * torch.cat(light, -1)).round().clamp(0, 255).byte().movedim(0, -1).numpy()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"{name}-{len(list(folder.glob(f'{name}-*.png'))) + 1:04d}.png"
        Image.fromarray(pixels).save(place)
    except OSError as error:
        raise ConfigError(f"cannot write pictures to {str(folder)!r}: {error}. Give another folder.") from error
    return place
