"""ACT against its definition on explicit probabilities, its algebra, its state while decoding, its head lists."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch

import hfpatch
from hfpatch.calibrated import Header, ModelSizes, encode
from hfpatch.call import AttentionCall, SequenceState
from hfpatch.errors import ConfigError, DataMissingError, HFPatchWarning
from hfpatch.methods.act import _PUBLISHED, HEADS, AttentionCalibration
from hfpatch.plan import Window, visible

EVERY = {"skip_first": 0, "skip_last": 0}


def planted(n=90, heads=4, kv_heads=4, batch=1, sinks=(7, 31), dtype=torch.float64, seed=0, dim=16):
    """Queries with a mean in common, which the first key and those of `sinks` share: hidden sinks."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randn(batch, count, n, dim, generator=rng, dtype=torch.float64)  # noqa: E731
    mean = torch.randn(dim, generator=rng, dtype=torch.float64)
    query, key, value = draw(heads) + mean, draw(kv_heads), draw(kv_heads)
    key[:, :, [0, *sinks]] = 1.5 * mean
    return AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype), scaling=dim**-0.5, num_layers=4)


def probabilities(call, plan=None):
    """(P [B, Hq, q, n], lse) on explicit scores; rows that see nothing are zero."""
    key = call.key.repeat_interleave(call.num_key_value_groups, 1)
    scores = call.query @ key.mT * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = call.permitted() if plan is None else visible(call, plan)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks[:, None])
    return (scores - lse[..., None]).exp().nan_to_num(0.0), lse


def calibrated(probs, seen, beta=0.4, thr=0.1, first=0):
    """The definition, as in the paper's code but for what is never a sink: the first token."""
    rows = seen.expand_as(probs).sum(-2).clamp(min=1)
    received = probs.sum(-2) / rows
    sinks = received > thr
    sinks[..., first] = False
    on = (probs * sinks[..., None, :]).sum(-1, keepdim=True)
    # what is lost goes to the others in proportion to what they have
    others = probs + (1 - beta) * on * probs / (1 - on)
    return torch.where(sinks[..., None, :], beta * probs, others), sinks


def values(call):
    return call.value.repeat_interleave(call.num_key_value_groups, 1)


def run(call, plan=None, **options):
    """(out after, out before) with the layer's exact out and lse."""
    probs, lse = probabilities(call, plan)
    out = probs @ values(call)
    if plan is not None:
        call.plans.append((None, None, plan))
    return AttentionCalibration(**EVERY, **options).adjust(call, out, lse), out


CALLS = {
    "mha": lambda: planted(),
    "gqa": lambda: planted(n=61, heads=8, kv_heads=2, batch=2),
    "softcap": lambda: replace(planted(), softcap=3.0),
    "chunk": lambda: replace(c := planted(), query=c.query[:, :, -40:], phase="extend"),
}


