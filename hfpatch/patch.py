"""Put patches on a model and take them off again.

A model is changed in four places only, all undone by `remove()`: the attention implementation named in its text
config, an entry for each attention module in a weak map, and forward hooks on the text model, on the decoder layers
(when tokens are pruned) and on the outer model (when images or prompts matter). A patch of the vision tower does the
same to the tower alone: its config, its attention modules, a hook on its patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from hfpatch import attention, pruning, request
from hfpatch.anatomy import Anatomy, TowerAnatomy, examine, examine_tower
from hfpatch.attention import Bound, Engine, ImplementationName, Layer
from hfpatch.costs import ImageCosts
from hfpatch.dryrun import explain_bound
from hfpatch.encoding import Encoder
from hfpatch.errors import ConfigError, ConflictError, HFPatchError, UnsupportedError
from hfpatch.image_map import kept_by_layer
from hfpatch.kernels import check_name
from hfpatch.methods.base import Method
from hfpatch.recipe import PatchSpec, Recipe, load_recipe
from hfpatch.registry import METHODS
from hfpatch.selectors import HeadSelector, LayerSelector, format_layers, select_heads, select_layers
from hfpatch.summary import Explanation, LayerReport, PatchReport
from hfpatch.tower import Tap, find

PhaseSelector = Literal["prefill", "decode", "both"]

_PHASES: dict[str, frozenset[str]] = {
    "prefill": frozenset({"prefill", "extend"}),
    "decode": frozenset({"decode"}),
    "both": frozenset({"prefill", "extend", "decode"}),
}
# vision tokens go first, then masks, then what corrects scores, then what scales heads
_ORDER = ("vision", "attention", "calibration", "heads")


@dataclass(frozen=True)
class Part:
    """One method with where it acts."""

    method: Method
    layers: LayerSelector = None
    heads: HeadSelector = None
    phase: PhaseSelector = "both"

    def spec(self) -> PatchSpec:
        """Plain data that patches the same way. A function as `layers` cannot be written down."""
        if callable(self.layers):
            raise ConfigError("layers= was given as a function, which a recipe cannot hold. Give the list of layers.")
        layers = self.layers if isinstance(self.layers, (int, str)) or self.layers is None else list(self.layers)
        heads: Any = self.heads
        if isinstance(heads, Mapping):
            heads = {int(layer): list(chosen) for layer, chosen in heads.items()}
        elif heads is not None:
            heads = str(heads) if isinstance(heads, (str, Path)) else [list(pair) for pair in heads]
        phase = None if self.phase == "both" else self.phase
        return PatchSpec(self.method.name, self.method.changed(), layers, heads, phase)


@dataclass(eq=False)
class _Patched:
    """One patched model: its engine, its live handles, its hooks. Lives on the model, and is not copied with it."""

    engine: Engine
    handles: list[PatchHandle] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    tower: TowerAnatomy | None = None

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


# what a method's card says that goes to the layers of the vision tower
_TOWER = "vision tower"

# A registry beside the model would keep the model alive through its handles; a cycle on the model can be collected.
_ATTRIBUTE = "_hfpatch"


def _patched(model: Any) -> _Patched | None:
    return vars(model).get(_ATTRIBUTE) if isinstance(model, nn.Module) else None


class PatchHandle:
    """Patches that are on a model. Use as a context manager, or call `remove()`.

    Attributes:
        parts: the methods with their selectors, in the order in which they apply.
        kernel, strict: as given to `patch`.
    """

    def __init__(self, anatomy: Anatomy, parts: Sequence[Part], kernel: str, strict: bool) -> None:
        self.model: Any = anatomy.model
        self.parts = tuple(parts)
        self.kernel = kernel
        self.strict = strict
        self._enabled = True
        self._removed = False
        self._bound, self._tower = _bind_all(anatomy, self.parts, kernel, strict)
        self._forwards_before = 0

    @property
    def specs(self) -> list[PatchSpec]:
        return [part.spec() for part in self.parts]

    @property
    def active(self) -> bool:
        """On the model and not disabled."""
        return self._enabled and not self._removed

    def remove(self) -> None:
        """Take the patches off; the model is exactly what it was. Does nothing the second time."""
        if self._removed:
            return
        self._removed = True
        if (patched := _patched(self.model)) is not None:
            patched.handles.remove(self)
            _sync(_examine(self.model), patched)

    def disable(self) -> None:
        """Run the model unpatched until `enable()`."""
        self._switch(False)

    def enable(self) -> None:
        self._switch(True)

    def _switch(self, on: bool) -> None:
        if self._removed:
            raise HFPatchError("this patch was removed; call patch() again.")
        if self._enabled is not on:
            self._enabled = on
            self._apply()

    @contextmanager
    def disabled(self) -> Iterator[Any]:
        """Inside the block the model runs unpatched."""
        was = self._enabled
        self.disable()
        try:
            yield self.model
        finally:
            if was and not self._removed:
                self.enable()

    @contextmanager
    def watched(self, watch: Callable[..., Any]) -> Iterator[None]:
        """Inside the block, layers have their plan made by `watch(function, *args)`, which answers for the function."""
        engine = self._engine()
        engine.watch = watch
        try:
            yield
        finally:
            engine.watch = None

    def _engine(self) -> Engine:
        if self._removed or (patched := _patched(self.model)) is None:
            raise HFPatchError("this patch was removed; call patch() again.")
        return patched.engine

    def reconfigure(self, patcher: str | None = None, /, **params: Any) -> None:
        """Change options of a patch that is on. `patcher` names which, where the handle has several."""
        if self._removed:
            raise HFPatchError("this patch was removed; call patch() again.")
        names = [part.method.name for part in self.parts]
        name = METHODS.get(patcher).name if patcher is not None else names[0]
        if name not in names or (patcher is None and len(names) > 1):
            raise ConfigError(
                f"this handle has {', '.join(names)}; say which one: handle.reconfigure('{names[0]}', ...)."
            )
        index = names.index(name)
        old = self.parts[index]
        method = type(old.method).from_options({**old.method.options(), **params})
        parts = (*self.parts[:index], replace(old, method=method), *self.parts[index + 1 :])
        # built before anything changes, so that a bad option leaves the patch as it was
        bound, tower = _bind_all(_examine(self.model), parts, self.kernel, self.strict)
        self.parts, self._bound, self._tower = parts, bound, tower
        self._apply()

    def _apply(self) -> None:
        patched = _patched(self.model)
        assert patched is not None, "a live handle is on its model"
        _sync(_examine(self.model), patched)

    def reset(self) -> None:
        """Forget statistics, fallbacks and what methods remember about sequences."""
        for bounds in (*self._bound.values(), *self._tower.values()):
            for bound in bounds:
                bound.stats.clear()
        if (patched := _patched(self.model)) is not None and not self._removed:
            engine = patched.engine
            engine.fallbacks.clear()
            engine.image_costs = ImageCosts()
            engine.states.clear()
            self._forwards_before = engine.forwards

    def explain(self, seq_len: int = 4096, batch: int = 1) -> Explanation:
        """What happens in which layer, with which kernel, and how much is kept at `seq_len` tokens."""
        order = [str(part.method) for part in self.parts]
        return explain_bound(_examine(self.model), self._bound, self._tower, order, seq_len, batch)

    def report(self) -> PatchReport:
        """What happened since the handle was made or reset. Reads densities from the device."""
        rows = []
        for layer, bounds in (*sorted(self._tower.items()), *sorted(self._bound.items())):
            for bound in bounds:
                for phase, stats in bound.stats.items():
                    density = float(stats.density) / stats.calls if stats.calls else None
                    rows.append(
                        LayerReport(layer, phase, stats.action, stats.kernel, dict(stats.refused), stats.calls, density)
                    )
        patched = None if self._removed else _patched(self.model)
        engine = patched.engine if patched is not None else Engine(0)
        return PatchReport(
            [str(part.method) for part in self.parts],
            max(engine.forwards - self._forwards_before, 0),
            engine.num_layers or max(self._bound, default=0) + 1,
            rows,
            dict(engine.fallbacks),
            sorted(engine.warned),
            engine.image_costs.mean(),
            len(examine_tower(self.model).attention) if self._tower else 0,
        )

    def kept_images(self, cache: Any, input_ids: Tensor) -> Tensor | None:
        """Image tokens that each layer computed with: bool [layers, B, V].

        None without images, where rows have different numbers of them, and where mixtures of several went in.

        Args:
            cache: of a prompt that ran while the patch was on, as `generate(..., return_dict_in_generate=True)` has it.
            input_ids: that prompt, int64 [B, n].
        """
        engine, image = self._engine(), examine(self.model).image_token_id
        state = engine.states.get(cache)
        if state is None or image is None:
            return None
        return kept_by_layer(state, input_ids == image, engine.num_layers)

    def to_recipe(self) -> Recipe:
        """A recipe that patches the same way."""
        model = {"id": str(getattr(self.model.config, "_name_or_path", "") or "")}
        runtime = {"kernel": self.kernel, "strict": self.strict}
        patches = [_as_mapping(spec) for spec in self.specs]
        return load_recipe({"version": 1, "model": model, "runtime": runtime, "patches": patches})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "patch() returns a handle, not the model; the model is patched in place: use handle.model(...)."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # a pickle holds what was put on, never the model
        return list, (self.specs,)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"PatchHandle has no attribute {name!r}; the patched model is handle.model.")

    def __repr__(self) -> str:
        names = " + ".join(str(part.method) for part in self.parts)
        state = "removed" if self._removed else "active" if self._enabled else "disabled"
        where = [f"layers={format_layers(self._bound)}"] if self._bound else []
        where += [f"tower={format_layers(self._tower)}"] if self._tower else []
        return f"<PatchHandle {names} {' '.join(where)} kernel={self.kernel} {state}>"

    def __str__(self) -> str:
        return repr(self) if self._removed else str(self.explain())


def patch(
    model: Any,
    what: Any,
    *,
    layers: LayerSelector = None,
    heads: HeadSelector = None,
    phase: PhaseSelector | None = None,
    kernel: str = "auto",
    strict: bool = False,
    seed: int | None = None,
    **params: Any,
) -> PatchHandle:
    """Patch `model` in place; `handle.remove()` undoes it exactly.

    Args:
        model: a transformers model, a pipeline, or a PEFT model. Its vision tower is left alone, except by methods that
            are for towers; they also take a ViT without a language model.
        what: a patcher's name ("sa"), a spec ("sa:window=256"), a Method, a PatchSpec, a list of these, a Recipe, or
            the path of a recipe file (or "recipe:NAME").
        layers: decoder layers of the language model (of the tower, where the method is for towers), see
            `select_layers`; None = all that the method takes.
        heads: query heads, `{layer: [head, ...]}` or pairs; None = all.
        phase: "prefill", "decode" or "both"; None = the paper's own.
        kernel: "auto", or the name of one that must run.
        strict: a fallback (to dense, or to the reference kernel) is an error.
        seed: sets the `seed` option of every method that has one.
        params: options of the method, where `what` is a single name.

    Raises:
        UnknownNameError, ConfigError: a name or an option is wrong.
        UnsupportedError: this model cannot be patched this way.
        ConflictError: a layer would have two plans, or the same patch twice.
    """
    parts, runtime = _parts(what, layers, heads, phase, params)
    kernel = kernel if kernel != "auto" else runtime.get("kernel", "auto")
    strict = strict or runtime.get("strict", False)
    if seed is not None:
        parts = [_seeded(part, seed) for part in parts]
    check_name(kernel)
    anatomy = _examine(_unwrap(model), parts)
    handle = PatchHandle(anatomy, parts, kernel, strict)
    patched = _patched(anatomy.model)
    if patched is None:
        patched = vars(anatomy.model)[_ATTRIBUTE] = _Patched(Engine(anatomy.num_layers))
    handle._forwards_before = patched.engine.forwards
    _check_conflicts([*patched.handles, handle])
    patched.handles.append(handle)
    try:
        _sync(anatomy, patched)
    except BaseException:
        patched.handles.remove(handle)
        _sync(anatomy, patched)
        raise
    return handle


def unpatch(model: Any) -> int:
    """Remove every patch of `model`, newest first; returns how many handles there were."""
    handles = active(model)
    for handle in reversed(handles):
        handle.remove()
    return len(handles)


def active(model: Any) -> list[PatchHandle]:
    """The handles on `model`, oldest first, disabled ones included."""
    patched = _patched(_unwrap(model))
    return list(patched.handles) if patched is not None else []


def is_patched(model: Any) -> bool:
    """True while an enabled patch is on `model`."""
    return any(handle.active for handle in active(model))


def explain(
    model: Any,
    what: Any,
    seq_len: int = 4096,
    batch: int = 1,
    *,
    layers: LayerSelector = None,
    heads: HeadSelector = None,
    phase: PhaseSelector | None = None,
    kernel: str = "auto",
    **params: Any,
) -> Explanation:
    """What `patch` would do, without doing it.

    Args:
        model: a model, or a model id or config: then no weights are loaded.
        seq_len: prompt length for the predicted densities, tokens.
        batch: sequences.
    """
    if not isinstance(_unwrap(model), nn.Module):
        from hfpatch.load import empty_model

        model = empty_model(model)
    parts, runtime = _parts(what, layers, heads, phase, params)
    kernel = kernel if kernel != "auto" else runtime.get("kernel", "auto")
    anatomy = _examine(_unwrap(model), parts)
    bound, tower = _bind_all(anatomy, parts, kernel, False)
    return explain_bound(anatomy, bound, tower, [str(part.method) for part in parts], seq_len, batch)


def get_patcher(name: str) -> type[Method]:
    """The patcher class called `name`. Raises UnknownNameError with suggestions."""
    return METHODS.get(name)  # type: ignore[no-any-return]


def list_patchers(family: str | None = None, supports: Any = None) -> list[type[Method]]:
    """Registered patchers by name.

    Args:
        family: "attention", "calibration", "heads" or "vision".
        supports: a model or config; leaves out what needs image tokens or a vision tower where there are none.
    """
    config = getattr(supports, "config", supports)
    found = []
    for _, cls in METHODS.items():
        if family is not None and cls.card.family != family:
            continue
        if config is not None and "image tokens" in cls.card.needs and getattr(config, "image_token_id", None) is None:
            continue
        has_tower = hasattr(config, "patch_size") or getattr(config, "vision_config", None) is not None
        if config is not None and _TOWER in cls.card.needs and not has_tower:
            continue
        found.append(cls)
    return found


def _unwrap(model: Any) -> Any:
    """The transformers model inside a pipeline or a PEFT model."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "this model is compiled already, so its compiled code would not see a patch. "
            "Patch the model first, then call torch.compile on it."
        )
    if isinstance(model, nn.Module):
        peft: Any = model
        return peft.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model


