from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from report_rows import RECIPE, bench, both, memory, new_run, niah

from hfpatch.errors import ConfigError
from hfpatch.report.results import speed_text, summarise, tokens_text, verdict
from hfpatch.report.run import RunDir
from hfpatch.report.stats import paired_bootstrap, win_tie_loss


def fidelity(run: RunDir, id: int, agree: float, cosine: list[float | None], **more: object) -> None:
    cell = {"length": 1024}
    shared = {"task": "fidelity", "subtask": None, "cell": cell, "output": "", "answer_gold": ""}
    run.append_sample(niah("dense", 1024, 0, id, 0) | shared | {"scores": {"ppl_dense": 10.0}})
    scores = {"top1_agree": agree, "kl_last": 0.1 * id, "ppl_dense": 10.0, "ppl_patched": 11.0, "ppl_delta": 1.0}
    row = niah("patched", 1024, 0, id, 0) | shared | {"scores": scores, "per_layer": {"attn_cosine": cosine}}
    run.append_sample(row | more)


# Statistics ---------------------------------------------------------------------------------------------------------


def test_bootstrap_by_hand() -> None:
    # One loss in four pairs: a resample has Binomial(4, 1/4) losses, whose 2.5 and 97.5 percentiles are 0 and 3.
    delta, low, high = paired_bootstrap([1, 1, 1, 1], [1, 1, 1, 0])
    assert (delta, low, high) == (-0.25, -0.75, 0.0)
    assert paired_bootstrap([0.5] * 30, [0.5] * 30) == (0.0, 0.0, 0.0)
    assert paired_bootstrap([0.25], [0.75]) == (0.5, 0.5, 0.5)


def test_bootstrap_is_near_the_normal_interval_and_knows_no_order() -> None:
    rng = random.Random(0)
    a = [rng.gauss(0, 1) for _ in range(400)]
    b = [x + rng.gauss(0.5, 1) for x in a]
    delta, low, high = paired_bootstrap(a, b)
    # sd of the differences is 1, so the half width is 1.96 / sqrt(400) = 0.098; unpaired it would be 0.17
    assert delta == pytest.approx(sum(y - x for x, y in zip(a, b, strict=True)) / 400)
    assert (high - low) / 2 == pytest.approx(0.098, rel=0.15)
    order = list(range(400))
    rng.shuffle(order)
    assert paired_bootstrap([a[i] for i in order], [b[i] for i in order]) == (delta, low, high)
    assert paired_bootstrap(a, b, seed=1) != (delta, low, high)


def test_statistics_refuse_what_is_not_paired() -> None:
    for a, b in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError):
            paired_bootstrap(a, b)
    with pytest.raises(ValueError):
        win_tie_loss([1.0], [])
    assert win_tie_loss([0, 1, 1, 0, 1], [1, 1, 0, 0, 0]) == (1, 2, 2)


# Samples ------------------------------------------------------------------------------------------------------------


