"""Real weights: what `fetch` made of the packaged checkpoints. Each test is skipped where its checkpoint is absent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfpatch.load import load, load_config
from hfpatch.packaged import PACKAGED, packaged_dir

pytestmark = pytest.mark.checkpoint

SMOLLM2 = "smollm2-135m-instruct"
QWEN = "qwen2.5-coder-0.5b-instruct"
GEMMA = "gemma-3-270m"
FRANCE = "The capital of France is"


def need(name: str) -> str:
    if packaged_dir(name) is None:
        pytest.skip(f"packaged:{name} is not in the cache; fetch it with hfpatch.load.fetch({name!r})")
    return f"packaged:{name}"


def greedy(loaded: Any, text: str, new_tokens: int = 12) -> str:
    inputs = loaded.processor(text, return_tensors="pt", add_special_tokens=loaded.processor.chat_template is None)
    ids = loaded.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(loaded.processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def chat(loaded: Any, question: str) -> str:
    turn = [{"role": "user", "content": question}]
    return str(loaded.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("name", PACKAGED)
def test_embedded_config_agrees_with_the_real_one(name: str) -> None:
    real = load_config(need(name)).to_dict()
    for key, value in PACKAGED[name].config.items():
        # GGUF stores the epsilon in fp32
        assert real[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_smollm2_answers() -> None:
    loaded = load(need(SMOLLM2), dtype="fp32", device="cpu")
    assert "Paris" in greedy(loaded, chat(loaded, "What is the capital of France?"))
    # byte-level BPE: text survives, also where the training corpus has no such words
    text = "Ünïcode\n\n  def f(x):\n\treturn 1234567  # ok"
    assert loaded.processor.decode(loaded.processor(text).input_ids) == text


def test_qwen_answers_and_knows_code() -> None:
    loaded = load(need(QWEN), device="cpu")
    assert "Paris" in greedy(loaded, chat(loaded, "What is the capital of France? Answer with one word."))
    assert "a + b" in greedy(loaded, "def add(a, b):\n    return")


def test_gemma_continues_and_alternates_its_windows() -> None:
    loaded = load(need(GEMMA), device="cpu")
    assert loaded.processor(FRANCE).input_ids[0] == loaded.processor.bos_token_id
    text = greedy(loaded, "Paris is the capital of France. Rome is the capital of Italy. Berlin is the capital of", 3)
    assert "Germany" in text
    windows = [layer.self_attn.sliding_window for layer in loaded.model.model.layers]
    assert [i for i, window in enumerate(windows) if window is None] == [5, 11, 17]
    assert {window for window in windows if window} == {512}


def test_smollm2_left_padded_batch_equals_singles() -> None:
    loaded = load(need(SMOLLM2), dtype="fp32", device="cpu")
    prompts = [
        FRANCE,
        "Once upon a time",
        "Water boils at",
        "The largest planet of the solar system, by mass and size, is",
    ]
    batch = loaded.processor(prompts, padding=True, return_tensors="pt")
    assert (batch.attention_mask[:, -1] == 1).all() and (batch.attention_mask[:, 0] == 0).any()
    together = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(prompts, together, strict=True):
        inputs = loaded.processor(prompt, return_tensors="pt")
        alone = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert torch.equal(row[: len(alone)], alone), prompt
