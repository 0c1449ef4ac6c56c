"""The GPU benchmark at toy size in Triton's interpreter, and what it does when steps break or time runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hfpatch.evals import gpu_bench, gpu_bench_attention, gpu_bench_correct, gpu_bench_models, gpu_bench_rivals
from hfpatch.evals.gpu_bench_record import Record, markdown
from hfpatch.evals.gpu_bench_timing import Setup, Step
from hfpatch.evals.kernel_bench import random_blocks
from hfpatch.kernels import reference
from hfpatch.patch import list_patchers
from hfpatch.plan import Blocks, Dense

ROOT = Path(__file__).parent.parent
TOY = Setup(torch.device("cpu"), True, (torch.float32,))
LARGE = Setup(torch.device("cpu"), False, (torch.float32,))


def test_everything_runs_at_toy_size(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "hfpatch.evals.gpu_bench", "--out", str(tmp_path), "--minutes", "10"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "mean nothing as speed" in done.stdout
    data = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert data["about"]["toy"] and data["about"]["card"] and data["about"]["transformers"]
    assert data["running"] is None and {step["state"] for step in data["steps"]} == {"done"}
    rows = {name: [row for row in data["rows"] if row["section"] == name] for name in gpu_bench.SECTIONS}
    assert all(rows.values())
    # each kernel was compared, and none declined
    compared = {row["kernel"] for row in rows["correctness"]}
    assert compared == {"triton_blocks", "triton_decode", "triton_columns"}
    assert all(0 <= row["error"] <= row["allowed"] and row["allowed"] > 0 for row in rows["correctness"])
    assert {row["case"] for row in rows["correctness"]} == {case.name for case in gpu_bench_correct.cases(TOY)}
    # races: ours, flex_attention and decoding beside dense attention, none of them wrong
    raced = [row for row in rows["throughput"] + rows["decode"] if row["kernel"] != "dense"]
    assert {row["kernel"] for row in raced} >= {"triton_blocks", "flex_attention", "triton_decode"}
    assert not [row for row in raced if "wrong" in row]
    for row in raced:
        assert row["efficiency"] == pytest.approx(row["dense_ms"] * row["density"] / row["ms"])
    planners = {cls.name for cls in list_patchers() if "plan" in cls.verbs()}
    assert {row["method"] for row in rows["selection"]} == planners
    content = {row["method"]: row["content"] for row in rows["selection"] if row["phase"] == "prefill"}
    assert content["flexprefill"] and content["xattention"] and not content["swa"] and not content["exact"]
    for model in ("llama-3.1-8b", "qwen3-8b", "llava-1.5-7b"):
        ran = {row["method"]: row for row in rows["models"] if row["model"] == model}
        wanted = {c.name for c in list_patchers() if "image tokens" not in c.card.needs or model == "llava-1.5-7b"}
        assert set(ran) == wanted
    assert ran["fastv"]["actions"] == ["prune to 32 tokens"] and ran["swa"]["density"] < 0.5
    text = (tmp_path / "gpu_bench.md").read_text()
    for title in ("Correctness", "Prefill attention", "Decoding", "Selection", "Prefill, end to end"):
        assert f"## {title}" in text
    assert "problem" not in text and "Left out" not in text


# Steps that break ----------------------------------------------------------------------------------------------------


ROW = {"kernel": "triton_blocks", "plan": "lists", "length": 8}


def step(name, run=lambda clock: iter([ROW | {"ms": 1.0}]), **rest):
    return Step(name, run, **rest)


def breaks(clock):
    yield ROW | {"ms": 0.5}
    raise RuntimeError("no such\nthing")


def states(record):
    return {s["name"]: (s["state"], s["note"]) for s in record.data["steps"]}


def test_a_step_that_fails_is_noted_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "steps_of", lambda setup, section: [step("bad", breaks), step("good")])
    record, soon = Record.new(tmp_path), time.time() + 60
    gpu_bench.run_section(TOY, record, "decode", 1.0, soon)
    assert states(record) == {"bad": ("failed", "RuntimeError: no such"), "good": ("done", "")}
    # rows from before it broke stay
    assert [(row["step"], row["ms"]) for row in record.data["rows"]] == [("bad", 0.5), ("good", 1.0)]
    assert record.problems() == ["decode, bad failed: RuntimeError: no such"]
    # nothing is done twice
    gpu_bench.run_section(TOY, record, "decode", 1.0, soon)
    assert len(record.data["rows"]) == 2


def test_a_section_without_steps_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "steps_of", lambda setup, section: 1 / 0)
    record = Record.new(tmp_path)
    gpu_bench.run_section(TOY, record, "models", 1.0, time.time() + 60)
    assert states(record)["list of steps"][0] == "failed"


def test_steps_that_do_not_fit_into_the_time_are_left_out(tmp_path, monkeypatch):
    timed = step("small", lambda clock: iter([ROW | {"turn_s": 0.5}]), work=1.0)
    # six turns of 0.5 s, 16 times as much work
    steps = [timed, step("large", work=16.0), step("other", extra=1.0)]
    monkeypatch.setattr(gpu_bench, "steps_of", lambda setup, section: steps)
    record = Record.new(tmp_path)
    gpu_bench.run_section(TOY, record, "throughput", 0.5, time.time() + 60)
    found = states(record)
    assert found["small"][0] == found["other"][0] == "done"
    assert found["large"][0] == "skipped" and "needs about 50 s" in found["large"][1]
    assert "throughput, large: needs about 50 s" in (tmp_path / "gpu_bench.md").read_text()
    assert not record.problems()


def test_no_time_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "steps_of", lambda setup, section: [step("one")])
    record = Record.new(tmp_path)
    assert gpu_bench.work(tmp_path, ["decode", "models"], time.time() - 1) == 0
    record = Record.open(tmp_path)
    assert [s["state"] for s in record.data["steps"]] == ["skipped"] * 2 and not record.data["rows"]


def test_goes_on_behind_a_step_that_kills_its_process(tmp_path, monkeypatch):
    """In real processes, whose steps are ours."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from hfpatch.evals import gpu_bench\n"
        "from hfpatch.evals.gpu_bench_timing import Step\n"
        "gpu_bench._STEP_S = 2\n"
        f"fine = lambda clock: iter([{ROW}])\n"
        "def killed(clock): yield os.kill(os.getpid(), signal.SIGKILL)\n"
        "def hangs(clock): yield time.sleep(60)\n"
        "steps = [Step('a', fine), Step('killed', killed), Step('b', fine), Step('hangs', hangs), Step('c', fine)]\n"
        "gpu_bench.steps_of = lambda setup, section: steps\n"
        "sys.exit(gpu_bench.main())\n"
    )
    plain = gpu_bench._run
    ours = lambda command, *rest: plain([sys.executable, str(script), *command[3:]], *rest)
    monkeypatch.setattr(gpu_bench, "_run", ours)
    assert gpu_bench.main(["--out", str(tmp_path / "out"), "--minutes", "2", "--only", "decode"]) == 1
    record = Record.open(tmp_path / "out")
    found = states(record)
    assert found["killed"] == ("died", "ended by SIGKILL") and found["hangs"][0] == "died"
    assert [row["step"] for row in record.data["rows"]] == ["a", "b", "c"]
    assert len(record.problems()) == 2


