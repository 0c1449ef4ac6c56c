"""The four verbs. A method is one small file: a frozen dataclass of options and those of the verbs that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

from torch import Tensor

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.encoding import ENCODED
from hfpatch.errors import UnsupportedError
from hfpatch.images import Look, Merge, without_images
from hfpatch.options import Options, option
from hfpatch.plan import Plan, Window
from hfpatch.registry import METHODS

__all__ = ["Card", "Family", "Method", "Request", "option", "register_patcher"]

Family = Literal["attention", "calibration", "heads", "vision"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `hfpatch info` prints about a patcher.

    Attributes:
        family: also decides the order in which patches on one layer apply.
        summary: one line.
        paper: title and arXiv id.
        phase: what the published method touches.
        needs: e.g. "image tokens", "class token" (of the vision tower), "pixels", "lse", "gpu", "calibration".
    """

    family: Family
    summary: str
    paper: str
    phase: Literal["prefill", "decode", "both"] = "both"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stream:
    """A second run of the same sequences that goes along with the first, on a cache of its own, all patches off.

    Attributes:
        change: keyword arguments of a forward -> those of the second run's; asked in every forward.
        mix: (logits, logits of the second run) -> the logits that the model gives.
    """

    change: Callable[[dict[str, Any]], dict[str, Any]]
    mix: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, before its first layer runs.

    Attributes:
        kwargs: what the model's forward was called with.
        call: runs the model with other keyword arguments, all patches off. A function before them is given the
            attention call of every decoder layer, and its output before the projection, [B, n, Hq, D].
        store: `SequenceState.store` of the sequences that start here.
        image_mask: bool [B, n], True at image tokens; None where the model has none, or was not given token ids.
        image_marks: ids of tokens that stand around images and mean nothing without them.
        write: `write(steps, watch, **kwargs)` continues prompts greedily, all patches off: int64 [B, steps taken], -1
            behind the token that ends an answer. `watch(call, out)` is given the same in every step.
        fall_back: is told why the method leaves this prompt as it is; an error under strict.
        looks: what `when_embedded` was given.
        streams: what `beside` was given.
    """

    kwargs: Mapping[str, Any]
    call: Callable[..., Any]
    write: Callable[..., Tensor]
    fall_back: Callable[[str], None]
    store: dict[Any, Any]
    image_mask: Tensor | None = None
    image_marks: tuple[int, ...] = ()
    looks: list[Look] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    def pixels(self) -> Tensor | None:
        """`pixel_values` of the prompt, for methods whose card needs "pixels"; None: it has no images.

        Raises UnsupportedError where only features of its images came along.
        """
        if isinstance(found := self.kwargs.get("pixel_values"), Tensor):
            return found
        if (self.kwargs.get(ENCODED) or {}).get("image") is not None:
            raise UnsupportedError(
                "its images came encoded, in a way that hides their pixels: in pieces (prefill_chunk_size), as beams "
                "of several patches, or by the caller"
            )
        return None

    def text_only(self) -> dict[str, Any] | None:
        """Arguments for `call`: the same prompts without their images, see `without_images`. None: there are none."""
        if self.image_mask is None or not bool(self.image_mask.any()):
            return None
        return without_images(self.kwargs, self.image_mask, self.image_marks)

    def when_embedded(self, look: Look) -> None:
        """Have `look` see the prompt once its images are embedded; it may choose the image tokens that go on.

        It is not asked about prompts without images. `Embedded.tower` is there for methods whose card needs a class
        token; where it cannot be had, the prompt runs as it is, and the report says why.
        """
        self.looks.append(look)

    def beside(self, stream: Stream) -> None:
        """Have a second run go along with this prompt and all that is decoded after it; its logits are mixed in."""
        self.streams.append(stream)


@dataclass(frozen=True, kw_only=True)
class Method(Options):
    """A training-free patch: its options are its fields, its idea is in its verbs.

    A subclass overrides any of `plan`, `adjust`, `prune`, `request`. Options that must not be combined are refused in
    `check`. Methods hold no state: what must be remembered between calls goes to `call.seq.store`.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card]
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Small option sets, sensible for some 40 tokens, under which the contract suite runs the method."""

    chunk_invariant: ClassVar[bool] = False
    """True if a prefill in chunks must give what one prefill gives."""

    looks_ahead: ClassVar[bool] = False
    """True if `prune` goes by the queries and keys of the layer that comes next; its call is then that layer's."""

    whole_prompt: ClassVar[bool] = False
    """True if `prune` goes by the end of the prompt: one that comes in pieces is cut by the end of its first piece."""

    # The verbs --------------------------------------------------------------------------------------------------

    def plan(self, call: AttentionCall) -> Plan:
        """Which keys each query sees in this layer and step. `call` has no padding mask: the junction cut it off.

        No device-to-host sync and no [q_len, kv_len] tensor; randomness from the method's own generator.
        """
        raise NotImplementedError

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """Correct the attention output [B, Hq, q_len, head_dim]. `lse`: fp32 [B, Hq, q_len] if the card needs "lse"."""
        raise NotImplementedError

    def prune(self, call: AttentionCall) -> Tensor | Merge | None:
        """Slots that stay after this layer: int64 [B, kept], ascending, the same count in every row; None = all.

        With a function, the layer's output decides, and can be changed: see `Merge`.
        """
        raise NotImplementedError

    def prune_layers(self, num_layers: int) -> frozenset[int]:
        """Layers after which `prune` is asked."""
        stages = {*self.stages(num_layers, 1 << 20), *self.token_stages(num_layers, 1 << 20)}
        return frozenset(layer for layer in stages if layer >= 0)

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        """For the forecast: how many of `images` image tokens are left after a layer; -1 = before the first one."""
        return {}

    def token_stages(self, num_layers: int, tokens: int) -> Mapping[int, int]:
        """For the forecast: how many of a prompt's `tokens`, text or image, are left after a layer."""
        return {}

    def request(self, request: Request) -> dict[str, Any] | None:
        """Look at a prompt before it runs; may return other keyword arguments for the model's forward."""
        raise NotImplementedError

    # What it promises -------------------------------------------------------------------------------------------

    @property
    def decode_invariant(self) -> bool:
        """True if decoding with a cache must give what one forward over the whole text gives."""
        return False

    @property
    def reads_ahead(self) -> bool:
        """True if tokens after a query's own block take part in choosing what the query sees. It never sees them."""
        return False

    def fits(self, sizes: ModelSizes) -> None:
        """Raise ConfigError if a file among the options is not for a model of these sizes; asked when put on."""

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]] | None:
        """Query heads by layer that the method is for, unless `patch(..., heads=)` says others; None = all.

        Args:
            layers: those that were chosen and have full attention.
        """
        return None

    def forgets(self, call: AttentionCall) -> Window | None:
        """The window beyond which no later query sees, in the heads that the method is on: the cache drops the rest.

        Asked in each step in which the method plans; `call` is the whole layer's. None keeps everything.
        """
        return None

    @classmethod
    def neutral(cls) -> Self:
        """Options under which the method must equal dense attention; the contract suite relies on it."""
        raise NotImplementedError

    @classmethod
    def drops_images(cls) -> bool:
        """Whether it leaves image tokens out, before the first layer or inside: then it has a forecast."""
        return cls.stages is not Method.stages

    @classmethod
    def drops_text(cls) -> bool:
        """Whether it leaves tokens of any kind out inside the model: their prompt logits then mean nothing."""
        return cls.token_stages is not Method.token_stages

    @classmethod
    def verbs(cls) -> tuple[str, ...]:
        return tuple(v for v in ("plan", "adjust", "prune", "request") if getattr(cls, v) is not getattr(Method, v))


M = TypeVar("M", bound=type[Method])


def register_patcher(cls: M) -> M:
    """Class decorator: make a Method known by its `name` and `aliases`."""
    METHODS.register(cls.name, *cls.aliases)(cls)
    return cls
