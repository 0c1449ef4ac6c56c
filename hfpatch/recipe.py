"""One run as data: YAML, TOML or JSON <-> frozen dataclasses. No torch here, and no code runs from a recipe.

Numbers may be written `4k` (k = 1024) and `25%` (0.25). In YAML quotes keep text as text; TOML, JSON and dicts have no
unquoted text, so there strings of that form are numbers wherever a number may stand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from hfpatch.errors import ConfigError, UnknownNameError

VERSION = 1
ENVIRONMENT = {"HFPATCH_KERNEL": ("runtime", "kernel"), "HFPATCH_STRICT": ("runtime", "strict")}
"""Environment variables that come between our defaults and the recipe."""

_SIZE = re.compile(r"\d+(?:\.\d+)?[kKM]|\d+(?:\.\d+)?%")
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SELECTORS = ("layers", "heads", "phase")
# where a size may stand in formats without unquoted text
_SIZED = ("patches", "evals", "bench")
_UNSWEPT = ("version", "name", "output", "expect", "matrix")

Keys = tuple[str | int, ...]
T = TypeVar("T")


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


# The parts of a recipe -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchSpec:
    """One patch by name: `use` with its options, and where it acts (see `patch` for the selectors)."""

    use: str
    params: dict[str, Any] = field(default_factory=dict)
    layers: str | int | list[int] | None = None
    heads: dict[int, list[int]] | list[list[int]] | str | None = None
    phase: Literal["prefill", "decode", "both"] | None = None

    @classmethod
    def parse(cls, text: str) -> PatchSpec:
        """`NAME[:key=value,...]`, values as in YAML. `layers`, `heads` and `phase` are the selectors, not options.

        Raises ConfigError for text that is not of that form.
        """
        use, colon, rest = text.strip().partition(":")
        if not _SLUG.fullmatch(use) or (colon and not rest.strip()):
            raise ConfigError(f"patch {text!r} is not of the form NAME or NAME:key=value,key=value.")
        options: dict[str, Any] = {}
        for part in _split(rest) if rest else []:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not key.isidentifier() or not equals:
                raise ConfigError(
                    f"patch {text!r}: {part.strip()!r} is not of the form key=value. "
                    "A list takes brackets: key=[1,3]; text with a comma takes quotes."
                )
            if key in options:
                raise ConfigError(f"patch {text!r}: {key!r} is given twice.")
            # `2:` and `0-3,8` are text to us and a mapping or an error to YAML
            options[key] = parse_selector(value) if key == "layers" else parse_value(value)
        chosen = {key: options.pop(key) for key in _SELECTORS if key in options}
        return _build(cls, {"use": use, "params": options, **chosen}, _Source(f"patch {text!r}"), ())

    def __str__(self) -> str:
        chosen = {key: value for key in _SELECTORS if (value := getattr(self, key)) is not None}
        options = ",".join(f"{key}={_flow(value)}" for key, value in {**self.params, **chosen}.items())
        return f"{self.use}:{options}" if options else self.use


@dataclass(frozen=True)
class ModelSpec:
    """What `load` gets. `id`: hub id, folder, GGUF file or `packaged:NAME`; empty where a live model is handed over."""

    id: str = ""
    revision: str | None = None
    dtype: Literal["auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"] = "auto"
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    attn: str = "auto"
    trust_remote_code: bool = False

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `load`, the id left out."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "id"}
        return {**options, "attn": None if self.attn == "auto" else self.attn}


@dataclass(frozen=True)
class Runtime:
    """How the patches run; see `patch`."""

    kernel: str = "auto"
    strict: bool = False
    seed: int | None = 0
    deterministic: bool = False


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Attributes:
        batch_size: prompts that run together, left-padded.
        reuse_context: keep the keys and values of a text that several questions share; see `hfpatch.evals.generation`.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    batch_size: int = 1
    reuse_context: bool = False


@dataclass(frozen=True)
class Prompt:
    """`chat_template`: "auto" uses the tokenizer's if it has one."""

    chat_template: Literal["auto"] | bool = "auto"
    system: str | None = None
    enable_thinking: bool = False


@dataclass(frozen=True)
class Output:
    dir: str = "runs"
    save_prompts: bool = False
    formats: tuple[Literal["md", "html"], ...] = ("md", "html")