# What is measured ----------------------------------------------------------------------------------------------------


def test_wrong_results_and_too_much_memory_are_problems(tmp_path):
    call = gpu_bench_correct.make_call(TOY, torch.float32, q_len=20)
    plan = gpu_bench_correct.blocks(call, 2, 16, 16, empty=True)
    exact = reference.run(call, plan)
    assert "wrong" not in gpu_bench_correct.compare(exact, exact, exact)
    out, lse = exact
    for got in (
        (out + 1e-3, lse),
        (torch.full_like(out, float("nan")), lse),
        (out, lse + 1e-3),
        # only where a row sees nothing
        (out, lse.nan_to_num(neginf=0.0)),
        (out.masked_fill(lse.isneginf()[..., None], 1e-6), lse),
        (out[:, :1], lse[:, :1]),
    ):
        assert "wrong" in gpu_bench_correct.compare(got, exact, exact)
    record = Record.new(tmp_path)
    record.begin("throughput", "blocks")
    much = {"memory_over": True, "extra_mb": 9, "allowed_mb": 4}
    for row in (ROW | {"wrong": "error 1"}, ROW | much, ROW | much | {"kernel": "flex_attention"}):
        record.add(row)
    # a file that can be read after every row
    assert len(json.loads((tmp_path / "gpu_bench.json").read_text())["rows"]) == 3
    told = [problem.split(": ")[1] for problem in record.problems()]
    assert told == ["wrong, error 1", "9 MB beyond its result, allowed 4"]
    assert "**2 problems**" in (tmp_path / "gpu_bench.md").read_text()


