"""Documentation that runs: the toy method, the README example; a page for every method, with current tables."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import hfpatch
import hfpatch.methods
from hfpatch.registry import METHODS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="installed without the documentation")


def code(path, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.S)


def test_toy_method_runs_as_printed(tmp_path, monkeypatch):
    (source,) = code("docs/write_a_method.md")
    lines = [line for line in source.split("class Dilated")[1].splitlines() if line.strip()]
    assert len(lines) <= 20
    (tmp_path / "toy_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("toy_method")
    try:
        model = tiny.tiny("qwen3", num_hidden_layers=3)
        inputs = tiny.text_inputs(model, batch=2, length=70, padding=[9, 0])
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            dense = model(**inputs).logits
            with hfpatch.patch(model, METHODS.get("dilated_toy").neutral()):
                torch.testing.assert_close(model(**inputs).logits[real], dense[real], atol=1e-5, rtol=1e-4)
            with hfpatch.patch(model, "dilated-toy", steps=3) as handle:
                batch = model(**inputs).logits
                alone = model(**{k: v[:1, 9:] for k, v in inputs.items()}).logits
                torch.testing.assert_close(batch[:1, 9:], alone, atol=1e-5, rtol=1e-4)
                assert handle.report().density() < 0.95
            assert torch.equal(model(**inputs).logits, dense)
    finally:
        METHODS._items.pop("dilated_toy")
        METHODS._folded.pop("dilatedtoy")


def test_readme_example_runs(monkeypatch):
    """The first Python block, with a tiny model in place of the downloaded one."""
    source = code("README.md")[0]
    model = tiny.tiny("llama")

    class Tokenizer:
        def __call__(self, text, return_tensors):
            return tiny.text_inputs(model, length=40)

        def decode(self, ids, **_):
            return str(ids.tolist())

    monkeypatch.setattr(hfpatch, "load", lambda name: hfpatch.Loaded(model, Tokenizer(), None, name), raising=False)
    exec(compile(source, "README.md", "exec"), {"long_text": "word " * 40})
    assert not hfpatch.is_patched(model)


def test_every_method_has_a_page_and_a_readme_row():
    readme = (ROOT / "README.md").read_text()
    for name, cls in METHODS.items():
        module = cls.__module__.rsplit(".", 1)[1]
        page = ROOT / "docs" / "methods" / f"{module}.md"
        assert page.is_file(), f"{name}: no {page.name}"
        assert f"`{name}`" in page.read_text(), f"{name} is not named on {page.name}"
        assert f"`{name}`" in readme, f"{name} has no row in the README"


def test_option_tables_on_the_pages_are_current():
    """Generated from the options: `python docs/generate.py` rewrites them."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_table_of_contents_lists_every_method_file():
    folder = Path(hfpatch.methods.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if "@register_patcher" in path.read_text()}
    assert set(hfpatch.methods.__all__) == files
