"""Gates, ablation, forcing, scaling and steering of heads: the algebra, the spans, and all of it together."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from tiny_tokenizer import CHAT, tiny_tokenizer
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import hfpatch
from hfpatch.calibrate import calibrate
from hfpatch.calibrations.head_gate_far import far_masses
from hfpatch.call import AttentionCall, SequenceState
from hfpatch.emphasis import Keys, attend_keys, emphasise, mean_values
from hfpatch.errors import ConfigError, DataMissingError, UnsupportedError
from hfpatch.evals.colored_objects import ColoredObjects
from hfpatch.evals.counterfactual import Counterfactual
from hfpatch.evals.generation import cache_argument
from hfpatch.kernels import attend, reference
from hfpatch.methods.head_ablate import HeadAblate
from hfpatch.methods.head_force import HeadForce
from hfpatch.methods.head_gate import HeadGate, MixtureOfHeads
from hfpatch.methods.steer import Steer
from hfpatch.plan import Blocks, Dense, Permuted, Window, visible
from hfpatch.spans import Spans, find_spans, marked, reading

EXACT = {"atol": 1e-12, "rtol": 1e-12}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SPAN = ((2, 5), (9, 11))
INSIDE = [2, 3, 4, 9, 10]


def call(n=20, *, q_len=None, heads=4, kv_heads=2, batch=1, dtype=torch.float64, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, q_len or n), (kv_heads, n), (kv_heads, n)
    q, k, v = (torch.randn(batch, h, m, 8, generator=generator, dtype=dtype) for h, m in sizes)
    rest = {"phase": "decode" if q_len == 1 else "prefill", "seq": SequenceState(forwards=1)} | rest
    return AttentionCall(q, k, v, scaling=0.9, need_lse=True, **rest)


def scores_of(one, plan=None):
    """Masked scores [B, Hq, q_len, kv_len] in the call's dtype."""
    scores = one.query @ one.key.repeat_interleave(one.num_key_value_groups, 1).mT * one.scaling
    if one.softcap is not None:
        scores = one.softcap * torch.tanh(scores / one.softcap)
    return scores.masked_fill(~visible(one, plan or Dense()), -math.inf)


def attention(one, scores):
    """(out, LSE) of scores, learned sinks in the denominator; rows that see nothing are 0."""
    lse = scores.logsumexp(-1)
    if one.sinks is not None:
        lse = torch.logaddexp(lse, one.sinks.to(lse.dtype)[:, None])
    probs = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return probs @ one.value.repeat_interleave(one.num_key_value_groups, 1), lse


def keys_of(*slots):
    return Keys(torch.tensor([slots]))


def models():
    return tiny.tiny("llama"), tiny.tiny("qwen2")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# Algebra in fp64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("q_len", [1, 7, 20])
@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_pasta_is_a_logit_bias(kv_heads, q_len, alpha):
    """alpha outside a span = log(1/alpha) added inside = a merge with attention over the span; LSEs included."""
    one = call(q_len=q_len, kv_heads=kv_heads)
    scores = scores_of(one)
    bias = torch.full((20,), math.log(alpha), dtype=torch.float64).index_fill(0, torch.tensor(INSIDE), 0.0)
    want, _ = attention(one, scores + bias)
    inner = attention(one, scores.masked_fill(bias != 0, -math.inf))
    got, lse = emphasise(*attention(one, scores), *inner, 1 / alpha)
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(lse, (scores + bias - math.log(alpha)).logsumexp(-1), **EXACT)
    # the closed form of the specification
    p = scores.softmax(-1)
    share = p[..., INSIDE].sum(-1, keepdim=True)
    mine = p[..., INSIDE] @ one.value.repeat_interleave(4 // kv_heads, 1)[:, :, INSIDE]
    closed = (attention(one, scores)[0] + (1 / alpha - 1) * mine) / (1 + (1 / alpha - 1) * share)
    torch.testing.assert_close(got, closed, **EXACT)


@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"q_len": 1},
        {"softcap": 1.5},
        {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
        {"mask": torch.ones(20, 20).tril().bool()[None, None]},
    ],
)
@pytest.mark.parametrize("plan", [None, "window", "blocks", "permuted"])
def test_steer_is_a_bias_on_what_the_plan_keeps(rest, plan):
    one = call(**rest)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    blocks = torch.tensor([[[[0, 2, 3]]]]).expand(1, 2, one.q_len, 3).int().contiguous()
    plans = {
        "window": Window(1, 6),
        "blocks": Blocks(blocks, torch.full((1, 2, one.q_len), 3).int(), 1, 4),
        "permuted": Permuted(order[None], 4, 2, local=2),
    }
    chosen = plans.get(plan)
    if chosen is not None:
        one.plans.append((None, None, chosen))
    scores = scores_of(one, chosen)
    out, lse = attention(one, scores)
    bias = torch.zeros(20, dtype=torch.float64).index_fill(0, torch.tensor(INSIDE), math.log(10))
    want, _ = attention(one, scores + bias)
    got = Steer(alpha=0.1, spans=SPAN).adjust(one, out, lse)
    # dense calls without a mask run in fp32 kernels
    exact = chosen is not None or one.mask is not None
    torch.testing.assert_close(got, want, **(EXACT if exact else {"atol": 1e-6, "rtol": 1e-5}))


