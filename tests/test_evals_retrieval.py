"""kv, lines, topics and multidoc without a model: layout, place and length of the prompts, official files, scores."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import retrieval
from hfpatch.evals.base import TASKS
from hfpatch.evals.retrieval import KeyValue, Lines, MultiDoc, Topics
from hfpatch.evals.rows import read_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")


def drawn(task, cell=None, seed=0, tokenizer=None):
    return list(task.draw(tokenizer or tiny_tokenizer(), cell or task.cells()[0], seed))


def pairs(prompt):
    """The records of a kv prompt, in order, and the key asked for."""
    found = list(json.loads(prompt[prompt.index("{") : prompt.index("}") + 1]).items())
    return found, re.findall(r'Key: "(.+)"', prompt)[-1]


def written(folder, name, rows):
    """Rows, or lines as they are, as a file of JSON lines."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_tasks_are_registered():
    assert {"kv", "lines", "topics", "multidoc"} <= set(TASKS)


# kv ------------------------------------------------------------------------------------------------------------------


def test_kv_layout():
    made = retrieval.kv_text([("a", "1"), ("b", "2")], "b")
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    data = 'JSON data:\n{"a": "1",\n "b": "2"}\n\n'
    end = 'Key: "b"\nCorresponding value:'
    assert made == head + data + end
    assert retrieval.kv_text([("a", "1"), ("b", "2")], "b", query_aware=True) == head + 'Key: "b"\n\n' + data + end


@pytest.mark.parametrize("vocab", [258, 512])
@pytest.mark.parametrize("template", ["on", "off"])
@pytest.mark.parametrize("length", [700, 4096])
def test_kv_is_as_long_as_whole_records_allow(vocab, template, length):
    task = KeyValue(lengths=length, depths=50, chat_template=template)
    tokenizer = tiny_tokenizer(vocab)
    for sample in drawn(task, tokenizer=tokenizer):
        # the longest record: 2 UUIDs, quotes, colon, comma, line break and space
        assert length - 82 < len(sample.ids) <= length
        assert sample.ids == tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        assert sample.refused is None


def test_kv_depth_moves_the_record_asked_for_and_nothing_else():
    task = KeyValue(keys=21, depths="0,25,50,100")
    rests = []
    for cell, place in zip(task.cells(), [0, 5, 10, 20], strict=True):
        for sample in drawn(task, cell):
            records, key = pairs(sample.prompt)
            assert len(records) == 21 and records[place] == (key, sample.gold)
            rests.append((sample.id, [record for record in records if record[0] != key]))
    assert all(rest == dict(rests)[number] for number, rest in rests)


def test_kv_query_before_the_object_changes_nothing_else():
    plain, aware = (drawn(KeyValue(keys=9, depths=50, query_aware=aware)) for aware in (False, True))
    for one, other in zip(plain, aware, strict=True):
        assert pairs(one.prompt) == pairs(other.prompt) and one.gold == other.gold
        assert (one.prompt.count('Key: "'), other.prompt.count('Key: "')) == (1, 2)
        assert other.prompt.index('Key: "') < other.prompt.index("{")


def test_kv_samples_come_from_seed_and_number():
    task = KeyValue(keys=9, depths=50, samples=2)
    first, second = drawn(task)
    assert drawn(task) == [first, second]
    other, _ = drawn(task, seed=1)
    assert len({first.gold, second.gold, other.gold}) == 3
    assert (first.id, second.id) == (0, 1)


def test_kv_questions_on_one_object_share_their_beginning():
    task = KeyValue(lengths=2048, depths=100, samples=5, questions_per_context=3)
    samples = drawn(task)
    assert [sample.id for sample in samples] == [0, 1, 2, 3, 4]
    for group in (samples[:3], samples[3:]):
        shared = group[0].shared
        assert {sample.shared for sample in group} == {shared}
        assert len({tuple(sample.ids[:shared]) for sample in group}) == 1
        # all of the object, and not one token more than is common
        text = tiny_tokenizer().decode(group[0].ids[:shared])
        assert "}\n\nKey: " in text
        assert len({sample.ids[shared] for sample in group}) > 1
        records = pairs(group[0].prompt)[0]
        assert [(pairs(sample.prompt)[1], sample.gold) for sample in group] == records[-len(group) :]
        assert 2048 - 82 - 20 < max(len(sample.ids) for sample in group) <= 2048
    assert pairs(samples[0].prompt)[0] != pairs(samples[3].prompt)[0]
    assert drawn(KeyValue(lengths=2048, depths=100))[0].shared == 0


