from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from report_rows import RECIPE, bench, both, memory, new_run, niah, pair, sample_row, window

from hfpatch.errors import ConfigError
from hfpatch.report.quality import main_rows, matrices, named, reading, subtask_rows
from hfpatch.report.results import summarise, verdict
from hfpatch.report.run import RunDir
from hfpatch.report.stats import (
    paired_bootstrap,
    perplexity,
    perplexity_bootstrap,
    stratified_bootstrap,
    win_tie_loss,
)
from hfpatch.report.words import speed_text, table_label, tokens_text


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # hundreds of rows that nobody needs after a power cut
    monkeypatch.setattr("hfpatch.report.run.os.fsync", lambda _: None)


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


def test_strata_count_the_same_whatever_their_size() -> None:
    # a stratum of 1000 pairs without a difference, and the one above: its losses are halved
    still = ([1.0] * 1000, [1.0] * 1000)
    assert stratified_bootstrap([still, ([1, 1, 1, 1], [1, 1, 1, 0])]) == (-0.125, -0.375, 0.0)
    assert stratified_bootstrap([([1, 1, 1, 1], [1, 1, 1, 0])]) == paired_bootstrap([1, 1, 1, 1], [1, 1, 1, 0])
    assert stratified_bootstrap([([0.5], [0.5])] * 13) == (0.0, 0.0, 0.0)
    # within each stratum all pairs are alike, so no draw can differ: pooled, the interval would be [-1, 1]
    assert stratified_bootstrap([([1.0] * 5, [0.0] * 5), ([0.0] * 5, [1.0] * 5)]) == (0.0, 0.0, 0.0)
    for strata in ([], [([], [])], [([1.0], [1.0, 0.0])]):
        with pytest.raises(ValueError):
            stratified_bootstrap(strata)


def test_perplexity_weighs_windows_by_their_tokens() -> None:
    # (1 * 10 + 2 * 30) / 40
    assert perplexity([1.0, 2.0], [10, 30]) == pytest.approx(math.exp(1.75))
    assert perplexity([1e6], [1]) == math.exp(700)
    for nll, tokens in (([1.0], []), ([1.0], [0]), ([], [])):
        with pytest.raises(ValueError):
            perplexity(nll, tokens)
    same = perplexity_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [5, 7, 9])
    assert same == (0.0, 0.0, 0.0)
    # windows that are all alike give the same perplexities in every draw
    delta, low, high = perplexity_bootstrap([1.0] * 9, [2.0] * 9, list(range(1, 10)))
    assert delta == low == high == pytest.approx(math.e**2 - math.e)
    # of two windows a draw holds the second none, one or two times, with 1/4, 1/2, 1/4
    delta, low, high = perplexity_bootstrap([0.0, 0.0], [0.0, math.log(4)], [1, 1])
    assert (delta, low, high) == pytest.approx((1, 0, 3))
    a, b, tokens = [1.0, 2.0, 1.5, 1.2], [1.1, 2.5, 1.4, 1.3], [4, 3, 2, 1]
    assert perplexity_bootstrap(a, b, tokens) == perplexity_bootstrap(a[::-1], b[::-1], tokens[::-1])


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
    assert results["lost"]["tables"][0]["top"][0]["patched"] == "RuntimeError: out of memory"
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
    (table,) = lost["tables"]
    assert lost["count"] == table["count"] == 12 and len(table["top"]) == 10
    assert all(sample["change"] == -1 for sample in table["top"])
    assert len(table["top"][0]["patched"]) == 200 and table["top"][0]["dense"] == "1234567"


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


