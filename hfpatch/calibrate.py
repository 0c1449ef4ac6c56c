"""Calibrations: what a patch needs to know about a model is searched or learnt once and kept in a file.

A calibration is one small file in `hfpatch/calibrations`: a frozen dataclass of options and `run`, which reads a model
and data and answers with what goes into the file. The model's weights never change. Everything around that is here:
choosing one, work that survives an interruption, the header, and writing whole files only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hfpatch.anatomy import examine
from hfpatch.calibrated import Header, ModelSizes, encode, is_calibrated
from hfpatch.errors import ConfigError, ConflictError, DataMissingError, UnknownNameError
from hfpatch.methods.base import Method
from hfpatch.options import Options, option
from hfpatch.patch import get_patcher, is_patched
from hfpatch.progress import Progress, Silent
from hfpatch.recipe import PatchSpec
from hfpatch.registry import Registry
from hfpatch.report.run import write_atomically

__all__ = ["Calibration", "Result", "Work", "calibrate", "calibrations", "option", "register_calibration"]

T = TypeVar("T")
Layers = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Result:
    """What a calibration found.

    Attributes:
        content: goes into the file beside its header; JSON values.
        card: what it was made from, how much of it, and how good it is.
        tensors: make the file a safetensors one.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Work:
    """What a calibration is given.

    Attributes:
        model: in eval mode, without patches.
        processor: a tokenizer, or a vision-language model's processor.
        method: the patch with the options under which it will be used.
        texts: contents of the text files, for calibrations that read text.
        files: paths of the data, for those that read files; may be empty.
        folder: for state that survives an interruption; gone once the file is written.
    """

    model: Any
    processor: Any
    method: Any
    sizes: ModelSizes
    texts: tuple[str, ...]
    files: tuple[Path, ...]
    progress: Progress
    folder: Path
    done: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """`make()`, a JSON value, kept under `key` at once; what an interrupted run has kept is not made again."""
        if key not in self.done:
            text = json.dumps(make())
            # a line that a crash cuts off must not spoil the next one
            with (self.folder / _DONE).open("a", encoding="utf-8") as file:
                file.write(f"\n[{json.dumps(key)}, {text}]")
            self.done[key] = json.loads(text)
        return self.done[key]  # type: ignore[no-any-return]

    def each_text(
        self, label: str, longest: int, more_than: int, measure: Callable[[Tensor, Callable[[int], None]], Layers]
    ) -> tuple[list[int], list[Layers]]:
        """What `measure` finds in each text, kept text by text; and how many tokens these have.

        Args:
            label: what is going on.
            longest: texts are cut here, or where the model's context ends; tokens.
            more_than: texts that are no longer are refused; tokens.
            measure: gets int64 [1, n] and a function that is to be called with each layer that is done; answers with
                a tensor for each layer.
        """
        known = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = min(longest, known or longest)
        prompts = [self.tokenizer(text, return_tensors="pt")["input_ids"][:, :longest] for text in self.texts]
        lengths = [ids.shape[1] for ids in prompts]
        if short := [n for n in lengths if n <= more_than]:
            raise ConfigError(
                f"{label}: a text has {short[0]} tokens, and {more_than + 1} are needed at least. Give longer texts, "
                "or the patch a smaller block_size."
            )
        anatomy = examine(self.model)
        self.progress.start(len(prompts) * len(set(anatomy.attention) - set(anatomy.windows)), label)
        found = []
        for number, ids in enumerate(prompts, 1):
            # called at once
            tell = lambda layer: self.progress.advance(f"text {number} of {len(prompts)}, layer {layer}")  # noqa: B023
            plain = lambda: {str(n): x.tolist() for n, x in measure(ids, tell).items()}  # noqa: B023
            kept = self.once(f"text {number}", plain)
            found.append({int(layer): torch.tensor(values) for layer, values in kept.items()})
        return lengths, found


@dataclass(frozen=True, kw_only=True)
class Calibration(Options):
    """Searches or learns what a patch is given as a file. Its options are its fields."""

    patcher: ClassVar[str]
    summary: ClassVar[str]
    suffix: ClassVar[str] = ".json"
    reads: ClassVar[str] = "text"
    """"text": contents of text files, by default a built-in text; "files": paths that it reads itself, or none."""

    use: ClassVar[str]
    """The spec with which a file is applied; `{file}` stands for its path."""

    def tokens(self) -> int:
        """About as many tokens of text can be used."""
        return 4096

    def run(self, work: Work) -> Result:
        raise NotImplementedError

    @classmethod
    def format(cls) -> str:
        return f"hfpatch-{cls.patcher}-{cls.name}"


CALIBRATIONS: Registry[type[Calibration]] = Registry("calibration", group="hfpatch.calibrations")

_ABOUT, _DONE = "about.json", "done.jsonl"

C = TypeVar("C", bound=type[Calibration])


def register_calibration(cls: C) -> C:
    """Class decorator: make a Calibration known by its `patcher` and `name`."""
    CALIBRATIONS.register(f"{cls.patcher}:{cls.name}")(cls)
    return cls


def calibrations() -> list[type[Calibration]]:
    """All calibrations, by patcher and name."""
    # the table of contents registers them
    import hfpatch.calibrations  # noqa: F401

    return [cls for _, cls in CALIBRATIONS.items()]


