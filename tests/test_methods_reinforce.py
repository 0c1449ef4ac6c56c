"""Properties of the methods that make a model look more at its image: vhr, pai, paint."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import tiny
import tiny_vlm
import torch
from transformers import DynamicCache

import hfpatch
from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall, SequenceState
from hfpatch.errors import ConfigError, HFPatchError, HFPatchWarning, UnsupportedError
from hfpatch.images import Tower, without_images
from hfpatch.methods._boost import boost_last
from hfpatch.methods.pai import Pai
from hfpatch.methods.paint import Paint, informed
from hfpatch.methods.vhr import VHR, choose
from hfpatch.plan import Window

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
ALL = VHR(preset="all")
BOOSTS = [Pai(alpha=2.0, start_layer=1), Paint(alpha=2.0, beta=1.0, start_layer=1)]
METHODS = [ALL, *BOOSTS]
QUIET = [replace(method, guidance=1.0) for method in BOOSTS]


def llava(seed=0, **overrides):
    return tiny.tiny("llava", seed=seed, num_hidden_layers=4, **overrides)


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture(autouse=True)
def nothing_stays_patched(model):
    yield
    hfpatch.unpatch(model)


_LAST = []


@torch.no_grad()
def logits(model, inputs):
    """Of one forward, whose cache stays alive until the next one."""
    _LAST[:] = [model(**inputs)]
    return _LAST[0].logits


def state_of(model, cache=None):
    """What is known of a cache's sequences; of the last forward's."""
    if cache is None:
        cache = _LAST[0].get("cache") or _LAST[0].past_key_values
    return vars(model)["_hfpatch"].engine.states[cache]


def cache_name(model):
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def new_cache(model):
    return DynamicCache(config=model.config.get_text_config())


def chosen_by(model, method, layers=4, cache=None):
    store = state_of(model, cache).store
    return [store[method, layer] for layer in range(layers) if (method, layer) in store]


def counted(model):
    """A list that grows with every forward of the text model, and the hook."""
    runs = []
    return runs, model.model.language_model.register_forward_hook(lambda *_: runs.append(1))


def row_of(inputs, row, pad=0):
    return {k: v[row : row + 1, pad:] if v.ndim == 2 else v[row : row + 1] for k, v in inputs.items()}


def text_of(inputs):
    """One row's prompt without its image."""
    ids = inputs["input_ids"]
    return {"input_ids": ids[:, ids[0] != tiny.IMAGE]}


def two_images(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (1, 46), generator=generator)
    ids[:, 2:18] = ids[:, 20:36] = tiny.IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


# All three ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_text_prompts_pass_bit_for_bit_and_run_once(model, method):
    inputs = tiny.text_inputs(model, batch=2, length=20, padding=[3, 0])
    want = logits(model, inputs)
    runs, hook = counted(model)
    with hook, hfpatch.patch(model, method, strict=True):
        assert torch.equal(logits(model, inputs), want)
        assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    assert len(runs) == 1 + 2 * 5


