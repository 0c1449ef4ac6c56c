"""What a patch costs and what it saves: quality tasks, timing and memory, dense and patched on the same samples.

Importing this package registers the tasks named below.
"""

from hfpatch.evals import (
    babilong,
    chair,
    colored_objects,
    counterfactual,
    fidelity,
    infinitebench,
    longbench,
    niah,
    perplexity,
    pope,
    retrieval,
    ruler,
)

__all__ = [
    "babilong",
    "chair",
    "colored_objects",
    "counterfactual",
    "fidelity",
    "infinitebench",
    "longbench",
    "niah",
    "perplexity",
    "pope",
    "retrieval",
    "ruler",
]
