"""Retrieval scores, what masking the best heads does, and the filter of ACT's heads."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import hfpatch
import hfpatch.report.figures as figures
from hfpatch.anatomy import examine
from hfpatch.calibrated import read_calibrated
from hfpatch.calibrations.act_heads import Labelled, _from, _last, _states, scan
from hfpatch.call import AttentionCall
from hfpatch.cli import app
from hfpatch.errors import ConfigError, ConflictError, DataMissingError, HFPatchError
from hfpatch.evals.head_masking import mask_heads, wilson
from hfpatch.evals.head_scores import (
    NEEDLES,
    Copies,
    HeadScoring,
    Prompt,
    Watch,
    _forced,
    find_span,
    recall,
    score_heads,
    summary,
)
from hfpatch.methods._head_scores import read_scores
from hfpatch.methods.act import HEADS, AttentionCalibration

FAST = {"mode": "forced", "lengths": 200, "depths": [0, 100], "chat_template": "off"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny("llama", vocab_size=512)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# The measure --------------------------------------------------------------------------------------------------------


def looks_of(tokens, where):
    """A decode step's call in which head h looks at the token `where[h]` of the text, with scores of 50 against 0."""
    n = len(tokens)
    key = torch.eye(n).expand(1, len(where), n, n)
    query = 50 * torch.eye(n)[torch.tensor(where)][None, :, None]
    return AttentionCall(query, key, key, scaling=1.0, phase="decode")


def test_a_copying_head_scores_one_a_resting_one_and_one_that_looks_behind_nothing():
    needle, rest = [7, 8, 9, 10], list(range(20, 40))
    prompt = [1, *rest[:10], *needle, *rest[10:]]
    ids, copies = torch.tensor(prompt), Copies(1, 4, (11, 15))
    for step, token in enumerate(needle):
        # copies it · rests on the first token · looks one behind, as induction heads do · copies the first half
        where = [11 + step, 0, 12 + step, 11 + step if step < 2 else 0]
        watch = Watch(length=lambda: len(ids))  # noqa: B023
        watch.adjust(looks_of(prompt, where), torch.zeros(()), None)
        copies.add(watch.found, ids, torch.tensor([token]))
        prompt = [*prompt, token]
        ids = torch.tensor(prompt)
    assert copies.to_dict()["set"] == {"0-0": 1.0, "0-3": 0.5} == copies.to_dict()["steps"]
    distance = copies.to_dict()["distance"][0]
    assert distance[1] == pytest.approx(25.5, abs=0.1) and distance[0] < distance[1]


def test_repeats_count_once_in_a_set_and_each_time_in_steps():
    ids = torch.tensor([1, 7, 8, 2, 3])
    copies = Copies(1, 1, (1, 3))
    for token in (7, 7, 7, 8):
        copies.add({0: (torch.tensor([[int(token == 8) + 1]]), torch.zeros(1, 1))}, ids, torch.tensor([token]))
    found = copies.to_dict()
    assert found["set"] == {"0-0": 1.0} and found["steps"] == {"0-0": 2.0}


def test_the_strongest_key_is_that_of_eager_attention(model, tokenizer):
    eager = tiny.tiny("llama", vocab_size=512, attn_implementation="eager")
    how = HeadScoring.from_options(FAST)
    prompt = how.prompt(tokenizer, 200, 50.0, 0)
    ids = torch.tensor([prompt.ids + prompt.answer[:-1]])
    with torch.no_grad():
        weights = eager(ids, output_attentions=True).attentions
    rows = slice(len(prompt.ids) - 1, None)
    copies = Copies(3, 4, prompt.span)
    _forced(model, prompt, copies)
    seen = Watch(length=lambda: ids.shape[1], rows=len(prompt.answer), limit=len(prompt.ids))
    with hfpatch.patch(model, seen), torch.no_grad():
        model(ids)
    for layer in range(3):
        want = weights[layer][0, :, rows, : len(prompt.ids)].argmax(-1)
        assert torch.equal(seen.found[layer][0], want)
        place = torch.arange(ids.shape[1])
        far = (weights[layer][0, :, rows] * (place[rows, None] - place).clamp(min=0)).sum(-1)
        torch.testing.assert_close(seen.found[layer][1], far, atol=1e-2, rtol=1e-3)
        hits = (ids[0][want] == torch.tensor(prompt.answer)) & (want >= prompt.span[0]) & (want < prompt.span[1])
        assert torch.equal(copies.steps[layer], hits.sum(-1))


