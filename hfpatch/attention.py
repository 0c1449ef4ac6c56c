"""The junction with transformers' attention: one attention function and one mask function under the name `hfpatch`.

transformers calls `attention_forward` in every decoder layer of a model whose text config names `hfpatch`. The module
is looked up in a weak map; an unknown one (a deep copy, another model on the same config object) runs the dense
implementation that was active. Everything that depends on the version of transformers is in the junction files.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfpatch.call import AttentionCall, Layout, Phase, SequenceState, find_layouts, split_padding
from hfpatch.costs import ImageCosts, LayerCost
from hfpatch.encoding import Encoder
from hfpatch.errors import HFPatchWarning, KernelUnavailableError, UnsupportedError
from hfpatch.eviction import forget, is_cut
from hfpatch.images import Look, Merge
from hfpatch.kernels import Choice, attend, choose, empty_result, put_rows
from hfpatch.methods.base import Method
from hfpatch.plan import Dense, Plan
from hfpatch.tower import Tap

NAME = "hfpatch"

Witness = Callable[[AttentionCall, Tensor], None]
"""Is given the attention call of a decoder layer that runs dense, and its output [B, q_len, Hq, D]."""

_LAYERS: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
_PATCHES: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


class ImplementationName(str):
    """The name `hfpatch` in a config, remembering the implementation it stands in for.

    Copies and pickles turn into the original name, so that a copied or saved model is an unpatched one.
    """

    base: str

    def __new__(cls, base: str) -> ImplementationName:
        self = super().__new__(cls, NAME)
        self.base = base
        return self

    def __deepcopy__(self, memo: Any) -> str:
        return self.base

    def __copy__(self) -> str:
        return self.base

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.base,)


@dataclass
class Stats:
    """What one layer did in one phase since the last reset."""

    action: str = ""
    kernel: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    density: Tensor | float = 0.0


@dataclass(eq=False)
class Bound:
    """One method on one layer, as one handle put it there."""

    method: Method
    heads: tuple[int, ...] | None
    phases: frozenset[str]
    kernel: str
    strict: bool
    stats: dict[str, Stats]

    def count(self, phase: str, action: str, kernel: str, refused: dict[str, str], density: Tensor | float) -> None:
        stats = self.stats.get(phase)
        if stats is None:
            stats = self.stats[phase] = Stats()
        stats.action, stats.kernel, stats.refused = action, kernel, refused
        stats.calls += 1
        stats.density = stats.density + density


@dataclass(eq=False)
class Layer:
    """What applies to one attention module.

    Attributes:
        tower_layers: layers of the vision tower of which this is one; 0: of the language model.
    """

    engine: Engine
    layer_idx: int
    tower_layers: int = 0
    planner: Bound | None = None
    adjusters: list[Bound] = field(default_factory=list)
    pruners: list[Bound] = field(default_factory=list)

    def bound(self) -> list[Bound]:
        return [*([self.planner] if self.planner else []), *self.adjusters, *self.pruners]

    @property
    def busy(self) -> bool:
        return self.planner is not None or bool(self.adjusters) or bool(self.pruners)


@dataclass(eq=False)
class Forward:
    """One forward of the text model: what its layers share.

    Attributes:
        past: tokens in the cache before this forward.
        masks: translations of the mask, by form.
        current: slots of the prompt that are still there, int64 [B, n]; None before anything was pruned.
        kept: what the method on the layer that runs now decided to keep, relative to `current`; see `Method.prune`.
        compact: positions are numbered anew from the first pruning on.
        whole: hidden states at the prompt's length, [B, prompt_len, hidden], from the first pruning on.
        prunable: the cache lets layers hold different lengths.
        cache: the KV cache; None where the model makes one itself, or has none.
        later: what is to be done to such a cache once it is there.
        added: where image tokens stand in the prompt, bool [B, prompt_len], and what the model adds to them after each
            of its first layers, [image tokens, hidden]; None where it does so itself.
    """

    past: int
    state: SequenceState
    masks: dict[Any, Any] = field(default_factory=dict)
    current: Tensor | None = None
    kept: tuple[Bound, Tensor | Merge] | None = None
    compact: bool = False
    whole: Tensor | None = None
    prunable: bool = True
    cache: Any = None
    later: list[Callable[[Any], None]] = field(default_factory=list)
    added: tuple[Tensor, Sequence[Tensor]] | None = None

    def image_mask(self, layer_idx: int, kv_len: int) -> Tensor | None:
        """bool [B, kv_len] in one layer's own slots."""
        known = self.state.image_mask
        if known is None:
            return None
        slots = self.current if self.past == 0 else self.state.kept.get(layer_idx)
        if slots is not None:
            known = known.gather(1, slots)
        return torch.nn.functional.pad(known, (0, max(kv_len - known.shape[1], 0)), value=False)[:, :kv_len]


