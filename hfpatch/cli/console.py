"""Where the command line prints: results to stdout, everything else to stderr once stdout is for machines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hfpatch.errors import HFPatchError

_PIPE_WIDTH = 160
_SILENCE_SECONDS = 30
# how a run begins the line that tells how to go on; the terminal says it, also under --quiet
_INTERRUPTED = "interrupted"


@dataclass
class Terminal:
    """What a command talks through, made from the global options.

    Attributes:
        farewell: what was said last when an interrupted run ended.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    no_color: bool = False
    offline: bool = False
    seed: int | None = None
    farewell: str = ""
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    def __post_init__(self) -> None:
        self.out = self._console(self.stdout)
        self.err = self._console(sys.stderr)

    def _console(self, file: TextIO) -> Console:
        # a pipe has no width; 80 columns would cut tables
        width = None if file.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
        no_color = self.no_color or "NO_COLOR" in os.environ
        return Console(
            file=file,
            width=width,
            no_color=no_color or None,
            soft_wrap=True,
            # what models write and users name is text, not markup
            markup=False,
            highlight=False,
            emoji=False,
        )

    def say(self, text: str, style: str = "") -> None:
        """A line for people: what happens, what to know."""
        if not self.quiet:
            (self.err if self.json else self.out).print(text, style=style)

    def note(self, text: str) -> None:
        """A line that must not be missed, also when stdout goes into a file."""
        self.err.print(f"! {text}", style="yellow")

    def result(self, data: Mapping[str, Any], *shown: Any) -> None:
        """What the command was asked for: `data` as one JSON object, or `shown` for people."""
        if self.json:
            # rich would wrap it
            self.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
            self.stdout.flush()
        else:
            for part in shown:
                # tables know how to fit; text is wrapped by the terminal, so that it can be copied
                self.out.print(part, soft_wrap=isinstance(part, str))

    def progress(self) -> Bars | Lines:
        """A progress object as evaluations want it."""
        silent = self.quiet or "HFPATCH_NO_PROGRESS" in os.environ
        return Bars(self.err) if self.err.is_terminal and not silent else Lines(self.err, silent)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn what goes wrong into one message and an exit code; keep stdout clean under --json."""
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.showwarning = self._show_warning  # type: ignore[assignment]
                if self.json:
                    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
                stack.enter_context(self._logging())
                yield
        except HFPatchError as error:
            self.err.print(f"error: {error}", style="bold red")
            if self.verbose >= 2:
                traceback.print_exc()
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            self.err.print(self.farewell or "interrupted before anything was measured.", style="yellow")
            raise typer.Exit(130) from interrupt

    def _show_warning(self, message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if self.verbose >= 2:
            text = warnings.formatwarning(message, category, filename, lineno).rstrip()
        else:
            text = f"warning: {message}"
        self.err.print(text, style="yellow")

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        level = {0: "WARNING", 1: "INFO"}.get(self.verbose, "DEBUG")
        level = os.environ.get("HFPATCH_LOG", level).upper() if not self.verbose else level
        logger, handler = logging.getLogger("hfpatch"), logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(level if level in logging.getLevelNamesMapping() else "WARNING")
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)


class Bars:
    """Progress on a terminal: one bar with time left, the current piece and the running score."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.fields[label]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[current]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
        )
        self._scores = _Scores()
        self._task: Any = None
        self.last = ""

    def start(self, total: int, label: str) -> None:
        self._scores = _Scores()
        if self._task is not None:
            self._bar.update(self._task, visible=False)
        self._task = self._bar.add_task("", total=total, label=label, current="")
        self._bar.start()

    def advance(self, label: str, score: float | None = None) -> None:
        self._bar.update(self._task, advance=1, current=self._scores.add(label, score))

    def line(self, text: str) -> None:
        self.last = text if text.startswith(_INTERRUPTED) else self.last
        if not self.last:
            self._bar.console.print(text)

    def stop(self) -> None:
        self._bar.stop()


class Lines:
    """Progress in a log: a line per 10 % or per 30 s, whichever comes first."""

    def __init__(self, console: Console, silent: bool = False) -> None:
        self._console, self._silent = console, silent
        self.last = ""

    def start(self, total: int, label: str) -> None:
        self._total, self._label, self._done, self._scores = total, label, 0, _Scores()
        self._started = self._spoke = time.monotonic()
        self.line(f"{label}: {total} to do")

    def advance(self, label: str, score: float | None = None) -> None:
        self._done += 1
        now, total = time.monotonic(), max(self._total, self._done)
        current = self._scores.add(label, score)
        tenth = self._done * 10 // total > (self._done - 1) * 10 // total
        if tenth or now - self._spoke >= _SILENCE_SECONDS:
            self._spoke = now
            left = (now - self._started) / self._done * (total - self._done)
            minutes, seconds = divmod(round(left), 60)
            self.line(f"{self._label}: {self._done}/{total} · {current} · {minutes}:{seconds:02d} left")

    def line(self, text: str) -> None:
        self.last = text if text.startswith(_INTERRUPTED) else self.last
        if not self._silent and not self.last:
            self._console.print(text)

    def stop(self) -> None:
        return


class _Scores:
    """Running means of the task that is running, an arm each."""

    def __init__(self) -> None:
        self._task = ""
        self._arms: dict[str, list[float]] = {}

    def add(self, label: str, score: float | None) -> str:
        """`label` (`task cell arm`) with the means so far. Samples without a needle score how often it is made up."""
        words = label.split() or [""]
        task, arm = words[0], words[-1]
        if task != self._task:
            self._task, self._arms = task, {}
        if score is not None and "control" not in words:
            self._arms.setdefault(arm, []).append(score)
        means = [f"{name} {sum(found) / len(found):.2f}" for name, found in sorted(self._arms.items())]
        return " · ".join([label.removesuffix(f" {arm}") if means else label, *means])


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style; `right` columns hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made
