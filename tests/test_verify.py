"""`verify` passes what keeps its promises and catches what breaks one of them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import ClassVar, Self

import pytest
import torch
from tiny import NAMES, text_inputs, tiny

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.base import Card, Method
from hfpatch.patch import is_patched, patch
from hfpatch.plan import Dense, Plan, Window
from hfpatch.verify import verify

LENGTH = 96


@dataclass(frozen=True, kw_only=True)
class Base(Method):
    """A small window; its children each break one promise."""

    name: ClassVar[str] = "base"
    card: ClassVar[Card] = Card(family="attention", summary="", paper="")

    @property
    def decode_invariant(self) -> bool:
        return True

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    def plan(self, call: AttentionCall) -> Plan:
        return Dense()


class Honest(Base):
    pass


class NotNeutral(Base):
    def plan(self, call: AttentionCall) -> Plan:
        return Window(sink=0, window=9)


class CountsPadding(Base):
    def adjust(self, call: AttentionCall, out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        return out * (1 + call.kv_len / 1000) if call.query.shape[0] > 1 else out


class Remembers(Base):
    seen: ClassVar[list[int]] = []

    def adjust(self, call: AttentionCall, out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        self.seen.append(int(call.query.shape[2]))
        return out * (1 + len(self.seen) / 100)


class DecodesOtherwise(Base):
    def adjust(self, call: AttentionCall, out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        return out * 2 if call.phase == "decode" else out


class GlobalDice(Base):
    def adjust(self, call: AttentionCall, out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        return out + 0 * torch.rand(1)


class EdgeNan(Base):
    def adjust(self, call: AttentionCall, out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        return out / float(call.q_len != 65)


@pytest.fixture
def model():
    made = tiny("llama")
    before = made(**text_inputs(made)).logits
    yield made
    assert not is_patched(made)
    assert torch.equal(made(**text_inputs(made)).logits, before)


def failed(report) -> set[str]:
    assert report.ok is (not any(check.state == "fail" for check in report.checks))
    return {check.name for check in report.checks if check.state == "fail"}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_methods_pass_on_every_family(name):
    for what in ("swa:window=24,sink=3", "sa:window=16,local=8"):
        report = verify(tiny(name), what, seq_len=LENGTH, kernel="reference")
        assert report.ok, str(report)
        assert "all checks passed" in str(report)
        kernels = [check for check in report.checks if check.name.startswith("kernel ")]
        assert kernels and all(check.error <= check.tolerance for check in kernels)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        (Honest(), set()),
        (NotNeutral(), {"neutral options equal dense"}),
        (CountsPadding(), {"left-padded row equals the row alone"}),
        (DecodesOtherwise(), {"cached decode equals one forward"}),
        (GlobalDice(), {"same seed, same output"}),
        (EdgeNan(), {"lengths 1, block-1, block, block+1 give finite output"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_each_broken_promise_is_caught(model, method, broken):
    found = failed(verify(model, method, seq_len=LENGTH, kernel="reference"))
    assert broken <= found
    # what scales outputs is not neutral either
    assert found - broken <= {"neutral options equal dense"}


def test_state_that_leaks_is_caught(model):
    found = failed(verify(model, Remembers(), seq_len=LENGTH, kernel="reference"))
    assert {"a sample is not affected by the one before", "same seed, same output"} <= found


def test_a_wrong_kernel_is_caught(model, monkeypatch):
    import hfpatch.kernels.sdpa as sdpa

    real = sdpa.run
    monkeypatch.setattr(sdpa, "run", lambda call, plan: (real(call, plan)[0] * 1.01, real(call, plan)[1]))
    assert "kernel sdpa equals the reference" in failed(
        verify(model, "swa:window=24", seq_len=LENGTH, kernel="reference")
    )


def test_residue_is_caught(model, monkeypatch):
    module = sys.modules["hfpatch.verify"]

    real = module._structure
    seen = []

    def structure(made):
        seen.append(1)
        return {**real(made), "hooks": len(seen)}

    monkeypatch.setattr(module, "_structure", structure)
    report = verify(model, Honest(), seq_len=LENGTH, kernel="reference")
    (undo,) = [check for check in report.checks if check.name.startswith("removing")]
    assert undo.state == "fail" and undo.note == "differs afterwards: hooks"


def test_not_applicable_says_why(model):
    report = verify(model, "sa:window=16", seq_len=LENGTH, kernel="reference")
    (decode,) = [check for check in report.checks if check.name.startswith("cached decode")]
    assert decode.state == "n/a" and "sa treats decode" in decode.note
    (kernels,) = [
        c for c in verify(model, "head_scale:factor=0.5", seq_len=LENGTH).checks if c.name.startswith("kernels")
    ]
    assert kernels.state == "n/a"


def test_a_patched_model_is_refused(model):
    with patch(model, "swa:window=8", kernel="reference"), pytest.raises(ConfigError, match="take them off first"):
        verify(model, "sa")


def test_data_is_plain(model):
    data = verify(model, Honest(), seq_len=LENGTH, kernel="reference").to_dict()
    assert json.loads(json.dumps(data)) == data and data["seq_len"] == LENGTH and data["ok"] is True


@pytest.mark.parametrize(("method", "said"), [("fastv", True), ("na2d", True), ("swa", False)])
def test_it_says_what_text_cannot_test(method, said):
    options = {"na2d": {"keep_full": 0}, "swa": {"window": 8}}.get(method, {})
    notes = {check.name: check.note for check in verify(tiny("llava"), method, seq_len=LENGTH, **options).checks}
    assert (method in notes.get("images", "")) == said