def _parts(
    what: Any, layers: LayerSelector, heads: HeadSelector, phase: PhaseSelector | None, params: Mapping[str, Any]
) -> tuple[list[Part], dict[str, Any]]:
    """What to put on, in order of application, and the runtime settings that a recipe carries."""
    if isinstance(what, Path) or (isinstance(what, str) and _is_recipe(what)):
        what = load_recipe(what)
    runtime: dict[str, Any] = {}
    if isinstance(what, Recipe):
        if what.matrix:
            raise ConfigError("this recipe is a sweep over several patches. Take one of its points: recipe.points().")
        runtime = {f.name: getattr(what.runtime, f.name) for f in fields(what.runtime)}
        seed = what.runtime.seed
        # the run's seed, where the patch does not say its own
        what = [replace(p, params={"seed": seed, **p.params}) if _takes_seed(p, seed) else p for p in what.patches]
    items = list(what) if isinstance(what, (list, tuple)) else [what]
    if not items:
        raise ConfigError(
            "nothing to patch with: the list of patches is empty. Name one, for instance with hfpatch list."
        )
    if params and (len(items) > 1 or not isinstance(items[0], (str, PatchSpec))):
        raise ConfigError(
            f"options {', '.join(params)} were given beside {what!r}, so it is not clear whose they are. "
            'Put them into each entry, for instance "name:option=value".'
        )
    parts = []
    for item in items:
        if isinstance(item, str):
            item = PatchSpec.parse(item)
        if isinstance(item, PatchSpec):
            method = get_patcher(item.use).from_options({**item.params, **params})
            item_phase = item.phase
            part = Part(method, _first(layers, item.layers), _first(heads, item.heads))
        elif isinstance(item, Method):
            method, item_phase, part = item, None, Part(item, layers, heads)
        else:
            raise ConfigError(
                f"cannot patch with {item!r}: give a name, a Method, a PatchSpec, a Recipe or a list of these."
            )
        chosen = _first(phase, item_phase) or method.card.phase
        if chosen not in _PHASES:
            raise ConfigError(f"phase={chosen!r} is not one of: {', '.join(_PHASES)}.")
        parts.append(replace(part, phase=chosen))
    return sorted(parts, key=lambda p: _ORDER.index(p.method.card.family)), runtime


