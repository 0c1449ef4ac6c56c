"""Where a model can be patched: its text decoder, its attention modules, its own sliding windows, its vision tower."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from hfpatch.calibrated import ModelSizes
from hfpatch.costs import LayerCost
from hfpatch.errors import UnsupportedError


@dataclass(frozen=True)
class Anatomy:
    """Where a model can be patched.

    Attributes:
        text: the module that runs the decoder layers.
        attention: attention modules by layer; layers without one (linear attention, Mamba) are missing.
        windows: the model's own sliding window by layer.
        outer: modules that may be called with `input_ids`, outermost first.
    """

    model: nn.Module
    config: Any
    text: nn.Module
    decoder_layers: list[nn.Module]
    attention: dict[int, nn.Module]
    windows: dict[int, int]
    outer: list[nn.Module]
    image_token_id: int | None

    @property
    def num_layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def counts_positions(self) -> bool:
        """Every token's position is one number, which the text model's own rotary embedding takes."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return hasattr(self.text, "rotary_emb") and "mrope_section" not in rope

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_heads)

    @property
    def sizes(self) -> ModelSizes:
        return ModelSizes(self.num_layers, self.num_heads, self.num_key_value_heads, self.head_dim)

    @property
    def layer_cost(self) -> LayerCost:
        parameter = next(self.text.parameters())
        return LayerCost.of(
            self.config, self.num_heads, self.num_key_value_heads, self.head_dim, parameter.element_size()
        )

    def configs(self) -> list[Any]:
        """The distinct config objects that name the attention implementation of the text layers."""
        found = [self.config, self.text.config, *(m.config for m in self.attention.values())]
        return list({id(c): c for c in found}.values())


def examine(model: Any) -> Anatomy:
    """Find the parts of a model. Raises UnsupportedError if its attention cannot be replaced."""
    kind = type(model).__name__
    if not _is_model(model):
        raise UnsupportedError(
            f"{kind} is not a transformers model. Pass a PreTrainedModel, a pipeline or a PEFT model."
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind} is an encoder-decoder model; hfpatch patches decoder-only language models.")
    candidates = [m for m in model.modules() if _is_model(m) and m.config is config]
    # the list is called `layers` in most families, `h` in the older ones
    lists = [(m, list(c)) for m in candidates for c in m.children() if isinstance(c, nn.ModuleList)]
    decoders = [(m, layers) for m, layers in lists if len(layers) == config.num_hidden_layers]
    if not decoders:
        raise UnsupportedError(f"{kind}: no text decoder with a list of layers was found, so nothing can be patched.")
    text, layers = decoders[0]
    found: dict[int, nn.Module] = {}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            kind_of_layer: Any = type(module)
            if isinstance(getattr(module, "layer_idx", None), int) and _dispatches(kind_of_layer):
                found[index] = module
                break
    if not found:
        raise UnsupportedError(
            f"{kind}: no layer dispatches through transformers' AttentionInterface, so its attention cannot be "
            "replaced. Models written for transformers 5 do; remote code often does not."
        )
    outer = [m for m in model.modules() if _is_model(m) and m is not text and _contains(m, text)]
    image = getattr(model.config, "image_token_id", None)
    windows = {i: w for i, m in found.items() if (w := _native_window(m, config, i)) is not None}
    return Anatomy(model, config, text, layers, found, windows, outer, image)


