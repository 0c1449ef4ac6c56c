"""`hfpatch doctor`: what this machine can run."""

from __future__ import annotations

from typing import Annotated

import typer

from hfpatch.cli.console import Terminal
from hfpatch.cli.options import command


def add_to(app: typer.Typer) -> None:
    @command(app, "doctor", "hfpatch doctor --fix-hints")
    def doctor(
        terminal: Terminal,
        fast: Annotated[bool, typer.Option("--fast", help="Import no torch and run no kernel.")] = False,
        fix_hints: Annotated[bool, typer.Option("--fix-hints", help="Say what would improve this machine.")] = False,
    ) -> None:
        """Report versions, CPU, GPUs, kernels (checked numerically) and checkpoints. --json is made for bug reports."""
        from hfpatch.doctor import doctor as examine

        report = examine(fast=fast)
        hints = [f"  {hint}" for hint in report.hints] if fix_hints else []
        terminal.result(report.to_dict(), "\n".join([str(report), *hints]))
        if not report.ready:
            raise typer.Exit(3)
