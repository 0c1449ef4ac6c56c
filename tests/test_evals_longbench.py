"""LongBench without its data: rows of its form made here, and those under shared/data where they are."""

from __future__ import annotations

import json
import lzma
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, DataMissingError, HFPatchError
from hfpatch.evals import longbench
from hfpatch.evals.longbench import LongBench, LongBenchStyle
from hfpatch.evals.run import evaluate
from hfpatch.load import Loaded

SHARED = Path(__file__).parents[2] / "shared" / "data"
TOKENIZER = tiny_tokenizer()


def row(**changed):
    made = {"input": "Who came?", "context": "Anna came. " * 20, "answers": ["Anna"], "length": 42, "all_classes": None}
    return made | {"_id": "x", "dataset": "d", "language": "en"} | changed


def write(folder, **files):
    """Files of rows by stem; a row may be raw text."""
    folder.mkdir(exist_ok=True)
    for stem, rows in files.items():
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
        (folder / f"{stem}.jsonl").write_text(text)
    return str(folder)


def drawn(task, tokenizer=TOKENIZER, context=None):
    return [sample for cell in task.cells() for sample in task.draw(tokenizer, cell, 0, context)]


def scored(task, sample, text):
    return task.score(sample, text)["score"]


# Prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_and_lengths_are_the_official_ones():
    assert set(longbench.PROMPTS) == set(longbench.MAX_NEW_TOKENS) == set(longbench.TASKS)
    assert len(longbench.TASKS) == 16 and len(longbench.E_TASKS) == 13
    assert longbench.MAX_NEW_TOKENS["hotpotqa"] == 32 and longbench.MAX_NEW_TOKENS["qmsum"] == 512
    shipped = json.loads(Path(longbench.__file__).with_name("longbench_prompts.json").read_text("utf-8"))
    assert "Copyright (c) 2023 THU-KEG & Zhipu AI" in shipped["license"]


@pytest.mark.skipif(not (SHARED / "longbench_config").is_dir(), reason="needs shared/data/longbench_config")
def test_prompts_are_those_of_the_repository():
    for mine, name in [(longbench.PROMPTS, "dataset2prompt"), (longbench.MAX_NEW_TOKENS, "dataset2maxlen")]:
        theirs = json.loads((SHARED / "longbench_config" / f"{name}.json").read_text("utf-8"))
        assert mine == {task: theirs[task] for task in mine}


def test_prompt_of_a_question(tmp_path):
    task = LongBench(data=write(tmp_path, hotpotqa=[row(context="Braces {input} stay.")]))
    (sample,) = drawn(task)
    told = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    assert sample.prompt == (
        f"<|user|>\n{told}\n\nThe following are given passages.\nBraces {{input}} stay.\n\n{told}\n\n"
        "Question: Who came?\nAnswer:<eos>\n<|assistant|>\n"
    )
    assert sample.ids == TOKENIZER(sample.prompt)["input_ids"]
    assert (sample.id, sample.gold, sample.subtask, sample.truncated) == (0, ["Anna"], "hotpotqa", False)


def test_few_shot_and_code_tasks_never_see_the_chat_template(tmp_path):
    rows = [row(answers=["Paragraph 1"], all_classes=["Anna"])]
    data = write(tmp_path, **dict.fromkeys(longbench.TASKS, rows))
    raw = {s.subtask for s in drawn(LongBench(data=data, system="Be short.")) if "<|user|>" not in s.prompt}
    assert raw == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    for sample in drawn(LongBench(data=data, system="Be short.")):
        assert ("Be short." in sample.prompt) == (sample.subtask not in raw)
    assert all("<|user|>" in s.prompt for s in drawn(LongBench(data=data, chat_template="on")))
    assert not any("<|user|>" in s.prompt for s in drawn(LongBench(data=data, chat_template="off", system="x")))
    plain = tiny_tokenizer(512, None)
    assert not any("<|user|>" in s.prompt for s in drawn(LongBench(data=data), plain))
    with pytest.raises(ConfigError, match="no chat template"):
        drawn(LongBench(data=data, chat_template="on"), plain)