@dataclass(frozen=True)
class Expect:
    """A number from a paper or an earlier run, shown beside ours.

    `at` binds it to those points of a sweep that have these values: `{"patches.0.params.keep": 0.25}`.
    """

    metric: str
    value: float
    tol: float | None = None
    source: str = ""
    at: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One run: model, patches, what to measure, where the results go.

    `evals` are plain options with a `task` name; the task checks the rest when it runs. `bench` likewise.
    `matrix` makes it a sweep: dotted path -> values, of which every combination is a run of its own; see `points`.
    """

    version: int = VERSION
    name: str = "recipe"
    model: ModelSpec = field(default_factory=ModelSpec)
    patches: tuple[PatchSpec, ...] = ()
    runtime: Runtime = field(default_factory=Runtime)
    baseline: Literal["dense", "none"] = "dense"
    generation: Generation = field(default_factory=Generation)
    prompt: Prompt = field(default_factory=Prompt)
    evals: tuple[dict[str, Any], ...] = ()
    bench: dict[str, Any] | None = None
    matrix: dict[str, list[Any]] = field(default_factory=dict)
    output: Output = field(default_factory=Output)
    expect: tuple[Expect, ...] = ()

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.name):
            raise ConfigError(f"name={self.name!r} becomes a folder name: use letters, digits, '.', '_' and '-' only.")
        for n, options in enumerate(self.evals):
            if not isinstance(options.get("task"), str):
                raise ConfigError(f"evals.{n} names no task. Add for instance `task: niah`.")
        for path, values in self.matrix.items():
            if path.partition(".")[0] in _UNSWEPT:
                raise ConfigError(f"matrix.{path}: {path!r} decides no result, so there is nothing to sweep over.")
            if not values:
                raise ConfigError(f"matrix.{path} has no values. Give a list such as [1, 2], or leave it out.")
        for n, want in enumerate(self.expect):
            for path, value in want.at.items():
                if value not in self.matrix.get(path, []):
                    raise ConfigError(
                        f"expect.{n}.at.{path}: no point of the sweep has {value!r} there. matrix has: "
                        f"{', '.join(f'{key}: {_flow(values)}' for key, values in self.matrix.items()) or 'nothing'}."
                    )

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, made of dicts, lists and scalars."""
        return typing.cast("dict[str, Any]", _plain(self))

    def leaves(self) -> dict[str, Any]:
        """`{dotted path: scalar or empty container}`."""
        return {_dotted(keys): value for keys, value in _leaves(self.to_dict())}

    def points(self) -> list[Point]:
        """The runs of a sweep: every combination of `matrix`, the last key varying fastest.

        Raises ConfigError for a path that does not exist, a value that it does not take, and for equal points.
        """
        return _points(self, _Source("recipe"))

    def hash(self) -> str:
        """SHA-256 of what decides the results: all but `name` and `output`."""
        decisive = {key: value for key, value in self.to_dict().items() if key not in ("name", "output")}
        # the order of the keys is that of the points
        decisive["matrix"] = list(self.matrix.items())
        # Keys that came later count where they are used, so that runs from before can be resumed.
        for part, key, unused in [
            (decisive, "matrix", []),
            *((want, "at", {}) for want in decisive["expect"]),
            (decisive["generation"], "batch_size", 1),
            (decisive["generation"], "reuse_context", False),
        ]:
            if part.get(key) == unused:
                del part[key]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write as YAML or JSON, by suffix, atomically. Reading it back gives an equal recipe."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            text = dump_yaml(self.to_dict())
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        else:
            raise ConfigError(f"cannot write a recipe as {path.name!r}: the suffix must be .yaml or .json.")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with some values replaced, by dotted path: `{"patches.0.params.keep": 0.25}`."""
        return resolve(self, {path: (value, "override") for path, value in values.items()})[0]


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        number: from 1.
        values: dotted path -> value, of each key of the `matrix`.
        recipe: an ordinary recipe, without matrix.
    """

    number: int
    values: dict[str, Any]
    recipe: Recipe

    @property
    def label(self) -> str:
        """What sets it apart, for people: `keep=0.25, seed=1`, or the patch where whole patches vary."""
        names = _short_names(list(self.values))
        texts = (self._text(path, names[path]) for path in self.values)
        return ", ".join(text if len(text) <= 60 else f"{text[:59]}…" for text in texts)

    def _text(self, path: str, name: str) -> str:
        head, *rest = path.split(".")
        if head == "patches" and not rest:
            return " + ".join(map(str, self.recipe.patches)) or "dense"
        if head == "patches" and len(rest) == 1:
            return str(self.recipe.patches[int(rest[0])])
        return f"{name}={_flow(self.values[path])}"


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path's shortest end that is no other path's, from a word on: `patches.0.params.keep` -> `keep`."""
    names = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[n:]) for n in range(len(parts) - 1, 0, -1) if not parts[n].isdecimal()]
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in paths) == 1)
        names[path] = next(alone, path)
    return names


def _points(recipe: Recipe, origin: _Source) -> list[Point]:
    points: list[Point] = []
    seen: dict[str, Point] = {}
    for number, values in enumerate(itertools.product(*recipe.matrix.values()), 1):
        chosen = dict(zip(recipe.matrix, values, strict=True))
        data = recipe.to_dict() | {"matrix": {}, "name": f"{recipe.name}-{number:02d}"}
        data["expect"] = [
            {**want, "at": {}}
            for want in data["expect"]
            if all(chosen[path] == value for path, value in want["at"].items())
        ]
        here = _Source(f"{origin.labels.get(('matrix',), origin.name)}: matrix")
        for path, value in chosen.items():
            line = origin.labels.get(("matrix", path), origin.name)
            _assign(data, here, path, _plain(value), f"{line}: matrix")
        point = Point(number, chosen, _build(Recipe, data, here, ()))
        twin = seen.setdefault(point.recipe.hash(), point)
        if twin is not point:
            raise ConfigError(
                f"{origin.labels.get(('matrix',), origin.name)}: matrix: points {twin.number} and {number} "
                f"({point.label}) are the same run. Leave out the value that is there twice, or the path that a later "
                "one replaces."
            )
        points.append(point)
    return points


# Reading -------------------------------------------------------------------------------------------------------------


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a file (.yaml .yml .toml .json), `recipe:NAME`, YAML text with a line break, or a mapping.

    Environment variables HFPATCH_KERNEL and HFPATCH_STRICT fill what the recipe leaves open.
    Raises ConfigError with path, line and the nearest valid key; UnknownNameError for an unknown `recipe:NAME`.
    """
    return resolve(source)[0]