@pytest.mark.parametrize("cls", [VHR, Pai, Paint])
def test_neutral_options_change_no_bit_and_run_nothing(model, cls):
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 4])
    want, text = logits(model, inputs), model.generate(**inputs, **GREEDY)
    runs, hook = counted(model)
    with hook, hfpatch.patch(model, cls.neutral()):
        assert torch.equal(logits(model, inputs), want)
        assert torch.equal(model.generate(**inputs, **GREEDY), text)
    assert len(runs) == 1 + 5


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_without_an_image_is_left_alone(model, method):
    # padding, so that the text-only run of a row without an image rounds otherwise
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 5])
    inputs["input_ids"][1, inputs["input_ids"][1] == tiny.IMAGE] = 7
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    want = logits(model, inputs)
    if isinstance(method, Paint):
        # the vision tower's tokens cannot be told apart by rows then
        with hfpatch.patch(model, method), pytest.warns(HFPatchWarning, match="paint leaves the images alone"):
            assert torch.equal(logits(model, inputs), want)
        with hfpatch.patch(model, method, strict=True), pytest.raises(HFPatchError, match="different numbers"):
            logits(model, inputs)
        return
    with hfpatch.patch(model, method, strict=True):
        got = logits(model, inputs)
        alone = logits(model, row_of(inputs, 0))
    assert torch.equal(got[1], want[1])
    assert not torch.allclose(got[0, -1], want[0, -1])
    torch.testing.assert_close(got[:1], alone, **CLOSE)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_padding_on_the_right(model, method):
    inputs = tiny.vlm_inputs("llava", model, batch=2)
    inputs["attention_mask"][0, -4:] = 0
    short = {k: v[:1, :-4] if v.ndim == 2 else v[:1] for k, v in inputs.items()}
    with hfpatch.patch(model, method, strict=True):
        both, alone = logits(model, inputs), logits(model, short)
    torch.testing.assert_close(both[:1, :-4], alone, **CLOSE)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_two_images_in_a_prompt(model, method):
    inputs = two_images()
    want = logits(model, inputs)
    with hfpatch.patch(model, method, strict=True):
        got = logits(model, inputs)
        text = model.generate(**inputs, **GREEDY)
        padded = {"input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=tiny.PAD)}
        padded["attention_mask"] = (torch.arange(49) >= 3).long()[None]
        again = model.generate(**padded, pixel_values=inputs["pixel_values"], **GREEDY)
    assert not torch.allclose(got[:, -1], want[:, -1])
    assert torch.equal(again[:, 3:], text)


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_prompts_in_chunks_are_refused(model, method):
    inputs = tiny.vlm_inputs("llava", model)
    with hfpatch.patch(model, method):
        cache = {cache_name(model): new_cache(model)}
        model(input_ids=inputs["input_ids"][:, :24], pixel_values=inputs["pixel_values"], **cache)
        with pytest.raises(UnsupportedError, match="comes in chunks"):
            model(input_ids=inputs["input_ids"][:, 24:], **cache)
        with pytest.raises(UnsupportedError, match="comes in chunks"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=24)
        # nothing is left over from the calls that failed
        logits(model, inputs)


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_a_second_turn_goes_on_as_the_first(model, method):
    """A question on the kept cache gives what its tokens give one by one, at the last of them."""
    inputs = tiny.vlm_inputs("llava", model)
    later = torch.randint(3, 120, (1, 6), generator=torch.Generator().manual_seed(3))
    said = {}
    with hfpatch.patch(model, method, strict=True):
        for way in ("at once", "one by one"):
            cache = {cache_name(model): new_cache(model)}
            model(**inputs, **cache)
            model(later[:, :1], **cache)
            for piece in [later[:, 1:]] if way == "at once" else later[:, 1:].split(1, 1):
                said[way] = model(piece, **cache).logits[:, -1]
        if method is ALL:
            torch.testing.assert_close(said["at once"], said["one by one"], **CLOSE)
        # the others raise only the last of several tokens
        assert said["at once"].isfinite().all()


@pytest.mark.parametrize("method", [ALL, *QUIET], ids=str)
@torch.no_grad()
def test_an_image_that_comes_later(model, method):
    inputs = tiny.vlm_inputs("llava", model)
    with hfpatch.patch(model, method):
        for first in (tiny.text_inputs(model, length=9), inputs):
            cache = {cache_name(model): new_cache(model)}
            model(**first, **cache)
            model(torch.tensor([[5]]), **cache)
            turn = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
            if method.name == "pai" or (method.name == "paint" and first is not inputs):
                model(**turn, **cache)
                assert int(state_of(model, *cache.values()).image_mask.sum()) == 16 * (1 + (first is inputs))
            else:
                with pytest.raises(UnsupportedError, match="came later"):
                    model(**turn, **cache)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_eager_and_sdpa_write_the_same(method):
    told = []
    for attn in ("eager", "sdpa"):
        model = llava(attn_implementation=attn)
        inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[2, 0])
        with hfpatch.patch(model, method):
            logits(model, inputs)
            chosen = chosen_by(model, method) or [torch.zeros(0)]
            told.append((model.generate(**inputs, **GREEDY), torch.stack(chosen)))
    assert all(map(torch.equal, *told))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_beside_pruning(model, method):
    """Tokens that were dropped have no weight to be raised; the rest works as before."""
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 3])
    with hfpatch.patch(model, ["fastv:layer=2,keep=0.4", method], strict=True):
        both = model.generate(**inputs, **GREEDY)
        assert torch.equal(both[1, 3:], model.generate(**row_of(inputs, 1, 3), **GREEDY)[0])
        assert not torch.allclose(logits(model, inputs), _only(model, "fastv:layer=2,keep=0.4", inputs))


