"""Layer and head selectors: what users write, and the indices that it means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hfpatch.errors import ConfigError

LayerSelector = int | str | Iterable[int] | Callable[[int], bool] | None
HeadSelector = Mapping[Any, Any] | Iterable[Any] | str | Path | None

_GRAMMAR = (
    'a layer number, a list of numbers, "all", "odd", "even", "every4+1", "first:3", "last:3", a slice such as "2:" or '
    '"::2", numbers and ranges such as "0-3,8", or a function of the layer number'
)


def select_layers(spec: LayerSelector, num_layers: int) -> tuple[int, ...]:
    """Indices of decoder layers, ascending. Negative numbers count from the end.

    Raises ConfigError for what is outside the model or cannot be read.
    """
    if spec is None or spec == "all":
        return tuple(range(num_layers))
    if isinstance(spec, str):
        chosen = [index for part in spec.split(",") for index in _part(part.strip(), spec, num_layers)]
    elif callable(spec):
        chosen = [index for index in range(num_layers) if spec(index)]
    else:
        chosen = [spec] if isinstance(spec, int) else list(spec)
    for index in chosen:
        if not isinstance(index, int) or isinstance(index, bool):
            raise ConfigError(f"layers={spec!r}: {index!r} is not a layer number. Write {_GRAMMAR}.")
        if not -num_layers <= index < num_layers:
            raise ConfigError(
                f"layers={spec!r}: layer {index} does not exist; the model has layers 0-{num_layers - 1}."
            )
    return tuple(sorted({index % num_layers for index in chosen}))


def _part(part: str, spec: str, num_layers: int) -> Iterable[int]:
    everything = range(num_layers)
    if part in ("odd", "even"):
        return everything[1 if part == "odd" else 0 :: 2]
    if match := re.fullmatch(r"every(\d+)(?:\+(\d+))?", part):
        if int(match[1]) > 0:
            return everything[int(match[2] or 0) :: int(match[1])]
    elif match := re.fullmatch(r"(first|last):(\d+)", part):
        count = int(match[2])
        return everything[:count] if match[1] == "first" else everything[max(num_layers - count, 0) :]
    elif match := re.fullmatch(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?", part):
        start, stop, step = (int(g) if g else None for g in match.groups())
        if step != 0:
            return everything[start:stop:step]
    elif match := re.fullmatch(r"(\d+)-(\d+)", part):
        return range(int(match[1]), int(match[2]) + 1)
    elif re.fullmatch(r"-?\d+", part):
        return [int(part)]
    raise ConfigError(f"layers={spec!r}: cannot read {part!r}. Write {_GRAMMAR}.")


def format_layers(layers: Iterable[int]) -> str:
    """Indices as short text: "0-3,8"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def select_heads(spec: HeadSelector, num_layers: int, num_heads: int) -> dict[int, tuple[int, ...]] | None:
    """Query heads by layer; None = every head of every layer.

    Args:
        spec: `{layer: [head, ...]}`, a list of `(layer, head)`, or the path of a JSON file that holds either.
    """
    if spec is None:
        return None
    if isinstance(spec, (str, Path)):
        try:
            loaded = json.loads(Path(spec).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"heads={str(spec)!r}: cannot read this head file: {error}.") from error
        return select_heads(loaded, num_layers, num_heads)
    try:
        if isinstance(spec, Mapping):
            pairs = [(int(layer), int(head)) for layer, heads in spec.items() for head in heads]
        else:
            pairs = [(int(pair[0]), int(pair[1])) for pair in spec]
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"heads={spec!r} is neither {{layer: [heads]}} nor a list of (layer, head) pairs.") from error
    chosen: dict[int, set[int]] = {}
    for layer, head in pairs:
        if not (-num_layers <= layer < num_layers and 0 <= head < num_heads):
            raise ConfigError(
                f"heads: layer {layer}, head {head} does not exist; the model has layers 0-{num_layers - 1} "
                f"with query heads 0-{num_heads - 1}."
            )
        chosen.setdefault(layer % num_layers, set()).add(head)
    return {layer: tuple(sorted(heads)) for layer, heads in sorted(chosen.items())}
