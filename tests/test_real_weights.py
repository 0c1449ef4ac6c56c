"""Patches on SmolLM2's real weights: a padded batch writes what each prompt writes alone; undo is exact."""

from __future__ import annotations

import pytest
import torch

import hfpatch
from hfpatch.packaged import packaged_dir
from hfpatch.registry import METHODS

NAME = "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.checkpoint,
    pytest.mark.skipif(packaged_dir(NAME) is None, reason=f"packaged:{NAME} is not in the cache; make demo fetches it"),
]
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea and the wind, please, in plain English words.",
    "Count: one two three",
    "Name three colours and three fruits, then stop.",
]
SETTINGS = [
    ("swa", {"window": 24, "sink": 4}),
    ("swa", {"window": 16, "sink": 2, "full_layers": "odd", "decode": "full"}),
    ("swa", {"window": 32, "align": "block", "block_size": 8}),
    ("sa", {"window": 16, "sink": 4}),
    ("sa", {"window": 16, "granularity": "block", "block_size": 8, "decode": "hybrid"}),
    ("head_scale", {"factor": 0.9}),
]


@pytest.fixture(scope="module")
def loaded():
    return hfpatch.load(f"packaged:{NAME}", dtype="fp32")


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(SETTINGS)])
def test_padded_batch_writes_what_singles_write(loaded, name, options):
    model, tokenizer = loaded.model, loaded.processor
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    settings = {"max_new_tokens": 20, "do_sample": False}
    with hfpatch.patch(model, name, **options):
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        assert len(set(batch["attention_mask"].sum(-1).tolist())) == 4
        rows = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
        for row, text in zip(rows, texts, strict=True):
            single = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
            assert torch.equal(row[: len(alone)], alone)


def test_undo_is_exact_for_every_patcher(loaded):
    inputs = loaded.processor("The quick brown fox jumps over the lazy dog. " * 8, return_tensors="pt")
    with torch.no_grad():
        want = loaded.model(**inputs).logits
        for name, cls in METHODS.items():
            if {"image tokens", "vision tower"} & {*cls.card.needs}:
                continue
            with hfpatch.patch(loaded.model, cls(**cls.examples[0])):
                loaded.model(**inputs)
            assert torch.equal(loaded.model(**inputs).logits, want), name