@dataclass(eq=False)
class Engine:
    """What the layers of one patched model share.

    Attributes:
        states: what methods remember about sequences, by their cache.
        image_mask: of the tokens that are about to run, from `request.py`; consumed by the text model's next forward.
        store: what `request` methods left for the sequences that start next.
        looks: what they want to see of the prompt that is about to run.
        tap: on the vision tower, where a method needs it.
        encoder: remembers the pixels behind image features, where a method needs them.
        asking: the module whose forward that is.
        prunes: decoder layers lose tokens.
        placed: the caller gave positions to the forward that is about to run.
        ahead: pruners that go by the queries and keys of the next layer, by layer.
        ahead_now: those of them that are being asked: attention only lets them see its call.
        image_costs: of the prompts with images since the last reset.
        grid: rows and columns of patches of the images that are in the vision tower now.
        prefix: class and register tokens before them.
        tower_alone: nothing is put on the language model, so that the tower's forwards are counted.
        layer_cost: to count with; None: the engine belongs to no model.
        bypass: run everything dense for now.
        witness: sees the attention of every decoder layer meanwhile.
        streams: second runs of the forward that is running, from `beside.py`.
        watch: calls `plan_for` in place of the layers, to take its time.
    """

    num_layers: int
    forward: Forward | None = None
    forwards: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    warned: set[str] = field(default_factory=set)
    states: weakref.WeakKeyDictionary[Any, SequenceState] = field(default_factory=weakref.WeakKeyDictionary)
    image_mask: Tensor | None = None
    store: dict[Any, Any] = field(default_factory=dict)
    looks: list[tuple[Bound, Look]] = field(default_factory=list)
    tap: Tap | None = None
    encoder: Encoder | None = None
    asking: nn.Module | None = None
    prunes: bool = False
    placed: bool = False
    ahead: dict[int, list[Bound]] = field(default_factory=dict)
    ahead_now: Sequence[Bound] = ()
    image_costs: ImageCosts = field(default_factory=ImageCosts)
    grid: tuple[int, int] | None = None
    prefix: int = 0
    tower_alone: bool = False
    layer_cost: LayerCost | None = None
    bypass: bool = False
    witness: Witness | None = None
    streams: list[Any] = field(default_factory=list)
    watch: Callable[..., Plan] | None = None

    def inside(self) -> bool:
        """Whether a forward before which methods were asked is running."""
        return self.bypass or self.asking is not None

    def stop_asking(self) -> None:
        """The forward before which methods were asked is over."""
        if self.tap is not None:
            self.tap.seen.clear()
        self.looks, self.streams, self.asking = [], [], None

    def fall_back(self, what: str, reason: str, strict: bool) -> None:
        """Count a fallback to dense or to a slower kernel, and say so once; an error under strict."""
        text = f"{what}: {reason}"
        if strict:
            raise KernelUnavailableError(f"{text}. strict=True turns this fallback into an error; drop it to run on.")
        self.fallbacks[text] += 1
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"{text}. Details: handle.report()", HFPatchWarning, stacklevel=2)

    def layouts(self, call: AttentionCall) -> list[Layout]:
        """`find_layouts` of the call's mask, once per forward: all layers share the mask."""
        assert call.mask is not None
        if self.forward is None:
            return find_layouts(call.mask, call.q_offset)
        memo = ("layouts", id(call.mask), call.q_len)
        if memo not in self.forward.masks:
            # the mask is kept beside the answer, so that its id stays its own
            self.forward.masks[memo] = (call.mask, find_layouts(call.mask, call.q_offset))
        return self.forward.masks[memo][1]  # type: ignore[no-any-return]


def attach(module: nn.Module, layer: Layer) -> None:
    """Make `module` dispatch to `layer`."""
    _LAYERS[module] = layer


def detach(module: nn.Module) -> None:
    _LAYERS.pop(module, None)
    _PATCHES.pop(module, None)


