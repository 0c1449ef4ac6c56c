"""What choosing keys costs, beside the times of a bench; and when a forecast depends on a text's content."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import hfpatch
from hfpatch.cli import app
from hfpatch.cli.measure import timing_tables
from hfpatch.evals import latency
from hfpatch.evals.bench import Bench, Bencher
from hfpatch.methods.base import Card, Method
from hfpatch.plan import Window
from hfpatch.progress import Silent
from hfpatch.report import figures
from hfpatch.report.results import timing_of
from hfpatch.report.words import selection_text

NOW = [0.0]


@dataclass(frozen=True, kw_only=True)
class Slow(Method):
    """Takes a quarter of a second, on a clock of its own, to choose a window."""

    name: ClassVar[str] = "slow"
    card: ClassVar[Card] = Card(family="attention", summary="", paper="", phase="prefill")

    def plan(self, call):
        NOW[0] += 0.25
        return Window(1, 8)


def rows_of(model, patch, monkeypatch):
    """Rows of a bench of 64 tokens, in which nothing but choosing and 0.5 s a forward takes time."""
    monkeypatch.setattr(latency.time, "perf_counter", lambda: NOW[0])
    forward = model.forward

    def half_a_second(*args, **kwargs):
        NOW[0] += 0.5
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", half_a_second)
    monkeypatch.setattr("hfpatch.evals.bench._prompt", lambda *_: torch.arange(5, 69)[None])
    rows = []
    bench = Bench(lengths=64, repeats=2, warmup=1, decode_tokens=2, memory=False)
    with hfpatch.patch(model, patch) as handle:
        bencher = Bencher(model, None, handle, bench, ("dense", "patched"), "sdpa", 0, rows.append, Silent())
        for what, length in bench.parts():
            bencher.measure(what, length)
        engine = model._hfpatch.engine
        assert engine.watch is None
    return rows


def test_selection_is_told_apart(monkeypatch):
    # three layers choose, one of them slides natively
    rows = rows_of(tiny.tiny("gemma2"), Slow(), monkeypatch)
    rows += rows_of(tiny.tiny("llama"), Slow(), monkeypatch)
    found = {(row["what"], row["arm"], row.get("selection_ms")) for row in rows}
    assert found == {
        ("first_call", "dense", None),
        ("prefill", "dense", None),
        ("first_call", "patched", 250.0),
        ("prefill", "patched", 250.0),
        ("first_call", "patched", 750.0),
        ("prefill", "patched", 750.0),
        ("decode", "dense", None),
        ("decode", "patched", None),
    }
    assert {row["ms"] for row in rows if row.get("selection_ms") == 750.0} == {1250.0}
    timing = timing_of(rows[len(rows) // 2 :], "patched")
    (entry,) = timing["prefill"]
    assert entry["selection"]["median"] == 750.0 and entry["selection"]["n"] == 2
    assert entry["selection_share"] == pytest.approx(0.6) and selection_text(entry) == "750.0 (60.0 %)"
    assert timing["decode"][0]["selection"] is None and timing["decode"][0]["selection_share"] is None
    (table,) = timing_tables(timing)
    assert "selection" in [column.header for column in table.columns]


def test_what_chooses_nothing_has_no_selection(monkeypatch):
    rows = rows_of(tiny.tiny("llama"), "head_scale:factor=0.5", monkeypatch)
    assert all(row.get("selection_ms") is None for row in rows)
    timing = timing_of(rows, "patched")
    assert timing["prefill"][0]["selection"] is None
    (table,) = timing_tables(timing)
    assert "selection" not in [column.header for column in table.columns]


def test_watching_does_not_change_what_is_chosen():
    model = tiny.tiny("qwen3")
    inputs = tiny.text_inputs(model, batch=2, length=40, padding=[6, 0])
    with torch.no_grad(), hfpatch.patch(model, "flexprefill", block_size=4) as handle:
        plain, clock = model(**inputs).logits, latency.SelectionClock()
        assert clock.take_ms() is None
        with handle.watched(clock):
            assert torch.equal(model(**inputs).logits, plain)
        assert clock.take_ms() > 0 and clock.take_ms() is None
        model(**inputs)
        assert clock.take_ms() is None
    with pytest.raises(hfpatch.errors.HFPatchError, match="was removed"), handle.watched(clock):
        pass


@pytest.mark.parametrize(
    ("patch", "reads"),
    [
        ("swa:window=64", False),
        ("sa:window=64", False),
        ("power", False),
        ("flexprefill:min_budget=128", True),
        ("xattention", True),
        ("moba:block=64,topk=2", True),
        ("dhsa:budget=256,chunker=fixed", True),
        ("minference", True),
        ("minference:pattern=a_shape,local=64", False),
        # dense at this length, whatever the text says
        ("flexprefill", False),
    ],
)
def test_forecasts_say_when_they_depend_on_content(patch, reads):
    explained = hfpatch.explain(tiny.tiny("llama"), patch, seq_len=1024)
    notes = [note for note in explained.notes if "depends on the content" in note]
    assert bool(notes) == reads and ("depends on the content" in str(explained)) == reads
    assert not notes or re.search(rf"what {patch.partition(':')[0]} keeps", notes[0])


@dataclass(frozen=True, kw_only=True)
class Shapes(Method):
    """Asks tensors for their shape, dtype and device only, in every way that makes a tensor like another one."""

    name: ClassVar[str] = "shapes"
    card: ClassVar[Card] = Card(family="attention", summary="", paper="")

    def plan(self, call):
        query = call.query[:, :, 1:].flatten(0, 1).mT
        like = (torch.zeros_like(query[:, :1, :1]), query.new_ones(3), torch.empty_like(call.key[:, :, :1]))
        return Window(1, 8 + 0 * sum(x.numel() for x in like))


@dataclass(frozen=True, kw_only=True)
class Peeks(Shapes):
    """Looks at one value of a view of the keys."""

    name: ClassVar[str] = "peeks"

    def plan(self, call):
        return Window(1, 8 + int(call.key[0, 0, 5:].mT[0, 0] > 1))


def test_shapes_are_not_content():
    model = tiny.tiny("llama")
    assert not any("content" in note for note in hfpatch.explain(model, Shapes(), seq_len=128).notes)
    assert any("what peeks keeps" in note for note in hfpatch.explain(model, Peeks(), seq_len=128).notes)


def test_bench_shows_selection_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    tiny.tiny("llama", vocab_size=512).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    options = ["--lengths", "300", "--repeats", "2", "--warmup", "1", "--decode-tokens", "1"]
    result = CliRunner().invoke(app, ["bench", "model", "-p", "flexprefill:block_size=16,min_budget=32", *options])
    assert result.exit_code == 0, result.output
    run = Path("runs") / Path("runs/latest").read_text().strip()
    (entry,) = json.loads((run / "results.json").read_text())["timing"]["prefill"]
    assert 0 < entry["selection"]["median"] < entry["patched"]["median"] and 0 < entry["selection_share"] < 1
    shown = selection_text(entry)
    assert re.search(r"median ms .* selection +kept", result.output) and shown in result.output
    for report in ("report.md", "report.html"):
        text = (run / report).read_text()
        assert shown in text and "Selection: the part of patched in which keys are chosen" in text


def test_bench_of_prefill_alone(tmp_path, monkeypatch):
    """No decode steps are timed; memory is still measured, with one step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    tiny.tiny("llama", vocab_size=512).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    options = ["--lengths", "300", "--repeats", "1", "--warmup", "0", "--decode-tokens", "0"]
    result = CliRunner().invoke(app, ["bench", "model", "-p", "swa:window=32", *options])
    assert result.exit_code == 0, result.output
    run = Path("runs") / Path("runs/latest").read_text().strip()
    rows = [json.loads(line) for line in (run / "bench.jsonl").read_text().splitlines()]
    assert {row["what"] for row in rows} == {"prefill", "memory"}
    assert all(row["peak_decode_mb"] > 0 for row in rows if row["what"] == "memory")
