"""Table of contents: one import a method, sorted. Importing a module registers its patcher."""

from hfpatch.methods import (
    dhsa,
    dhsa_block,
    exact,
    fastv,
    flexprefill,
    head_scale,
    minference,
    moba,
    na1d,
    power,
    sa,
    span_search,
    spargeattn,
    swa,
    xattention,
)

__all__ = [
    "dhsa",
    "dhsa_block",
    "exact",
    "fastv",
    "flexprefill",
    "head_scale",
    "minference",
    "moba",
    "na1d",
    "power",
    "sa",
    "span_search",
    "spargeattn",
    "swa",
    "xattention",
]