@pytest.mark.parametrize("heads", [None, (1, 2)])
def test_kernels_and_pieces_agree(heads, monkeypatch):
    """Attention over some keys by the kernels, and piece by piece as under a mask."""
    import hfpatch.emphasis as module

    monkeypatch.setattr(module, "_PAIRS", {"cpu": 1})
    for q_len in (1, 600):
        one = call(900, q_len=q_len, dtype=torch.float32)
        keys = Keys(torch.arange(3, 850, 7)[None])
        fast = attend_keys(one, keys, heads)
        slow = attend_keys(replace(one, mask=torch.ones(1, 900, dtype=torch.bool)), keys, heads)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_neutral_options_change_no_bit():
    one = call(dtype=torch.float32)
    out, lse = reference.run(one, Dense())
    for method in (
        Steer(alpha=1.0, spans=SPAN),
        HeadForce(rho=0.0, spans=SPAN, rows="all"),
        HeadAblate(mode="zero", amount=0.0),
        MixtureOfHeads(topk=4),
        # the whole prompt is the span
        Steer(alpha=0.1, spans=((0, 20),)),
    ):
        exact = {"atol": 0, "rtol": 0} if not (isinstance(method, Steer) and method.alpha < 1) else CLOSE
        torch.testing.assert_close(method.adjust(one, out, lse), out, **exact)


def test_more_steering_is_more_mass():
    one = call()
    inside = torch.zeros(20, 8, dtype=torch.float64).index_fill(0, torch.tensor(INSIDE), 1.0)
    one = replace(one, value=inside.expand(1, 2, -1, -1))
    out, lse = attention(one, scores_of(one))
    masses = [Steer(alpha=a, spans=SPAN).adjust(one, out, lse)[..., 0] for a in (1.0, 0.5, 0.1, 0.01)]
    rows = slice(2, None)
    assert all((b[..., rows] > a[..., rows]).all() for a, b in zip(masses, masses[1:], strict=False))
    # queries before the span see nothing of it
    assert all(torch.equal(mass[..., :2], masses[0][..., :2]) for mass in masses)


@pytest.mark.parametrize("rows", ["all", "last", "answer"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_force_is_a_mixture(rows, kv_heads):
    one = call(kv_heads=kv_heads)
    scores = scores_of(one)
    out, lse = attention(one, scores)
    seen = one.causal() & torch.zeros(20).index_fill(0, torch.tensor(INSIDE), 1.0).bool()
    even = seen.double() / seen.sum(-1, keepdim=True).clamp(min=1)
    mixed = 0.3 * scores.softmax(-1) + 0.7 * even
    want = torch.where(seen.any(-1)[:, None], mixed @ one.value.repeat_interleave(4 // kv_heads, 1), out)
    got = HeadForce(rho=0.7, spans=SPAN, rows=rows, prompt_len=15).adjust(one, out, lse)
    changed = {"all": slice(0, None), "last": slice(14, 15), "answer": slice(15, None)}[rows]
    kept = [n for n in range(20) if n not in range(20)[changed]]
    torch.testing.assert_close(got[:, :, changed], want[:, :, changed], **EXACT)
    assert torch.equal(got[:, :, kept], out[:, :, kept])
    assert torch.equal(got[:, :, :2], out[:, :, :2])


def test_forcing_onto_the_first_token_gives_its_value():
    one = call()
    got = HeadForce(spans=((0, 1),), rows="all").adjust(one, torch.zeros(1, 4, 20, 8).double(), None)
    torch.testing.assert_close(got, one.value[:, :, :1].repeat_interleave(2, 1).expand(-1, -1, 20, -1), **EXACT)


def test_forcing_does_not_reach_through_a_plan():
    one = call()
    one.plans.append((None, None, Window(0, 3)))
    out, _ = attention(one, scores_of(one, Window(0, 3)))
    got = HeadForce(spans=((4, 5),), rows="all").adjust(one, out, None)
    changed = (got != out).any(-1)[0, 0].nonzero()[:, 0].tolist()
    assert changed == [4, 5, 6]


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0, 2.0, 0.0]).double()])
def test_block_is_attention_without_the_span(sinks):
    one = call(sinks=sinks)
    scores = scores_of(one)
    out, lse = attention(one, scores)
    hidden = ((0, 3), (9, 11))
    inside = torch.zeros(20).index_fill(0, torch.tensor([0, 1, 2, 9, 10]), 1.0).bool()
    want, _ = attention(one, scores.masked_fill(inside, -math.inf))
    got = HeadAblate(mode="block", spans=hidden).adjust(one, out, lse)
    # the first three queries see nothing else, and stay as they are
    assert torch.equal(got[:, :, :3], out[:, :, :3])
    torch.testing.assert_close(got[:, :, 3:], want[:, :, 3:], atol=1e-6, rtol=1e-5)