@dataclass(frozen=True)
class TowerAnatomy:
    """A vision tower: a ViT, alone or in front of a language model.

    Attributes:
        attention: attention modules of the layers whose output is used, which may leave out the last ones.
        patches: the convolution that makes patches of pixels.
        prefix: class and register tokens; they stand before the patches.
        configs: the config objects that name its attention implementation.
    """

    config: Any
    attention: dict[int, nn.Module]
    patches: nn.Conv2d
    prefix: int
    configs: list[Any]

    @property
    def sizes(self) -> ModelSizes:
        heads = int(self.config.num_attention_heads)
        return ModelSizes(len(self.attention), heads, heads, int(self.config.hidden_size) // heads)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of the size that the tower was made for."""
        rows, columns = (side // patch for side, patch in zip(_pair(self.config.image_size), self.steps, strict=True))
        return rows, columns

    @property
    def steps(self) -> tuple[int, int]:
        return _pair(self.patches.stride)


def examine_tower(model: Any) -> TowerAnatomy:
    """Find the vision tower. Raises UnsupportedError if there is none, or if its attention cannot be replaced."""
    kind = type(model).__name__
    whole: Any = getattr(model, "config", None)
    config: Any = getattr(whole, "vision_config", None) or whole
    if not _is_model(model) or not (hasattr(config, "patch_size") and hasattr(config, "num_hidden_layers")):
        raise UnsupportedError(
            f"{kind} has no vision tower in which patches of an image attend to each other. "
            "Patchers for this model: hfpatch.list_patchers(supports=model)."
        )
    if own := [name for name in _WINDOWED if getattr(config, name, None)]:
        raise UnsupportedError(
            f"the vision tower of {kind} has windows of its own ({own[0]} in its config); its layers stay as they are."
        )
    parts = [m for m in model.modules() if getattr(getattr(m, "config", None), "model_type", "") == config.model_type]
    for name in _PACKED:
        if any(name in inspect.signature(type(m).forward).parameters for m in parts):
            raise UnsupportedError(
                f"the vision tower of {kind} takes images of several sizes in one sequence ({name}), so that its "
                "tokens are no grid. Towers that resize their images, as CLIP, SigLIP and DINOv2, can be patched."
            )
    depth = config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    found = next((all_ for m in lists if len(all_ := _bidirectional(m, config.model_type)) == depth), None)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride != (1, 1)]
    if found is None or len(convolutions) != 1:
        what = "layers that attend through transformers' AttentionInterface" if found is None else "one patch embedding"
        raise UnsupportedError(f"the vision tower of {kind} cannot be patched: {what} could not be found in it.")
    used = _used_layers(whole, depth)
    configs = [config, *(m.config for m in parts), *(m.config for m in found)]
    return TowerAnatomy(
        config,
        dict(enumerate(found[:used])),
        convolutions[0],
        _prefix(model),
        list({id(c): c for c in configs}.values()),
    )


# Names in the configs and forwards of transformers.
_WINDOWED = ("window_size", "fullatt_block_indexes", "global_attn_indexes", "window_block_indices")
_PACKED = ("grid_thw", "image_grid_thw", "spatial_shapes", "image_sizes", "cu_seqlens")
_PREFIX = ("class_embedding", "cls_token", "distillation_token", "register_tokens")


def _bidirectional(layers: nn.ModuleList, model_type: str) -> list[Any]:
    """The attention module of each layer that has one."""
    found = []
    for layer in layers:
        for module in layer.modules():
            kind: Any = type(module)
            mine = getattr(getattr(module, "config", None), "model_type", None) == model_type
            if mine and not getattr(module, "is_causal", True) and _dispatches(kind):
                found.append(module)
                break
    return found


def _used_layers(config: Any, depth: int) -> int:
    """How many layers of the tower lead to what the language model gets."""
    which = getattr(config, "vision_feature_layer", None)
    chosen = [depth] if which is None else [which] if isinstance(which, int) else list(which)
    # entry 0 of the hidden states is the embedding
    return max(layer if layer >= 0 else depth + 1 + layer for layer in chosen)


def _prefix(model: nn.Module) -> int:
    named = [(name.rsplit(".", 1)[-1], parameter) for name, parameter in model.named_parameters()]
    return sum(p.shape[1] if name == "register_tokens" else 1 for name, p in named if name in _PREFIX)


def _pair(size: Any) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(rows), int(columns)


def _is_model(module: Any) -> bool:
    """A transformers model, without importing transformers to ask."""
    return isinstance(module, nn.Module) and hasattr(module, "config") and hasattr(module, "set_attn_implementation")


@functools.cache
def _dispatches(cls: Any) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):
        return False


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(m is part for m in module.modules())


def _native_window(module: nn.Module, config: Any, layer: int) -> int | None:
    """The sliding (or chunked) window that the model itself has in this layer."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        if types[layer] == "full_attention":
            return None
        size = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        return int(size) if size else 0
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    return int(window) if window else None