def test_middle_is_cut_by_the_official_rule(tmp_path):
    context = " ".join(f"word{n}" for n in range(300))
    data = write(tmp_path, hotpotqa=[row(context=context)], lcc=[row(context=context)])
    whole = {s.subtask: s for s in drawn(LongBench(data=data, chat_template="off"))}
    for sample in drawn(LongBench(data=data, max_length=301)):
        ids = whole[sample.subtask].ids
        kept = TOKENIZER.decode(ids[:150]) + TOKENIZER.decode(ids[-150:])
        assert sample.prompt == (f"<|user|>\n{kept}<eos>\n<|assistant|>\n" if sample.subtask == "hotpotqa" else kept)
        assert sample.truncated and "word0 " in sample.prompt and "word150" not in sample.prompt
    # exactly as long is not too long
    longest = max(len(s.ids) for s in whole.values())
    assert not any(s.truncated for s in drawn(LongBench(data=data, max_length=longest), context=100))


def test_without_max_length_prompt_template_and_answer_fill_the_context(tmp_path):
    # a cut inside ü leaves half a letter at each side, and each half takes more tokens than it was
    rows = [row(context="ü" * n) for n in range(1000, 1010)]
    data = write(tmp_path, hotpotqa=rows, lcc=rows)
    for sample in drawn(LongBench(data=data), context=700):
        generated = 32 if sample.subtask == "hotpotqa" else 64
        assert 690 <= len(sample.ids) + generated <= 700
        assert sample.truncated and sample.refused is None
        assert sample.prompt.rstrip().endswith(("<|assistant|>", "Next line of code:"))
    fits = len(drawn(LongBench(data=data), context=None)[0].ids) + 32
    assert not drawn(LongBench(data=data, subtasks="hotpotqa"), context=fits)[0].truncated
    assert drawn(LongBench(data=data, subtasks="hotpotqa"), context=fits - 1)[0].truncated


def test_a_context_with_no_room_is_refused(tmp_path):
    (sample,) = drawn(LongBench(data=write(tmp_path, gov_report=[row()])), context=512)
    assert "512 tokens of context leave no room" in sample.refused
    assert not sample.truncated and len(sample.ids) > 100


def test_questions_on_one_context_follow_each_other_and_share_it(tmp_path):
    long, short = "A long report on ships. " * 80, "Short."
    asked = [(long, "a?"), (short, "b?"), ("other", "c?"), (short, "d?"), (long, "e")]
    rows = [row(context=context, input=question, all_classes=["Anna"]) for context, question in asked]
    for context in (None, 800):
        samples = drawn(LongBench(data=write(tmp_path, trec=rows)), context=context)
        assert [s.id for s in samples] == [0, 4, 1, 3, 2] and samples[0].truncated == bool(context)
        first, second, *others = samples
        assert first.shared == second.shared >= 256
        assert first.ids[: first.shared] == second.ids[: first.shared]
        assert first.ids[first.shared] != second.ids[first.shared]
        assert not any(s.shared for s in others)


def test_a_short_common_start_is_not_shared_and_the_last_token_never_is(tmp_path):
    assert not any(s.shared for s in drawn(LongBench(data=write(tmp_path, lcc=[row(context="x"), row(context="x")]))))
    same = [row(context="A long report. " * 40)] * 2
    samples = drawn(LongBench(data=write(tmp_path, lcc=same)))
    assert [s.shared for s in samples] == [len(samples[0].ids) - 1] * 2


# Scores --------------------------------------------------------------------------------------------------------------


def test_best_answer_counts(tmp_path):
    task = LongBench(data=write(tmp_path, hotpotqa=[row(answers=["Bob", "Anna Lee"])]))
    (sample,) = drawn(task)
    assert scored(task, sample, "Anna Lee.") == scored(task, sample, "bob") == 1
    assert scored(task, sample, "Anna") == pytest.approx(2 / 3)
    assert scored(task, sample, "") == 0


