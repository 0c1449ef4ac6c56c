"""Options as the fields of a frozen dataclass, checked once: for methods and for evaluation tasks alike."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self

from hfpatch.errors import ConfigError


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: tuple[Any, ...] = (),
    paper: Any = None,
) -> Any:
    """A dataclass field with its help text, its range and the paper's own default where ours differs."""
    return dataclasses.field(
        default=default, metadata={"help": help, "ge": ge, "gt": gt, "le": le, "choices": choices, "paper": paper}
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of everything with options. Unknown names, wrong types and values out of range raise ConfigError."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self.put(field.name, _checked(self, field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Bring options into their final form with `put`, and refuse those that are fine alone and wrong together."""

    def put(self, name: str, value: Any) -> None:
        """Set a field during `check`, before anyone has seen the object."""
        object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from a mapping; raises ConfigError naming unknown options and the closest known ones."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{cls.name}: no option {key!r}.{hint} It takes: {', '.join(known) or 'none'}.")
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """All options by name, ready for YAML."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def changed(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        return {f.name: _plain(v) for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.changed().items())])


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _checked(owner: Options, field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type and inside its range, or ConfigError."""
    where, meta = f"{owner.name}: {field.name}={value!r}", field.metadata
    kinds = _kinds(type(owner), field.name)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, list) and tuple in kinds:
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    # bool is an int to Python, not to a user
    if not any(isinstance(value, k) and (k is bool or not isinstance(value, bool)) for k in kinds):
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise ConfigError(
            f"{where} has the wrong type {type(value).__name__}; it takes {wanted}. {meta.get('help', '')}"
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        lows = [f"> {meta['gt']}"] if meta.get("gt") is not None else []
        lows += [f">= {meta['ge']}"] if meta.get("ge") is not None else []
        highs = [f"<= {meta['le']}"] if meta.get("le") is not None else []
        bad = (
            value != value
            or (meta.get("gt") is not None and value <= meta["gt"])
            or (meta.get("ge") is not None and value < meta["ge"])
            or (meta.get("le") is not None and value > meta["le"])
        )
        if bad:
            raise ConfigError(
                f"{where} is out of range: it must be {' and '.join(lows + highs)}. {meta.get('help', '')}"
            )
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{where} is not one of: {', '.join(map(str, meta['choices']))}. {meta.get('help', '')}")
    return value


def _kinds(cls: type, name: str) -> tuple[type, ...]:
    """The plain classes that an annotation admits."""
    hint = typing.get_type_hints(cls)[name]
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(
        type(typing.get_args(m)[0]) if typing.get_origin(m) is Literal else typing.get_origin(m) or m for m in members
    )