def _only(model, what, inputs):
    hfpatch.unpatch(model)
    with hfpatch.patch(model, what):
        return logits(model, inputs)


# VHR ------------------------------------------------------------------------------------------------------------------


def test_chosen_heads_are_scaled_columns_of_the_output_projection(model):
    inputs = tiny.vlm_inputs("llava", model)
    method = VHR(alpha=2.5, preset="all")
    with hfpatch.patch(model, method, layers="1-3"):
        got, chosen = logits(model, inputs), chosen_by(model, method)
        told = model.generate(**inputs, **GREEDY)
    assert [int(heads.sum()) for heads in chosen] == [2, 2, 2]
    twin = llava()
    for layer, heads in enumerate(chosen, 1):
        for head in heads[0].nonzero().flatten().tolist():
            twin.model.language_model.layers[layer].self_attn.o_proj.weight.data[:, 16 * head : 16 * head + 16] *= 2.5
    torch.testing.assert_close(got, logits(twin, inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(told, twin.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_the_divergence_is_from_the_text_only_prompt(model):
    """By hand, for the first layer that is scaled: what comes before is as it was."""
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[0, 5])
    seen = []
    projection = model.model.language_model.layers[1].self_attn.o_proj
    for row, pad in enumerate((0, 5)):
        mine = row_of(inputs, row, pad)
        for prompt in (mine, text_of(mine)):
            with projection.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, -1].view(1, 4, 16))):
                model(**prompt)
    image, text = torch.cat(seen[::2]), torch.cat(seen[1::2])
    with hfpatch.patch(model, ALL, layers=1):
        logits(model, inputs)
        assert torch.equal(chosen_by(model, ALL)[0], choose(image, text, 0.5, True))


def test_half_of_the_heads_by_divergence():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 32, 8, generator=generator), torch.randn(3, 32, 8, generator=generator)
    chosen = choose(image, text, 0.5, False)
    assert chosen.sum(-1).tolist() == [16, 16, 16]
    distance = (image - text).square().sum(-1).sqrt()
    assert all(float(distance[b][chosen[b]].min()) > float(distance[b].median()) for b in range(3))
    assert choose(image, text, 0.75, False).sum(-1).tolist() == [8, 8, 8]
    assert choose(image[:, :5], text[:, :5], 0.5, False).sum(-1).tolist() == [2, 2, 2]
    # nothing moves: nothing is chosen; nor where there is one head
    assert not choose(text, text, 0.5, True).any()
    assert not choose(image[:, :1], text[:, :1], 0.5, True).any()


def test_heads_that_surge_without_the_image_are_left_out():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 16, 8, generator=generator), torch.randn(1, 16, 8, generator=generator)
    text[0, 3] *= 100
    assert choose(image, text, 0.5, False)[0, 3]
    assert not choose(image, text, 0.5, True)[0, 3]
    # far away by its image alone: both must be high
    text[0, 3] /= 100
    image[0, 3] *= 100
    assert choose(image, text, 0.5, True)[0, 3]


@torch.no_grad()
def test_heads_stay_while_decoding_and_change_with_the_image(model):
    inputs = tiny.vlm_inputs("llava", model)
    with hfpatch.patch(model, ALL):
        cache = {cache_name(model): new_cache(model)}
        model(**inputs, **cache)
        first = torch.cat(chosen_by(model, ALL, 4, *cache.values()))
        runs, hook = counted(model)
        with hook:
            for token in (5, 6, 7):
                model(torch.tensor([[token]]), **cache)
        assert torch.equal(torch.cat(chosen_by(model, ALL, 4, *cache.values())), first) and len(runs) == 3
        others = [tiny.vlm_inputs("llava", model, seed=seed) for seed in (1, 2, 3)]
        changed = []
        for other in others:
            logits(model, other)
            changed.append(not torch.equal(torch.cat(chosen_by(model, ALL)), first))
        assert all(changed)


