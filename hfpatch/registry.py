"""Names to things: one class for patchers, evaluation tasks and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from hfpatch.errors import ConflictError, UnknownNameError

T = TypeVar("T")


def fold(name: str) -> str:
    """The form under which names are compared: case, `-` and `_` do not matter."""
    return name.lower().replace("-", "").replace("_", "")


class Registry(Generic[T]):
    """Names to things of one kind; refuses duplicates, explains misses.

    Args:
        kind: what the things are called in messages, e.g. "patcher".
        group: entry-point group through which other packages add theirs; loaded at the first look-up.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self._group = group
        self._items: dict[str, T] = {}
        self._folded: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Decorator: file `item` under `name` and `aliases`. Raises ConflictError if a name is taken."""

        def add(item: T) -> T:
            for key in (name, *aliases):
                taken = self._folded.get(fold(key))
                if taken is not None:
                    raise ConflictError(
                        f"{self.kind} {key!r} is already registered, by {self._items[taken]!r}. Choose another name."
                    )
            self._items[name] = item
            self._folded.update({fold(key): name for key in (name, *aliases)})
            return item

        return add

    def get(self, name: str) -> T:
        """The thing called `name`. Raises UnknownNameError with the nearest names."""
        self._load_entry_points()
        if (key := self._folded.get(fold(name))) is not None:
            return self._items[key]
        near = dict.fromkeys(self._folded[n] for n in get_close_matches(fold(name), self._folded, n=3, cutoff=0.5))
        hint = f" Did you mean: {', '.join(near)}?" if near else ""
        raise UnknownNameError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self) or 'none'}.")

    def items(self) -> list[tuple[str, T]]:
        self._load_entry_points()
        return sorted(self._items.items())

    def __iter__(self) -> Iterator[str]:
        return iter(name for name, _ in self.items())

    def __contains__(self, name: str) -> bool:
        self._load_entry_points()
        return fold(name) in self._folded

    def _load_entry_points(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            for entry in entry_points(group=group):
                entry.load()


METHODS: Registry[Any] = Registry("patcher", group="hfpatch.patchers")
