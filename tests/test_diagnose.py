"""Attention diagnostics: streamed numbers are those of whole attention maps; the command and the figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import tiny
import torch
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import hfpatch
from hfpatch.call import AttentionCall
from hfpatch.cli import app
from hfpatch.errors import ConfigError
from hfpatch.evals import diagnose as module
from hfpatch.evals.diagnose import Settings, diagnose
from hfpatch.report.diagnosis import diagnosis_charts
from hfpatch.report.figures import has_matplotlib
from hfpatch.spans import Spans

SETTINGS = {"window": 7, "sink": 3, "clip": 4, "near": 3, "far": 9, "quantile": 0.3, "layers": [1, 2]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of a small text in several blocks."""
    monkeypatch.setattr(module, "_FEWEST_ROWS", 4)
    monkeypatch.setattr(module, "_MOST_ROWS", 5)


def maps_of(model, ids):
    """Attention of every layer as transformers' eager attention gives it, fp64 [layers, heads, n, n]."""
    with torch.no_grad():
        return torch.cat(model(input_ids=ids, output_attentions=True).attentions).double()


def from_maps(probs, first, marks, s):
    """The definitions, on whole maps."""
    n = probs.shape[-1]
    t, k = torch.arange(n)[:, None], torch.arange(n)
    distance = (t - k).clamp(min=0).double()
    sink, rows = (k < s["sink"]).double(), slice(first, n)
    log_rows = (torch.arange(n) + 1.0).clamp(min=2).double().log()
    entropy = torch.special.entr(probs).sum(-1)
    rest = 1 - sink
    window = (distance < s["window"]).double()
    per_row = {
        "span": (probs * distance).sum(-1),
        "span_without_sinks": (probs * distance * rest).sum(-1) / (probs * rest).sum(-1).clamp(min=1e-12),
        "entropy": entropy,
        "entropy_share": entropy / log_rows,
        "sink_mass_1": probs[..., 0],
        "sink_mass": (probs * sink).sum(-1),
        "window_mass": (probs * window).sum(-1),
        "far_mass": (probs * (1 - window) * rest).sum(-1),
        "span_mass:mine": (probs * marks).sum(-1),
    }
    heads = {name: values[..., rows].mean(-1) for name, values in per_row.items()}
    used = heads["span"][s["layers"]].flatten()
    count = round(s["quantile"] * len(used))
    order = used.argsort()
    flat = probs[s["layers"]].flatten(0, 1)
    local, distant = flat[order[:count]].mean(0), flat[order[-count:]].mean(0)
    waad = (local * distance.clamp(max=s["clip"])).sum(-1)[rows]
    inside = (t - k >= s["near"]) & (t - k <= (s["far"] if s["far"] is not None else n)) & (t >= first)
    return heads, waad, (distant * inside).sum(0) / inside.sum(0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("far", [9, None])
def test_streamed_is_eager(family, far):
    model = tiny.tiny(family, attn_implementation="eager").double()
    ids = tiny.text_inputs(model, length=43)["input_ids"]
    marks = torch.zeros(43).index_fill(0, torch.tensor([2, 3, 4, 20]), 1.0).double()
    settings = {**SETTINGS, "far": far}
    spans = {"mine": Spans(((2, 5), (20, 21)))}
    found = diagnose(model, ids, start=11, spans=spans, **settings)
    heads, waad, fai = from_maps(maps_of(model, ids), 11, marks, settings)
    assert set(found.heads) == set(heads)
    for name, values in heads.items():
        torch.testing.assert_close(found.heads[name].double(), values, atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(found.waad.double(), waad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.fai.double(), fai, atol=1e-6, rtol=1e-5, equal_nan=True)
    # tokens that no row is in the right distance of
    unseen = [s for s in range(43) if s > 42 - SETTINGS["near"] or (far is not None and s + far < 11)]
    assert found.fai.isnan().nonzero()[:, 0].tolist() == unseen


def test_softcap_window_and_learned_sinks_are_the_models():
    """Where a model changes the softmax, rows are what it uses: compared with its eager maps."""
    for family in ("gemma2", "gpt_oss", "gemma3"):
        model = tiny.tiny(family, attn_implementation="eager")
        ids = tiny.text_inputs(model, length=40)["input_ids"]
        found = diagnose(model, ids, start=20, **{**SETTINGS, "layers": None})
        maps = maps_of(model, ids)
        torch.testing.assert_close(
            found.heads["sink_mass_1"].double(), maps[:, :, 20:, 0].mean(-1), atol=1e-5, rtol=1e-4
        )
        assert found.sliding and not set(found.sliding) & set(found.used)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
def test_streamed_is_the_definition_in_fp64(heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, 41, 16, generator=generator, dtype=torch.float64) for h in (heads, kv_heads))
    call = AttentionCall(q, k, k, scaling=0.7)
    scores = (q @ k.repeat_interleave(heads // kv_heads, 1).mT * 0.7).masked_fill(~call.causal(), -math.inf)
    found = probe_of(call, first=9)
    want, _, _ = from_maps(scores.softmax(-1), 9, torch.zeros(41).double(), {**SETTINGS, "layers": [0]})
    for name, values in found.means.items():
        torch.testing.assert_close(values, want[name][0], atol=1e-12, rtol=1e-12, msg=name)
    probs, near = scores.softmax(-1)[0], SETTINGS["near"]
    distance = torch.arange(41)[:, None] - torch.arange(41)
    clipped = (probs * distance.clamp(0, SETTINGS["clip"])).sum(-1)
    torch.testing.assert_close(found.waad, clipped[:, 9:], atol=1e-12, rtol=1e-12)
    inside = (distance >= near) & (distance <= SETTINGS["far"]) & (torch.arange(41)[:, None] >= 9)
    torch.testing.assert_close(found.fai, (probs * inside).sum(1), atol=1e-12, rtol=1e-12)
    # every row's attention is somewhere
    everywhere = probe_of(call, near=0, far=None).fai
    torch.testing.assert_close(everywhere.sum(-1), torch.full((heads,), 41.0).double(), atol=1e-10, rtol=0)


def probe_of(call, first=0, **settings):
    one = module._Probe(
        settings=Settings.from_options({**SETTINGS, **settings, "layers": [0]}),
        first=first,
        marks=torch.zeros(call.kv_len, 0),
        names=(),
        curves=frozenset([0]),
    )
    one.adjust(call, call.query, None)
    return one.found[0]


def call_with(scores_of, n=32):
    """A call of one head whose scores are `scores_of(t, s)`."""
    t = torch.arange(n)
    scores = torch.tensor([[float(scores_of(i, j)) for j in range(n)] for i in range(n)])
    eye = torch.eye(n)[None, None]
    return AttentionCall(scores[None, None], eye, eye), t


def test_even_attention():
    call, t = call_with(lambda i, j: 0)
    found = probe_of(call, clip=5)
    assert found.means["span"].item() == pytest.approx(float((t / 2).mean()), abs=1e-5)
    assert found.means["entropy"].item() == pytest.approx(float((t + 1.0).log().mean()), abs=1e-5)
    assert found.means["sink_mass_1"].item() == pytest.approx(float((1 / (t + 1.0)).mean()), abs=1e-6)
    want = torch.stack([torch.arange(i + 1).clamp(max=5).float().mean() for i in range(32)])
    torch.testing.assert_close(found.waad[0], want, atol=1e-5, rtol=1e-5)


def test_attention_on_itself_and_on_the_first_token():
    call, t = call_with(lambda i, j: 100 * (i == j))
    found = probe_of(call)
    assert found.means["span"].item() == pytest.approx(0, abs=1e-5) and found.waad.abs().max() < 1e-5
    assert found.means["entropy"].item() == pytest.approx(0, abs=1e-5) and found.fai.abs().max() < 1e-6
    call, t = call_with(lambda i, j: 100 * (j == 0))
    found = probe_of(call, clip=4)
    assert found.means["span"].item() == pytest.approx(float(t.float().mean()), abs=1e-4)
    torch.testing.assert_close(found.waad[0], t.clamp(max=4).float(), atol=1e-5, rtol=0)
    assert found.means["sink_mass_1"].item() == pytest.approx(1)
    assert found.received[0, 0] == pytest.approx(1)


def test_waad_grows_with_its_clip_up_to_the_span():
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=40)["input_ids"]
    curves = [diagnose(model, ids, start=8, **{**SETTINGS, "clip": clip}).waad for clip in (1, 5, 20, 100)]
    assert all((a <= b + 1e-4).all() for a, b in zip(curves, curves[1:], strict=False))
    assert (curves[1] >= 0).all() and (curves[1] <= 5).all()
    whole = diagnose(model, ids, start=8, **{**SETTINGS, "clip": 100, "quantile": 0.5, "layers": [1]})
    spans = whole.heads["span"][1][whole.classes[1] == -1]
    assert whole.waad.mean() == pytest.approx(float(spans.mean()), abs=1e-4)


def test_classes_are_of_the_used_layers():
    model = tiny.tiny("llama", num_hidden_layers=6)
    found = diagnose(model, tiny.text_inputs(model, length=40)["input_ids"], start=10, quantile=0.25)
    # the middle third of six layers: 2, 3, 4
    assert found.used == [2, 3, 4]
    assert len(found.head_list(-1)) == len(found.head_list(1)) == 3
    assert {layer for layer, _ in found.head_list(-1) + found.head_list(1)} <= {2, 3, 4}
    most_local = max(float(found.heads["span"][h]) for h in found.head_list(-1))
    assert all(float(found.heads["span"][h]) >= most_local for h in found.head_list(1))


def test_logits_stay_and_nothing_stays_on_the_model():
    model = tiny.tiny("qwen2")
    ids = tiny.text_inputs(model, length=30)["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids).logits
    seen = []
    hook = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out))
    found = diagnose(model, ids)
    hook.remove()
    assert any(torch.equal(out[0], want[0]) for out in seen if out.shape[1] == 30)
    assert not hfpatch.is_patched(model) and found.rows == (15, 30)
    probs = want[0].double().softmax(-1)
    torch.testing.assert_close(found.token_entropy.double(), torch.special.entr(probs).sum(-1), atol=1e-5, rtol=1e-5)


def test_kept_mass_under_a_patch():
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=48)["input_ids"]
    kept = []
    for window in (4, 12, 48):
        with hfpatch.patch(model, "swa", window=window, sink=2):
            found = diagnose(model, ids, start=16, **{**SETTINGS, "window": window, "sink": 2})
        kept.append(found.heads["kept_mass"])
        # sinks and window without what is far is what the patch keeps
        torch.testing.assert_close(found.heads["kept_mass"], 1 - found.heads["far_mass"], atol=1e-5, rtol=1e-5)
        assert found.patches == [f"swa window={window} sink=2"]
    assert (kept[0][0] <= kept[1][0]).all()
    torch.testing.assert_close(kept[2], torch.ones_like(kept[2]), atol=1e-5, rtol=0)
    assert "kept_mass" not in diagnose(model, ids).heads


