"""`hfpatch compare`: finished runs against each other, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import command, gates
from hfpatch.errors import DataMissingError


class Arm(StrEnum):
    dense = "dense"
    patched = "patched"


def add_to(app: typer.Typer) -> None:
    @command(
        app,
        "compare",
        "hfpatch compare runs/20260101-120301-niah-sa-3f9c2a1b latest\nhfpatch compare latest -o compared",
    )
    def compare(
        terminal: Terminal,
        runs: Annotated[
            list[str], typer.Argument(metavar="RUN...", help="Run directories, their names in runs/, or latest.")
        ],
        arm: Annotated[
            Arm | None, typer.Option("--arm", help="Which arm of each run. [default: patched where there is one]")
        ] = None,
        out: Annotated[
            Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write compare.md and compare.html there.")
        ] = None,
        fail_under: Annotated[
            list[str] | None,
            typer.Option(
                "--fail-under",
                metavar="METRIC=VALUE",
                help="Exit 4 if a result of the last run is lower (higher, where less is better).",
            ),
        ] = None,
    ) -> None:
        """Compare finished runs on the samples that they share: each with the first, a single one with its dense arm.

        Samples are paired by task, cell, number, seed and prompt. A sweep stands for the runs of its points.
        """
        limits = gates(fail_under)
        found = [run for text in runs for run in _runs(text)]
        from hfpatch.report.compare import compare as against
        from hfpatch.report.compare import overall, write_comparison
        from hfpatch.report.results import summarise

        comparison = against(found, arm.value if arm else None)
        written = [str(path) for path in write_comparison(comparison, out)] if out else []
        failed = measure.failed_gates(summarise(found[-1]), limits) if limits else {}
        said = overall(comparison)
        data = {**_plain(comparison), "verdict": said, "reports": written, "failed_gates": failed}
        terminal.result(data, *_shown(comparison), *(f"report: {path}" for path in written))
        measure.end_at_gates(terminal, failed)


def _runs(text: str) -> list[Any]:
    from hfpatch.report.sweep import SweepDir

    done = measure.find_run(text)
    if not SweepDir.is_at(done.path):
        return [done]
    sweep = SweepDir.open(done.path)
    found = [run for number in sweep.points if (run := sweep.run(number)) is not None]
    if not found:
        raise DataMissingError(f"{sweep.path} is a sweep of which no point has run yet. Finish it first.")
    return found


def _shown(comparison: Mapping[str, Any]) -> list[Any]:
    runs = table("", "run", "arm", "model", "patch", "samples", "kept", right=("samples",))
    for run in comparison["runs"]:
        kept = "–" if run["density_prefill"] is None else f"{100 * run['density_prefill']:.1f} %"
        about = (run[key] for key in ("name", "run", "arm", "model", "patch"))
        runs.add_row(*about, str(run["samples"]), kept)
    shown: list[Any] = [runs, ""]
    for number, one in enumerate(comparison["comparisons"]):
        names = (one["base"], one["other"])
        tables = measure.quality_tables(one["quality"], names)
        tables += measure.timing_tables(one["timing"], names) if one["timing"] else []
        lines = [f"! {note}" for note in one["warnings"]]
        lines.append(f"{one['verdict']['word']}. {one['verdict']['text']}")
        shown += [*[""] * (number > 0), *measure.spaced(tables), "\n".join(lines)]
    return shown


def _plain(value: Any) -> Any:
    """The comparison for machines: in its tables the two sides are called base and other."""
    called = {"dense": "base", "patched": "other"}
    if isinstance(value, Mapping):
        return {_side_name(key, called): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _side_name(key: str, called: Mapping[str, str]) -> str:
    arm, _, rest = key.partition("_")
    return f"{called[arm]}{'_' * bool(rest)}{rest}" if arm in called else key