def test_quality_by_hand(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id, (dense, patched) in enumerate([(1, 1), (1, 0), (0, 1), (1, 0)]):
        both(run, 1024, 0, id, dense, patched)
    for id in range(20):
        both(run, 2048, 50, id, 1, 1)
    both(run, 1024, None, 0, 0, 1)
    both(run, 1024, None, 1, 0, 0)
    results = summarise(run)

    table = {(q["metric"], q["length"]): q for q in results["quality"]}
    assert [(q["metric"], q["length"]) for q in results["quality"]] == [
        (metric, length) for metric in ("contains", "exact") for length in (1024, 2048, None)
    ]
    short = table["contains", 1024]
    assert (short["n"], short["dense"], short["patched"], short["delta"]) == (4, 0.75, 0.5, -0.25)
    assert (short["win"], short["tie"], short["loss"]) == (1, 1, 2)
    assert short["indicative"] and not table["contains", 2048]["indicative"]
    whole = table["contains", None]
    assert (whole["n"], whole["dense"], whole["patched"]) == (24, 23 / 24, 22 / 24)
    assert whole["overall"] and not short["overall"]
    assert table["exact", 1024]["dense"] == 0.375 and not table["exact", 1024]["headline"]

    assert [(c["arm"], c["n"], c["false_positive_rate"]) for c in results["controls"]] == [
        ("dense", 2, 0.0),
        ("patched", 2, 0.5),
    ]
    (heatmap,) = results["heatmaps"]
    assert (heatmap["task"], heatmap["subtask"], heatmap["metric"]) == ("niah", "number", "contains")
    cells = [tuple(cell.values()) for cell in heatmap["cells"]]
    assert list(heatmap["cells"][0]) == ["length", "depth", "prompt_tokens", "n", "dense", "patched", "difference"]
    assert cells == [(1024, 0, 1020.0, 4, 0.75, 0.5, -0.25), (2048, 50, 2044.0, 20, 1.0, 1.0, 0.0)]
    assert results["density"]["asked"] == 0.25
    assert results["density"]["prefill"] == pytest.approx(0.3) and results["density"]["decode"] == 0.5
    assert results["arms"] == {"dense": 26, "patched": 26} and results["baseline"] == "sdpa"


def test_one_length_is_its_own_overall(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 1)
    assert [(q["length"], q["overall"]) for q in summarise(run)["quality"] if q["headline"]] == [(1024, True)]


def test_other_haystacks_are_other_tables(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 1)
    for arm in ("dense", "patched"):
        cell = {"length": 1024, "depth": 0, "haystack": "essays"}
        run.append_sample(niah(arm, 1024, 0, 0, 0, cell=cell))
    results = summarise(run)
    assert [h["setting"] for h in results["heatmaps"]] == [{"haystack": "essays"}, {}]
    assert [q["dense"] for q in results["quality"] if q["headline"]] == [0.0, 1.0]


def test_failed_samples_score_zero_and_are_counted(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 1)
    both(run, 1024, 0, 1, 1, 1, error="RuntimeError: out of memory", finish="error", scores={})
    results = summarise(run)
    row = results["quality"][0]
    assert (row["dense"], row["patched"], row["errors"]) == (1.0, 0.5, 1)
    assert (row["dense_without_errors"], row["patched_without_errors"]) == (1.0, 1.0)
    assert results["errors"] == {
        "count": 1,
        "of": 4,
        "fraction": 0.25,
        "messages": [{"arm": "patched", "message": "RuntimeError: out of memory", "count": 1}],
    }
    assert results["lost"]["top"][0]["patched"] == "RuntimeError: out of memory"
    assert any("1 of 4 samples failed" in note for note in results["warnings"])


def test_only_pairs_are_compared(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 1)
    run.append_sample(niah("dense", 1024, 0, 1, 0))
    results = summarise(run)
    assert (results["quality"][0]["n"], results["quality"][0]["dense"], results["unpaired"]) == (1, 1.0, 1)
    assert any("unfinished" in note for note in results["warnings"])


def test_a_sample_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 0)
    run.append_sample(niah("patched", 1024, 0, 0, 1))
    row = summarise(run)["quality"][0]
    assert (row["n"], row["patched"]) == (1, 1.0)


def test_dense_only(tmp_path: Path) -> None:
    run = new_run(tmp_path, {"patches": []})
    for id in range(4):
        run.append_sample(niah("dense", 1024, 0, id, id % 2))
    bench_rows = {"prefill": [10.0, 11.0], "decode": [1.0]}
    for what, times in bench_rows.items():
        bench(run, what, 1024, times, [])
    memory(run, "dense", 1024, 100, 10, 150, 120)
    results = summarise(run)
    row = results["quality"][0]
    assert (row["n"], row["dense"], row["patched"], row["delta"], row["ci"]) == (4, 0.5, None, None, None)
    assert results["heatmaps"][0]["cells"][0]["patched"] is None
    assert results["timing"]["prefill"][0]["ratio"] is None
    assert results["patch"] == "dense" and results["arms"] == {"dense": 4}
    said = verdict(results)
    assert said["word"] == "dense only" and "niah/number contains 0.500 (n=4)" in said["text"]