@pytest.mark.parametrize("name", CALLS)
def test_fused_is_the_definition(name):
    call = CALLS[name]()
    probs, _ = probabilities(call)
    want, sinks = calibrated(probs, call.permitted())
    assert sinks.any(-1).all()
    got, out = run(call)
    torch.testing.assert_close(got, want @ values(call), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(got, out, atol=1e-3)


def test_rows_keep_their_sum_and_the_others_their_ratios():
    # values that are unit vectors show the weights themselves
    call = planted(n=60)
    call = replace(call, value=torch.eye(60, dtype=torch.float64).expand(1, 4, 60, 60))
    after, before = run(call)
    _, sinks = calibrated(before, call.permitted())
    torch.testing.assert_close(after.sum(-1), torch.ones(1, 4, 60, dtype=torch.float64), atol=1e-10, rtol=0)
    assert after.min() >= 0
    assert (after[..., 0] >= before[..., 0] - 1e-12).all()
    for head in range(4):
        on, others = sinks[0, head], ~sinks[0, head]
        torch.testing.assert_close(after[0, head][:, on], 0.4 * before[0, head][:, on])
        share = after[0, head][:, others] / before[0, head][:, others].clamp(min=1e-300)
        share = share.masked_fill(before[0, head][:, others] == 0, float("nan"))
        assert (share.nan_to_num(-1).amax(-1) - share.nan_to_num(1e9).amin(-1)).max() < 1e-9
        # rows above the first sink see none
        first = int(on.nonzero()[0])
        torch.testing.assert_close(after[0, head, :first], before[0, head, :first], atol=1e-14, rtol=0)


def test_it_is_a_bias_on_the_sinks_that_differs_from_row_to_row():
    call = planted()
    probs, lse = probabilities(call)
    _, sinks = calibrated(probs, call.permitted())
    on = (probs * sinks[..., None, :]).sum(-1, keepdim=True)
    bias = (0.4 * (1 - on) / (1 - 0.4 * on)).log() * sinks[..., None, :]
    biased = (probs.log() + bias).softmax(-1)
    torch.testing.assert_close(run(call)[0], biased @ values(call), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"thr": 2.0}, {"min_rows": 10**6}])
def test_nothing_to_do_changes_no_bit(options):
    got, out = run(planted(), **options)
    assert got is out


def test_beta_zero_deletes_sinks():
    call = planted()
    probs, _ = probabilities(call)
    _, sinks = calibrated(probs, call.permitted())
    left = probs.masked_fill(sinks[..., None, :], 0.0)
    want = left / left.sum(-1, keepdim=True) @ values(call)
    torch.testing.assert_close(run(call, beta=0.0)[0], want, atol=1e-10, rtol=1e-10)


def test_other_heads_keep_their_bits():
    call = replace(planted(heads=8, kv_heads=2), heads=(1, 6))
    got, out = run(call)
    assert torch.equal(got[:, [0, 2, 3, 4, 5, 7]], out[:, [0, 2, 3, 4, 5, 7]])
    whole, _ = run(replace(call, heads=None, plans=[]))
    torch.testing.assert_close(got[:, [1, 6]], whole[:, [1, 6]], atol=1e-12, rtol=1e-12)


def test_relative_thresholds_and_what_is_spared():
    call = planted(n=50)
    probs, _ = probabilities(call)
    assert torch.equal(run(call, thr=5.0, thr_mode="rel")[0], run(replace(call, plans=[]), thr=0.1)[0])
    # the first sink is spared in place of the first token, as in the authors' code
    rows = call.permitted().expand_as(probs).sum(-2)
    sinks = probs.sum(-2) / rows > 0.1
    spared = sinks & (sinks.cumsum(-1) > 1)
    assert not torch.equal(spared[..., 0], sinks[..., 0])
    on = (probs * spared[..., None, :]).sum(-1, keepdim=True)
    want = torch.where(spared[..., None, :], 0.4 * probs, probs * (1 - 0.4 * on) / (1 - on))
    got, _ = run(call, spare="first_sink")
    torch.testing.assert_close(got, want @ values(call), atol=1e-10, rtol=1e-10)
    images = torch.zeros(1, 50, dtype=torch.bool)
    images[:, 7] = True
    some, _ = run(replace(call, image_mask=images, plans=[]), spare_images=True)
    assert not torch.equal(some, run(call)[0])


def test_learned_sinks_are_a_part_of_the_rest():
    call = replace(planted(), sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64))
    probs, _ = probabilities(call)
    want, sinks = calibrated(probs, call.permitted())
    assert sinks.any()
    torch.testing.assert_close(run(call)[0], want @ values(call), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("wide", [False, True])
def test_padding_is_neither_sink_nor_counted(wide):
    call = planted(n=50, heads=4, kv_heads=2, batch=2)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, :6] = False
    real = replace(call, mask=mask)
    padded = replace(real, mask=real.permitted()) if wide else real
    got, _ = run(padded)
    alone = replace(call, query=call.query[:1, :, 6:], key=call.key[:1, :, 6:], value=call.value[:1, :, 6:], plans=[])
    torch.testing.assert_close(got[:1, :, 6:], run(alone)[0], atol=1e-10, rtol=1e-10)
    assert got.isfinite().all()


