"""InfiniteBench's synthetic tasks without a model: layout, place and length of the prompts, scores."""

from __future__ import annotations

import random
import re

import pytest
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError
from hfpatch.evals import infinitebench
from hfpatch.evals.base import TASKS, Sample
from hfpatch.evals.infinitebench import InfiniteBench
from hfpatch.evals.ruler_text import NOISE

NEEDLE = {
    "passkey": re.compile(r"^The pass key is (\d{5})\. Remember it\. \1 is the pass key\.$"),
    "number_string": re.compile(r"^The sequence of digits is (\d{10})\. Remember it\. \1 is the sequence of digits\.$"),
}


def drawn(task, cell=None, seed=0, tokenizer=None):
    return list(task.draw(tokenizer or tiny_tokenizer(), cell or task.cells()[0], seed))


def test_layout():
    assert infinitebench.noise_text("passkey", "12345", [NOISE, NOISE], 50) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n\n"
        f"{NOISE}\nThe pass key is 12345. Remember it. 12345 is the pass key.\n{NOISE}\n\n\nWhat is the pass key?"
    )
    assert infinitebench.noise_text("number_string", "1122334455", [], 0) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\nThe sequence of digits is 1122334455. Remember it. 1122334455 is the sequence "
        "of digits.\n\n\nWhat is the sequence of digits?"
    )
    assert infinitebench.kv_text([("a", "1"), ("b", "2")], "a") == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        'JSON data:\n{"a": "1", "b": "2"}\n\nKey: "a"\nThe value associated with the specified key is: '
    )


@pytest.mark.parametrize("subtask", ["passkey", "number_string"])
@pytest.mark.parametrize("depth", [0, 30, 100])
@pytest.mark.parametrize("length", [1000, 4096])
def test_needle_in_noise(subtask, depth, length):
    task = InfiniteBench(lengths=length, depths=depth, subtasks=subtask)
    assert task.cells() == [{"length": length, "depth": depth, "subtask": subtask}]
    for sample in drawn(task):
        assert 0.99 * length <= len(sample.ids) <= length
        lines = sample.prompt.split("\n\n")[1].strip().split("\n")
        (at,) = [n for n, line in enumerate(lines) if NEEDLE[subtask].match(line)]
        assert NEEDLE[subtask].match(lines[at])[1] == sample.gold
        assert at == round(depth / 100 * (len(lines) - 1))
        noise = lines[:at] + lines[at + 1 :]
        assert all(line == NOISE for line in noise[:-1]) and NOISE.startswith(noise[-1])
        assert sample.subtask == subtask


@pytest.mark.parametrize("length", [1000, 4096])
def test_kv_is_as_long_as_whole_records_allow(length):
    task = InfiniteBench(lengths=length, depths="0,100", subtasks="kv")
    golds = []
    for cell, place in zip(task.cells(), [0, -1], strict=True):
        for sample in drawn(task, cell):
            assert length - 82 < len(sample.ids) <= length
            records = re.findall(r'"([\da-f-]{36})": "([\da-f-]{36})"', sample.prompt)
            key = re.search(r'\n\nKey: "(.+)"\n', sample.prompt)[1]
            assert records[place] == (key, sample.gold)
            golds.append(sample.gold)
    assert golds[:2] == golds[2:] and golds[0] != golds[1]


def test_samples_come_from_seed_and_number():
    task = InfiniteBench(lengths=1000, depths=50)
    first, second = drawn(task)
    assert drawn(task) == [first, second]
    assert len({first.gold, second.gold, drawn(task, seed=1)[0].gold}) == 3


def test_digits():
    rng = random.Random(0)
    for _ in range(200):
        assert re.fullmatch(r"\d{5}", infinitebench.digits(rng, "passkey"))
        made = infinitebench.digits(rng, "number_string")
        # every one of the five that were added stands beside its like
        assert re.fullmatch(r"\d{10}", made) and len(re.findall(r"(\d)(?=\1)", made)) >= 5


def test_answer_begins_for_the_model_and_is_short():
    task = InfiniteBench(lengths=1000, depths=50)
    ends = ["<|assistant|>\nThe pass key is", "<|assistant|>\nThe sequence of digits is", "<|assistant|>\n"]
    for cell, end, most in zip(task.cells(), ends, [6, 12, 50], strict=True):
        assert drawn(task, cell)[0].prompt.endswith(end)
        assert task.tokens_to_generate(cell) == most
    plain = InfiniteBench(lengths=1000, depths=50, chat_template="off")
    assert drawn(plain)[0].prompt.endswith("What is the pass key?\n\nThe pass key is")


@pytest.mark.parametrize(
    ("subtask", "answer", "gold", "score"),
    [
        ("passkey", " 12345", "12345", 1),
        ("passkey", "12345. Remember 99999", "12345", 1),
        ("passkey", "key1: 12345", "12345", 0),
        ("passkey", "123456", "12345", 0),
        ("passkey", "12,345", "12345", 0),
        ("passkey", "", "12345", 0),
        # leading zeros are digits too
        ("number_string", "0011223344", "0011223344", 1),
        ("number_string", "11223344", "0011223344", 0),
        ("kv", '{"k": "ab-12"}', "ab-12", 1),
        ("kv", "It is: 'ab-12'.", "ab-12", 1),
        ("kv", "ab-123", "ab-12", 0),
        ("kv", "AB-12", "ab-12", 0),
        ("kv", "(ab-12)", "ab-12", 0),
        ("kv", "", "ab-12", 0),
    ],
)
def test_score(subtask, answer, gold, score):
    assert InfiniteBench().score(Sample(0, {}, 0, [], subtask, gold=gold), answer) == {"accuracy": score}


def test_options():
    assert "infinitebench" in TASKS
    assert len(InfiniteBench(depths="0:100:50").cells()) == 27
    with pytest.raises(ConfigError, match="there is no 'passkeys'. Did you mean 'passkey'"):
        InfiniteBench(subtasks="passkeys")
    (first, _) = drawn(InfiniteBench(lengths=20, depths=0, subtasks="passkey"))
    assert first.refused.startswith("length 20 is too short")