def test_decoding_step_by_step_sees_what_one_forward_sees(model, tokenizer):
    """If the model writes the needle, both modes score alike: here it is made to."""
    from hfpatch.evals import head_scores

    prompt = HeadScoring.from_options(FAST).prompt(tokenizer, 200, 50.0, 1)
    forced, written = Copies(3, 4, prompt.span), Copies(3, 4, prompt.span)
    _forced(model, prompt, forced)

    class Dictated:
        """Says the right answer, whatever the model thinks."""

        config, device, generation_config = model.config, model.device, None
        answer = list(prompt.answer)

        def __call__(self, **kwargs):
            output = model(**kwargs)
            if kwargs["input_ids"].shape[1] == 1:
                output.logits[:] = 0.0
                output.logits[0, -1, self.answer.pop(0)] = 1.0
            return output

    real_patch, real_name = head_scores.patch, head_scores.cache_argument
    head_scores.patch = lambda _, what, **more: real_patch(model, what, **more)
    head_scores.cache_argument = lambda _: real_name(model)
    try:
        made = head_scores._answer(Dictated(), tokenizer, prompt, written, len(prompt.answer))
    finally:
        head_scores.patch, head_scores.cache_argument = real_patch, real_name
    assert made == prompt.answer
    assert torch.equal(written.steps, forced.steps) and torch.equal(written.places, forced.places)
    assert forced.steps.sum() > 0


def test_the_needle_is_found_where_it_stands(tokenizer):
    for number, needle in enumerate(NEEDLES):
        prompt = HeadScoring.from_options(FAST).prompt(tokenizer, 200, 50.0, number)
        first, stop = prompt.span
        assert tokenizer.decode(prompt.ids[first:stop]).strip() == needle.answer
        assert 198 <= len(prompt.ids) <= 200
    assert find_span([1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7]) == (2, 7)
    # one token of eleven may differ, one of five may not
    text = list(range(30))
    assert find_span(text, [*range(5, 15), 99]) == (5, 16)
    assert find_span(text, [5, 6, 7, 8, 99]) is None
    assert find_span([1], [1, 2]) is None


def test_a_run_counts_if_most_words_are_there():
    assert recall("Take the cable car up", "take the CABLE-car, up!") == 1.0
    assert recall("take the cable car up", "the car") == 0.4
    assert recall("a b b", "b a") == pytest.approx(2 / 3)
    assert recall("a", "") == 0.0


def test_shares_of_heads():
    facts = summary({"0-0": [0.0], "0-1": [0.05], "0-2": [0.1, 0.1], "0-3": [0.9, 0.0], "0-4": [0.7]})
    assert facts["shares"] == {"0": 0.2, "0-0.1": 0.2, "0.1-0.5": 0.4, ">=0.5": 0.2}
    assert (facts["retrieval_heads"], facts["retrieval_share"], facts["always_active"]) == (3, 0.6, 3)
    assert list(facts["strongest"])[:2] == ["0-4", "0-3"]


# Files --------------------------------------------------------------------------------------------------------------