def test_an_empty_run_has_results(tmp_path: Path) -> None:
    results = summarise(new_run(tmp_path))
    assert results["quality"] == [] and verdict(results)["text"] == "nothing measured yet"


def test_lost_samples_come_largest_drop_first_and_shortened(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(11):
        both(run, 1024, 0, id, 1, 0, output="x" * 500)
    both(run, 1024, 0, 11, 0.9, 0.4)
    both(run, 1024, 0, 12, 0.4, 0.0)
    both(run, 1024, 0, 13, 0, 1)
    lost = summarise(run)["lost"]
    assert lost["count"] == 12 and len(lost["top"]) == 10
    assert all(sample["change"] == -1 for sample in lost["top"])
    assert len(lost["top"][0]["patched"]) == 200 and lost["top"][0]["dense"] == "1234567"


def test_fidelity_uses_the_patched_arm(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    fidelity(run, 0, 0.8, [1.0, 0.9, None])
    fidelity(run, 1, 1.0, [1.0, 0.7, 0.5])
    fidelity(run, 2, 0.0, [0.0], error="ValueError: no", scores={})
    results = summarise(run)
    assert [(row["length"], row["n"]) for row in results["fidelity"]["rows"]] == [(1024, 2), (None, 2)]
    assert results["fidelity"]["rows"][0]["scores"] == pytest.approx(
        {"top1_agree": 0.9, "kl_last": 0.05, "ppl_dense": 10.0, "ppl_patched": 11.0, "ppl_delta": 1.0}
    )
    assert results["fidelity"]["attn_cosine"] == pytest.approx([1.0, 0.8, 0.5])
    assert results["quality"] == [] and results["heatmaps"] == [] and results["unpaired"] == 0
    assert "top-1 agreement with dense 90.0 %" in verdict(results)["text"]


def test_expected_numbers(tmp_path: Path) -> None:
    expect = [
        {"metric": "niah.contains", "value": 0.98, "tol": 0.02, "source": "a paper"},
        {"metric": "niah.number.contains", "value": 0.76, "tol": 0.01, "source": ""},
        {"metric": "niah.exact", "value": 0.5, "tol": None, "source": ""},
        {"metric": "ruler.contains", "value": 0.5, "tol": 0.1, "source": ""},
    ]
    run = new_run(tmp_path, {"expect": expect})
    for id in range(3):
        both(run, 1024, 0, id, 1, id > 0)
    both(run, 2048, 0, 0, 1, 1)
    found = summarise(run)["expect"]
    # over the four samples, not over the two lengths
    assert [(e["ours"], e["within"]) for e in found] == [(0.75, False), (0.75, True), (0.375, None), (None, None)]
    assert found[0]["difference"] == pytest.approx(-0.23) and found[3]["difference"] is None


def test_kernels_layers_and_fallbacks(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 1, fallbacks={"no GPU": 3})
    both(run, 1024, 0, 1, 1, 1, fallbacks={"no GPU": 2, "odd head": 1})
    window = {"phase": "prefill", "action": "Window", "kernel": "fast", "refused": {"flash": "no GPU"}, "calls": 2}
    dense = {"phase": "prefill", "action": "Dense", "kernel": "sdpa", "refused": {}}
    layers = [
        *[window | {"layer": layer, "density": 0.2} for layer in (0, 1, 3)],
        dense | {"layer": 2, "calls": 2, "density": None},
        dense | {"layer": 3, "calls": 6, "density": 1.0},
    ]
    run.write_layers(layers)
    results = summarise(run)
    assert [(k["layers"], k["action"], k["kernel"], k["calls"]) for k in results["kernels"]] == [
        ("0-1, 3", "Window", "fast", 6),
        ("2-3", "Dense", "sdpa", 8),
    ]
    assert results["kernels"][0]["refused"] == {"flash": "no GPU"}
    # layer 3: 2 calls at 0.2 and 6 at 1.0
    assert [(d["layer"], round(d["density"], 9)) for d in results["density"]["layers"]] == [
        (0, 0.2),
        (1, 0.2),
        (3, 0.8),
    ]
    assert results["fallbacks"] == {"no GPU": 5, "odd head": 1}


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        niah(arm, length, depth, id, round(rng.random(), 3), fallbacks={f"reason {rng.randrange(3)}": 1})
        for length in (1024, 2048)
        for depth in (0, 50, None)
        for id in range(5)
        for arm in ("dense", "patched")
    ]
    written = []
    for turn in range(3):
        run = new_run(tmp_path / str(turn))
        for row in rows:
            run.append_sample(row)
        rng.shuffle(rows)
        results = summarise(run)
        assert json.dumps(results) == json.dumps(summarise(run))
        run.write_results(results)
        written.append((run.path / "results.json").read_bytes())
    assert written[0] == written[1] == written[2]


# Verdict ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "state"),
    [
        ([(1, 1)] * 30, "good"),
        ([(1, 1)] * 10, "unclear"),
        ([(1, 0)] * 15 + [(1, 1)] * 15, "bad"),
        ([(1, 0)] * 2 + [(0, 1)] * 2 + [(1, 1)] * 26, "unclear"),
        ([(0, 1)] * 15 + [(1, 1)] * 15, "good"),
        ([(0, 0)] * 30, "unclear"),
    ],
)
def test_verdict_follows_the_interval(tmp_path: Path, pairs: list[tuple[int, int]], state: str) -> None:
    run = new_run(tmp_path)
    for id, (dense, patched) in enumerate(pairs):
        both(run, 1024, 0, id, dense, patched)
    assert verdict(summarise(run))["state"] == state