def test_layers_of_the_presets():
    def layers(total, **options):
        method, sizes = VHR(**options), ModelSizes(total, 8, 8, 16)
        method.fits(sizes)
        return sorted(method.chosen_heads(sizes, range(total)))

    published = [1, *range(18, 32)]
    assert layers(32) == layers(32, preset="llava-1.5") == layers(32, preset="llava-next") == published
    assert layers(32, early_layer=False) == published[1:]
    assert layers(32, preset="instructblip") == list(range(14, 32))
    assert layers(28) == [1, *range(16, 28)]
    assert layers(6, preset="all", early_layer=False) == list(range(6))
    with pytest.raises(ConfigError, match="is for 32 layers, this model has 40"):
        layers(40, preset="llava-1.5")


def test_a_prompt_that_is_nothing_but_an_image_is_refused(model):
    inputs = tiny.vlm_inputs("llava", model)
    only = {"input_ids": torch.full((1, 16), tiny.IMAGE), "pixel_values": inputs["pixel_values"]}
    with hfpatch.patch(model, "vhr"), pytest.raises(UnsupportedError, match="nothing but images"):
        logits(model, only)
    logits(model, only)


def test_text_only_arguments():
    ids = torch.tensor([[9, 9, 1, 50, 99, 99, 51, 5], [1, 50, 99, 99, 51, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": ids, "token_type_ids": ids, "labels": ids}
    got = without_images(kwargs | {"pixel_values": 1, "logits_to_keep": 1, "cache": 2}, ids == 99, (50, 51))
    assert got["input_ids"].tolist() == [[5, 5, 1, 5], [1, 5, 6, 7]]
    assert got["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert got["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert set(got) == {"input_ids", "attention_mask", "position_ids", "token_type_ids", "logits_to_keep"}
    # prepared for a static cache
    causal = torch.nn.functional.pad(mask.bool()[:, None, None] & torch.ones(8, 8).tril().bool(), (0, 4))
    again = without_images({"input_ids": ids, "attention_mask": {"full_attention": causal}}, ids == 99, (50, 51))
    assert torch.equal(again["attention_mask"], got["attention_mask"])


# PAI, PAINT -----------------------------------------------------------------------------------------------------------


def call_of(batch=2, n=14, q_len=14, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, q_len, 8, generator=generator)
    k, v = torch.randn(2, batch, 2, n, 8, generator=generator)
    image = torch.zeros(batch, n, dtype=torch.bool)
    image[:, 3:9] = True
    phase = "prefill" if q_len == n else "decode"
    return AttentionCall(q, k, v, scaling=0.4, image_mask=image, layer_idx=2, num_layers=4, phase=phase, **rest)


def by_hand(call, gain, seen):
    """Of the last query, in fp64: [B, Hq, D]."""
    key, value = (x.double().repeat_interleave(2, 1) for x in (call.key, call.value))
    z = (call.query[:, :, -1:].double() @ key.mT * call.scaling)[:, :, 0]
    if call.softcap is not None:
        z = call.softcap * (z / call.softcap).tanh()
    z = z + gain[:, None] * z.abs()
    z = z.masked_fill(~seen, float("-inf"))
    if call.sinks is not None:
        z = torch.cat([z, call.sinks.double()[None, :, None].expand(len(z), -1, -1)], -1)
    return (z.softmax(-1)[..., : call.kv_len, None] * value).sum(2)


@pytest.mark.parametrize("q_len", [14, 1])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "padding", "window"])
def test_scores_grow_by_their_size_in_the_last_row_only(q_len, extra):
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :2] = False
    rest = {"softcap": {"softcap": 1.5}, "sinks": {"sinks": torch.randn(4)}, "padding": {"mask": mask}}.get(extra, {})
    call = call_of(q_len=q_len, **rest)
    seen = torch.ones(2, 1, 14, dtype=torch.bool) if extra != "padding" else mask[:, None]
    if extra == "window":
        call.plans.append((None, None, Window(sink=0, window=8)))
        seen = (torch.arange(14) >= 6).expand(2, 1, -1)
    gain = torch.rand(2, 14) * call.image_mask
    out = torch.randn(2, 4, q_len, 8)
    got = boost_last(call, out, gain)
    assert torch.equal(got[:, :, :-1], out[:, :, :-1])
    torch.testing.assert_close(got[:, :, -1].double(), by_hand(call, gain.double(), seen), atol=1e-5, rtol=1e-4)


def test_pai_raises_what_the_model_looks_at():
    """Mass on the image grows in every head whose scores there are positive."""
    call = call_of()
    key = call.key.clone()
    key[:, :, 3:9] = call.query[:, ::2, -1:].abs() * call.query[:, ::2, -1:].sign()
    query = call.query[:, ::2].repeat_interleave(2, 1)
    # values tell how much goes to the image
    value = call.image_mask[:, None, :, None].float().expand(-1, 2, -1, 8)
    call = replace(call, query=query, key=key, value=value)
    mass = [boost_last(call, call.query, a * call.image_mask.float())[:, :, -1, 0] for a in (1e-9, 0.5, 1.0)]
    assert (mass[1] > mass[0]).all() and (mass[2] > mass[1]).all()


@torch.no_grad()
def test_only_the_last_token_changes_and_only_from_the_start_layer_on(model):
    inputs = tiny.vlm_inputs("llava", model)
    for method in QUIET:
        kept = {}
        for patched in (False, True):
            cache = new_cache(model)
            with hfpatch.patch(model, method) if patched else torch.no_grad():
                model(**inputs, **{cache_name(model): cache})
            kept[patched] = [layer.keys for layer in cache.layers]
        for layer, (before, after) in enumerate(zip(kept[False], kept[True], strict=True)):
            assert torch.equal(before[:, :, :-1], after[:, :, :-1])
            # layer 1 is the first that is raised: its own keys are made before
            assert torch.equal(before[:, :, -1], after[:, :, -1]) is (layer <= 1)


def test_paint_with_everything_local_is_pai(model):
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[4, 0])
    texts = []
    for method in (Pai(alpha=1.5), Paint(alpha=1.5, beta=1.5, local=1.0)):
        with hfpatch.patch(model, method):
            out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        texts.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(texts[0][0], texts[1][0])
    torch.testing.assert_close(texts[0][1], texts[1][1], atol=1e-5, rtol=1e-5)


