"""Models of published sizes with random weights, for what depends on shapes alone: times, memory, FLOPs.

`random:NAME` is such a model, `random:NAME:layers=4` one with fewer layers of the same width. Nothing is downloaded;
answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfpatch.errors import ConfigError, UnknownNameError

PREFIX = "random:"

# config.json as published, as far as transformers' defaults do not say it already
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
VICUNA_7B = LLAMA_8B | {
    "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "llama-3.1-8b": (LLAMA_8B, None),
    "qwen3-8b": (QWEN3_8B, None),
    "llava-1.5-7b": (VICUNA_7B, CLIP_L),
    "llava-1.5-13b": (VICUNA_13B, CLIP_L),
}
"""Name -> (language model, vision tower)."""


def llava(text: Mapping[str, Any], tower: Mapping[str, Any], image_token: int) -> dict[str, Any]:
    """A LLaVA-1.5 of these parts."""
    return {
        "model_type": "llava",
        "text_config": dict(text),
        "vision_config": dict(tower),
        "image_token_id": image_token,
        "image_seq_length": (tower["image_size"] // tower["patch_size"]) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def shape_config(model_id: str) -> dict[str, Any]:
    """Fields of the config that `random:NAME[:layers=N,tower_layers=N]` means.

    Raises UnknownNameError, or ConfigError for options that it does not have.
    """
    name, _, rest = model_id.removeprefix(PREFIX).partition(":")
    if name.lower() not in SHAPES:
        raise UnknownNameError(f"no shape called {name!r}. Available: {', '.join(PREFIX + n for n in SHAPES)}.")
    text, tower = SHAPES[name.lower()]
    known = {"layers"} | ({"tower_layers"} if tower else set())
    sizes: dict[str, int] = {}
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        if key.strip() not in known or not value.strip().isdecimal() or int(value) < 1:
            raise ConfigError(
                f"{model_id!r}: {part!r} is not of the form {' or '.join(f'{key}=N' for key in sorted(known))} with a "
                "number of layers from 1 up."
            )
        sizes[key.strip()] = int(value)
    text = text | {"num_hidden_layers": sizes.get("layers", text["num_hidden_layers"]), "tie_word_embeddings": False}
    if tower is None:
        return text
    # the layer before the last one gives the features
    tower = tower | {"num_hidden_layers": max(sizes.get("tower_layers", tower["num_hidden_layers"]), 2)}
    return llava(text, tower, 32000)
