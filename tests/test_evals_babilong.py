"""BABILong without a model: the stories, where their facts lie, how long the prompts are, when an answer counts."""

from __future__ import annotations

import gzip
import itertools
import random
import re
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import babilong
from hfpatch.evals.babilong import FRAMES, GENERATED, LABELS, BabiLong, Story
from hfpatch.evals.base import TASKS, Sample

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")

QA1 = """1 John went to the hallway.
2 Mary moved to the office.
3 Where is John? \thallway\t1
4 John went back to the garden.
5 Where is John? \tgarden\t4
1 Mary moved to the kitchen.
2 Where is Mary? \tkitchen\t1
"""


def drawn(task, cell=None, seed=0):
    return list(task.draw(tiny_tokenizer(), cell or task.cells()[0], seed))


def context(prompt):
    return re.search(r"\n\n<context>\n(.*)\n</context>\n\nQuestion: (.*?)(?:<eos>|$)", prompt, re.S).groups()


@pytest.fixture
def babi(tmp_path):
    (tmp_path / "qa1_single-supporting-fact_test.txt").write_text(QA1)
    (tmp_path / "qa2_two-supporting-facts_test.txt").write_text("1 John got the milk there.\n2 Where is it?\toffice\t1")
    (tmp_path / "qa1_single-supporting-fact_train.txt").write_text("not read")
    return tmp_path


def test_every_subtask_has_a_frame_whose_examples_have_the_asked_form():
    assert list(FRAMES) == list(LABELS) and "babilong" in TASKS
    for frame in FRAMES.values():
        text = str(frame)
        assert text.count("<example>") == text.count("</example>") == len(frame.examples) >= 2
        assert all(f"{story}\nAnswer: {answer}\n</example>" in text for story, answer in frame.examples)


def test_files_become_questions_with_the_statements_before_them(babi):
    task = BabiLong(data=str(babi), lengths="0k", samples=9)
    assert task.subtasks == ("qa1", "qa2") and task.cells()[0] == {"length": 0, "subtask": "qa1"}
    assert [task.count(cell) for cell in task.cells()] == [3, 1]
    found = {context(sample.prompt): sample.gold for sample in drawn(task)}
    assert found == {
        ("John went to the hallway. Mary moved to the office.", "Where is John?"): "hallway",
        (
            "John went to the hallway. Mary moved to the office. John went back to the garden.",
            "Where is John?",
        ): "garden",
        ("Mary moved to the kitchen.", "Where is Mary?"): "kitchen",
    }
    assert drawn(task) == drawn(task)
    orders = {tuple(sample.gold for sample in drawn(task, seed=seed)) for seed in range(9)}
    assert len(orders) > 1


def test_malformed_lines_are_named_and_spoil_their_story_only(babi):
    lines = QA1.splitlines()
    lines[1] = "Mary moved"
    lines += ["1 Mary moved to the bedroom.", "2 Where is Mary?\tcellar\t1", "3 Where is Mary?\tbedroom\t1"]
    lines += ["1 John moved to the bedroom.", "3 Where is John?\tbedroom\t1"]
    (babi / "qa1_single-supporting-fact_test.txt").write_text("\n".join(lines))
    task = BabiLong(data=str(babi), lengths=0, subtasks="qa1", samples=9)
    assert sorted(sample.gold for sample in drawn(task)) == ["bedroom", "kitchen"]
    (note,) = [note for note in task.notes() if "malformed" in note]
    assert "babilong: 3 malformed rows skipped: qa1_single-supporting-fact_test.txt:2 is not statement" in note
    assert "txt:9 has the answer 'cellar', which qa1 does not have" in note and "txt:12 is not" in note


