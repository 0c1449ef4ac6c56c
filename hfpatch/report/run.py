"""The run directory: rows appended one by one and never rewritten, so that an interrupted run loses at most one line.

`run.json` (name, recipe hash), `recipe.resolved.yaml`, `env.json`, `samples.jsonl`, `bench.jsonl`, `layers.jsonl` and
its totals `layers.json`, `results.json`, `log.txt`, the reports and `figures/`. `latest` beside the runs holds the
newest one's name.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hfpatch.errors import ConfigError, DataMissingError, HFPatchWarning
from hfpatch.notation import dump_yaml

SCHEMA = 1

SAMPLE_KEYS = (
    "schema", "run", "arm", "task", "subtask", "cell", "id", "seed", "prompt_tokens", "prompt_sha", "answer_gold",
    "output", "output_tokens", "finish", "scores", "prefill_ms", "decode_ms", "peak_mem_mb", "density_prefill",
    "density_decode", "kernel", "fallbacks", "error",
)  # fmt: skip
BENCH_KEYS = (
    "schema", "run", "arm", "what", "length", "repeat", "ms", "selection_ms", "weights_mb", "kv_mb", "peak_prefill_mb",
    "peak_decode_mb", "dtype", "device", "device_name", "threads", "batch", "baseline", "density", "kernel", "seed",
    "torch", "transformers", "hfpatch",
)  # fmt: skip
LAYER_KEYS = ("schema", "run", "key", "layers")


def sample_key(row: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """What makes a sample row unique within its run: arm, task, cell as canonical JSON, id, seed."""
    return row["arm"], row["task"], json.dumps(row["cell"] or {}, sort_keys=True), row["id"], row["seed"]


class RunDir:
    """One run on disk. Use `create`, `open` or `resume`.

    Attributes:
        path: the directory.
        name: the recipe's name.
        recipe_hash: SHA-256 hex of the recipe that the rows belong to.
    """

    def __init__(self, path: Path, name: str, recipe_hash: str) -> None:
        self.path, self.name, self.recipe_hash = path, name, recipe_hash

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @classmethod
    def create(
        cls, base: Path, name: str, recipe: Mapping[str, Any], recipe_hash: str, env: Mapping[str, Any]
    ) -> RunDir:
        """Make `base/<UTC yyyymmdd-HHMMSS>-<name>-<hash8>/`, whole or not at all; a taken name gets -2, -3, ...

        `env` goes to env.json with the home directory written as `~`.
        """
        slug = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60] or "run"
        stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{recipe_hash[:8]}"
        base = Path(base)
        base.mkdir(parents=True, exist_ok=True)
        new = base / f".new-{secrets.token_hex(6)}"
        new.mkdir()
        try:
            about = {"schema": SCHEMA, "name": name, "recipe_hash": recipe_hash}
            (new / "run.json").write_bytes(_encode(about, indent=2))
            (new / "env.json").write_bytes(_encode(_without_home(env), indent=2))
            (new / "recipe.resolved.yaml").write_text(dump_yaml(dict(recipe)), encoding="utf-8")
            path = _rename_free(new, base, stem)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        write_atomically(base / "latest", f"{path.name}\n".encode())
        return cls(path, name, recipe_hash)

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run, by its directory or by the `latest` pointer file. Raises DataMissingError."""
        path = Path(path)
        if path.is_file() and path.name == "latest":
            path = path.parent / path.read_text(encoding="utf-8").strip()
        if not path.is_dir():
            raise DataMissingError(f"no run directory {path}. Runs are made by `hfpatch eval`, `bench` and `apply`.")
        about = _read_json(path / "run.json", f"{path} is not a complete run directory. Start the run again.")
        try:
            return cls(path, about["name"], about["recipe_hash"])
        except (KeyError, TypeError):
            raise DataMissingError(f"{path / 'run.json'} lacks name or recipe_hash. Start the run again.") from None

    @classmethod
    def resume(cls, path: Path | str, recipe_hash: str) -> RunDir:
        """An existing run, to go on with. Raises ConfigError if it was made from another recipe."""
        run = cls.open(path)
        if run.recipe_hash != recipe_hash:
            raise ConfigError(
                f"{run.path} was made from recipe {run.recipe_hash[:8]}, this one is {recipe_hash[:8]}: their samples "
                f"must not mix. Resume with {run.path / 'recipe.resolved.yaml'}, or start a new run without --resume."
            )
        return run

    # Rows -------------------------------------------------------------------------------------------------------

    def append_sample(self, row: Mapping[str, Any], path: Path | None = None) -> None:
        """Add one line to samples.jsonl (or to `path`) and wait until it is on disk. Absent SAMPLE_KEYS become null."""
        self._append(path or self.path / "samples.jsonl", SAMPLE_KEYS, row)

    def append_bench(self, row: Mapping[str, Any]) -> None:
        """Add one line to bench.jsonl and wait until it is on disk. Absent keys of BENCH_KEYS become null."""
        self._append(self.path / "bench.jsonl", BENCH_KEYS, row)

    def append_layers(self, key: Sequence[Any], layers: Sequence[Mapping[str, Any]], path: Path | None = None) -> None:
        """Add one line to layers.jsonl (or to `path`): the reports of the layers under the samples called `key`."""
        self._append(path or self.path / "layers.jsonl", LAYER_KEYS, {"key": key, "layers": layers})

    def samples(self) -> list[dict[str, Any]]:
        """All sample rows. A torn last line is dropped with a warning; a bad line elsewhere is a DataMissingError."""
        return read_lines(self.path / "samples.jsonl")

    def bench(self) -> list[dict[str, Any]]:
        """All bench rows, read like `samples`."""
        return read_lines(self.path / "bench.jsonl", BENCH_KEYS)

    def layer_rows(self) -> list[dict[str, Any]]:
        """All rows of layers.jsonl, each key once."""
        rows = read_lines(self.path / "layers.jsonl", LAYER_KEYS)
        return list({json.dumps(row["key"]): row for row in rows}.values())

    def done(self) -> set[tuple[Hashable, ...]]:
        """The `sample_key` of every row already there."""
        return {sample_key(row) for row in self.samples()}

    def _append(self, path: Path, keys: Sequence[str], row: Mapping[str, Any]) -> None:
        ordered = {key: row.get(key) for key in keys} | dict(row) | {"schema": SCHEMA, "run": self.path.name}
        line = _encode(ordered)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as f:
            _mend_tail(f)
            f.write(line)
            f.flush()
            os.fsync(f.fileno())

    # Whole files ------------------------------------------------------------------------------------------------

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace results.json at once. Floats that are not finite become null."""
        write_atomically(self.path / "results.json", _encode(results, indent=2))

    def results(self) -> dict[str, Any]:
        """The content of results.json. Raises DataMissingError."""
        found = _read_json(self.path / "results.json", f"Rebuild it with `hfpatch report {self.path}`.")
        return dict(found)

    def write_layers(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Replace layers.json: the patched arm's `LayerReport`s as dicts."""
        write_atomically(self.path / "layers.json", _encode(list(layers), indent=1))

    def layers(self) -> list[dict[str, Any]]:
        """The content of layers.json, [] if the run has none."""
        if not (self.path / "layers.json").exists():
            return []
        return list(_read_json(self.path / "layers.json", "Delete it, or run the patched arm again."))

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as a plain dict. Raises DataMissingError."""
        path = self.path / "recipe.resolved.yaml"
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise DataMissingError(f"cannot read {path}: {e}. Start the run again.") from e
        if not isinstance(found, dict):
            raise DataMissingError(f"{path} holds no recipe. Start the run again.")
        return found

    def env(self) -> dict[str, Any]:
        """The content of env.json."""
        return dict(_read_json(self.path / "env.json", "Start the run again."))

    def add_notes(self, notes: Sequence[str]) -> None:
        """Add to the notes of env.json those that it lacks; the report shows them among its warnings."""
        env = self.env()
        if new := [note for note in notes if note not in (env.get("notes") or [])]:
            env["notes"] = [*(env.get("notes") or []), *new]
            write_atomically(self.path / "env.json", _encode(env, indent=2))

    def log(self, message: str) -> None:
        """Add a line with the time (UTC) to log.txt."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {message}\n"
        with (self.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as f:
            f.write(line)


def _finite(value: Any) -> Any:
    """`value` with numpy scalars as Python's and floats that JSON cannot hold as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _encode(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # A lone surrogate cannot be UTF-8; its backslash form happens to be its JSON escape.
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _without_home(value: Any) -> Any:
    home = str(Path.home())
    if isinstance(value, str) and len(home) > 1:
        return value.replace(home, "~")
    if isinstance(value, Mapping):
        return {k: _without_home(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_home(v) for v in value]
    return value


def _rename_free(new: Path, base: Path, stem: str) -> Path:
    """Rename `new` to the first free `base/stem[-N]`; renaming onto a directory that has files fails everywhere."""
    for number in range(1, 1000):
        path = base / (stem if number == 1 else f"{stem}-{number}")
        try:
            new.rename(path)
        except OSError:
            if not path.exists():
                raise
            continue
        return path
    raise DataMissingError(f"{base} already holds 999 runs called {stem}. Choose another output folder.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old file or the new one, never a part."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with new.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _read_json(path: Path, advice: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataMissingError(f"{path} is missing. {advice}") from None
    except ValueError as e:
        raise DataMissingError(f"{path} is not valid JSON ({e}). {advice}") from e


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in `line`, None if it is not one whole JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_lines(path: Path, keys: Sequence[str] = SAMPLE_KEYS) -> list[dict[str, Any]]:
    """The rows of a file that `RunDir` appends to; see `RunDir.samples`."""
    if not path.exists():
        return []
    # Split bytes: str.splitlines would also split at U+2028 and the like inside of outputs.
    *lines, tail = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, tail], 1):
        if not line.strip():
            continue
        row = _parse_row(line)
        if row is None and number > len(lines):
            warnings.warn(
                f"{path}:{number} was cut off while it was written and is dropped; resume the run to redo it.",
                HFPatchWarning,
                stacklevel=3,
            )
            continue
        if row is None:
            raise DataMissingError(
                f"{path}:{number} is not a JSON object, so the file was damaged after it was written. "
                f"Delete that line to lose only its sample, then resume the run."
            )
        if (schema := row.get("schema")) != SCHEMA:
            raise DataMissingError(
                f"{path}:{number} has row schema {schema!r}, this hfpatch reads {SCHEMA}. "
                f"Read the run with the version that wrote it (see its env.json)."
            )
        if absent := [key for key in keys if key not in row]:
            raise DataMissingError(f"{path}:{number} lacks {', '.join(absent)}. Delete that line, then resume the run.")
        rows.append(row)
    return rows


def _mend_tail(f: Any) -> None:
    """Leave the append-mode file `f` at the end of a whole line: end a row that lacks its newline, cut a torn one."""
    end = f.seek(0, os.SEEK_END)
    if end == 0:
        return
    f.seek(end - 1)
    if f.read(1) == b"\n":
        return
    f.seek(0)
    data = f.read()
    start = data.rfind(b"\n") + 1
    if _parse_row(data[start:]) is None:
        f.truncate(start)
    else:
        f.write(b"\n")