def test_zero_mean_and_resample(tmp_path):
    one = call(dtype=torch.float32, batch=2)
    out, lse = reference.run(one, Dense())
    half = HeadAblate(mode="zero", amount=0.5).adjust(one, out, lse)
    torch.testing.assert_close(half, out / 2)
    assert torch.equal(HeadAblate(mode="resample").adjust(one, out, lse), out.roll(1, 0))
    with pytest.raises(UnsupportedError, match="batch of two"):
        HeadAblate(mode="resample").adjust(call(), out[:1], lse)
    model = tiny.tiny("llama", vocab_size=512)
    path = calibrate(model, tiny_tokenizer(), "head_mask", tmp_path / "means.safetensors", texts=["The mill. " * 40])
    ids = tiny.text_inputs(model)
    with hfpatch.patch(model, "head_ablate", means=str(path), heads={1: [2]}) as handle:
        a = logits(model, ids)
        assert a.isfinite().all()
        with handle.disabled():
            assert not torch.allclose(a, logits(model, ids))
    with pytest.raises(ConfigError, match="this model has"):
        hfpatch.patch(tiny.tiny("llama", num_hidden_layers=2), "head_ablate", means=str(path))


def test_last_rows_only():
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, batch=2, length=20, padding=[4, 0])
    dense = logits(model, inputs)
    last = model.config.num_hidden_layers - 1
    for spec in ("head_scale:factor=0,rows=last", "head_ablate:mode=zero,rows=last", "head_force:spans=[2,5]"):
        with hfpatch.patch(model, spec, layers=last):
            got = logits(model, inputs)
        real = inputs["attention_mask"].bool()
        same = real.clone()
        same[:, -1] = False
        assert torch.equal(got[same], dense[same]), spec
        assert not torch.allclose(got[:, -1], dense[:, -1])


def test_other_heads_and_the_first_cache_are_untouched():
    """What a head writes changes, for the chosen heads; keys and values of the first patched layer do not."""
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=20)
    outputs = {}

    def keep(module, args):
        outputs[module] = args[0].detach()

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    runs = []
    specs = (
        "steer:alpha=0.1,spans=[2,6]",
        "head_force:spans=[2,6],rows=all",
        "head_ablate:mode=block,spans=[2,6]",
        None,
    )
    for spec in specs:
        handle = hfpatch.patch(model, spec, heads={1: [0, 3]}) if spec else None
        cache = DynamicCache()
        with torch.no_grad():
            model(**inputs, **{cache_argument(model): cache})
        runs.append((outputs[model.model.layers[1].self_attn.o_proj].unflatten(-1, (4, 16)), cache))
        if handle is not None:
            handle.remove()
    for hook in hooks:
        hook.remove()
    dense, plain = runs.pop()
    for written, cache in runs:
        torch.testing.assert_close(written[:, :, 1:3], dense[:, :, 1:3], **CLOSE)
        assert not torch.allclose(written[:, :, 0], dense[:, :, 0], atol=1e-3)
        for n in (0, 1):
            assert torch.equal(cache.layers[n].keys, plain.layers[n].keys)
        assert not torch.equal(cache.layers[2].keys, plain.layers[2].keys)


