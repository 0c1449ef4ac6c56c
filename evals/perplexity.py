"""Perplexity on a text, window by window: nothing is generated, nothing is asked."""

from __future__ import annotations

import gzip
import lzma
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError, DataMissingError, HFPatchWarning
from hfpatch.evals import haystack
from hfpatch.evals.base import Cell, Outcome, Sample, Task, option, register_task, token_counts
from hfpatch.evals.logits import read
from hfpatch.patch import active


@register_task
@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """The model reads windows of a text; each token counts once, where a window shows it for the first time.

    Score of a window: `nll`, mean negative log-likelihood of its new tokens in nats; their number is `tokens` in the
    row. Perplexity over windows w is exp(sum nll_w * tokens_w / sum tokens_w), not the mean of their perplexities.

    With `stride` below the window a token has at least window - stride tokens before it; without overlap the first
    ones of a window have none. A text file is tokenised once as a whole, from its beginning, white space kept, and what
    does not fill a window at its end is left out; `builtin` and `essays` begin at a place drawn from the seed.
    """

    name: ClassVar[str] = "ppl"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "perplexity of a long text, in windows"
    metrics: ClassVar[tuple[str, ...]] = ("nll",)
    lower_is_better: ClassVar[tuple[str, ...]] = ("nll",)

    lengths: tuple[int, ...] | int | str = option((2048,), "Tokens in a window.")
    stride: int | str | None = option(
        None, 'Tokens from window to window: a number, "half" of the window, or None, the whole window.'
    )
    samples: int = option(8, "Windows of each length, fewer where the text ends.", ge=1)
    text: str = option("builtin", "builtin, essays, or the path of a text file (.gz and .xz too).")
    bos: bool = option(True, "Begin each window with the BOS token, if the tokenizer begins texts with one.")
    allow_overlong: bool = option(False, "Run windows longer than the model's context.")

    def check(self) -> None:
        lengths = token_counts("ppl: lengths", self.lengths)
        if lengths[0] < 2:
            raise ConfigError("ppl: a window of 1 token has nothing to predict. Take lengths of 2 or more.")
        self.put("lengths", lengths)
        if self.stride not in (None, "half"):
            try:
                (stride,) = token_counts("ppl: stride", [self.stride])
            except ConfigError:
                raise ConfigError(
                    f'ppl: stride={self.stride!r} is no number of tokens. Write for example 512 or 2k, or "half".'
                ) from None
            if stride > lengths[0]:
                raise ConfigError(
                    f"ppl: stride={stride} would leave out tokens between windows of {lengths[0]}. Take a stride up to "
                    "the shortest window."
                )
            self.put("stride", stride)
        self.put("_short", {})
        if self.text in _ENDLESS:
            haystack.prepare(self.text)
        else:
            _read(Path(self.text))

    def cells(self) -> list[Cell]:
        setting: Cell = {} if self.stride is None else {"stride": self.stride}
        setting |= {} if self.text == "builtin" else {"text": Path(self.text).name}
        return [{"length": length} | setting for length in self.lengths]

    def count(self, cell: Cell) -> int:
        return self.samples

    def notes(self) -> list[str]:
        return list(self._short.values())

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        length = cell["length"]
        start = _start(tokenizer) if self.bos else []
        size = length - len(start)
        stride = min(length // 2 if self.stride == "half" else self.stride or size, size)
        need = size + (self.samples - 1) * stride
        if self.text in _ENDLESS:
            ids = running_tokens(tokenizer, self.text, f"ppl:{seed}", need)
        else:
            ids = _file_tokens(Path(self.text), tokenizer)
        if len(ids) < size:
            raise ConfigError(
                f"ppl: {self.text!r} has {len(ids)} tokens, too few for a window of {length}. Take shorter lengths or "
                "a longer text."
            )
        windows = 1 + (min(len(ids), need) - size) // stride
        if windows < self.samples:
            self._short[length] = f"ppl: {self.text} holds only {windows} windows of {length} tokens"
        for number in range(windows):
            window = start + ids[number * stride : number * stride + size]
            # no token can be scored that has none before it
            new = len(window) - 1 if number == 0 else min(stride, len(window) - 1)
            yield Sample(number, cell, seed, window, meta={"tokens": new})

    def run(self, model: Any, tokenizer: Any, sample: Sample) -> Outcome:
        _warn_of_what_looks_ahead(model)
        new = sample.meta["tokens"]
        nll = read(model, sample.ids, new + 1).nll(sample.ids[-new:])
        return Outcome(finish="length", scores={"nll": float(nll.double().mean())}, extra={"tokens": new})


def _warn_of_what_looks_ahead(model: Any) -> None:
    """A token that is predicted must not have taken part in how it is predicted."""
    methods = [part.method for handle in active(model) if handle.active for part in handle.parts]
    if names := sorted({method.name for method in methods if method.reads_ahead}):
        warnings.warn(
            f"{', '.join(names)}: later tokens of a window take part in what is done at earlier ones, so its "
            "perplexity is not that of a causal model and may be too low. Compare generated answers instead.",
            HFPatchWarning,
            stacklevel=2,
        )


_ENDLESS = ("builtin", "essays")


def running_tokens(tokenizer: Any, source: str, key: str, need: int) -> list[int]:
    """At least `need` tokens of a haystack's running text, without special tokens. Raises DataMissingError."""
    text = haystack.Haystack(haystack.sentences(source, key))
    size = 6 * need
    while len(ids := _encode(tokenizer, text.cut(size))) < need:
        if not ids:
            raise DataMissingError(f"the tokenizer makes no tokens of text {source!r}. Give another text.")
        size *= 2
    return ids


@lru_cache(maxsize=2)
def _file_tokens(path: Path, tokenizer: Any) -> list[int]:
    return _encode(tokenizer, _read(path))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> list[int]:
    """The BOS token, where the tokenizer puts it before texts by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


@lru_cache(maxsize=2)
def _read(path: Path) -> str:
    open_text: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except FileNotFoundError:
        raise DataMissingError(
            f"there is no text file {str(path)!r}. Give the path of a text file (.gz or .xz may be), builtin or essays."
        ) from None
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as e:
        raise DataMissingError(f"cannot read text {str(path)!r}: {e}. It must be UTF-8, or gzip or xz of it.") from e
