"""The junction at the model's forward: what is known about a prompt before its first layer runs.

The outer hook sees `input_ids` (where the image tokens are) and lets `request` methods look at the prompt; the inner
one, at the text model, sees the cache and opens the forward that all layers share.
"""

from __future__ import annotations

import inspect
import weakref
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hfpatch import beside, pruning, shortening
from hfpatch.attention import Bound, Engine, Forward, Witness
from hfpatch.call import SequenceState
from hfpatch.costs import ImageCost
from hfpatch.errors import UnsupportedError
from hfpatch.methods.base import Request

_OUTER: weakref.WeakKeyDictionary[nn.Module, tuple[Engine, int | None, list[Bound]]] = weakref.WeakKeyDictionary()
_TEXT: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


# config entries of tokens that only say where an image begins, ends or breaks its lines
_IMAGE_MARKS = (
    *("vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id"),
    *("image_start_token_id", "image_end_token_id", "image_break_token_id"),
)


def attach_text(module: nn.Module, engine: Engine) -> list[Any]:
    """Hook the text model; returns the hook handles."""
    _TEXT[module] = engine
    return [
        module.register_forward_pre_hook(before_text, with_kwargs=True),
        module.register_forward_hook(after_text, with_kwargs=True, always_call=True),
    ]


def attach_outer(module: nn.Module, engine: Engine, image_token_id: int | None, requesters: list[Bound]) -> list[Any]:
    """Hook the whole model."""
    _OUTER[module] = engine, image_token_id, requesters
    return [
        module.register_forward_pre_hook(before_model, with_kwargs=True),
        module.register_forward_hook(after_model, always_call=True),
    ]


def detach(module: nn.Module) -> None:
    _OUTER.pop(module, None)
    _TEXT.pop(module, None)


@cache
def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    kind: Any = type(module)
    return {**dict(zip(_parameters(kind), args, strict=False)), **kwargs}


def _cache(named: dict[str, Any]) -> Any:
    # renamed in transformers 5.24; the old name is accepted until 5.40
    cache = named.get("cache")
    return cache if cache is not None else named.get("past_key_values")