def test_kv_object_is_fitted_to_the_longest_of_its_questions(monkeypatch):
    fitted = []

    def fill(problem, room, prompt):
        fitted.append(prompt(8))
        return fitted[-1]

    monkeypatch.setattr(retrieval, "fill", fill)
    task = KeyValue(lengths=700, depths=50, samples=4, questions_per_context=4)
    for seed in range(20):
        assert len(fitted) == seed
        assert max(len(sample.ids) for sample in drawn(task, seed=seed)) == len(fitted[seed][1])


def test_kv_official_rows(tmp_path):
    rows = [
        {"ordered_kv_records": [[f"k{row}{n}", f"v{row}{n}"] for n in range(5)], "key": f"k{row}3", "value": f"v{row}3"}
        for row in range(3)
    ]
    bad = [
        "{",
        {"ordered_kv_records": [["a", "b"]], "key": "a", "value": "c"},
        {"ordered_kv_records": [["a", "b"], ["a", "c"]], "key": "a", "value": "b"},
        {"ordered_kv_records": ["ab"], "key": "a", "value": "b"},
        {"key": "a", "value": "b"},
    ]
    written(tmp_path, "kv-retrieval-5_keys.jsonl.gz", [*rows, *bad])
    written(tmp_path, "kv-retrieval-12_keys.jsonl", rows[:1])
    (tmp_path / "README.md").touch()
    task = KeyValue(data=str(tmp_path), samples=9)
    cells = task.cells()
    assert cells == [{"subtask": "kv-retrieval-5_keys"}, {"subtask": "kv-retrieval-12_keys"}]
    assert [task.count(cell) for cell in cells] == [3, 1]
    samples = drawn(task, cells[0])
    for row, sample in zip(rows, samples, strict=True):
        assert pairs(sample.prompt) == ([tuple(pair) for pair in row["ordered_kv_records"]], row["key"])
        assert sample.gold == row["value"]
    (note,) = task.notes()
    assert note.startswith("kv: 5 malformed rows skipped: kv-retrieval-5_keys.jsonl.gz:4 is no JSON")
    assert all(f"gz:{line} " in note for line in range(4, 9))

    moved = KeyValue(data=str(tmp_path / "kv-retrieval-5_keys.jsonl.gz"), depths="0,100")
    for cell, place in zip(moved.cells(), [0, 4], strict=True):
        records, key = pairs(drawn(moved, cell)[1].prompt)
        assert records[place] == (key, "v13")
        assert [k for k, _ in records if k != key] == ["k10", "k11", "k12", "k14"]

    with pytest.raises(ConfigError, match="5 keys are too few for 5 questions_per_context"):
        KeyValue(data=str(tmp_path), questions_per_context=5)
    several = KeyValue(data=str(tmp_path), subtasks="kv-retrieval-5_keys", questions_per_context=2, samples=9)
    assert several.count(several.cells()[0]) == 6
    samples = drawn(several)
    assert [sample.gold for sample in samples] == ["v03", "v04", "v13", "v14", "v23", "v24"]
    assert [k for k, _ in pairs(samples[1].prompt)[0]] == ["k00", "k01", "k02", "k03", "k04"]


@needs_shared
def test_kv_official_file():
    task = KeyValue(data=str(SHARED / "kv_retrieval"), samples=1)
    assert [cell["subtask"] for cell in task.cells()] == ["kv-retrieval-75_keys", "kv-retrieval-140_keys"]
    (sample,) = drawn(task)
    records, key = pairs(sample.prompt)
    assert len(records) == 75 and dict(records)[key] == sample.gold
    assert not task.notes()


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("0d7ba717-e034-410e-88ab-c13d37cc6499", 1),
        ('"0D7BA717-E034-410E-88AB-C13D37CC6499"}', 1),
        ("The value is 0d7ba717-e034-410e-88ab-c13d37cc6499.", 1),
        ("0d7ba717-e034-410e-88ab-c13d37cc649", 0),
        ("0d7ba717e034410e88abc13d37cc6499", 0),
        ("", 0),
    ],
)
def test_kv_score(answer, score):
    task = KeyValue(keys=3, depths=0)
    sample = drawn(task)[0].__class__(0, {}, 0, [], gold="0d7ba717-e034-410e-88ab-c13d37cc6499")
    assert task.score(sample, answer) == {"accuracy": score}


# lines and topics ----------------------------------------------------------------------------------------------------


