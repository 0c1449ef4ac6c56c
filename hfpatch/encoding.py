"""Pixels behind image features: `generate` encodes images before the model's forward, which then sees no pixels.

Methods that change pictures need them. `Encoder` stands before a model's `get_image_features` and remembers what the
last images were encoded from, so that a forward's arguments can be given as if it encoded them itself.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "get_image_features"
ENCODED = "mm_encoder_outputs"


class Encoder:
    """In front of the `get_image_features` of one module; `remove()` takes it away.

    Attributes:
        inside: tells whether a forward is running, which needs no one to remember.
        given: arguments of the last call, by name, as long as what it made is there.
    """

    def __init__(self, module: nn.Module, inside: Callable[[], bool]) -> None:
        self.__wrapped__ = getattr(module, _NAME)
        self.given: dict[str, Any] = {}
        self._made: Callable[[], Any] = lambda: None
        self._images = 0
        self._module, self.inside = module, inside
        vars(module)[_NAME] = self

    @classmethod
    def on(cls, modules: list[nn.Module], inside: Callable[[], bool]) -> Encoder | None:
        """Before the innermost of a model's modules that can encode images; None: there is none."""
        found = [module for module in modules if hasattr(module, _NAME)]
        return cls(found[-1], inside) if found else None

    def remove(self) -> None:
        vars(self._module).pop(_NAME, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.__wrapped__(*args, **kwargs)
        if self.inside():
            return made
        named = inspect.signature(self.__wrapped__).bind(*args, **kwargs).arguments
        given = {name: value for name, value in named.items() if name != "kwargs" and value is not None}
        self.given, self._images = given, _count(made)
        self._made = weakref.ref(made, lambda _: given.clear())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copied model is an unpatched one; the copy is known before what it holds
        twin = memo.get(id(self._module))
        return getattr(type(twin), _NAME).__get__(twin)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, _NAME)

    def undone(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """A forward's arguments with pixels in place of the features made of them; as they are where that fails."""
        encoded = named.get(ENCODED)
        if not encoded:
            return {name: value for name, value in named.items() if name != ENCODED}
        pixels = self._repeated(encoded.get("image"), named.get("input_ids"))
        if pixels is None:
            return dict(named)
        return {name: value for name, value in named.items() if name != ENCODED} | pixels

    def _repeated(self, features: Any, ids: Any) -> dict[str, Any] | None:
        """What these features were encoded from, for as many rows as beams have made of each prompt; None: unknown."""
        if features is None or features is not self._made() or not isinstance(ids, Tensor) or not self._images:
            return None
        times = _count(features) // self._images
        if times == 1:
            return dict(self.given)
        prompts = len(ids) // times
        tensors = {name: value for name, value in self.given.items() if isinstance(value, Tensor)}
        if self._images % prompts or any(len(value) != self._images for value in tensors.values()):
            return None
        # all images of a prompt follow each other, as often as it has beams
        order = torch.arange(self._images).view(prompts, -1).repeat(1, times).flatten()
        return self.given | {name: value[order.to(value.device)] for name, value in tensors.items()}


def _count(features: Any) -> int:
    found = getattr(features, "pooler_output", None)
    return 0 if found is None else len(found)
