"""What `apply RECIPE`, `eval`, `bench` and `report` share: run or plan a recipe, show a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from rich.table import Table

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import RunOptions, check_patches, empty_model, gates, offline
from hfpatch.recipe import Recipe


def run(terminal: Terminal, recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and show what came out; exit 4 if a gate fails."""
    limits = gates(options.fail_under)
    check_patches(recipe)
    if options.dry_run:
        plan(terminal, recipe, options.limit)
        return
    from hfpatch.evals.run import run_recipe

    progress = terminal.progress()
    resume = None if options.no_resume else options.resume
    try:
        done = run_recipe(recipe, out=options.out, resume=resume, limit=options.limit, progress=progress)
    except KeyboardInterrupt:
        terminal.farewell = progress.last
        raise
    show(terminal, done, limits)


def plan(terminal: Terminal, recipe: Recipe, limit: int | None) -> None:
    """What `run` would do: the patch layer by layer, and the work. Loads no weights."""
    import hfpatch
    from hfpatch.evals.run import work_list

    work = work_list(recipe, limit)
    shown: list[Any] = []
    explanation = None
    if recipe.patches:
        longest = max(item["cell"]["length"] for item in work)
        explanation = hfpatch.explain(empty_model(recipe, offline(terminal)), recipe, seq_len=longest)
        shown += [str(explanation), ""]
    made = table("task", "cell", "samples", "arms", "prompt tokens", right=("samples", "prompt tokens"))
    for item in work:
        cell = " ".join(f"{key} {value}" for key, value in item["cell"].items() if value is not None)
        made.add_row(item["task"], cell, str(item["samples"]), ", ".join(item["arms"]), f"{item['prompt_tokens']:,}")
    total = sum(item["prompt_tokens"] for item in work)
    data = {"recipe": recipe.to_dict(), "hash": recipe.hash(), "work": work, "prompt_tokens": total}
    data["explanation"] = explanation.to_dict() if explanation is not None else None
    terminal.result(data, *shown, made, f"{len(work)} cells, {total:,} prompt tokens. Nothing was loaded or run.")


def show(terminal: Terminal, done: Any, limits: Mapping[str, float]) -> None:
    """The results of a run directory, and where its report lies."""
    from hfpatch.report.results import verdict

    results = done.results()
    reports = [str(path) for path in sorted(done.path.glob("report.*"), reverse=True)]
    missed = {metric: (measured(results, metric), floor) for metric, floor in limits.items()}
    missed = {metric: pair for metric, pair in missed.items() if pair[0] is None or pair[0] < pair[1]}
    said = verdict(results)
    data = {"run": str(done.path), "reports": reports, "verdict": said, "results": results}
    data["failed_gates"] = {metric: {"value": value, "floor": floor} for metric, (value, floor) in missed.items()}
    lines = [f"! {note}" for note in results["warnings"]]
    lines += [f"{said['word']}: {said['text']}", *(f"report: {path}" for path in reports)]
    terminal.result(data, *_tables(results), "\n".join(lines))
    for metric, (value, floor) in missed.items():
        was = "was not measured" if value is None else f"is {value:.4g}"
        terminal.err.print(f"gate failed: {metric} {was}, wanted at least {floor:g}", style="bold red")
    if missed:
        raise typer.Exit(4)


def measured(results: Mapping[str, Any], metric: str) -> float | None:
    """A number by name, of the patched arm where there is one; None if it was not measured.

    `niah.contains` or `niah.number.contains`, `fidelity.top1_agree`, `bench.prefill` and `bench.decode` (dense /
    patched at the longest length).
    """
    task, *subtask, name = metric.split(".")
    if task == "bench":
        return next((row["ratio"] for row in reversed(results["timing"].get(name) or [])), None)
    if task == "fidelity":
        return next((row["scores"].get(name) for row in results["fidelity"]["rows"] if row["length"] is None), None)
    found = [
        row["dense"] if row["patched"] is None else row["patched"]
        for row in results["quality"]
        if (row["task"], row["metric"], row["overall"]) == (task, name, True) and subtask in ([], [row["subtask"]])
    ]
    return min(found) if found else None


def _tables(results: Mapping[str, Any]) -> list[Table]:
    from hfpatch.report.results import signed, table_label, tokens_text

    def score(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    made = []
    if rows := [row for row in results["quality"] if row["headline"]]:
        quality = table("task", "length", "metric", "dense", "patched", "Δ (95 % CI, paired)", "n", right=("n",))
        for row in rows:
            length = "all" if row["length"] is None else tokens_text(row["length"])
            delta = "–"
            if row["ci"]:
                delta = f"{signed(row['delta'], 3)} [{signed(row['ci'][0], 3)}, {signed(row['ci'][1], 3)}]"
            scores = (score(row["dense"]), score(row["patched"]))
            quality.add_row(table_label(row), length, row["metric"], *scores, delta, str(row["n"]))
        made.append(quality)
    if rows := results["fidelity"]["rows"]:
        fidelity = table("fidelity", *rows[0]["scores"])
        for row in rows:
            name = "all" if row["length"] is None else tokens_text(row["length"])
            fidelity.add_row(name, *(score(value) for value in row["scores"].values()))
        made.append(fidelity)
    timing = results["timing"]
    if timing["prefill"] or timing["decode"]:
        times = table("median ms", "length", "dense", "patched", "dense / patched", "kept", "kernel")
        for what in ("prefill", "decode", "first_call"):
            for row in timing[what]:
                both = (f"{row[arm]['median']:.1f}" if row[arm] else "–" for arm in ("dense", "patched"))
                ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}×"
                kept = "–" if row["density"] is None else f"{100 * row['density']:.1f} %"
                times.add_row(
                    what.replace("_", " "), tokens_text(row["length"]), *both, ratio, kept, row["kernel"] or "–"
                )
        made.append(times)
    return made
