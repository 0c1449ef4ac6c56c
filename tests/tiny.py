"""Tiny random models of every family that the tests cover: on the CPU, fp32, eval mode, seeded, no download.

Weights are drawn wider than transformers' 0.02, so that attention is far from uniform and a wrong mask shows.
There is no EOS id: `generate` always runs to `max_new_tokens`. Ids 120-127 are never drawn as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCAB = 128
PAD, BOS = 0, 1
BEGIN_IMAGE, END_IMAGE, IMAGE = 125, 126, 127
IMAGE_TOKENS = 16

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA2: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": [_SLIDING, _FULL, _SLIDING],
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": [_SLIDING, _SLIDING, _FULL],
    "query_pre_attn_scalar": 16,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": []}
_GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "layer_types": [_SLIDING, _FULL, _SLIDING],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

# name -> (config class, what it adds to or changes in _TEXT)
_FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {}),
    "qwen3_moe": (hf.Qwen3MoeConfig, _MOE),
    "gemma2": (hf.Gemma2Config, _GEMMA2),
    "gemma3": (hf.Gemma3TextConfig, _GEMMA3),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "phi3": (hf.Phi3Config, {"sliding_window": None}),
    "gpt_oss": (hf.GptOssConfig, _GPT_OSS),
}
TEXT_NAMES = tuple(_FAMILIES)
VLM_NAMES = ("llava", "gemma3_vlm")
NAMES = TEXT_NAMES + VLM_NAMES


def tiny_config(name: str, **overrides: Any) -> Any:
    """Config of a tiny model. `overrides` go to the text model's config, e.g. `sliding_window=64`."""
    if name == "llava":
        return hf.LlavaConfig(
            text_config=tiny_config("llama", **overrides).to_dict(),
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
            image_token_id=IMAGE,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-2,
            pad_token_id=PAD,
        )
    if name == "gemma3_vlm":
        return hf.Gemma3Config(
            text_config=tiny_config("gemma3", **overrides).to_dict(),
            vision_config={"model_type": "siglip_vision_model", **_TOWER},
            mm_tokens_per_image=IMAGE_TOKENS,
            image_token_id=IMAGE,
            boi_token_id=BEGIN_IMAGE,
            eoi_token_id=END_IMAGE,
            initializer_range=0.15,
            pad_token_id=PAD,
            eos_token_id=None,
        )
    make, extra = _FAMILIES[name]
    fields = {**_TEXT, **extra, **overrides}
    if "layer_types" in extra and "layer_types" not in overrides:
        # another number of layers repeats the family's pattern
        pattern = extra["layer_types"]
        fields["layer_types"] = [pattern[i % len(pattern)] for i in range(fields["num_hidden_layers"])]
    return make(**fields)


def tiny(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model of family `name` (see NAMES): fp32, eval mode, the same weights for the same seed.

    The default attention is sdpa where the family has it; pass `attn_implementation="eager"` for the other.
    """
    attn = overrides.pop("attn_implementation", None)
    config = tiny_config(name, **overrides)
    build = hf.AutoModelForImageTextToText if name in VLM_NAMES else hf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build.from_config(config, dtype=torch.float32, attn_implementation=attn)
        _widen(model)
    return model.eval()


@torch.no_grad()
def _widen(model: Any) -> None:
    """Give parameters that start at a constant (sinks, norms, biases, a zero projection) values that matter."""
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_(0.0, 1.0)
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif not parameter.any():
            parameter.normal_(0.0, 0.1)


def text_inputs(
    model: Any, batch: int = 1, length: int = 24, seed: int = 0, padding: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Random token ids: `input_ids` and `attention_mask`, int64 [batch, length].

    `padding[b]` slots of row b are padding on the left; its real tokens are the last ones of the unpadded row.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (batch, length), generator=generator)
    return _padded(ids, padding)


def vlm_inputs(
    name: str,
    model: Any,
    batch: int = 1,
    length: int = 32,
    seed: int = 0,
    padding: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Forward's keyword arguments for a prompt with one image per row: four words, the image, words up to `length`.

    `pixel_values` float [batch, 3, 32, 32]; the image fills IMAGE_TOKENS slots. `padding[b]` slots are inserted on the
    left of row b, and as many words cut from its right end, so that every row keeps its whole image.
    """
    begin = 4 if name == "llava" else 5
    stop = begin + IMAGE_TOKENS
    if length < stop + 2 + max(padding or [0]):
        raise ValueError(f"length {length} leaves no room for the image: it ends at slot {stop}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (batch, length), generator=generator)
    ids[:, begin:stop] = IMAGE
    if name == "gemma3_vlm":
        ids[:, begin - 1], ids[:, stop] = BEGIN_IMAGE, END_IMAGE
    if padding is not None:
        ids = torch.stack([row.roll(pad) for row, pad in zip(ids, padding, strict=True)])
    inputs = _padded(ids, padding)
    inputs["pixel_values"] = torch.randn(batch, 3, 32, 32, generator=generator)
    if name == "gemma3_vlm":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def _padded(ids: Tensor, padding: Sequence[int] | None) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding or []):
        ids[row, :pad] = PAD
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}
