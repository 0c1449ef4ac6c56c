"""Properties of single methods, from their specifications."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import tiny
import torch
from transformers import DynamicCache

import hfpatch
from hfpatch.call import AttentionCall, SequenceState
from hfpatch.errors import ConfigError
from hfpatch.kernels import attend, reference
from hfpatch.methods.fastv import FastV
from hfpatch.methods.sa import StochasticAttention, StochasticAttentionPaper
from hfpatch.methods.swa import SlidingWindow, SlidingWindowQuality
from hfpatch.plan import Dense, visible


def call(n, *, q_len=None, heads=2, kv_heads=1, phase="prefill", layer=0, layers=4, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, q_len or n, 8, generator=generator)
    k = torch.randn(1, kv_heads, n, 8, generator=generator)
    v = torch.randn(1, kv_heads, n, 8, generator=generator)
    return AttentionCall(q, k, v, scaling=0.3, phase=phase, layer_idx=layer, num_layers=layers, **rest)


def mask_of(method, one):
    return visible(one, method.plan(one))[0, 0]


# Sliding windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (5, 0), (5, 3), (50, 2), (3, 60)])
def test_window_row_counts(window, sink):
    kept = mask_of(SlidingWindow(window=window, sink=sink), call(40)).sum(-1)
    assert kept.tolist() == [min(i + 1, window) + max(0, min(sink, i - window + 1)) for i in range(40)]


def test_window_of_one_returns_the_value():
    one = call(20)
    out, _ = reference.run(one, SlidingWindow(window=1, sink=0).plan(one))
    torch.testing.assert_close(out, one.value.expand(-1, 2, -1, -1))


def test_block_aligned_window():
    one = call(40)
    assert torch.equal(
        mask_of(SlidingWindow(window=7, sink=2, align="block", block_size=1), one),
        mask_of(SlidingWindow(window=7, sink=2), one),
    )
    kept = mask_of(SlidingWindow(window=8, sink=0, align="block", block_size=4), one).sum(-1)
    assert kept[8:].min() == 5 and kept.max() == 8
    whole = mask_of(SlidingWindow(window=8, sink=3, align="block", block_size=4), call(40))
    # a chunk that starts inside a block sees what the whole prompt's rows see
    chunk = mask_of(SlidingWindow(window=8, sink=3, align="block", block_size=4), call(40, q_len=13, phase="extend"))
    assert torch.equal(chunk, whole[27:])
    assert torch.equal(
        mask_of(SlidingWindow(window=8, sink=3, align="block", block_size=4), call(40, q_len=1, phase="decode")),
        whole[-1:],
    )


def test_full_layers_and_full_decode():
    method = SlidingWindowQuality(window=4, sink=0)
    assert [isinstance(method.plan(call(20, layer=i)), Dense) for i in range(4)] == [False, True, False, True]
    assert isinstance(method.plan(call(20, q_len=1, phase="decode")), Dense)
    with pytest.raises(ConfigError, match="layer 9"):
        SlidingWindow(full_layers="9").plan(call(20))
    assert not SlidingWindow(window=4).full_decode and SlidingWindow(window=4, full_layers="odd").full_decode
    assert not SlidingWindow(window=4, full_layers="odd", decode="mask").full_decode


def test_window_equals_a_natively_sliding_model():
    native = tiny.tiny("mistral", sliding_window=6)
    plain = tiny.tiny("mistral")
    plain.load_state_dict(native.state_dict())
    inputs = tiny.text_inputs(plain, length=40)
    with torch.no_grad(), hfpatch.patch(plain, "swa", window=6, sink=0):
        torch.testing.assert_close(plain(**inputs).logits, native(**inputs).logits)


def test_receptive_field_grows_by_one_window_a_layer():
    reach = torch.eye(60)
    step = mask_of(SlidingWindow(window=5, sink=0), call(60)).float()
    for layer in range(1, 5):
        reach = ((step @ reach) > 0).float()
        assert int(reach[-1].sum()) == layer * 4 + 1


# Stochastic attention -------------------------------------------------------------------------------------------------


def test_sa_is_causal_and_never_empty():
    for options in StochasticAttention.examples:
        for layer in range(3):
            one = call(41, layer=layer, kv_heads=2)
            mask = visible(one, StochasticAttention(**options).plan(one))[0]
            assert not mask.triu(1).any() and mask.diagonal(0, -2, -1).all()


def test_sa_mean_keys():
    n, window = 1024, 64
    half = window // 2
    share = half * (2 * n - half - 1) / (n * (n - 1))
    seen = [mask_of(StochasticAttentionPaper(window=window), call(n, layer=i)).sum(-1).float().mean() for i in range(4)]
    assert np.mean(seen) == pytest.approx(1 + share * (n - 1) / 2, rel=0.05)
    one_sided = (
        mask_of(StochasticAttentionPaper(window=window, window_mode="one_sided"), call(n)).sum(-1).float().mean()
    )
    assert float(one_sided) == pytest.approx(np.mean(seen), rel=0.06)


def test_sa_reaches_everything_in_few_layers():
    n = 1024
    reach = torch.eye(n)
    for layer in range(5):
        step = mask_of(StochasticAttention(window=64, local=32, sink=0, seed=3), call(n, layer=layer)).float()
        reach = ((step @ reach) > 0).float()
        if bool(reach[-1].all()):
            break
    assert layer <= 4
    assert math.ceil((n - 1) / 63) > 10  # layers that a plain window of 64 would need


def test_sa_layers_differ_and_lengths_are_reproducible():
    method = StochasticAttention(window=8, local=0, sink=0)
    assert not torch.equal(mask_of(method, call(50, layer=0)), mask_of(method, call(50, layer=1)))
    assert torch.equal(mask_of(method, call(50)), mask_of(StochasticAttention(window=8, local=0, sink=0), call(50)))


def test_sa_resampling_follows_the_forward_counter():
    method = StochasticAttention(window=8, local=0, sink=0, resample="forward")
    masks = [mask_of(method, call(50, seq=SequenceState(forwards=n))) for n in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_sa_hash_order_keeps_old_tokens_in_order():
    order = {n: StochasticAttention(order="hash").plan(call(n)).order[0].tolist() for n in (40, 60)}
    assert [t for t in order[60] if t < 40] == order[40]
    assert order[40] != sorted(order[40])


def test_sa_decodes_over_the_whole_cache_or_a_few_keys():
    one = call(200, q_len=1, phase="decode")
    assert isinstance(StochasticAttention().plan(one), Dense)
    hybrid = StochasticAttention(window=16, local=8, sink=2, decode="hybrid")
    kept = mask_of(hybrid, one)[0]
    assert int(kept.sum()) == 16 + 8 + 2 and kept[:2].all() and kept[-8:].all()
    out, _ = attend(one, hybrid.plan(one))
    torch.testing.assert_close(out, reference.run(one, hybrid.plan(one))[0])


def test_sa_full_decode_step_equals_dense_on_the_same_cache():
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=40)
    key = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    with torch.no_grad(), hfpatch.patch(model, "sa", window=8) as handle:
        cache = DynamicCache(config=model.config)
        model(**inputs, **{key: cache})
        token = {"input_ids": inputs["input_ids"][:, :1]}
        got = model(**token, **{key: cache}).logits
        cache.crop(-1)
        handle.disable()
        torch.testing.assert_close(model(**token, **{key: cache}).logits, got)


def test_sa_refuses_what_blocks_cannot_do():
    with pytest.raises(ConfigError, match='granularity="token"'):
        StochasticAttention(granularity="block", per_head=True)


# FastV ----------------------------------------------------------------------------------------------------------------


def kept_slots(model, inputs, **options):
    """What FastV keeps, by asking it with the attention call of its layer."""
    seen = []
    method = FastV(**options)
    original = FastV.prune

    def spy(self, one):
        seen.append((one, original(self, one)))
        return seen[-1][1]

    FastV.prune = spy
    try:
        with hfpatch.patch(model, method), torch.no_grad():
            out = model(**inputs).logits
    finally:
        FastV.prune = original
    return seen[0][0], seen[0][1], out


def test_fastv_keeps_text_and_the_best_image_tokens():
    model = tiny.tiny("llava", num_hidden_layers=4)
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 3])
    one, kept, _ = kept_slots(model, inputs, layer=2, keep=0.25)
    image = inputs["input_ids"] == model.config.image_token_id
    scores = one.query[:, :, -1:].float() @ one.key.repeat_interleave(one.num_key_value_groups, 1).mT * one.scaling
    scores = scores.masked_fill(~inputs["attention_mask"].bool()[:, None, None], float("-inf"))
    scores = scores.softmax(-1).mean(1)[:, 0]
    for row in range(2):
        slots = kept[row].tolist()
        assert slots == sorted(slots)
        assert set((~image[row]).nonzero().flatten().tolist()) <= set(slots)
        chosen = [s for s in slots if image[row, s]]
        count = round(int(image[row].sum()) * 0.25)
        best = scores[row].masked_fill(~image[row], -1).topk(count).indices
        assert sorted(best.tolist()) == chosen


def test_fastv_equals_running_later_layers_on_the_kept_tokens():
    """Layers before `layer` on the whole prompt, the others on kept tokens with their old positions."""
    model = tiny.tiny("llava", num_hidden_layers=4)
    inputs = tiny.vlm_inputs("llava", model)
    _, kept, got = kept_slots(model, inputs, layer=2, keep=0.5)
    text = model.model.language_model
    n = inputs["input_ids"].shape[1]
    grabbed = []
    hook = text.layers[2].register_forward_pre_hook(lambda m, a, k: grabbed.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        (hidden,), kwargs = grabbed[0]
        cos, sin = (x[:, kept[0]] for x in kwargs["position_embeddings"])
        hidden = hidden[:, kept[0]]
        for layer in text.layers[2:]:
            hidden = layer(hidden, position_embeddings=(cos, sin), attention_mask=None)
        want = model.lm_head(text.norm(hidden))
    torch.testing.assert_close(got[:, kept[0]], want)
    assert got.shape[1] == n


def test_fastv_caches_shrink_after_the_layer():
    model = tiny.tiny("llava", num_hidden_layers=4)
    inputs = tiny.vlm_inputs("llava", model)
    images = int((inputs["input_ids"] == model.config.image_token_id).sum())
    n = inputs["input_ids"].shape[1]
    with hfpatch.patch(model, "fastv", layer=2, keep=0.5), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = out.get("cache") or out.past_key_values
    lost = images - round(images * 0.5)
    assert [layer.keys.shape[2] - 3 for layer in cache.layers] == [n, n, n - lost, n - lost]


def test_fastv_leaves_text_prompts_alone():
    model = tiny.tiny("llava", num_hidden_layers=4)
    inputs = tiny.text_inputs(model, length=20)
    with torch.no_grad():
        want = model(**inputs).logits
        with hfpatch.patch(model, "fastv"):
            assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("layer", [4, 9])
def test_fastv_layer_outside_the_model(layer):
    with pytest.raises(ConfigError, match="cannot prune after layer"):
        hfpatch.patch(tiny.tiny("llava", num_hidden_layers=4), "fastv", layer=layer)
