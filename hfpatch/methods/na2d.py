"""Two-dimensional neighbourhoods in a vision tower: a patch sees the patches around it, and the class token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Neighbourhood, Plan


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Neighbourhood2D(Method):
    """Each patch sees a window of `kernel` x `columns` patches around it, in steps of a dilation.

    Layer l takes `kernel[l % len]`, and likewise the others. Class and register tokens see everything and are seen by
    everything. An even window has one patch more before the query than behind it. A dilation of more than half the
    grid, and a window that would not fit (`kernel * dilation` patches) are reduced to the largest that fit, as the
    official kernels demand; `edge` says what happens to a window at the border.

    Neighbourhood attention is trained in its papers; this use is ours.

    Source: Dilated Neighborhood Attention Transformer, arXiv 2209.15001, section 3; windows moved inward: the same, and
    FreeSwim, arXiv 2511.14712, whose half width d is `kernel = 2d + 1`.
    """

    name: ClassVar[str] = "na2d"
    aliases: ClassVar[tuple[str, ...]] = ("neighborhood-2d", "freeswim")
    card: ClassVar[Card] = Card(
        family="vision",
        summary="patches of the vision tower see a window around them, with a dilation per layer",
        paper="Dilated Neighborhood Attention Transformer, arXiv 2209.15001",
        phase="prefill",
        needs=("vision tower",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"kernel": 3, "dilation": 1, "keep_full": 0},
        {"kernel": 2, "dilation": 2, "keep_full": 0},
        {"kernel": (2, 3), "columns": 3, "dilation": 1, "edge": "cut", "keep_full": 0},
    )
    chunk_invariant: ClassVar[bool] = True

    kernel: int | tuple[int, ...] = option((13, 11), "height of the window in patches, for each layer in turn", ge=2)
    columns: int | tuple[int, ...] | None = option(None, "its width, where that is another, for each layer in turn")
    dilation: int | tuple[int, ...] = option((1, 2), "steps between its patches, for each layer in turn", ge=1)
    edge: str = option("inward", "a window at the border: moved inward, or cut", choices=("inward", "cut"))
    keep_full: int = option(2, "dense layers at the beginning, and as many at the end of those that are used", ge=0)

    def check(self) -> None:
        for name, least in (("kernel", 2), ("columns", 2), ("dilation", 1)):
            given = _listed(getattr(self, name))
            if not given and getattr(self, name) is not None:
                raise ConfigError(f"{self.name}: {name} is empty. Give a number, or one for each layer in turn.")
            if wrong := [n for n in given if not isinstance(n, int) or isinstance(n, bool) or n < least]:
                raise ConfigError(
                    f"{self.name}: {name}={getattr(self, name)!r}: {wrong[0]!r} is not a whole number from {least} up."
                )

    @classmethod
    def neutral(cls) -> Self:
        return cls(kernel=1 << 30, dilation=1, keep_full=0)

    @property
    def decode_invariant(self) -> bool:
        return True

    def fits(self, sizes: ModelSizes) -> None:
        if 2 * self.keep_full >= sizes.num_layers:
            raise ConfigError(
                f"{self.name}: keep_full={self.keep_full} keeps {self.keep_full} layers dense at the beginning and at "
                f"the end, and {sizes.num_layers} layers of this vision tower are used: none is left. Give less, 0 for "
                "windows in all of them."
            )

    def plan(self, call: AttentionCall) -> Plan:
        layer = call.layer_idx
        if call.grid is None or not self.keep_full <= layer < call.num_layers - self.keep_full:
            return Dense()
        sides = (_turn(self.kernel, layer), _turn(self.columns or self.kernel, layer))
        step = _turn(self.dilation, layer)
        steps = (min(step, max(call.grid[0] // 2, 1)), min(step, max(call.grid[1] // 2, 1)))
        kernel = (min(sides[0], call.grid[0] // steps[0]), min(sides[1], call.grid[1] // steps[1]))
        return Neighbourhood(call.grid, kernel, steps, inward=self.edge == "inward")


def _listed(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else value


def _turn(value: int | tuple[int, ...], layer: int) -> int:
    listed = _listed(value)
    return listed[layer % len(listed)]
