"""`hfpatch report`: rebuild the report of a run or a sweep from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfpatch.cli import measure, sweep
from hfpatch.cli.console import Terminal
from hfpatch.cli.options import command, gates


def add_to(app: typer.Typer) -> None:
    @command(app, "report", "hfpatch report runs/latest --format html")
    def report(
        terminal: Terminal,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run or a sweep, or runs/latest.")],
        formats: Annotated[str, typer.Option("--format", metavar="md,html", help="What to write.")] = "md,html",
        fail_under: Annotated[
            list[str] | None, typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit 4 if a result is lower.")
        ] = None,
    ) -> None:
        """Summarise a run or a sweep again and write its report; works for unfinished ones too."""
        limits = gates(fail_under)
        from hfpatch.report.render import render
        from hfpatch.report.run import RunDir
        from hfpatch.report.sweep import SweepDir, render_sweep

        wanted = tuple(name.strip() for name in formats.split(","))
        if SweepDir.is_at(run):
            swept = SweepDir.open(run)
            render_sweep(swept, wanted)
            sweep.show(terminal, swept, limits)
            return
        done = RunDir.open(run)
        render(done, wanted)
        measure.show(terminal, done, limits)