# Together ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        "swa:window=6,sink=1",
        "sa:window=6,local=2",
        "flexprefill:gamma=0.6,block_size=4,min_budget=4",
        "head_gate:score=far_est,window=5,sink=1",
        "duo:scores=random,window=9,sink=2",
    ],
)
def test_all_together_under_a_sparse_plan_in_a_padded_batch(plan):
    """One handle with a plan and all six corrections; every row of a padded batch gives what it gives alone."""
    model = tiny.tiny("qwen2")
    inputs = tiny.text_inputs(model, batch=3, length=30, padding=[6, 0, 3])
    patches = [
        "head_scale:factor=0.5,heads={2:[1]}",
        "head_force:spans=[2,4],heads={2:[0]},rows=all",
        "head_ablate:mode=block,spans=[5,8],heads={0:[3]}",
        "steer:alpha=0.1,spans=[[3,7]],prompt_len=20,heads={0:[1],1:[0,2]}",
        "act:thr=0.05,skip_first=0,skip_last=0,heads={0:[0,2],1:[1,3]}",
        "head_mask:mode=uniform,phase=both,heads={2:[3]}",
        plan,
    ]
    with hfpatch.patch(model, patches) as handle:
        assert [part.method.card.family for part in handle.parts][0] == "attention"
        batch = logits(model, inputs)
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for row, pad in enumerate((6, 0, 3)):
            single = {name: value[row : row + 1, pad:] for name, value in inputs.items()}
            torch.testing.assert_close(batch[row : row + 1, pad:], logits(model, single), **CLOSE)
            alone = model.generate(**single, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert torch.equal(made[row, pad:], alone[0])
    assert not hfpatch.is_patched(model)


def test_steer_under_a_window_in_the_model():
    """The patched layer's output is the biased softmax over the keys that the window keeps."""
    model = tiny.tiny("llama", num_hidden_layers=1)
    inputs = tiny.text_inputs(model, length=24)
    seen = {}

    def keep(module, args):
        seen["out"] = args[0].detach()

    class Probe(hfpatch.Method):
        name = "probe_call"
        card = hfpatch.Card(family="calibration", summary="", paper="")

        def adjust(self, call, out, lse):
            seen["call"] = call
            return out

    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(keep)
    with hfpatch.patch(model, [Probe(), Steer(alpha=0.1, spans=SPAN), "swa:window=8,sink=1"]):
        logits(model, inputs)
    hook.remove()
    one = seen["call"]
    bias = torch.zeros(24).index_fill(0, torch.tensor(INSIDE), math.log(10))
    want, _ = attention(one, scores_of(one, Window(1, 8)) + bias)
    torch.testing.assert_close(seen["out"].unflatten(-1, (4, 16)).transpose(1, 2), want, **CLOSE)


def test_steer_after_vision_pruning_finds_its_tokens():
    """In a layer that lost image tokens the span is the same tokens, at other slots."""
    one = call(12, q_len=12)
    one.seq.kept[0] = torch.tensor([[0, 1, 2, 5, 7, 10, 11, 12]])
    one.seq.prompt_len = 13
    # eight tokens of the prompt and four that were written
    found = Steer(spans=((2, 3), (10, 12)), alpha=0.5).marked(replace(one, phase="extend"), True)
    assert found.keys.slots.tolist() == [[2, 5, 6, 8, 9, 10, 11]] or found.keys.slots.tolist() == [[2, 5, 6]]
    padded = replace(one, mask=torch.tensor([[False] * 2 + [True] * 10]), phase="extend")
    found = HeadForce(spans=((0, 1), (8, 9))).marked(padded)
    # two tokens of padding come first
    assert found.keys.slots.tolist() == [[2, 5]]


# Spans ---------------------------------------------------------------------------------------------------------------

TEXT = "The mill stood by the river. Answer in JSON. The mill is old, naïve café 😀!"


def text_of(tokenizer, ids, spans):
    return [tokenizer.decode(ids[start:stop]) for start, stop in spans.ranges]


@pytest.mark.parametrize("piece", ["Answer in JSON.", "naïve café 😀", "The mill", TEXT])
def test_text_becomes_tokens(piece):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    found = find_spans(tokenizer, TEXT, text=piece)
    assert found.prompt_len == len(ids)
    assert len(found.ranges) == TEXT.count(piece)
    for text in text_of(tokenizer, ids, found):
        assert piece in text and len(text) <= len(piece) + 4
    start = TEXT.index(piece)
    first = find_spans(tokenizer, TEXT, chars=[(start, start + len(piece))])
    assert first.ranges[0] == found.ranges[0]
    assert find_spans(tokenizer, ids, text=piece) == found


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        # Llama 3's way
        "{{ bos_token }}{% for m in messages %}<h>{{ m['role'] }}</h>\n\n{{ m['content'] }}<eot>{% endfor %}"
        "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}",
        # Mistral's: no system turns of its own
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
        # one that writes a system turn by itself
        "{% if messages[0]['role'] != 'system' %}<|system|>be good<end>{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}",
    ],
)
def test_roles_become_tokens(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.bos_token = "<eos>"
    chat = [("system", "Be brief.")] if "[INST]" not in template else []
    chat += [("user", "Who are you?"), ("assistant", "The miller."), ("user", "Since when?")]
    messages = [{"role": role, "content": content} for role, content in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for role in ("system", "user", "assistant"):
        if role == "system" and "[INST]" in template:
            with pytest.raises(UnsupportedError, match="no system turns"):
                find_spans(tokenizer, messages, role=role)
            continue
        found = text_of(tokenizer, ids, find_spans(tokenizer, messages, role=role))
        wanted = [content for name, content in chat if name == role]
        assert [wanted[n] in one and len(one) <= len(wanted[n]) + 2 for n, one in enumerate(found)] == [True] * len(
            wanted
        )


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (TEXT, {"text": "not there at all"}, "is not in the prompt"),
        (TEXT, {"text": ""}, "empty text"),
        (TEXT[:40], {"text": "Answer in JSON. The mill"}, "is cut: of its 24 characters the prompt has 11, at its end"),
        (TEXT[33:], {"text": "river. Answer in JSON."}, "is cut.*at its beginning"),
        (TEXT, {"chars": [(5, 900)]}, "not in the prompt"),
        (TEXT, {"text": "JSON", "role": "user"}, "one of them"),
        (TEXT, {"role": "user"}, "no turn of user"),
        (TEXT, {"role": "tool"}, "not one of"),
        ("<|user|>\nthis was cut o", {"role": "user"}, "has no end"),
        (TEXT, {"text": "old, naïve", "max_length": 30}, "is cut: of the prompt's"),
    ],
)
def test_spans_that_are_not_there_are_named(prompt, options, message):
    with pytest.raises(ConfigError, match=message):
        find_spans(tiny_tokenizer(), prompt, **options)


def test_no_template_no_roles():
    with pytest.raises(UnsupportedError, match="no chat template"):
        find_spans(tiny_tokenizer(chat_template=None), TEXT, role="user")


def test_left_truncation_moves_spans():
    tokenizer = tiny_tokenizer()
    whole = find_spans(tokenizer, TEXT, text="naïve")
    tokenizer.truncation_side = "left"
    try:
        cut = find_spans(tokenizer, TEXT, text="naïve", max_length=30)
    finally:
        tokenizer.truncation_side = "right"
    lost = whole.prompt_len - 30
    assert cut == Spans(tuple((a - lost, b - lost) for a, b in whole.ranges), 30)


