"""What goes through the vision tower, for methods that choose image tokens by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfpatch.images import Tower


@dataclass(frozen=True, eq=False)
class Found:
    """The tower's layer whose output becomes the image tokens, its projections, and the projector behind it."""

    heads: int
    layer: nn.Module
    query: nn.Module
    key: nn.Module
    project: nn.Module


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
    parts = {name.rsplit(".")[-1]: m for name, m in layer.named_modules()}
    if "q_proj" not in parts or "k_proj" not in parts:
        return None
    return Found(vision.num_attention_heads, layer, parts["q_proj"], parts["k_proj"], project)


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
        for name, module in (("query", found.query), ("key", found.key), ("states", found.layer)):
            tap.hooks.append(module.register_forward_hook(tap._keeper(name)))
        return tap

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return keep

    @torch.no_grad()
    def tower(self, images: Tensor) -> Tower | None:
        """What went through last, if its patches became these image tokens [B, V, width]."""
        if len(self.seen) < 3 or self.seen["states"].ndim != 3:
            return None
        query, key, states = (self.seen[name] for name in ("query", "key", "states"))
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
        query = query[order, :1].reshape(len(order), 1, self.heads, -1).transpose(1, 2).float()
        key = key[order].reshape(len(order), 1 + patches, self.heads, -1).transpose(1, 2)
        scores = query @ key.float().mT * query.shape[-1] ** -0.5
        return Tower(scores.softmax(-1)[:, :, 0, 1:], key[:, :, 1:], states, self.project)
