"""Training-free inference patches for Hugging Face models.

    import hfpatch

    with hfpatch.patch(model, "sa", window=256):
        model.generate(**inputs)

Importing this package imports neither torch nor transformers and changes nothing in them; the names below load what
they need when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hfpatch import errors
    from hfpatch.calibrate import calibrate
    from hfpatch.doctor import doctor
    from hfpatch.evals.diagnose import diagnose
    from hfpatch.evals.run import bench, evaluate
    from hfpatch.load import Loaded, load
    from hfpatch.methods.base import Card, Method, register_patcher
    from hfpatch.options import option
    from hfpatch.patch import PatchHandle, active, explain, get_patcher, is_patched, list_patchers, patch, unpatch
    from hfpatch.recipe import PatchSpec, Recipe, load_recipe
    from hfpatch.verify import verify

_HOME = {
    "bench": "hfpatch.evals.run",
    "calibrate": "hfpatch.calibrate",
    "diagnose": "hfpatch.evals.diagnose",
    "evaluate": "hfpatch.evals.run",
    "doctor": "hfpatch.doctor",
    "Loaded": "hfpatch.load",
    "load": "hfpatch.load",
    "Card": "hfpatch.methods.base",
    "Method": "hfpatch.methods.base",
    "option": "hfpatch.options",
    "register_patcher": "hfpatch.methods.base",
    "PatchHandle": "hfpatch.patch",
    "active": "hfpatch.patch",
    "explain": "hfpatch.patch",
    "get_patcher": "hfpatch.patch",
    "is_patched": "hfpatch.patch",
    "list_patchers": "hfpatch.patch",
    "patch": "hfpatch.patch",
    "unpatch": "hfpatch.patch",
    "PatchSpec": "hfpatch.recipe",
    "Recipe": "hfpatch.recipe",
    "load_recipe": "hfpatch.recipe",
    "verify": "hfpatch.verify",
}

__all__ = [
    "Card",
    "Loaded",
    "Method",
    "PatchHandle",
    "PatchSpec",
    "Recipe",
    "active",
    "bench",
    "calibrate",
    "diagnose",
    "doctor",
    "errors",
    "evaluate",
    "explain",
    "get_patcher",
    "is_patched",
    "list_patchers",
    "load",
    "load_recipe",
    "option",
    "patch",
    "register_patcher",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("hfpatch.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'hfpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Python puts a submodule into its package under its name, where `patch`, `load`, ... must stay functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
