"""The junction between decoder layers: removes the tokens that a method's `prune` verb gave up.

The decision is made inside attention, where queries and keys are at hand (`attention.py`); the hooks here carry it out.
Kept tokens keep their positions. Layers up to the pruning one hold the whole prompt in their cache, later ones hold
what was kept. After the last layer the hidden states return to the prompt's length, every pruned token with its last
hidden state, so that whoever indexes prompt logits finds them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hfpatch.attention import Engine, Forward

_DECODER_LAYERS: weakref.WeakKeyDictionary[nn.Module, tuple[Engine, int]] = weakref.WeakKeyDictionary()


def attach(module: nn.Module, engine: Engine, layer_idx: int) -> list[Any]:
    """Hook one decoder layer; returns the hook handles."""
    _DECODER_LAYERS[module] = engine, layer_idx
    return [
        module.register_forward_pre_hook(before_layer, with_kwargs=True),
        module.register_forward_hook(after_layer),
    ]


def detach(module: nn.Module) -> None:
    _DECODER_LAYERS.pop(module, None)


def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut positions and mask down to the tokens that this layer has."""
    engine, layer_idx = _DECODER_LAYERS.get(module, (None, 0))
    forward = engine.forward if engine is not None else None
    if forward is None:
        return None
    mask = kwargs.get("attention_mask")
    if forward.past > 0:
        kept = forward.state.kept.get(layer_idx)
        if kept is None or mask is None:
            return None
        return args, {**kwargs, "attention_mask": _cut_decode_mask(mask, kept, forward)}
    if forward.current is None:
        return None
    forward.state.kept[layer_idx] = forward.current
    kwargs = dict(kwargs)
    # the ids have gaps now, which transformers would take for packed sequences; RoPE reads the embeddings below
    kwargs["position_ids"] = None
    if (embeddings := kwargs.get("position_embeddings")) is not None:
        kwargs["position_embeddings"] = tuple(_take(x, forward.current) for x in embeddings)
    if mask is not None:
        kwargs["attention_mask"] = _cut_prompt_mask(mask, forward)
    return args, kwargs


def after_layer(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Gather what the layer's attention decided to keep; after the last layer, put everything back."""
    engine, layer_idx = _DECODER_LAYERS.get(module, (None, 0))
    forward = engine.forward if engine is not None else None
    if engine is None or forward is None or (forward.kept is None and forward.current is None):
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    last = layer_idx == engine.num_layers - 1
    if forward.kept is not None and not last:
        if forward.whole is None:
            forward.whole = hidden.clone()
            forward.current = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
        else:
            assert forward.current is not None
            forward.whole = _scatter(forward.whole, forward.current, hidden)
        kept = forward.kept.to(hidden.device)
        forward.current = forward.current.to(hidden.device).gather(1, kept)
        hidden = _take(hidden, kept)
    elif last and forward.whole is not None and forward.current is not None:
        hidden = _scatter(forward.whole.to(hidden.device), forward.current.to(hidden.device), hidden)
        forward.whole = forward.current = None
    forward.kept = None
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _take(x: Tensor, slots: Tensor) -> Tensor:
    """Rows of x [..., B or 1, n, D] at slots [B, m] -> [..., B, m, D]."""
    index = slots.to(x.device)[..., None].expand(*x.shape[:-3], *slots.shape, x.shape[-1])
    return x.expand(*x.shape[:-3], slots.shape[0], -1, -1).gather(-2, index)


def _scatter(whole: Tensor, slots: Tensor, hidden: Tensor) -> Tensor:
    return whole.scatter(1, slots[..., None].expand_as(hidden), hidden)


def _cut_prompt_mask(mask: Tensor, forward: Forward) -> Tensor:
    memo = ("prompt", id(mask), id(forward.current))
    if memo not in forward.masks:
        assert forward.current is not None
        slots = forward.current.to(mask.device)
        if mask.ndim == 2:
            cut = mask.gather(1, slots)
        else:
            rows = slots[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
            columns = slots[:, None, None, :].expand(-1, mask.shape[1], slots.shape[1], -1)
            cut = mask.expand(slots.shape[0], -1, -1, -1).gather(2, rows).gather(3, columns)
        # what the id belongs to is kept beside the answer, so that it stays its own
        forward.masks[memo] = (mask, forward.current, cut)
    return forward.masks[memo][2]  # type: ignore[no-any-return]


def _cut_decode_mask(mask: Tensor, kept: Tensor, forward: Forward) -> Tensor:
    """Columns of the whole sequence -> columns of this layer's cache: kept prompt slots, then all that came later."""
    memo = ("decode", id(mask), id(kept))
    if memo not in forward.masks:
        assert forward.state.prompt_len is not None
        kept = kept.to(mask.device)
        later = torch.arange(forward.state.prompt_len, mask.shape[-1], device=mask.device).expand(kept.shape[0], -1)
        slots = torch.cat([kept, later], 1)
        if mask.ndim == 2:
            cut = mask.gather(1, slots)
        else:
            index = slots[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
            cut = mask.expand(slots.shape[0], -1, -1, -1).gather(3, index)
        forward.masks[memo] = (mask, kept, cut)
    return forward.masks[memo][2]  # type: ignore[no-any-return]
