"""The model type of lm-evaluation-harness: lm_eval itself runs local tasks on a tiny model, dense and patched."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial

import pytest
import torch
import yaml
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, UnknownNameError, UnsupportedError

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from hfpatch.evals.harness import HFPatchLM, _decoded, _selected, main  # noqa: E402

TEXTS = [
    "The baker carried a brass lantern to the harbour before breakfast.",
    "After the fair the librarian described the old granary, and nobody asked why.",
    "Steady rain.",
    "The ferryman sold a wheel of cheese near the lighthouse in the best of spirits, humming an old tune, and the "
    "postwoman counted the letters twice before the bells rang.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=512).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with three tasks and their data."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "choices": ["a quiet gate", "rain", "the sea"], "gold": 1} for text in TEXTS]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "rows.jsonl")}, "cache_dir": str(path / "cache")},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    kinds = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}} Then came",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "tiny_answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}} Then",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, kind in kinds.items():
        (path / f"{name}.yaml").write_text(yaml.dump({"task": name, **data, **kind}))
    return path


@pytest.fixture
def run(folder, tasks):
    """What the model answered: {task: [the responses to a row, ...]}."""

    def run(args="", model="hfpatch", batch_size=1, wanted=("tiny_choice", "tiny_answer", "tiny_text")):
        made = lm_eval.simple_evaluate(
            model=model,
            model_args=f"pretrained={folder},dtype=float32{args}",
            tasks=list(wanted),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
        )
        rows = {name: sorted(made["samples"][name], key=lambda row: row["doc_id"]) for name in wanted}
        return made, {name: [row["filtered_resps"] for row in rows[name]] for name in wanted}

    return run


def numbers(answers):
    return [pair[0] for row in answers["tiny_choice"] for pair in row] + [row[0] for row in answers["tiny_text"]]


def test_neutral_patch_gives_what_hf_gives(run):
    dense, expected = run(model="hf", batch_size=4)
    patched, answers = run(",patch=swa:window=4096;sink=4", batch_size=4)
    assert numbers(answers) == pytest.approx(numbers(expected), abs=1e-4)
    assert answers["tiny_answer"] == expected["tiny_answer"]
    for name, scores in dense["results"].items():
        for metric, value in scores.items():
            assert patched["results"][name][metric] == (pytest.approx(value) if isinstance(value, float) else value)


def test_window_changes_answers_and_is_in_the_results(run):
    plain, expected = run()
    made, answers = run(",patch=swa:window=4;sink=0,kernel=reference,layers=0;2,strict=true")
    assert "patch" not in plain["config"]
    assert max(abs(a - b) for a, b in zip(numbers(answers), numbers(expected), strict=True)) > 0.05
    assert answers["tiny_answer"] != expected["tiny_answer"]
    config = made["config"]
    assert config["patch"] == ["swa:window=4,sink=0,layers='0,2'"] and config["patch_kernel"] == "reference"
    # one of three layers is dense
    assert 1 / 3 < config["patch_density_prefill"] < 0.9 and 1 / 3 < config["patch_density_decode"] < 0.9


@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_batches_do_not_change_answers(run, batch_size):
    """`sa` draws its order for the length that it sees: padding taken for text would change every answer."""
    _, alone = run(",patch=sa:window=6;sink=1;local=2")
    _, together = run(",patch=sa:window=6;sink=1;local=2,max_batch_size=2,max_length=128", batch_size=batch_size)
    assert numbers(together) == pytest.approx(numbers(alone), abs=1e-4)
    assert together["tiny_answer"] == alone["tiny_answer"]


def test_only_rows_of_one_length_share_a_batch(monkeypatch):
    model = tiny("llama", vocab_size=512)
    lm = HFPatchLM(model, patch="sa:window=6,sink=1,local=2", tokenizer=tiny_tokenizer(), batch_size=2)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in (20, 31, 20, 9, 20, 31, 20, 20)]
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    answers = lm._loglikelihood_tokens([(None, row[:-3], row[-3:]) for row in rows], disable_tqdm=True)
    hook.remove()
    assert shapes == [(2, 30), (2, 19), (2, 19), (1, 19), (1, 8)]
    for row, (found, _) in zip(rows, answers, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
        assert found == pytest.approx(sum(log_probs[i, row[i]].item() for i in range(-3, 0)), abs=1e-4)

    tried = []
    monkeypatch.setattr(lm, "_detect_batch_size", lambda requests, pos=0: tried.append(len(requests[0][1])) or 4)
    lm.batch_size_per_gpu = "auto"
    again = lm._loglikelihood_tokens([(None, row[:-3], row[-3:]) for row in rows], True)
    assert [value for value, _ in again] == pytest.approx([value for value, _ in answers], abs=1e-4)
    assert tried == [28]


def test_two_patches(run):
    made, _ = run(",patch=swa:window=4;sink=1;layers=[0;1]+head_scale:factor=0.1", wanted=["tiny_choice"])
    assert [text.split(":")[0] for text in made["config"]["patch"]] == ["swa", "head_scale"]


def test_a_loaded_model(tasks):
    model = tiny("qwen3", vocab_size=512)
    lm = HFPatchLM(model, patch=["swa:window=4,sink=1"], tokenizer=tiny_tokenizer(), batch_size=2)
    assert lm.handle.specs[0].params == {"window": 4, "sink": 1}
    made = lm_eval.simple_evaluate(
        lm, tasks=["tiny_choice"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False)
    )
    assert made["results"]["tiny_choice"]["acc,none"] >= 0 and lm.handle.report().density() < 1


def test_command_line(folder, tasks, tmp_path, monkeypatch, capsys):
    args = ["--model", "hfpatch", "--model_args", f"pretrained={folder},patch=swa:window=4;sink=1,layers=-1"]
    as_json = json.dumps({"pretrained": folder, "patch": "swo:window=4,sink=1"})
    args += ["--tasks", str(tasks / "tiny_choice.yaml"), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    # listing all the tasks that come with lm_eval takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["harness", *args])
    main()
    assert "tiny_choice" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["patch"] == ["swa:window=4,sink=1,layers=-1"]
    monkeypatch.setattr(sys, "argv", ["harness", *args[:3], as_json, *args[4:]])
    with pytest.raises(SystemExit, match="error: unknown patcher 'swo'"):
        main()


def test_wrong_arguments(folder):
    with pytest.raises(UnknownNameError, match="packaged"):
        HFPatchLM("packaged:no-such-model")
    with pytest.raises(ConfigError, match="not of the form"):
        HFPatchLM(folder, patch="swa:window", device="cpu")


def test_encoding_of_patches_and_layers():
    assert _decoded("swa:window=512;sink=4") == "swa:window=512,sink=4"
    assert _decoded("swa:full_layers=[1;5]+head_scale:factor=1e+1") == [
        "swa:full_layers=[1,5]",
        "head_scale:factor=1e+1",
    ]
    assert _decoded("recipe:swa-paper") == "recipe:swa-paper"
    given = [None, 2, -1.0, "2:", "0-3;8", "[1;2]", [1, 2]]
    assert [_selected(layers) for layers in given] == [None, 2, -1, "2:", "0-3,8", [1, 2], [1, 2]]


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "hfpatch.evals.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hfpatch\[harness\]'"):
        importlib.import_module("hfpatch.evals.harness")
