"""Classification: which prompts are asked, and that the answer is the likeliest label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny_tokenizer import tiny_tokenizer

import hfpatch
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals.base import TASKS
from hfpatch.evals.classification import Classification, chances, label_tokens

SHARED = Path(__file__).parents[2] / "shared" / "data" / "banking77"


def drawn(task, seed=0):
    (cell,) = task.cells()
    return list(task.draw(tiny_tokenizer(), cell, seed))


def test_chances_are_products_of_the_shares_among_what_is_possible():
    model = tiny.tiny("llama", vocab_size=64)
    ids, labels = [5, 6, 7], [(1, 2), (1, 3, 4), (1, 3, 5), (8,)]

    def shares(tokens, among):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
        return dict(zip(among, logits[list(among)].softmax(-1), strict=True))

    first, second, third = shares(ids, (1, 8)), shares([*ids, 1], (2, 3)), shares([*ids, 1, 3], (4, 5))
    want = [first[1] * second[2], first[1] * second[3] * third[4], first[1] * second[3] * third[5], first[8]]
    torch.testing.assert_close(chances(model, ids, labels).exp(), torch.stack(want))
    assert chances(model, ids, labels).exp().sum() == pytest.approx(1)


def test_a_label_may_begin_like_another():
    tokenizer = tiny_tokenizer()
    tokens = label_tokens(tokenizer, ["card", "card arrival", "car"])
    assert not any(a != b and b[: len(a)] == a for a in tokens for b in tokens)
    logs = chances(tiny.tiny("llama", vocab_size=512), [3, 4], tokens)
    assert logs.exp().sum() == pytest.approx(1)


def test_the_built_in_sample_is_asked_label_by_label_and_examples_come_from_the_other_half():
    task = Classification(samples=12, shots=2, fold=0)
    samples, other = drawn(task), {item.text for item in Classification(fold=1)._items}
    assert [len(Classification(fold=fold)._items) for fold in (None, 0, 1)] == [96, 48, 48]
    assert [sum(s.gold == label for s in samples) for label in samples[0].meta["options"]] == [2] * 6
    for sample in samples:
        *shown, asked = [part for part in sample.prompt.split("\n\n") if "Text: " in part]
        texts = [part.removeprefix("Text: ").split("\nLabel: ") for part in shown]
        assert len(texts) == 12 and {text for text, _ in texts} <= other
        assert "Label: " not in asked and sample.prompt.endswith("Label:")
    assert samples == drawn(task) != drawn(task, seed=1)


def test_what_a_patch_changes_is_seen_and_the_answer_is_scored():
    tokenizer, model = tiny_tokenizer(), tiny.tiny("llama", vocab_size=512)
    task = Classification(samples=3)
    sample = drawn(task)[0]
    dense = task.run(model, tokenizer, sample)
    logs = chances(model, sample.ids, label_tokens(tokenizer, sample.meta["options"]))
    assert dense.output == sample.meta["options"][int(logs.argmax())]
    assert dense.scores["accuracy"] == float(dense.output == sample.gold)
    assert dense.scores["nll"] == pytest.approx(-float(logs[sample.meta["options"].index(sample.gold)]))
    with hfpatch.patch(model, "head_scale:factor=0"):
        assert task.run(model, tokenizer, sample).scores["nll"] != dense.scores["nll"]


def test_rows_with_their_own_options(tmp_path):
    rows = [{"text": f"Is {n} odd?", "options": ["yes", "no"], "answer": ["no", "yes"][n % 2]} for n in range(4)]
    rows += [{"text": "Odd?", "options": ["yes"], "answer": "yes"}, {"text": "?", "options": ["a", "b"], "answer": "c"}]
    rows.append({"text": "Which?", "options": ["this", "that", "none"], "answer": "none"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Classification(data=str(tmp_path / "rows.jsonl"), shots=2)
    samples = drawn(task)
    assert len(samples) == 5 and all(sample.prompt.count("Labels: ") == 3 for sample in samples)
    assert {tuple(s.meta["options"]) for s in samples} == {("yes", "no"), ("this", "that", "none")}
    assert "rows.jsonl:5 has options" in task.notes()[0] and "rows.jsonl:6 has the answer 'c'" in task.notes()[0]
    with pytest.raises(ConfigError, match="no common labels"):
        Classification(data=str(tmp_path / "rows.jsonl"), labels="yes")


def test_tables_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('text,category\n"It, too",card_arrival\nWhere?,lost_card\n,lost_card\n')
    task = Classification(data=str(tmp_path / "t.csv"))
    assert {(s.gold, *s.meta["options"]) for s in drawn(task)} == {
        ("card arrival", "card arrival", "lost card"),
        ("lost card", "card arrival", "lost card"),
    }
    assert "t.csv, row 3, lacks text or label" in task.notes()[0] and "It, too" in str(drawn(task))


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_banking77_as_it_is():
    task = Classification(
        data=str(SHARED / "test.csv"), train=str(SHARED / "train.csv"), labels="age limit,exchange rate", shots=1
    )
    (first, *_), items = drawn(task), task._items
    assert len(items) == 80 and first.meta["options"] == ["exchange rate", "age limit"]
    assert first.prompt.count("\nLabel: ") == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": "sports"}, ConfigError, "nothing to choose"),
        ({"labels": "sport,music"}, ConfigError, "Did you mean 'sports'"),
        ({"data": "absent.csv"}, DataMissingError, "CSV with the columns"),
        ({"data": "absent.jsonl"}, DataMissingError, "no data file"),
        ({"shots": -1}, ConfigError, "shots"),
    ],
)
def test_what_cannot_be_asked(options, error, message):
    with pytest.raises(error, match=message):
        Classification(**options)
    assert "classification" in TASKS
