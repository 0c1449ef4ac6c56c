"""The dry run: which layer will do what, with which kernel, keeping how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfpatch import attention
from hfpatch.anatomy import Anatomy, TowerAnatomy, examine_tower
from hfpatch.attention import Bound
from hfpatch.call import AttentionCall, Phase
from hfpatch.costs import ImageCost, LayerCost
from hfpatch.kernels import choose
from hfpatch.methods.base import Method
from hfpatch.plan import Plan
from hfpatch.selectors import format_layers
from hfpatch.summary import Explanation, LayerPlan, pairs_left


def explain_bound(
    anatomy: Anatomy,
    bound: Mapping[int, list[Bound]],
    tower: Mapping[int, list[Bound]],
    order: list[str],
    seq_len: int,
    batch: int,
) -> Explanation:
    """What each layer will do. `bound` is what `patch` would put on it, `tower` what on those of the vision tower."""
    parameter = next(anatomy.model.parameters())
    # a meta model stands for one that will be loaded onto the best device here
    meta = parameter.device.type == "meta"
    device = torch.device("cuda" if meta and torch.cuda.is_available() else "cpu") if meta else parameter.device
    rows: list[LayerPlan] = []
    kept: dict[str, list[float]] = {"prefill": [], "decode": []}
    notes = []
    content: set[str] = set()
    methods = list({id(b.method): b.method for bounds in bound.values() for b in bounds}.values())
    lengths = _lengths(methods, anatomy.num_layers, seq_len)
    for layer, length in enumerate(lengths):
        for phase in ("prefill", "decode"):
            density = 1.0
            if layer in anatomy.windows:
                rows.append(LayerPlan(layer, phase, f"native window {anatomy.windows[layer]}", "model's own", {}, None))
            elif layer not in anatomy.attention:
                rows.append(LayerPlan(layer, phase, "no softmax attention", "model's own", {}, None))
            elif layer not in bound:
                rows.append(LayerPlan(layer, phase, "dense", "model's own", {}, 1.0))
            for item in bound.get(layer, []):
                row = _predict(item, anatomy, layer, phase, length, batch, device, parameter.dtype, content)
                rows.append(row)
                density = min(density, row.density if row.density is not None else 1.0)
            kept[phase].append(density)
    if anatomy.windows:
        notes.append(f"layers {format_layers(anatomy.windows)} keep the model's own sliding window")
    if content:
        notes.append(
            f"what {' and '.join(sorted(content))} keeps depends on the content, and is predicted for attention that "
            "is the same everywhere; for a prompt, hfpatch apply says what was kept"
        )
    if meta:
        notes.append(f"predicted from the config alone, for {device.type} and {parameter.dtype}")
    facts: dict[str, Any] = {"type": type(anatomy.model).__name__}
    if anatomy.decoder_layers:
        facts |= {
            "layers": anatomy.num_layers,
            "heads": f"{anatomy.num_heads} q / {anatomy.num_key_value_heads} kv",
            "head_dim": anatomy.head_dim,
        }
    facts |= {"dtype": str(parameter.dtype).removeprefix("torch."), "device": str(device)}
    if tower:
        sight = examine_tower(anatomy.model)
        patches = " x ".join(map(str, sight.grid))
        facts["tower"] = f"{len(sight.attention)} layers in use, {patches} patches + {sight.prefix}"
        made = _predict_tower(sight, tower, device, parameter.dtype)
        rows = made + rows
        kept["tower"] = [row.density if row.density is not None else 1.0 for row in made]
    mean: dict[str, float | None] = {phase: sum(d) / len(d) if d else None for phase, d in kept.items()}
    if any(method.drops_text() for method in methods):
        left = [length / seq_len for length in lengths]
        mean |= {phase: pairs_left(kept[phase], left, phase) for phase in ("prefill", "decode")}
    images, note = _image_cost(anatomy, methods, seq_len)
    if images is not None and mean["prefill"] is not None:
        mean["prefill"] *= images.pairs
    return Explanation(order, facts, seq_len, batch, rows, mean, notes + note, images)


def _lengths(methods: Sequence[Method], num_layers: int, tokens: int) -> list[int]:
    """Tokens of a prompt of `tokens` that each layer has, where methods drop text too."""
    stages: dict[int, int] = {}
    for method in sorted(methods, key=lambda m: min(m.token_stages(num_layers, tokens), default=0)):
        stages |= method.token_stages(num_layers, min([tokens, *stages.values()]))
    lengths, left = [], tokens
    for layer in range(num_layers):
        lengths.append(left)
        left = min(left, stages.get(layer, left))
    return lengths


def _image_cost(anatomy: Anatomy, methods: Sequence[Method], seq_len: int) -> tuple[ImageCost | None, list[str]]:
    """What dropping image tokens saves of a prompt with one image, and notes."""
    if any(method.drops_text() for method in methods):
        return None, []
    if not any(method.drops_images() for method in methods):
        return None, []
    images = getattr(anatomy.model.config, "image_seq_length", None)
    if images is None or images >= seq_len:
        why = "depends on the image" if images is None else f"is {images}, no less than the prompt's"
        return None, [f"no forecast of FLOPs and KV bytes: the number of image tokens {why}"]
    return forecast(anatomy.layer_cost, methods, seq_len, images, anatomy.num_layers), []


def forecast(cost: LayerCost, methods: Sequence[Method], tokens: int, images: int, num_layers: int) -> ImageCost:
    """What these methods make of a prompt of `tokens`, `images` of them of one image, in a model of `num_layers`."""
    stages: dict[int, int] = {}
    left = images
    dropping = [method for method in methods if method.drops_images()]
    # what leaves out tokens before the first layer comes first
    for method in sorted(dropping, key=lambda m: min(m.stages(num_layers, images), default=0)):
        found = method.stages(num_layers, left)
        stages |= {layer: min(count, stages.get(layer, count)) for layer, count in found.items()}
        left = min([left, *(count for layer, count in found.items() if layer < 0)])
    return ImageCost.forecast(cost, tokens, images, num_layers, stages)


def _predict_tower(
    tower: TowerAnatomy, bound: Mapping[int, list[Bound]], device: torch.device, dtype: torch.dtype
) -> list[LayerPlan]:
    """A row for each layer whose output is used, for one image of the size that the tower was made for."""
    sizes, grid = tower.sizes, tower.grid
    zero = torch.zeros((), dtype=dtype, device=device)
    query = zero.expand(1, sizes.num_heads, tower.prefix + grid[0] * grid[1], sizes.head_dim)
    rows = []
    for layer in tower.attention:
        if layer not in bound:
            rows.append(LayerPlan(layer, "tower", "dense", "model's own", {}, 1.0))
        for item in bound.get(layer, []):
            call = AttentionCall(
                query, query, query, layer_idx=layer, num_layers=sizes.num_layers, phase="tower", grid=grid
            )
            rows.append(_planned(item, call, attention.plan_for(item, call)))
    return rows


def _planned(bound: Bound, call: AttentionCall, plan: Plan) -> LayerPlan:
    name, heads = bound.method.name, call.query.shape[1]
    if plan.keeps_all(call):
        return LayerPlan(call.layer_idx, call.phase, f"{name}: Dense", "model's own", {}, 1.0)
    choice = choose(call, plan, bound.kernel)
    share = 1.0 if bound.heads is None else len(bound.heads) / heads
    density = 1.0 - share * (1.0 - float(plan.density(call)))
    action = f"{name}: {type(plan).__name__}"
    return LayerPlan(call.layer_idx, call.phase, action, choice.name, choice.refused, density)


def _predict(
    bound: Bound,
    anatomy: Anatomy,
    layer: int,
    phase: Phase,
    seq_len: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    content: set[str],
) -> LayerPlan:
    """One row; the name of a method that looks at queries or keys is added to `content`."""
    method = bound.method
    if phase not in bound.phases:
        return LayerPlan(layer, phase, f"dense ({method.name} acts in another phase)", "model's own", {}, 1.0)
    if "plan" not in method.verbs():
        action = "adjust" if "adjust" in method.verbs() else "acts on the whole prompt"
        if counts := method.token_stages(anatomy.num_layers, seq_len):
            action = "dense on the kept tokens" if phase == "decode" else f"prune to {counts[layer]} tokens"
        if method.drops_images():
            action = "prune after this layer" if "prune" in method.verbs() else "choose image tokens before this layer"
            action = "dense on the kept tokens" if phase == "decode" else action
        return LayerPlan(layer, phase, f"{method.name}: {action}", "model's own", {}, 1.0)
    zero = torch.zeros((), dtype=dtype, device=device)
    # stride 0: the shapes of a long call without its memory
    query = zero.expand(batch, anatomy.num_heads, 1 if phase == "decode" else seq_len, anatomy.head_dim)
    key = zero.expand(batch, anatomy.num_key_value_heads, seq_len, anatomy.head_dim)
    call = AttentionCall(query, key, key, layer_idx=layer, num_layers=anatomy.num_layers, phase=phase)
    reading = _Reading(zero)
    with reading:
        plan = attention.plan_for(bound, call)
    if reading.seen:
        content.add(method.name)
    return _planned(bound, call, plan)


class _Reading(TorchDispatchMode):
    """Notices whether any operation looks into a tensor or a view of it; shapes and new tensors like it do not count.

    Attributes:
        seen: it does.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False
        self._storage = tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self.seen or func.is_view or name.startswith("new_") or name.endswith("_like")):
            inputs = tree_leaves((args, kwargs))
            self.seen = any(isinstance(x, Tensor) and x.untyped_storage()._cdata == self._storage for x in inputs)
        return func(*args, **(kwargs or {}))
