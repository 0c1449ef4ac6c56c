"""`hfpatch verify`: correctness of a patch on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from hfpatch.cli.console import Terminal
from hfpatch.cli.options import ModelOptions, PatchOptions, build_recipe, check_patches, command, is_recipe, source
from hfpatch.errors import ConfigError
from hfpatch.notation import parse_size


def add_to(app: typer.Typer) -> None:
    @command(app, "verify", "hfpatch verify packaged:smollm2-135m-instruct -p swa:window=128 --dtype fp32")
    def verify(
        terminal: Terminal,
        model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="A model, or a recipe with patches.")],
        patches: PatchOptions,
        models: ModelOptions,
        seq_len: Annotated[str, typer.Option("--seq-len", help="Tokens of the test prompts.")] = "384",
    ) -> None:
        """Check what a patch promises: exact undo, padding, decoding, kernels, seeds. Exit 4 if a check fails."""
        given = model if is_recipe(model) else source(model, "verify", patches)
        recipe, _ = build_recipe(given, terminal, patches, models)
        if not recipe.patches:
            raise ConfigError("there is nothing to verify: name a patch with -p NAME (see: hfpatch list).")
        check_patches(recipe)
        from hfpatch.load import load
        from hfpatch.verify import verify as check

        terminal.say(f"loading {recipe.model.id}")
        loaded = load(recipe.model.id, say=terminal.say, **recipe.model.load_options())
        report = check(loaded.model, recipe, seq_len=int(parse_size(seq_len)), seed=recipe.runtime.seed or 0)
        terminal.result(report.to_dict(), str(report))
        if not report.ok:
            raise typer.Exit(4)
