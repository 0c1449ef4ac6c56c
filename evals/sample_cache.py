"""Drawn samples on disk, so that the next run with the same task, tokenizer and seed does not draw them again.

One folder per cell under `hfpatch.storage.cache_dir()/samples`, named by a digest of everything that the samples depend
on, the code included; one file per sample. A file that is damaged counts as absent, and a cache that cannot be written
is done without: what comes out is the same in every case.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from hfpatch.errors import HFPatchError
from hfpatch.evals.base import Cell, Sample
from hfpatch.storage import cache_dir

_LOG = logging.getLogger("hfpatch")
_ABOUT = "about.json"
_PACKAGES = ("tokenizers", "transformers")
_SWITCHES = ("chat_template", "add_bos_token", "add_eos_token", "split_special_tokens")


@dataclass(frozen=True)
class Entry:
    """The kept samples of one cell. `cell` and `seed` are None where the folder does not say any more."""

    path: Path
    task: str
    cell: Cell | None
    seed: int | None
    samples: int
    bytes: int


def kept(
    task: str, cell: Cell, seed: int, facts: dict[str, Any], ids: Iterable[int], draw: Callable[[int], Sample]
) -> Iterator[Sample]:
    """The samples `ids` of a cell, read where they are kept, else drawn and kept.

    Args:
        facts: JSON-able; whatever the samples depend on besides cell and seed.
        draw: makes the sample of an id, the same for the same arguments.
    """
    about = {"task": task, "cell": cell, "seed": seed, "facts": facts}
    text = json.dumps(about, sort_keys=True)
    folder = _root() / task / hashlib.sha256(text.encode()).hexdigest()[:24]
    for number in ids:
        path = folder / f"{number}.json.gz"
        sample = _read(path)
        if sample is None or (sample.id, sample.cell, sample.seed) != (number, cell, seed):
            sample = draw(number)
            try:
                _write(folder / _ABOUT, text.encode())
                # 1: a third of the size, at a tenth of the time that the best compression takes
                _write(path, gzip.compress(json.dumps(asdict(sample)).encode(), 1, mtime=0))
            except OSError as e:
                _LOG.warning("samples are not kept for the next run: cannot write %s: %s", path, e)
        yield sample


def tokenizer_sha(tokenizer: Any) -> str | None:
    """sha256 of a tokenizer: vocabulary, rules and special tokens. None where it does not show them all."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = backend.to_str()
    # padding and truncation come first; they change with use and do not matter here
    parts = [state[state.index('"added_tokens"') :], type(tokenizer).__qualname__, *map(_version, _PACKAGES)]
    parts += [repr(getattr(tokenizer, name, None)) for name in _SWITCHES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def source_sha(*modules: ModuleType) -> str:
    """sha256 of the source of modules: samples of an older or newer version are other samples."""
    made = hashlib.sha256(_version("hfpatch").encode())
    for module in modules:
        made.update(Path(str(module.__file__)).read_bytes())
    return made.hexdigest()


def entries() -> list[Entry]:
    """What is kept, one entry per cell, sorted by task and folder."""
    found = []
    for folder in sorted(_root().glob("*/*/")):
        files = list(folder.glob("*.json.gz"))
        try:
            about = json.loads((folder / _ABOUT).read_bytes())
            cell, seed = about["cell"], about["seed"]
        except (OSError, ValueError, KeyError, TypeError):
            cell = seed = None
        size = sum(file.stat().st_size for file in files)
        found.append(Entry(folder, folder.parent.name, cell, seed, len(files), size))
    return found


def clear() -> int:
    """Remove everything that is kept; returns how many cells there were. Raises HFPatchError."""
    cells = len(entries())
    try:
        shutil.rmtree(_root())
    except FileNotFoundError:
        pass
    except OSError as e:
        raise HFPatchError(f"cannot remove the kept samples in {_root()}: {e}. Remove the folder by hand.") from e
    return cells


def _root() -> Path:
    return cache_dir() / "samples"


def _read(path: Path) -> Sample | None:
    """A kept sample, or None where there is none that can be trusted: gzip checks that every byte is there."""
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        return Sample(**data)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as e:
        _LOG.info("kept sample %s is damaged (%s), it is drawn again", path, e)
        return None


def _write(path: Path, data: bytes) -> None:
    """All of the file or none of it, also where several processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
