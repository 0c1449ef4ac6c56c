"""Tiny random vision-language models of every family that the docs name, and what image methods do on them.

Configs and prompts only differ in data. `docs/generate.py` makes the table of families from `outcome`, and
`test_vlm_families.py` tests what the table says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import tiny
import torch
import transformers as hf
from torch import Tensor

import hfpatch
import hfpatch.methods
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.registry import METHODS

LAYERS, WORDS = 5, 14
_START, _END, _IMAGE, _VIDEO = 124, 126, tiny.IMAGE, 123
# names of inputs that run along the tokens; all others belong to pictures
_ALONG = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

_TOWER = {**tiny._TOWER, "initializer_range": 0.15}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER}
_MARKS = {"image_token_id": _IMAGE, "video_token_id": _VIDEO}
_QWEN = {**_MARKS, "vision_start_token_id": _START, "vision_end_token_id": _END}
_SPIRAL = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
_SPIRAL["initializer_range"] = 0.15
_WIDTH = 64


def _text(family: str = "llama", **more: Any) -> dict[str, Any]:
    return {**tiny.tiny_config(family, num_hidden_layers=LAYERS).to_dict(), **more}


def _mrope(config: type, **more: Any) -> dict[str, Any]:
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    fields = {**tiny._TEXT, "num_hidden_layers": LAYERS, "rope_parameters": sections, **more}
    return config(**fields).to_dict()


def _idefics(config: type) -> Any:
    tower = {**_TOWER, "image_size": 64}
    return config(text_config=_text(), vision_config=tower, image_token_id=_IMAGE, scale_factor=2, pad_token_id=0)


_CONFIGS: dict[str, Callable[[], Any]] = {
    "LLaVA-1.5": lambda: tiny.tiny_config("llava", num_hidden_layers=LAYERS),
    "LLaVA-NeXT": lambda: hf.LlavaNextConfig(
        text_config=_text(),
        vision_config=_CLIP,
        image_token_index=_IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        image_seq_length=16,
    ),
    "LLaVA-OneVision": lambda: hf.LlavaOnevisionConfig(
        text_config=_text("qwen2"),
        vision_config=_SIGLIP,
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    ),
    "Qwen2-VL": lambda: hf.Qwen2VLConfig(
        text_config=_mrope(hf.Qwen2VLTextConfig),
        vision_config={**_SPIRAL, "embed_dim": 32, "hidden_size": _WIDTH},
        **_QWEN,
    ),
    "Qwen2.5-VL": lambda: hf.Qwen2_5_VLConfig(
        text_config=_mrope(hf.Qwen2_5_VLTextConfig),
        vision_config={
            **_SPIRAL,
            **{"hidden_size": 32, "out_hidden_size": _WIDTH, "intermediate_size": 48},
            **{"window_size": 32, "fullatt_block_indexes": [1]},
        },
        **_QWEN,
    ),
    "Qwen3-VL": lambda: hf.Qwen3VLConfig(
        text_config=_mrope(hf.Qwen3VLTextConfig),
        vision_config={
            **_SPIRAL,
            **{"depth": 3, "hidden_size": 32, "out_hidden_size": _WIDTH, "intermediate_size": 48},
            **{"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        },
        **_QWEN,
    ),
    "InternVL": lambda: hf.InternVLConfig(
        text_config=_text("qwen2"),
        vision_config={**_TOWER, "patch_size": (4, 4), "image_size": (32, 32)},
        image_token_id=_IMAGE,
        image_seq_length=16,
    ),
    "PaliGemma": lambda: hf.PaliGemmaConfig(
        text_config={**_text(), "model_type": "gemma"},
        vision_config=_SIGLIP,
        image_token_index=_IMAGE,
        projection_dim=_WIDTH,
        hidden_size=_WIDTH,
        pad_token_id=0,
    ),
    "Gemma 3": lambda: tiny.tiny_config("gemma3_vlm", num_hidden_layers=LAYERS),
    "SmolVLM": lambda: _idefics(hf.SmolVLMConfig),
    "Idefics3": lambda: _idefics(hf.Idefics3Config),
}
FAMILIES = tuple(_CONFIGS)

# pieces of a picture, and image tokens of a prompt, where they are not one and 16
_PIECES = {"LLaVA-NeXT": 3, "LLaVA-OneVision": 3, "Idefics3": 2}
_TOKENS = {"LLaVA-NeXT": 52, "LLaVA-OneVision": 52, "Idefics3": 32}


@cache
def model_of(family: str) -> Any:
    """The tiny model of a family: fp32, eval mode, always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(_CONFIGS[family](), dtype=torch.float32)
        tiny._widen(model)
    return model.eval()