def resolve(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, tuple[Any, str]] | None = None
) -> tuple[Recipe, dict[str, str]]:
    """`load_recipe` with `{dotted path: (value, label)}` on top: (recipe, `{dotted path: where it came from}`)."""
    data, origin = _read(source)
    if not isinstance(source, Recipe):
        for variable, (section, key) in ENVIRONMENT.items():
            given = data.setdefault(section, {}) if isinstance(data.get(section, {}), dict) else None
            if variable in os.environ and given is not None and key not in given:
                given[key] = parse_value(os.environ[variable])
                origin.labels[section, key] = variable
    for path, (value, label) in (overrides or {}).items():
        _assign(data, origin, path, value, label)
    _check_version(data, origin)
    _check_matrix(data, origin)
    _read_head_files(data, origin)
    recipe = _build(Recipe, data, origin, ())
    if recipe.matrix:
        _points(recipe, origin)
    # as text, since a layer number may have been text in the file
    labels = {_dotted(keys): label for keys, label in origin.labels.items()}
    return recipe, {path: labels.get(path, "default") for path in recipe.leaves()}


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with hfpatch, for `recipe:NAME`."""
    here = Path(__file__).parent
    # in a wheel they lie inside the package, in a checkout beside it
    folder = next(d for d in (here / "recipes", here.parent / "recipes") if d.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def parse_value(text: str) -> Any:
    """One value in YAML's notation, sizes understood: `true`, `4k`, `[1, 3]`, `{a: 1}`, `text`."""
    return _read_yaml(text, repr(text))[0]


def parse_selector(text: str) -> Any:
    """Layers as typed: a number, a list in brackets, else slice text like `2:`."""
    return parse_value(text) if text[:1] in "['\"" or text.lstrip("-").isdecimal() else text


