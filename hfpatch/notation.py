"""Plain data written as YAML, TOML or JSON, with the line of every value; and single values as people type them.

Numbers may be written `4k` (k = 1024) and `25%` (0.25). In YAML quotes keep text as text; TOML, JSON and dicts have no
unquoted text, so there strings of that form are numbers wherever a number may stand. No code runs from a file.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import yaml

from hfpatch.errors import ConfigError

Keys = tuple[str | int, ...]

_SIZE = re.compile(r"\d+(?:\.\d+)?[kKM]|\d+(?:\.\d+)?%")
# where a size may stand in formats without unquoted text
_SIZED = ("patches", "evals", "bench")


def parse_size(text: str) -> int | float:
    """`4k` -> 4096, `1M` -> 1048576, `25%` -> 0.25, plain numbers as they are. Raises ConfigError for anything else."""
    value = parse_value(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{text!r} is not a number. Write for instance 4096, 4k, 0.25 or 25%.")
    return value


def _size(text: str) -> int | float:
    if text.endswith("%"):
        return float(text[:-1]) / 100
    tokens = float(text[:-1]) * (1024 if text[-1] in "kK" else 1024**2)
    return int(tokens) if tokens.is_integer() else tokens


def parse_value(text: str) -> Any:
    """One value in YAML's notation, sizes understood: `true`, `4k`, `[1, 3]`, `{a: 1}`, `text`."""
    return read_yaml(text, repr(text))[0]


def parse_selector(text: str) -> Any:
    """Layers as typed: a number, a list in brackets, else slice text like `2:`."""
    return parse_value(text) if text[:1] in "['\"" or text.lstrip("-").isdecimal() else text


def dump_yaml(data: Any) -> str:
    """YAML that both this module and any YAML 1.1 reader understand the same way."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types plus sizes; no dates, no `no` = false, no 1:30 = 90, no aliases."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed in recipes", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that either YAML 1.1 or `_Loader` would read as something else."""


_NUMBER_START = list("-+.0123456789")
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", _NUMBER_START),
    ("tag:yaml.org,2002:float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", _NUMBER_START),
    ("!size", _SIZE.pattern, _NUMBER_START),
):
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("!size", lambda loader, node: _size(node.value))


def read_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """(plain data, line of each key path). Raises ConfigError that begins with `name` and the line."""
    lines: dict[Keys, int] = {}
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else _from_node(loader, node, (), lines)), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply.") from error
    finally:
        loader.dispose()


def _from_node(loader: _Loader, node: yaml.Node, keys: Keys, lines: dict[Keys, int]) -> Any:
    lines.setdefault(keys, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_from_node(loader, item, (*keys, n), lines) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        data: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key: Any = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            problem = "keys must be text or whole numbers" if not isinstance(key, (str, int)) else None
            if key in data:
                problem = f"key {key!r} is there twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[*keys, key] = key_node.start_mark.line + 1
            data[key] = _from_node(loader, value_node, (*keys, key), lines)
        return data
    value = loader.construct_object(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag} is not allowed", node.start_mark)
    return value


def read_json(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """As `read_yaml`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
            raise ConfigError(f"{name}: key {twice!r} is there twice.")
        return data

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}:{getattr(error, 'lineno', 1)}: not valid JSON: {error}.") from error
    # valid JSON is valid YAML once its tabs are spaces, and our YAML reader knows lines
    return with_sizes(data), read_yaml(text.replace("\t", " "), name)[1]


def read_toml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """As `read_yaml`, with lines as near as can be told."""
    try:
        data = with_sizes(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}.") from error
    lines: dict[Keys, int] = {}
    for keys in paths(data):
        # tomllib keeps no lines: the first line that sets or opens this key is near enough for a message
        key = re.escape(str(keys[-1])) if keys else "$^"
        found = re.search(rf"^\s*(?:\[.*\b{key}\]|.*\b{key}\"?\s*=)", text, re.MULTILINE)
        if found:
            lines[keys] = text.count("\n", 0, found.end()) + 1
    return data, lines


def with_sizes(data: Any) -> Any:
    """Sizes written as text, in formats without unquoted text, as numbers where numbers may stand."""
    if not isinstance(data, dict):
        return data
    sized = {key: _numbers(item) if str(key).partition(".")[0] in _SIZED else item for key, item in data.items()}
    if "matrix" in sized:
        sized["matrix"] = with_sizes(sized["matrix"])
    if isinstance(sized.get("expect"), list):
        sized["expect"] = [
            {**want, "at": with_sizes(want["at"])} if isinstance(want, dict) and "at" in want else want
            for want in sized["expect"]
        ]
    return sized


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _size(value) if isinstance(value, str) and _SIZE.fullmatch(value) else value


def paths(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The key path of every value inside, containers and `value` itself included."""
    yield keys
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*keys, key))


def leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(key path, value) of scalars and of empty containers."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*keys, key))
    else:
        yield keys, value


def dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def split_at_commas(text: str) -> list[str]:
    """`text` at the commas outside quotes and brackets."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        if char == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def flow(value: Any) -> str:
    """`value` on one line of YAML, quoted where a comma or bracket would end it."""
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.strip()[1:-1]