def test_files_are_public_and_resumable(model, tokenizer, tmp_path, monkeypatch):
    from hfpatch.evals import head_scores

    out, real, calls = tmp_path / "heads.json", head_scores._run, []

    def interrupted(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(head_scores, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_heads(model, tokenizer, out, **FAST)
    assert not out.exists()
    with (tmp_path / "heads.runs.jsonl").open("a") as file:
        file.write('\n{"cell": [200, 100.0')
    monkeypatch.setattr(head_scores, "_run", lambda *args: calls.append(args) or real(*args))
    table = score_heads(model, tokenizer, out, **FAST)
    assert len(calls) == 6 == table.about["counting"]
    public = json.loads(out.read_text())
    assert list(public)[:5] == ["0-0", "0-1", "0-2", "0-3", "1-0"] and len(public) == 12
    assert all(len(runs) == 6 for runs in public.values())
    found = read_scores(str(out), "scores")
    assert found.scores[0, 1] == pytest.approx(sum(public["0-1"]) / 6)
    assert len(found.distance) == 12 and max(found.distance.values()) > 5
    whole = score_heads(model, tokenizer, tmp_path / "again.json", **FAST)
    assert whole.scores == table.scores
    # the other count needs no new run; another measurement is refused
    steps = score_heads(model, tokenizer, out, **FAST, count="steps")
    assert all(b >= a for name in public for a, b in zip(table.scores[name], steps.scores[name], strict=True))
    assert max(map(max, table.scores.values())) <= 1
    with pytest.raises(ConfigError, match=r"heads.runs.jsonl holds another measurement: seed differ"):
        score_heads(model, tokenizer, out, **FAST, seed=1)
    score_heads(model, tokenizer, out, **{**FAST, "depths": 50}, resume=False)
    assert (tmp_path / "heads.csv").read_text().startswith("layer,head,score\n0,0,")


def test_answers_that_miss_the_needle_do_not_count(model, tokenizer, tmp_path):
    """A random model answers nothing."""
    with pytest.raises(HFPatchError, match=r"none of 3 runs found its needle.*mode=forced"):
        score_heads(model, tokenizer, tmp_path / "a.json", **{**FAST, "mode": "paper", "depths": 50}, max_new_tokens=3)


def test_bad_input(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="another ending"):
        score_heads(model, tokenizer, tmp_path / "heads.txt")
    with pytest.raises(ConfigError, match="exceed the model's context of 512"):
        score_heads(model, tokenizer, tmp_path / "a.json", lengths="4k")
    with hfpatch.patch(model, "swa"), pytest.raises(ConflictError, match="patched"):
        score_heads(model, tokenizer, tmp_path / "a.json", **FAST)
    with pytest.raises(ConfigError, match="no option 'mod'"):
        score_heads(model, tokenizer, tmp_path / "a.json", mod="paper")
    (tmp_path / "needles.json").write_text(json.dumps([{"sentence": "a b", "answer": "c", "question": "?"}]))
    with pytest.raises(ConfigError, match="does not stand in the sentence"):
        HeadScoring(needles=str(tmp_path / "needles.json"))


# Masking ------------------------------------------------------------------------------------------------------------


def test_masking_compares_the_best_heads_with_random_ones(model, tokenizer, tmp_path):
    heads = {f"{layer}-{head}": [0.1 * head * layer] for layer in range(3) for head in range(4)}
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    options = {"counts": "2,4", "draws": 2, "lengths": 256, "depths": [0, 100], "samples": 1, "max_new_tokens": 3}
    options |= {"exclude": 4}
    found = mask_heads(model, tokenizer, tmp_path / "heads.json", tmp_path / "masking.json", **options)
    arms = [(row["pick"], row["count"], row["draw"], row["n"]) for row in found["rows"]]
    random = [("random", 2, 0, 2), ("random", 2, 1, 2)]
    assert arms[:4] == [("none", 0, 0, 2), ("top", 2, 0, 2), *random]
    assert len(arms) == 7 and json.loads((tmp_path / "masking.json").read_text())["rows"] == found["rows"]
    assert not hfpatch.is_patched(model)
    # all is done already
    again = mask_heads(model, tokenizer, tmp_path / "heads.json", tmp_path / "masking.json", **options)
    assert again["rows"] == found["rows"]
    with pytest.raises(ConfigError, match="counts='few' are no numbers"):
        mask_heads(model, tokenizer, tmp_path / "heads.json", tmp_path / "b.json", counts="few")
    low, high = wilson(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)


def test_masked_arms_decode_other_tokens_from_the_same_prompt(model, tokenizer):
    from hfpatch.evals import generation
    from hfpatch.methods.head_mask import HeadMask

    ids = tiny.text_inputs(model, length=60)["input_ids"][0].tolist()
    prefix = generation.Prefix.of(model, ids[:-1])
    (plain,) = generation.greedy(model, tokenizer, [ids], 6, prefix=prefix)
    with hfpatch.patch(model, HeadMask()):
        (masked,) = generation.greedy(model, tokenizer, [ids], 6, prefix=prefix)
    (again,) = generation.greedy(model, tokenizer, [ids], 6, prefix=prefix)
    assert plain.tokens == again.tokens != masked.tokens


# The filter of ACT's heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_later_layers_run_alone_from_kept_states(family):
    model = tiny.tiny(family)
    layers, ids = examine(model).decoder_layers, tiny.text_inputs(model, length=20)["input_ids"][0].tolist()
    with torch.no_grad():
        with _states(layers) as states:
            want = _last(model, ids)
        for first in range(3):
            with _from(layers, first, states):
                assert torch.equal(_last(model, ids), want)
                # what is skipped really is
                states_of = states.before[first]
                states.before[first] = states_of * 2
                assert not torch.equal(_last(model, ids), want)
                states.before[first] = states_of
        assert all("forward" not in vars(layer) for layer in layers)
        assert torch.equal(_last(model, ids), want)


def test_a_scanned_head_is_a_calibrated_head(model):
    method = AttentionCalibration(thr=0.05, skip_first=1, skip_last=0)
    ids = tiny.text_inputs(model, length=40)["input_ids"][0].tolist()
    prompt = Labelled(ids, frozenset({5, 6}), (frozenset({5, 6}), frozenset({7})))
    found = scan(model, method, prompt)
    assert found["heads"] and {name.split("-")[0] for name in found["heads"]} <= {"1", "2"}
    for name, (right, logprob) in found["heads"].items():
        layer, head = map(int, name.split("-"))
        with hfpatch.patch(model, method, heads={layer: [head]}), torch.no_grad():
            assert prompt.score(_last(model, ids)) == (right, pytest.approx(logprob, abs=1e-5))
    assert not scan(model, method, prompt, least=1.0)["heads"]


def test_answers_are_judged_by_their_first_token():
    logits = torch.tensor([0.0, 3.0, 2.0, 5.0])
    among = Labelled([1], frozenset({1}), (frozenset({1}), frozenset({2})))
    assert among.score(logits) == (True, pytest.approx(-0.3133, abs=1e-4))
    assert Labelled([1], frozenset({1})).score(logits)[0] is False
    assert Labelled([1], frozenset({3, 1})).score(logits)[0] is True


@pytest.fixture
def labelled(tmp_path):
    rows = [
        {"prompt": f"The baker carried {thing} to the mill. Is it heavy?", "answer": word, "options": ["yes", "no"]}
        for thing, word in (("a brass lantern", "no"), ("a sack of barley", "yes"), ("a coil of rope", "no"))
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def test_the_filter_writes_a_head_file_that_act_takes(model, tokenizer, labelled, tmp_path):
    out, spec = tmp_path / "heads.json", AttentionCalibration(thr=0.05, skip_first=0, skip_last=0)
    hfpatch.calibrate(model, tokenizer, spec, out, files=[labelled], samples=2)
    header, content = read_calibrated(str(out), "file", HEADS)
    assert header.card["prompts"] == 2 and header.card["heads kept"] == sum(map(len, content["layers"].values())) > 0
    kept = {f"{layer}-{head}" for layer, heads in content["layers"].items() for head in heads}
    assert kept == {name for name, gain in content["gains"].items() if gain > 0}
    with hfpatch.patch(model, "act", head_list=str(out), thr=0.05, skip_first=0, skip_last=0) as handle:
        assert {f"{n}-{h}" for n, bounds in handle._bound.items() for h in bounds[0].heads} == kept
    few = tmp_path / "few.json"
    hfpatch.calibrate(model, tokenizer, spec, few, files=[labelled], samples=2, top_k=1)
    assert sum(map(len, read_calibrated(str(few), "file", HEADS)[1]["layers"].values())) == 1
    with pytest.raises(ConfigError, match="gains more than 100"):
        hfpatch.calibrate(model, tokenizer, spec, tmp_path / "none.json", files=[labelled], min_gain=100.0)


def test_the_filter_reads_tasks_and_goes_on_after_an_interruption(model, tokenizer, tmp_path, monkeypatch):
    from hfpatch.calibrations import act_heads

    spec, out = AttentionCalibration(thr=0.03, skip_first=0, skip_last=0, beta=0.0), tmp_path / "heads.json"
    task = "kv:keys=3,samples=2,depths=50,chat_template=off"
    real, calls = act_heads.scan, []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(act_heads, "scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hfpatch.calibrate(model, tokenizer, spec, out, task=task)
    monkeypatch.setattr(act_heads, "scan", lambda *args: calls.append(args) or real(*args))
    hfpatch.calibrate(model, tokenizer, spec, out, task=task)
    assert len(calls) == 2


def test_the_filter_takes_as_many_prompts_of_each_task(tokenizer):
    from hfpatch.calibrations.act_heads import Heads

    class Work:
        files = ()

    Work.tokenizer = tokenizer
    found = Heads(task="classification:fold=1 + kv:keys=3,samples=9,chat_template=off", samples=6)._prompts(Work)
    assert [bool(prompt.options) for prompt in found].count(True) == 3 and len(found) == 6
    for prompt in found:
        assert not prompt.options or (len(prompt.options) == 6 and prompt.gold in prompt.options)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({}, "needs labelled prompts", DataMissingError),
        ({"task": "ppl:lengths=64"}, "no answers that could be right", ConfigError),
    ],
)
def test_the_filter_needs_answers(model, tokenizer, tmp_path, options, message, error):
    spec = AttentionCalibration(skip_first=0, skip_last=0)
    with pytest.raises(error, match=message):
        hfpatch.calibrate(model, tokenizer, spec, tmp_path / "heads.json", **options)


def test_an_answer_outside_its_options(model, tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "answer": "maybe", "options": ["yes", "no"]}))
    spec = AttentionCalibration(skip_first=0, skip_last=0)
    with pytest.raises(ConfigError, match="'maybe' is none of its options: yes, no"):
        hfpatch.calibrate(model, tokenizer, spec, tmp_path / "heads.json", files=[tmp_path / "bad.jsonl"])