def test_verdict_names_the_worst_task_first(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(30):
        both(run, 1024, 0, id, 1, 1)
        for arm in ("dense", "patched"):
            run.append_sample(niah(arm, 1024, 0, id, float(arm == "dense"), task="zebra", subtask=None))
    said = verdict(summarise(run))
    assert said["state"] == "bad" and said["text"].startswith("zebra contains −100.0 pts [−100.0, −100.0] (n=30)")


def test_verdict_gives_speed_with_length_and_baseline(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    bench(run, "prefill", 1024, [10.0] * 3, [20.0] * 3)
    bench(run, "prefill", 4096, [100.0] * 3, [50.0] * 3)
    memory(run, "dense", 4096, 100, 40, 200, 150)
    memory(run, "patched", 4096, 100, 10, 200, 120)
    said = verdict(summarise(run))
    assert said["state"] == "none"
    assert said["text"] == "prefill 2.00× faster at 4k (against sdpa, CPU timing); KV cache −75 % at 4k"


# Timing -------------------------------------------------------------------------------------------------------------


def test_timing_by_hand(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    bench(run, "prefill", 1024, [10.0, 12.0, 11.0, 30.0, 13.0], [20.0, 24.0, 22.0])
    bench(run, "decode", 1024, [1.0, 1.0], [1.01, 1.01])
    bench(run, "first_call", 1024, [500.0], [900.0])
    timing = summarise(run)["timing"]
    (entry,) = timing["prefill"]
    assert entry["dense"] == {"median": 12.0, "q1": 11.0, "q3": 13.0, "min": 10.0, "n": 5}
    assert entry["patched"]["median"] == 22.0 and entry["ratio"] == pytest.approx(12 / 22)
    assert (entry["density"], entry["kernel"]) == (0.25, "fast")
    assert timing["first_call"][0]["dense"]["median"] == 500.0
    assert timing["break_even"]["prefill"]["text"] == "none in range: 1.83× slower at 1k"
    assert timing["break_even"]["decode"]["text"] == "no difference beyond 3 % at any measured length"
    assert timing["circumstances"]["baseline"] == "sdpa"
    assert any("reference path, not a performance claim" in note for note in timing["notes"])
    assert any("Only 2 repeats" in note for note in timing["notes"])


def test_a_repeated_bench_counts_its_last_rows(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    bench(run, "prefill", 1024, [10.0, 10.0], [10.0, 10.0])
    bench(run, "prefill", 1024, [20.0, 20.0], [10.0, 10.0])
    entry = summarise(run)["timing"]["prefill"][0]
    assert (entry["dense"]["n"], entry["ratio"]) == (2, 2.0)


@pytest.mark.parametrize(
    ("ratios", "length", "text"),
    [
        # log(ratio) goes from -log 2 to +log 2, so it crosses zero at the geometric mean of 1k and 4k
        ({1024: 0.5, 4096: 2.0}, 2048, "slower than dense below ≈ 2,000 tokens"),
        # the last crossing counts
        ({512: 0.5, 1024: 2.0, 2048: 0.5, 8192: 2.0}, 4096, "slower than dense below ≈ 4,100 tokens"),
        ({1024: 0.5, 4096: 0.9}, None, "none in range: 1.11× slower at 4k"),
        ({1024: 0.5, 4096: 0.99}, None, "none in range: about equal at 4k"),
        ({1024: 0.99, 4096: 2.0}, None, "nowhere slower than dense, faster from 4k on"),
        ({1024: 1.5, 4096: 1.0}, None, "nowhere slower than dense, about equal at 4k"),
        ({1024: 1.0}, None, "no difference beyond 3 % at any measured length"),
    ],
)
def test_break_even(tmp_path: Path, ratios: dict[int, float], length: float | None, text: str) -> None:
    run = new_run(tmp_path)
    for at, ratio in ratios.items():
        bench(run, "prefill", at, [100.0], [100.0 / ratio])
    found = summarise(run)["timing"]["break_even"]["prefill"]
    assert found == {"length": length if length is None else pytest.approx(length), "text": text}


def test_memory_and_its_note(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    memory(run, "dense", 1024, 100, 40, 200, 150)
    memory(run, "patched", 1024, 100, 10, 199, 120)
    timing = summarise(run)["timing"]
    assert timing["memory"] == [
        {
            "length": 1024,
            "dense": {"weights_mb": 100, "kv_mb": 40, "peak_prefill_mb": 200, "peak_decode_mb": 150},
            "patched": {"weights_mb": 100, "kv_mb": 10, "peak_prefill_mb": 199, "peak_decode_mb": 120},
        }
    ]
    assert any("the prefill peak stays" in note for note in timing["notes"])


def test_words_for_numbers() -> None:
    assert [tokens_text(n) for n in (512, 1024, 131072, 1500, 6300.4)] == ["512", "1k", "128k", "1,500", "6,300"]
    assert [speed_text(r) for r in (2, 0.5, 1.02, 0.98)] == [
        "2.00× faster",
        "2.00× slower",
        "about equal",
        "about equal",
    ]


def test_notes_of_the_run_are_warnings(tmp_path: Path) -> None:
    note = "LIMITED RUN – not comparable: the first 2 samples of each task"
    assert summarise(new_run(tmp_path, env={"notes": [note]}))["warnings"] == [note]


def test_results_hold_the_recipe(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.write_results(summarise(run))
    assert run.results()["recipe"] == RECIPE and run.results()["recipe_hash"] == run.recipe_hash


def test_render_refuses_unknown_formats(tmp_path: Path) -> None:
    from hfpatch.report.render import render

    with pytest.raises(ConfigError, match="no report format 'pdf'"):
        render(new_run(tmp_path), ["md", "pdf"])