def _takes_seed(spec: PatchSpec, seed: int | None) -> bool:
    return seed is not None and any(f.name == "seed" for f in fields(get_patcher(spec.use)))


def _seeded(part: Part, seed: int) -> Part:
    if not any(f.name == "seed" for f in fields(part.method)):
        return part
    return replace(part, method=type(part.method).from_options({**part.method.options(), "seed": seed}))


def _first(a: Any, b: Any) -> Any:
    return a if a is not None else b


def _is_recipe(text: str) -> bool:
    return text.startswith("recipe:") or text.endswith((".yaml", ".yml", ".toml", ".json"))


def _as_mapping(spec: PatchSpec) -> dict[str, Any]:
    entries = {f.name: getattr(spec, f.name) for f in fields(spec)}
    return {k: v for k, v in entries.items() if v not in (None, {})}


def _examine(model: Any, parts: Sequence[Part] = ()) -> Anatomy:
    """`examine`; a model that is a vision tower and has no decoder has no decoder layers.

    Raises UnsupportedError if it has neither, with what `parts` miss.
    """
    try:
        return examine(model)
    except UnsupportedError as error:
        try:
            tower = examine_tower(model)
        except UnsupportedError:
            if parts and all(_TOWER in part.method.card.needs for part in parts):
                raise
            raise error from None
        return Anatomy(model, tower.config, model, [], {}, {}, [], None)