def test_memory_does_not_grow_with_the_square(monkeypatch):
    """Doubling the text doubles the largest tensors of a layer at most."""
    monkeypatch.setattr(module, "_FEWEST_ROWS", 16)
    monkeypatch.setattr(module, "_MOST_ROWS", 16)
    attention, sizes = module._attention, []

    def watched(*args):
        probs, whole = attention(*args)
        sizes.append(probs.numel())
        return probs, whole

    monkeypatch.setattr(module, "_attention", watched)
    for n in (1024, 2048):
        q = torch.randn(1, 2, n, 8)
        sizes.clear()
        probe_of(AttentionCall(q, q, q), first=n - 64)
        assert max(sizes) == 2 * 16 * n and len(sizes) == 4


def test_rhythm():
    curve = torch.tensor([0.0, 1, 0, 0, 5, 0, 0, 4, 0, 0])
    assert module._peaks(curve) == [1, 4, 7]
    assert module._peaks(torch.tensor([math.nan, 3.0, math.nan, 1.0])) == [1]
    assert module._peaks(torch.full((3,), math.nan)) == []
    model = tiny.tiny("llama")
    found = diagnose(model, tiny.text_inputs(model, length=40)["input_ids"], start=10, **SETTINGS)
    rhythm = found.rhythm()
    assert all(10 <= t < 40 for t in rhythm["waad_peaks"] + rhythm["fai_peaks"])
    assert 0 <= rhythm["fai_after_waad"] <= 1
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rhythm"] == rhythm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 40}, "outside the text"),
        ({"spans": {"x": Spans(((30, 50),))}}, "Was it cut off"),
        ({"near": 9, "far": 3}, "comes before near"),
        ({"layers": [7]}, "layer 7 does not exist"),
        ({"clipp": 3}, "Did you mean 'clip'"),
        ({"quantile": 0.7}, "out of range"),
    ],
)
def test_bad_input(options, message):
    model = tiny.tiny("llama")
    with pytest.raises(ConfigError, match=message):
        diagnose(model, tiny.text_inputs(model, length=40)["input_ids"], **options)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="no attention to look at"):
        diagnose(tiny.tiny("llama"), [5])


