"""Plain data to dataclasses by their annotations, and back. What does not fit is named with file, line and path."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from hfpatch.errors import ConfigError
from hfpatch.notation import Keys, dotted, paths

T = TypeVar("T")


@dataclass
class Source:
    """Where values came from, for messages and for `recipe show --resolved`."""

    name: str
    labels: dict[Keys, str] = field(default_factory=dict)
    folder: Path | None = None

    def fail(self, keys: Keys, message: str) -> NoReturn:
        """Raise ConfigError naming file, line and dotted path."""
        near = next((self.labels[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.labels), self.name)
        path = dotted(keys)
        raise ConfigError(f"{near}: {path}: {message}" if path else f"{near}: {message}")


def build(cls: type[T], data: Any, origin: Source, keys: Keys) -> T:
    """A dataclass from a mapping. Raises ConfigError for keys and values that its annotations do not allow.

    `keys`: the path at which `data` stands, for messages.
    """
    if not isinstance(data, dict):
        origin.fail(keys, f"takes keys and values, not {kind_of(data)}.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            origin.fail((*keys, key), f"unknown key.{did_you_mean(str(key), hints)} Keys here: {', '.join(hints)}.")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in data:
            origin.fail(keys, f"{f.name!r} is missing.")
    values = {key: _convert(hints[key], value, origin, (*keys, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        origin.fail(keys, str(error))


def _convert(hint: Any, value: Any, origin: Source, keys: Keys) -> Any:
    """`value` as the annotation `hint` wants it, or ConfigError."""
    origin_type, args = typing.get_origin(hint), typing.get_args(hint)
    if origin_type is types.UnionType or origin_type is typing.Union:
        for member in args:
            if _fits(member, value):
                return _convert(member, value, origin, keys)
        origin.fail(keys, _wrong_type(value, args))
    if not _fits(hint, value):
        origin.fail(keys, _wrong_type(value, (hint,)))
    if origin_type is Literal and value not in args:
        origin.fail(keys, f"{value!r} is not one of: {', '.join(map(str, args))}.")
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, origin, keys)
    if origin_type is tuple:
        return tuple(_convert(args[0], item, origin, (*keys, n)) for n, item in enumerate(value))
    if origin_type is list:
        return [_convert(args[0], item, origin, (*keys, n)) for n, item in enumerate(value)]
    if origin_type is dict:
        # JSON has no whole numbers as keys
        whole = args[0] is int
        return {
            _convert(args[0], int(k) if whole and str(k).isdecimal() else k, origin, (*keys, k)): _convert(
                args[1], v, origin, (*keys, k)
            )
            for k, v in value.items()
        }
    if hint is float:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        origin.fail(keys, "must be a finite number.")
    if hint is Any and isinstance(value, (dict, list)):
        _check_plain(value, origin, keys)
    return value


def _check_plain(value: Any, origin: Source, keys: Keys) -> None:
    for rest in paths(value):
        item = value
        for key in rest:
            item = item[typing.cast("Any", key)]
        if not isinstance(item, (str, int, float, type(None), dict, list)):
            origin.fail((*keys, *rest), f"{item!r} cannot be written to a file; use text, numbers, lists and mappings.")
        if isinstance(item, float) and not math.isfinite(item):
            origin.fail((*keys, *rest), "must be a finite number.")


def _fits(hint: Any, value: Any) -> bool:
    """Whether `value` has the outer shape that `hint` asks for."""
    kind = typing.get_origin(hint) or hint
    if kind is Any:
        return isinstance(value, (str, int, float, type(None), dict, list))
    if kind is Literal:
        return any(type(value) is type(choice) for choice in typing.get_args(hint))
    if kind is types.NoneType or value is None:
        return kind is types.NoneType and value is None
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (tuple, list):
        return isinstance(value, (list, tuple))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _wrong_type(value: Any, hints: tuple[Any, ...]) -> str:
    quotes = " Put it in quotes." if str in hints and isinstance(value, (bool, int, float)) else ""
    return f"{value!r} is {kind_of(value)}; it takes {' or '.join(map(_hint_name, hints))}.{quotes}"


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def _hint_name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    if kind is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if kind in (tuple, list):
        return "a list"
    return _NAMES.get(kind, "a mapping")


def kind_of(value: Any) -> str:
    """What a value is, in a user's words: "text", "a list" ..."""
    return "a list" if isinstance(value, (list, tuple)) else _NAMES.get(type(value), "a mapping")


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def did_you_mean(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """A sentence that names the known word nearest to `name`, or nothing."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