def test_long_results_are_checked_at_their_end():
    call = gpu_bench_attention.random_call(TOY, 70)
    for heads in (2, 4):
        plan = random_blocks(call, 0.5, 16, 0, heads)
        out, lse = reference.run(call, plan)
        assert "wrong" not in gpu_bench_attention.spot_check(call, plan, (out, lse))
        out[:, -1, -1] += 0.01
        assert "wrong" in gpu_bench_attention.spot_check(call, plan, (out, lse))


@pytest.mark.parametrize("setup", [TOY, LARGE], ids=["toy", "large"])
def test_plans_are_valid(setup, monkeypatch):
    """Those of the GPU too, on tensors with head_dim 1."""
    if not setup.toy:
        monkeypatch.setattr(gpu_bench_attention, "heads_of", lambda setup: (8, 2, 1))
    call = gpu_bench_attention.random_call(setup, setup.pick(gpu=4096, toy=96))
    decode = gpu_bench_attention.random_call(setup, setup.pick(gpu=8192, toy=530), 1)
    plans, decoders = gpu_bench_attention._plans(setup, call), gpu_bench_attention._decoders(decode)
    for racer, of in [*((racer, call) for racer in plans), *((racer, decode) for racer in decoders)]:
        if isinstance(racer.plan, Blocks):
            racer.plan.check(of)
            last = racer.plan.blk_idx.gather(-1, racer.plan.blk_cnt[..., None].long() - 1)
            # the newest keys are always seen
            assert bool(((last[:, :, -1] + 1) * racer.plan.block_k > of.kv_len - racer.plan.block_k).all()), racer.label
        # toy prompts have too few blocks for it
        if racer.asked and not setup.toy:
            assert float(racer.plan.density(of)) == pytest.approx(racer.asked, abs=0.01), racer.label
    for case in gpu_bench_correct.cases(TOY):
        call = gpu_bench_correct.make_call(TOY, torch.float32, **case.call)
        plan = case.plan(call) if case.plan else Dense()
        if isinstance(plan, Blocks):
            plan.check(call)


def test_flex_attention_gets_the_same_blocks():
    call = gpu_bench_attention.random_call(TOY, 128)
    for heads in (2, 4):
        plan = random_blocks(call, 0.4, 16, 0, heads)
        dense = gpu_bench_rivals.flex_mask(call, plan, gpu_bench_rivals._causal).to_dense()[0]
        blocks = plan.mask(call)[0, :, ::16, ::16]
        assert torch.equal(dense.bool(), blocks) and not bool(blocks.all())
        out = gpu_bench_rivals.flex_run(call, plan, compiled=False)()
        torch.testing.assert_close(out, reference.run(call, plan)[0])


def test_shapes_are_the_published_ones():
    for shape, parameters in (
        (gpu_bench_models.Shape("llama-3.1-8b", 32, 0), 8.03e9),
        (gpu_bench_models.Shape("qwen3-8b", 36, 0), 8.19e9),
        (gpu_bench_models.Shape("llava-1.5-7b", 32, 0, vision=True), 7.06e9),
    ):
        with torch.device("meta"):
            model = gpu_bench_models.build(Setup(torch.device("meta"), False, (torch.bfloat16,)), shape)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)
        assert model.dtype == torch.bfloat16
        if shape.vision:
            assert shape.config(False)["image_seq_length"] == 576


def test_aims_are_told():
    rows = [
        {"section": "throughput", "step": "blocks 32768", "kernel": "triton_blocks", "plan": "lists", "length": 32768,
         "density_asked": d, "density": d, "efficiency": e, "dense_ms": 4.0, "ms": 2.0}
        for d, e in ((1.0, 0.1), (0.25, 0.9), (0.1, 0.8))
    ]  # fmt: skip
    rows += [
        {"section": "selection", "step": "s", "method": m, "phase": "prefill", "length": 32768, "plan": "Blocks",
         "content": c, "plan_share": s}
        for m, c, s in (("slow", True, 0.4), ("quick", True, 0.02), ("fixed", False, 3.0))
    ]  # fmt: skip
    text = markdown({"about": {"toy": False, "card": "H100"}, "rows": rows, "steps": [], "running": None})
    assert "0.80 at worst (32768 tokens, 10 % kept)" in text
    assert "above it slow at 32768 40 % (of 2)" in text and "card H100" in text
