# make demo   sets up, runs dense and patched SmolLM2-135M on the needle test and a benchmark, ends with a report
# make test   sets up, runs the tests (offline, CPU)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-short test test-all test-floor check setup

demo: setup
	$(BIN)/hfpatch apply recipe:demo

demo-short: setup
	$(BIN)/hfpatch apply recipe:demo --limit 1 --set bench.repeats=3 --set bench.lengths=[512] --set bench.warmup=1

# one process a core; each has one torch thread
test: setup
	$(BIN)/python -m pytest -q -n auto

# also what takes long and what needs a real checkpoint or a GPU; each skips with its reason where it cannot run
test-all: setup
	$(BIN)/python -m pytest -q -m "slow" -n auto
	$(BIN)/python -m pytest -q -m "gpu or checkpoint"

# the oldest transformers that is supported, laid over the environment
test-floor: setup .floor/.done
	PYTHONPATH=.floor $(BIN)/python -m pytest -q tests/test_method_contract.py tests/test_methods.py tests/test_patch.py \
		-n auto -k "llama or qwen2 or gemma3 or gpt_oss or llava or not contract"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

.floor/.done: constraints.txt
	$(BIN)/pip install --quiet --target .floor --upgrade transformers==5.17.0
	touch $@
