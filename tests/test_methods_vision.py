"""Properties of the methods that drop image tokens, and their equality with runs on the kept tokens alone."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from transformers import DynamicCache

import hfpatch
from hfpatch.call import AttentionCall
from hfpatch.costs import ImageCost, LayerCost
from hfpatch.errors import ConfigError, ConflictError, HFPatchError, HFPatchWarning, UnsupportedError
from hfpatch.images import Embedded, Tower, text_mask
from hfpatch.methods.adaptinfer import AdaptInfer
from hfpatch.methods.divprune import most_distant
from hfpatch.methods.fastv import FastV
from hfpatch.methods.pyramiddrop import PyramidDrop
from hfpatch.methods.sparsevlm import SparseVLM, cluster, raters
from hfpatch.methods.visionzip import VisionZip, zipped
from hfpatch.methods.vispruner import important_and_diverse

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
INSIDE = [
    FastV(layer=2, keep=0.5),
    AdaptInfer(after=(0, 2), counts=(9, 4)),
    AdaptInfer(after=(0, 2), counts=(9, 4), positions="compact"),
    AdaptInfer(keep=0.3),
    PyramidDrop(before=(1, 3), ratios=(0.5, 0.25)),
    PyramidDrop(before=(2, 3), ratios=(0.5, 0.25), positions="compact"),
    SparseVLM(after=(0, 2), counts=(8, 3), recycle=False),
]
ZIP, VISPRUNER, RANDOM = "visionzip:dominant=4,contextual=3", "vispruner:keep=0.4", "random_drop:keep=0.4"
BEFORE = ["divprune:keep=0.4", "divprune:keep=0.4,positions=original", RANDOM, f"{RANDOM},positions=compact"]
BEFORE += [VISPRUNER, ZIP]


def llava(seed=0, **overrides):
    return tiny.tiny("llava", seed=seed, num_hidden_layers=5, **overrides)


def logits(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more).logits


def engine_of(model):
    return vars(model)["_hfpatch"].engine


def state_of(model):
    """What is known of the newest sequence."""
    return list(engine_of(model).states.values())[-1]


def cache_name(model):
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def embedded(model, inputs):
    """The prompt as the language model gets it: [B, n, width]."""
    seen = []
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    logits(model, inputs)
    hook.remove()
    return seen[0]


def reference(model, embeds, kept, compact=False):
    """Logits of one sequence [1, n, width], where layer l computes with the slots kept[l] only."""
    text = model.model.language_model
    n = embeds.shape[1]
    current, hidden = torch.arange(n), embeds
    for index, layer in enumerate(text.layers):
        slots = kept.get(index, current)
        hidden = hidden[:, torch.isin(current, slots)]
        current = slots
        positions = torch.arange(len(current)) if compact else current
        rope = text.rotary_emb(hidden, positions[None])
        hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
    return model.lm_head(text.norm(hidden))


# Inside the language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", INSIDE, ids=str)
@torch.no_grad()
def test_every_step_equals_dense_layers_on_the_kept_tokens(method):
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    compact = getattr(method, "positions", "original") == "compact"
    with hfpatch.patch(model, method):
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        prompt = dict(state_of(model).kept)
    n = inputs["input_ids"].shape[1]
    assert prompt, "nothing was pruned"
    start = embedded(model, inputs)
    for step, got in enumerate(out.logits):
        told = model.get_input_embeddings()(out.sequences[:, n : n + step])
        kept = {layer: torch.cat([slots[0], torch.arange(n, n + step)]) for layer, slots in prompt.items()}
        want = reference(model, torch.cat([start, told], 1), kept, compact)
        torch.testing.assert_close(got, want[:, -1], **CLOSE)


@pytest.mark.parametrize("method", INSIDE, ids=str)
@torch.no_grad()
def test_kept_slots_are_nested_sorted_and_hold_all_text(method):
    model = llava()
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 3])
    with hfpatch.patch(model, method):
        out = model(**inputs)
        kept = state_of(model).kept
    assert out.logits.shape[1] == inputs["input_ids"].shape[1]
    image = inputs["input_ids"] == model.config.image_token_id
    stages = dict(method.stages(5, tiny.IMAGE_TOKENS))
    left = tiny.IMAGE_TOKENS
    for layer in range(5):
        left = stages.get(layer - 1, left)
        if left == tiny.IMAGE_TOKENS:
            assert layer not in kept
            continue
        for row in range(2):
            slots = kept[layer][row].tolist()
            assert slots == sorted(set(slots))
            assert set((~image[row]).nonzero().flatten().tolist()) <= set(slots)
            assert len(slots) - int((~image[row]).sum()) == left
            if layer - 1 in kept:
                assert set(slots) <= set(kept[layer - 1][row].tolist())


@torch.no_grad()
def test_caches_hold_what_each_layer_had():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    n, new = inputs["input_ids"].shape[1], GREEDY["max_new_tokens"] - 1
    lengths = {}
    for method in (INSIDE[1], INSIDE[4]):
        with hfpatch.patch(model, method):
            out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = out.get("cache") or out.past_key_values
        lengths[method.name] = [layer.keys.shape[2] - new - n + 16 for layer in cache.layers]
    # layer 0 prunes after itself, and keeps its own cache; PyramidDrop's layers are short themselves
    assert lengths == {"adaptinfer": [16, 9, 9, 4, 4], "pyramiddrop": [16, 8, 8, 4, 4]}


@pytest.mark.parametrize("method", INSIDE, ids=str)
@torch.no_grad()
def test_eager_and_sdpa_keep_the_same(method):
    kept = []
    for attn in ("eager", "sdpa"):
        model = llava(attn_implementation=attn)
        inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[2, 0])
        with hfpatch.patch(model, method):
            out = model(**inputs)
            kept.append((state_of(model).kept, out))
    assert kept[0][0].keys() == kept[1][0].keys()
    assert all(torch.equal(kept[0][0][layer], kept[1][0][layer]) for layer in kept[0][0])


@torch.no_grad()
def test_two_turns_on_one_cache():
    """A second question sees what the first has left; nothing more is pruned."""
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    later = torch.randint(3, 120, (1, 6), generator=torch.Generator().manual_seed(3))
    for method in ("adaptinfer:keep=0.3", "adaptinfer:keep=0.3,positions=compact", *BEFORE):
        with hfpatch.patch(model, method):
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, later], 1)
            cache = first.get("cache") or first.past_key_values
            options = {"attention_mask": torch.ones_like(ids), cache_name(model): cache}
            got = model.generate(ids, **GREEDY, **options, return_dict_in_generate=True)
            # the same by plain calls: the prompt, then the first answer, then the second question token by token
            cache = DynamicCache(config=model.config.get_text_config())
            said = model(**inputs, **{cache_name(model): cache}).logits
            for token in ids[:, inputs["input_ids"].shape[1] :].split(1, 1):
                said = model(token, **{cache_name(model): cache}).logits
            told = []
            for _ in range(5):
                told.append(int(said[0, -1].argmax()))
                said = model(torch.tensor([[told[-1]]]), **{cache_name(model): cache}).logits
            assert got.sequences[0, ids.shape[1] :].tolist() == told, method


def test_text_prompts_pass_untouched():
    model = llava()
    inputs = tiny.text_inputs(model, length=20)
    want = logits(model, inputs)
    for method in [*map(str, ("fastv", "adaptinfer", "pyramiddrop", "sparsevlm")), *BEFORE]:
        with hfpatch.patch(model, method) as handle:
            assert torch.equal(logits(model, inputs), want)
            assert handle.report().images is None


# AdaptInfer ----------------------------------------------------------------------------------------------------------


def call_of(n=20, images=slice(3, 11), heads=4, seed=0, layer=0, layers=4, **rest):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, n, 8, generator=generator)
    k = torch.randn(1, heads // 2, n, 8, generator=generator)
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[:, images] = True
    return AttentionCall(
        q, k, k, scaling=0.5, image_mask=mask, layer_idx=layer, num_layers=layers, phase="prefill", **rest
    )


def full_map(call):
    scores = call.query @ call.key.repeat_interleave(2, 1).mT * call.scaling
    return scores.masked_fill(~call.causal(), float("-inf")).softmax(-1)


def test_adaptinfer_scores_from_the_whole_attention_map():
    call = call_of()
    a, text, images = full_map(call)[0], slice(11, 20), slice(3, 11)
    want = torch.zeros(8)
    for h in range(4):
        among = a[h, text, text]
        weight = [sum(among[i, j] + among[j, i] * (i != j) for i in range(9)) for j in range(9)]
        want += sum(weight[j] * a[h, 11 + j, images] for j in range(9))
    torch.testing.assert_close(AdaptInfer().scores(call)[0, images], want, atol=1e-5, rtol=1e-5)


def test_adaptinfer_without_prior_ranks_by_summed_attention():
    call = call_of()
    plain = full_map(call)[0][:, 11:, 3:11].sum((0, 1))
    got = AdaptInfer(prior=0.0).scores(call)[0, 3:11]
    torch.testing.assert_close(got / got.sum(), plain / plain.sum())
    between = AdaptInfer(prior=0.5).scores(call)[0, 3:11]
    assert not torch.allclose(between / between.sum(), plain / plain.sum(), rtol=1e-3)


def test_adaptinfer_with_one_row_weighs_it_by_its_own_attention():
    call = call_of(images=slice(3, 19))
    a = full_map(call)[0][:, 19]
    want = (a[:, 19:] * a[:, 3:19]).sum(0)
    torch.testing.assert_close(AdaptInfer().scores(call)[0, 3:19], want, atol=1e-6, rtol=1e-5)


def test_adaptinfer_heads_can_count_the_same():
    call = call_of()
    assert float(AdaptInfer(head_norm=True).scores(call)[0, 3:11].sum()) == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("method", [AdaptInfer(after=(0,), counts=(1,)), FastV(layer=1, keep=0.125)], ids=str)
def test_a_token_that_gets_all_attention_stays(method):
    call = call_of()
    key = call.key.clone()
    # along every text query, so that all heads look at it
    key[:, :, 5] = 40 * call.query[:, :, 11:].mean((1, 2))[:, None] + 0 * key[:, :, 5]
    query = call.query.mean((1, 2), keepdim=True) + 0.01 * call.query
    planted = AttentionCall(query, key, key, scaling=0.5, image_mask=call.image_mask, num_layers=4, phase="prefill")
    planted.key[:, :, 5] = 40 * query[:, :1, -1]
    kept = method.prune(planted)[0].tolist()
    assert 5 in kept and len(kept) == 20 - 8 + 1


def test_adaptinfer_schedules():
    published = {192: (455, 114, 28), 128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}
    for budget, counts in published.items():
        assert dict(AdaptInfer(budget=budget).stages(32, 576)) == dict(zip((1, 10, 20), counts, strict=True))
    assert dict(AdaptInfer().stages(32, 576)) == {1: 133, 10: 27, 20: 3}
    assert dict(AdaptInfer(budget=128).stages(40, 576)) == {1: 300, 11: 94, 21: 30}
    assert dict(AdaptInfer(budget=64).stages(40, 576)) == {1: 148, 11: 40, 21: 5}
    qwen = AdaptInfer(after=(0, 9, 19), ratios=(0.17, 0.6, 0.3))
    stages = dict(qwen.stages(28, 1000))
    assert stages == {0: 170, 9: 102, 19: 30}
    # published as 10.1 %
    average = (9 * 170 + 10 * 102 + 9 * 30) / 28 / 1000
    assert average == pytest.approx(0.101, abs=1e-3)
    for layers, images, keep in ((28, 256, 0.2), (4, 64, 0.22), (48, 1000, 0.9)):
        stages = dict(AdaptInfer(keep=keep).stages(layers, images))
        left, total = images, 0
        for layer in range(layers):
            left = stages.get(layer, left)
            total += left
        assert total / layers / images == pytest.approx(keep, abs=0.01)


def test_more_tokens_than_there_are_keeps_all():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    want = logits(model, inputs)
    for method in (
        "adaptinfer:budget=576",
        AdaptInfer(after=(1, 2), counts=(99, 50)),
        SparseVLM(after=(1,), counts=(99,)),
        "visionzip:dominant=54,contextual=10",
    ):
        with hfpatch.patch(model, method):
            assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.2, "budget": 64}, "Give one of them"),
        ({"counts": [3, 2]}, "counts need after"),
        ({"ratios": [0.5]}, "ratios need after"),
        ({"after": [3, 1], "counts": [4, 2]}, "must ascend"),
        ({"after": [1, 3], "counts": [4]}, "1 entries for 2 layers"),
        ({"after": [1], "ratios": [1.5]}, "ratios lie in"),
    ],
)
def test_adaptinfer_refuses_contradictions(options, said):
    with pytest.raises(ConfigError, match=said):
        AdaptInfer.from_options(options)


def test_out_of_reach_is_said_when_put_on():
    model = llava()
    with pytest.raises(ConfigError, match="cannot be reached"):
        hfpatch.patch(model, "adaptinfer", keep=0.1, after=[1, 3])
    with pytest.raises(ConfigError, match="cannot prune after layer 4"):
        hfpatch.patch(model, "adaptinfer", after=[2, 4], counts=[3, 2])
    with pytest.raises(ConfigError, match="layer 0 holds the whole prompt"):
        PyramidDrop(before=(0, 2), ratios=(0.5, 0.2))
    assert not hfpatch.is_patched(model)


def test_two_pruners_after_one_layer_conflict():
    model = llava()
    with hfpatch.patch(model, "fastv", layer=1), pytest.raises(ConflictError, match="both prune after layers 0"):
        hfpatch.patch(model, AdaptInfer(after=(0, 2), counts=(5, 3)))


# PyramidDrop, SparseVLM ----------------------------------------------------------------------------------------------


def test_pyramiddrop_counts():
    assert dict(PyramidDrop().stages(32, 576)) == dict(PyramidDrop().stages(40, 576)) == {7: 288, 15: 144, 23: 72}
    cost = ImageCost.forecast(LayerCost(8, 8, 8, 8, 2), 640, 576, 32, PyramidDrop().stages(32, 576))
    assert cost.computed == 270


@torch.no_grad()
def test_pyramiddrop_goes_by_the_next_layers_attention():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    eager = llava(attn_implementation="eager")
    a = eager(**inputs, output_attentions=True).attentions[2][0, :, -1].mean(0)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    want = image[a[image].topk(6).indices].sort().values
    with hfpatch.patch(model, "pyramiddrop", before=[2], ratios=[6 / 16]):
        out = model(**inputs)
        kept = state_of(model).kept[2][0]
    assert out is not None
    assert torch.equal(kept[torch.isin(kept, image)], want)


def test_sparsevlm_counts_with_what_comes_back():
    # of 510 dropped ones 154 are clustered into 16
    assert dict(SparseVLM(after=(2, 6, 15), counts=(66, 30, 17)).stages(32, 576))[2] == 66 + 16
    assert dict(SparseVLM(recycle=False, keep=1 / 9).stages(32, 576)) == {2: 66, 6: 30, 15: 17}
    method = SparseVLM(after=(1,), counts=(4,))
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    with hfpatch.patch(model, method) as handle:
        logits(model, inputs)
        report = handle.report()
    n = inputs["input_ids"].shape[1]
    # 12 dropped: 4 of them make one cluster
    assert report.layers[0].action == f"prune to {n - 12 + 1} tokens"
    assert report.images.average == pytest.approx((16 + 4 * 5) / 5)


@torch.no_grad()
def test_sparsevlm_merged_tokens_are_means_where_a_centre_stood():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    seen = []
    hooks = [
        model.model.language_model.layers[layer].register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for layer in (1, 2)
    ]
    whole = model(**inputs)
    before = seen[1]
    seen.clear()
    with hfpatch.patch(model, SparseVLM(after=(1,), counts=(4,))):
        out = model(**inputs)
        kept = state_of(model).kept[2][0]
    for hook in hooks:
        hook.remove()
    assert whole is not None and out is not None
    after = seen[1]
    changed = [i for i in range(len(kept)) if not torch.allclose(after[0, i], before[0, kept[i]], atol=1e-6)]
    assert len(changed) == 1
    # the mean of four dropped ones: some four of twelve give it
    lost = [s for s in range(before.shape[1]) if s not in kept.tolist()] + [int(kept[changed[0]])]
    from itertools import combinations

    means = [before[0, list(c)].mean(0) for c in combinations(lost, 4)]
    assert min(float((m - after[0, changed[0]]).abs().max()) for m in means) < 1e-5


def test_raters_are_what_images_are_like():
    embeds = torch.zeros(1, 7, 4)
    embeds[0, 1:3] = torch.tensor([1.0, 0, 0, 0])
    embeds[0, 4] = torch.tensor([3.0, 0, 0, 0])
    embeds[0, 5] = torch.tensor([0, 3.0, 0, 0])
    images = torch.tensor([[False, True, True, False, False, False, False]])
    assert raters(Embedded(embeds, images, None))[0].nonzero().flatten().tolist() == [4]
    assert raters(Embedded(0 * embeds, images, None))[0].nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_clusters_of_two_clouds():
    generator = torch.Generator().manual_seed(0)
    clouds = torch.cat([torch.randn(8, 3, generator=generator) * 0.1, 5 + torch.randn(6, 3, generator=generator) * 0.1])
    centres, belongs = cluster(clouds[None], 2)
    assert {int(c) < 8 for c in centres[0]} == {True, False}
    assert len(set(belongs[0, :8].tolist())) == len(set(belongs[0, 8:].tolist())) == 1
    same, _ = cluster(torch.ones(1, 5, 3), 2)
    assert len(set(same[0].tolist())) == 2


def test_text_is_what_follows_the_last_image():
    images = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 0]], dtype=torch.bool)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    got = [row.nonzero().flatten().tolist() for row in text_mask(images, real)]
    assert got == [[3, 4], [4], [4]]


# Before the language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", BEFORE)
@torch.no_grad()
def test_a_shortened_prompt_runs_like_one_that_was_short(spec):
    model = llava()
    inputs = tiny.vlm_inputs("llava", model)
    seen = []
    text = model.model.language_model
    with hfpatch.patch(model, spec) as handle:
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        short = state_of(model).shortened
        hook = text.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        prompt = model(**inputs).logits
        hook.remove()
        report = handle.report()
    n, m = inputs["input_ids"].shape[1], n_kept(spec, inputs)
    assert seen[0].shape[1] == m and prompt.shape[1] == n
    positions = torch.arange(m) if short.compact else short.kept[0]
    for step, got in enumerate(out.logits):
        told = model.get_input_embeddings()(out.sequences[:, n : n + step])
        more = torch.arange(step) + (m if short.compact else n)
        hidden = torch.cat([seen[0], told], 1)
        rope = text.rotary_emb(hidden, torch.cat([positions, more])[None])
        for layer in text.layers:
            hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
        want = model.lm_head(text.norm(hidden))
        torch.testing.assert_close(got, want[:, -1], **CLOSE)
        if step == 0:
            torch.testing.assert_close(prompt[:, short.kept[0]], want, **CLOSE)
    assert short.compact is ("original" not in spec and spec != RANDOM)
    cache = out.get("cache") or out.past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [m + 4] * 5
    assert report.images.average == report.images.computed == m - n + 16
    assert report.images.kv_share == pytest.approx(m / n)


def n_kept(spec, inputs):
    count = 7 if "visionzip" in spec else round(0.4 * 16)
    return inputs["input_ids"].shape[1] - 16 + count


@torch.no_grad()
def test_beams_share_their_prompts_picture():
    """generate encodes images once and repeats them for the beams."""
    model = llava()
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 4])
    for spec in (ZIP, VISPRUNER):
        with hfpatch.patch(model, spec, strict=True):
            both = model.generate(**inputs, **GREEDY, num_beams=3)
            single = {k: v[1:, 4:] if v.ndim == 2 else v[1:] for k, v in inputs.items()}
            alone = model.generate(**single, **GREEDY, num_beams=3)
        assert torch.equal(both[1, 4:], alone[0])


@torch.no_grad()
def test_two_images_in_a_prompt():
    model = llava()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (1, 46), generator=generator)
    ids[:, 2:18] = ids[:, 20:36] = tiny.IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    for spec, count in ((VISPRUNER, 12), (ZIP, 14), ("divprune:keep=0.25", 8), (RANDOM, 13)):
        with hfpatch.patch(model, spec, strict=True) as handle:
            out = model(**inputs)
            kept = state_of(model).shortened.kept[0]
            assert f"{count} of 32 image tokens go in" in str(handle.report())
        chosen = kept[ids[0, kept] == tiny.IMAGE]
        assert len(chosen) == count and out.logits.shape[1] == 46
        if "vispruner" in spec:
            assert int((chosen < 18).sum()) == 6
    with hfpatch.patch(model, AdaptInfer(after=(1,), counts=(9,)), strict=True):
        out = model(**inputs)
        kept = state_of(model).kept[2][0]
    assert int((ids[0, kept] == tiny.IMAGE).sum()) == 9


@torch.no_grad()
def test_unlike_prompts_in_one_batch_run_whole_and_say_so():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model, batch=2)
    inputs["input_ids"][1, inputs["input_ids"][1] == tiny.IMAGE] = 7
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    want = logits(model, inputs)
    with hfpatch.patch(model, "divprune"), pytest.warns(HFPatchWarning, match="different numbers of image tokens"):
        assert torch.equal(logits(model, inputs), want)
    with hfpatch.patch(model, "divprune", strict=True), pytest.raises(HFPatchError, match="different numbers"):
        logits(model, inputs)
    with hfpatch.patch(model, "adaptinfer", keep=0.3):
        # nothing to drop in the row without an image, so in none
        assert torch.equal(logits(model, inputs), want)


@torch.no_grad()
def test_before_and_inside_together():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 5])
    options = GREEDY | {"max_new_tokens": 4}
    for inside in (AdaptInfer(after=(1,), counts=(3,)), SparseVLM(after=(1,), counts=(3,), recycle=False)):
        with hfpatch.patch(model, [inside, "divprune:keep=0.5"]) as handle:
            out = model.generate(**inputs, **options, return_dict_in_generate=True)
            both, state = out.sequences, state_of(model)
            report = handle.report()
            single = {k: v[1:, 5:] if v.ndim == 2 else v[1:] for k, v in inputs.items()}
            assert torch.equal(both[1, 5:], model.generate(**single, **options)[0])
        assert state.shortened.kept.shape[1] - state.kept[2].shape[1] == 8 - 3
        assert report.images.average == pytest.approx((8 + 4 * 3) / 5)
        assert report.images.computed == pytest.approx((2 * 8 + 3 * 3) / 5)


def test_tower_methods_need_a_class_token():
    config = tiny.tiny_config("llava", num_hidden_layers=3)
    config.vision_feature_select_strategy = "full"
    import transformers as hf

    model = hf.AutoModelForImageTextToText.from_config(config)
    for name in ("visionzip", "vispruner"):
        with pytest.raises(UnsupportedError, match="class token"):
            hfpatch.patch(model, name)
    with pytest.raises(UnsupportedError, match="needs image tokens"):
        hfpatch.patch(tiny.tiny("llama"), "divprune")


def test_most_distant_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 8, generator=generator)
    tokens[0, 7] = tokens[0, 3]
    picked = most_distant(tokens, 11)
    assert not {3, 7} <= set(picked[0].tolist())
    assert picked[0].tolist() == sorted(set(picked[0].tolist()))
    # by hand: the loneliest first, then always the farthest from all that were chosen
    unit = torch.nn.functional.normalize(tokens[1], dim=-1)
    distance = 1 - unit @ unit.T
    chosen = [int((distance + 9 * torch.eye(12)).amin(1).argmax())]
    while len(chosen) < 5:
        left = [i for i in range(12) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(distance[i, chosen].min())))
    assert most_distant(tokens, 5)[1].tolist() == sorted(chosen)
    assert most_distant(torch.ones(1, 4, 3), 3)[0].tolist() == sorted(
        set(most_distant(torch.ones(1, 4, 3), 3)[0].tolist())
    )
    assert most_distant(tokens[:, :1], 1).tolist() == [[0], [0]]


def test_vispruner_all_important_is_a_plain_top_k():
    generator = torch.Generator().manual_seed(0)
    attention, states = torch.rand(2, 20, generator=generator), torch.randn(2, 20, 4, generator=generator)
    got = important_and_diverse(attention, states, 6, 6)
    assert torch.equal(got, attention.topk(6).indices.sort().values)


def test_vispruner_drops_copies_first():
    states = torch.eye(12)[None].clone()
    # in descending attention, 10 patches are left: 0..9; two pairs of copies across even and odd places
    states[0, 2], states[0, 6] = states[0, 3], states[0, 9]
    attention = torch.arange(12.0, 0, -1)[None]
    got = important_and_diverse(attention.flip(-1), states.flip(1), 10, 0)
    lost = {11 - i for i in range(12)} - {11 - int(i) for i in got[0]}
    assert lost == {2, 6}
    sizes = [important_and_diverse(attention, states, k, k // 2).shape[1] for k in range(1, 13)]
    assert sizes == list(range(1, 13))


def test_visionzip_adds_up():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 2, 9, generator=generator)
    keys, states = torch.randn(1, 2, 9, 4, generator=generator), torch.randn(1, 10, 6, generator=generator)
    tower = Tower(attention, keys, states, torch.nn.Identity())
    got = zipped(tower, 4, 2)
    assert got.shape == (1, 6, 6)
    best = attention.sum(1)[0].topk(3).indices.sort().values
    patches = states[0, 1:]
    torch.testing.assert_close(got[0, 0], states[0, 0])
    torch.testing.assert_close(got[0, 1:4], patches[best])
    rest = [i for i in range(9) if i not in best.tolist()]
    k = torch.nn.functional.normalize(keys[0].mean(0), dim=-1)
    targets = [rest[0], rest[3]]
    collected = {
        t: [i for i in rest if i not in targets and k[i] @ k[t] == max(k[i] @ k[u] for u in targets)] for t in targets
    }
    for slot, t in zip((4, 5), targets, strict=True):
        mean = patches[collected[t]].mean(0) if collected[t] else 0
        torch.testing.assert_close(got[0, slot], patches[t] + mean)
    assert VisionZip().counts(576) == (54, 10)
    assert VisionZip(keep=128 / 576).counts(576) == (108, 20) and VisionZip(keep=192 / 576).counts(576) == (162, 30)


# Costs ---------------------------------------------------------------------------------------------------------------


def test_average_tokens_by_both_definitions():
    """The table of the specification for LLaVA-1.5-7B."""
    table = {192: (192.1, 209.2), 128: (128.8, 146.3), 64: (65.0, 82.9), 48: (48.8, 66.7), 32: (33.0, 51.0)}
    cost = LayerCost(4096, 11008, 4096, 4096, 2)
    for budget, (average, computed) in table.items():
        made = ImageCost.forecast(cost, 640, 576, 32, AdaptInfer(budget=budget).stages(32, 576))
        assert made.average == pytest.approx(average, abs=0.06) and made.computed == pytest.approx(computed, abs=0.06)


def test_flops_and_kv_bytes_by_hand():
    d, m, n = 4096, 11008, 640
    cost = LayerCost(d, m, d, d, 2)
    assert cost.flops(n) == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    grouped = LayerCost(d, m, d, 1024, 2)
    assert grouped.flops(n) == n * (2 * d**2 + 2 * d * 1024) + 2 * n**2 * d + 3 * n * d * m
    assert grouped.kv_bytes(n) == n * 2 * 1024 * 2
    made = ImageCost.forecast(cost, n, 576, 32, {1: 133, 10: 27, 20: 3})
    layers = [640] * 2 + [64 + 133] * 9 + [64 + 27] * 10 + [64 + 3] * 11
    assert made.kv_bytes == sum(2 * t * d * 2 for t in layers)
    assert made.flops == pytest.approx(sum(cost.flops(t) for t in layers))


@torch.no_grad()
def test_forecast_and_report_agree():
    model = llava()
    inputs = tiny.vlm_inputs("llava", model, batch=2)
    for method in (*INSIDE, SparseVLM(after=(0, 2), counts=(6, 3)), *BEFORE):
        with hfpatch.patch(model, method) as handle:
            forecast = handle.explain(seq_len=inputs["input_ids"].shape[1]).images
            model(**inputs)
            report = handle.report().images
            handle.reset()
            assert handle.report().images is None
        assert (forecast.prompts, report.prompts) == (0, 2)
        assert vars(report) | {"prompts": 0} == pytest.approx(vars(forecast)), method
        assert "image tokens: " in str(report) and "FLOPs" in str(report)


def test_explain_says_why_there_is_no_forecast():
    model = llava()
    notes = hfpatch.explain(model, "fastv", seq_len=16).notes
    assert any("no less than the prompt's" in note for note in notes)