def test_first_line_of_few_shot_answers(tmp_path):
    rows = [row(answers=["city"], all_classes=["city", "date"])]
    task = LongBench(data=write(tmp_path, trec=rows, triviaqa=rows, samsum=rows, qasper=rows))
    samples = {s.subtask: s for s in drawn(task)}
    said = "\n\ncity\nQuestion: date"
    assert {name: scored(task, s, said) for name, s in samples.items()} == {
        "trec": 1,
        "triviaqa": 1,
        "samsum": pytest.approx(1),
        "qasper": 0.5,
    }
    assert [s for s in samples if task.stop_at_newline(samples[s].cell)] == ["samsum"]
    assert {s: task.tokens_to_generate(samples[s].cell) for s in samples} == {
        "qasper": 128,
        "trec": 64,
        "triviaqa": 32,
        "samsum": 128,
    }


@pytest.mark.parametrize(
    ("name", "answer", "said", "score"),
    [
        ("narrativeqa", "the Sea", "sea", 1),
        ("multi_news", "a b", "a c", 0.5),
        ("trec", "city", "city or date", 0.5),
        ("passage_count", "4", "4 of 8", 0.5),
        ("passage_retrieval_en", "Paragraph 4", "4 or 5", 0.5),
        ("repobench-p", "abcd", "```\nabxy", 0.5),
    ],
)
def test_metric_of_each_family(tmp_path, name, answer, said, score):
    task = LongBench(data=write(tmp_path, **{name: [row(answers=[answer], all_classes=["city", "date"])]}))
    assert scored(task, drawn(task)[0], said) == pytest.approx(score, abs=1e-6)


def test_a_missing_package_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    data = write(tmp_path, gov_report=[row()], hotpotqa=[row()])
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(HFPatchError, match="pip install"):
        LongBench(data=data)
    LongBench(data=data, subtasks="hotpotqa")


# Data ----------------------------------------------------------------------------------------------------------------


def test_all_tasks_there_is_data_for_in_the_official_order(tmp_path):
    data = write(tmp_path, lcc=[row()], hotpotqa=[row(), row()], notes=[row()])
    task = LongBench(data=data)
    assert [(c["subtask"], task.count(c)) for c in task.cells()] == [("hotpotqa", 2), ("lcc", 1)]
    (note,) = task.notes()
    assert note.startswith("longbench: 2 of 16 tasks: no narrativeqa.jsonl, ") and "hotpotqa" not in note
    asked = LongBench(data=data, subtasks=["hotpotqa"])
    assert asked.notes() == [] and [c["subtask"] for c in asked.cells()] == ["hotpotqa"]


def test_longbench_e_has_three_tables_per_task(tmp_path):
    lengths = [3999, 4000, 7999, 8000, 12]
    data = write(tmp_path, hotpotqa=[row()], hotpotqa_e=[row(length=n) for n in lengths], lcc_e=[row(length=9000)])
    task = LongBench(data=data, e=True)
    found = {(c["subtask"], c["words"]): [s.id for s in task.draw(TOKENIZER, c, 0)] for c in task.cells()}
    assert found == {
        ("hotpotqa_e", "0-4k"): [0, 4],
        ("hotpotqa_e", "4-8k"): [1, 2],
        ("hotpotqa_e", "8k+"): [3],
        ("lcc_e", "8k+"): [0],
    }
    assert "11 of 13" not in task.notes()[0] and "2 of 13 tasks: no qasper_e.jsonl" in task.notes()[0]
    assert task.tokens_to_generate(task.cells()[0]) == 32
    assert [c["subtask"] for c in LongBench(data=data, e=True, subtasks="lcc_e").cells()] == ["lcc_e"]
    assert LongBench(data=data, e=True, subtasks="lcc").cells() == [{"subtask": "lcc_e", "words": "8k+"}]
    with pytest.raises(ConfigError, match="no subtask 'qmsum' with e=true"):
        LongBench(data=data, e=True, subtasks="qmsum")


def test_first_rows_and_short_rows(tmp_path):
    data = write(tmp_path, lcc=[row(length=n) for n in (9, 90, 8, 900, 7)])
    task = LongBench(data=data, subtasks="lcc", max_words=90, samples=3)
    assert sorted(s.id for s in drawn(task)) == [0, 1, 2]
    assert [note.partition("not comparable")[0] for note in task.notes()] == [
        "longbench: rows of more than 90 words left out (1): ",
        "longbench: at most 3 rows of each table: ",
    ]
    with pytest.raises(ConfigError, match="max_words=5 leaves no row. The shortest here has 7"):
        LongBench(data=data, max_words=5)
    del (bare := row(context="a b c", input="d"))["length"]
    assert longbench.words(bare) == 4


