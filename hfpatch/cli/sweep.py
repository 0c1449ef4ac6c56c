"""What `apply` and `report` do with a sweep: run or plan it, show what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import RunOptions, gates
from hfpatch.recipe import Recipe


def run(terminal: Terminal, recipe: Recipe, options: RunOptions) -> None:
    """Run a sweep and show its points; exit 4 if a gate fails at one of them."""
    limits = gates(options.fail_under)
    if options.dry_run:
        plan(terminal, recipe, options.limit)
        return
    from hfpatch.evals.sweep import run_sweep

    done = measure.carry_out(terminal, run_sweep, recipe, options)
    # the other processes of a sharded run have nothing to show
    if done is not None:
        show(terminal, done, limits)


def plan(terminal: Terminal, recipe: Recipe, limit: int | None) -> None:
    """What `run` would do, point by point. Loads no weights."""
    from hfpatch.evals.sweep import sweep_work

    points = sweep_work(recipe, limit)
    made = table("#", "point", "cells", "samples × arms", "prompt tokens", right=("#", "cells", "prompt tokens"))
    for point in points:
        counts: dict[str, int] = {}
        for item in point["work"]:
            arms = ", ".join(item["arms"])
            if not item["task"].startswith("bench "):
                counts[arms] = counts.get(arms, 0) + item["samples"]
        samples = "; ".join(f"{count} × {arms}" for arms, count in counts.items()) or "–"
        cells, tokens = str(len(point["work"])), f"{point['prompt_tokens']:,}"
        made.add_row(str(point["number"]), point["label"], cells, samples, tokens)
    total = sum(point["prompt_tokens"] for point in points)
    data = {"recipe": recipe.to_dict(), "hash": recipe.hash(), "points": points, "prompt_tokens": total}
    unknown = any(item["prompt_tokens"] is None for point in points for item in point["work"])
    more = " and those of prompts whose length only the data tell" if unknown else ""
    terminal.result(data, made, f"{len(points)} points, {total:,} prompt tokens{more}. Nothing was loaded or run.")


def show(terminal: Terminal, sweep: Any, limits: Mapping[str, float]) -> None:
    """The points of a sweep, and where its report lies."""
    from hfpatch.report.sweep import sweep_verdict

    results = sweep.results()
    reports = [str(path) for path in sorted(sweep.path.glob("report.*"), reverse=True)]
    missed: dict[str, dict[str, Any]] = {}
    for number, entry in sweep.points.items():
        done = sweep.run(number)
        for metric, gate in measure.failed_gates({"quality": []} if done is None else done.results(), limits).items():
            missed[f"{entry['label']}: {metric}"] = gate
    said = sweep_verdict(results)
    data = {"run": str(sweep.path), "reports": reports, "verdict": said, "results": results}
    data["failed_gates"] = missed
    lines = [f"{said['word']}: {said['text']}", *(f"report: {path}" for path in reports)]
    terminal.result(data, _points(results), "\n".join(lines))
    measure.end_at_gates(terminal, missed)


def _points(results: Mapping[str, Any]) -> Any:
    from hfpatch.report.sweep import points_table

    found = points_table(results)
    made = table(*found.header)
    for row in found.rows:
        made.add_row(*row)
    return made