def attach_patches(module: nn.Module, engine: Engine) -> Any:
    """Hook the convolution that makes the vision tower's patches; returns the hook handle."""
    _PATCHES[module] = engine
    return module.register_forward_hook(_see_grid)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _see_grid(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if (engine := _PATCHES.get(module)) is not None:
        engine.grid = output.shape[-2], output.shape[-1]
        engine.forwards += engine.tower_alone


def show_ahead(engine: Engine, decoder_layer: nn.Module, bounds: Sequence[Bound], kwargs: dict[str, Any]) -> None:
    """Have pruners see the queries and keys that a decoder layer's attention would make; nothing else happens in it.

    `kwargs`: the attention module's.
    """
    module = next(m for m in decoder_layer.modules() if m in _LAYERS)
    engine.ahead_now = bounds
    try:
        module(**kwargs)
    finally:
        engine.ahead_now = ()


def register() -> None:
    """Make the name known to transformers; done at the first patch, not at import."""
    AttentionInterface.register(NAME, attention_forward)
    # without this line padding masks are dropped in silence
    AttentionMaskInterface.register(NAME, attention_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The cheapest of three forms: None (causal), bool [B, kv_len] (causal and padding), bool [B, 1, q_len, kv_len].

    For a static cache the [B, kv_len] form covers the filled part only; `attention_forward` cuts the keys to match.
    """
    plain = mask_function is causal_mask_function and local_size is None and kv_offset == 0 and allow_is_causal_skip
    if not plain:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            # None from here means what it means to sdpa: only the model's own sliding layers read it that way
            allow_is_causal_skip=allow_is_causal_skip and local_size is not None,
            **kwargs,
        )
    filled = int(q_offset) + q_length
    if attention_mask is None:
        padding = torch.ones(batch_size, filled, dtype=torch.bool, device=kwargs.get("device"))
    else:
        padding = attention_mask[:, :filled].to(torch.bool)
        # a mask that is too short leaves the rest out, as in transformers
        padding = torch.nn.functional.pad(padding, (0, filled - padding.shape[-1]), value=False)
    return padding if filled < kv_length or not bool(padding.all()) else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention contract: returns ([B, q_len, Hq, head_dim], weights or None)."""
    layer = _LAYERS.get(module)
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] < key.shape[2]:
        # the unfilled end of a static cache
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    kwargs.update(scaling=scaling, dropout=dropout)
    if layer is None or layer.engine.bypass or not (layer.busy or layer.engine.ahead_now):
        dense = run_dense(module, query, key, value, attention_mask, layer, kwargs)
        if layer is not None and layer.engine.witness is not None and not layer.tower_layers:
            layer.engine.witness(_plain_call(layer, query, key, value, attention_mask, kwargs), dense[0])
        return dense
    run = _patched_tower if layer.tower_layers else _patched
    try:
        return run(module, layer, query, key, value, attention_mask, kwargs)
    except Exception as error:
        names = ", ".join(b.method.name for b in layer.bound())
        error.add_note(
            f"hfpatch: in layer {layer.layer_idx}, patch {names}, query {list(query.shape)}, key {list(key.shape)}. "
            "handle.disable() switches the patch off."
        )
        raise


def _plain_call(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> AttentionCall:
    """A call outside of the forwards that the engine follows."""
    scaling = kwargs["scaling"] if kwargs["scaling"] is not None else query.shape[-1] ** -0.5
    phase = _phase(None, query.shape[2], key.shape[2])
    place = (layer.layer_idx, layer.engine.num_layers, phase)
    window, sinks = kwargs.get("sliding_window"), kwargs.get("s_aux")
    return AttentionCall(query, key, value, mask, scaling, *place, kwargs.get("softcap"), window, sinks)


def _patched(
    module: nn.Module,
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention in a layer that has a patch: plan, compute, adjust."""
    engine, forward = layer.engine, layer.engine.forward
    phase = _phase(forward, query.shape[2], key.shape[2])
    planner = layer.planner if layer.planner is not None and phase in layer.planner.phases else None
    adjusters = [b for b in layer.adjusters if phase in b.phases]
    pruners = [b for b in layer.pruners if not b.method.looks_ahead] if phase == "prefill" else []
    if engine.ahead_now:
        planner, adjusters, pruners = None, [], list(engine.ahead_now)
    if phase == "extend":
        _say_if_in_pieces(layer, query.shape[2])
    reason = _not_ours(module, mask, kwargs)
    if reason is not None:
        if forward is not None and is_cut(forward.cache, layer.layer_idx):
            raise UnsupportedError(
                f"{reason}, so that this step would run dense, and heads of its KV cache have forgotten tokens. Start "
                "from the prompt, or patch so that the cache stays whole (kv=keep)."
            )
        for bound in (*((planner,) if planner else ()), *adjusters, *pruners):
            engine.fall_back(f"{bound.method.name} runs dense", reason, bound.strict)
            bound.count(phase, "dense", _own(module), {}, 1.0)
        planner, adjusters, pruners = None, [], []
    if planner is None and not adjusters and not pruners:
        return run_dense(module, query, key, value, mask, layer, kwargs)
    if mask is not None and mask.ndim == 4:
        if query.shape[2] == 1:
            # for one query every mask is a padding mask
            mask = mask[:, 0, 0]
        if forward is not None and (filled := forward.past + query.shape[2]) < key.shape[2]:
            # a static cache whose mask covers the unfilled end too
            key, value, mask = key[:, :, :filled], value[:, :, :filled], mask[..., :filled]
    call = AttentionCall(
        query,
        key,
        value,
        mask,
        kwargs["scaling"] if kwargs["scaling"] is not None else query.shape[-1] ** -0.5,
        layer.layer_idx,
        engine.num_layers,
        phase,
        kwargs.get("softcap"),
        kwargs.get("sliding_window"),
        kwargs.get("s_aux"),
        forward.state if forward is not None else None,
        forward.image_mask(layer.layer_idx, key.shape[2]) if forward is not None else None,
        any("lse" in b.method.card.needs for b in adjusters),
    )
    for bound in pruners:
        if forward is None or not forward.prunable:
            reason = "a static cache cannot hold a different length in every layer; use the default dynamic cache"
            engine.fall_back(f"{bound.method.name} prunes nothing", reason, bound.strict)
        elif (kept := bound.method.prune(call)) is not None:
            forward.kept = bound, kept
    if engine.ahead_now:
        return torch.zeros_like(query).transpose(1, 2), None
    if planner is not None:
        forget(engine, planner, call, _plans(module, planner.method))
    result = _run_plan(planner, call, engine) if planner is not None else None
    if result is None and planner is not None:
        planner.count(phase, "Dense", _own(module), {}, 1.0)
    if result is None and not call.need_lse:
        dense, weights = run_dense(module, query, key, value, mask, layer, kwargs)
        if not adjusters:
            return dense, weights
        result = dense.transpose(1, 2), None
    out, lse = result if result is not None else attend(call, Dense())
    for bound in adjusters:
        adjusted = bound.method.adjust(replace(call, heads=bound.heads), out, lse)
        if bound.heads is not None:
            index = torch.tensor(bound.heads, device=out.device)
            adjusted = out.index_copy(1, index, adjusted[:, index])
        out = adjusted
        if bound is not planner:
            bound.count(phase, "adjust", "", {}, 1.0)
    return out.transpose(1, 2).contiguous(), None


def _say_if_in_pieces(layer: Layer, q_len: int) -> None:
    """Count and say once that a prompt seems to come in pieces, where its end was to decide what is pruned."""
    forward = layer.engine.forward
    if forward is None or forward.state.forwards != 2:
        return
    for bound in layer.pruners:
        if bound.method.whole_prompt:
            layer.engine.fall_back(
                f"{bound.method.name} chose by the end of the first {forward.past} tokens",
                f"{q_len} more came right after them. Give a prompt in one piece (no prefill_chunk_size); drafted "
                "tokens, or a new turn after an answer of one token, are fine",
                bound.strict,
            )


def _patched_tower(
    module: nn.Module,
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention in a layer of the vision tower that has a plan. It runs before the language model's forward."""
    engine, bound = layer.engine, layer.planner
    assert bound is not None, "a tower's layer takes plans only"
    reason, action = _not_ours(module, mask, kwargs, causal=False), "dense"
    patches = 0 if engine.grid is None else engine.grid[0] * engine.grid[1]
    if reason is None and key.shape[2] != engine.prefix + patches:
        reason = f"its {key.shape[2]} tokens are not {engine.prefix} class or register tokens and {patches} patches"
    if reason is None:
        scaling = kwargs["scaling"] if kwargs["scaling"] is not None else query.shape[-1] ** -0.5
        where, depth = layer.layer_idx, layer.tower_layers
        call = AttentionCall(query, key, value, mask, scaling, where, depth, "tower", grid=engine.grid)
        if (result := _run_plan(bound, call, engine)) is not None:
            return result[0].transpose(1, 2).contiguous(), None
        action = "Dense"
    else:
        engine.fall_back(f"{bound.method.name} leaves the vision tower dense", reason, bound.strict)
    bound.count("tower", action, _own(module), {}, 1.0)
    return run_dense(module, query, key, value, mask, layer, kwargs)


def _plans(module: nn.Module, method: Method) -> Callable[[], bool]:
    """Tells at any later time whether `method` plans in this module."""

    def still() -> bool:
        layer = _LAYERS.get(module)
        planner = layer.planner if layer is not None and not layer.engine.bypass else None
        return planner is not None and planner.method == method

    return still


def _run_plan(
    bound: Bound, call: AttentionCall, engine: Engine, share: float = 1.0
) -> tuple[Tensor, Tensor | None] | None:
    """Plan and run with the padding cut off; None where the plan keeps everything, so that the dense path can run.

    `share` of the layer's heads are in `call`; the density that is counted is the layer's.
    """
    if bound.heads is not None:
        return _run_some_heads(bound, bound.heads, call, engine)
    # cutting the padding off would break a tower's grid
    if call.mask is None or call.phase == "tower":
        plan = _plan(bound, call, engine)
        if plan.keeps_all(call):
            return None
        choice = _choose(bound, call, plan, engine)
        density = 1.0 - share * (1.0 - plan.density(call))
        bound.count(call.phase, type(plan).__name__, choice.name, choice.refused, density)
        call.plans.append((call.heads, None, plan))
        return choice.run(call, plan)
    parts = split_padding(call, engine.layouts(call))
    plans = [_plan(bound, part.call, engine) for part in parts]
    if all(plan.keeps_all(part.call) for plan, part in zip(plans, parts, strict=True)):
        return None
    out, lse = empty_result(call)
    kept: Tensor | float = 0.0
    for part, plan in zip(parts, plans, strict=True):
        choice = _choose(bound, part.call, plan, engine)
        call.plans.append((call.heads, part.layout, plan))
        kept = kept + plan.density(part.call) * (len(part.layout.rows) / call.query.shape[0])
        part_out, part_lse = choice.run(part.call, plan)
        put_rows(out, part.layout, part_out)
        if part_lse is not None:
            put_rows(lse, part.layout, part_lse)
    bound.count(call.phase, type(plan).__name__, choice.name, choice.refused, 1.0 - share * (1.0 - kept))
    return out, lse


def _run_some_heads(
    bound: Bound, heads: tuple[int, ...], call: AttentionCall, engine: Engine
) -> tuple[Tensor, Tensor | None] | None:
    """The plan on the chosen query heads, dense on the others."""
    share = len(heads) / call.query.shape[1]
    part = replace(call.some_heads(heads), heads=heads)
    sparse = _run_plan(replace(bound, heads=None), part, engine, share)
    if sparse is None:
        return None
    others = [h for h in range(call.query.shape[1]) if h not in heads]
    if not others:
        return sparse
    dense = attend(call.some_heads(others), Dense())
    order = torch.tensor([*heads, *others], device=call.query.device).argsort()
    lse = None if sparse[1] is None or dense[1] is None else torch.cat([sparse[1], dense[1]], 1)[:, order]
    return torch.cat([sparse[0], dense[0]], 1)[:, order], lse


def _plan(bound: Bound, call: AttentionCall, engine: Engine) -> Plan:
    return plan_for(bound, call) if engine.watch is None else engine.watch(plan_for, bound, call)


def plan_for(bound: Bound, call: AttentionCall) -> Plan:
    if call.kv_len < getattr(bound.method, "dense_below", 0):
        return Dense()
    return bound.method.plan(call)


def _choose(bound: Bound, call: AttentionCall, plan: Plan, engine: Engine) -> Choice:
    # a kernel that was named is meant for what the patch makes sparse
    choice = choose(call, plan, "auto" if isinstance(plan, Dense) else bound.kernel)
    if choice.name == "reference" and bound.kernel == "auto":
        reasons = "; ".join(f"{k}: {r}" for k, r in choice.refused.items())
        engine.fall_back(f"{bound.method.name} uses the slow reference kernel for {call.phase}", reasons, bound.strict)
    return choice


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(causal if causal is not None else getattr(module, "is_causal", True))


def _not_ours(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], causal: bool = True) -> str | None:
    """Why this call cannot be an AttentionCall, or None."""
    if mask is not None and mask.dtype != torch.bool:
        return "a custom additive attention mask was passed, only boolean masks can be narrowed"
    if mask is not None and mask.ndim == 4 and mask.shape[1] != 1:
        return "a mask that differs between heads was passed"
    if kwargs["dropout"]:
        return "the model is in training mode with attention dropout; call model.eval()"
    if kwargs.get("position_bias") is not None:
        return "the model adds a position bias to its scores"
    if _is_causal(module, kwargs) is not causal:
        return f"this attention is {'not causal' if causal else 'causal'}"
    return None


def _phase(forward: Forward | None, q_len: int, kv_len: int) -> Phase:
    past = forward.past if forward is not None else kv_len - q_len
    if past == 0:
        return "prefill"
    return "decode" if q_len == 1 else "extend"


def _base(module: nn.Module) -> str:
    """The dense implementation that the model used before it was patched."""
    name = module.config._attn_implementation  # type: ignore[union-attr]
    return name.base if isinstance(name, ImplementationName) else str(name)


def _own(module: nn.Module) -> str:
    return f"model's {_base(module)}"


def run_dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layer: Layer | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own dense implementation, given the mask in the form that it expects."""
    base = _base(module)
    if not _is_causal(module, kwargs) and (mask is None or mask.ndim == 4):
        return _run_bidirectional(module, query, key, value, mask, kwargs)
    if base not in _MASK_FORMS:
        # flash-attention and hub kernels look their own name up in the config; ours would mislead them
        scaling = kwargs["scaling"] if kwargs["scaling"] is not None else query.shape[-1] ** -0.5
        call = AttentionCall(query, key, value, mask, scaling)
        out, _ = attend(replace(call, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux")), Dense())
        return out.transpose(1, 2).contiguous(), None
    function = ALL_ATTENTION_FUNCTIONS.get_interface(base, _eager(module))  # type: ignore[arg-type]
    forward = layer.engine.forward if layer is not None else None
    memo = (base, id(mask), query.shape[2], key.shape[2])
    if forward is None:
        mask = _MASK_FORMS[base](mask, query, key)
    else:
        if memo not in forward.masks:
            # our mask is kept beside its translation, so that its id stays its own
            forward.masks[memo] = (mask, _MASK_FORMS[base](mask, query, key))
        mask = forward.masks[memo][1]
    return function(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def _run_bidirectional(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """`run_dense` where nothing is causal: None means that everything is seen. Flash-attention becomes sdpa."""
    base = _base(module) if _base(module) in _MASK_FORMS else "sdpa"
    if mask is not None and base == "eager":
        mask = _additive(mask, query, key)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(base, _eager(module))  # type: ignore[arg-type]
    return function(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _boolean(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Our mask forms as transformers' sdpa mask: None where `is_causal` or nothing is enough, else 4-D bool."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None:
        if q_len in (1, kv_len):
            return None
        causal = torch.arange(kv_len - q_len, kv_len, device=key.device)[:, None]
        return (torch.arange(kv_len, device=key.device) <= causal)[None, None].expand(query.shape[0], 1, -1, -1)
    if mask.ndim == 4:
        return mask
    if q_len == 1:
        return mask[:, None, None, :]
    causal = torch.arange(kv_len - q_len, kv_len, device=key.device)[:, None]
    return (torch.arange(kv_len, device=key.device) <= causal)[None, None] & mask[:, None, None, :]


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The same for eager attention: 0 where allowed, the dtype's minimum elsewhere."""
    if mask is not None and mask.dtype != torch.bool:
        return mask
    q_len, kv_len = query.shape[2], key.shape[2]
    allowed = _boolean(mask, query, key)
    if allowed is None:
        if q_len == 1:
            return None
        allowed = torch.ones(q_len, kv_len, dtype=torch.bool, device=key.device).tril()[None, None]
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zero, torch.finfo(query.dtype).min)


_MASK_FORMS: dict[str, Callable[[Tensor | None, Tensor, Tensor], Tensor | None]] = {
    "sdpa": _boolean,
    "eager": _additive,
}