@pytest.mark.parametrize("way", ["text", "role", "chars", "marked"])
def test_rows_have_their_own_spans(way):
    """Spans found in each row of a padded batch are those that were found one by one."""
    tokenizer = tiny_tokenizer()
    model = tiny.tiny("llama", vocab_size=512)
    prompts = [
        [{"role": "user", "content": "The river is deep. Answer at once, miller."}],
        [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Answer at once!"}],
    ]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }
    how = {"text": {"text": "Answer at once"}, "role": {"role": "user"}, "chars": {"chars": [(10, 22)]}}.get(way, {})
    found = [find_spans(tokenizer, row, **(how or {"text": "Answer"})) for row in rows]
    told = marked(*found) if way == "marked" else reading(tokenizer)
    with hfpatch.patch(model, "steer", alpha=0.05, **how), told:
        batch = logits(model, inputs)
        beams = model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for n, row in enumerate(rows):
        pad = longest - len(row)
        with hfpatch.patch(model, "steer", alpha=0.05, **found[n].options()):
            alone = logits(model, {"input_ids": torch.tensor([row])})
            one = model.generate(torch.tensor([row]), num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
        torch.testing.assert_close(batch[n, pad:], alone[0], **CLOSE)
        assert torch.equal(beams[n, pad:], one[0])
    assert not torch.allclose(batch[0, -1], logits(model, inputs)[0, -1], atol=1e-3)


def test_generated_tokens_keep_their_weight():
    """With the prompt's length said, one forward over prompt and answer is what decoding does; else the answer is."""
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=20)["input_ids"]

    def last(**options):
        cache = DynamicCache()
        with hfpatch.patch(model, "steer", alpha=0.05, spans=SPAN, **options), torch.no_grad():
            model(input_ids=ids[:, :15], **{cache_argument(model): cache})
            steps = [model(input_ids=ids[:, n : n + 1], **{cache_argument(model): cache}).logits for n in range(15, 20)]
            return torch.cat(steps, 1), model(input_ids=ids).logits[:, 15:]

    torch.testing.assert_close(*last(prompt_len=15), **CLOSE)
    torch.testing.assert_close(*last(generated=False), **CLOSE)
    decoded, at_once = last()
    torch.testing.assert_close(decoded, last(prompt_len=15)[0], **CLOSE)
    assert not torch.allclose(decoded, at_once, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "was not told which part"),
        ({"text": "x"}, "needs the tokenizer"),
        ({"spans": [3, 2]}, "pairs"),
        ({"spans": [["a", 2]]}, "pairs"),
        ({"spans": [2, 9], "text": "x"}, "give one of them"),
        ({"spans": [2, 9], "prompt_len": 5}, "inside the prompt"),
        ({"role": "tool"}, "not one of"),
        ({"alpha": 0.0, "spans": [1, 2]}, "out of range"),
        ({"spans": [1, 2], "heads": {1: [4]}}, "layer 1, head 4 does not exist"),
        ({"spans": [1, 2], "heads": {9: [0]}}, "layer 9, head 0 does not exist"),
    ],
)
def test_bad_steering(options, message):
    model = tiny.tiny("llama")
    with pytest.raises(ConfigError, match=message), hfpatch.patch(model, "steer", **options):
        logits(model, tiny.text_inputs(model))


def test_a_span_beyond_the_prompt_is_noticed_when_the_answer_begins():
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=20)["input_ids"]
    for method in (Steer(spans=((15, 40),)), HeadForce(spans=((15, 40),), rows="all")):
        with hfpatch.patch(model, method), pytest.raises(ConfigError, match="ends at token 40, and the prompt had 20"):
            model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_marks_for_another_batch_are_refused():
    model = tiny.tiny("llama")
    two = marked(Spans(((1, 2),)), Spans(((1, 2),)))
    wrong = pytest.raises(ConfigError, match="names the spans of 2 prompts, and 3 run")
    with hfpatch.patch(model, "steer"), two, wrong:
        logits(model, tiny.text_inputs(model, batch=3))


def test_a_cache_from_before_the_patch_has_no_span():
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=20)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, **{cache_argument(model): cache})
        with hfpatch.patch(model, "steer", role="user"), pytest.raises(ConfigError, match="did not see the prompt"):
            model(input_ids=ids[:, :1], **{cache_argument(model): cache})


# Gates ---------------------------------------------------------------------------------------------------------------


def profile(tmp_path, model, **options):
    spec = ",".join(["head_gate:window=6,sink=2", *(f"{k}={v}" for k, v in options.items())])
    text = "The baker carried a brass lantern near the harbour, as was the custom. " * 6
    return str(calibrate(model, tiny_tokenizer(), spec, tmp_path / "far.json", texts=[text], max_tokens=64))


def test_far_masses_are_summed_probabilities():
    model = tiny.tiny("llama", attn_implementation="eager")
    ids = tiny.text_inputs(model, length=40)["input_ids"]
    with torch.no_grad():
        maps = torch.cat(model(input_ids=ids, output_attentions=True).attentions)
    t, s = torch.arange(40)[:, None], torch.arange(40)
    far = (maps * ((t - s >= 6) & (s >= 2))).sum(-1)[..., 8:].mean(-1)
    found = far_masses(model, ids, 2, 6)
    torch.testing.assert_close(torch.stack([found[n] for n in range(3)]), far, **CLOSE)


def decoded(model, ids, what, prompt=30, **options):
    """Logits of decode steps under a patch."""
    cache = DynamicCache()
    handle = hfpatch.patch(model, what, **options)
    with handle, torch.no_grad():
        model(input_ids=ids[:, :prompt], **{cache_argument(model): cache})
        steps = [
            model(input_ids=ids[:, n : n + 1], **{cache_argument(model): cache}).logits
            for n in range(prompt, ids.shape[1])
        ]
        return torch.cat(steps, 1), handle.report()


