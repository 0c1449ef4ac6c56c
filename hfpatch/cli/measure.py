"""What `apply RECIPE`, `eval`, `bench` and `report` share: run or plan a recipe, show a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import RunOptions, check_patches, empty_model, gates, offline
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.recipe import Recipe


def run(terminal: Terminal, recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe, or the sweep that it is, and show what came out; exit 4 if a gate fails."""
    if recipe.matrix:
        from hfpatch.cli import sweep

        sweep.run(terminal, recipe, options)
        return
    limits = gates(options.fail_under)
    for metric in limits:
        # a name that can be none is said now, not after the run
        _named({"quality": []}, metric)
    check_patches(recipe)
    if options.dry_run:
        plan(terminal, recipe, options.limit)
        return
    from hfpatch.evals.run import run_recipe

    done = carry_out(terminal, run_recipe, recipe, options)
    # the other processes of a sharded run have nothing to show
    if done is not None:
        show(terminal, done, limits)


def carry_out(terminal: Terminal, runner: Callable[..., Any], recipe: Recipe, options: RunOptions) -> Any:
    """`run_recipe` or `run_sweep` with its progress shown; what an interrupted one says last is kept for the end."""
    progress = terminal.progress()
    resume = None if options.no_resume else options.resume
    try:
        return runner(recipe, out=options.out, resume=resume, limit=options.limit, progress=progress)
    except KeyboardInterrupt:
        terminal.farewell = progress.last
        raise


def plan(terminal: Terminal, recipe: Recipe, limit: int | None) -> None:
    """What `run` would do: the patch layer by layer, and the work. Loads no weights."""
    import hfpatch
    from hfpatch.evals.run import work_list

    work = work_list(recipe, limit)
    shown: list[Any] = []
    explanation = None
    if recipe.patches:
        # tasks on ready-made texts know their lengths only with a tokenizer
        longest = max((length for item in work if (length := item["cell"].get("length"))), default=4096)
        explanation = hfpatch.explain(empty_model(recipe, offline(terminal)), recipe, seq_len=longest)
        shown += [str(explanation), ""]
    made = table("task", "cell", "samples", "arms", "prompt tokens", right=("samples", "prompt tokens"))
    for item in work:
        cell = " ".join(f"{key} {value}" for key, value in item["cell"].items() if value is not None)
        tokens = "–" if item["prompt_tokens"] is None else f"{item['prompt_tokens']:,}"
        made.add_row(item["task"], cell, str(item["samples"]), ", ".join(item["arms"]), tokens)
    total = sum(item["prompt_tokens"] or 0 for item in work)
    unknown = sum(item["prompt_tokens"] is None for item in work)
    more = f" and those of {unknown} cells, known when they run" if unknown else ""
    data = {"recipe": recipe.to_dict(), "hash": recipe.hash(), "work": work, "prompt_tokens": total}
    data["explanation"] = explanation.to_dict() if explanation is not None else None
    terminal.result(data, *shown, made, f"{len(work)} cells, {total:,} prompt tokens{more}. Nothing was loaded or run.")


def show(terminal: Terminal, done: Any, limits: Mapping[str, float]) -> None:
    """The results of a run directory, and where its report lies."""
    from hfpatch.report.results import verdict

    results = done.results()
    reports = [str(path) for path in sorted(done.path.glob("report.*"), reverse=True)]
    failed = failed_gates(results, limits)
    said = verdict(results)
    data = {"run": str(done.path), "reports": reports, "verdict": said, "results": results, "failed_gates": failed}
    lines = [f"! {note}" for note in results["warnings"]]
    lines += [f"{said['word']}: {said['text']}", *(f"report: {path}" for path in reports)]
    terminal.result(data, *spaced(_tables(results)), "\n".join(lines))
    end_at_gates(terminal, failed)