def test_folder_zip_and_compressed_files(tmp_path):
    inner = tmp_path / "data"
    write(inner, hotpotqa=[row()])
    assert LongBench(data=str(tmp_path)).cells() == [{"subtask": "hotpotqa"}]
    (inner / "lcc.jsonl.xz").write_bytes(lzma.compress(json.dumps(row()).encode()))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as packed:
        for file in inner.iterdir():
            packed.write(file, f"data/{file.name}")
    for place in (tmp_path, inner, tmp_path / "data.zip"):
        assert [s.gold for s in drawn(LongBench(data=str(place)))] == [["Anna"]] * 2


def test_data_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataMissingError, match=r"THUDM/LongBench cannot be had.*HF_HUB_OFFLINE.*hotpotqa\.jsonl.*\.xz"):
        LongBench()
    repo = tmp_path / "datasets--THUDM--LongBench"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    with zipfile.ZipFile(snapshot / "data.zip", "w") as packed:
        packed.writestr("data/musique.jsonl", json.dumps(row()))
    assert LongBench().cells() == [{"subtask": "musique"}]


def test_missing_data_says_which_files_are_expected(tmp_path):
    data = write(tmp_path / "d", lcc=[row()])
    with pytest.raises(DataMissingError, match=r"lacks qasper\.jsonl\. Expected: data=FOLDER .*Keys of a row: input"):
        LongBench(data=data, subtasks="lcc,qasper")
    with pytest.raises(DataMissingError, match=r"lacks .*hotpotqa\.jsonl"):
        LongBench(data=str(tmp_path / "none"))
    (tmp_path / "bad.zip").write_bytes(b"PK")
    with pytest.raises(DataMissingError, match="cannot read .*bad.zip"):
        LongBench(data=str(tmp_path / "bad.zip"))
    with pytest.raises(ConfigError, match="no subtask 'hotpot'. It has: narrativeqa"):
        LongBench(data=data, subtasks="hotpot")


def test_malformed_rows_are_named_and_left_out(tmp_path):
    data = write(
        tmp_path,
        hotpotqa=["{", row(answers=None), row(), row(answers=[]), row(answers="Anna"), row(context=3), row()],
        trec=[row(), row(all_classes=["Anna"])],
        passage_retrieval_en=[row(answers=["4"]), row(answers=["Paragraph 4"])],
    )
    task = LongBench(data=data)
    assert [(s.subtask, s.id) for s in drawn(task)] == [
        ("hotpotqa", 2),
        ("hotpotqa", 6),
        ("trec", 1),
        ("passage_retrieval_en", 1),
    ]
    note = task.notes()[-1]
    assert "longbench: 7 malformed rows skipped: hotpotqa.jsonl:1 is no JSON" in note and note.endswith(", and 2 more")
    assert "hotpotqa.jsonl:2 lacks answers" in note and "hotpotqa.jsonl:6 has an input or a context" in note
    note = LongBench(data=data, subtasks="trec,passage_retrieval_en").notes()[0]
    assert "trec.jsonl:1 lacks all_classes, passage_retrieval_en.jsonl:1 has an answer that is no 'Paragraph N'" in note


# Rows of the same form -----------------------------------------------------------------------------------------------


