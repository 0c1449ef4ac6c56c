"""The junction at the logits: second runs of a sequence, whose logits are mixed into the model's own.

A `request` method may ask for one when a prompt begins. It runs densely after every forward of the model, with what
the method changed in its arguments. Its KV cache hangs behind the layers of the model's own cache, so whatever is done
to that one (beams reordered, drafts taken back) is done to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfpatch.attention import Bound, Engine
from hfpatch.call import Phase
from hfpatch.methods.base import Stream

CACHE_NAMES = ("cache", "past_key_values")
_KEY = "second runs"


@dataclass(eq=False)
class Second:
    """A second run. `named`: the arguments of the model's forward; `cache`: its own, None before the prompt."""

    bound: Bound
    stream: Stream
    named: dict[str, Any] | None
    cache: Any = None


def begin(engine: Engine, found: list[tuple[Bound, Stream]], named: dict[str, Any], cache: Any) -> None:
    """Get second runs ready for a prompt. A cache that cannot carry one leaves the prompt as it is."""
    for bound, stream in found:
        if cache is not None and (getattr(cache, "is_compileable", False) or not hasattr(cache, "layers")):
            reason = "a static cache, or one of another kind, carries no second run; use the default dynamic cache"
            engine.fall_back(f"{bound.method.name} runs dense", reason, bound.strict)
            # for what else the method does to this prompt
            engine.store[bound.method, "no second run"] = True
        else:
            engine.streams.append(Second(bound, stream, named))
    if engine.streams:
        # reaches the state of the sequences that begin here
        engine.store[_KEY] = list(engine.streams)


def go_on(engine: Engine, named: dict[str, Any], cache: Any) -> bool:
    """Get the second runs that belong to a filled cache ready; False if it has none."""
    state = engine.states.get(cache)
    engine.streams = list(state.store.get(_KEY, ())) if state is not None else []
    for second in engine.streams:
        second.named = named
    return bool(engine.streams)


def mix(engine: Engine, call: Callable[..., Any], output: Any) -> None:
    """Run what is ready, and put mixed logits into the model's output. `call` runs the model with all patches off."""
    for place, second in enumerate(engine.streams):
        named, second.named = second.named, None
        assert named is not None
        if not hasattr(output, "logits"):
            # a part of the model without its head, or a bare tuple
            reason = "second runs are mixed into logits, and this call returns none by name"
            engine.fall_back(f"{second.bound.method.name} runs dense", reason, second.bound.strict)
            continue
        phase: Phase = "prefill" if second.cache is None else "decode" if _length(named) == 1 else "extend"
        other = _run(second, call, named, cache_in(named, output), place)
        if phase in second.bound.phases:
            output.logits = second.stream.mix(output.logits, other)
            second.bound.count(phase, f"{second.bound.method.name}: mixed with a second run", "", {}, 1.0)


def _run(second: Second, call: Callable[..., Any], named: dict[str, Any], main: Any, place: int) -> Tensor:
    """Logits of the second run for the same tokens. `main`: the model's cache, where this is the `place`-th behind."""
    kwargs = {name: value for name, value in named.items() if name not in (*CACHE_NAMES, "labels")}
    if second.cache is not None:
        count = len(second.cache.layers)
        second.cache.layers = main.layers[(place + 1) * count : (place + 2) * count]
        kwargs = _new_only(kwargs, second.cache.get_seq_length())
        kwargs[next(name for name in CACHE_NAMES if named.get(name) is not None)] = second.cache
    output = call(**second.stream.change(kwargs))
    if main is not None and second.cache is None:
        second.cache = cache_in(output)
        main.layers[(place + 1) * len(second.cache.layers) :] = second.cache.layers
    return output.logits  # type: ignore[no-any-return]


def _length(named: dict[str, Any]) -> int:
    tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    return int(tokens.shape[1])


def _new_only(kwargs: dict[str, Any], past: int) -> dict[str, Any]:
    """Without the tokens that the cache has already: `generate` repeats some where image tokens were left out."""
    count, mask, positions = _length(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    repeated = 0
    if count > 1 and isinstance(mask, Tensor) and mask.ndim == 2:
        repeated = past + count - mask.shape[1]
    elif count > 1 and mask is None and isinstance(positions, Tensor) and positions.ndim == 2:
        # without a mask there is no padding: positions count tokens
        repeated = past - int(positions[0, 0])
    if repeated <= 0:
        return kwargs
    parts = {name: kwargs[name][:, repeated:] for name in ("input_ids", "position_ids") if kwargs.get(name) is not None}
    return {**kwargs, **parts}


def cache_in(*outputs: Any) -> Any:
    """The cache in what a model's forward was called with or gave, or None."""
    found = (output[name] for output in outputs for name in CACHE_NAMES if name in output)
    return next((cache for cache in found if cache is not None), None)
