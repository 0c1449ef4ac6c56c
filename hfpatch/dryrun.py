"""The dry run: which layer will do what, with which kernel, keeping how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfpatch import attention
from hfpatch.anatomy import Anatomy
from hfpatch.attention import Bound
from hfpatch.call import AttentionCall, Phase
from hfpatch.costs import ImageCost
from hfpatch.kernels import choose
from hfpatch.selectors import format_layers
from hfpatch.summary import Explanation, LayerPlan


def explain_bound(
    anatomy: Anatomy, bound: Mapping[int, list[Bound]], order: list[str], seq_len: int, batch: int
) -> Explanation:
    """What each layer will do. `bound` is what `patch` would put on it."""
    parameter = next(anatomy.model.parameters())
    # a meta model stands for one that will be loaded onto the best device here
    meta = parameter.device.type == "meta"
    device = torch.device("cuda" if meta and torch.cuda.is_available() else "cpu") if meta else parameter.device
    rows: list[LayerPlan] = []
    kept: dict[str, list[float]] = {"prefill": [], "decode": []}
    notes = []
    content: set[str] = set()
    for layer in range(anatomy.num_layers):
        for phase in ("prefill", "decode"):
            density = 1.0
            if layer in anatomy.windows:
                rows.append(LayerPlan(layer, phase, f"native window {anatomy.windows[layer]}", "model's own", {}, None))
            elif layer not in anatomy.attention:
                rows.append(LayerPlan(layer, phase, "no softmax attention", "model's own", {}, None))
            elif layer not in bound:
                rows.append(LayerPlan(layer, phase, "dense", "model's own", {}, 1.0))
            for item in bound.get(layer, []):
                row = _predict(item, anatomy, layer, phase, seq_len, batch, device, parameter.dtype, content)
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
    facts = {
        "type": type(anatomy.model).__name__,
        "layers": anatomy.num_layers,
        "heads": f"{anatomy.num_heads} q / {anatomy.num_key_value_heads} kv",
        "head_dim": anatomy.head_dim,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(device),
    }
    mean: dict[str, float | None] = {phase: sum(d) / len(d) for phase, d in kept.items()}
    images, note = _image_cost(anatomy, bound, seq_len)
    if images is not None and mean["prefill"] is not None:
        mean["prefill"] *= images.pairs
    return Explanation(order, facts, seq_len, batch, rows, mean, notes + note, images)


def _image_cost(anatomy: Anatomy, bound: Mapping[int, list[Bound]], seq_len: int) -> tuple[ImageCost | None, list[str]]:
    """What dropping image tokens saves of a prompt with one image, and notes."""
    methods = list({id(b.method): b.method for bounds in bound.values() for b in bounds}.values())
    dropping = [method for method in methods if "image tokens" in method.card.needs]
    if not dropping:
        return None, []
    images = getattr(anatomy.model.config, "image_seq_length", None)
    if images is None or images >= seq_len:
        why = "depends on the image" if images is None else f"is {images}, no less than the prompt's"
        return None, [f"no forecast of FLOPs and KV bytes: the number of image tokens {why}"]
    stages: dict[int, int] = {}
    left = images
    # what leaves out tokens before the first layer comes first
    for method in sorted(dropping, key=lambda m: min(m.stages(anatomy.num_layers, images), default=0)):
        found = method.stages(anatomy.num_layers, left)
        stages |= {layer: min(count, stages.get(layer, count)) for layer, count in found.items()}
        left = min([left, *(count for layer, count in found.items() if layer < 0)])
    return ImageCost.forecast(anatomy.layer_cost, seq_len, images, anatomy.num_layers, stages), []


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
        action = "adjust"
        if "image tokens" in method.card.needs:
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
    if plan.keeps_all(call):
        return LayerPlan(layer, phase, f"{method.name}: Dense", "model's own", {}, 1.0)
    choice = choose(call, plan, bound.kernel)
    share = 1.0 if bound.heads is None else len(bound.heads) / anatomy.num_heads
    density = 1.0 - share * (1.0 - float(plan.density(call)))
    return LayerPlan(layer, phase, f"{method.name}: {type(plan).__name__}", choice.name, choice.refused, density)


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
