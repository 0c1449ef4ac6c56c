"""CARVE: where the question makes the model look, cut out of the picture and shown large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.methods._crops import best_regions, box_of, magnified, save
from hfpatch.methods.base import Card, Method, Request, option, register_patcher
from hfpatch.spans import current_pixels, current_tokenizer, decode, locate
from hfpatch.statistics import last_rows_probs

# arguments of a forward that do not depend on the text
_PICTURE = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
# shares of a model's layers that 20 to 25 of LLaVA-1.5's are taken for in a shallow one
_SHALLOW, _FROM, _TO = 26, 0.7, 0.9


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Carve(Method):
    """Before a prompt with a picture runs, find what its question looks at, and let the model see only that, enlarged.

    The model answers twice, without other patches: the question, and a neutral instruction in its place. The attention
    of the last token on the image, divided by that of the neutral run and summed over some deep layers and over steps
    that weigh more the later they are, is a map of what the question is about. The `keep` of the picture with the
    highest values falls into regions; the best of them stay, the rest becomes black, and what they span is enlarged to
    the size of the picture. The prompt then runs with this picture.

    The picture is the one that the processor made, so enlarging shows no detail that it had lost, and it takes the
    place of the original, as in the paper's algorithm; the authors' code gives both. What stays is widened to the
    picture's proportions, so nothing is stretched or cut off.

    Source: Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning, arXiv 2509.06461, sections 4 and 5, and
    the authors' code for regions and weights.
    """

    name: ClassVar[str] = "carve"
    aliases: ClassVar[tuple[str, ...]] = ("contrastive-attention",)
    card: ClassVar[Card] = Card(
        family="vision",
        summary="show only what the question looks at, cut out and enlarged",
        paper="Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning, arXiv 2509.06461",
        phase="prefill",
        needs=("image tokens", "pixels"),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"max_new_tokens": 3},
        {"keep": 0.5, "regions": 1, "steps": "first", "general_ids": (7, 8)},
    )

    keep: float = option(0.2, "share of the picture with the highest contrast; 1 leaves it as it is", gt=0, le=1)
    regions: int = option(3, "connected regions of it that stay, at least; of many, the share keep stays", ge=1)
    steps: str = option(
        "all", "steps of the answer whose maps count, later ones more", choices=("all", "first", "last")
    )
    max_new_tokens: int = option(32, "steps of an answer at most", ge=1)
    at: tuple[int, ...] | None = option(
        None, "layers whose attention counts; None: 20 to 25, in models with fewer than 26 the same share of the depth"
    )
    floor: float = option(1e-8, "added to the neutral attention before it divides (the paper's lambda)", gt=0)
    general: str = option("Write a general description of the image.", "the neutral instruction")
    suffix: str = option(
        "Answer the question using a single word or phrase.", "follows it where the question ends with it"
    )
    general_ids: tuple[int, ...] | None = option(None, "the neutral instruction as token ids, instead of general")
    black: tuple[float, ...] | None = option(
        None, "normalised black of each channel; None: the processor's, else the picture's darkest"
    )
    save: str | None = option(None, "folder for a picture of every mask beside what the model then sees")

    def check(self) -> None:
        if self.at is not None and (not self.at or any(layer < 0 for layer in self.at)):
            raise ConfigError(f"carve: at={self.at} must name layers, like [20, 21, 22].")
        if self.black is not None and len(self.black) != 3:
            raise ConfigError(f"carve: black={self.black} must have one value for each of 3 channels.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    @property
    def reads_ahead(self) -> bool:
        # the question decides what of the picture is seen
        return True

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers whose attention counts."""
        if self.at is not None:
            return self.at
        if num_layers >= _SHALLOW:
            return tuple(range(20, 26))
        first, last = (min(round(share * num_layers), num_layers - 1) for share in (_FROM, _TO))
        return tuple(range(first, last + 1))

    def request(self, request: Request) -> dict[str, Any] | None:
        try:
            if self.keep == 1 or (pixels := request.pixels()) is None:
                return None
            return {**request.kwargs, "pixel_values": self._refined(request, pixels)}
        except UnsupportedError as error:
            request.fall_back(str(error))
            return None

    @torch.no_grad()
    def _refined(self, request: Request, pixels: Tensor) -> Tensor:
        prompt = _prompt(request)
        rows, columns = _grid(prompt, pixels)
        asked, answers = self._maps(request, prompt)
        neutral, _ = self._maps(request, self._neutral(prompt))
        found = contrast(asked, neutral, self.steps, self.floor).view(-1, 1, rows, columns)
        saliency = interpolate(found, pixels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        masks = [best_regions(one, self.keep, self.regions) for one in saliency]
        boxes = [box_of(mask) for mask in masks]
        carved = pixels.where(torch.stack(masks)[:, None].to(pixels.device), self._black(pixels))
        shown = [magnified(picture, box) for picture, box in zip(carved, boxes, strict=True)]
        request.store[self.name] = {"masks": masks, "boxes": boxes, "answers": answers}
        for picture, mask, large in zip(pixels, masks, shown, strict=True):
            if self.save is not None:
                save(Path(self.save), self.name, picture, mask, large, current_pixels())
        return torch.stack(shown)

    def _maps(self, request: Request, prompt: Prompt) -> tuple[Maps, Tensor]:
        """Attention on the image while the model answers, and its answers, -1 behind their ends."""
        slots, maps = prompt.image_slots(), []

        def watch(call: AttentionCall, out: Tensor) -> None:
            # a layer that slides a window has forgotten where tokens were
            if call.layer_idx in self.layers(call.num_layers) and call.sliding_window is None:
                row = last_rows_probs(call, 1)[:, :, 0].mean(1)
                maps.append(row.gather(1, slots.to(row.device)).to(slots.device))

        kwargs = {name: request.kwargs[name] for name in _PICTURE if name in request.kwargs}
        kwargs |= {"input_ids": prompt.ids, "attention_mask": prompt.mask.long()}
        if "token_type_ids" in request.kwargs:
            kwargs["token_type_ids"] = prompt.images.long()
        answers = request.write(1 if self.steps == "first" else self.max_new_tokens, watch, **kwargs)
        if not maps:
            raise UnsupportedError("the layers that it takes attention from slide a window, or are not there; give at=")
        return Maps(torch.stack(maps).view(answers.shape[1], -1, *slots.shape), (answers >= 0).sum(-1)), answers

    def _neutral(self, prompt: Prompt) -> Prompt:
        """The prompts with the neutral instruction in place of the question."""
        rows = []
        for ids, mask, images in zip(prompt.ids, prompt.mask, prompt.images, strict=True):
            real = ids[mask].tolist()
            start, stop = _question(real, int(images[mask].nonzero()[-1]) + 1)
            rows.append([*real[:start], *self._instruction(real[start:stop]), *real[stop:]])
        longest = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(longest) >= longest - lengths[:, None]
        # padding may hold any token but an image's
        ids = torch.tensor([[row[-1]] * (longest - len(row)) + row for row in rows])
        image = prompt.ids[prompt.images][0]
        ids, mask = ids.to(prompt.ids), mask.to(prompt.mask.device)
        return Prompt(ids, mask, ids == image)

    def _instruction(self, question: list[int]) -> Sequence[int]:
        if self.general_ids is not None:
            return self.general_ids
        if (tokenizer := current_tokenizer()) is None:
            return ()
        ends = self.suffix and decode(tokenizer, question).rstrip().endswith(self.suffix)
        text = f"{self.general} {self.suffix}" if ends else self.general
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _black(self, pixels: Tensor) -> Tensor:
        """Broadcastable to the pictures [B, 3, H, W]."""
        if self.black is not None:
            return torch.tensor(self.black).to(pixels).view(-1, 1, 1)
        if (scales := current_pixels()) is not None:
            mean, std = (torch.tensor(x).to(pixels).view(-1, 1, 1) for x in scales)
            return -mean / std
        return pixels.amin((2, 3), keepdim=True)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Prompts with one picture each, padded on the left: int64 [B, n], bool [B, n] real tokens, bool [B, n] images."""

    ids: Tensor
    mask: Tensor
    images: Tensor

    def image_slots(self) -> Tensor:
        """int64 [B, V]"""
        return self.images.nonzero()[:, 1].view(len(self.ids), -1)


@dataclass(frozen=True, eq=False)
class Maps:
    """Attention on image tokens, fp32 [steps, layers, B, V], and how many steps belong to each row, int64 [B]."""

    rows: Tensor
    steps: Tensor


def contrast(asked: Maps, neutral: Maps, steps: str, floor: float) -> Tensor:
    """The map of what a question is about: fp32 [B, V], the sum over layers and steps of asked / (neutral + floor).

    `steps`: "all" counts step t as t + 1 times the first, as far as both runs go; "first"; "last", each run's own.
    """
    if steps == "last":
        row = torch.arange(len(asked.steps), device=asked.rows.device)
        a, b = (maps.rows[maps.steps - 1, :, row] for maps in (asked, neutral))
        return (a / (b + floor)).sum(1)
    both = asked.steps.minimum(neutral.steps)
    count = 1 if steps == "first" else int(both.max())
    ratio = (asked.rows[:count] / (neutral.rows[:count] + floor)).sum(1)
    step = torch.arange(count, device=ratio.device)[:, None]
    weight = torch.where(step < both, step + 1, 0)
    return (weight[..., None] * ratio).sum(0)


def _prompt(request: Request) -> Prompt:
    """Raises UnsupportedError for what is not one picture in every row, with padding on the left."""
    ids, mask, images = request.kwargs.get("input_ids"), request.kwargs.get("attention_mask"), request.image_mask
    if ids is None or images is None or not bool(images.any()):
        raise UnsupportedError(
            "the prompt came as embeddings, and the places of its image are not known; give input_ids"
        )
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedError(
            "a mask of several dimensions, as a static cache brings it, does not fit the neutral prompt; use the "
            "default dynamic cache"
        )
    if not bool(mask[:, -1].all()):
        raise UnsupportedError("it answers the prompt first, and there is padding on its right; pad on the left")
    counts = images.sum(-1)
    if bool((counts != counts[0]).any()):
        raise UnsupportedError("the prompts of this batch have different numbers of image tokens")
    return Prompt(ids, mask.bool(), images)


def _grid(prompt: Prompt, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(prompt.ids):
        raise UnsupportedError(
            f"it cuts one whole picture for each prompt out of pixel_values [B, 3, H, W], and these are "
            f"{list(pixels.shape)} for {len(prompt.ids)} prompts: several pictures, or pieces or patches of one"
        )
    tokens, (height, width) = prompt.image_slots().shape[1], pixels.shape[-2:]
    rows = round(math.sqrt(tokens * height / width))
    if rows == 0 or tokens % rows:
        raise UnsupportedError(f"its {tokens} image tokens are no grid over a picture of {width} x {height} pixels")
    return rows, tokens // rows


def _question(ids: list[int], behind: int) -> tuple[int, int]:
    """Where the question stands in a prompt whose image ends before the token `behind`: [start, stop).

    What the user wrote after the image, by the chat template; without one, all but the last token.
    """
    tokenizer = current_tokenizer()
    if getattr(tokenizer, "chat_template", None):
        try:
            start, stop = locate(tokenizer, ids, role="user")[-1]
            if stop > behind:
                return max(start, behind), stop
        except (ConfigError, UnsupportedError):
            # a prompt made another way
            pass
    return behind, max(len(ids) - 1, behind)