Bounds = dict[int, list[Bound]]


def _bind_all(anatomy: Anatomy, parts: Sequence[Part], kernel: str, strict: bool) -> tuple[Bounds, Bounds]:
    """What each decoder layer gets, and each layer of the vision tower. Raises for what this model cannot have."""
    text = [part for part in parts if _TOWER not in part.method.card.needs]
    tower = [part for part in parts if _TOWER in part.method.card.needs]
    if text and not anatomy.decoder_layers:
        raise UnsupportedError(
            f"{text[0].method.name} is for language models, {type(anatomy.model).__name__} is a vision tower alone. "
            "Patchers for this model: hfpatch.list_patchers(supports=model)."
        )
    return (
        _bind(anatomy, text, kernel, strict) if text else {},
        _bind_tower(examine_tower(anatomy.model), tower, kernel, strict) if tower else {},
    )


def _bind_tower(tower: TowerAnatomy, parts: Sequence[Part], kernel: str, strict: bool) -> Bounds:
    result: Bounds = {}
    depth = len(tower.attention)
    for part in parts:
        method = part.method
        if part.phase == "decode":
            raise ConfigError(f"{method.name}: the vision tower runs before decoding; phase=decode leaves nothing.")
        method.fits(tower.sizes)
        heads = select_heads(part.heads, depth, tower.sizes.num_heads)
        for layer in select_layers(part.layers, depth):
            if heads is None or layer in heads:
                chosen = heads[layer] if heads is not None else None
                bound = Bound(method, chosen, _PHASES["prefill"], kernel, strict, {})
                result.setdefault(layer, []).append(bound)
    if not result:
        raise ConfigError("the chosen layers and heads of the vision tower leave nothing to patch.")
    return result


