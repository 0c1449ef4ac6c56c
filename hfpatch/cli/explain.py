"""`hfpatch explain`: what a patch would do, without weights."""

from __future__ import annotations

from typing import Annotated

import typer

from hfpatch.cli.console import Terminal
from hfpatch.cli.options import (
    ModelOptions,
    PatchOptions,
    build_recipe,
    check_patches,
    command,
    empty_model,
    is_recipe,
    offline,
    source,
)
from hfpatch.errors import ConfigError
from hfpatch.notation import parse_size

MODEL_HELP = "Hub id, folder, .gguf file, packaged:NAME, or a recipe."


def add_to(app: typer.Typer) -> None:
    @command(app, "explain", "hfpatch explain packaged:smollm2-135m-instruct -p swa:window=512 --seq-len 8k")
    def explain(
        terminal: Terminal,
        model: Annotated[
            str, typer.Argument(metavar="MODEL|RECIPE", help="Hub id, folder, packaged:NAME, or a recipe.")
        ],
        patches: PatchOptions,
        models: ModelOptions,
        seq_len: Annotated[str, typer.Option("--seq-len", help="Prompt length for the predictions, in tokens.")] = "4k",
        batch: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences.")] = 1,
    ) -> None:
        """Say which layer does what with which kernel, and how much is kept. Needs the model's config only."""
        import hfpatch

        given = model if is_recipe(model) else source(model, "explain", patches)
        recipe, _ = build_recipe(given, terminal, patches, models)
        if not recipe.patches:
            raise ConfigError("there is nothing to explain: name a patch with -p NAME (see: hfpatch list).")
        check_patches(recipe)
        length = parse_size(seq_len)
        if not isinstance(length, int) or length < 1:
            raise ConfigError(f"--seq-len {seq_len} is not a number of tokens, for instance 4096 or 4k.")
        explanation = hfpatch.explain(empty_model(recipe, offline(terminal)), recipe, seq_len=length, batch=batch)
        terminal.result(explanation.to_dict(), str(explanation))
