"""Table of contents: one import a method, sorted. Importing a module registers its patcher."""

from hfpatch.methods import fastv, head_scale, sa, swa

__all__ = ["fastv", "head_scale", "sa", "swa"]