def _bind(anatomy: Anatomy, parts: Sequence[Part], kernel: str, strict: bool) -> Bounds:
    """What each layer gets. Raises for what this model cannot have."""
    result: Bounds = {}
    for part in parts:
        method = part.method
        method.fits(anatomy.sizes)
        chosen = select_layers(part.layers, anatomy.num_layers)
        free = tuple(i for i in chosen if i in anatomy.attention and i not in anatomy.windows)
        named = part.heads if part.heads is not None else method.chosen_heads(anatomy.sizes, free)
        heads = select_heads(named, anatomy.num_layers, anatomy.num_heads)
        verbs = method.verbs()
        has_images = anatomy.image_token_id is not None
        if anatomy.windows and (method.drops_text() or (method.drops_images() and has_images)):
            raise UnsupportedError(
                f"{method.name} cannot prune in {type(anatomy.model).__name__}: its layers "
                f"{format_layers(anatomy.windows)} slide a window over token distances that pruning would change."
            )
        if "image tokens" in method.card.needs:
            if not has_images:
                raise UnsupportedError(
                    f"{method.name} needs image tokens, and {type(anatomy.model).__name__} has none. "
                    "Patchers for this model: hfpatch.list_patchers(supports=model)."
                )
            if "class token" in method.card.needs and find(anatomy.model) is None:
                raise UnsupportedError(
                    f"{method.name} goes by the class token of a vision tower whose patches become the image tokens "
                    f"one by one, as in LLaVA-1.5. {type(anatomy.model).__name__} with this config is not made so."
                )
            if getattr(method, "positions", None) == "compact" and not anatomy.counts_positions:
                raise UnsupportedError(
                    f"{method.name}: positions in {type(anatomy.model).__name__} are rows and columns of the image, or "
                    "it has no rotary embedding of its own, so they cannot be numbered anew. Use positions='original'."
                )
        if "prune" in verbs:
            at = method.prune_layers(anatomy.num_layers)
            if wrong := [layer for layer in at if not 0 <= layer < anatomy.num_layers - 1]:
                raise ConfigError(
                    f"{method.name}: cannot prune after layer {wrong[0]}; the model has layers "
                    f"0-{anatomy.num_layers - 1}, and pruning after the last one saves nothing."
                )
            chosen = tuple(sorted(at))
        elif verbs == ("request",):
            # once per prompt: the first layer stands for it
            chosen = chosen[:1]
        if "plan" in verbs:
            usable = tuple(i for i in chosen if i in anatomy.attention and i not in anatomy.windows)
            if not usable:
                raise UnsupportedError(
                    f"{method.name}: none of the chosen layers ({format_layers(chosen)}) of "
                    f"{type(anatomy.model).__name__} has full attention that can be replaced"
                    + (f"; layers {format_layers(anatomy.windows)} slide a window already." if anatomy.windows else ".")
                )
            chosen = usable
        phases = _PHASES[part.phase]
        for layer in chosen:
            if layer not in anatomy.attention or (heads is not None and layer not in heads):
                continue
            mine = heads[layer] if heads is not None and len(heads[layer]) < anatomy.num_heads else None
            bound = Bound(method, mine, phases, kernel, strict, {})
            result.setdefault(layer, []).append(bound)
    if not result:
        raise ConfigError("the chosen layers and heads leave nothing to patch.")
    return result