def tower_of(late, first):
    return Tower(late, torch.zeros(0), torch.zeros(0), torch.nn.Identity(), first)


def test_informed_tokens_by_hand():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4, 41, 8, generator=generator)
    late = torch.rand(3, 4, 40, generator=generator)
    # beyond the fence, not far; and among the local ones
    late[0, :, 7] = 1.1
    key[0, :, 8] = 3 * query[0, :, 0]
    late[1] = 0.1
    local, summary = informed(tower_of(late, (query, key)), 0.25, 0.1)
    early = (query @ key.mT * 8**-0.5).softmax(-1)
    for n in range(3):
        looks = early[n, :, 0, 1:].sum(0)
        received = early[n].mean(0)[1:, 1:].sum(0)
        b = late[n].sum(0)
        low, high = b.quantile(0.25), b.quantile(0.75)
        outliers = set((b > high + 1.5 * (high - low)).nonzero().flatten().tolist())
        want = set(looks.topk(10).indices.tolist()) | set(received.topk(4).indices.tolist())
        assert set(summary[n].nonzero().flatten().tolist()) == outliers
        assert set(local[n].nonzero().flatten().tolist()) == want - outliers
    assert summary[0].nonzero().flatten().tolist() == [7] and not summary[1].any()
    assert informed(tower_of(late * 0, (query, key)), 0.25, 0.0)[0][0, 7]