def test_density_of_layers_behind_a_cut_is_of_the_whole_prompts_pairs(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 1)
    plan = {"action": "Blocks", "kernel": "fast", "refused": {}, "calls": 2, "density": 0.4}
    cut = {"phase": "prefill", "kernel": "", "refused": {}, "layer": 1}
    run.write_layers(
        [
            *[
                plan | {"phase": phase, "layer": layer}
                for phase in ("prefill", "decode", "tower")
                for layer in (0, 1, 2)
            ],
            # prompts of two lengths
            cut | {"action": "prune to 512 tokens", "density": 0.5, "calls": 3},
            cut | {"action": "prune to 300 tokens", "density": 0.1, "calls": 1},
        ]
    )
    found = {(d["phase"], d["layer"]): round(d["density"], 9) for d in summarise(run)["density"]["layers"]}
    # two fifths of the tokens come to layer 2
    assert found == {
        ("prefill", 0): 0.4,
        ("prefill", 1): 0.4,
        ("prefill", 2): 0.064,
        ("decode", 0): 0.4,
        ("decode", 1): 0.4,
        ("decode", 2): 0.16,
        ("tower", 0): 0.4,
        ("tower", 1): 0.4,
        ("tower", 2): 0.4,
    }


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        niah(arm, length, depth, id, round(rng.random(), 3), fallbacks={f"reason {rng.randrange(3)}": 1})
        for length in (1024, 2048)
        for depth in (0, 50, None)
        for id in range(5)
        for arm in ("dense", "patched")
    ]
    rows += [
        sample_row(arm, task, cell, id, round(rng.random(), 3), **more)
        for task, cell, more in (
            ("ruler", {"length": 1024, "subtask": "vt"}, {}),
            ("ruler", {"length": 2048, "subtask": "cwe"}, {"error": "refused: too long"}),
            ("ruler", {"length": 1024, "subtask": "cwe"}, {"truncated": True}),
            ("ppl", {"length": 1024}, {"scores": {"nll": rng.random()}, "tokens": 9, "lower_is_better": ["nll"]}),
        )
        for id in range(12)
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


# Tasks with subtasks ------------------------------------------------------------------------------------------------


def by_place(quality: list[dict[str, Any]], metric: str = "score") -> dict[tuple[str | None, Any], dict[str, Any]]:
    """Quality rows of one metric by subtask (None: the mean) and length."""
    return {(q["subtask"], q["length"]): q for q in quality if q["metric"] == metric}


def test_the_mean_over_subtasks_by_hand(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    # 4k: vt 2 of 4 → 1 of 4, cwe 1 of 1 → 1 of 1; 8k: only vt, 1 of 1 → 0 of 1
    for id, (dense, patched) in enumerate([(1, 1), (1, 0), (0, 0), (0, 0)]):
        pair(run, "ruler", {"length": 4096, "subtask": "vt"}, id, dense, patched)
    pair(run, "ruler", {"length": 4096, "subtask": "cwe"}, 0, 1, 1)
    pair(run, "ruler", {"length": 8192, "subtask": "vt"}, 0, 1, 0)
    results = summarise(run)
    rows = by_place(results["quality"])
    assert list(rows) == [
        ("cwe", 4096), ("vt", 4096), ("vt", 8192), ("vt", None), (None, 4096), (None, 8192), (None, None)
    ]  # fmt: skip
    short = rows[None, 4096]
    assert (short["dense"], short["patched"], short["delta"], short["n"]) == (0.75, 0.625, -0.125, 5)
    assert (short["win"], short["tie"], short["loss"]) == (0, 4, 1)
    assert (short["subtasks"], short["subtasks_of"], short["overall"]) == (2, 2, False)
    # the losses of vt in a draw are Binomial(4, 1/4), of which a half counts
    assert short["ci"] == [-0.375, 0.0]
    long = rows[None, 8192]
    assert (long["dense"], long["patched"], long["n"], long["subtasks"]) == (1.0, 0.0, 1, 1)
    # over all: vt is 3 of 5 → 1 of 5
    whole = rows[None, None]
    assert (whole["dense"], whole["patched"], whole["n"]) == (pytest.approx(0.8), pytest.approx(0.6), 6)
    assert [table_label(q) for q in (short, long)] == ["ruler, all subtasks", "ruler, 1 of 2 subtasks"]
    assert {q["subtask"] for q in main_rows(results["quality"])} == {None}
    assert len(subtask_rows(results["quality"])) == 4

    (matrix,) = matrices(results["quality"])
    assert matrix["lengths"] == [4096, 8192, None]
    found = {name: [q and q["patched"] for q in cells] for name, cells in matrix["rows"]}
    assert found == {"cwe": [1.0, None, 1.0], "vt": [0.25, 0.0, 0.2], "all subtasks": [0.625, 0.0, pytest.approx(0.6)]}

    assert [q["patched"] for q in named(results["quality"], "ruler.score")] == [pytest.approx(0.6)]
    assert [q["patched"] for q in named(results["quality"], "ruler.score@4k")] == [0.625]
    assert [q["patched"] for q in named(results["quality"], "ruler.vt.score")] == [pytest.approx(0.2)]
    assert [q["patched"] for q in named(results["quality"], "ruler.vt.score@8192")] == [0.0]
    assert named(results["quality"], "ruler.qa_1.score") == named(results["quality"], "ruler.other") == []
    with pytest.raises(ConfigError, match="no length"):
        named(results["quality"], "ruler.score@25%")


def test_expected_numbers_of_a_task_with_subtasks_are_its_mean(tmp_path: Path) -> None:
    expect = [{"metric": f"ruler{name}", "value": 0.5, "tol": 0.1} for name in (".score", ".vt.score", ".score@4096")]
    run = new_run(tmp_path, {"expect": expect})
    pair(run, "ruler", {"length": 4096, "subtask": "vt"}, 0, 1, 0)
    pair(run, "ruler", {"length": 4096, "subtask": "cwe"}, 0, 1, 1)
    assert [e["ours"] for e in summarise(run)["expect"]] == [0.5, 0.0, 0.5]


def test_tables_without_length(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(3):
        pair(run, "longbench", {"subtask": "qasper"}, id, 0.5, 0.25)
        pair(run, "longbench", {"subtask": "lcc"}, id, 1.0, 1.0)
    results = summarise(run)
    rows = by_place(results["quality"])
    assert list(rows) == [("lcc", None), ("qasper", None), (None, None)]
    assert all(row["overall"] for row in rows.values())
    assert (rows[None, None]["dense"], rows[None, None]["patched"]) == (0.75, 0.625)
    assert rows[None, None]["ci"] == [-0.125, -0.125]
    assert results["heatmaps"] == [] and results["density"]["by_length"] == []
    assert matrices(results["quality"])[0]["lengths"] == [None]
    said = verdict(results)
    assert said["text"].startswith(
        "longbench, all subtasks score −12.5 pts [−12.5, −12.5] (n=6, indicative), worst qasper"
    )


def test_settings_have_means_of_their_own(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for words, score in (("0-4k", 0.0), ("4-8k", 1.0)):
        for subtask in ("qasper", "lcc"):
            pair(run, "longbench", {"subtask": subtask, "words": words}, 0, score, score)
    means = [q for q in summarise(run)["quality"] if q["subtasks"]]
    assert [(table_label(q), q["dense"]) for q in means] == [
        ("longbench words=0-4k, all subtasks", 0.0),
        ("longbench words=4-8k, all subtasks", 1.0),
    ]


def test_an_unfinished_subtask_does_not_move_the_mean(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    pair(run, "ruler", {"length": 4096, "subtask": "cwe"}, 0, 1, 1)
    run.append_sample(sample_row("dense", "ruler", {"length": 4096, "subtask": "vt"}, 0, 0))
    row = next(q for q in summarise(run)["quality"] if q["subtasks"])
    assert (row["dense"], row["patched"], row["subtasks"], row["n"]) == (1.0, 1.0, 1, 1)


def test_few_samples_of_many_subtasks_are_one_note(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for number in range(4):
        pair(run, "ruler", {"length": 4096, "subtask": f"task_{number}"}, 0, 1, 1)
    both(run, 1024, 0, 0, 1, 1)
    (note,) = summarise(run)["warnings"]
    assert note == "Rows with fewer than 20 samples are only indicative: 4 subtasks of ruler, niah/number."


# Refused and truncated ----------------------------------------------------------------------------------------------


def test_refused_samples_are_in_no_mean_but_counted(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    reason = "the prompt of 9000 tokens exceeds the model's context of 8192 tokens"
    refused = {"error": f"refused: {reason}", "finish": "refused", "scores": {}, "fallbacks": {"stale": 1}}
    pair(run, "ruler", {"length": 4096, "subtask": "vt"}, 0, 1, 1)
    pair(run, "ruler", {"length": 4096, "subtask": "vt"}, 1, 0, 0, **refused)
    pair(run, "ruler", {"length": 4096, "subtask": "qa_1"}, 0, 0, 0, **refused)
    pair(run, "ruler", {"length": 4096, "subtask": "cwe"}, 0, 1, 0, error="RuntimeError: no", scores={"score": 0.0})
    results = summarise(run)
    rows = by_place(results["quality"])
    assert (rows["vt", 4096]["dense"], rows["vt", 4096]["n"], rows["vt", 4096]["refused"]) == (1.0, 1, 1)
    assert (rows["qa_1", 4096]["dense"], rows["qa_1", 4096]["n"], rows["qa_1", 4096]["refused"]) == (None, 0, 1)
    mean = rows[None, 4096]
    assert (mean["dense"], mean["subtasks"], mean["subtasks_of"], mean["refused"]) == (0.5, 2, 3, 2)
    assert (results["errors"]["count"], results["errors"]["of"], results["arms"]) == (2, 4, {"dense": 2, "patched": 2})
    assert results["refused"] == {
        "count": 2,
        "tasks": [{"task": "ruler", "count": 2, "of": 4, "reason": reason}],
    }
    assert results["fallbacks"] == {} and results["lost"]["count"] == 0 and results["unpaired"] == 0
    assert f"ruler: 2 of 4 samples refused, not run and in no mean: {reason} and the like." in results["warnings"]


def test_all_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    pair(run, "niah", {"length": 4096, "depth": 0}, 0, 0, 0, error="refused: too long", scores={})
    results = summarise(run)
    assert [(q["n"], q["dense"], q["refused"]) for q in results["quality"]] == [(0, None, 1)]
    assert verdict(results)["state"] == "none" and results["errors"]["fraction"] == 0.0


def test_truncated_prompts_are_counted(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(5):
        more = {"truncated": True} if id < 2 else {}
        pair(run, "longbench", {"subtask": "qasper"}, id, 1, 1, **more)
    results = summarise(run)
    assert results["truncated"] == [{"task": "longbench", "count": 2, "of": 5}]
    assert "longbench: 2 of 5 prompts were cut in the middle to fit." in results["warnings"]


# Less is better -----------------------------------------------------------------------------------------------------


def test_perplexity_of_a_run_by_hand(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    window(run, 1024, 0, 1.0, 2.0, tokens=10)
    window(run, 1024, 1, 2.0, 2.0, tokens=30)
    window(run, 2048, 0, 3.0, 2.0, tokens=40)
    quality = summarise(run)["quality"]
    nll, ppl = by_place(quality, "nll"), by_place(quality, "ppl")
    assert (nll[None, 1024]["dense"], nll[None, 1024]["patched"]) == (1.5, 2.0)
    assert nll[None, 1024]["lower_is_better"] and ppl[None, 1024]["lower_is_better"]
    # patched better: less
    assert [nll[None, None][key] for key in ("win", "tie", "loss")] == [1, 1, 1]
    short, whole = ppl[None, 1024], ppl[None, None]
    assert (short["dense"], short["patched"]) == (pytest.approx(math.exp(1.75)), pytest.approx(math.exp(2)))
    assert short["delta"] == pytest.approx(math.exp(2) - math.exp(1.75))
    assert whole["dense"] == pytest.approx(math.exp((10 + 60 + 120) / 80)) and whole["n"] == 3
    assert short["ci"][0] <= short["delta"] <= short["ci"][1]
    assert [q["patched"] for q in named(quality, "ppl.ppl@1k")] == [short["patched"]]


def test_failed_windows_win_no_prize(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    window(run, 1024, 0, 2.0, 2.1)
    window(run, 1024, 1, 2.0, 0.0, error="RuntimeError: out of memory")
    results = summarise(run)
    for row in results["quality"]:
        assert (row["n"], row["errors"]) == (1, 1) and row["patched"] > row["dense"]
    assert any("left out instead" in note for note in results["warnings"])


@pytest.mark.parametrize(
    ("shift", "state", "word"),
    [(0.1, "bad", "worse than dense"), (-0.1, "good", "as good as dense"), (0.005, "good", "as good as dense")],
)
def test_less_is_better_turns_the_verdict_around(tmp_path: Path, shift: float, state: str, word: str) -> None:
    run = new_run(tmp_path)
    for id in range(30):
        window(run, 1024, id, 2.0 + id / 100, 2.0 + id / 100 + shift)
    results = summarise(run)
    said = verdict(results)
    assert (said["state"], said["word"]) == (state, word)
    assert said["text"].startswith("ppl 8.5") and "less is better" in said["text"] and "nll" not in said["text"]
    assert {reading(q) for q in results["quality"]} == {state}
    assert results["lost"]["count"] == 0


def test_dense_perplexity_alone(tmp_path: Path) -> None:
    run = new_run(tmp_path, {"patches": []})
    window(run, 1024, 0, 2.0, None)
    results = summarise(run)
    ppl = by_place(results["quality"], "ppl")[None, 1024]
    assert (ppl["dense"], ppl["patched"], ppl["ci"]) == (pytest.approx(math.exp(2)), None, None)
    assert "ppl 7.389 (n=1)" in verdict(results)["text"]


def test_fidelity_along_positions(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    fidelity(run, 0, 0.8, [1.0], per_position={"start": [0, 512], "top1": [1.0, 0.5], "kl": [0.0, 0.2]})
    fidelity(run, 1, 1.0, [1.0], per_position={"start": [0, 512], "top1": [0.5, 0.5], "kl": [0.1, None]})
    assert summarise(run)["fidelity"]["positions"] == [
        {"length": 1024, "start": 0, "n": 2, "top1": 0.75, "kl": 0.05},
        {"length": 1024, "start": 512, "n": 2, "top1": 0.5, "kl": 0.2},
    ]


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