def _check_conflicts(handles: Sequence[PatchHandle]) -> None:
    """At most one plan a layer, and no method twice on a layer."""
    _check_layers([handle._bound for handle in handles])
    _check_layers([handle._tower for handle in handles])


def _check_layers(together: Sequence[Bounds]) -> None:
    seen: dict[tuple[int, str], list[Method]] = {}
    for each in together:
        for layer, bounds in each.items():
            for bound in bounds:
                seen.setdefault((layer, bound.method.name), []).append(bound.method)
                for verb in {"plan", "prune"} & set(bound.method.verbs()):
                    seen.setdefault((layer, verb), []).append(bound.method)
    twice = {key: methods for key, methods in seen.items() if len(methods) > 1}
    if not twice:
        return
    for _, name in twice:
        if name not in ("plan", "prune"):
            layers = format_layers(layer for layer, other in twice if other == name)
            raise ConflictError(
                f"{name} is on layers {layers} already. remove() the first handle, or change it with "
                "handle.reconfigure()."
            )
    (_, verb), (first, second, *_) = next(iter(twice.items()))
    what = "choose the keys in" if verb == "plan" else "prune after"
    raise ConflictError(
        f"{first.name} and {second.name} both {what} layers {format_layers(layer for layer, _ in twice)}. "
        "Give them disjoint layers=, or remove one."
    )


