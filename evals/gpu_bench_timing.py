"""What the sections of `gpu_bench` share: where they run, how long they may take, how times and memory are taken.

Times on a GPU are those between two events. A buffer larger than the last-level cache is cleared before the first one:
nothing is left in the cache from the turn before, and while the GPU is busy with that, the host has the time to queue
the kernel, so that the events hold no waiting for the host. What the host itself needs is reported beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.evals.arms import alternated
from hfpatch.evals.generation import synchronize

Row = dict[str, Any]
Run = Callable[[], Any]
T = TypeVar("T")

MB = 2**20
# cleared before every timed run; 1 GiB takes an H100 some 0.4 ms
_CLEARED = 2**30
# what is taken for one cost of a step: a warm-up turn, the fewest timed ones, and checks
_TURNS = 6


@dataclass(frozen=True)
class Setup:
    """Where the benchmark runs.

    Attributes:
        toy: sizes that Triton's interpreter can bear on a CPU; times then mean nothing.
        dtypes: of the correctness section; the first one is that of everything that is timed.
    """

    device: torch.device
    toy: bool
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def here(cls) -> Setup:
        """The first GPU in bf16, or the CPU at toy size; Triton's interpreter has no arithmetic in bf16."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda", 0), False, (torch.bfloat16, torch.float16, torch.float32))
        return cls(torch.device("cpu"), True, (torch.float16,))

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    def pick(self, gpu: T, toy: T) -> T:
        return toy if self.toy else gpu

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Clock:
    """Runs out at `until` (seconds of `time.time`)."""

    until: float

    def left(self) -> float:
        return self.until - time.time()

    def share(self, part: float, most: float) -> float:
        """Seconds that one race may take."""
        return min(max(self.left(), 0.0) * part, most)


@dataclass(frozen=True)
class Step:
    """A piece of a section, which is done as a whole or left out.

    Attributes:
        run: yields rows; gets the section's clock.
        work: cost in relation to the section's other steps; with the seconds per turn (`turn_s`) in the rows of an
            earlier one it says whether there is time.
        extra: seconds that it needs besides, for compilation or weights.
    """

    name: str
    run: Callable[[Clock], Iterator[Row]]
    work: float = 0.0
    extra: float = 2.0

    def seconds(self, turn_s_per_work: float) -> float:
        return self.extra + _TURNS * self.work * turn_s_per_work


class Timer:
    """`timer(run)`: (ms on the device, ms until the host was through with it)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cleared = None
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            self._cleared = torch.empty(min(_CLEARED, total // 32), dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> tuple[float, float]:
        if self._cleared is None:
            started = time.perf_counter()
            run()
            ms = 1e3 * (time.perf_counter() - started)
            return ms, ms
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        synchronize(self.device)
        self._cleared.zero_()
        first.record()
        started = time.perf_counter()
        run()
        host = 1e3 * (time.perf_counter() - started)
        last.record()
        last.synchronize()
        return first.elapsed_time(last), host


@dataclass
class Times:
    """Of one racer, in ms."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return median(self.device)

    @property
    def host_ms(self) -> float:
        return median(self.host)


def race(
    setup: Setup,
    racers: Mapping[str, Run],
    seconds: float,
    fewest: int = 3,
    most: int = 15,
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Times]:
    """Times of all racers, taking turns, each second turn in reverse. Run each once before: this has no warm-up.

    Ends after `most` turns, or when `seconds` are over and there were `fewest`; at toy size after one turn.
    `around(name)` is entered for a run and not timed.
    """
    timer, times = Timer(setup.device), {name: Times() for name in racers}
    ends = time.monotonic() + seconds
    fewest, most = setup.pick(gpu=(fewest, most), toy=(1, 1))
    for turn in range(most):
        if turn >= fewest and time.monotonic() > ends:
            break
        for name in alternated(list(racers), turn):
            with around(name):
                on_device, host = timer(racers[name])
            times[name].device.append(on_device)
            times[name].host.append(host)
    return times


def turn_s(times: Mapping[str, Times]) -> float:
    """Seconds that one turn of a race takes."""
    return sum(t.ms for t in times.values()) / 1e3


class DeviceLostError(RuntimeError):
    """The CUDA context is broken: only a new process can go on."""


def attempt(run: Callable[[], T], device: torch.device) -> tuple[T | None, str | None, float]:
    """(result, what went wrong, seconds), with the device waited for. Raises DeviceLostError where it is beyond repair.

    Whatever a kernel, a compiler or an allocator may raise becomes part of the results.
    """
    started = time.perf_counter()
    try:
        result = run()
        synchronize(device)
    except Exception as error:
        check_device(device)
        return None, told(error), time.perf_counter() - started
    return result, None, time.perf_counter() - started


def check_device(device: torch.device) -> None:
    """Raises DeviceLostError if the device takes no more work."""
    try:
        synchronize(device)
    except Exception as error:
        raise DeviceLostError(told(error)) from error


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def with_peak(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """(result, bytes): the most that was allocated meanwhile, above what was before; 0 on a CPU."""
    if device.type != "cuda":
        return run(), 0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def memory_row(run: Run, call: AttentionCall) -> Row:
    """What a kernel allocates beyond its inputs, plan and result, MB; `memory_over` where that is too much.

    Allowed is one tensor of kv_len x head_dim for every query head. Nothing on a CPU, which does not count.
    """
    if not call.query.is_cuda:
        return {}
    result, peak = with_peak(run, call.query.device)
    results = result if isinstance(result, tuple) else (result,)
    kept = sum(x.numel() * x.element_size() for x in results if isinstance(x, Tensor))
    batch, heads, _, head_dim = call.query.shape
    allowed = batch * heads * call.kv_len * head_dim * call.query.element_size()
    extra = max(peak - kept, 0)
    return {"extra_mb": extra / MB, "allowed_mb": allowed / MB, "memory_over": extra > allowed}
