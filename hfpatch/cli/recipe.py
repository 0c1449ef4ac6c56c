"""`hfpatch recipe`: start, read and check recipe files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import PatchOptions, build_recipe, check_patches, command, patch_specs
from hfpatch.errors import ConfigError
from hfpatch.notation import dump_yaml

_RECIPE = typer.Argument(metavar="FILE", help="A recipe file, or recipe:NAME.")

_TEMPLATE = """\
version: 1
model:
  id: {model}
  dtype: auto            # auto, bf16, fp16, fp32
patches:                 # [] measures the dense model only
{patches}
runtime: {{kernel: auto, strict: false, seed: 0}}
evals:                   # hfpatch list tasks
  - task: niah
    lengths: [1k, 2k]
    depths: "0:100:25"   # start:stop:step in %, stop included
    samples: 4
bench:                   # null = none
  lengths: [1k, 2k]
  repeats: 5
"""


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Start, read and check recipe files.", no_args_is_help=True)
    app.add_typer(group, name="recipe")

    @command(group, "init", "hfpatch recipe init my.yaml --model packaged:smollm2-135m-instruct -p sa:window=512")
    def init(
        terminal: Terminal,
        file: Annotated[Path, typer.Argument(metavar="FILE", help="New file, .yaml.")],
        patches: PatchOptions,
        model: Annotated[str, typer.Option("--model", help="The model's id.")] = "packaged:smollm2-135m-instruct",
    ) -> None:
        """Write a recipe to start from. Never overwrites."""
        specs = patch_specs(patches)
        lean = [{key: value for key, value in asdict(spec).items() if value not in (None, {})} for spec in specs]
        text = "".join(f"  {line}\n" for line in dump_yaml(lean).splitlines()).rstrip("\n") if lean else "  []"
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{str(file)!r} must end in .yaml.")
        try:
            with file.open("x", encoding="utf-8") as out:
                out.write(_TEMPLATE.format(model=model, patches=text))
        except OSError as error:
            raise ConfigError(f"cannot write {str(file)!r}: {error}. An existing file is never overwritten.") from error
        recipe, _ = build_recipe(file, terminal, PatchOptions())
        terminal.result({"file": str(file), "hash": recipe.hash()}, f"wrote {file}. Run it: hfpatch apply {file}")

    @command(group, "show", "hfpatch recipe show recipe:demo --resolved --set runtime.seed=1")
    def show(
        terminal: Terminal,
        file: Annotated[str, _RECIPE],
        patches: PatchOptions,
        resolved: Annotated[bool, typer.Option("--resolved", help="Show where each value comes from.")] = False,
    ) -> None:
        """Print a recipe with all its values: defaults < HFPATCH_* < file < --set and flags."""
        recipe, origins = build_recipe(file, terminal, patches)
        data = {"recipe": recipe.to_dict(), "hash": recipe.hash()}
        if not resolved:
            terminal.result(data, dump_yaml(recipe.to_dict()).rstrip())
            return
        made, values = table("key", "value", "from"), recipe.leaves()
        for path, origin in origins.items():
            made.add_row(path, _text(values[path]), origin)
        terminal.result({**data, "origins": origins}, made)

    @command(group, "validate", "hfpatch recipe validate my.yaml")
    def validate(terminal: Terminal, file: Annotated[str, _RECIPE], patches: PatchOptions) -> None:
        """Check a recipe down to the options of its patchers and tasks. Loads no weights."""
        recipe, _ = build_recipe(file, terminal, patches)
        data = {"valid": True, "name": recipe.name, "hash": recipe.hash()}
        if recipe.matrix:
            from hfpatch.evals.sweep import sweep_work

            points = [{key: point[key] for key in ("number", "label", "values")} for point in sweep_work(recipe)]
            terminal.result(data | {"points": points}, f"{file} is valid: {len(points)} points.")
            return
        from hfpatch.evals.work import Work

        check_patches(recipe)
        if recipe.evals or recipe.bench is not None:
            Work.of(recipe)
        terminal.result(data, f"{file} is valid.")

    @command(group, "hash", "hfpatch recipe hash my.yaml")
    def hash_(terminal: Terminal, file: Annotated[str, _RECIPE], patches: PatchOptions) -> None:
        """Print the SHA-256 of what decides the results; name and output do not count."""
        recipe, _ = build_recipe(file, terminal, patches)
        terminal.result({"hash": recipe.hash()}, recipe.hash())


def _text(value: object) -> str:
    return dump_yaml(value).removesuffix("\n").removesuffix("\n...")
