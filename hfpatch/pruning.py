"""The junction between decoder layers: removes the tokens that a method's `prune` verb gave up.

The decision is made inside attention, where queries and keys are at hand (`attention.py`), or between two layers for
methods that go by the next one's; the hooks here carry it out. Kept tokens keep their positions, or are numbered anew
where the method says so. Layers up to the pruning one hold the whole prompt in their cache, later ones hold what was
kept. After the last layer the hidden states return to the prompt's length, every pruned token with its last hidden
state, so that whoever indexes prompt logits finds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfpatch import attention
from hfpatch.attention import Bound, Engine, Forward
from hfpatch.errors import UnsupportedError
from hfpatch.summary import PRUNE


@dataclass(frozen=True, eq=False)
class _Place:
    """A decoder layer among the others. The weak references keep a model from being held by its own hooks."""

    engine: Engine
    layer_idx: int
    text: weakref.ref[nn.Module]
    following: weakref.ref[nn.Module] | None


# arguments of text models that add states of the vision tower to image tokens after their first layers (Qwen3-VL)
DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")

_DECODER_LAYERS: weakref.WeakKeyDictionary[nn.Module, _Place] = weakref.WeakKeyDictionary()


def attach(
    module: nn.Module, engine: Engine, layer_idx: int, text: nn.Module, following: nn.Module | None
) -> list[Any]:
    """Hook one decoder layer of the text model; `following` comes next. Returns the hook handles."""
    after = None if following is None else weakref.ref(following)
    _DECODER_LAYERS[module] = _Place(engine, layer_idx, weakref.ref(text), after)
    return [
        module.register_forward_pre_hook(before_layer, with_kwargs=True),
        module.register_forward_hook(after_layer, with_kwargs=True),
    ]


def detach(module: nn.Module) -> None:
    _DECODER_LAYERS.pop(module, None)


def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut positions and mask down to the tokens that this layer has."""
    place = _DECODER_LAYERS.get(module)
    forward = place.engine.forward if place is not None else None
    if place is None or forward is None:
        return None
    layer_idx, state = place.layer_idx, forward.state
    mask = kwargs.get("attention_mask")
    if forward.past > 0:
        kept = state.kept.get(layer_idx)
        if kept is None:
            return None
        kwargs = dict(kwargs)
        if mask is not None:
            kwargs["attention_mask"] = _cut_decode_mask(mask, kept, forward)
        if (lost := state.lost.get(layer_idx)) is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["position_embeddings"] = _moved_up(place, forward, kwargs, hidden, lost)
        return args, kwargs
    if forward.current is None:
        return None
    state.kept[layer_idx] = forward.current
    kwargs = dict(kwargs)
    # the ids have gaps now, which transformers would take for packed sequences; RoPE reads the embeddings below
    kwargs["position_ids"] = None
    if (embeddings := kwargs.get("position_embeddings")) is not None:
        count = forward.current.shape[1]
        if forward.compact:
            assert state.prompt_len is not None
            state.lost[layer_idx] = state.prompt_len - count
            # padding is on the left and stays, so the first slots have the first positions
            kwargs["position_embeddings"] = tuple(x[..., :count, :] for x in embeddings)
        else:
            kwargs["position_embeddings"] = tuple(take(x, forward.current) for x in embeddings)
    if mask is not None:
        kwargs["attention_mask"] = _cut_prompt_mask(mask, forward)
    return args, kwargs


