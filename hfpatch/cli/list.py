"""`hfpatch list`: what there is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import command, offline


class Kind(StrEnum):
    patchers = "patchers"
    models = "models"
    tasks = "tasks"
    kernels = "kernels"
    recipes = "recipes"
    calibrations = "calibrations"


def add_to(app: typer.Typer) -> None:
    @command(app, "list", "hfpatch list patchers --supports packaged:smollm2-135m-instruct")
    def list_(
        terminal: Terminal,
        kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.patchers,
        family: Annotated[
            str | None,
            typer.Option("--family", metavar="attention|calibration|heads|vision", help="Patchers of one family."),
        ] = None,
        supports: Annotated[
            str | None, typer.Option("--supports", metavar="MODEL", help="Patchers that this model can have.")
        ] = None,
    ) -> None:
        """List patchers, models, tasks, kernels, recipes or calibrations."""
        if kind is Kind.patchers:
            rows = _patchers(family, supports, offline(terminal))
            hint = "Details: hfpatch info NAME · For your model: hfpatch list patchers --supports MODEL"
        else:
            rows = {
                Kind.models: _models,
                Kind.tasks: _tasks,
                Kind.kernels: _kernels,
                Kind.recipes: _recipes,
                Kind.calibrations: _calibrations,
            }[kind]()
            hint = {
                Kind.models: "Any hub id, folder in Hugging Face format or .gguf file works too.",
                Kind.tasks: "Details: hfpatch info NAME",
                Kind.kernels: "Tried in this order. Checked on this machine: hfpatch doctor",
                Kind.recipes: "Use: hfpatch apply recipe:NAME",
                Kind.calibrations: "Use: hfpatch calibrate MODEL -p PATCHER --what WHAT --out FILE",
            }[kind]
        made = table(*(rows[0] if rows else ("nothing found",)))
        for row in rows:
            made.add_row(
                *(", ".join(v) if isinstance(v, (list, tuple)) else "–" if v is None else str(v) for v in row.values())
            )
        terminal.result({kind.value: rows}, made, f"{len(rows)} {kind.value}. {hint}")


def _patchers(family: str | None, supports: str | None, offline: bool) -> list[dict[str, Any]]:
    import hfpatch

    config = None
    if supports is not None:
        from hfpatch.load import load_config

        config = load_config(supports, offline=offline)
    return [
        {
            "id": cls.name,
            "family": cls.card.family,
            "phase": cls.card.phase,
            "needs": list(cls.card.needs),
            "paper": cls.card.paper,
            "summary": cls.card.summary,
        }
        for cls in hfpatch.list_patchers(family=family, supports=config)
    ]


def _models() -> list[dict[str, Any]]:
    from hfpatch.packaged import PACKAGED, packaged_dir

    return [
        {
            "model": f"packaged:{name}",
            "what": packaged.title,
            "download": f"{packaged.megabytes} MB",
            "licence": packaged.licence,
            "in cache": "yes" if packaged_dir(name) else "no",
        }
        for name, packaged in PACKAGED.items()
    ]


def _tasks() -> list[dict[str, Any]]:
    from hfpatch.evals.work import TASKS

    return [{"task": name, "metrics": list(task.metrics), "summary": task.summary} for name, task in TASKS.items()]


def _kernels() -> list[dict[str, Any]]:
    from hfpatch import kernels

    return [
        {"kernel": name, "summary": (kernels.load(name).__doc__ or "").strip().splitlines()[0]}
        for name in kernels.KERNELS
    ]


def _recipes() -> list[dict[str, Any]]:
    from hfpatch.recipe import load_recipe, shipped_recipes

    found = {name: load_recipe(path) for name, path in shipped_recipes().items()}
    return [
        {
            "recipe": name,
            "model": recipe.model.id,
            "patches": [str(spec) for spec in recipe.patches],
            "measures": [task["task"] for task in recipe.evals] + (["bench"] if recipe.bench else []),
        }
        for name, recipe in found.items()
    ]


def _calibrations() -> list[dict[str, Any]]:
    from dataclasses import fields

    from hfpatch.calibrate import calibrations

    return [
        {
            "patcher": cls.patcher,
            "what": cls.name,
            "file": cls.suffix,
            "options": [field.name for field in fields(cls)],
            "summary": cls.summary,
        }
        for cls in calibrations()
    ]
