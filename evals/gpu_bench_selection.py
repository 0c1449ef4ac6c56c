"""Section of `gpu_bench`: what choosing the keys costs each method, as a share of dense attention, and what it saves.

Keys and queries come in runs of 64 similar ones: on independent random numbers no block is better than another, and
methods that keep a share of the attention mass would keep everything. Real text differs; densities are reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfpatch import kernels
from hfpatch.call import AttentionCall, SequenceState
from hfpatch.errors import HFPatchError
from hfpatch.evals.gpu_bench_attention import heads_of
from hfpatch.evals.gpu_bench_rivals import best_dense, dense_runs
from hfpatch.evals.gpu_bench_timing import MB, Clock, Row, Run, Setup, Step, attempt, race, turn_s, with_peak
from hfpatch.methods.base import Method
from hfpatch.patch import list_patchers
from hfpatch.plan import Dense, Plan

# of a model with 32 layers: methods treat the first and the last ones differently
_LAYER, _LAYERS = 16, 32
_RUN = 64


def steps(setup: Setup) -> list[Step]:
    """A step for each length, phase and method that plans in it."""
    found = []
    planners = [cls for cls in list_patchers() if "plan" in cls.verbs()]
    for n in setup.pick(gpu=(32768, 131072), toy=(96,)):
        for phase, work in (("prefill", float(n) ** 2), ("decode", 0.0)):
            for cls in (cls for cls in planners if cls.card.phase in (phase, "both")):
                run = partial(measure, setup, cls, n, phase)
                found.append(Step(f"{cls.name} {phase} {n}", run, work=work))
    return found


def method_of(setup: Setup, cls: type[Method]) -> Method:
    """At its defaults; at toy size with the small options of the contract suite."""
    return cls.from_options(setup.pick(gpu={}, toy=cls.examples[0]))


def clustered_call(setup: Setup, n: int, phase: Any, seed: int = 0) -> AttentionCall:
    """Queries and keys in runs; `n` tokens, a multiple of the runs' length."""
    heads, kv_heads, dim = heads_of(setup)
    generator, device = setup.generator(seed), setup.device
    normal = partial(torch.randn, generator=generator, device=device, dtype=setup.dtype)
    length = setup.pick(gpu=_RUN, toy=8)

    def heads_in_runs(count: int) -> Tensor:
        # scores of runs have a standard deviation of 1.5 squared: a fifth of them has nine tenths of a row's mass
        of_runs = 1.5 * normal(1, n // length, count, dim).repeat_interleave(length, 1)
        return (of_runs + 0.5 * normal(1, n, count, dim)).transpose(1, 2)

    query, key = heads_in_runs(heads), heads_in_runs(kv_heads)
    value = normal(1, n, kv_heads, dim).transpose(1, 2)
    state = SequenceState(forwards=1, prompt_len=n)
    if phase == "decode":
        query = query[:, :, -1:]
    return AttentionCall(query, key, value, None, dim**-0.5, _LAYER, _LAYERS, phase, seq=state)


def measure(setup: Setup, cls: type[Method], n: int, phase: str, clock: Clock) -> Iterator[Row]:
    """One row: the plan, its time and the kernel's beside those of dense attention."""
    row: Row = {"method": cls.name, "phase": phase, "length": n}
    try:
        method = method_of(setup, cls)
    except HFPatchError as refusal:
        yield row | {"error": f"needs options: {refusal}"}
        return
    row["options"] = str(method)
    call = clustered_call(setup, n, phase)
    plan, error, seconds = attempt(lambda: method.plan(call), setup.device)
    if plan is None:
        yield row | {"error": error}
        return
    row |= {"plan": type(plan).__name__, "first_plan_s": seconds}
    if isinstance(plan, Dense):
        yield row | {"density": 1.0, "content": False}
        return
    other = method.plan(clustered_call(setup, n, phase, seed=1))
    row |= {"density": float(plan.density(call)), "content": not _same(plan, other)}
    del other
    again = _planner(method, call)
    _, peak = with_peak(again, setup.device)
    row["plan_peak_mb"] = None if setup.toy else peak / MB
    dense = _dense(setup, call)
    racers: dict[str, Run] = {"plan": again} | ({} if dense is None else {"dense": dense_runs(call)[dense]})
    choice = kernels.choose(call, plan)
    row |= {"dense": dense, "kernel": choice.name, "refused": choice.refused}
    # a kernel with a [q_len, kv_len] matrix would not fit, and is none that anyone waits for
    quadratic = choice.name == "reference" and call.q_len * call.kv_len > kernels.SMALL
    if quadratic:
        row["error"] = "only the reference kernel takes this plan"
    else:
        _, error, _ = attempt(lambda: choice.run(call, plan), setup.device)
        row |= {"error": error} if error else {}
        racers |= {} if error else {"kernel": lambda: choice.run(call, plan)}
    times = race(setup, racers, clock.share(0.1, 1.0), most=7)
    row |= {"n": len(times["plan"].device), "plan_ms": times["plan"].ms, "plan_host_ms": times["plan"].host_ms}
    if "dense" in times:
        row |= {"dense_ms": times["dense"].ms, "plan_share": times["plan"].ms / times["dense"].ms}
    if "kernel" in times:
        row["kernel_ms"] = times["kernel"].ms
    if "kernel" in times and "dense" in times:
        row["speedup"] = times["dense"].ms / (times["plan"].ms + times["kernel"].ms)
    yield row | {"turn_s": turn_s(times)}


# the best dense kernel of each length and phase
_DENSE: dict[tuple[int, str], str | None] = {}


def _dense(setup: Setup, call: AttentionCall) -> str | None:
    key = call.kv_len, call.phase
    if key not in _DENSE:
        _DENSE[key] = best_dense(setup, call)[0]
    return _DENSE[key]


def _planner(method: Method, call: AttentionCall) -> Run:
    """Plans anew each time: a prompt starts without a memory, a decoding step goes on with it."""
    if call.phase == "prefill":
        return lambda: method.plan(replace(call, seq=SequenceState(forwards=1, prompt_len=call.q_len)))
    state = call.seq
    assert state is not None

    def run() -> Plan:
        state.forwards += 1
        return method.plan(call)

    return run


def _same(a: Plan, b: Plan) -> bool:
    """Do plans for different contents agree? Then the method does not look at them."""
    if type(a) is not type(b):
        return False
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]  # type: ignore[arg-type]
    return all(_equal(x, y) for x, y in pairs)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.equal(x, y)
    return type(x) is type(y) and bool(x == y)