# The command line ---------------------------------------------------------------------------------------------------


def test_commands(model, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "heads.json"

    def run(*args):
        result = CliRunner().invoke(app, ["heads", *map(str, args), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    small = ("--lengths", "200", "--depths", "50", "--set", "chat_template=off")
    made = run("score", folder, "--mode", "forced", *small, "-o", out)
    assert made["counting"] == 3 and made["heads"] == 12 and out.exists()
    shown = run("show", out, "--top", "3")
    assert len(shown["strongest"]) == 3 and shown["retrieval_share"] == made["retrieval_share"]
    one = ("--counts", "2", "--draws", "1", "--lengths", "256", "--depths", "50", "--samples", "1")
    masked = run(
        "mask", folder, out, *one, "--set", "max_new_tokens=2", "--set", "exclude=3", "-o", tmp_path / "m.json"
    )
    assert [row["pick"] for row in masked["rows"]] == ["none", "top", "random"]
    result = CliRunner().invoke(app, ["heads", "score", str(folder), "--mode", "guess", "-o", str(out)])
    assert result.exit_code == 2 and "mode='guess' is not one of: paper, forced" in result.output


def test_pictures(tmp_path, monkeypatch):
    """Drawn from their own tables."""
    from hfpatch.report.retrieval_heads import heads_chart, masking_chart

    monkeypatch.undo()
    scores = {f"{layer}-{head}": 0.1 * head for layer in range(3) for head in range(4)}
    rows = [
        {"pick": pick, "count": count, "draw": draw, "n": 4, "score": 0.5, "low": 0.2, "high": 0.8}
        for pick, count, draw in (("none", 0, 0), ("top", 2, 0), ("random", 2, 0), ("random", 2, 1))
    ]
    for chart in (heads_chart("heads", "t", "c", scores, "score"), masking_chart("mask", "t", rows)):
        suffixes = {path.suffix for path in figures.save(chart, tmp_path)}
        assert suffixes == ({".csv", ".svg", ".png"} if figures.has_matplotlib() else {".csv"})
    assert (tmp_path / "mask.csv").read_text().splitlines()[1] == "none,0,0,4,0.5,0.2,0.8"


def test_a_prompt_without_its_needle_scores_nothing(model, tokenizer):
    from hfpatch.evals.head_scores import _run

    how = HeadScoring.from_options(FAST)
    lost = Prompt([3, 4, 5], NEEDLES[0], None, [6])
    found = _run(model, tokenizer, examine(model), how, lost)
    assert found["counts"] and found["set"] == {} and found["distance"] is None
