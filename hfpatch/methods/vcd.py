"""Visual contrastive decoding: what the model would say without seeing clearly is taken off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.errors import UnsupportedError
from hfpatch.methods.base import Card, Method, Request, Stream, option, register_patcher

_STEPS = 1000


@register_patcher
@dataclass(frozen=True, kw_only=True)
class VCD(Method):
    """Beside every prompt with images run it again with noise over the images, and decode from the difference.

    The logits become (1 + alpha) z - alpha z', with z' from the noisy run, and tokens that z itself holds for
    implausible are ruled out: those with less than `beta` times the probability of the best one. The noise is that of a
    diffusion after `noise` of 1000 steps, on normalised pixels, the same in every image of a batch. The second run has
    a KV cache of its own and no other patch on it; it doubles the cost of prompt and decoding. Greedy decoding and
    beams work as well as the authors' sampling.

    Source: Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding, arXiv
    2311.16922, sections 3.2 and 3.3, and the authors' code for the noise.
    """

    name: ClassVar[str] = "vcd"
    aliases: ClassVar[tuple[str, ...]] = ("visual-contrastive-decoding",)
    card: ClassVar[Card] = Card(
        family="vision",
        summary="contrast the logits with those of a noisy image, at every step",
        paper="Mitigating Object Hallucinations in LVLMs through Visual Contrastive Decoding, arXiv 2311.16922",
        needs=("image tokens", "pixels"),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({}, {"alpha": 0.5, "beta": 0.2, "noise": 900})
    chunk_invariant: ClassVar[bool] = True

    alpha: float = option(1.0, "weight of the contrast", ge=0)
    beta: float = option(0.1, "least probability of a token, as a share of the best one's", ge=0, le=1)
    noise: int = option(500, "steps of diffusion, of 1000: 0 leaves the image nearly as it is", ge=0, le=_STEPS - 1)
    seed: int = option(0, "of the noise")

    @classmethod
    def neutral(cls) -> Self:
        return cls(alpha=0.0, beta=0.0)

    @property
    def decode_invariant(self) -> bool:
        return True

    def request(self, request: Request) -> None:
        try:
            if (self.alpha > 0 or self.beta > 0) and request.pixels() is not None:
                request.beside(Stream(self._blurred, self._contrast))
        except UnsupportedError as error:
            request.fall_back(str(error))

    def _blurred(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        pixels = kwargs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return kwargs
        return {**kwargs, "pixel_values": diffused(pixels, self.noise, self.seed, _rows(kwargs))}

    def _contrast(self, logits: Tensor, other: Tensor) -> Tensor:
        return contrasted(logits, other, self.alpha, self.beta)


def contrasted(logits: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + alpha) logits - alpha other, and the dtype's least number where beta rules a token out."""
    z = logits.float()
    mixed = ((1 + alpha) * z - alpha * other.float()).to(logits.dtype)
    if beta == 0:
        return mixed
    least = z.amax(-1, keepdim=True) + math.log(beta)
    # a number and not -inf, so that losses stay finite
    return mixed.masked_fill(z < least, torch.finfo(logits.dtype).min)


def diffused(pixels: Tensor, step: int, seed: int, rows: list[int] | None = None) -> Tensor:
    """Images after `step` + 1 steps of diffusion: sqrt(a) x + sqrt(1 - a) e, the same e in every image.

    Args:
        pixels: one image along dimension 0, or, where `rows` says so, several rows of patches for each image.
    """
    kept = _kept()[step]
    noise = [_noise((count, *pixels.shape[1:]), seed) for count in rows or [1] * len(pixels)]
    e = torch.cat(noise).to(pixels) if noise else torch.zeros_like(pixels)
    return (kept.sqrt() * pixels + (1 - kept).sqrt() * e).to(pixels.dtype)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    # on the CPU, so that it is the same on every device
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rows(kwargs: Mapping[str, Any]) -> list[int] | None:
    """Rows of patches of each image, for families that stack the patches of all images."""
    grids = kwargs.get("image_grid_thw")
    return None if grids is None else [int(n) for n in grids.prod(-1).tolist()]


@lru_cache(maxsize=1)
def _kept() -> Tensor:
    """What is left of an image's variance after each step of the diffusion: fp32 [1000]."""
    spread = torch.sigmoid(torch.linspace(-6, 6, _STEPS)) * (0.005 - 1e-5) + 1e-5
    return (1 - spread).cumprod(0)