@torch.no_grad()
def test_every_image_has_its_own_tokens(model):
    method = QUIET[1]
    inputs = tiny.vlm_inputs("llava", model, batch=2)
    with hfpatch.patch(model, method):
        logits(model, inputs)
        both = state_of(model).store[method, "gain"]
        for row in (0, 1):
            logits(model, row_of(inputs, row))
            assert torch.equal(state_of(model).store[method, "gain"][0], both[row])
        pair = two_images()
        logits(model, pair)
        gain = state_of(model).store[method, "gain"][0]
        one = {"input_ids": pair["input_ids"][:, 19:], "pixel_values": pair["pixel_values"][1:]}
        logits(model, one)
        assert torch.equal(state_of(model).store[method, "gain"][0, 1:17], gain[20:36])
    image = inputs["input_ids"] == tiny.IMAGE
    assert not torch.equal(both[0], both[1])
    assert int((both == method.alpha).sum(-1).max()) <= 4 and not both[~image].any()


def test_gain_follows_the_slots_that_are_left():
    method, state = QUIET[1], SequenceState()
    gain = torch.tensor([[0.0, 0, 0, 2, 2, 0, 1, 1, 0, 0, 0]])
    call = replace(call_of(batch=1, n=9), seq=state)
    state.store[method, "gain"], state.image_mask = gain, gain > 0
    state.kept[2] = torch.tensor([[0, 1, 3, 6, 8, 9, 10]])
    assert method.gain(call).tolist() == [[0, 0, 2, 1, 0, 0, 0, 0, 0]]
    assert method.gain(replace(call, layer_idx=1, key=call.key[:, :, :8])) is not None


def test_paint_steps_back_where_tokens_are_no_patches(model):
    inputs = tiny.vlm_inputs("llava", model)
    want = _only(model, "divprune:keep=0.5", inputs)
    with (
        hfpatch.patch(model, ["divprune:keep=0.5", BOOSTS[1]]),
        pytest.warns(HFPatchWarning, match="paint leaves the images alone: .*not the vision tower's patches"),
    ):
        assert torch.equal(logits(model, inputs), want)


def test_hidden_image_tokens_stay_hidden(model):
    inputs = tiny.vlm_inputs("llava", model)
    # the image ends 12 tokens before the last one
    want = _only(model, "swa:window=6,sink=0", inputs)
    for method in QUIET:
        with hfpatch.patch(model, ["swa:window=6,sink=0", method], strict=True):
            torch.testing.assert_close(logits(model, inputs), want, **CLOSE)


# Guidance -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("padding", [[0, 0], [5, 0]])
def test_guidance_is_the_contrast_with_the_text_only_prompt(model, padding):
    """Step by step, against whole forwards without any cache."""
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=padding)
    with hfpatch.patch(model, Pai(alpha=0.0, guidance=1.6), strict=True) as handle:
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        whole = logits(model, inputs)
        assert "mixed with a second run" in str(handle.report())
    n = inputs["input_ids"].shape[1]
    ruled_out = 0
    for row, pad in enumerate(padding):
        mine = row_of(inputs, row, pad)
        for step in range(5):
            told = out.sequences[row : row + 1, n : n + step]
            p, u = (
                model(
                    input_ids=torch.cat([prompt["input_ids"], told], 1), pixel_values=prompt.get("pixel_values")
                ).logits[0, -1].log_softmax(-1)
                for prompt in (mine, text_of(mine))
            )  # fmt: skip
            want = 1.6 * (p - u) + u
            stays = p >= p.max() + torch.tensor(0.1).log()
            got = out.logits[step][row]
            assert torch.equal(got > torch.finfo(got.dtype).min, stays)
            torch.testing.assert_close(got[stays].log_softmax(-1), want[stays].log_softmax(-1), **CLOSE)
            ruled_out += int((~stays).sum())
            if step == 0:
                torch.testing.assert_close(whole[row, -1], got, **CLOSE)
    assert 0 < ruled_out < 2 * 5 * tiny.VOCAB
    # rows of the prompt before its last one are the model's own
    torch.testing.assert_close(whole[:, 8:-1], logits(model, inputs)[:, 8:-1], **CLOSE)


