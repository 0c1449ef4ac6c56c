"""The four verbs. A method is one small file: a frozen dataclass of options and those of the verbs that it needs."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self, TypeVar

from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.plan import Plan
from hfpatch.registry import METHODS

Family = Literal["attention", "calibration", "heads", "vision"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `hfpatch info` prints about a patcher.

    Attributes:
        family: also decides the order in which patches on one layer apply.
        summary: one line.
        paper: title and arXiv id.
        phase: what the published method touches.
        needs: e.g. "image tokens", "lse", "gpu", "calibration".
    """

    family: Family
    summary: str
    paper: str
    phase: Literal["prefill", "decode", "both"] = "both"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, before its first layer runs.

    Attributes:
        kwargs: what the model's forward was called with.
        call: runs the model with other keyword arguments, all patches off.
        store: `SequenceState.store` of the sequences that start here.
    """

    kwargs: Mapping[str, Any]
    call: Callable[..., Any]
    store: dict[Any, Any]


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: tuple[Any, ...] = (),
    paper: Any = None,
) -> Any:
    """A dataclass field with its help text, its range and the paper's own default where ours differs."""
    return dataclasses.field(
        default=default, metadata={"help": help, "ge": ge, "gt": gt, "le": le, "choices": choices, "paper": paper}
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training-free patch: its options are its fields, its idea is in its verbs.

    A subclass overrides any of `plan`, `adjust`, `prune`, `request`. Options that must not be combined are refused in
    `check`. Methods hold no state: what must be remembered between calls goes to `call.seq.store`.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card]
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Small option sets, sensible for some 40 tokens, under which the contract suite runs the method."""

    chunk_invariant: ClassVar[bool] = False
    """True if a prefill in chunks must give what one prefill gives."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(self, field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raise ConfigError for options that are fine alone and wrong together."""

    # The verbs --------------------------------------------------------------------------------------------------

    def plan(self, call: AttentionCall) -> Plan:
        """Which keys each query sees in this layer and step. `call` has no padding mask: the junction cut it off.

        No device-to-host sync and no [q_len, kv_len] tensor; randomness from the method's own generator.
        """
        raise NotImplementedError

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """Correct the attention output [B, Hq, q_len, head_dim]. `lse`: fp32 [B, Hq, q_len] if the card needs "lse"."""
        raise NotImplementedError

    def prune(self, call: AttentionCall) -> Tensor | None:
        """Slots that stay after this layer: int64 [B, kept], ascending, the same count in every row; None = all."""
        raise NotImplementedError

    def prune_layers(self, num_layers: int) -> frozenset[int]:
        """Layers after which `prune` is asked."""
        return frozenset()

    def request(self, request: Request) -> dict[str, Any] | None:
        """Look at a prompt before it runs; may return other keyword arguments for the model's forward."""
        raise NotImplementedError

    # What it promises -------------------------------------------------------------------------------------------

    @property
    def decode_invariant(self) -> bool:
        """True if decoding with a cache must give what one forward over the whole text gives."""
        return False

    @classmethod
    def neutral(cls) -> Self:
        """Options under which the method must equal dense attention; the contract suite relies on it."""
        raise NotImplementedError

    @classmethod
    def verbs(cls) -> tuple[str, ...]:
        return tuple(v for v in ("plan", "adjust", "prune", "request") if getattr(cls, v) is not getattr(Method, v))

    # Options ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from a mapping; raises ConfigError naming unknown options and the closest known ones."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{cls.name}: no option {key!r}.{hint} It takes: {', '.join(known) or 'none'}.")
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """All options by name, ready for YAML."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def changed(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        return {f.name: _plain(v) for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.changed().items())])


M = TypeVar("M", bound=type[Method])


def register_patcher(cls: M) -> M:
    """Class decorator: make a Method known by its `name` and `aliases`."""
    METHODS.register(cls.name, *cls.aliases)(cls)
    return cls


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checked(method: Method, field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type and inside its range, or ConfigError."""
    where, meta = f"{method.name}: {field.name}={value!r}", field.metadata
    kinds = _kinds(type(method), field.name)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, list) and tuple in kinds:
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    # bool is an int to Python, not to a user
    if not any(isinstance(value, k) and (k is bool or not isinstance(value, bool)) for k in kinds):
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise ConfigError(
            f"{where} has the wrong type {type(value).__name__}; it takes {wanted}. {meta.get('help', '')}"
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        lows = [f"> {meta['gt']}"] if meta.get("gt") is not None else []
        lows += [f">= {meta['ge']}"] if meta.get("ge") is not None else []
        highs = [f"<= {meta['le']}"] if meta.get("le") is not None else []
        bad = (
            value != value
            or (meta.get("gt") is not None and value <= meta["gt"])
            or (meta.get("ge") is not None and value < meta["ge"])
            or (meta.get("le") is not None and value > meta["le"])
        )
        if bad:
            raise ConfigError(
                f"{where} is out of range: it must be {' and '.join(lows + highs)}. {meta.get('help', '')}"
            )
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{where} is not one of: {', '.join(map(str, meta['choices']))}. {meta.get('help', '')}")
    return value


def _kinds(cls: type, name: str) -> tuple[type, ...]:
    """The plain classes that an annotation admits."""
    hint = typing.get_type_hints(cls)[name]
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(
        type(typing.get_args(m)[0]) if typing.get_origin(m) is Literal else typing.get_origin(m) or m for m in members
    )