@pytest.mark.parametrize("score", ["far_calib", "far_est"])
def test_gates_all_open_and_all_shut(tmp_path, score):
    model = tiny.tiny("qwen2", vocab_size=512)
    ids = tiny.text_inputs(model, length=40)["input_ids"]
    options = {"score": score, "window": 6, "sink": 2, "full_layers": None}
    if score == "far_calib":
        options["profile"] = profile(tmp_path, model)
    shut, report = decoded(model, ids, "head_gate", threshold=1.0, **options)
    want, _ = decoded(model, ids, "swa", window=6, sink=2, phase="decode")
    torch.testing.assert_close(shut, want, **CLOSE)
    assert report.density("decode") == pytest.approx(8 / 35.5, rel=0.02)
    opened, report = decoded(model, ids, "head_gate", threshold=0.0, **options)
    dense, _ = decoded(model, ids, "head_scale:factor=1")
    torch.testing.assert_close(opened, dense, **CLOSE)
    assert report.density("decode") == 1
    # the first two layers have no gates by default
    spared, _ = decoded(model, ids, "head_gate", threshold=1.0, **{**options, "full_layers": "0-2"})
    torch.testing.assert_close(spared, dense, **CLOSE)


def test_fixed_gates_hide_the_far_keys_of_some_groups(tmp_path):
    """Groups by their largest head; rows of groups that are off equal window attention, the others are dense."""
    model = tiny.tiny("llama", vocab_size=512)
    path = profile(tmp_path, model)
    far = torch.tensor(json.loads((tmp_path / "far.json").read_text())["far"]).view(3, 2, 2).amax(-1)
    limit = float(far[2].mean())
    method = HeadGate(profile=path, threshold=limit, window=6, sink=2, full_layers=None)
    one = call(30, q_len=1, layer_idx=2, num_layers=3, dtype=torch.float32)
    plan = method.plan(one)
    plan.check(one)
    out, _ = attend(one, plan)
    near, _ = attend(one, Window(2, 6))
    dense, _ = attend(one, Dense())
    for group in range(2):
        want = dense if far[2, group] > limit else near
        torch.testing.assert_close(out[:, 2 * group : 2 * group + 2], want[:, 2 * group : 2 * group + 2], **CLOSE)
    assert float(plan.density(one)) == pytest.approx((1 + 8 / 30) / 2)
    # chosen heads alone
    some = replace(one.select_heads(torch.tensor([0, 3])), heads=(0, 3))
    torch.testing.assert_close(attend(some, method.plan(some))[0], out[:, [0, 3]], **CLOSE)
    # a prompt, in blocks: at least the window, at most the rest of a block more
    prompt = call(200, layer_idx=2, num_layers=3, dtype=torch.float32)
    plan = method.plan(prompt)
    plan.check(prompt)
    kept = visible(prompt, plan)[0].sum(-1)
    off = 2 * int(far[2].argmin())
    assert kept[off][199] <= 2 * 64 + 64 and (kept[off] >= (torch.arange(200) + 1).clamp(max=8)).all()
    assert torch.equal(kept[2 - off], torch.arange(200) + 1)


def test_shuffled_gates_have_the_same_share(tmp_path):
    model = tiny.tiny("llama", num_hidden_layers=6, vocab_size=512)
    path = profile(tmp_path, model)
    far = torch.tensor(json.loads((tmp_path / "far.json").read_text())["far"]).view(6, 2, 2).amax(-1)
    limit = float(far[2:].flatten().median())
    gates = lambda **o: [HeadGate(profile=path, threshold=limit, **o)._gates(n) for n in range(2, 6)]
    plain = gates()
    shuffled = [gates(shuffle=seed) for seed in range(5)]
    assert {sum(map(sum, one)) for one in [plain, *shuffled]} == {sum(map(sum, plain))}
    assert any(one != plain for one in shuffled) and gates(shuffle=1) == shuffled[1]


