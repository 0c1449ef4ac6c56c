"""Every Triton kernel is compiled for chips that are not here, in a process that no interpreter has touched."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfpatch.errors import KernelUnavailableError
from hfpatch.kernels import static_gate

ROOT = Path(__file__).parents[1]
SHARED_KB = {80: 163, 90: 227, 100: 227}


def compile_all(*options: str) -> list[dict]:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hfpatch.kernels.static_gate", "--json", *options]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    assert not [row for row in rows if row["problems"]]
    assert result.returncode == 0
    return rows


def kernels_in_the_package() -> set[str]:
    """Functions under @triton.jit whose name ends in _kernel; the others are inlined into these."""
    found = set()
    for path in (ROOT / "hfpatch" / "kernels").glob("triton_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found.add(node.name)
    return found


def check(rows: list[dict]) -> None:
    """The limits once more, without the gate's own judgement."""
    for row in rows:
        assert 0 < row["shared"] <= SHARED_KB[row["arch"]] * 1024
        assert 0 < row["registers"] <= 255
        if row["dtype"] == "bf16":
            assert row["spills"] == 0
            # partial results are added up, not multiplied
            assert (sum(row["matrix"].values()) > 0) == (row["kernel"] != "merge_splits_kernel")
    for arch in SHARED_KB:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels_in_the_package()
    # big tiles use what is new on the chip
    assert any("wgmma.mma_async" in row["matrix"] for row in rows if row["arch"] == 90)
    assert any("tcgen05.mma" in row["matrix"] for row in rows if row["arch"] == 100)


def test_every_kernel_compiles_for_every_chip():
    check(compile_all("--quick"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_configuration_compiles_for_every_chip():
    rows = compile_all()
    check(rows)
    for kernel in kernels_in_the_package():
        compiled = {(row["head_dim"], row["dtype"]) for row in rows if row["kernel"] == kernel}
        assert compiled >= {(d, "bf16") for d in (64, 80, 96, 128, 256)} | {(d, "fp32") for d in (64, 128, 256)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shared": 163 * 1024 + 1}, "166913 bytes of shared memory, a block on sm_80 has 166912"),
        ({"registers": 256}, "256 registers"),
        ({"spills": 8}, "8 bytes spilled"),
        ({"matrix": {}}, "no matrix instructions"),
        ({"matrix": {"mma.sync": 0}}, "no matrix instructions"),
    ],
)
def test_limits(change, problem):
    fine = {"arch": 80, "shared": 163 * 1024, "registers": 255, "spills": 0, "matrix": {"mma.sync": 8}, "half": True}
    assert static_gate.problems(**fine) == ()
    assert static_gate.problems(**fine | {"half": False, "matrix": {}, "spills": 8}) == ()
    (found,) = static_gate.problems(**fine | change)
    assert problem in found
    assert static_gate.problems(**fine | {"matrix": {}, "multiplies": False}) == ()


def test_chips_get_the_tiles_that_fit_them():
    from hfpatch.kernels import triton_blocks

    assert triton_blocks.tiles(100 * 1024) is triton_blocks.tiles(164 * 1024) is triton_blocks.TILES
    assert triton_blocks.tiles(228 * 1024) is triton_blocks.LARGE_TILES


def test_explains_why_it_cannot_start(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelUnavailableError, match="Unset it"):
        static_gate.gate()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(static_gate, "find_spec", lambda name: None)
    assert static_gate.main(["--quick"]) == KernelUnavailableError.exit_code
    assert 'pip install "hfpatch[gpu]"' in capsys.readouterr().err