def find_calibration(patcher: str, what: str | None = None) -> type[Calibration]:
    """The calibration `what` of a patcher, which may be left out where it has one only."""
    name = get_patcher(patcher).name
    found = {cls.name: cls for cls in calibrations() if cls.patcher == name}
    if not found:
        able = dict.fromkeys(cls.patcher for cls in calibrations())
        raise UnknownNameError(f"{name} has nothing to calibrate. Patchers that have: {', '.join(able)}.")
    if what is None and len(found) > 1:
        raise ConfigError(
            f"{name} has several calibrations: {', '.join(found)}. Choose with --what {next(iter(found))}."
        )
    if what is not None and what not in found:
        raise UnknownNameError(f"{name} has no calibration {what!r}. It has: {', '.join(found)}.")
    return found[what] if what is not None else next(iter(found.values()))


def calibrate(
    model: Any,
    processor: Any,
    patcher: str | Method,
    out: str | Path,
    *,
    what: str | None = None,
    texts: Sequence[str] = (),
    files: Sequence[str | Path] = (),
    progress: Progress | None = None,
    resume: bool = True,
    **options: Any,
) -> Path:
    """Search or learn what a patch needs to know about `model`, and write it to `out`.

    State is kept in a folder beside `out` until that is whole: started again in the same way, an interrupted
    calibration goes on.

    Args:
        model: a transformers model without patches. Its weights do not change.
        processor: its tokenizer or processor.
        patcher: a name or spec ("minference:block_size=128"), or a Method: with the options that will be used.
        what: which calibration, for a patcher with several.
        texts: running text to read, for a calibration that reads text.
        files: data, for one that reads files.
        resume: False drops the state of an interrupted run.
        options: of the calibration.

    Returns:
        The path of the file.

    Raises:
        UnknownNameError, ConfigError: no such calibration, an option is wrong, `out` is something else's file.
        ConflictError: the model is patched.
    """
    method = parse_patcher(patcher) if isinstance(patcher, str) else patcher
    cls = find_calibration(method.name, what)
    calibration = cls.from_options(options)
    target = check_target(cls, out)
    anatomy = examine(model)
    if is_patched(model):
        raise ConflictError("calibrating reads the model as it is, and this one is patched. unpatch(model) first.")
    if cls.reads == "text" and not any(texts):
        raise ConfigError(
            f"{cls.patcher} {cls.name} read running text, and there is none. Give some: texts=[...], or --text-file F "
            "with something in it."
        )
    paths = tuple(Path(file) for file in files)
    identity = str(getattr(model.config, "_name_or_path", "") or "")
    # a folder is this machine's business
    name = {"id": Path(identity).name if Path(identity).is_dir() else identity, "type": type(model).__name__}
    about = {
        "calibration": cls.format(),
        "options": calibration.options(),
        "patcher": str(method),
        "model": {**name, "sizes": anatomy.sizes.text()},
        "data": _digest(texts, paths),
    }
    progress = progress or Silent()
    folder = target.with_name(target.name + ".partial")
    done = _resume(folder, about, resume)
    if done:
        progress.line(f"going on with {folder}: {len(done)} pieces are done")
    work = Work(model, processor, method, anatomy.sizes, tuple(texts), paths, progress, folder, done)
    started, training = time.monotonic(), model.training
    model.eval()
    try:
        result = calibration.run(work)
    except KeyboardInterrupt:
        kept = f"the same command goes on with what is in {folder}" if _has_state(folder) else "nothing was kept"
        progress.line(f"interrupted: {kept}.")
        raise
    finally:
        model.train(training)
        progress.stop()
        if not _has_state(folder):
            shutil.rmtree(folder)
    card = {
        **result.card,
        "seconds": round(time.monotonic() - started),
        **{package: version(package) for package in ("hfpatch", "torch", "transformers")},
    }
    header = Header(cls.format(), name, anatomy.sizes, calibration.options(), str(method), card)
    write_atomically(target, encode(header, result.content, result.tensors))
    shutil.rmtree(folder, ignore_errors=True)
    return target


def parse_patcher(text: str) -> Method:
    """`name:option=value,...` as a Method."""
    spec = PatchSpec.parse(text)
    return get_patcher(spec.use).from_options(spec.params)


def check_target(cls: type[Calibration], out: str | Path) -> Path:
    """Where the file goes. Raises ConfigError for a wrong ending, or for a file that is something else."""
    target = Path(out)
    if target.suffix != cls.suffix:
        raise ConfigError(
            f"{cls.patcher} {cls.name} is kept in a {cls.suffix} file, and {str(out)!r} has another ending."
        )
    if target.exists() and not is_calibrated(target, cls.format()):
        raise ConfigError(f"{target} exists and is no {cls.format()} file; it is left alone. Give another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _has_state(folder: Path) -> bool:
    return any(file.name != _ABOUT for file in folder.iterdir())


def _resume(folder: Path, about: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """What an interrupted run of the same calibration has kept; makes the folder."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    record = folder / _ABOUT
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(about).encode())
        return {}
    before = json.loads(record.read_text(encoding="utf-8"))
    if differs := [key for key, value in about.items() if before.get(key) != json.loads(json.dumps(value))]:
        raise ConfigError(
            f"{folder} holds the beginning of another calibration: its {' and '.join(differs)} differ. Give "
            "--no-resume (resume=False) to drop it, or another name for the file."
        )
    lines = (folder / _DONE).read_text(encoding="utf-8").splitlines() if (folder / _DONE).is_file() else []
    done = {}
    for line in lines:
        try:
            key, value = json.loads(line)
        except ValueError:
            # the line that was being written
            continue
        done[key] = value
    return done


def _digest(texts: Sequence[str], files: Sequence[Path]) -> str:
    """Hash of the data."""
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text.encode()).digest())
    for file in files:
        try:
            found.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise DataMissingError(f"cannot read {str(file)!r}: {error}.") from error
    return found.hexdigest()
