"""`hfpatch report`: rebuild the report of a run from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal
from hfpatch.cli.options import command, gates


def add_to(app: typer.Typer) -> None:
    @command(app, "report", "hfpatch report runs/latest --format html")
    def report(
        terminal: Terminal,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or runs/latest.")],
        formats: Annotated[str, typer.Option("--format", metavar="md,html", help="What to write.")] = "md,html",
        fail_under: Annotated[
            list[str] | None, typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit 4 if a result is lower.")
        ] = None,
    ) -> None:
        """Summarise a run again and write its report; works for unfinished runs too."""
        limits = gates(fail_under)
        from hfpatch.report.render import render
        from hfpatch.report.run import RunDir

        done = RunDir.open(run)
        render(done, tuple(name.strip() for name in formats.split(",")))
        measure.show(terminal, done, limits)