@pytest.mark.parametrize("source", ["builtin", "file"])
@pytest.mark.parametrize("length", [1024, 3000])
def test_facts_lie_in_order_at_sentence_borders(babi, tmp_path, source, length):
    if source == "file":
        path = tmp_path / "book.txt.gz"
        text = "Too short. " + " ".join(f"Call me number {n}, who went out to the sea, alone!" for n in range(400))
        path.write_bytes(gzip.compress(text.encode()))
        source = str(path)
    task = BabiLong(data=str(babi), subtasks="qa1", lengths=length, samples=3, haystack=source)
    (cell,) = task.cells()
    assert cell == {"length": length, "subtask": "qa1"} | ({} if source == "builtin" else {"haystack": "book.txt.gz"})
    for sample in drawn(task):
        assert 0.99 * length <= len(sample.ids) <= length
        text, question = context(sample.prompt)
        assert question == sample.meta["question"] and "Too short." not in text
        found = [(text.index(fact), fact) for fact in re.findall(r"^\d (.+\.)$", QA1, re.M) if fact in text]
        assert found == sorted(found) and len(found) == {"hallway": 2, "garden": 3, "kitchen": 1}[sample.gold]
        rest = re.findall(r"[A-Z][^.!?]+[.!?]", text)
        assert len(set(rest)) == len(rest)
        for at, fact in found:
            before, after = text[:at], text[at + len(fact) :]
            assert not before or re.search(r"[.!?] $", before)
            assert not after or re.match(r" [A-Z]", after)


def test_facts_are_spread_over_the_whole_text(babi):
    task = BabiLong(data=str(babi), subtasks="qa1", lengths=3000, samples=3)
    places = []
    for seed in range(8):
        for sample in drawn(task, seed=seed):
            text, _ = context(sample.prompt)
            places += [text.index(fact) / len(text) for fact in ("John went to", "Mary moved to") if fact in text]
    assert min(places) < 0.2 and max(places) > 0.8


def test_questions_with_too_many_facts_are_passed_over(babi):
    long = "\n".join(f"{n} John went to the garden again and again and again." for n in range(1, 60))
    (babi / "qa1_single-supporting-fact_test.txt").write_text(f"{QA1}{long}\n60 Where is John?\tgarden\t1")
    task = BabiLong(data=str(babi), subtasks="qa1", lengths=600, samples=4)
    samples = drawn(task)
    assert [sample.id for sample in samples] == [0, 1, 2]
    assert all(len(sample.ids) <= 600 for sample in samples)
    assert 'babilong: {"length": 600, "subtask": "qa1"}: 1 questions with too many facts passed over' in task.notes()
    with pytest.raises(ConfigError, match="length 60 is too short for every question of qa1"):
        drawn(BabiLong(data=str(babi), lengths=60))


def told(story, subtask):
    """The answer by reading the facts: what a person or thing is in, room by room."""
    at, holder, path = {}, {}, {}

    def goes(name, room):
        if path.setdefault(name, [None])[-1] != room:
            path[name].append(room)

    for fact in story.facts:
        who, thing = fact.split()[0], re.search("apple|football|milk", fact)
        if not thing:
            at[who] = fact.rstrip(".").split()[-1]
            for name in (who, *(name for name, person in holder.items() if person == who)):
                goes(name, at[who])
        elif re.search("took|got|grabbed|picked", fact):
            holder[thing[0]] = who
            if who in at:
                goes(thing[0], at[who])
        else:
            assert holder.pop(thing[0]) == who
    name = re.search(r"the (\w+)" if subtask != "qa1" else r"is (\w+)", story.question)[1]
    if subtask != "qa3":
        return path[name][-1]
    room = re.search(r"before the (\w+)\?", story.question)[1]
    return path[name][len(path[name]) - 1 - path[name][::-1].index(room) - 1]


@pytest.mark.parametrize("subtask", GENERATED)
def test_generated_stories_are_answered_by_their_facts(subtask):
    rng = random.Random(0)
    made = [babilong.story(rng, subtask) for _ in range(200)]
    assert all(told(story, subtask) == story.answer for story in made)
    assert {story.answer for story in made} == set(LABELS[subtask])
    assert len({story.facts for story in made}) == 200


def test_generated_stories_say_that_they_are():
    task = BabiLong(lengths="0k,1k", samples=2)
    assert [(cell["subtask"], cell["length"]) for cell in task.cells()] == list(itertools.product(GENERATED, (0, 1024)))
    assert len(drawn(task, task.cells()[-1])) == 2
    assert task.notes()[0].startswith("babilong: the stories of qa1, qa2, qa3 are generated")
    assert "background is builtin" in task.notes()[1]
    with pytest.raises(ConfigError, match="there is no 'qa4'"):
        BabiLong(subtasks="qa4")


