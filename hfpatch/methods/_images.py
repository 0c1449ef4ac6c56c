"""What methods share that know image tokens: which stay, how many after which layer, and what came in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.images import text_mask
from hfpatch.statistics import last_rows_probs


def original_images(call: AttentionCall) -> int:
    """Image tokens that went into the language model, of the row with the fewest."""
    known = call.seq.image_mask if call.seq is not None and call.seq.image_mask is not None else call.image_mask
    assert known is not None
    return int(known.sum(-1).min())


def count_to_drop(call: AttentionCall, left: int) -> int:
    """How many image tokens every row loses, so that the row with the fewest has `left`; 0 without images."""
    if call.image_mask is None:
        return 0
    return max(int(call.image_mask.sum(-1).min()) - left, 0)


def drop_worst(call: AttentionCall, scores: Tensor, drop: int) -> Tensor:
    """Slots that stay, int64 [B, kv_len - drop]: all text, and the image tokens with the best scores [B, kv_len]."""
    assert call.image_mask is not None
    # text has infinite scores, so the smallest ones are image tokens
    lost = scores.masked_fill(~call.image_mask, float("inf")).topk(drop, dim=-1, largest=False).indices
    return ascending(torch.ones_like(call.image_mask).scatter(1, lost, False), call.kv_len - drop)


def ascending(stays: Tensor, count: int) -> Tensor:
    """The places of the `count` true entries in each row of bool [B, n]: int64 [B, count]."""
    return stays.int().argsort(dim=-1, descending=True, stable=True)[:, :count]


def padding_mask(call: AttentionCall) -> Tensor | None:
    """bool [B, kv_len], True at real tokens; None: all are, or the mask says it another way."""
    return call.mask if call.mask is not None and call.mask.ndim == 2 else None


def text_of(call: AttentionCall) -> Tensor:
    """bool [B, kv_len]: real tokens after the last image token, see `hfpatch.images.text_mask`."""
    assert call.image_mask is not None
    return text_mask(call.image_mask, padding_mask(call))


def check_one_piece(name: str, call: AttentionCall) -> None:
    """Raise UnsupportedError where a prompt with images seems to come in pieces.

    A method that acts at the prompt's last token must know it, and a first piece looks like a whole prompt.
    """
    if call.phase == "extend" and call.seq is not None and call.seq.forwards == 2 and call.image_mask is not None:
        raise UnsupportedError(
            f"{name} acts at the prompt's last token, and several tokens follow on the first forward: the prompt comes "
            "in chunks, or tokens are drafted. Give the prompt in one piece (no prefill_chunk_size), without drafts."
        )


# Schedules -----------------------------------------------------------------------------------------------------------


def counts_for(layers: Sequence[int], average: float, decay: float, num_layers: int, images: int) -> list[int]:
    """Image tokens left after each of the pruning layers, each `decay` times as many as the one before.

    Over all layers they average to `average`, a layer that prunes counting as pruned. At least 1, at most `images`;
    the later ones make up for what the earlier ones cannot hold.
    """
    ends = [*layers[1:], num_layers]
    spans = [end - start for start, end in zip(layers, ends, strict=True)]
    wanted = average * num_layers - images * layers[0]

    def held(first: float) -> float:
        return sum(span * min(first * decay**i, images) for i, span in enumerate(spans))

    low, high = 0.0, images / decay ** (len(layers) - 1)
    for _ in range(60):
        first = (low + high) / 2
        low, high = (first, high) if held(first) < wanted else (low, first)
    return [min(max(round(high * decay**i), 1), images) for i in range(len(layers))]


def check_reach(name: str, layers: Sequence[int], keep: float | None, num_layers: int) -> None:
    """Raise ConfigError if the layers before the first pruning alone hold more than the share `keep`."""
    if keep is not None and keep < layers[0] / num_layers:
        raise ConfigError(
            f"{name}: keep={keep:g} cannot be reached: the layers before {layers[0]} hold all image tokens, which is "
            f"{layers[0] / num_layers:.0%} of {num_layers} layers already. Give earlier layers, or a larger keep."
        )


def check_layers(name: str, option: str, layers: Sequence[int], given: Mapping[str, Sequence[float] | None]) -> None:
    """Raise ConfigError unless layers ascend, and every list that goes with them is as long and does not ascend."""
    if any(a >= b for a, b in zip(layers, layers[1:], strict=False)) or any(layer < 0 for layer in layers):
        raise ConfigError(f"{name}: {option}={tuple(layers)} must ascend and begin at 0 or later, like [1, 10, 20].")
    for other, values in given.items():
        if values is not None and len(values) != len(layers):
            raise ConfigError(f"{name}: {other} has {len(values)} entries for {len(layers)} layers; give one each.")


# Attention -----------------------------------------------------------------------------------------------------------


def attention_from_text(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention of the text behind the last image token: fp32 [B, H, rows, kv_len], and bool [B, rows], True at text.

    Rows begin at the first text token of any prompt; those that are not text are zero.
    """
    text = text_of(call)
    rows = call.kv_len - int(text.int().argmax(-1).min())
    own = text[:, -rows:]
    return last_rows_probs(call, rows) * own[:, None, :, None], own


def last_token_attention(call: AttentionCall) -> Tensor:
    """Attention of the last real prompt token, averaged over the heads: fp32 [B, kv_len]."""
    padding = padding_mask(call)
    if padding is None:
        return last_rows_probs(call, 1).mean(1)[:, 0]
    # padding may stand on the right
    rows = call.kv_len - (padding.int().cumsum(-1).argmax(-1))
    probs = last_rows_probs(call, int(rows.max())).mean(1)
    return probs.gather(1, (probs.shape[1] - rows)[:, None, None].expand(-1, 1, call.kv_len))[:, 0]


# Images in rows ------------------------------------------------------------------------------------------------------


def picked(x: Tensor, places: Tensor) -> Tensor:
    """The rows of x [images, P, D] at places [images, k]: [images, k, D]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def places_in_rows(places: Tensor, patches: int, rows: int) -> Tensor:
    """Places in each image [images, k] -> places among the image tokens of each prompt [rows, images per prompt * k].

    Prompts have as many images each, and the images as many `patches`.
    """
    images, count = places.shape
    first = patches * torch.arange(images // rows, device=places.device)
    return (places.view(rows, -1, count) + first[:, None]).flatten(1)