def test_guidance_runs_the_prompt_once_more_and_none_at_one(model):
    inputs = tiny.vlm_inputs("llava", model)
    for method, times in ((QUIET[0], 1), (BOOSTS[0], 2), (QUIET[1], 1), (BOOSTS[1], 2)):
        runs, hook = counted(model)
        with hook, hfpatch.patch(model, method):
            model.generate(**inputs, **GREEDY)
        assert len(runs) == 5 * times


@torch.no_grad()
def test_guidance_beside_a_shortened_prompt(model):
    """In a second turn generate repeats tokens, as many as were left out; the text-only run must see each once."""
    later = torch.randint(3, 120, (2, 6), generator=torch.Generator().manual_seed(3))
    for padding in ([0, 0], [3, 0]):
        inputs = tiny.vlm_inputs("llava", model, batch=2, padding=padding)
        with hfpatch.patch(model, ["divprune:keep=0.5", Pai(guidance=1.5)], strict=True):
            out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            cache = out.get("cache") or out.past_key_values
            ids = torch.cat([out.sequences, later], 1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5 + 6), value=1)
            model.generate(ids, attention_mask=mask, **GREEDY, **{cache_name(model): cache})
        total = ids.shape[1] + 4
        assert {layer.keys.shape[2] for layer in cache.layers} == {total - 8, total - 16}


@torch.no_grad()
def test_guidance_refuses_an_image_that_comes_later(model):
    inputs = tiny.vlm_inputs("llava", model)
    with hfpatch.patch(model, BOOSTS[0]):
        cache = {cache_name(model): new_cache(model)}
        model(**inputs, **cache)
        model(torch.tensor([[5]]), **cache)
        with pytest.raises(UnsupportedError, match="guidance=1"):
            model(**{k: v for k, v in inputs.items() if k != "attention_mask"}, **cache)


# Families -------------------------------------------------------------------------------------------------------------


def two_steps(model, inputs):
    """Logits behind a prompt, and behind one more token, which is 5: [2, B, V]."""
    out = model.generate(
        **inputs,
        **{**GREEDY, "max_new_tokens": 2, "eos_token_id": None},
        **{"prefix_allowed_tokens_fn": lambda *_: [5], "output_logits": True, "return_dict_in_generate": True},
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("family", ["LLaVA-NeXT", "Qwen2-VL", "Gemma 3"])
@torch.no_grad()
def test_families(family):
    """Padded rows are as alone; guidance is the contrast, and disturbs no model with positions in three dimensions."""
    model, pads = tiny_vlm.model_of(family), (3, 0)
    inputs = tiny_vlm.inputs_of(family, pads)
    p = two_steps(model, inputs)
    for method in (VHR(preset="all"), Pai(start_layer=0)):
        with hfpatch.patch(model, method, strict=True):
            both = two_steps(model, inputs)
            for row, pad in enumerate(pads):
                alone = two_steps(model, tiny_vlm.single(inputs, row, pad))
                torch.testing.assert_close(both[:, row : row + 1], alone, **CLOSE)
        assert not torch.allclose(both, p, atol=1e-2)
    with hfpatch.patch(model, Pai(alpha=0.0, guidance=3.0), strict=True):
        guided = two_steps(model, inputs)
    assert torch.equal(two_steps(model, inputs), p)
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id")
    marks = torch.tensor([token for name in names if (token := getattr(model.config, name, None)) is not None])
    for row, pad in enumerate(pads):
        ids = inputs["input_ids"][row, pad:]
        text = ids[torch.isin(ids, marks, invert=True)]
        u = model(input_ids=torch.cat([text, torch.tensor([5])])[None]).logits[0, -2:]
        stays = guided[:, row] > torch.finfo(u.dtype).min
        torch.testing.assert_close(guided[:, row][stays], (3 * p[:, row] - 2 * u)[stays], atol=1e-3, rtol=1e-3)
        assert stays.any(-1).all()