@needs_shared
@pytest.mark.parametrize("subtask", LABELS)
def test_official_files(subtask):
    stories, problems = babilong._read(babilong._files(SHARED / "babi")[subtask], subtask)
    assert len(stories) == 1000 and not problems
    assert all(story.facts and story.question.endswith("?") for story in stories)
    # the right label alone is always right
    answers = [(story.answer, story.question) for story in stories]
    assert all(babilong.is_right(answer, answer, question, LABELS[subtask]) for answer, question in answers)
    if subtask == "qa3":
        assert all(told(story, subtask) == story.answer for story in stories)


def test_missing_data_says_what_is_expected(tmp_path):
    with pytest.raises(DataMissingError, match=r"no bAbI files.*qa1_single-supporting-fact_test.txt.*en-10k"):
        BabiLong(data=str(tmp_path))
    (tmp_path / "qa6_yes-no-questions_test.txt").write_text("")
    with pytest.raises(DataMissingError, match="no question that can be used: it is empty"):
        BabiLong(data=str(tmp_path))
    with pytest.raises(DataMissingError, match="no haystack file"):
        BabiLong(haystack=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [("0k,2k,1k", (0, 1024, 2048)), (0, (0,)), ([0, 512], (0, 512)), ("4k", (4096,)), ("0", (0,))],
)
def test_lengths(lengths, wanted):
    assert BabiLong(lengths=lengths).lengths == wanted


@pytest.mark.parametrize("lengths", ["", "x", -1, [], [True], [1.5]])
def test_bad_lengths(lengths):
    with pytest.raises(ConfigError):
        BabiLong(lengths=lengths)


@pytest.mark.parametrize(
    ("subtask", "output", "target", "question", "right"),
    [
        ("qa1", "kitchen", "kitchen", "Where is Mary?", True),
        ("qa1", "Mary is in the KITCHEN. Before, the office.", "kitchen", "Where is Mary?", True),
        ("qa1", "the kitchen or the office", "kitchen", "Where is Mary?", False),
        ("qa1", "the office", "kitchen", "Where is Mary?", False),
        ("qa1", "", "kitchen", "Where is Mary?", False),
        ("qa1", "I know. The kitchen.", "kitchen", "Where is Mary?", False),
        ("qa1", "kitchen\n<example>\noffice", "kitchen", "Where is Mary?", True),
        ("qa1", "kitchen <context> office", "kitchen", "Where is Mary?", True),
        ("qa1", "kitchen\n\nQuestion: is it the office", "kitchen", "Where is Mary?", True),
        # labels of the question do not count
        ("qa3", "Before the kitchen it was in the office.", "office", "Where was the milk before the kitchen?", True),
        ("qa4", "kitchen", "office", "What is the kitchen south of?", False),
        ("qa5", "Fred gave it to Jeff", "Jeff", "Who did Fred give the milk to?", True),
        ("qa6", "No, she is not there", "no", "Is Mary in the office?", True),
        ("qa6", "Yes and no", "no", "Is Mary in the office?", False),
        ("qa7", "none", "none", "How many objects is Mary carrying?", True),
        ("qa7", "one", "none", "How many objects is Mary carrying?", False),
        ("qa7", "none", "one", "How many objects is Mary carrying?", False),
        ("qa8", "milk and apple", "apple,milk", "What is Mary carrying?", True),
        ("qa8", "milk", "apple,milk", "What is Mary carrying?", False),
        ("qa8", "apple, milk and football", "apple,milk", "What is Mary carrying?", False),
        ("qa10", "Maybe.", "maybe", "Is Mary in the office?", True),
    ],
)  # fmt: skip
def test_score(subtask, output, target, question, right):
    sample = Sample(0, {}, 0, [], subtask, gold=target, meta={"question": question})
    assert BabiLong().score(sample, output) == {"accuracy": float(right)}


def test_story_needs_no_background():
    story = Story(("John went to the garden.",), "Where is John?", "garden")
    text = babilong.Scattered(iter(["One sentence here. "]))
    assert text.scatter("", story.facts, [0.9]) == "John went to the garden."
