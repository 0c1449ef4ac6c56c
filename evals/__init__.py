"""What a patch costs and what it saves: quality tasks, timing and memory, dense and patched on the same samples.

Importing this package registers the tasks named below.
"""

from hfpatch.evals import (
    babilong,
    chair,
    classification,
    colored_objects,
    counterfactual,
    fidelity,
    infinitebench,
    longbench,
    mme,
    niah,
    perplexity,
    pope,
    prefill_cost,
    retrieval,
    ruler,
    scene_vqa,
)

__all__ = [
    "babilong",
    "chair",
    "classification",
    "colored_objects",
    "counterfactual",
    "fidelity",
    "infinitebench",
    "longbench",
    "mme",
    "niah",
    "perplexity",
    "pope",
    "prefill_cost",
    "retrieval",
    "ruler",
    "scene_vqa",
]
