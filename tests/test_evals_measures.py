"""What the numbers mean: generation, fidelity, decode timing and memory on tiny models, and the kernel bench."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import NAMES, text_inputs, tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch import kernels
from hfpatch.errors import ConfigError, HFPatchError, UnknownNameError
from hfpatch.evals import arms, generation, kernel_bench, latency, logits, memory
from hfpatch.evals.fidelity import Fidelity
from hfpatch.evals.kernel_bench import bench_kernels, random_blocks
from hfpatch.kernels import reference
from hfpatch.patch import patch as put_on

SIZE = {"vocab_size": 512}


@pytest.fixture
def model():
    return tiny("llama", **SIZE)


# Generation -----------------------------------------------------------------------------------------------------------


def test_greedy_is_what_generate_gives(model):
    ids = text_inputs(model)["input_ids"]
    want = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    (made,) = generation.greedy(model, tiny_tokenizer(), [ids[0].tolist()], 8)
    assert made.tokens == want.tolist() and made.finish == "length"
    assert made.text == tiny_tokenizer().decode(want) and made.prefill_ms > 0 and made.decode_ms > 0


def test_left_padded_batch_equals_singles(model):
    prompts = [list(range(5, 5 + n)) for n in (3, 17, 9)]
    batch = generation.greedy(model, tiny_tokenizer(), prompts, 6)
    singles = [generation.greedy(model, tiny_tokenizer(), [p], 6)[0] for p in prompts]
    assert [made.tokens for made in batch] == [made.tokens for made in singles]


def test_eos_ends_an_answer(model):
    prompt = text_inputs(model)["input_ids"][0].tolist()
    (free,) = generation.greedy(model, tiny_tokenizer(), [prompt], 8)
    stop = free.tokens[5]
    model.generation_config.eos_token_id = [stop]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (made,) = generation.greedy(model, tiny_tokenizer(), [prompt], 8)
    assert len(calls) == len(made.tokens) + 1
    assert made.finish == "eos" and made.tokens == free.tokens[: free.tokens.index(stop)]


# Fidelity -------------------------------------------------------------------------------------------------------------


def fidelity(model, handle, **options):
    task = Fidelity(lengths=96, samples=1, **options)
    (sample,) = task.draw(tiny_tokenizer(), task.cells()[0], 0)
    return sample, task.compare(model, handle, tiny_tokenizer(), sample)


def test_identical_arms(model):
    with put_on(model, "swa:window=4096", kernel="reference") as handle:
        _, outcomes = fidelity(model, handle)
    scores = outcomes["patched"].scores
    assert scores["kl_last"] == pytest.approx(0, abs=1e-6) and scores["top1_agree"] == 1.0
    assert scores["attn_cosine_mean"] == pytest.approx(1, abs=1e-6)
    assert scores["ppl_delta"] == pytest.approx(0, abs=1e-2)
    assert scores["ppl_dense"] == outcomes["dense"].scores["ppl_dense"]


def test_numbers_against_plain_formulas(model):
    with put_on(model, "swa:window=8", kernel="reference") as handle:
        sample, outcomes = fidelity(model, handle, score_tokens=20)
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            patched = model(ids).logits[0].double().log_softmax(-1)
            with handle.disabled():
                dense = model(ids).logits[0].double().log_softmax(-1)
    scores, cosine = outcomes["patched"].scores, outcomes["patched"].extra["per_layer"]["attn_cosine"]

    def perplexity(log_probs):
        return math.exp(-sum(log_probs[i - 1, ids[0, i]].item() for i in range(76, 96)) / 20)

    assert scores["ppl_dense"] == pytest.approx(perplexity(dense), rel=1e-4)
    assert scores["ppl_patched"] == pytest.approx(perplexity(patched), rel=1e-4)
    assert scores["kl_last"] == pytest.approx((dense[-1].exp() * (dense[-1] - patched[-1])).sum().item(), rel=1e-3)
    agree = (dense[-21:].argmax(-1) == patched[-21:].argmax(-1)).double().mean().item()
    assert scores["top1_agree"] == pytest.approx(agree)
    assert len(cosine) == 3 and all(-1 <= c < 0.999 for c in cosine)
    assert scores["attn_cosine_mean"] == pytest.approx(sum(cosine) / 3)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_were_not_patched_and_see_the_same_input_agree(model):
    with put_on(model, "swa:window=8", layers=[2], kernel="reference") as handle:
        _, outcomes = fidelity(model, handle)
    cosine = outcomes["patched"].extra["per_layer"]["attn_cosine"]
    assert cosine[:2] == pytest.approx([1, 1]) and cosine[2] < 0.999


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_agreement_along_positions_against_plain_formulas(name, monkeypatch):
    """In pieces of 5 rows, which no part of 12 is made of; gemma2 caps its logits after the head."""
    monkeypatch.setattr(logits, "_AT_ONCE", 5 * 512)
    model = tiny(name, **SIZE)
    with put_on(model, "swa:window=30", kernel="reference") as handle:
        sample, outcomes = fidelity(model, handle)
        with torch.no_grad():
            patched = model(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1)
            with handle.disabled():
                dense = model(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1)
    along = outcomes["patched"].extra["per_position"]
    kl = (dense.exp() * (dense - patched)).sum(-1).reshape(8, 12).mean(-1)
    agree = (dense.argmax(-1) == patched.argmax(-1)).double().reshape(8, 12).mean(-1)
    assert along["start"] == list(range(0, 96, 12))
    assert along["kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
    assert along["top1"] == pytest.approx(agree.tolist())
    # the window covers the first two parts, and nothing else
    assert max(along["kl"][:2]) < 1e-6 < 1e-3 < min(along["kl"][3:]) and along["top1"][:2] == [1, 1]
    assert outcomes["dense"].extra == {}


def test_parts_of_a_window_may_be_unequal_fewer_or_none(model):
    with put_on(model, "swa:window=8", kernel="reference") as handle:
        _, outcomes = fidelity(model, handle, positions=7)
        assert outcomes["patched"].extra["per_position"]["start"] == [0, 13, 27, 41, 54, 68, 82]
        _, without = fidelity(model, handle, positions=0)
        assert without["patched"].scores == pytest.approx(outcomes["patched"].scores)
        assert "per_position" not in without["patched"].extra
        task = Fidelity(lengths=3, samples=1)
        (sample,) = task.draw(tiny_tokenizer(), {"length": 3}, 0)
        along = task.compare(model, handle, tiny_tokenizer(), sample)["patched"].extra["per_position"]
    assert along["start"] == [0, 1, 2] and along["top1"] == [1, 1, 1]


def test_fidelity_never_makes_all_logits_at_once(model, monkeypatch):
    monkeypatch.setattr(logits, "_AT_ONCE", 8 * 512)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    with put_on(model, "swa:window=8") as handle:
        fidelity(model, handle)
    assert max(seen) == 8


def test_windows_are_neighbours_of_one_text_and_scores_need_no_patch(model):
    task = Fidelity(lengths="64", samples=2)
    first, second = task.draw(tiny_tokenizer(), task.cells()[0], 0)
    assert len(first.ids) == len(second.ids) == 64 and first.ids != second.ids
    assert set(task.compare(model, None, tiny_tokenizer(), first)) == {"dense"}


# Timing and memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_decode_leaves_the_cache_as_it_was(name):
    model = tiny(name)
    tokens = text_inputs(model, length=40)["input_ids"]
    _, cache, token = latency.prefill(model, tokens)
    before = memory.kv_bytes(cache)
    first = model(input_ids=token, **{generation.cache_argument(model): cache}, logits_to_keep=1).logits
    _, cache, token = latency.prefill(model, tokens)
    latency.decode(model, cache, token, 5)
    assert memory.kv_bytes(cache) == before
    again = model(input_ids=token, **{generation.cache_argument(model): cache}, logits_to_keep=1).logits
    assert torch.equal(first, again)


def test_peak_sees_what_is_allocated_and_freed_inside():
    with memory.Peak(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20).sum()
    assert 250 * 2**20 < peak.bytes < 400 * 2**20


def test_best_dense_is_put_on_the_text_part_only():
    model = tiny("llava", attn_implementation="eager")
    latency.use_best_dense(model)
    assert latency.dense_name(model) == "sdpa" and model.config.vision_config._attn_implementation == "eager"


def test_dense_name_of_a_patched_model(model):
    with put_on(model, "swa:window=8"):
        assert latency.dense_name(model) == "sdpa"


def test_layer_totals_weigh_by_calls():
    row = {"layer": 0, "phase": "prefill", "action": "Window", "kernel": "sdpa", "refused": {}}
    totals = arms.LayerTotals([{**row, "calls": 1, "density": 0.2}])
    totals.add([{**row, "calls": 3, "density": 0.4}, {**row, "layer": 1, "calls": 2, "density": None}])
    (first, second) = totals.rows()
    assert (first["calls"], first["density"]) == (4, pytest.approx(0.35))
    assert (second["calls"], second["density"]) == (2, None)


# Kernels --------------------------------------------------------------------------------------------------------------

SHAPE = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "block": 32, "repeats": 2, "warmup": 1}


def test_kernel_bench_rows_are_finite_and_consistent():
    rows = bench_kernels((300,), "fp32", densities=(0.3, 0.6, 1), kernels=("reference", "sdpa"), **SHAPE)
    assert [(r["kernel"], r["density_asked"]) for r in rows] == [
        (k, d) for d in (0.3, 0.6, 1) for k in ("reference", "sdpa")
    ]
    assert rows[-1]["density"] == 1
    for row in rows:
        assert row["refused"] is None and row["error"] <= row["error_allowed"]
        assert all(math.isfinite(row[k]) and row[k] > 0 for k in ("dense_ms", "kernel_ms", "speedup", "efficiency"))
        assert row["efficiency"] == pytest.approx(row["dense_ms"] * row["density"] / row["kernel_ms"])
        assert row["density"] == pytest.approx(row["density_asked"], abs=0.03)


def test_random_blocks_hold_block_zero_and_the_diagonal():
    from hfpatch.call import AttentionCall

    call = AttentionCall(torch.empty(1, 4, 500, 16), torch.empty(1, 2, 500, 16), torch.empty(1, 2, 500, 16))
    plan = random_blocks(call, 0.4, 32, seed=1)
    assert plan.blk_idx.shape[1] == 2 and not torch.equal(plan.blk_idx[:, 0], plan.blk_idx[:, 1])
    for head in range(2):
        for row in range(16):
            listed = plan.blk_idx[0, head, row, : plan.blk_cnt[0, head, row]].tolist()
            assert listed == sorted(set(listed)) and listed[0] == 0 and listed[-1] == row
    assert float(plan.density(call)) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("name", ["cpu_blocks", "cpu_blocks torch", "reference"])
def test_peak_memory_tells_a_kernel_that_is_quadratic(name, monkeypatch):
    kernel, _, torch_loop = name.partition(" ")
    if torch_loop:
        monkeypatch.setattr("hfpatch.kernels.cpu_compiled.why_not", lambda *_: "not in this test")
    monkeypatch.setattr(kernel_bench, "_check_result", lambda *_: {})
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "block": 64, "repeats": 1, "warmup": 0}
    (row,) = bench_kernels((4096,), "fp32", densities=(0.2,), kernels=(kernel,), **shape)
    # q, k, v and out
    linear = 4 * 4096 * 64 * (4 + 2 + 2 + 4) / 2**20
    if kernel == "reference":
        # fp32 scores of four heads
        assert row["extra_mb"] > 4 * 4 * 4096**2 / 2**20
    else:
        assert row["extra_mb"] < 2 * linear


def test_a_kernel_that_declines_has_its_reason(monkeypatch):
    monkeypatch.setattr(reference, "why_not", lambda call, plan: "not today")
    (row,) = bench_kernels((64,), "fp32", densities=(0.5,), kernels=("reference",), **SHAPE)
    assert row["refused"] == "not today" and "kernel_ms" not in row


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = kernels.load("sdpa").run
    monkeypatch.setattr(kernels.load("sdpa"), "run", lambda call, plan: (right(call, plan)[0] + 0.1, None))
    with pytest.raises(HFPatchError, match="kernel sdpa is wrong"):
        bench_kernels((64,), "fp32", densities=(0.5,), kernels=("sdpa",), **SHAPE)


def test_kernel_bench_refuses_nonsense():
    with pytest.raises(UnknownNameError, match="unknown kernel 'cuda'"):
        bench_kernels((64,), kernels=("cuda",))
    for wrong in ({"dtype": "int8"}, {"q_heads": 3}, {"densities": (1.5,)}, {"lists": "none"}):
        with pytest.raises(ConfigError):
            bench_kernels((64,), **wrong)
