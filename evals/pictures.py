"""What tasks on pictures share: where pictures come from, prompts with one picture, answers by `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from hfpatch.errors import DataMissingError, UnsupportedError
from hfpatch.evals import generation, prompts, tinyshapes
from hfpatch.evals.base import Cell, Outcome, Sample, Task, option

TINYSHAPES = "tinyshapes"


@dataclass(frozen=True)
class Pictures:
    """A set of pictures by name: files of a folder, or the ones that come with TinyShapes (by number)."""

    folder: Path | None

    def open(self, name: str) -> Any:
        """A picture as PIL takes it. Raises DataMissingError if it cannot be read, UnsupportedError without pillow."""
        if self.folder is None:
            return pillow().fromarray(_tinyshapes()[int(name)])
        return open_picture(self.folder / name)


def open_picture(path: Path) -> Any:
    """A picture file as RGB. Raises DataMissingError if it cannot be read, UnsupportedError without pillow."""
    image = pillow()
    try:
        return image.open(path).convert("RGB")
    except image.DecompressionBombError as error:
        raise DataMissingError(f"image {str(path)!r} is too large: {error} Scale it down first.") from error
    except (OSError, ValueError) as error:
        raise DataMissingError(f"cannot read image {str(path)!r}: {error}.") from error


def check_takes_pictures(processor: Any, who: str) -> None:
    """Raise UnsupportedError unless a model's processor takes pictures; `who` asks about them."""
    if not hasattr(processor, "image_processor"):
        kind = "no processor" if processor is None else type(processor).__name__
        raise UnsupportedError(
            f"{who} asks about images, and there is {kind}, which takes none: the model reads text only, or its folder "
            "lacks processor_config.json and preprocessor_config.json. Copy them from the original."
        )


def pillow() -> Any:
    """The module PIL.Image. Raises UnsupportedError without it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("images need the pillow package: pip install 'hfpatch[vision]'") from error
    return Image


@lru_cache(maxsize=1)
def _tinyshapes() -> Any:
    return tinyshapes.test_images()


@dataclass(frozen=True, kw_only=True)
class Pictured(Task):
    """A task whose prompts have one picture each. `draw` and `run` get the model's processor."""

    data: str = option(TINYSHAPES, "Folder of the questions or annotations; tinyshapes: those that come with hfpatch.")
    images: str | None = option(None, "Folder of the pictures; None: the folder of the data.")
    samples: int | None = option(None, "Only the first so many of each table.", ge=1)
    chat_template: str | bool = option(
        "auto", "auto: if the processor has one; off: the image's mark and the question.", choices=prompts.CHAT_TEMPLATE
    )
    system: str | None = option(None, "System prompt of the chat template.")

    def check(self) -> None:
        self.put("chat_template", prompts.template_mode(self.chat_template))
        if self.data != TINYSHAPES and not Path(self.data).is_dir():
            raise DataMissingError(f"{self.name}: there is no folder {self.data!r}. {self.expected()}")
        folder = self.pictures.folder
        if folder is not None and not folder.is_dir():
            raise DataMissingError(f"{self.name}: there is no folder of images {str(folder)!r}. {self.expected()}")

    def expected(self) -> str:
        """What the data should be, for messages."""
        raise NotImplementedError

    @classmethod
    def reader(cls, processor: Any) -> Any:
        check_takes_pictures(processor, cls.name)
        return processor

    @cached_property
    def pictures(self) -> Pictures:
        if self.images is not None:
            return Pictures(Path(self.images))
        return Pictures(None if self.data == TINYSHAPES else Path(self.data))

    def sample(self, processor: Any, number: int, cell: Cell, seed: int, image: str, user: str, **facts: Any) -> Sample:
        """One prompt. A picture that cannot be read is a sample that was refused."""
        text = prompts.render_picture(processor, user, system=self.system, mode=str(self.chat_template))
        try:
            picture = self.pictures.open(image)
        except DataMissingError as error:
            return Sample(number, cell, seed, [], prompt=text, refused=str(error), image=image, **facts)
        encoded = prompts.encode_pictures(processor, [text], [picture])
        return Sample(number, cell, seed, encoded["input_ids"][0].tolist(), prompt=text, image=image, **facts)

    def run_batch(
        self, model: Any, tokenizer: Any, samples: Sequence[Sample], prefix: generation.Prefix | None = None
    ) -> list[Outcome]:
        pictures = [self.pictures.open(str(sample.image)) for sample in samples]
        inputs = prompts.encode_pictures(tokenizer, [sample.prompt for sample in samples], pictures)
        made = answer(model, tokenizer, inputs, self.tokens_to_generate(samples[0].cell))
        return [self.outcome(sample, one) for sample, one in zip(samples, made, strict=True)]


class _Clock:
    """A streamer that notes when tokens arrive; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if value.device.type != "cpu":
            torch.accelerator.synchronize(value.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


@dataclass(frozen=True, kw_only=True)
class PicturedTables(Pictured):
    """One whose questions are read once, as tables: a cell of the report and its rows each."""

    @cached_property
    def _read(self) -> tuple[list[tuple[Cell, list[Any]]], list[str]]:
        """Tables, and notes on them. Raises DataMissingError."""
        raise NotImplementedError

    def cells(self) -> list[Cell]:
        return [cell for cell, _ in self._read[0]]

    def count(self, cell: Cell) -> int:
        return len(self._rows(cell))

    def _rows(self, cell: Cell) -> list[Any]:
        return next(rows for known, rows in self._read[0] if known == cell)

    def notes(self) -> list[str]:
        return self._read[1]


@torch.no_grad()
def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[generation.Generated]:
    """Continue encoded prompts greedily, as one batch, by transformers' `generate`, which knows what a family wants."""
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    stops = generation.stop_ids(model, tokenizer)
    clock, start = _Clock(), inputs["input_ids"].shape[1]
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=clock,
    )
    begun, first, *later = clock.times
    prefill_ms = 1e3 * (first - begun)
    decode_ms = 1e3 * (later[-1] - first) / len(later) if later else None
    made = []
    for row in ids[:, start:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        finish = "length" if end is None else "eos"
        made.append(generation.Generated(text, row[:end], finish, prefill_ms, decode_ms))
    return made