# Figures and the command ----------------------------------------------------------------------------------------------


def test_figures_show_what_the_tables_hold():
    model = tiny.tiny("gemma2")
    found = diagnose(model, tiny.text_inputs(model, length=40)["input_ids"], start=10, **{**SETTINGS, "layers": None})
    data = found.to_dict()
    charts = diagnosis_charts(data, "a model")
    assert [chart.name for chart in charts][-1] == "curves"
    assert len(charts) == len(found.heads) + 1 and len({chart.name for chart in charts}) == len(charts)
    span = charts[0]
    assert span.name == "heads-span" and span.header[:2] == ("layer", "head")
    assert {row[:2]: row[2] for row in span.rows} == {
        (n, h): value for n, row in enumerate(data["heads"]["span"]) for h, value in enumerate(row)
    }
    curves = charts[-1]
    assert curves.column("waad")[:10] == [None] * 10 and curves.column("waad")[10:] == data["waad"]
    assert curves.csv().count("\n") == 41
    if has_matplotlib():
        for chart in (span, curves):
            assert any(axes.get_xlabel() for axes in chart.draw(chart).axes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.tiny("llama", vocab_size=512, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(*args, exit_code=0):
    result = CliRunner().invoke(app, ["diagnose", *args])
    assert result.exit_code == exit_code, result.output
    return result


TEXT = "The baker carried a brass lantern near the harbour. The needle is here. It was raining as was the custom."


def test_command_prints_and_writes(checkpoint, tmp_path, monkeypatch):
    import hfpatch.report.figures as figures

    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    out = tmp_path / "out"
    result = run(checkpoint, "--prompt-file", str(file), "--span", "The needle", "--chars", "4:9", "-o", str(out))
    assert "on 'The needle'" in result.output and "global heads" in result.output
    data = json.loads((out / "diagnosis.json").read_text())
    assert "".join(data["words"]) == TEXT
    assert {"span_mass:The needle", "span_mass:4:9"} <= set(data["heads"])
    assert (out / "figures" / "heads-span.csv").is_file() and (out / "figures" / "curves.csv").is_file()
    same = json.loads(run(checkpoint, "--text", TEXT, "--json").stdout)
    assert same["heads"]["span"] == data["heads"]["span"] and "kept_mass" not in same["heads"]


def test_command_looks_at_an_answer_under_a_patch(checkpoint):
    args = ("--text", TEXT, "--answer", "6", "--role", "user", "-p", "swa:window=8,sink=1", "--measure", "window=8")
    data = json.loads(run(checkpoint, *args, "--json").stdout)
    first, stop = data["rows"]
    assert stop - first == len(data["waad"]) <= 6 and data["tokens"] == stop
    assert "span_mass:user" in data["heads"] and data["patches"] == ["swa window=8 sink=1"]
    kept = torch.tensor(data["heads"]["kept_mass"])
    assert (kept > 0).all() and (kept <= 1 + 1e-5).all() and (kept < 0.99).any()
    assert data["settings"]["window"] == 8


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--text", "a b", "--prompt-file", "x"), 2, "one of them"),
        (("--prompt-file", "nowhere.txt"), 1, "cannot read"),
        (("--text", TEXT, "--span", "no such thing"), 2, "is not in the prompt"),
        (("--text", TEXT, "--chars", "9"), 2, "START:STOP"),
        (("--text", TEXT, "--chars", "5:900"), 2, "characters"),
        (("--text", TEXT, "--measure", "windo=3"), 2, "Did you mean 'window'"),
        (("--text", TEXT, "-p", "nosuch"), 2, "unknown patcher"),
        (
            (
                "--text",
                "word " * 600,
            ),
            2,
            "more than the model's context",
        ),
    ],
)
def test_command_says_what_is_wrong(checkpoint, args, code, message):
    assert message in run(checkpoint, *args, exit_code=code).output


def test_help_is_light():
    code = "import sys\nfrom hfpatch.cli import app\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
