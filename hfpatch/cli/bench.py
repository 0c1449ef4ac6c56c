"""`hfpatch bench`: latency and memory, dense and patched; `hfpatch bench kernels`: the kernels alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hfpatch.cli import measure
from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import ModelOptions, PatchOptions, RunOptions, build_recipe, command, source
from hfpatch.recipe import parse_size


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
        densities: Annotated[
            str,
            typer.Option(
                "--densities",
                "--density",
                metavar="0.1,0.3,1",
                help="bench kernels: kept shares of the causal pairs; 1 = dense in the kernel.",
            ),
        ] = "0.1,0.2,0.3",
        batch: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences in the batch.")] = None,
    ) -> None:
        """Time prefill and decode and measure memory, dense and patched taking turns in one process.

        `bench kernels` times block-sparse kernels alone against dense SDPA, with 14 query and 2 KV heads of 64 and
        blocks of 128; --kernel, --dtype, --device and --lengths apply.
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
            _kernels(terminal, models, patches, wanted, densities)
            return
        recipe, _ = build_recipe(source(model, "bench", patches, bench=wanted), terminal, patches, models, options)
        measure.run(terminal, recipe, options)


def _kernels(
    terminal: Terminal, models: ModelOptions, patches: PatchOptions, wanted: dict[str, Any], densities: str
) -> None:
    from hfpatch.evals.base import token_counts
    from hfpatch.evals.kernel_bench import bench_kernels

    options: dict[str, Any] = {key: wanted[key] for key in ("repeats", "warmup") if key in wanted}
    options |= {"kernels": patches.kernel.split(",")} if patches.kernel else {}
    options |= {"lengths": token_counts("--lengths", wanted.get("lengths", "8k")), "device": models.device}
    options |= {"densities": [float(parse_size(part)) for part in densities.split(",")], "seed": terminal.seed or 0}
    rows = []
    for dtype in models.dtype.split(",") if models.dtype else ("bf16", "fp32"):
        terminal.say(f"timing in {dtype}, checked against the reference first")
        rows += bench_kernels(dtype=dtype, **options)
    numbers = ("kept", "dense ms", "kernel ms", "speed-up", "efficiency")
    made = table("kernel", "dtype", "tokens", *numbers, "dense is", right=("tokens", *numbers))
    for row in rows:
        about = (row["kernel"], row["dtype"], f"{row['length']:,}", f"{100 * row['density']:.1f} %")
        if row["refused"]:
            made.add_row(*about, "–", "–", "–", "–", f"refused: {row['refused']}")
            continue
        times = (f"{row['dense_ms']:.1f}", f"{row['kernel_ms']:.1f}")
        made.add_row(*about, *times, f"{row['speedup']:.2f}×", f"{row['efficiency']:.2f}", row["dense"])
    first = rows[0]
    place = f"{first['device_name']} · {first['threads']} threads · torch {first['torch']} · seed {first['seed']}"
    note = "efficiency = dense time × realised density ÷ kernel time, medians, taking turns"
    terminal.result({"rows": rows}, made, f"{note} · {place}")
