"""The doctor: it never fails, notices what is broken, and gives nothing personal away."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hfpatch.kernels import KERNELS

# the package shows its function under this name
doctor = importlib.import_module("hfpatch.doctor")


@pytest.fixture(scope="module")
def full():
    return doctor.doctor()


def test_full_report(full):
    assert full.ready and full.verdict.startswith("ready.")
    states = {kernel.name: kernel.state for kernel in full.kernels}
    assert tuple(states) == KERNELS
    assert states["reference"] == states["sdpa"] == "ready"
    assert "max error" in next(k.detail for k in full.kernels if k.name == "sdpa")
    assert full.torch["threads"] >= 1 and "smollm2-135m-instruct" in full.checkpoints
    text = str(full)
    for word in (
        "hfpatch ",
        "torch ",
        "transformers",
        "tested 5.17 and 5.24",
        "CPU",
        "GPU",
        "kernels",
        "checkpoints",
        "verdict",
    ):
        assert word in text
    json.dumps(full.to_dict(), allow_nan=False)


def test_fast_runs_nothing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(doctor, "_in_subprocess_lines", never)
    report = doctor.doctor(fast=True)
    assert report.ready and not report.torch and not report.checkpoints
    assert {k.state for k in report.kernels} <= {"not checked", "unavailable"}


def test_no_home_paths(monkeypatch):
    home = str(Path.home())
    monkeypatch.setenv("HFPATCH_CACHE", f"{home}/somewhere")
    data = doctor.doctor(fast=True).to_dict()
    assert data["environment"]["HFPATCH_CACHE"] == "~/somewhere"
    assert home not in json.dumps(data) or home == "/"


def test_secrets_stay_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in json.dumps(doctor.doctor(fast=True).to_dict())


def test_missing_and_old_packages_are_problems(monkeypatch):
    versions = {"torch": "2.3.0+cu121", "transformers": None, "flash-attn": None, "accelerate": "2.0.0"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    report = doctor.doctor(fast=True)
    assert not report.ready and report.verdict.startswith("cannot run: ")
    assert "torch 2.3.0+cu121: too old, pip install -U 'torch>=2.11'" in report.problems
    assert any(problem.startswith("transformers is missing") for problem in report.problems)
    # nothing about GPUs where there is none, and newer versions are fine
    assert not any("accelerate" in problem for problem in report.problems)
    assert any("flash-attn" in hint for hint in report.hints) is bool(report.gpus)


def test_newer_transformers_is_said(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "5.99.0" if name == "transformers" else real(name))
    report = doctor.doctor(fast=True)
    assert report.ready and "newer than tested" in str(report)


def test_a_crashing_probe_is_reported_and_the_others_go_on(monkeypatch):
    real, started = subprocess.run, []

    def run(command, **options):
        if "kernels" not in command:
            return real(command, **options)
        started.append(names := command[command.index("kernels") + 1 :])
        out, code = "", 0
        for name in names:
            if name == "cpu_blocks":
                code = -11
                break
            out += json.dumps({"name": name, "state": "ready", "detail": ""}) + "\n"
        return subprocess.CompletedProcess(
            command, code, out, "Fatal Python error: Segmentation fault\n" if code else ""
        )

    monkeypatch.setattr(subprocess, "run", run)
    report = doctor.doctor()
    states = {kernel.name: kernel.state for kernel in report.kernels}
    assert states == {name: "crashed" if name == "cpu_blocks" else "ready" for name in KERNELS}
    assert len(started) == 2 and report.ready
    assert any("cpu_blocks crashed" in hint and "Segmentation fault" in hint for hint in report.hints)


def test_a_broken_torch_is_a_problem(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nImportError: libcudart.so.12 missing\n")

    monkeypatch.setattr(subprocess, "run", run)
    report = doctor.doctor()
    assert not report.ready and "libcudart.so.12 missing" in report.verdict
    assert all(kernel.state == "crashed" for kernel in report.kernels)


def test_a_probe_that_hangs_is_ended(monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    assert "no answer within" in doctor.doctor().verdict


def test_a_wrong_kernel_is_found(monkeypatch):
    sdpa = importlib.import_module("hfpatch.kernels.sdpa")
    real = sdpa.run

    def off_by_a_little(call, plan):
        out, lse = real(call, plan)
        return out * 1.01, lse

    assert doctor.check_kernel("sdpa")["state"] == "ready"
    monkeypatch.setattr(sdpa, "run", off_by_a_little)
    found = doctor.check_kernel("sdpa")
    assert found["state"] == "wrong" and "allowed" in found["detail"]


def test_a_wrong_reference_means_that_nothing_can_be_trusted(full):
    broken = tuple(
        dataclasses.replace(kernel, state="wrong", detail="x") if kernel.name == "reference" else kernel
        for kernel in full.kernels
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_check_kernels", lambda: broken)
        report = doctor.doctor()
    assert not report.ready and "reference" in report.verdict


def test_exceptions_in_a_kernel_end_up_in_the_report(monkeypatch, capsys):
    def fail(name):
        raise RuntimeError("PTX error\nsecond line")

    monkeypatch.setattr(doctor, "check_kernel", fail)
    doctor._main("kernels", "sdpa")
    assert json.loads(capsys.readouterr().out) == {
        "name": "sdpa",
        "state": "wrong",
        "detail": "RuntimeError: PTX error",
    }


def test_cpu_instructions(monkeypatch, tmp_path):
    def cpu(text: str) -> dict:
        info = tmp_path / "cpuinfo"
        info.write_text(text)
        monkeypatch.setattr(doctor, "Path", lambda path: info if path == "/proc/cpuinfo" else Path(path))
        return doctor._cpu()

    xeon = cpu("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n")
    assert xeon == {"model": "Xeon", "bf16": True, "bf16_instructions": ["amx_bf16", "avx512_bf16"]}
    assert cpu("model name\t: Old\nflags\t\t: fpu avx2\n")["bf16"] is False
    assert cpu("processor\t: 0\nFeatures\t: fp asimd bf16\n")["bf16"] is True
    assert cpu("nothing known\n")["bf16"] is None


def test_import_is_light():
    code = "import sys, hfpatch.doctor; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
