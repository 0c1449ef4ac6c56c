"""Files that a calibration made: a header that says for which model and how, and what was found.

JSON, or safetensors whose metadata hold the same keys as JSON texts. Methods read them here, `hfpatch.calibrate` writes
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hfpatch.errors import ConfigError, DataMissingError

VERSION = 1
_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class ModelSizes:
    """What a file must agree with: decoder layers, heads in a layer, numbers in a head."""

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int

    def text(self, *names: str) -> str:
        """Some of the sizes in words, e.g. "30 layers, 9 query heads"; all without `names`."""
        return ", ".join(f"{getattr(self, name)} {_WORDS[name]}" for name in names or _WORDS)


_WORDS = {
    "num_layers": "layers",
    "num_heads": "query heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "numbers in a head",
}


@dataclass(frozen=True)
class Header:
    """What stands at the head of a file.

    Attributes:
        format: `hfpatch-<patcher>-<what>`.
        model: id and class of the model that was calibrated.
        options: of the calibration.
        patcher: the patch it was made for, as a spec.
        card: what it was made from and how well it went, for people.
    """

    format: str
    model: Mapping[str, str]
    sizes: ModelSizes
    options: Mapping[str, Any] = field(default_factory=dict)
    patcher: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)

    def check_fits(self, where: str, sizes: ModelSizes, *names: str) -> None:
        """Raise ConfigError, beginning with `where`, if one of the sizes in `names` is not the model's."""
        if any(getattr(self.sizes, name) != getattr(sizes, name) for name in names):
            raise ConfigError(
                f"{where} is for {self.model.get('id') or 'a model'} with {self.sizes.text(*names)}; this model has "
                f"{sizes.text(*names)}. Give the file of this model, or make one with hfpatch calibrate."
            )

    def to_dict(self) -> dict[str, Any]:
        about = asdict(self)
        return {
            "format": self.format,
            "version": VERSION,
            "model": {**self.model, **about["sizes"]},
            "options": about["options"],
            "patcher": self.patcher,
            "card": about["card"],
        }


def encode(header: Header, content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """The file: safetensors where there are tensors, else JSON."""
    about = {**header.to_dict(), **content}
    if tensors is None:
        return (json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode()
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()})


def read_calibrated(path: str, option: str, format: str) -> tuple[Header, dict[str, Any]]:
    """(header, content) of a file that an option names; read again when it has changed.

    Raises DataMissingError if there is none, ConfigError if it is damaged, of another format or too new.
    """
    header, content, _ = _read(path, _modified(path), option, format)
    return header, content


def read_tensors(path: str, option: str, format: str) -> tuple[Header, dict[str, Any], dict[str, Tensor]]:
    """As `read_calibrated`, with the tensors of a safetensors file."""
    return _read(path, _modified(path), option, format)


def is_calibrated(path: str | Path, format: str) -> bool:
    """Whether the file is there and holds this format."""
    try:
        read_calibrated(str(path), "file", format)
    except (ConfigError, DataMissingError):
        return False
    return True


def _modified(path: str) -> int:
    file = Path(path)
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=16)
def _read(path: str, modified: int, option: str, format: str) -> tuple[Header, dict[str, Any], dict[str, Tensor]]:
    where = f"{option}={path!r}"
    if not Path(path).is_file():
        raise DataMissingError(f"{where}: there is no such file. Make one with hfpatch calibrate.")
    tensors: dict[str, Tensor] = {}
    try:
        if path.endswith(_SAFETENSORS):
            with safe_open(path, "pt") as file:
                content = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot read this file: {error}. Make it again with hfpatch calibrate.") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != format:
        raise ConfigError(
            f"{where} is {f'a file of format {found}' if found else 'not a file that hfpatch calibrate made'}; "
            f"{format} is wanted here."
        )
    version = content.pop("version", None)
    if isinstance(version, int) and version > VERSION:
        raise ConfigError(f"{where} has version {version}, this hfpatch reads up to {VERSION}. Upgrade hfpatch.")
    try:
        model = dict(content.pop("model"))
        sizes = ModelSizes(**{name: int(model.pop(name)) for name in _WORDS})
        about = {name: content.pop(name) for name in ("options", "patcher", "card")}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: its header is damaged ({error!r}). Make it again with hfpatch calibrate."
        ) from error
    return Header(format, model, sizes, **about), content, tensors
