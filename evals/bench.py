"""The bench of a run: latency and memory by prompt length, dense and patched taking turns in one process."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.evals import arms, haystack, latency, memory
from hfpatch.evals.base import Options, option, token_counts
from hfpatch.progress import Progress

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench(Options):
    """What is timed. Each repeat is a row of its own; medians are taken in the report."""

    name: ClassVar[str] = "bench"

    lengths: tuple[int, ...] | int | str = option((1024, 4096), "Prompt tokens.")
    decode_tokens: int = option(32, "Decode steps in one repeat; 0: prefill alone.", ge=0)
    repeats: int = option(10, "Timed repeats.", ge=1)
    warmup: int = option(3, "Repeats before them; the very first one is reported as first_call.", ge=0)
    batch: int = option(1, "Sequences in the batch, all alike.", ge=1)
    memory: bool = option(True, "Also measure memory.")
    allow_overlong: bool = option(False, "Run prompts longer than the model's context.")

    def check(self) -> None:
        self.put("lengths", token_counts("bench: lengths", self.lengths))

    def parts(self) -> list[tuple[str, int]]:
        """(what, length) in the order in which they are measured."""
        asked = {"prefill": True, "decode": self.decode_tokens > 0, "memory": self.memory}
        return [(what, length) for length in self.lengths for what in asked if asked[what]]

    def turns(self, what: str) -> int:
        """How often each arm is measured in a part."""
        return 1 if what == "memory" else self.warmup + self.repeats

    def unfinished(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, int]]:
        """The parts that lack rows; they are measured as a whole, as turns belong together."""
        seen = Counter((row["what"], row["length"], row["arm"]) for row in rows)
        wanted = {"prefill": self.repeats, "decode": self.repeats, "memory": 1}
        return [part for part in self.parts() if any(seen[*part, arm] < wanted[part[0]] for arm in names)]


@dataclass(frozen=True)
class Bencher:
    """A model and its patch under measurement.

    Attributes:
        baseline: name of the dense attention that the dense arm runs.
        write: gets each row as it is measured.
    """

    model: Any
    tokenizer: Any
    handle: Any
    bench: Bench
    names: Sequence[str]
    baseline: str
    seed: int | None
    write: Callable[[Row], None]
    progress: Progress

    def measure(self, what: str, length: int) -> None:
        """One of `Bench.parts`."""
        tokens = _prompt(self.tokenizer, length, self.bench.batch).to(self.model.device)
        if self.handle is not None:
            self.handle.reset()
        {"prefill": self._prefill, "decode": self._decode, "memory": self._memory}[what](tokens)

    def _prefill(self, tokens: Tensor) -> None:
        clock = latency.SelectionClock()

        def measure(arm: str) -> Row:
            if arm != arms.PATCHED:
                return {"ms": latency.prefill(self.model, tokens)[0]}
            with self.handle.watched(clock):
                return {"ms": latency.prefill(self.model, tokens)[0], "selection_ms": clock.take_ms()}

        self._take_turns("prefill", tokens, measure)

    def _decode(self, tokens: Tensor) -> None:
        caches = {}
        for arm in self.names:
            with arms.running(self.handle, arm):
                caches[arm] = latency.prefill(self.model, tokens)[1:]
        steps = self.bench.decode_tokens
        self._take_turns("decode", tokens, lambda arm: {"ms": latency.decode(self.model, *caches[arm], steps)})

    def _memory(self, tokens: Tensor) -> None:
        for arm in self.names:
            with arms.running(self.handle, arm):
                memory.measure(self.model, tokens, 1)
                found = memory.measure(self.model, tokens, max(self.bench.decode_tokens, 1))
            self._write("memory", arm, tokens, 0, found)

    def _take_turns(self, what: str, tokens: Tensor, measure: Callable[[str], Row]) -> None:
        for turn in range(self.bench.turns(what)):
            for arm in arms.alternated(self.names, turn):
                with arms.running(self.handle, arm):
                    found = measure(arm)
                if turn >= self.bench.warmup:
                    self._write(what, arm, tokens, turn - self.bench.warmup, found)
                elif turn == 0 and what == "prefill":
                    self._write("first_call", arm, tokens, 0, found)
                else:
                    self.progress.advance(f"warm-up {what} {tokens.shape[1]} {arm}")

    def _write(self, what: str, arm: str, tokens: Tensor, repeat: int, found: Row) -> None:
        batch, length = tokens.shape
        row = {"arm": arm, "what": what, "length": length, "repeat": repeat, "batch": batch, **found}
        row |= {"baseline": self.baseline, "seed": self.seed, "density": 1.0, "kernel": self.baseline}
        if arm == arms.PATCHED:
            report = self.handle.report()
            phase = "decode" if what == "decode" else "prefill"
            row |= {"density": report.density(phase), "kernel": arms.kernels_used(report.to_dict(), phase)}
        self.write(row | circumstances(self.model))
        self.progress.advance(f"{what} {length} {arm}")


def circumstances(model: Any) -> Row:
    """What a time depends on besides the model: dtype, device, threads, versions."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "device_name": device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "hfpatch": version("hfpatch"),
    }


@lru_cache
def device_name(device: torch.device) -> str:
    """The maker's name of the chip."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _prompt(tokenizer: Any, length: int, batch: int) -> Tensor:
    """int64 [batch, length]: generated text, since random tokens would make other attention patterns."""
    text = haystack.Haystack(haystack.sentences("builtin", "bench"))
    ids: list[int] = []
    size = 6 * length
    while len(ids) < length:
        ids = list(tokenizer(text.cut(size), verbose=False)["input_ids"])
        size *= 2
    return torch.tensor([ids[:length]] * batch)