def dump_yaml(data: Any) -> str:
    """YAML that both this module and any YAML 1.1 reader understand the same way."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


@dataclass
class _Source:
    """Where values came from, for messages and for `recipe show --resolved`."""

    name: str
    labels: dict[Keys, str] = field(default_factory=dict)
    folder: Path | None = None

    def fail(self, keys: Keys, message: str) -> NoReturn:
        """Raise ConfigError naming file, line and dotted path."""
        near = next((self.labels[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.labels), self.name)
        path = _dotted(keys)
        raise ConfigError(f"{near}: {path}: {message}" if path else f"{near}: {message}")


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[dict[str, Any], _Source]:
    if isinstance(source, Recipe):
        data = source.to_dict()
        return data, _Source("recipe", dict.fromkeys(_paths(data), "recipe"))
    if isinstance(source, Mapping):
        data = _sized(_plain(dict(source)))
        return data, _Source("recipe", dict.fromkeys(_paths(data), "given"))
    if isinstance(source, str) and "\n" in source:
        text, name, folder, suffix = source, "recipe text", None, ".yaml"
    else:
        path = _find(str(source))
        name, folder, suffix = str(path), path.parent, path.suffix
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read recipe {name}: {error}.") from error
    if suffix == ".toml":
        data, lines = _read_toml(text, name)
    elif suffix == ".json":
        data, lines = _read_json(text, name)
    else:
        data, lines = _read_yaml(text, name)
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: a recipe is a mapping of keys to values, this is {_kind(data)}.")
    if folder is not None and not _is_recipe_reference(source):
        data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip("-._") or "recipe")
    return data, _Source(name, {keys: f"{name}:{line}" for keys, line in lines.items()}, folder)


def _is_recipe_reference(source: object) -> bool:
    return isinstance(source, str) and source.startswith("recipe:")


def _find(source: str) -> Path:
    if _is_recipe_reference(source):
        name, known = source.removeprefix("recipe:"), shipped_recipes()
        if name not in known:
            raise UnknownNameError(f"unknown recipe {name!r}.{_did_you_mean(name, known)} Shipped: {', '.join(known)}.")
        return known[name]
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise ConfigError(f"{source!r} is not a recipe: the file must end in .yaml, .yml, .toml or .json.")
    if not path.is_file():
        raise ConfigError(
            f"there is no recipe file {source!r}. Shipped ones are called recipe:NAME (hfpatch list recipes)."
        )
    return path


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


def _read_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """(plain data, line of each key path)."""
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


def _read_json(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
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
    return _sized(data), _read_yaml(text.replace("\t", " "), name)[1]


def _read_toml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    try:
        data = _sized(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}.") from error
    lines: dict[Keys, int] = {}
    for keys in _paths(data):
        # tomllib keeps no lines: the first line that sets or opens this key is near enough for a message
        key = re.escape(str(keys[-1])) if keys else "$^"
        found = re.search(rf"^\s*(?:\[.*\b{key}\]|.*\b{key}\"?\s*=)", text, re.MULTILINE)
        if found:
            lines[keys] = text.count("\n", 0, found.end()) + 1
    return data, lines


def _sized(data: Any) -> Any:
    """Sizes written as text, in formats without unquoted text, as numbers where numbers may stand."""
    if not isinstance(data, dict):
        return data
    sized = {key: _numbers(item) if str(key).partition(".")[0] in _SIZED else item for key, item in data.items()}
    if "matrix" in sized:
        sized["matrix"] = _sized(sized["matrix"])
    if isinstance(sized.get("expect"), list):
        sized["expect"] = [
            {**want, "at": _sized(want["at"])} if isinstance(want, dict) and "at" in want else want
            for want in sized["expect"]
        ]
    return sized


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _size(value) if isinstance(value, str) and _SIZE.fullmatch(value) else value


def _check_version(data: dict[str, Any], origin: _Source) -> None:
    version = data.get("version")
    if version is None:
        origin.fail((), f"`version` is missing. Add the line `version: {VERSION}`.")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        origin.fail(("version",), f"{version!r} is not a recipe version. This hfpatch reads version {VERSION}.")
    if version > VERSION:
        origin.fail(("version",), f"this recipe has version {version}, this hfpatch reads {VERSION}: upgrade hfpatch.")


def _check_matrix(data: dict[str, Any], origin: _Source) -> None:
    matrix = data.get("matrix")
    for path, values in matrix.items() if isinstance(matrix, dict) else ():
        if isinstance(values, dict):
            origin.fail(
                ("matrix", path),
                "takes a list of values. A path is one key here (in TOML with quotes): "
                '"patches.0.params.keep" = [0.25, 0.5].',
            )


def _head_files(data: dict[str, Any]) -> Iterator[tuple[Any, Keys]]:
    """(container, key path) of every place that may name a head file, in the patches and in the matrix."""
    patches, matrix = data.get("patches"), data.get("matrix")
    places: list[tuple[Any, Keys]] = [(patches, ("patches",))]
    for path, values in matrix.items() if isinstance(matrix, dict) else ():
        if not isinstance(values, list):
            continue
        # a path may lead to all patches, to one, or to its heads
        depth = len(path.split(".")) if re.fullmatch(r"patches(\.\d+(\.heads)?)?", str(path)) else 0
        if depth == 1:
            places += [(value, ("matrix", path, n)) for n, value in enumerate(values)]
        elif depth == 2:
            places.append((values, ("matrix", path)))
        elif depth == 3:
            yield from ((values, ("matrix", path, n)) for n in range(len(values)))
    for found, keys in places:
        for n, patch in enumerate(found) if isinstance(found, list) else ():
            if isinstance(patch, dict) and "heads" in patch:
                yield patch, (*keys, n, "heads")


def _read_head_files(data: dict[str, Any], origin: _Source) -> None:
    """A head file's content takes its place, so that a saved recipe needs no other file."""
    for place, keys in _head_files(data):
        name = place[keys[-1]]
        if not isinstance(name, str):
            continue
        path = (origin.folder or Path()) / Path(name).expanduser()
        if not path.is_file():
            origin.fail(
                keys, f"there is no head file {str(path)!r}. It holds {{layer: [query heads]}} as JSON or YAML."
            )
        try:
            heads = _read_yaml(path.read_text(encoding="utf-8").replace("\t", " "), name)[0]
        except (OSError, UnicodeDecodeError) as error:
            origin.fail(keys, f"cannot read head file {str(path)!r}: {error}.")
        label = origin.labels.get(keys, origin.name)
        place[keys[-1]] = heads
        origin.labels.update({(*keys, *rest): f"{label} ({name})" for rest in _paths(heads)})