@needs_shared
def test_lines_layout_is_that_of_the_official_file():
    for row in read_rows(SHARED / "longeval_lines" / "200_lines.jsonl.gz").rows[:10]:
        lines = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", row["prompt"], re.M)
        asked = re.search(r"in line (.+)\?", row["prompt"])[1]
        assert retrieval.lines_text([(label, int(number)) for label, number in lines], asked) == row["prompt"]
        assert len(lines) == 200 and dict(lines)[asked] == str(row["expected_number"])


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_lines_generated(depth):
    task = Lines(lengths="1k,8k", depths=depth)
    for cell in task.cells():
        for sample in drawn(task, cell):
            # less than a line (at most 70 tokens of this tokenizer) is missing, or half a per cent
            assert cell["length"] - max(70, 0.005 * cell["length"]) < len(sample.ids) <= cell["length"]
            lines = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", sample.prompt, re.M)
            asked = re.search(r"in line (.+)\?", sample.prompt)[1]
            at = [label for label, _ in lines].index(asked)
            assert lines[at][1] == sample.gold
            assert at == round(depth / 100 * (len(lines) - 1))
            assert len(dict(lines)) == len(lines)


def test_lines_official_rows(tmp_path):
    rows = [{"prompt": f"Prompt {n}? ", "expected_number": 10 + n} for n in range(3)]
    path = written(tmp_path, "200_lines.jsonl", [*rows, {"prompt": "x", "expected_number": "many"}, {"prompt": "x"}])
    task = Lines(data=str(tmp_path), samples=2)
    assert task.cells() == [{"subtask": "200_lines"}] and task.count(task.cells()[0]) == 2
    samples = drawn(task)
    assert [sample.gold for sample in samples] == ["10", "11"]
    assert "Prompt 1? " in samples[1].prompt
    (note,) = task.notes()
    assert "2 malformed rows" in note and f"{path.name}:4 has an expected_number that is no number" in note


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("42828", 1),
        ("<42828>.", 1),
        ("The <REGISTER_CONTENT> in line changeable-generation is 42828", 1),
        ("7 is wrong, 042828 is right", 1),
        ("42828 or 7", 0),
        # as in the official score, separators split a number
        ("42,828", 0),
        ("none", 0),
        ("", 0),
    ],
)
def test_lines_score(answer, score):
    task = Lines(lengths=1024, depths=0, samples=1)
    sample = drawn(task)[0].__class__(0, {}, 0, [], gold="42828")
    assert task.score(sample, answer) == {"accuracy": score}


def test_lines_say_when_their_words_are_invented(monkeypatch):
    invented = retrieval.ruler_text.Words(("n",), ("a",), ("v",), None)
    monkeypatch.setattr(retrieval.ruler_text, "words", lambda: invented)
    assert "pip install 'hfpatch[eval]'" in Lines().notes()[0]


def test_topics(tmp_path):
    rows = [{"prompt": "Talk. What is the first topic?", "topics": ["The art of tea", "Rain"]}, {"prompt": "x"}]
    written(tmp_path, "10_topics.jsonl", rows[:1])
    written(tmp_path, "5_topics.jsonl", [*rows, {"prompt": "x", "topics": []}])
    task = Topics(data=str(tmp_path))
    assert task.cells() == [{"subtask": "5_topics"}, {"subtask": "10_topics"}]
    (sample,) = drawn(task)
    assert rows[0]["prompt"] in sample.prompt and sample.gold == "The art of tea"
    assert "5_topics.jsonl:2 lacks topics, 5_topics.jsonl:3 has no first topic" in task.notes()[0]
    for answer, score in [
        ("The art of tea", 1),
        ("It was: the ART of tea.", 1),
        ("Rain", 0),
        ("the art of coffee", 0),
        ("", 0),
    ]:
        assert task.score(sample, answer) == {"accuracy": score}


@needs_shared
@pytest.mark.parametrize(
    ("task", "folder", "names"),
    [
        (Lines, "longeval_lines", ["200_lines", "300_lines", "400_lines", "600_lines"]),
        (Topics, "longeval_topics", ["5_topics", "10_topics"]),
    ],
)
def test_longeval_official_files(task, folder, names):
    made = task(data=str(SHARED / folder), samples=60)
    assert [cell["subtask"] for cell in made.cells()] == names
    assert {made.count(cell) for cell in made.cells()} == {50} and not made.notes()
    (sample,) = drawn(task(data=str(SHARED / folder), samples=1))
    assert sample.gold in ("2416", "The psychology of creativity")


