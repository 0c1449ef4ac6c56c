"""One run as data: a recipe, from YAML, TOML, JSON or a mapping. No torch here, and no code runs from a recipe.

How numbers and text are written is in `notation`, how data become dataclasses in `typed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hfpatch.errors import ConfigError, UnknownNameError
from hfpatch.notation import (
    Keys,
    dotted,
    dump_yaml,
    flow,
    leaves,
    parse_selector,
    parse_value,
    paths,
    read_json,
    read_toml,
    read_yaml,
    split_at_commas,
    with_sizes,
)
from hfpatch.typed import Source, build, did_you_mean, kind_of, plain

VERSION = 1
ENVIRONMENT = {"HFPATCH_KERNEL": ("runtime", "kernel"), "HFPATCH_STRICT": ("runtime", "strict")}
"""Environment variables that come between our defaults and the recipe."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SELECTORS = ("layers", "heads", "phase")
_UNSWEPT = ("version", "name", "output", "expect", "matrix")


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
        for part in split_at_commas(rest) if rest else []:
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
        return build(cls, {"use": use, "params": options, **chosen}, Source(f"patch {text!r}"), ())

    def __str__(self) -> str:
        chosen = {key: value for key in _SELECTORS if (value := getattr(self, key)) is not None}
        options = ",".join(f"{key}={flow(value)}" for key, value in {**self.params, **chosen}.items())
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
                        f"{', '.join(f'{key}: {flow(values)}' for key, values in self.matrix.items()) or 'nothing'}."
                    )

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, made of dicts, lists and scalars."""
        return typing.cast("dict[str, Any]", plain(self))

    def leaves(self) -> dict[str, Any]:
        """`{dotted path: scalar or empty container}`."""
        return {dotted(keys): value for keys, value in leaves(self.to_dict())}

    def points(self) -> list[Point]:
        """The runs of a sweep: every combination of `matrix`, the last key varying fastest.

        Raises ConfigError for a path that does not exist, a value that it does not take, and for equal points.
        """
        return _points(self, Source("recipe"))

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
        return f"{name}={flow(self.values[path])}"


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path's shortest end that is no other path's, from a word on: `patches.0.params.keep` -> `keep`."""
    names = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[n:]) for n in range(len(parts) - 1, 0, -1) if not parts[n].isdecimal()]
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in paths) == 1)
        names[path] = next(alone, path)
    return names


def _points(recipe: Recipe, origin: Source) -> list[Point]:
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
        here = Source(f"{origin.labels.get(('matrix',), origin.name)}: matrix")
        for path, value in chosen.items():
            line = origin.labels.get(("matrix", path), origin.name)
            _assign(data, here, path, plain(value), f"{line}: matrix")
        point = Point(number, chosen, build(Recipe, data, here, ()))
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
    recipe = build(Recipe, data, origin, ())
    if recipe.matrix:
        _points(recipe, origin)
    # as text, since a layer number may have been text in the file
    labels = {dotted(keys): label for keys, label in origin.labels.items()}
    return recipe, {path: labels.get(path, "default") for path in recipe.leaves()}


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with hfpatch, for `recipe:NAME`."""
    here = Path(__file__).parent
    # in a wheel they lie inside the package, in a checkout beside it
    folder = next(d for d in (here / "recipes", here.parent / "recipes") if d.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[dict[str, Any], Source]:
    if isinstance(source, Recipe):
        data = source.to_dict()
        return data, Source("recipe", dict.fromkeys(paths(data), "recipe"))
    if isinstance(source, Mapping):
        data = with_sizes(plain(dict(source)))
        return data, Source("recipe", dict.fromkeys(paths(data), "given"))
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
        data, lines = read_toml(text, name)
    elif suffix == ".json":
        data, lines = read_json(text, name)
    else:
        data, lines = read_yaml(text, name)
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: a recipe is a mapping of keys to values, this is {kind_of(data)}.")
    if folder is not None and not _is_recipe_reference(source):
        data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip("-._") or "recipe")
    return data, Source(name, {keys: f"{name}:{line}" for keys, line in lines.items()}, folder)


def _is_recipe_reference(source: object) -> bool:
    return isinstance(source, str) and source.startswith("recipe:")


def _find(source: str) -> Path:
    if _is_recipe_reference(source):
        name, known = source.removeprefix("recipe:"), shipped_recipes()
        # patchers' names have underscores, recipes' hyphens
        if (path := known.get(name.replace("_", "-"))) is None:
            hint = did_you_mean(name, known)
            raise UnknownNameError(f"unknown recipe {name!r}.{hint} hfpatch list recipes has all that are shipped.")
        return path
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise ConfigError(f"{source!r} is not a recipe: the file must end in .yaml, .yml, .toml or .json.")
    if not path.is_file():
        raise ConfigError(
            f"there is no recipe file {source!r}. Shipped ones are called recipe:NAME (hfpatch list recipes)."
        )
    return path


def _check_version(data: dict[str, Any], origin: Source) -> None:
    version = data.get("version")
    if version is None:
        origin.fail((), f"`version` is missing. Add the line `version: {VERSION}`.")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        origin.fail(("version",), f"{version!r} is not a recipe version. This hfpatch reads version {VERSION}.")
    if version > VERSION:
        origin.fail(("version",), f"this recipe has version {version}, this hfpatch reads {VERSION}: upgrade hfpatch.")


def _check_matrix(data: dict[str, Any], origin: Source) -> None:
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


def _read_head_files(data: dict[str, Any], origin: Source) -> None:
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
            heads = read_yaml(path.read_text(encoding="utf-8").replace("\t", " "), name)[0]
        except (OSError, UnicodeDecodeError) as error:
            origin.fail(keys, f"cannot read head file {str(path)!r}: {error}.")
        label = origin.labels.get(keys, origin.name)
        place[keys[-1]] = heads
        origin.labels.update({(*keys, *rest): f"{label} ({name})" for rest in paths(heads)})


def _assign(data: dict[str, Any], origin: Source, path: str, value: Any, label: str) -> None:
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
            raise ConfigError(f"{label} {path}: {'.'.join(parts[:n])} is {kind_of(target)}, it has no {part!r} inside.")
        keys = (*keys, key)
        inner: Any = target
        if n == len(parts) - 1:
            inner[key] = value
        elif isinstance(target, dict) and target.get(key) is None:
            inner[key] = {}
        target = inner[key]
    origin.labels = {k: v for k, v in origin.labels.items() if k[: len(keys)] != keys}
    origin.labels.update({(*keys, *rest): label for rest in paths(value)})