@pytest.mark.parametrize("thr", [0.1, 0.04])
@pytest.mark.parametrize("q_len", [70, 20])
def test_on_a_sparse_plan_kept_keys_alone_receive_and_give(thr, q_len):
    call, plan = planted(n=70), Window(9, 16)
    call = replace(call, query=call.query[:, :, -q_len:], phase="prefill" if q_len == 70 else "extend")
    probs, _ = probabilities(call, plan)
    want, sinks = calibrated(probs, call.permitted(), thr=thr)
    assert sinks.any()
    got, _ = run(call, plan, thr=thr)
    torch.testing.assert_close(got, want @ values(call), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("plan", [None, Window(5, 60)])
def test_rows_that_are_nearly_all_sink_keep_their_digits(dtype, close, plan):
    """out - output of sinks would be a difference of nearly equal numbers."""
    call = planted(dtype=dtype, dim=32, sinks=(3, 7, 31))
    # the first token is no sink to speak of
    key = call.key.clone()
    key[:, :, 0] *= 0.8
    call = replace(call, query=call.query * 2, key=key)
    wide = call.to(torch.float64)
    probs, lse = probabilities(wide, plan)
    if plan is not None:
        call.plans.append((None, None, plan))
    want, sinks = calibrated(probs, call.permitted(), thr=0.05)
    assert (probs * sinks[..., None, :]).sum(-1).max() > 0.99
    out = (probs @ values(wide)).to(dtype)
    got = AttentionCalibration(**EVERY, thr=0.05).adjust(call, out, lse.float())
    torch.testing.assert_close(got.double(), want @ values(wide), atol=close, rtol=close)


# Decoding -----------------------------------------------------------------------------------------------------------


def steps(call, sizes, method, plan=None, order=None):
    """Outputs of a method that sees `call` in pieces of these sizes on one cache, and its last state."""
    seq, start, outs = SequenceState(), 0, []
    for size in sizes:
        stop = start + size
        phase = "prefill" if start == 0 else "decode" if size == 1 else "extend"
        if order is not None and phase == "decode":
            call = replace(call, query=call.query[order], key=call.key[order], value=call.value[order])
        part = replace(
            call, query=call.query[:, :, start:stop], key=call.key[:, :, :stop], value=call.value[:, :, :stop],
            phase=phase, seq=seq, plans=[],
        )  # fmt: skip
        probs, lse = probabilities(part, plan)
        if plan is not None:
            part.plans.append((None, None, plan))
        outs.append(method.adjust(part, probs @ values(part), lse))
        start = stop
    return outs, seq.store.get((method, 0))


@pytest.mark.parametrize("plan", [None, Window(12, 30)])
def test_running_decode_is_the_last_row_of_one_forward(plan):
    """In the first calibrated layer, where queries and keys are the same in both."""
    call, method = planted(n=80), AttentionCalibration(**EVERY)
    for n in (71, 75, 80):
        whole = replace(call, query=call.query[:, :, :n], key=call.key[:, :, :n], value=call.value[:, :, :n])
        outs, state = steps(whole, [70] + [1] * (n - 70), method, plan)
        (once,), once_state = steps(whole, [n], method, plan)
        torch.testing.assert_close(outs[-1][:, :, 0], once[:, :, -1], atol=1e-10, rtol=1e-10)
        if plan is None:
            torch.testing.assert_close(state.sums, once_state.sums, atol=1e-4, rtol=1e-4)
            assert torch.equal(state.counts, once_state.counts)


def test_a_prompt_in_pieces_counts_all_of_them():
    call, method = planted(n=80), AttentionCalibration(**EVERY)
    outs, state = steps(call, [50, 30], method)
    (once,), once_state = steps(call, [80], method)
    torch.testing.assert_close(state.sums, once_state.sums, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outs[1], once[:, :, 50:], atol=1e-6, rtol=1e-5)


def test_frozen_and_row_and_off():
    call = planted(n=60)
    probs, _ = probabilities(call)
    prompt = replace(call, query=call.query[:, :, :59], key=call.key[:, :, :59], value=call.value[:, :, :59])
    _, sinks = calibrated(probabilities(prompt)[0], prompt.permitted())
    row = probs[:, :, -1:]
    for decode, chosen in {
        "frozen": torch.nn.functional.pad(sinks, (0, 1)),
        "row": (row[:, :, 0] > 0.1) & (torch.arange(60) > 0),
        "off": torch.zeros(1, 4, 60, dtype=torch.bool),
    }.items():
        on = (row * chosen[:, :, None]).sum(-1, keepdim=True)
        want = torch.where(chosen[:, :, None], 0.4 * row, row * (1 - 0.4 * on) / (1 - on)) @ values(call)
        outs, _ = steps(call, [59, 1], AttentionCalibration(**EVERY, decode=decode))
        torch.testing.assert_close(outs[-1], want, atol=1e-6, rtol=1e-5)
        assert decode == "off" or not torch.allclose(want, row @ values(call), atol=1e-3)


def test_state_follows_beams_and_ends_with_a_crop():
    call = planted(n=64, batch=3)
    method, order = AttentionCalibration(**EVERY), torch.tensor([2, 0, 0])
    moved, state = steps(call, [60, 1], method, order=order)
    stays, _ = steps(
        replace(call, query=call.query[order], key=call.key[order], value=call.value[order]), [60, 1], method
    )
    torch.testing.assert_close(moved[-1], stays[-1], atol=1e-10, rtol=1e-10)
    # the same place again, one token earlier: what was counted does not belong to it
    seq = SequenceState(store={(method, 0): state})
    part = replace(call, query=call.query[:, :, 49:50], key=call.key[:, :, :50], value=call.value[:, :, :50], seq=seq)
    probs, lse = probabilities(replace(part, phase="decode"))
    got = method.adjust(replace(part, phase="decode"), probs @ values(part), lse)
    alone = method.adjust(replace(part, phase="decode", seq=SequenceState()), probs @ values(part), lse)
    assert torch.equal(got, alone)


# Heads --------------------------------------------------------------------------------------------------------------

LLAMA = ModelSizes(32, 32, 32, 128)


@pytest.mark.parametrize(
    ("name", "count", "reached"),
    [
        ("llama2-7b-chat-classification", 184, 184),
        ("llama2-7b-chat-multiple-choice", 74, 72),
        ("llama2-7b-chat-mt-bench", 25, 24),
        ("mistral-7b-instruct-v0.2-classification", 16, 16),
    ],
)
def test_published_lists(name, count, reached):
    method = AttentionCalibration(head_list=name)
    assert sum(len(heads) for heads in method._listed().values()) == count
    assert sum(len(heads) for heads in method.chosen_heads(LLAMA, range(32)).values()) == reached
    method.fits(LLAMA)
    with pytest.raises(ConfigError, match="32 layers of 32 query heads; this model has 3 of 4"):
        hfpatch.patch(tiny.tiny("llama"), method)


def test_without_a_list_all_heads_between_the_first_and_last_layers():
    chosen = AttentionCalibration().chosen_heads(LLAMA, range(32))
    assert list(chosen) == list(range(2, 31)) and set(map(len, chosen.values())) == {32}
    with pytest.raises(ConfigError, match="nothing to patch"):
        hfpatch.patch(tiny.tiny("llama"), "act")
    assert set(_PUBLISHED) and list(AttentionCalibration().chosen_heads(LLAMA, (3, 31))) == [3]


def head_file(path, sizes, layers):
    path.write_bytes(encode(Header(HEADS, {"id": "tiny", "type": "LlamaForCausalLM"}, sizes), {"layers": layers}))
    return str(path)


def test_head_files(tmp_path):
    model = tiny.tiny("llama")
    own = ModelSizes(3, 4, 2, 16)
    good = head_file(tmp_path / "heads.json", own, {"1": [0, 3]})
    with hfpatch.patch(model, "act", head_list=good, thr=0.05, skip_first=0) as handle, torch.no_grad():
        model(**tiny.text_inputs(model, length=40))
        assert [(row.layer, row.action) for row in handle.report().layers] == [(1, "adjust")]
    with pytest.raises(ConfigError, match=r"heads.json.*32 layers, 32 query heads; this model has 3 layers, 4 query"):
        hfpatch.patch(model, "act", head_list=head_file(tmp_path / "big-heads.json", LLAMA, {"3": [1]}))
    with pytest.raises(ConfigError, match="layer 1, head 9 does not exist"):
        hfpatch.patch(model, "act", head_list=head_file(tmp_path / "far.json", own, {"1": [9]}), skip_first=0)
    with pytest.raises(ConfigError, match="layer 8, head 0 does not exist"):
        hfpatch.patch(model, "act", head_list=head_file(tmp_path / "deep.json", own, {"8": [0]}), skip_first=0)
    with pytest.raises(ConfigError, match="layers"):
        AttentionCalibration(head_list=head_file(tmp_path / "no.json", own, ["1"]))
    with pytest.raises(DataMissingError, match="no such file"):
        AttentionCalibration(head_list="absent.json")
    with pytest.raises(ConfigError, match=r"neither a .json file nor a published list.*llama2-7b-chat-mt-bench"):
        AttentionCalibration(head_list="llama2")
    (tmp_path / "other.json").write_text(json.dumps({"1": [2]}))
    with pytest.raises(ConfigError, match="not a file that hfpatch calibrate made"):
        AttentionCalibration(head_list=str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match="layer 1, head 7 does not exist"):
        hfpatch.patch(model, "act", heads={1: [7]})


# In a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", ["swa:window=9,sink=3", "flexprefill:gamma=0.6,block_size=4,min_budget=4"])
def test_with_a_sparse_plan_and_scaled_heads_in_one_handle(sparse):
    model = tiny.tiny("qwen2", num_hidden_layers=4)
    what = [sparse, "head_scale:factor=0.5", AttentionCalibration(thr=0.05, skip_first=1, skip_last=1)]
    inputs = tiny.text_inputs(model, batch=3, length=44, padding=[6, 0, 3])
    with torch.no_grad():
        dense = model(**inputs).logits
        with hfpatch.patch(model, what) as handle:
            assert [part.method.name for part in handle.parts][1:] == ["act", "head_scale"]
            batch = model(**inputs).logits
            for row, pad in enumerate((6, 0, 3)):
                alone = model(**{key: value[row : row + 1, pad:] for key, value in inputs.items()}).logits
                torch.testing.assert_close(batch[row : row + 1, pad:], alone, atol=2e-5, rtol=1e-4)
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
            again = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with hfpatch.patch(model, what[:2]):
            without = model(**inputs).logits
        assert torch.equal(written, again)
        assert not torch.allclose(batch, without, atol=1e-3)
        assert torch.equal(model(**inputs).logits, dense)


def test_perplexity_warns_that_later_tokens_take_part():
    from tiny_tokenizer import tiny_tokenizer

    from hfpatch.evals.perplexity import Perplexity

    model, tokenizer = tiny.tiny("llama"), tiny_tokenizer()
    task = Perplexity(lengths=40, samples=1)
    (sample,) = task.draw(tokenizer, task.cells()[0], 0)
    sample = replace(sample, ids=[3 + i % 100 for i in sample.ids])
    with hfpatch.patch(model, "act", **EVERY), pytest.warns(HFPatchWarning, match="act: later tokens of a window"):
        task.run(model, tokenizer, sample)