def _assign(data: dict[str, Any], origin: _Source, path: str, value: Any, label: str) -> None:
    """Put `value` at the dotted `path`; mappings on the way are created, list positions must exist."""
    keys: Keys = ()
    target: Any = data
    parts = path.split(".")
    if parts[0] == "matrix" and len(parts) > 2:
        # the matrix's own keys are paths
        parts = ["matrix", ".".join(parts[1:])]
    # a mapping that the recipe leaves out or sets to null starts empty
    for n, part in enumerate(parts):
        key: str | int = int(part) if isinstance(target, list) and part.isdecimal() else part
        if isinstance(target, list) and not (isinstance(key, int) and key < len(target)):
            length = len(target)
            raise ConfigError(
                f"{label} {path}: {'.'.join(parts[:n])} has {length} entries, there is no number {part!r}."
            )
        if not isinstance(target, (dict, list)):
            raise ConfigError(f"{label} {path}: {'.'.join(parts[:n])} is {_kind(target)}, it has no {part!r} inside.")
        keys = (*keys, key)
        inner: Any = target
        if n == len(parts) - 1:
            inner[key] = value
        elif isinstance(target, dict) and target.get(key) is None:
            inner[key] = {}
        target = inner[key]
    origin.labels = {k: v for k, v in origin.labels.items() if k[: len(keys)] != keys}
    origin.labels.update({(*keys, *rest): label for rest in _paths(value)})


# Mapping -> dataclass ------------------------------------------------------------------------------------------------


def _build(cls: type[T], data: Any, origin: _Source, keys: Keys) -> T:
    if not isinstance(data, dict):
        origin.fail(keys, f"takes keys and values, not {_kind(data)}.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            origin.fail((*keys, key), f"unknown key.{_did_you_mean(str(key), hints)} Keys here: {', '.join(hints)}.")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in data:
            origin.fail(keys, f"{f.name!r} is missing.")
    values = {key: _convert(hints[key], value, origin, (*keys, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        origin.fail(keys, str(error))


def _convert(hint: Any, value: Any, origin: _Source, keys: Keys) -> Any:
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
        return _build(typing.cast("type[Any]", hint), value, origin, keys)
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


def _check_plain(value: Any, origin: _Source, keys: Keys) -> None:
    for rest in _paths(value):
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
    return f"{value!r} is {_kind(value)}; it takes {' or '.join(map(_hint_name, hints))}.{quotes}"


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def _hint_name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    if kind is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if kind in (tuple, list):
        return "a list"
    return _NAMES.get(kind, "a mapping")


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, (list, tuple)) else _NAMES.get(type(value), "a mapping")


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _paths(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The key path of every value inside, containers and `value` itself included."""
    yield keys
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(item, (*keys, key))


def _leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(key path, value) of scalars and of empty containers."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*keys, key))
    else:
        yield keys, value


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _did_you_mean(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _split(text: str) -> list[str]:
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


def _flow(value: Any) -> str:
    """`value` on one line of YAML, quoted where a comma or bracket would end it."""
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.strip()[1:-1]
