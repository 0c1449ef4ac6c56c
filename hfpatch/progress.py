"""Where long work tells how far it is. The command line passes one that draws bars; this one says nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def start(self, total: int, label: str) -> None: ...

    def advance(self, label: str, score: float | None = None) -> None:
        """One more piece of work is done; `score` is its headline score."""
        ...

    def line(self, text: str) -> None:
        """A line that stays on the screen."""
        ...

    def stop(self) -> None: ...


class Silent:
    def start(self, total: int, label: str) -> None:
        return

    def advance(self, label: str, score: float | None = None) -> None:
        return

    def line(self, text: str) -> None:
        return

    def stop(self) -> None:
        return
