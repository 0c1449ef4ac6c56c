"""Batches, kept contexts, shards and resuming give what one process gives that answers sample by sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from test_evals_run import NIAH, Stop, recipe, timeless
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import DataMissingError
from hfpatch.evals import generation, prompts
from hfpatch.evals.base import TASKS, Cell, Sample, Task, option
from hfpatch.evals.run import run_recipe
from hfpatch.load import Loaded
from hfpatch.report.run import RunDir

SAME = ("arm", "task", "cell", "id", "output", "scores", "prompt_sha")


@pytest.fixture
def loaded():
    return Loaded(tiny("llama", vocab_size=512, max_position_embeddings=400), tiny_tokenizer(), None, "tiny")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("hfpatch.evals.run.render", lambda *args: [])


@dataclass(frozen=True, kw_only=True)
class Questions(Task):
    """Several questions on one text, of unequal length; one prompt is too long, one says so itself."""

    name: ClassVar[str] = "questions"
    metrics: ClassVar[tuple[str, ...]] = ("same",)

    extra: bool = option(True, "also the prompts that cannot run")

    def cells(self) -> list[Cell]:
        return [{"subtask": "a"}, {"subtask": "b"}]

    def count(self, cell: Cell) -> int:
        return 4 + 2 * self.extra

    def tokens_to_generate(self, cell: Cell) -> int:
        return 5

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        text = prompts.render(tokenizer, f"The text {cell['subtask']}. " * 9, mode="off")[1]
        for number in range(4):
            asked = prompts.render(tokenizer, "What is it" + " really" * number + "?", mode="off")[1]
            yield Sample(number, cell, seed, text + asked, cell["subtask"], gold=["x", "y"], shared=len(text))
        if self.extra:
            yield Sample(4, cell, seed, text * 30, cell["subtask"])
            yield Sample(5, cell, seed, text, cell["subtask"], refused="the row has no question")

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return {"same": float(bool(text))}


@pytest.fixture(autouse=True)
def questions(monkeypatch):
    monkeypatch.setitem(TASKS._items, "questions", Questions)
    monkeypatch.setitem(TASKS._folded, "questions", "questions")


def answers(run: RunDir) -> list[dict[str, Any]]:
    rows = [{key: row[key] for key in SAME} for row in timeless(run)]
    return sorted(rows, key=lambda row: json.dumps([row["arm"], row["cell"], row["id"]]))


def test_batches_answer_as_singles(loaded, tmp_path):
    single = run_recipe(recipe({"task": "questions"}), out=tmp_path, loaded=loaded)
    batched = run_recipe(recipe({"task": "questions"}, generation={"batch_size": 3}), out=tmp_path, loaded=loaded)
    assert answers(batched) == answers(single)
    assert len(single.samples()) == 24


def test_refused_prompts_are_recorded_and_counted_apart(loaded, tmp_path):
    run = run_recipe(recipe({"task": "questions"}), out=tmp_path, loaded=loaded)
    refused = [row for row in run.samples() if row["finish"] == "refused"]
    assert {row["id"] for row in refused} == {4, 5} and len(refused) == 8
    assert any("exceeds the model's context of 400 tokens" in row["error"] for row in refused)
    assert any(row["error"] == "refused: the row has no question" for row in refused)


def test_kept_text_answers_as_whole_prompts_on_dense(loaded, tmp_path, monkeypatch):
    plain = recipe({"task": "questions", "extra": False}, patches=[])
    kept = recipe({"task": "questions", "extra": False}, patches=[], generation={"reuse_context": True})
    whole = run_recipe(plain, out=tmp_path, loaded=loaded)
    prefilled: list[int] = []
    of = generation.Prefix.of.__func__
    monkeypatch.setattr(
        generation.Prefix,
        "of",
        classmethod(lambda cls, model, tokens: prefilled.append(len(tokens)) or of(cls, model, tokens)),
    )
    reused = run_recipe(kept, out=tmp_path, loaded=loaded)
    assert answers(reused) == answers(whole)
    # one prefill a text, not one a question
    assert len(prefilled) == 2
    assert all(row["reused_tokens"] == prefilled[0] for row in reused.samples())


def test_kept_text_of_a_window_is_what_chunks_give(loaded, tmp_path):
    """A window does not look at the question, so it answers the same with and without the kept text."""
    one = recipe({"task": "questions", "extra": False})
    other = recipe({"task": "questions", "extra": False}, generation={"reuse_context": True})
    whole, kept = (run_recipe(r, out=tmp_path, loaded=loaded) for r in (one, other))
    assert answers(kept) == answers(whole)


def test_sliding_caches_are_not_cut_back():
    model = tiny("gemma3", vocab_size=512)
    assert generation.Prefix.of(model, list(range(5, 30))) is None


def test_failed_batch_is_tried_one_by_one(loaded, tmp_path, monkeypatch):
    real = generation.greedy

    def small(model: Any, tokenizer: Any, ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if len(ids) > 1:
            raise MemoryError("no room for two")
        return real(model, tokenizer, ids, *args, **kwargs)

    monkeypatch.setattr(generation, "greedy", small)
    run = run_recipe(
        recipe({"task": "questions", "extra": False}, generation={"batch_size": 4}), out=tmp_path, loaded=loaded
    )
    assert not any(row["error"] for row in run.samples())


@pytest.mark.parametrize("after", [1, 4, 7, 12])
def test_interrupted_batches_resume_to_the_same_results(loaded, tmp_path, after):
    wanted = recipe({"task": "questions"}, NIAH, generation={"batch_size": 3})
    whole = run_recipe(wanted, out=tmp_path / "whole", loaded=loaded)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(wanted, out=tmp_path / "cut", loaded=loaded, progress=Stop(after))
    (cut,) = [path for path in (tmp_path / "cut").iterdir() if path.is_dir()]
    resumed = run_recipe(wanted, resume=cut, loaded=loaded)
    assert timeless(resumed) == timeless(whole)
    assert _results(resumed) == _results(whole)


def test_task_without_samples_says_so(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(Questions, "draw", lambda *args: iter(()))
    with pytest.raises(DataMissingError, match="questions has no samples"):
        run_recipe(recipe({"task": "questions"}), out=tmp_path, loaded=loaded)


def test_two_processes_give_the_file_of_one(loaded, tmp_path):
    """`accelerate launch` on two CPU processes, really started; without a GPU --multi_gpu starts CPU processes."""
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.processor.save_pretrained(tmp_path / "model")
    model = {"id": str(tmp_path / "model"), "device": "cpu", "dtype": "fp32"}
    wanted = recipe({**NIAH, "samples": 2}, model=model, output={"dir": str(tmp_path / "runs")})
    wanted.save(tmp_path / "two.yaml")
    one = run_recipe(wanted)
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "-m", "hfpatch", "apply", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    two = RunDir.open(tmp_path / "runs" / "latest")
    assert two.env()["processes"] == 2
    assert not (two.path / "shards").exists()
    assert _results(two) == _results(one)
    assert timeless(two) == timeless(one)


def _results(run: RunDir) -> dict[str, Any]:
    return {key: value for key, value in run.results().items() if key not in ("timing", "env")}