def test_a_freed_cache_gives_the_same_tokens(tmp_path):
    """Groups that are off keep sinks and window, of the prompt too; tokens are those of a window with a whole cache."""
    model = tiny.tiny("llama", vocab_size=512)
    path = profile(tmp_path, model)
    far = torch.tensor(json.loads((tmp_path / "far.json").read_text())["far"]).view(3, 2, 2).amax(-1)
    limit = float(far[1:].flatten().sort().values[1:3].mean())
    off = {n: [h for h in range(4) if far[n, h // 2] <= limit] for n in (1, 2)}
    off = {n: heads for n, heads in off.items() if heads}
    inputs = tiny.text_inputs(model, batch=2, length=40, padding=[3, 0])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    gate = {"profile": path, "threshold": limit, "window": 6, "sink": 2, "full_layers": [0], "free_cache": True}
    with hfpatch.patch(model, "swa", window=6, sink=2, heads=off):
        want = model.generate(**inputs, **options)
    cache = DynamicCache()
    with hfpatch.patch(model, "head_gate", phase="both", **gate):
        assert torch.equal(model.generate(**inputs, **options, **{cache_argument(model): cache}), want)
    assert {n for n, layer in enumerate(cache.layers) if getattr(layer, "short", None) is not None} == set(off)


def test_far_estimate_is_right_for_gaussian_keys():
    generator = torch.Generator().manual_seed(0)
    n, dim = 10_000 + 260, 64
    key = torch.randn(1, 1, n, dim, generator=generator) + 0.3
    query = torch.nn.functional.normalize(torch.randn(1, 4, 1, dim, generator=generator), dim=-1)
    one = AttentionCall(query, key, key, scaling=1.0, phase="decode", layer_idx=2, num_layers=3)
    far = HeadGate(score="far_est")._estimate(one, 1)[..., 0]
    scores = (query @ key.mT)[..., 0, :]
    true = torch.sigmoid(
        scores[..., 4:-256].logsumexp(-1) - torch.cat([scores[..., :4], scores[..., -256:]], -1).logsumexp(-1)
    )
    assert (torch.logit(far) - torch.logit(true)).abs().max() < 0.1
    # a single key that carries the mass is missed, as it must be: it is one in ten thousand to mean and variance
    key[:, :, 5000] = 30 * query[:, :1, 0]
    scores = (query @ key.mT)[..., 0, :]
    assert scores[0, 0, 5000] > scores[0, 0, :4].logsumexp(0) + 10
    assert HeadGate(score="far_est")._estimate(one, 1)[0, 0] < 0.99


def test_estimates_of_a_decode_step_are_those_of_one_row_and_follow_the_cache():
    one = call(60, q_len=1, dtype=torch.float32)
    method = HeadGate(score="far_est", window=6, sink=2)
    fresh = method._estimate(replace(one, seq=None), 1)
    extend = method._estimate(replace(one, phase="extend"), 1)
    torch.testing.assert_close(fresh, extend, **CLOSE)
    # step by step, with sums that are carried on
    state = SequenceState()
    for n in range(40, 61):
        state.forwards += 1
        step = replace(one, key=one.key[:, :, :n], value=one.value[:, :, :n], seq=state)
        got = method._estimate(step, 1)
        torch.testing.assert_close(got, method._estimate(replace(step, seq=None), 1), **CLOSE)
    # a cropped cache starts anew
    state.forwards += 1
    crop = replace(one, key=one.key[:, :, :45], value=one.value[:, :, :45], seq=state)
    torch.testing.assert_close(method._estimate(crop, 1), method._estimate(replace(crop, seq=None), 1), **CLOSE)
    # a prompt: the mean over the rows of a tile, each as if it were decoded, but for keys of the tile itself
    prompt = call(60, dtype=torch.float32)
    far = method._estimate(prompt, 1)
    rows = [
        replace(one, query=prompt.query[:, :, n : n + 1], key=prompt.key[:, :, : n + 1], seq=None) for n in range(60)
    ]
    want = torch.cat([method._estimate(row, 1) for row in rows[9:]], -1)
    torch.testing.assert_close(far[..., 9:], want, **CLOSE)
    assert (far[..., :8] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("threshold", [0.95, 1.0])
def test_gated_prompts_in_padded_batches(family, threshold):
    model = tiny.tiny(family)
    inputs = tiny.text_inputs(model, batch=2, length=300, padding=[9, 0])
    options = {"score": "far_est", "window": 6, "sink": 1, "full_layers": None, "phase": "both", "threshold": threshold}
    with hfpatch.patch(model, "head_gate", **options) as handle:
        batch = logits(model, inputs)
        assert threshold < 1 or handle.report().density("prefill") < 1
        single = {name: value[:1, 9:] for name, value in inputs.items()}
        torch.testing.assert_close(batch[:1, 9:], logits(model, single), atol=1e-4, rtol=1e-3)


def test_gate_files_and_options_that_do_not_fit(tmp_path):
    model = tiny.tiny("llama", vocab_size=512)
    with pytest.raises(DataMissingError, match="hfpatch calibrate MODEL -p head_gate"):
        hfpatch.patch(model, "head_gate")
    path = profile(tmp_path, model)
    with pytest.raises(ConfigError, match="this model has"):
        hfpatch.patch(tiny.tiny("llama", num_hidden_layers=4), "head_gate", profile=path)
    with pytest.raises(ConfigError, match="need fixed gates"):
        HeadGate(score="far_est", shuffle=1)
    with pytest.raises(DataMissingError):
        HeadGate(profile=str(tmp_path / "none.json"))
    card = json.loads((tmp_path / "far.json").read_text())["card"]
    assert card["window"] == 6 and card["share of KV groups on"]["at 0.05"] > 0


@pytest.mark.parametrize("mode", ["before", "after"])
def test_moh_is_its_router(mode):
    """MoH-LLaMA3: the first half always on, the best of the others by the norm of the query, before or after RoPE."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 11, 16, generator=generator)
    out = torch.randn(2, 8, 11, 16, generator=generator)
    if mode == "after":
        # RoPE turns pairs of numbers
        angle = torch.rand(11, 8, generator=generator)
        a, b = q.chunk(2, -1)
        q = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    got = MixtureOfHeads().adjust(AttentionCall(q, q, q), out, None)
    for batch in range(2):
        for token in range(11):
            norms = [float(q[batch, h, token].norm()) for h in range(8)]
            best = sorted(range(4, 8), key=lambda h: -norms[h])[:2]
            for head in range(8):
                want = out[batch, head, token] if head < 4 or head in best else torch.zeros(16)
                assert torch.equal(got[batch, head, token], want)


def test_moh_writes_means_where_it_is_told_to(tmp_path):
    model = tiny.tiny("llama", vocab_size=512)
    path = calibrate(model, tiny_tokenizer(), "head_mask", tmp_path / "means.safetensors", texts=["The mill. " * 40])
    with pytest.raises(ConfigError, match="means=FILE"):
        MixtureOfHeads(off="mean")
    one = call(dtype=torch.float32, layer_idx=1)
    one = replace(one, query=torch.randn(1, 4, 20, 16))
    out = torch.randn(1, 4, 20, 16)
    method = MixtureOfHeads(score="outnorm", shared=0, topk=1, off="mean", means=str(path))
    got = method.adjust(one, out, None)
    from safetensors.torch import load_file

    mean = load_file(path)["means"][1][:, None]
    off = (got == mean).all(-1)
    assert (off.sum(1) == 3).all()
    torch.testing.assert_close((out - mean).norm(dim=-1).argmax(1), (~off).float().argmax(1))


# Tasks ---------------------------------------------------------------------------------------------------------------


def test_colored_objects_on_gpt2():
    """The intervention of the circuit paper, on a random model of GPT-2's architecture: it runs, on the last row."""
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=512, n_positions=512, n_embd=64, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None,
        initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    task = ColoredObjects(samples=4)
    samples = list(task.draw(tokenizer, {}, 0))
    assert [s.ids for s in task.draw(tokenizer, {}, 0)] == [s.ids for s in samples]
    for sample in samples:
        wrong = [tokenizer.decode(sample.ids[a:b]).strip() for a, b in sample.meta["spans"]]
        asked = sample.prompt.split("\n")[2]
        assert len(wrong) == 2 and all(f" {colour} " in asked for colour in wrong)
        assert sample.gold.lower() not in wrong and f"{sample.gold.lower()} {asked.split()[-1][:-1]}" in asked
        assert len(set(sample.meta["answers"])) > 1
    dense = [task.run(model, tokenizer, sample).scores for sample in samples]
    with hfpatch.patch(model, "head_force", heads={1: [0, 2], 2: [3]}):
        forced = [task.run(model, tokenizer, sample).scores for sample in samples]
    assert all(a["difference"] != b["difference"] for a, b in zip(dense, forced, strict=True))


def rows_of_nq(path):
    people = ["Ada Lovelace", "Grace Hopper", "Alan Turing", "Mary Somerville"]
    rows = [
        {
            "question": f"who built engine number {n}",
            "answers": [name],
            "ctxs": [{"title": "Engines", "text": f"The engine was built by {name} in a shed.", "isgold": True}],
        }
        for n, name in enumerate(people)
    ]
    rows.append({"question": "what is a shed", "answers": ["shed"], "ctxs": rows[0]["ctxs"]})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_counterfactual_contexts_contradict(tmp_path):
    tokenizer = tiny_tokenizer()
    task = Counterfactual(data=rows_of_nq(tmp_path / "nq.jsonl"), samples=4, fluency=4, max_new_tokens=3)
    (cell,) = task.cells()
    samples = list(task.draw(tokenizer, cell, 0))
    assert len(samples) == 4 and all("shed?" not in s.prompt for s in samples)
    for sample in samples:
        start, stop = sample.meta["span"]
        context = tokenizer.decode(sample.ids[start:stop])
        assert sample.gold[0] in context and sample.meta["old"][0] not in context
        assert task.score(sample, f"It was {sample.gold[0].upper()}.") == {"context": 1.0, "memory": 0.0}
        assert task.score(sample, sample.meta["old"][0]) == {"context": 0.0, "memory": 1.0}
    model = tiny.tiny("llama", vocab_size=512)
    dense = task.run_batch(model, tokenizer, samples[:2])
    with hfpatch.patch(model, "steer", alpha=0.01):
        steered = task.run_batch(model, tokenizer, samples[:2])
        one = task.run(model, tokenizer, samples[0])
    assert set(one.scores) == set(task.metrics) and one.scores == steered[0].scores
    assert all(a.scores["nll"] != b.scores["nll"] for a, b in zip(dense, steered, strict=True))


def test_counterfactual_reads_nq_swap(tmp_path):
    row = {
        "question": "who built it?",
        "org_context": "<P> Ada built it. </P>",
        "org_answer": ["Ada"],
        "sub_context": "<P> Grace built it. </P>",
        "sub_answer": ["Grace"],
    }
    (tmp_path / "swap.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = Counterfactual(data=str(tmp_path / "swap.jsonl")).draw(tiny_tokenizer(), {"subtask": "swap"}, 0)
    assert sample.gold == ["Grace"] and sample.meta["old"] == ["Ada"] and "Grace built it" in sample.prompt
    with pytest.raises(DataMissingError, match="NQ-Swap"):
        Counterfactual()
    (tmp_path / "bad.jsonl").write_text('{"question": "why?"}\n')
    with pytest.raises(DataMissingError, match="gold passage"):
        Counterfactual(data=str(tmp_path / "bad.jsonl"))


def test_mean_values_of_nothing():
    value, seen = mean_values(call(), keys_of(19))
    assert seen.sum() == 4 and torch.equal(value[:, :, :19], torch.zeros_like(value[:, :, :19]))
