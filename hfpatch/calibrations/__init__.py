"""Table of contents: one import a calibration, sorted. Importing a module registers its calibration."""

from hfpatch.calibrations import (
    act_heads,
    adaptinfer_inflections,
    dhsa_boundaries,
    head_gate_far,
    head_mask_means,
    minference_patterns,
    xattention_thresholds,
)

__all__ = [
    "act_heads",
    "adaptinfer_inflections",
    "dhsa_boundaries",
    "head_gate_far",
    "head_mask_means",
    "minference_patterns",
    "xattention_thresholds",
]