# multidoc ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nq(tmp_path):
    """A folder with three questions, the last with a distractor of its own, and 60 passages; two name an answer."""
    rows = [
        {
            "question": f"who was {n}",
            "answers": [f"The Answer {n}!"],
            "ctxs": [{"title": f"Gold {n}", "text": f"It was the answer {n}.", "isgold": True}],
        }
        for n in range(3)
    ]
    rows[2]["ctxs"].insert(0, {"title": "Own", "text": "A close miss.", "isgold": False})
    bad = [
        {"question": "q", "answers": [], "ctxs": rows[0]["ctxs"]},
        {"question": "q", "answers": ["a"], "ctxs": [{"title": "t", "text": "x", "isgold": False}]},
        {"question": "q", "answers": ["a"], "ctxs": ["x"]},
    ]
    written(tmp_path, "nq-open-oracle.jsonl", [*rows, *bad])
    rng = random.Random(0)
    words = [f"w{n}" for n in range(300)]
    passages = [{"title": f"P{n}", "text": " ".join(rng.choices(words, k=40))} for n in range(60)]
    passages += [{"title": "Clone", "text": f"an Answer {n}, said twice."} for n in (0, 1)]
    passages += [{"title": "Gold 0", "text": "another part of the same article"}, {"title": "no text"}]
    (tmp_path / "some_corpus.json").write_text(json.dumps(passages))
    return tmp_path


def documents(prompt):
    return re.findall(r"^Document \[(\d+)\]\(Title: (.+?)\) (.*)$", prompt, re.M)


def test_multidoc_layout():
    assert retrieval.multidoc_text([("T", "Text."), ("U", "More.")], "who") == (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\nDocument [1](Title: T) Text.\nDocument [2](Title: U) More.\n\nQuestion: who\nAnswer:"
    )


def test_multidoc_with_a_number_of_documents(nq):
    task = MultiDoc(data=str(nq), documents=11, depths="0,50,100", samples=3)
    rests = []
    for cell, place in zip(task.cells(), [0, 5, 10], strict=True):
        assert cell["documents"] == 11 and "length" not in cell
        for sample in drawn(task, cell):
            found = documents(sample.prompt)
            assert [int(n) for n, _, _ in found] == list(range(1, 12))
            assert found[place][1:] == (f"Gold {sample.id}", f"It was the answer {sample.id}.")
            assert sample.gold == [f"The Answer {sample.id}!"] and f"Question: who was {sample.id}\n" in sample.prompt
            rest = [document[1:] for document in found if not document[1].startswith("Gold")]
            rests.append((sample.id, rest))
            # a distractor must not hold the answer, nor be of the gold article
            assert sum(f"answer {sample.id}" in text.lower() for _, _, text in found) == 1 and len(rest) == 10
    assert all(rest == dict(rests)[number] for number, rest in rests)
    assert dict(rests)[2][0] == ("Own", "A close miss.")
    notes = " ".join(task.notes())
    assert "jsonl:4 has answers that are no list of texts" in notes and "jsonl:5 has no gold passage" in notes
    assert "jsonl:6 has ctxs that are no list" in notes and "some_corpus.json[63] lacks text" in notes


@pytest.mark.parametrize("length", [1500, 2000, 2600, 3000])
def test_multidoc_length_is_filled_to_the_head_of_a_document(nq, length):
    task = MultiDoc(data=str(nq), lengths=length, depths="0,100")
    first, last = (drawn(task, cell)[0] for cell in task.cells())
    # "Document [9](Title: P9) word" and a word take less than 35 tokens here
    assert length - 35 < len(first.ids) <= length and length - 35 < len(last.ids) <= length
    assert documents(first.prompt)[0][1] == "Gold 0" == documents(last.prompt)[-1][1]
    # only the last of the others may be cut
    for sample, others in ((first, documents(first.prompt)[1:]), (last, documents(last.prompt)[:-1])):
        assert all(len(text.split()) == 40 for _, _, text in others[:-1]), sample.id
        assert 1 <= len(others[-1][2].split()) <= 40


def test_multidoc_when_there_are_too_few_passages(nq):
    task = MultiDoc(data=str(nq), lengths=20000, depths=0, samples=1)
    (sample,) = drawn(task)
    assert len(sample.ids) < 20000 and len(documents(sample.prompt)) > 60
    assert any("too few passages for prompts of 20000 tokens" in note for note in task.notes())
    (refused,) = drawn(MultiDoc(data=str(nq), documents=90, depths=0, samples=1))
    assert refused.refused == "there are only 62 documents"
    assert "62 documents" not in str(drawn(MultiDoc(data=str(nq), documents=62, depths=0, samples=1))[0].refused)


