"""Where a model can be patched: its text decoder, its attention modules, its own sliding windows."""

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
