"""The junction at the text model's input: image tokens that never enter the language model.

A `request` method may choose them once the images are embedded. The prompt is cut there, before the first layer, and
all layers hold the same shorter cache. What comes later on this cache still speaks of the whole prompt, in masks,
positions and in how many tokens it repeats; `follow` translates. The hidden states that go out have the prompt's whole
length again: tokens that did not go in have their embedding there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfpatch.attention import Engine
from hfpatch.call import SequenceState, Shortened
from hfpatch.errors import UnsupportedError
from hfpatch.images import Chosen, Embedded
from hfpatch.pruning import DEEPSTACK, take


def shorten(engine: Engine, state: SequenceState, named: dict[str, Any], static: bool) -> dict[str, Any]:
    """Let methods see a prompt, and cut it down to what they chose. Returns the text model's arguments.

    `engine.image_mask` is cut too; `state.shortened` then says what happened.
    """
    image_mask, embeds = engine.image_mask, named.get("inputs_embeds")
    if image_mask is None or embeds is None or image_mask.shape != embeds.shape[:2] or not bool(image_mask.any()):
        return named
    for bound, look in engine.looks:
        image_mask = engine.image_mask
        assert image_mask is not None
        mask = named.get("attention_mask")
        padding = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        try:
            seen = Embedded(named["inputs_embeds"], image_mask, padding)
            if "class token" in bound.method.card.needs:
                tower = engine.tap.tower(seen.images) if engine.tap is not None else None
                if tower is None:
                    raise UnsupportedError(_NO_TOWER)
                seen = replace(seen, tower=tower)
            chosen = look(seen)
            images = int(image_mask[0].sum())
            if chosen is None or (chosen.embeds is None and chosen.places.shape[1] == images):
                continue
            if reason := _why_not(named, static, chosen):
                raise UnsupportedError(reason)
        except UnsupportedError as error:
            engine.fall_back(f"{bound.method.name} leaves the images alone", str(error), bound.strict)
            continue
        before = embeds.shape[1]
        named = _cut(engine, state, named, seen, chosen)
        embeds = named["inputs_embeds"]
        kept = chosen.places.shape[1]
        bound.count("prefill", f"{kept} of {images} image tokens go in", "", {}, embeds.shape[1] / before)
    return named


_NO_TOWER = (
    "the image tokens are not the vision tower's patches one by one: the model cuts images into pieces, another method "
    "has left some out, or the prompt came without its images"
)


def _why_not(named: dict[str, Any], static: bool = False, chosen: Chosen | None = None) -> str | None:
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if static or (mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)):
        return "a static cache or a mask of several dimensions cannot be cut; use the dynamic cache and a padding mask"
    if chosen is not None and chosen.compact and isinstance(positions, Tensor) and positions.ndim > 2:
        return "positions are rows and columns of the image, and cannot be numbered anew; use positions='original'"
    if chosen is not None and chosen.embeds is not None and named.get(DEEPSTACK[1]) is not None:
        return "the model adds to image tokens after its first layers, and mixtures of them have no such addition"
    return None


def _cut(engine: Engine, state: SequenceState, named: dict[str, Any], seen: Embedded, chosen: Chosen) -> dict[str, Any]:
    embeds, image_mask = seen.embeds, seen.image_mask
    batch, length = image_mask.shape
    own = image_mask.nonzero()[:, 1].view(batch, -1)
    slots = own.gather(1, chosen.places)
    if chosen.embeds is not None:
        index = slots[..., None].expand(-1, -1, embeds.shape[-1])
        embeds = embeds.scatter(1, index, chosen.embeds.to(embeds.dtype))
    stays = (~image_mask).scatter(1, slots, True)
    kept = length - own.shape[1] + slots.shape[1]
    slots = stays.int().argsort(dim=-1, descending=True, stable=True)[:, :kept]
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    named = {**named, "inputs_embeds": take(embeds, slots)}
    if mask is not None:
        named["attention_mask"] = mask.gather(1, slots)
    if not chosen.compact:
        if positions is None:
            positions = torch.arange(length, device=slots.device)[None]
        # [B or 1, n], or one such table for time, height and width each
        shape = (*positions.shape[:-2], batch, length)
        named["position_ids"] = positions.expand(shape).gather(-1, slots.expand(*shape[:-1], -1))
        if mask is None:
            # without a mask, gaps in the positions look like packed sequences
            named["attention_mask"] = torch.ones_like(slots)
    elif positions is not None:
        # every token moves up by what was left out before it
        gone = slots - torch.arange(kept, device=slots.device)
        named["position_ids"] = positions.expand(batch, -1).gather(1, slots) - gone
    if named.get(DEEPSTACK[1]) is not None:
        places, states = (named[name] for name in DEEPSTACK)
        # number of an image token among all of the batch
        numbers = (places.flatten().cumsum(0) - 1).view_as(places)
        places = places.gather(1, slots)
        left = numbers.gather(1, slots)[places]
        named |= dict(zip(DEEPSTACK, (places, [x[left.to(x.device)] for x in states]), strict=True))
    engine.image_mask = image_mask.gather(1, slots)
    compact, mixed = chosen.compact, chosen.embeds is not None
    if (known := state.shortened) is None:
        state.shortened = Shortened(slots, length, compact, mixed, seen.embeds)
    else:
        compact, mixed = compact or known.compact, mixed or known.mixed
        state.shortened = Shortened(known.kept.gather(1, slots), known.length, compact, mixed, known.embeds)
    return named


def restore(state: SequenceState, output: Any) -> Any:
    """The text model's output with hidden states of the prompt's whole length; for the prompt's own forward."""
    short = state.shortened
    if short is None or short.embeds is None:
        return None
    tokens, short.embeds = short.embeds, None
    hidden = output[0]
    index = short.kept.to(hidden.device)[..., None].expand_as(hidden)
    whole = tokens.to(hidden).scatter(1, index, hidden)
    if isinstance(output, tuple):
        return (whole, *output[1:])
    output.last_hidden_state = whole
    return output