def _past(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entry = _OUTER.get(module)
    if entry is None or entry[0].bypass:
        return None
    engine, image_token_id, requesters = entry
    named = _named(module, args, kwargs)
    input_ids = named.get("input_ids")
    engine.image_mask = None
    if isinstance(input_ids, Tensor) and image_token_id is not None:
        engine.image_mask = input_ids == image_token_id
    if engine.asking is None:
        engine.placed = named.get("position_ids") is not None
    # the outermost module asks, for all that run inside it
    if not requesters or engine.asking is not None:
        return None
    # as if the images were encoded inside
    whole = engine.encoder.undone(named) if engine.encoder is not None else named
    if _past(cache := _cache(named)) > 0:
        engine.asking = module if beside.go_on(engine, whole, cache) else None
        return None
    engine.asking, engine.store = module, {}
    streams = []
    changed = False
    for bound in requesters:
        call, marks = partial(_call_dense, module, engine), _image_marks(module)
        write, fall_back = partial(_write, module, engine), partial(_fall_back, engine, bound)
        request = Request(whole, call, write, fall_back, engine.store, engine.image_mask, marks)
        if (replaced := bound.method.request(request)) is not None:
            named = whole = replaced
            changed = True
            bound.count("prefill", f"{bound.method.name}: changed the prompt", "", {}, 1.0)
        engine.looks += [(bound, look) for look in request.looks]
        streams += [(bound, stream) for stream in request.streams]
    # who prunes inside the model looks at what the others have left
    engine.looks.sort(key=lambda entry: "prune" in entry[0].method.verbs())
    beside.begin(engine, streams, whole, cache)
    return ((), named) if changed else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def after_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Mix in the logits of second runs; take off what was put on for one prompt."""
    entry = _OUTER.get(module)
    # a dense call inside this forward ends nothing
    if entry is None or entry[0].bypass or entry[0].asking is not module:
        return
    engine = entry[0]
    try:
        if output is not None and engine.streams:
            beside.mix(engine, partial(_call_dense, module, engine), output)
    finally:
        engine.stop_asking()


def _fall_back(engine: Engine, bound: Bound, reason: str) -> None:
    engine.fall_back(f"{bound.method.name} leaves the prompt as it is", reason, bound.strict)


@torch.no_grad()
def _write(module: nn.Module, engine: Engine, steps: int, watch: Witness, /, **kwargs: Any) -> Tensor:
    """Continue prompts greedily on a cache of their own, see `Request.write`. Padding must stand on the left."""
    kind: Any = type(module)
    ends: Any = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor([] if ends is None else ends, device=kwargs["input_ids"].device).flatten()
    if "logits_to_keep" in _parameters(kind):
        kwargs["logits_to_keep"] = 1
    written: list[Tensor] = []
    output = _call_dense(module, engine, watch, **kwargs, use_cache=True)
    mask, name = kwargs["attention_mask"], next(name for name in beside.CACHE_NAMES if name in output)
    while True:
        if not hasattr(output, "logits"):
            raise UnsupportedError(f"{kind.__name__} has no language head; run the whole model")
        token = output.logits[:, -1].argmax(-1)
        over = torch.isin(written[-1], ends) | (written[-1] < 0) if written else torch.zeros_like(token).bool()
        written.append(token.masked_fill(over, -1))
        if len(written) == steps or bool((over | torch.isin(token, ends)).all()):
            return torch.stack(written, 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        follow = {"input_ids": token[:, None], "attention_mask": mask, name: output[name]}
        output = _call_dense(module, engine, watch, **follow, use_cache=True)


def _call_dense(module: nn.Module, engine: Engine, watch: Witness | None = None, /, **kwargs: Any) -> Any:
    engine.bypass, engine.witness = True, watch
    try:
        return module(**kwargs)
    finally:
        engine.bypass, engine.witness = False, None


def _image_marks(module: nn.Module) -> tuple[int, ...]:
    named = (getattr(module.config, name, None) for name in _IMAGE_MARKS)
    return tuple(token for token in named if isinstance(token, int))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_text(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Open the forward that the layers share; find or start the state of its sequences; shorten the prompt."""
    engine = _TEXT.get(module)
    if engine is None or engine.bypass:
        return None
    named = _named(module, args, kwargs)
    cache = _cache(named)
    past = _past(cache)
    state = engine.states.get(cache) if cache is not None and past > 0 else None
    given = named
    if state is None:
        state = SequenceState(store=engine.store)
        engine.store = {}
        if past == 0 and engine.looks:
            static = getattr(cache, "is_compileable", False)
            named = shortening.shorten(engine, state, named, static)
    else:
        named = shortening.follow(engine, state, named, past)
    inputs = named.get("inputs_embeds")
    q_len = (inputs if inputs is not None else named["input_ids"]).shape[1]
    if past == 0:
        state.prompt_len = q_len
    if cache is not None:
        engine.states[cache] = state
    if engine.image_mask is not None and engine.image_mask.shape[1] == q_len:
        _remember_images(state, engine.image_mask, past)
    engine.image_mask = None
    state.forwards += 1
    engine.forwards += 1
    prunable = not getattr(cache, "is_compileable", False)
    engine.forward = Forward(past, state, prunable=prunable, cache=cache)
    if engine.prunes and past == 0:
        named = pruning.take_over(engine.forward, named)
    return ((), named) if named is not given else None


def _remember_images(state: SequenceState, new: Tensor, past: int) -> None:
    """Append the image places of new tokens; a cache that was cropped takes its tail with it."""
    if past == 0:
        state.image_mask = new if bool(new.any()) else None
    elif state.image_mask is not None:
        known = state.image_mask[:, :past]
        known = torch.nn.functional.pad(known, (0, past - known.shape[1]), value=False)
        state.image_mask = torch.cat([known, new], 1)
    elif new.shape[1] > 1 and bool(new.any()):
        # the first image comes in a later turn
        state.image_mask = torch.nn.functional.pad(new, (past, 0), value=False)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def after_text(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    engine = _TEXT.get(module)
    if engine is None or engine.bypass or engine.forward is None:
        return None
    forward, engine.forward = engine.forward, None
    if _cache(_named(module, args, kwargs)) is None and output is not None:
        # the model made the cache itself
        made = output["cache"] if "cache" in output else dict(output).get("past_key_values")
        if made is not None:
            engine.states[made] = forward.state
            for change in forward.later:
                change(made)
    if output is None or forward.past > 0:
        return None
    _count_cost(engine, forward.state)
    return shortening.restore(forward.state, output)


def _count_cost(engine: Engine, state: SequenceState) -> None:
    """Add a prompt with images to what the patch costs and saves."""
    if state.image_mask is None or state.prompt_len is None or engine.layer_cost is None:
        return
    batch, left = state.image_mask.shape
    tokens = left if state.shortened is None else state.shortened.length
    images = float(state.image_mask.sum()) / batch + tokens - left
    layers = [state.kept[i].shape[1] if i in state.kept else left for i in range(engine.num_layers)]
    engine.image_costs.add(ImageCost.of(engine.layer_cost, tokens, images, layers), batch)
