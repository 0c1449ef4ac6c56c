"""`hfpatch bench`: latency and memory, dense and patched; `hfpatch bench kernels`: the kernels alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import ModelOptions, PatchOptions, RunOptions, build_recipe, command, source
from hfpatch.notation import parse_size


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
        decode_tokens: Annotated[
            int | None, typer.Option("--decode-tokens", min=0, help="Decode steps timed; 0: none.")
        ] = None,
        densities: Annotated[
            str,
            typer.Option(
                "--densities",
                "--density",
                metavar="0.1,0.3,1",
                help="bench kernels: kept shares of the causal pairs; 1 = dense in the kernel.",
            ),
        ] = "0.1,0.2,0.3",
        lists: Annotated[
            str, typer.Option("--lists", metavar="kv|query", help="bench kernels: a list of blocks for each such head.")
        ] = "kv",
        batch: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences in the batch.")] = None,
    ) -> None:
        """Time prefill and decode and measure memory, dense and patched taking turns in one process.

        `bench kernels` times block-sparse kernels alone against dense SDPA, with 14 query and 2 KV heads of 64 and
        blocks of 128; --kernel, --dtype, --device, --lengths and --out apply.
        """
        wanted: dict[str, Any] = {
            "lengths": lengths,
            "repeats": repeats,
            "warmup": warmup,
            "decode_tokens": decode_tokens,
            "batch": batch,
        }
        wanted = {key: value for key, value in wanted.items() if value is not None}
        if model == "kernels":
            _kernels(terminal, models, patches, wanted | {"lists": lists}, densities, options.out)
            return
        recipe, _ = build_recipe(source(model, "bench", patches, bench=wanted), terminal, patches, models, options)
        measure.run(terminal, recipe, options)


def _kernels(
    terminal: Terminal,
    models: ModelOptions,
    patches: PatchOptions,
    wanted: dict[str, Any],
    densities: str,
    out: Path | None,
) -> None:
    from hfpatch.evals.base import token_counts
    from hfpatch.evals.kernel_bench import bench_kernels
    from hfpatch.report.kernels import HEADER, NOTE, cells, circumstances, write_kernel_report

    options: dict[str, Any] = {key: wanted[key] for key in ("repeats", "warmup", "lists") if key in wanted}
    options |= {"kernels": patches.kernel.split(",")} if patches.kernel else {}
    options |= {"device": models.device}
    options |= {"densities": [float(parse_size(part)) for part in densities.split(",")], "seed": terminal.seed or 0}
    folder = (out or Path("runs")) / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-bench-kernels"
    rows: list[dict[str, Any]] = []
    reports: list[Path] = []
    for dtype in models.dtype.split(",") if models.dtype else ("bf16", "fp32"):
        for length in token_counts("--lengths", wanted.get("lengths", "8k")):
            terminal.say(f"timing {length:,} tokens in {dtype}, checked against the reference first")
            rows += bench_kernels(lengths=(length,), dtype=dtype, **options)
            # what was measured stays, whatever happens to the rest
            reports = write_kernel_report(rows, folder)
    made = table(*HEADER, right=HEADER[3:10])
    for row in rows:
        made.add_row(*cells(row))
    text = f"{NOTE}\n{circumstances(rows)}"
    lines = [text, *(f"report: {path}" for path in reports)]
    terminal.result({"rows": rows, "run": str(folder), "reports": [str(p) for p in reports]}, made, "\n".join(lines))
