"""Correctness that users can check on their own model and machine, in under a minute on a CPU with a small model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hfpatch import kernels
from hfpatch.anatomy import examine
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.kernels import reference
from hfpatch.methods.base import Method
from hfpatch.patch import PatchHandle, active, patch

State = Literal["pass", "fail", "n/a"]

# needs of the cards of methods that do nothing to text
_ON_IMAGES = {"image tokens", "vision tower"}

# largest logit difference per largest dense logit: what rounding alone does to a network of some tens of layers
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BLOCK = 64


@dataclass(frozen=True)
class Check:
    """One promise. `error` and `tolerance` are in the units that `note` names; None where nothing was measured."""

    name: str
    state: State
    error: float | None = None
    tolerance: float | None = None
    note: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`; `str()` is a table."""

    specs: list[str]
    model: str
    dtype: str
    device: str
    seq_len: int
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(check.state != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{' + '.join(self.specs)} on {self.model} · {self.dtype} · {self.device} · {self.seq_len} tokens"]
        for check in self.checks:
            measured = f"error {check.error:.1e}" if check.error is not None else ""
            allowed = f", allowed {check.tolerance:.1e}" if check.tolerance is not None else ""
            numbers = f"  {measured}{allowed}" if measured else ""
            lines.append(f"  {check.state:<4}  {check.name:<{width}}{numbers}{'  ' if check.note else ''}{check.note}")
        failed = sum(check.state == "fail" for check in self.checks)
        return "\n".join([*lines, f"{failed} of {len(self.checks)} checks failed" if failed else "all checks passed"])


@torch.no_grad()
def verify(model: Any, what: Any, *, seq_len: int = 384, seed: int = 0, **params: Any) -> VerifyReport:
    """Check the promises of a patch on this model, dtype and device.

    Args:
        what: anything that `patch` takes; `params` are its keyword arguments.
        seq_len: tokens of the test prompts. Should exceed the patch's window or budget, else nothing is dropped.

    Returns:
        a report; nothing stays on the model. Raises as `patch` does; ConfigError if the model is patched already.
    """
    if active(model):
        raise ConfigError("this model has patches on; take them off first (hfpatch.unpatch(model)), then verify.")
    subject = _Subject(model, what, {"seed": seed, **params}, seq_len)
    with subject.patched() as handle:
        specs = [str(part.method) for part in handle.parts]
        unseen = [part.method.name for part in handle.parts if _ON_IMAGES & {*part.method.card.needs}]
    checks: list[Callable[[], Check]] = [
        subject.neutral_is_dense,
        subject.undo_is_exact,
        subject.padding_changes_nothing,
        subject.decode_is_one_shot,
        subject.samples_are_independent,
        subject.seed_decides,
        subject.edges_are_finite,
    ]
    done = [check() for check in checks]
    done[4:4] = subject.kernels_agree()
    if unseen:
        note = f"prompts of verify are text, so nothing of {', '.join(unseen)} was tested; try hfpatch eval pope"
        done.append(Check("images", "n/a", note=note))
    facts = (type(subject.model).__name__, str(subject.dtype).removeprefix("torch."), str(subject.device))
    return VerifyReport(specs, *facts, subject.seq_len, done)


class _Subject:
    """The model under test, with prompts of random tokens."""

    def __init__(self, model: Any, what: Any, options: dict[str, Any], seq_len: int) -> None:
        self.model, self.what, self.options = model, what, options
        # the patch is what is tested here, so a training-mode dropout must not blur it
        self.anatomy = examine(model)
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        limit = getattr(self.anatomy.config, "max_position_embeddings", seq_len)
        self.seq_len = max(min(seq_len, limit - 2), 8)
        self.tolerance = _TOLERANCE.get(self.dtype, 5e-2)
        self.a, self.b = self._prompt(1), self._prompt(2)

    def _prompt(self, seed: int, length: int | None = None) -> Tensor:
        """int64 [1, length], without images; the first 100 ids are left out, they tend to be special tokens."""
        vocabulary = self.anatomy.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        low = 100 if vocabulary > 1000 else 0
        ids = torch.randint(low, vocabulary, (1, length or self.seq_len), generator=generator)
        if self.anatomy.image_token_id is not None:
            ids[ids == self.anatomy.image_token_id] = low
        return ids.to(self.device)

    @contextmanager
    def patched(self, what: Any = None) -> Iterator[PatchHandle]:
        with patch(self.model, self.what if what is None else what, **(self.options if what is None else {})) as handle:
            yield handle

    def logits(self, ids: Tensor, **inputs: Any) -> Tensor:
        """fp32 [B, length, vocabulary]."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **inputs).logits
        return logits.float()

    def compare(self, name: str, got: Tensor, want: Tensor, note: str = "", tolerance: float | None = None) -> Check:
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
        allowed = self.tolerance if tolerance is None else tolerance
        return Check(name, "pass" if error <= allowed else "fail", error, allowed, note)

    # The checks -----------------------------------------------------------------------------------------------------

    def neutral_is_dense(self) -> Check:
        name = "neutral options equal dense"
        with self.patched() as handle:
            methods = [type(part.method) for part in handle.parts]
        neutral: list[Method] = []
        for method in dict.fromkeys(methods):
            try:
                neutral.append(method.neutral())
            except NotImplementedError:
                return Check(name, "n/a", note=f"{method.name} has no neutral options")
        dense = self.logits(self.a)
        worst: Check | None = None
        # one after the other: two that choose keys cannot share a layer
        for method_options in neutral:
            with self.patched(method_options):
                check = self.compare(name, self.logits(self.a), dense, "of the largest logit")
            worst = check if worst is None or (check.error or 0) > (worst.error or 0) else worst
        assert worst is not None
        return worst

    def undo_is_exact(self) -> Check:
        name = "removing restores the model bit by bit"
        before, structure = self.logits(self.a), _structure(self.model)
        with self.patched() as handle:
            self.logits(self.a)
            handle.disable()
            off = self.logits(self.a)
            handle.enable()
            self.logits(self.a)
        after = self.logits(self.a)
        changed = [key for key, value in _structure(self.model).items() if value != structure[key]]
        if changed:
            return Check(name, "fail", note=f"differs afterwards: {', '.join(changed)}")
        error = max(float((x - before).abs().max()) for x in (off, after))
        return Check(name, "pass" if error == 0 else "fail", error, 0.0, "logits, disabled and removed")

    def padding_changes_nothing(self) -> Check:
        short, pad = self.b[:, : self.seq_len * 2 // 3], self.seq_len - self.seq_len * 2 // 3
        ids = torch.cat([self.a, torch.cat([short.new_zeros(1, pad), short], 1)])
        mask = torch.ones_like(ids)
        mask[1, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.patched():
            alone = self.logits(short)
        with self.patched():
            batch = self.logits(ids, attention_mask=mask, position_ids=positions)
        return self.compare("left-padded row equals the row alone", batch[1:, pad:], alone, "of the largest logit")

    def decode_is_one_shot(self) -> Check:
        name = "cached decode equals one forward"
        with self.patched() as handle:
            if odd := [part.method.name for part in handle.parts if not part.method.decode_invariant]:
                return Check(name, "n/a", note=f"{', '.join(odd)} treats decode steps in its own way by design")
            one_shot = self.logits(self.a)[:, -4:]
        from hfpatch.evals.generation import cache_argument, cache_of

        with self.patched():
            start = self.seq_len - 4
            output = self.model(input_ids=self.a[:, :start], use_cache=True)
            steps = []
            for n in range(start, self.seq_len):
                cache = {cache_argument(self.model): cache_of(output)}
                output = self.model(input_ids=self.a[:, n : n + 1], use_cache=True, **cache)
                steps.append(output.logits[:, -1].float())
        return self.compare(name, torch.stack(steps, 1), one_shot, "of the largest logit")

    def kernels_agree(self) -> list[Check]:
        """Each kernel that would take this model's heads and this patch's plan, against the reference."""
        with self.patched() as handle:
            planners = [part.method for part in handle.parts if "plan" in part.method.verbs()]
        phases: tuple[Literal["prefill"], Literal["decode"]] = ("prefill", "decode")
        found = [check for method in planners for phase in phases for check in self._kernels_agree(method, phase)]
        return found or [
            Check("kernels equal the reference", "n/a", note="the patch chooses no keys, so it runs no kernel")
        ]

    def _kernels_agree(self, method: Method, phase: Literal["prefill", "decode"]) -> Iterator[Check]:
        call = self._random_call(phase)
        plan = method.plan(call)
        if plan.keeps_all(call):
            return
        exact, _ = reference.run(call.to(torch.float32), plan)
        eager, _ = reference.run(call, plan, compute_dtype=self.dtype)
        # FlashAttention's rule: at most twice the error of plain attention in the same dtype
        allowed = 2 * float((eager.float() - exact).abs().max()) + 1e-5
        for name in kernels.KERNELS:
            if name == "reference":
                continue
            try:
                module = kernels.load(name)
            except ImportError:
                continue
            if module.why_not(call, plan) is not None:
                continue
            error = float((module.run(call, plan)[0].float() - exact).abs().max())
            good = math.isfinite(error) and error <= allowed
            note = f"head_dim {self.anatomy.head_dim}, {phase}, {type(plan).__name__}"
            yield Check(f"kernel {name} equals the reference", "pass" if good else "fail", error, allowed, note)

    def _random_call(self, phase: Literal["prefill", "decode"]) -> AttentionCall:
        generator = torch.Generator().manual_seed(3)
        heads = (self.anatomy.num_heads, self.anatomy.num_key_value_heads, self.anatomy.num_key_value_heads)
        lengths = (1 if phase == "decode" else self.seq_len, self.seq_len, self.seq_len)
        query, key, value = (
            torch.randn(1, count, length, self.anatomy.head_dim, generator=generator).to(self.device, self.dtype)
            for count, length in zip(heads, lengths, strict=True)
        )
        facts = {"layer_idx": 0, "num_layers": self.anatomy.num_layers, "scaling": self.anatomy.head_dim**-0.5}
        return AttentionCall(query, key, value, phase=phase, **facts)

    def samples_are_independent(self) -> Check:
        with self.patched():
            alone = self.logits(self.b)
        with self.patched():
            self.logits(self.a)
            after = self.logits(self.b)
        return self.compare("a sample is not affected by the one before", after, alone, "of the largest logit")

    def seed_decides(self) -> Check:
        state = torch.get_rng_state()
        with self.patched():
            first = self.logits(self.a)
        with self.patched():
            second = self.logits(self.a)
        name = "same seed, same output"
        if not torch.equal(torch.get_rng_state(), state):
            return Check(name, "fail", note="the patch used torch's global random numbers")
        return self.compare(name, second, first, "of the largest logit")

    def edges_are_finite(self) -> Check:
        name = "lengths 1, block-1, block, block+1 give finite output"
        with self.patched() as handle:
            blocks = {getattr(part.method, "block_size", None) or _BLOCK for part in handle.parts}
        lengths: Sequence[int] = sorted(
            {1, *itertools.chain(*((b - 1, b, b + 1) for b in blocks))} & {*range(1, self.seq_len + 1)}
        )
        bad = []
        for length in lengths:
            with self.patched():
                if not bool(self.logits(self._prompt(4, length)).isfinite().all()):
                    bad.append(length)
        return Check(
            name,
            "fail" if bad else "pass",
            note=f"not finite at {bad}" if bad else f"lengths {', '.join(map(str, lengths))}",
        )


def _structure(model: Any) -> dict[str, Any]:
    """What must be the same after a patch is removed, as comparable values."""
    modules = dict(model.named_modules())
    configs = [m.config for m in modules.values() if hasattr(m, "config") and hasattr(m.config, "to_dict")]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "state_dict keys": list(model.state_dict()),
        "module classes": {name: type(module) for name, module in modules.items()},
        "forward attributes": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, hook)) for hook in hooks] for name, module in modules.items()},
        "config": [config.to_dict() for config in configs],
        "attention implementation": [(type(n), n) for c in configs for n in [getattr(c, "_attn_implementation", None)]],
    }
