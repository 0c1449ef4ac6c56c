"""`hfpatch eval`: one task, dense and patched."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal
from hfpatch.cli.options import ModelOptions, PatchOptions, RunOptions, build_recipe, command, source


def add_to(app: typer.Typer) -> None:
    @command(
        app,
        "eval",
        "hfpatch eval niah packaged:smollm2-135m-instruct -p swa:window=512 --lengths 1k,2k --depths 0:100:25",
    )
    def eval_(
        terminal: Terminal,
        task: Annotated[str, typer.Argument(metavar="TASK", help="See: hfpatch list tasks.")],
        model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or packaged:NAME.")],
        patches: PatchOptions,
        models: ModelOptions,
        options: RunOptions,
        lengths: Annotated[
            str | None, typer.Option("--lengths", metavar="1k,2k", help="Prompt lengths, tokens.")
        ] = None,
        depths: Annotated[
            str | None, typer.Option("--depths", metavar="START:STOP:STEP", help="Needle depths in %, stop included.")
        ] = None,
        samples: Annotated[int | None, typer.Option("--samples", min=1, help="Samples in each cell.")] = None,
        subtasks: Annotated[
            str | None, typer.Option("--subtasks", metavar="A,B", help="Some of a suite's tasks. [default: all]")
        ] = None,
        data: Annotated[
            str | None, typer.Option("--data", metavar="PATH", help="File or folder with a task's official data.")
        ] = None,
    ) -> None:
        """Run one task, dense and patched on the same samples, and write a report.

        Without -p only the dense model runs. Other options of the task (hfpatch info TASK): --set evals.0.NAME=VALUE.
        """
        wanted: dict[str, Any] = {"task": task, "lengths": lengths, "depths": depths, "samples": samples}
        wanted |= {"subtasks": subtasks, "data": data}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        recipe, _ = build_recipe(source(model, task, patches, evals=[wanted]), terminal, patches, models, options)
        measure.run(terminal, recipe, options)
