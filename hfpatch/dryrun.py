"""The dry run: which layer will do what, with which kernel, keeping how much."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hfpatch import attention
from hfpatch.anatomy import Anatomy
from hfpatch.attention import Bound
from hfpatch.call import AttentionCall, Phase
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
                row = _predict(item, anatomy, layer, phase, seq_len, batch, device, parameter.dtype)
                rows.append(row)
                density = min(density, row.density if row.density is not None else 1.0)
            kept[phase].append(density)
    if anatomy.windows:
        notes.append(f"layers {format_layers(anatomy.windows)} keep the model's own sliding window")
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
    return Explanation(order, facts, seq_len, batch, rows, mean, notes)


def _predict(
    bound: Bound,
    anatomy: Anatomy,
    layer: int,
    phase: Phase,
    seq_len: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> LayerPlan:
    method = bound.method
    if phase not in bound.phases:
        return LayerPlan(layer, phase, f"dense ({method.name} acts in another phase)", "model's own", {}, 1.0)
    if "plan" not in method.verbs():
        action = "prune after this layer" if "prune" in method.verbs() else "adjust"
        if phase == "decode" and "prune" in method.verbs():
            action = "dense on the kept tokens"
        return LayerPlan(layer, phase, f"{method.name}: {action}", "model's own", {}, 1.0)
    zero = torch.zeros((), dtype=dtype, device=device)
    # stride 0: the shapes of a long call without its memory
    query = zero.expand(batch, anatomy.num_heads, 1 if phase == "decode" else seq_len, anatomy.head_dim)
    key = zero.expand(batch, anatomy.num_key_value_heads, seq_len, anatomy.head_dim)
    call = AttentionCall(query, key, key, layer_idx=layer, num_layers=anatomy.num_layers, phase=phase)
    plan = attention.plan_for(bound, call)
    if plan.keeps_all(call):
        return LayerPlan(layer, phase, f"{method.name}: Dense", "model's own", {}, 1.0)
    choice = choose(call, plan, bound.kernel)
    share = 1.0 if bound.heads is None else len(bound.heads) / anatomy.num_heads
    density = 1.0 - share * (1.0 - float(plan.density(call)))
    return LayerPlan(layer, phase, f"{method.name}: {type(plan).__name__}", choice.name, choice.refused, density)