def test_own_rows_say_which_task_they_are_run_as(tmp_path):
    data = write(
        tmp_path,
        mine=[row(prompt_task="trec", all_classes=["Anna"]), row(prompt_task="lcc"), row(all_classes=["Anna"])],
        lcc=[row()],
        other=[row()],
    )
    with pytest.raises(ConfigError, match=r"rows of other do not say.*prompts=\{other: TASK\}"):
        LongBenchStyle(data=data)
    task = LongBenchStyle(data=data, prompts={"other": "samsum"})
    assert [c["subtask"] for c in task.cells()] == ["lcc", "mine", "other"]
    assert [task.tokens_to_generate(c) for c in task.cells()] == [64, 64, 128]
    assert [task.stop_at_newline(c) for c in task.cells()] == [False, False, True]
    assert task.notes() == [
        "longbench-style: 1 malformed row skipped: mine.jsonl:2 has prompt_task 'lcc', the file's is 'trec'"
    ]
    assert [s.id for s in drawn(task) if s.subtask == "mine"] == [0, 2]
    # the option goes before the rows
    task = LongBenchStyle(data=f"{data}/mine.jsonl", prompts={"mine": "qasper"})
    assert [s.prompt.startswith("<|user|>\nYou are given a scientific") for s in drawn(task)] == [True] * 3
    assert task.name == "longbench-style"


def test_own_rows_that_cannot_be_run(tmp_path):
    data = write(tmp_path / "d", lcc=[row(prompt_task="hotpot")])
    with pytest.raises(ConfigError, match="lcc: prompt_task='hotpot' is no official task. Did you mean 'hotpotqa'"):
        LongBenchStyle(data=data)
    with pytest.raises(ConfigError, match=r"prompts\.lcc='x' is no official task"):
        LongBenchStyle(data=data, prompts={"lcc": "x"})
    for wrong in ({"subtasks": "qasper"}, {"prompts": {"qasper": "qasper"}}):
        with pytest.raises(DataMissingError, match=r"no qasper.jsonl in .* There are: lcc"):
            LongBenchStyle(data=data, **wrong)
    with pytest.raises(DataMissingError, match="give data=FILE or data=FOLDER"):
        LongBenchStyle()
    (tmp_path / "d" / "lcc.jsonl").unlink()
    for place in (data, f"{data}/none.jsonl"):
        with pytest.raises(DataMissingError, match="no rows in"):
            LongBenchStyle(data=place)


@pytest.mark.skipif(not (SHARED / "longbench_style").is_dir(), reason="needs shared/data/longbench_style")
def test_shared_rows(tmp_path):
    task = LongBenchStyle(data=str(SHARED / "longbench_style"), samples=4, max_words=3000)
    counts = {cell["subtask"]: task.count(cell) for cell in task.cells()}
    assert len(counts) == 11 and set(counts.values()) == {4}
    samples = drawn(task, context=4096)
    assert any(s.truncated for s in samples)
    for sample in samples:
        assert len(sample.ids) + task.tokens_to_generate(sample.cell) <= 4096
        best = max(sample.gold, key=len)
        assert scored(task, sample, best) == pytest.approx(1, abs=1e-6), (sample.subtask, sample.id)
        assert scored(task, sample, "") == 0
    assert {s.subtask for s in samples if s.shared} >= {"qasper"}
    assert all("<|user|>" not in s.prompt for s in samples if s.subtask in ("banking77_icl", "xquad_icl", "lcc"))


# Run -----------------------------------------------------------------------------------------------------------------


def test_run_reports_a_mean_per_bin_and_counts_what_was_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("hfpatch.evals.run.render", lambda *args: [])
    monkeypatch.setitem(longbench.MAX_NEW_TOKENS, "hotpotqa", 3)
    rows = [row(length=10), row(length=5000, context="Anna came. " * 99), row(length=9000), row(answers=[])]
    model = tiny("llama", vocab_size=512, max_position_embeddings=400)
    loaded = Loaded(model, tiny_tokenizer(), None, "tiny")
    data = write(tmp_path / "d", hotpotqa_e=rows)
    run = evaluate(loaded, "longbench", out=tmp_path, data=data, e=True, subtasks="hotpotqa")
    found = {row["cell"]["words"]: row for row in run.samples()}
    assert list(found) == ["0-4k", "4-8k", "8k+"]
    assert [bool(r.get("truncated")) for r in found.values()] == [False, True, False]
    assert found["4-8k"]["prompt_tokens"] <= 397 and not any(r["error"] for r in found.values())
    results = run.results()
    assert {q["setting"]["words"] for q in results["quality"]} == set(found)
    assert any("hotpotqa_e.jsonl:4 has answers that are no list" in w for w in results["warnings"])
