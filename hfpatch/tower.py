"""What goes through the vision tower, for methods that choose image tokens by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfpatch.images import Tower, class_attention


@dataclass(frozen=True, eq=False)
class Found:
    """The layer whose output becomes the image tokens, its projections and the first layer's, and the projector."""

    heads: int
    layer: nn.Module
    query: nn.Module
    key: nn.Module
    project: nn.Module
    first_query: nn.Module
    first_key: nn.Module


def find(model: nn.Module) -> Found | None:
    """None: the tower is no ViT with a class token that is left out before a projector."""
    config: Any = model.config
    vision = getattr(config, "vision_config", None)
    which = getattr(config, "vision_feature_layer", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    project = next((m for name, m in model.named_modules() if name.endswith("multi_modal_projector")), None)
    if vision is None or not isinstance(which, int) or strategy != "default" or project is None:
        return None
    depth = vision.num_hidden_layers
    lists = (m for name, m in model.named_modules() if "vision" in name and isinstance(m, nn.ModuleList))
    layers = next((found for found in lists if len(found) == depth), None)
    if layers is None:
        return None
    # entry 0 of the hidden states is the embedding
    layer = layers[depth + which if which < 0 else which - 1]
    parts, first = ({name.rsplit(".")[-1]: m for name, m in of.named_modules()} for of in (layer, layers[0]))
    if "q_proj" not in parts or "k_proj" not in parts:
        return None
    heads = vision.num_attention_heads
    return Found(heads, layer, parts["q_proj"], parts["k_proj"], project, first["q_proj"], first["k_proj"])


@dataclass(eq=False)
class Tap:
    """Hooks on the tower's layer whose output becomes the image tokens; keeps what went through last.

    The tower may run before the model's forward does, as in `generate`.
    """

    heads: int
    project: nn.Module
    hooks: list[Any] = field(default_factory=list)
    seen: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def on(cls, model: nn.Module) -> Tap | None:
        """Hooked to a model's tower; None: see `find`."""
        if (found := find(model)) is None:
            return None
        tap = cls(found.heads, found.project)
        for name in ("query", "key", "first_query", "first_key"):
            tap.hooks.append(getattr(found, name).register_forward_hook(tap._keeper(name)))
        tap.hooks.append(found.layer.register_forward_hook(tap._keeper("states")))
        return tap

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return keep

    @torch.no_grad()
    def tower(self, images: Tensor) -> Tower | None:
        """What went through last, if its patches became these image tokens [B, V, width]."""
        if len(self.seen) < len(self.hooks) or self.seen["states"].ndim != 3:
            return None
        states = self.seen["states"]
        patches, rows = states.shape[1] - 1, len(images)
        per_row = images.shape[1] // patches
        if per_row * patches != images.shape[1] or per_row == 0 or (rows * per_row) % len(states):
            return None
        # beam search repeats every prompt, after the tower
        times = rows * per_row // len(states)
        order = torch.arange(len(states), device=states.device).view(-1, per_row).repeat_interleave(times, 0).flatten()
        states = states[order]
        same = self.project(states[:, 1:]).to(images).view_as(images)
        if not torch.allclose(same, images, atol=1e-2, rtol=1e-2):
            return None
        query, key, *first = (
            self.seen[name][order].reshape(len(order), 1 + patches, self.heads, -1).transpose(1, 2)
            for name in ("query", "key", "first_query", "first_key")
        )
        attention = class_attention(query, key)
        return Tower(attention, key[:, :, 1:], states, self.project, (first[0], first[1]))