def follow(engine: Engine, state: SequenceState, named: dict[str, Any], past: int) -> dict[str, Any]:
    """Translate a later forward, which speaks of the whole prompt, for a cache that holds the shortened one."""
    short = state.shortened
    if short is None:
        return named
    named = dict(named)
    gone = short.length - short.kept.shape[1]
    key = "inputs_embeds" if named.get("inputs_embeds") is not None else "input_ids"
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedError(f"{_why_not(named)}; the prompt on this cache was shortened.")
    if (repeated := _repeated(short, named[key], mask, positions, past + gone)) > 0:
        named[key] = named[key][:, repeated:]
        if positions is not None:
            named["position_ids"] = positions[..., repeated:]
        if engine.image_mask is not None:
            engine.image_mask = engine.image_mask[:, repeated:]
        positions = named.get("position_ids")
    if mask is not None:
        kept = short.kept.to(mask.device)
        later = torch.arange(short.length, mask.shape[1], device=mask.device).expand(len(kept), -1)
        named["attention_mask"] = mask.gather(1, torch.cat([kept, later], 1))
    if short.compact and positions is not None:
        named["position_ids"] = positions - gone
    elif positions is not None and positions.ndim > 2 and mask is None and not engine.placed:
        # the model counted from the cache's length
        named["position_ids"] = positions + gone
    elif not short.compact and positions is None:
        tokens = named[key]
        named["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None] + past + gone
    return named


def _repeated(short: Shortened, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, seen: int) -> int:
    """How many of the tokens are in the cache already.

    `generate` counts what is new from the cache's length, and so begins too early. `seen`: tokens so far, the ones that
    were left out included.
    """
    if tokens.shape[1] == 1:
        return 0
    if mask is not None:
        return seen + tokens.shape[1] - mask.shape[1]
    if positions is not None and positions.ndim == 2:
        # without a mask there is no padding: positions count tokens
        return max(seen - int(positions[0, 0]), 0)
    return 0