def test_multidoc_needs_distractors(nq):
    (nq / "some_corpus.json").rename(nq / "elsewhere.json")
    assert len(documents(drawn(MultiDoc(data=str(nq), documents=2, depths=0, samples=3))[2].prompt)) == 2
    only_gold = (nq / "nq-open-oracle.jsonl").read_text().splitlines()[:2]
    written(nq, "nq-open-oracle.jsonl", only_gold)
    with pytest.raises(DataMissingError, match="no passages but the gold ones. Give passages=FILE"):
        MultiDoc(data=str(nq))
    assert MultiDoc(data=str(nq), passages=str(nq / "elsewhere.json")).count({}) == 2
    written(nq, "nq-open-20_total_documents.jsonl", only_gold)
    with pytest.raises(ConfigError, match="several question files: nq-open-oracle, nq-open-20_total_documents"):
        MultiDoc(data=str(nq), passages=str(nq / "elsewhere.json"))


@needs_shared
def test_multidoc_official_files():
    task = MultiDoc(
        data=str(SHARED / "nq_open_oracle"),
        passages=str(SHARED / "wiki_passages" / "2wikimultihopqa_corpus.json.gz"),
        lengths=4096,
        depths=50,
        samples=1,
    )
    (sample,) = drawn(task)
    assert sample.gold == ["Wilhelm Conrad Röntgen"] and 0.99 * 4096 <= len(sample.ids) <= 4096
    assert sample.prompt.count("Röntgen") == 1 and not task.notes()


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Wilhelm Conrad Röntgen", 1),
        (" It was wilhelm conrad RÖNTGEN, in 1901.", 1),
        # punctuation and articles go from both
        ("the X-ray", 1),
        # a part of a word counts, as in the original
        ("the xrays", 1),
        ("Röntgen", 0),
        # only what comes before the first line break
        ("I do not know.\nWilhelm Conrad Röntgen", 0),
        ("\nWilhelm Conrad Röntgen", 0),
        ("", 0),
    ],
)
def test_best_subspan_em(answer, score):
    assert retrieval.best_subspan_em(answer, ["Wilhelm Conrad Röntgen", "An X-Ray", "*"]) == score


# options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (lambda: Topics(), r"topics needs its official files, but data=PATH is not given.*N_topics.jsonl"),
        (lambda: Lines(data="nowhere"), r"none at data='nowhere'.*N_lines.jsonl.*DachengLi1/LongChat"),
        (lambda: KeyValue(data="nowhere"), r"kv-retrieval-N_keys.jsonl.*nelson-liu/lost-in-the-middle"),
        (lambda: MultiDoc(), r"nq-open-NAME.jsonl.*nelson-liu/lost-in-the-middle"),
    ],
)
def test_missing_data_says_what_is_expected(task, expected):
    with pytest.raises(DataMissingError, match=expected):
        task()


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (lambda: KeyValue(lengths=512, keys=4), "lengths and keys exclude each other"),
        (lambda: Lines(lengths=512, data="x"), "lengths and data exclude each other"),
        (lambda: Lines(depths=5, data="x"), "depths and data exclude each other"),
        (lambda: MultiDoc(lengths=512, documents=4), "lengths and documents exclude each other"),
        (lambda: KeyValue(subtasks="75"), "subtasks are the files of data, which is not given"),
        (lambda: KeyValue(query_aware=True, questions_per_context=2), "query_aware"),
        (lambda: KeyValue(keys=2, questions_per_context=2), "more keys than questions"),
        (lambda: KeyValue(depths="0:100"), "kv: depths='0:100' gives no depths"),
        (lambda: Lines(depths=101), "lines: depths=101"),
    ],
)
def test_options_that_do_not_go_together(task, expected):
    with pytest.raises(ConfigError, match=expected):
        task()


def test_options_survive_a_round_trip():
    for task in (KeyValue(), KeyValue(keys="4,8", depths="0:100:50"), Lines()):
        again = type(task).from_options(task.options())
        assert again == task and again.cells() == task.cells()


def test_unknown_subtask(tmp_path):
    written(tmp_path, "5_topics.jsonl", [{"prompt": "x", "topics": ["y"]}])
    with pytest.raises(ConfigError, match="there is no '6_topics'. Did you mean '5_topics'"):
        Topics(data=str(tmp_path), subtasks="6_topics")


@pytest.mark.parametrize("task", [KeyValue, Lines])
def test_length_too_short_is_refused(task):
    sample = drawn(task(lengths=40, depths=50))[0]
    assert sample.refused.startswith("length 40 is too short: the smallest prompt takes ")
    assert len(sample.ids) > 40