def image_tokens(family: str) -> int:
    return _TOKENS.get(family, tiny.IMAGE_TOKENS)


def inputs_of(family: str, pads: tuple[int, ...] = (0,), seed: int = 0) -> dict[str, Tensor]:
    """Forward's keyword arguments for prompts with a picture each; `pads[b]` slots of padding come on the left.

    Rows have as many slots: those with less padding have more words in the end.
    """
    generator = torch.Generator().manual_seed(seed)
    count, batch = image_tokens(family), len(pads)
    rows = []
    for pad in pads:
        words = torch.randint(3, 120, (4 + WORDS,), generator=generator).tolist()
        picture = [_START, *[_IMAGE] * count, _END]
        rows.append(([0] * pad + words[:4] + picture + words[4:])[: 4 + count + 2 + WORDS])
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    kinds = (ids == _IMAGE).long()
    if family.startswith("Qwen"):
        grid = torch.tensor([[1, 8, 8]]).repeat(batch, 1)
        pixels = torch.randn(batch * 64, 3 * 2 * 8 * 8, generator=generator)
        return {**inputs, "mm_token_type_ids": kinds, "pixel_values": pixels, "image_grid_thw": grid}
    side = 64 if family in ("SmolVLM", "Idefics3") else 32
    pixels = torch.randn(batch, _PIECES.get(family, 1), 3, side, side, generator=generator)
    if family in ("LLaVA-NeXT", "LLaVA-OneVision"):
        inputs["image_sizes"] = torch.tensor([[32, 64]]).repeat(batch, 1)
    elif side == 32:
        pixels = pixels[:, 0]
    if family == "Gemma 3":
        inputs["token_type_ids"] = kinds
    elif family == "PaliGemma":
        # the whole prompt sees itself
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return {**inputs, "pixel_values": pixels}


def single(inputs: Mapping[str, Tensor], row: int, pad: int) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    batch = len(inputs["input_ids"])
    return {k: v[row : row + 1, pad:] if k in _ALONG else v.chunk(batch)[row] for k, v in inputs.items()}


PRUNERS = tuple(name for name, cls in METHODS.items() if cls.drops_images())
PLANS = ("swa", "dhsa")
# all that is made for images
IMAGE_METHODS = tuple(name for name, cls in METHODS.items() if "image tokens" in cls.card.needs)


def examples(name: str) -> list[dict[str, Any]]:
    return [dict(options) for options in METHODS.get(name).examples]


@cache
def outcome(family: str, name: str, example: int) -> str:
    """Why a method does not run on a family with one of its example options; empty: it runs."""
    model = model_of(family)
    try:
        with hfpatch.patch(model, name, **examples(name)[example]) as handle, torch.no_grad():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hfpatch.errors.HFPatchWarning)
                model(**inputs_of(family))
            return next(iter(handle.report().fallbacks), "")
    except (UnsupportedError, ConfigError) as error:
        return str(error)


def table() -> str:
    """Families by methods, in Markdown: yes, or the number of the reason below it."""
    reasons: dict[str, int] = {}
    rows = ["| | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    for name in IMAGE_METHODS + PLANS:
        cells = []
        for family in FAMILIES:
            works = any(not outcome(family, name, n) for n in range(len(examples(name))))
            number = ""
            if reason := outcome(family, name, 0):
                text = reason.replace(type(model_of(family)).__name__, "the model").replace(name, "the method", 1)
                text = re.sub(r" \[[\d, ]+\]", " otherwise", text)
                number = f"({reasons.setdefault(text, len(reasons) + 1)})"
            cells.append(" ".join(filter(None, ("yes" * works or "no", number))))
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", *(f"{number}. {text.rstrip('.')}." for text, number in reasons.items())])