def _sync(anatomy: Anatomy, patched: _Patched) -> None:
    """Make the model what its enabled handles say: all hooks and entries are taken off and put on anew."""
    for hook in patched.hooks:
        hook.remove()
    patched.hooks.clear()
    for module in anatomy.attention.values():
        attention.detach(module)
    for module in anatomy.decoder_layers:
        pruning.detach(module)
    for module in (anatomy.text, *anatomy.outer):
        request.detach(module)
    if patched.tower is not None:
        for module in (*patched.tower.attention.values(), patched.tower.patches):
            attention.detach(module)
    for config in (*anatomy.configs(), *(patched.tower.configs if patched.tower is not None else ())):
        if isinstance(name := config._attn_implementation, ImplementationName):
            config._attn_implementation_internal = name.base
    handles = [handle for handle in patched.handles if handle.active]
    if not patched.handles:
        vars(anatomy.model).pop(_ATTRIBUTE, None)
    texts = [handle for handle in handles if handle._bound]
    patched.engine.tower_alone = not texts
    if towers := [handle for handle in handles if handle._tower]:
        _sync_tower(anatomy.model, patched, towers)
    if texts:
        _sync_text(anatomy, patched, texts)


def _dispatch(configs: Sequence[Any]) -> None:
    """Have attention go through our function where these configs are asked."""
    attention.register()
    for config in configs:
        config._attn_implementation_internal = ImplementationName(config._attn_implementation or "eager")


def _sync_tower(model: nn.Module, patched: _Patched, handles: Sequence[PatchHandle]) -> None:
    patched.tower = tower = examine_tower(model)
    patched.engine.prefix = tower.prefix
    planners = {layer: bound for handle in handles for layer, bounds in handle._tower.items() for bound in bounds}
    for index, module in tower.attention.items():
        attention.attach(module, Layer(patched.engine, index, len(tower.attention), planners.get(index)))
    _dispatch(tower.configs)
    patched.hooks.append(attention.attach_patches(tower.patches, patched.engine))


def _sync_text(anatomy: Anatomy, patched: _Patched, handles: Sequence[PatchHandle]) -> None:
    layers = {i: Layer(patched.engine, i) for i in anatomy.attention}
    requesters: list[Bound] = []
    prunes, patched.engine.ahead = False, {}
    for rank in _ORDER:
        for handle in handles:
            for index, bounds in handle._bound.items():
                for bound in bounds:
                    verbs = bound.method.verbs()
                    if bound.method.card.family != rank:
                        continue
                    if "plan" in verbs:
                        layers[index].planner = bound
                    if "adjust" in verbs:
                        layers[index].adjusters.append(bound)
                    if "prune" in verbs:
                        layers[index].pruners.append(bound)
                        prunes = True
                        if bound.method.looks_ahead:
                            patched.engine.ahead.setdefault(index, []).append(bound)
                    if "request" in verbs and not any(b.method is bound.method for b in requesters):
                        requesters.append(bound)
    methods = [b.method for h in handles for bounds in h._bound.values() for b in bounds]
    needs = {need for method in methods for need in method.card.needs}
    # the count of images would take lost text for lost images
    drops = any(m.drops_images() for m in methods) and not any(m.drops_text() for m in methods)
    patched.engine.layer_cost = anatomy.layer_cost if drops else None
    patched.engine.tap = Tap.on(anatomy.model) if "class token" in needs else None
    patched.hooks += patched.engine.tap.hooks if patched.engine.tap is not None else []
    patched.engine.encoder = Encoder.on(anatomy.outer, patched.engine.inside) if "pixels" in needs else None
    patched.hooks += [patched.engine.encoder] if patched.engine.encoder is not None else []
    _dispatch(anatomy.configs())
    for index, module in anatomy.attention.items():
        attention.attach(module, layers[index])
    patched.hooks += request.attach_text(anatomy.text, patched.engine)
    patched.engine.prunes = prunes
    if prunes:
        for index, module in enumerate(anatomy.decoder_layers):
            following = next(iter(anatomy.decoder_layers[index + 1 : index + 2]), None)
            patched.hooks += pruning.attach(module, patched.engine, index, anatomy.text, following)
    if prunes or requesters or anatomy.image_token_id is not None:
        for module in anatomy.outer:
            patched.hooks += request.attach_outer(module, patched.engine, anatomy.image_token_id, requesters)
