"""`hfpatch report`: rebuild the report of a run or a sweep from its files."""

from __future__ import annotations

from typing import Annotated

import typer

from hfpatch.cli import measure, sweep
from hfpatch.cli.console import Terminal
from hfpatch.cli.options import command, gates


def add_to(app: typer.Typer) -> None:
    @command(app, "report", "hfpatch report runs/latest --format html")
    def report(
        terminal: Terminal,
        run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run or a sweep, its name, or latest.")],
        formats: Annotated[str, typer.Option("--format", metavar="md,html", help="What to write.")] = "md,html",
        fail_under: Annotated[
            list[str] | None,
            typer.Option(
                "--fail-under",
                metavar="METRIC=VALUE",
                help="Exit 4 if a result is lower (higher, where less is better).",
            ),
        ] = None,
    ) -> None:
        """Summarise a run or a sweep again and write its report; works for unfinished ones too."""
        limits = gates(fail_under)
        from hfpatch.report.render import render
        from hfpatch.report.sweep import SweepDir, render_sweep

        wanted = tuple(name.strip() for name in formats.split(","))
        done = measure.find_run(run)
        if SweepDir.is_at(done.path):
            swept = SweepDir.open(done.path)
            render_sweep(swept, wanted)
            sweep.show(terminal, swept, limits)
            return
        render(done, wanted)
        measure.show(terminal, done, limits)