def after_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Gather what was decided to be kept; after the last layer, put everything back."""
    place = _DECODER_LAYERS.get(module)
    forward = place.engine.forward if place is not None else None
    if place is None or forward is None:
        return None
    given = hidden = output[0] if isinstance(output, tuple) else output
    last = place.layer_idx == place.engine.num_layers - 1
    if forward.added is not None:
        hidden = _with_added(forward, forward.added, place.layer_idx, hidden)
    if forward.past == 0 and (bounds := place.engine.ahead.get(place.layer_idx)):
        _ask_ahead(place, bounds, hidden, kwargs)
    if forward.kept is not None and not last:
        bound, decision = forward.kept
        hidden = _drop(forward, bound, decision, hidden)
    elif last and forward.whole is not None and forward.current is not None:
        hidden = _scatter(forward.whole.to(hidden.device), forward.current.to(hidden.device), hidden)
        forward.whole = forward.current = None
    elif hidden is given:
        return None
    forward.kept = None
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def take_over(forward: Forward, named: dict[str, Any]) -> dict[str, Any]:
    """Do in the hooks what the text model would do between its layers by the prompt's places: DeepStack's additions.

    `named`: the text model's arguments; returns them without the additions.
    """
    places, states = (named.get(name) for name in DEEPSTACK)
    if states is None or places is None:
        return named
    forward.added = places, states
    return {**named, **dict.fromkeys(DEEPSTACK)}


def _with_added(forward: Forward, added: tuple[Tensor, Sequence[Tensor]], layer_idx: int, hidden: Tensor) -> Tensor:
    places, states = added
    if layer_idx >= len(states):
        return hidden
    places = places.to(hidden.device)
    more = hidden.new_zeros(*places.shape, hidden.shape[-1])
    more[places] = states[layer_idx].to(hidden)
    return hidden + (more if forward.current is None else take(more, forward.current))


def _drop(forward: Forward, bound: Bound, decision: Any, hidden: Tensor) -> Tensor:
    """What is left of the layer's output."""
    count = hidden.shape[1]
    if forward.whole is None:
        forward.whole = hidden.clone()
        forward.current = torch.arange(count, device=hidden.device).expand(hidden.shape[0], -1)
    else:
        assert forward.current is not None
        forward.current = forward.current.to(hidden.device)
        forward.whole = _scatter(forward.whole.to(hidden.device), forward.current, hidden)
    if isinstance(decision, Tensor):
        slots = decision.to(hidden.device)
        hidden = take(hidden, slots)
    else:
        slots, hidden = decision(hidden)
    forward.current = forward.current.gather(1, slots)
    forward.compact = forward.compact or getattr(bound.method, "positions", None) == "compact"
    bound.count("prefill", f"{PRUNE}{slots.shape[1]} tokens", "", {}, slots.shape[1] / count)
    return hidden


def _ask_ahead(place: _Place, bounds: Sequence[Bound], hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Let methods decide by the next layer's queries and keys, before that layer runs."""
    following = place.following() if place.following is not None else None
    norm = getattr(following, "input_layernorm", None)
    if following is None or norm is None:
        raise UnsupportedError(
            f"{bounds[0].method.name} goes by the next layer's queries and keys, and {type(following).__name__} has no "
            "input_layernorm to make them from. Take a method that goes by a layer's own."
        )
    given = {name: kwargs.get(name) for name in ("position_embeddings", "attention_mask")}
    attention.show_ahead(place.engine, following, bounds, {"hidden_states": norm(hidden), **given})


def take(x: Tensor, slots: Tensor) -> Tensor:
    """Rows of x [..., B or 1, n, D] at slots [B, m] -> [..., B, m, D]."""
    index = slots.to(x.device)[..., None].expand(*x.shape[:-3], *slots.shape, x.shape[-1])
    return x.expand(*x.shape[:-3], slots.shape[0], -1, -1).gather(-2, index)


def _scatter(whole: Tensor, slots: Tensor, hidden: Tensor) -> Tensor:
    return whole.scatter(1, slots[..., None].expand_as(hidden), hidden)


def _moved_up(place: _Place, forward: Forward, kwargs: dict[str, Any], hidden: Tensor, lost: int) -> tuple[Tensor, ...]:
    """Position embeddings of new tokens for a layer that has lost some of those before, in compact counting."""
    given = kwargs["position_embeddings"]
    memo = ("positions", id(given), lost)
    if memo not in forward.masks:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None] + forward.past
        rotary = getattr(place.text(), "rotary_emb", None)
        if rotary is None or positions.ndim != 2:
            raise UnsupportedError(
                "positions='compact' needs one rotary embedding for all layers and positions in one dimension, which "
                "this model has not. Use positions='original'."
            )
        forward.masks[memo] = (given, rotary(hidden, positions - lost))
    return forward.masks[memo][1]  # type: ignore[no-any-return]


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
