"""`hfpatch bench`: latency and memory, dense and patched; `hfpatch bench kernels`: the kernels alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal
from hfpatch.cli.options import ModelOptions, PatchOptions, RunOptions, build_recipe, command, source


def add_to(app: typer.Typer) -> None:
    @command(
        app,
        "bench",
        "hfpatch bench packaged:smollm2-135m-instruct -p sa --lengths 1k,2k --repeats 5\nhfpatch bench kernels",
    )
    def bench(
        terminal: Terminal,
        model: Annotated[str, typer.Argument(metavar="MODEL|kernels", help="A model, or the word kernels.")],
        patches: PatchOptions,
        models: ModelOptions,
        options: RunOptions,
        lengths: Annotated[
            str | None, typer.Option("--lengths", metavar="1k,4k", help="Prompt lengths, tokens.")
        ] = None,
        repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Timed repeats. [default: 10]")] = None,
        warmup: Annotated[int | None, typer.Option("--warmup", min=0, help="Repeats before them. [default: 3]")] = None,
        decode_tokens: Annotated[int | None, typer.Option("--decode-tokens", min=1, help="Decode steps timed.")] = None,
        batch: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences in the batch.")] = None,
    ) -> None:
        """Time prefill and decode and measure memory, dense and patched taking turns in one process."""
        wanted: dict[str, Any] = {
            "lengths": lengths,
            "repeats": repeats,
            "warmup": warmup,
            "decode_tokens": decode_tokens,
            "batch": batch,
        }
        wanted = {key: value for key, value in wanted.items() if value is not None}
        if model == "kernels":
            _kernels(terminal, models, wanted)
            return
        recipe, _ = build_recipe(source(model, "bench", patches, bench=wanted), terminal, patches, models, options)
        measure.run(terminal, recipe, options)
