"""MME and scene questions: official files, parsing and sums by hand, and both tasks on the packaged model."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import mme_table, tinyshapes
from hfpatch.evals.base import Sample
from hfpatch.evals.mme import MME, read_subtask
from hfpatch.evals.mme_scores import SUBTASKS, official_scores, said
from hfpatch.evals.scene_vqa import SceneVQA, scene_questions
from hfpatch.load import load


@pytest.fixture(scope="module")
def loaded():
    return load("packaged:tinyshapes-llava", dtype="fp32", device="cpu", say=lambda _: None)


# MME -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Yes", "yes"),
        (" no. ", "no"),
        ("Yes, it is", "yes"),
        ("No, it is not", "no"),
        ("I think no", "other"),
        ("", "other"),
        ("not", "no"),
        ("The answer is yes", "other"),
        (". yes", "yes"),
    ],
)
def test_an_answer_is_read_by_its_beginning(text, want):
    assert said(text) == want


def test_scores_by_hand():
    labels = ("Yes", "No")
    one = official_scores({"OCR": [(labels, ("yes", "yes"))]})
    assert one == {"OCR": {"acc": 50, "acc+": 0, "score": 50}}
    both = official_scores({"OCR": [(labels, ("Yes.", "no"))]})
    assert both["OCR"]["score"] == 200
    mixed = official_scores({"OCR": [(labels, ("Yes.", "no")), (labels, ("yes", "hm")), (labels, ("no", "yes"))]})
    assert mixed["OCR"] == pytest.approx({"acc": 50, "acc+": 100 / 3, "score": 50 + 100 / 3})
    whole = official_scores({name: [(labels, ("yes", "no"))] for name in SUBTASKS})
    assert {name: row["score"] for name, row in whole.items() if "acc" not in row} == {
        "perception": 2000,
        "cognition": 800,
        "hallucination subset": 800,
        "both": 2800,
    }
    # a sum needs all of its parts
    assert set(official_scores({"existence": [(labels, ("yes", "no"))]})) == {"existence"}


@pytest.fixture
def official(tmp_path):
    """A folder in the official layout, both of its forms, with a few broken files."""
    for name, texts, images in (("count", ".", "."), ("artwork", "questions_answers_YN", "images")):
        (tmp_path / name / texts).mkdir(parents=True)
        (tmp_path / name / images).mkdir(exist_ok=True)
        for number, suffix in ((1, ".jpg"), (2, ".png")):
            words = f"Is it {number}? Please answer yes or no.\tYes\nIs it 9? Please answer yes or no.\tNo\n"
            (tmp_path / name / texts / f"p{number}.txt").write_text(words)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / images / f"p{number}{suffix}")
    (tmp_path / "count" / "alone.txt").write_text("Is it? Please answer yes or no.\tYes\nNot?\tNo\n")
    (tmp_path / "count" / "p3.txt").write_text("Is it? Please answer yes or no. Yes\nNot?\tMaybe\n")
    return tmp_path


def test_official_folders(official):
    pairs, problems = read_subtask(official, "count")
    assert [pair.image for pair in pairs] == ["count/p1.jpg", "count/p2.png"]
    assert pairs[0].labels == ("yes", "no") and pairs[0].questions[1] == "Is it 9? Please answer yes or no."
    assert len(problems) == 2 and "no picture" in problems[0] and "two lines" in problems[1]
    task = MME(data=str(official))
    assert [(cell["subtask"], task.count(cell)) for cell in task.cells()] == [("count", 2), ("artwork", 2)]
    notes = " ".join(task.notes())
    assert "2 malformed rows skipped: count/alone.txt" in notes and "lacks existence, position" in notes
    assert task.pictures.open("artwork/images/p2.png").size == (8, 8)
    with pytest.raises(DataMissingError, match="no folder color"):
        MME(data=str(official), subtasks="color")
    with pytest.raises(ConfigError, match="Did you mean 'color'"):
        MME(data=str(official), subtasks="colour")
    with pytest.raises(DataMissingError, match="no questions.*MME_Benchmark"):
        MME(data=str(official / "artwork"))
    with pytest.raises(ConfigError, match="existence alone"):
        MME(subtasks="count")


def test_official_results_are_scored_again(tmp_path, capsys):
    asked = [("a.jpg", "Is it?", "Yes", "yes"), ("a.jpg", "Not?", "No", "Yes, it is")]
    asked += [("b.jpg", "Is it?", "Yes", "yes"), ("b.jpg", "Not?", "No", "no")]
    lines = ["\t".join(row) + "\n" for row in asked]
    (tmp_path / "color.txt").write_text("".join(lines))
    assert mme_table.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == ["results", "color", "75.00", "50.00", "125.00"]
    (tmp_path / "count.txt").write_text("".join(lines[:3]))
    assert mme_table.main([str(tmp_path)]) == 1
    assert "it has 3 lines" in capsys.readouterr().err
    with pytest.raises(DataMissingError, match="line 3"):
        (tmp_path / "count.txt").write_text("".join([*lines[:2], lines[0], lines[3]]))
        mme_table.read_results(tmp_path)


def test_the_prompt_of_lmms(official, loaded):
    task = MME(data=str(official), prompt="lmms", subtasks="count", chat_template="off")
    sample = next(task.draw(loaded.processor, task.cells()[0], 0))
    assert sample.prompt.endswith("Is it 1? \nAnswer the question using a single word or phrase.")
    assert sample.meta["second"].endswith("single word or phrase.") and sample.gold == ["yes", "no"]


def test_pairs_are_asked_one_by_one_and_scored_together(loaded):
    task = MME(samples=3, split="normal")
    samples = list(task.draw(loaded.processor, task.cells()[0], 0))
    assert len(samples) == 3
    batch = task.run_batch(loaded.model, loaded.processor, samples)
    single = task.run(loaded.model, loaded.processor, samples[1])
    assert batch[1].output == single.output and batch[1].scores == single.scores
    for sample, outcome in zip(samples, batch, strict=True):
        first, second = outcome.extra["answers"]
        right = [first == "yes", second == "no"]
        assert outcome.scores["acc"] == sum(right) / 2 and outcome.scores["acc_plus"] == float(all(right))
        assert outcome.scores["score"] == (outcome.scores["acc"] + outcome.scores["acc_plus"]) / 2
        # what stands in a row is enough to score it again
        assert task.score(sample, outcome.output) == outcome.scores
    # a trained model knows most of them
    assert sum(outcome.scores["acc"] for outcome in batch) >= 2


# Scene questions -----------------------------------------------------------------------------------------------------


def test_every_thing_is_asked_about():
    rows, scenes = scene_questions("hard"), [s for s in tinyshapes.test_scenes() if s["split"] == "hard"]
    things = sum(len(scene["objects"]) for scene in scenes)
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("color"), kinds.count("place"), kinds.count("count")) == (things, things, len(scenes))
    first = scenes[0]
    own = [row for row in rows if row["image"] == first["id"]]
    thing = first["objects"][-1]
    (color,) = [row["answer"] for row in own if row["text"] == f"what color is the {thing['shape']} ?"]
    (place,) = [row["answer"] for row in own if row["text"] == f"where is the {thing['shape']} ?"]
    assert color == thing["color"]
    row, column = divmod(thing["cell"], 4)
    assert place == f"{('top', 'bottom')[row // 2]} {('left', 'right')[column // 2]}"
    assert own[-1]["answer"] == tinyshapes.NUMBERS[len(first["objects"])]
    known = set(tinyshapes.VOCABULARY)
    assert all(set(f"{row['text']} {row['answer']}".split()) <= known for row in rows)


@pytest.mark.parametrize(("text", "want"), [("Red.", "red"), (" the Top,  left ", "top left"), ("an apple", "apple")])
def test_answers_are_compared_without_dress(text, want):
    sample = Sample(0, {}, 0, [], gold=want)
    assert SceneVQA().score(sample, text) == {"accuracy": 1.0}
    assert SceneVQA().score(sample, f"{text} or blue") == {"accuracy": 0.0}


def test_own_questions(tmp_path, loaded):
    Image.fromarray(tinyshapes.test_images()[0]).save(tmp_path / "a.png")
    rows = ['{"image": "a.png", "text": "is there a circle in the image ?", "answer": "Yes!"}', '{"image": "a.png"}']
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    task = SceneVQA(data=str(tmp_path))
    assert task.cells() == [{}] and "lacks text, answer" in task.notes()[0]
    (sample,) = task.draw(loaded.processor, {}, 0)
    outcome = task.run(loaded.model, loaded.processor, sample)
    assert outcome.output == "yes" and outcome.scores == {"accuracy": 1.0}
    assert task.score(Sample(0, {}, 0, [], gold="no"), "No, it is not")["accuracy"] == 0
    with pytest.raises(DataMissingError, match=r"no questions\.jsonl"):
        SceneVQA(data=str(tmp_path.parent))
    with pytest.raises(ConfigError, match="for data=tinyshapes"):
        SceneVQA(data=str(tmp_path), kinds="color")
    with pytest.raises(ConfigError, match="Did you mean 'color'"):
        SceneVQA(kinds="colour")


def test_scene_questions_on_the_packaged_model(loaded):
    task = SceneVQA(kinds="color,place", samples=4, split="normal")
    right = []
    for cell in task.cells():
        samples = list(task.draw(loaded.processor, cell, 0))
        right += [o.scores["accuracy"] for o in task.run_batch(loaded.model, loaded.processor, samples)]
    assert [cell["subtask"] for cell in task.cells()] == ["color", "place"]
    assert len(right) == 8 and sum(right) >= 2