def find_run(text: str, base: Path = Path("runs")) -> Any:
    """A run by its directory, its name in `base`, or `latest`. Raises DataMissingError with the nearest names."""
    from hfpatch.report.run import RunDir

    given = Path(text).expanduser()
    for path in (given, base / text):
        if path.exists():
            run = RunDir.open(path)
            if (run.path / "answers.json").is_file():
                raise ConfigError(
                    f"{run.path} holds one prompt, dense and patched, and no samples; read its report.html."
                )
            return run
    names = sorted((path.parent.name for path in base.glob("*/run.json")), reverse=True)
    known = [*names, *(["latest"] if (base / "latest").is_file() else [])]
    near = [name for name in names if text in name] or get_close_matches(text, known, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean: {', '.join(near[:3])}?"
    elif names:
        hint = f"The newest there: {', '.join(names[:3])}."
    else:
        hint = "There are none there yet. Runs are made by `hfpatch eval`, `bench` and `apply`."
    raise DataMissingError(f"no run {text!r}: it is no directory, and none of that name is in {base}. {hint}")


def failed_gates(results: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The limits that the results miss, or that were not measured. Where less is better a limit is the most allowed."""
    failed = {}
    for metric, limit in limits.items():
        value, less = measured(results, metric), less_is_better(results, metric)
        if value is None or (value > limit if less else value < limit):
            failed[metric] = {"value": value, "limit": limit, "lower_is_better": less}
    return failed


def end_at_gates(terminal: Terminal, failed: Mapping[str, Mapping[str, Any]]) -> None:
    """Name the failed gates and exit 4, if there are any."""
    for metric, gate in failed.items():
        was = "was not measured" if gate["value"] is None else f"is {gate['value']:.4g}"
        wanted = "at most" if gate["lower_is_better"] else "at least"
        terminal.err.print(f"gate failed: {metric} {was}, wanted {wanted} {gate['limit']:g}", style="bold red")
    if failed:
        raise typer.Exit(4)


def measured(results: Mapping[str, Any], metric: str) -> float | None:
    """A number by name, of the patched arm where there is one; None if it was not measured.

    `niah.contains`, `ruler.score` (the mean over the subtasks) or `ruler.vt.score`, each over all lengths or with
    `@4k` at one; `fidelity.top1_agree`; `bench.prefill` and `bench.decode` (dense / patched at the longest length).
    Where several tables have that name, the worst of them.
    """
    task, _, name = metric.partition(".")
    if task == "bench":
        return next((row["ratio"] for row in reversed(results["timing"].get(name) or [])), None)
    if task == "fidelity":
        return next((row["scores"].get(name) for row in results["fidelity"]["rows"] if row["length"] is None), None)
    found = [row["dense"] if row["patched"] is None else row["patched"] for row in _named(results, metric)]
    known = [value for value in found if value is not None]
    worst = max if less_is_better(results, metric) else min
    return worst(known) if known else None


def less_is_better(results: Mapping[str, Any], metric: str) -> bool:
    """Whether a number by name (see `measured`) is one of which less is better."""
    task, _, name = metric.partition(".")
    if task == "fidelity":
        return name in results["fidelity"].get("lower_is_better", ())
    return any(row["lower_is_better"] for row in _named(results, metric))


def _named(results: Mapping[str, Any], metric: str) -> list[Mapping[str, Any]]:
    from hfpatch.report.quality import named

    return named(results["quality"], metric)


def spaced(tables: Sequence[Table]) -> list[Any]:
    """Tables with an empty line behind each."""
    return [part for made in tables for part in (made, "")]


def quality_tables(quality: Sequence[Mapping[str, Any]], names: tuple[str, str] = ("dense", "patched")) -> list[Table]:
    """The headline metrics, and subtasks by length; `names`: what the two arms are called."""
    from hfpatch.report.quality import main_rows, matrices
    from hfpatch.report.render import matrix_block
    from hfpatch.report.words import signed, table_label, tokens_text

    made = []
    if rows := main_rows(quality):
        number = ("n", "win/tie/loss")
        several = any(row["ci"] for row in rows)
        columns = ["task", "length", "metric", *names, "Δ (95 % CI, paired)", "n", *number[1:] * several]
        headlines = table(*columns, right=number)
        for row in rows:
            length = "all" if row["length"] is None else tokens_text(row["length"])
            delta = record = "–"
            if row["ci"]:
                delta = f"{signed(row['delta'], 3)} [{signed(row['ci'][0], 3)}, {signed(row['ci'][1], 3)}]"
                delta += ", indicative" if row["indicative"] else ""
                record = f"{row['win']}/{row['tie']}/{row['loss']}"
            cells = [table_label(row), length, row["metric"], _score(row["dense"]), _score(row["patched"]), delta]
            headlines.add_row(*cells, str(row["n"]), *[record] * several)
        made.append(headlines)
    for matrix in matrices(quality):
        block = matrix_block(matrix, names)
        subtasks = table(*block.header)
        for line in block.rows:
            subtasks.add_row(*line)
        made.append(subtasks)
    return made


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _tables(results: Mapping[str, Any]) -> list[Table]:
    made = quality_tables(results["quality"])
    from hfpatch.report.words import tokens_text

    if rows := results["fidelity"]["rows"]:
        fidelity = table("fidelity", *rows[0]["scores"])
        for row in rows:
            name = "all" if row["length"] is None else tokens_text(row["length"])
            fidelity.add_row(name, *(_score(value) for value in row["scores"].values()))
        made.append(fidelity)
    return made + timing_tables(results["timing"])


def timing_tables(timing: Mapping[str, Any], names: tuple[str, str] = ("dense", "patched")) -> list[Table]:
    """Median times of two arms, which are called `names`."""
    from hfpatch.report.words import selection_text, tokens_text

    if not (timing["prefill"] or timing["decode"]):
        return []
    # only what a patch chose has been timed
    chose = any(row.get("selection") for row in timing["prefill"])
    times = table("median ms", "length", *names, " / ".join(names), *["selection"] * chose, "kept", "kernel")
    for what in ("prefill", "decode", "first_call"):
        for row in timing[what]:
            both = (f"{row[arm]['median']:.1f}" if row[arm] else "–" for arm in ("dense", "patched"))
            ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}×"
            kept = "–" if row["density"] is None else f"{100 * row['density']:.1f} %"
            cells = [*both, ratio, *[selection_text(row)] * chose, kept, row["kernel"] or "–"]
            times.add_row(what.replace("_", " "), tokens_text(row["length"]), *cells)
    return [times]
