# Every target does its own set-up in .venv; the only assumption is Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(shell find protos -name '*.proto')
PROMPT ?= What is the capital of France?
MODEL ?= smollm2-135m
# Two tests at a time; those that start processes are one group, one at a time.
SPREAD := -n 2

# An interpreter with torch and triton, used as it is; by default .venv is set up and used.
GPU_PYTHON ?=

.PHONY: run serve test test-long faults kernels-compile gpu-check check format protos bench clean

# One stamp a set of extras, so that `make run` does not wait for the developers' tools.
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[executor]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --editable '.[executor,bench,dev]'
	touch $@

run: $(VENV)/.run
	$(BIN)/stepwire run --model $(MODEL) "$(PROMPT)"

serve: $(VENV)/.run
	$(BIN)/stepwire serve $(MODEL)

test: $(VENV)/.dev
	$(BIN)/stepwire pull $(MODEL)
	$(BIN)/pytest -m "not long" $(SPREAD) $(PYTEST_ARGS)

test-long: $(VENV)/.dev
	$(BIN)/stepwire pull $(MODEL)
	$(BIN)/pytest $(SPREAD) $(PYTEST_ARGS)

# The scheduler among simulated executors and clients that fail, then real processes that are
# killed, stopped, cut off and starved; takes long. FAULTS_ARGS="--seed N --trace" replays one
# seed of the simulation, and no more.
faults: $(VENV)/.dev
	$(BIN)/python -m tests.simulation $(FAULTS_ARGS)
ifndef FAULTS_ARGS
	$(BIN)/stepwire pull $(MODEL)
	$(BIN)/pytest tests/faults $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks kills cancel_leak overload
endif

# Every Triton kernel for sm_80, sm_90 and sm_100; needs no GPU.
kernels-compile: $(VENV)/.dev
	$(BIN)/python -m stepwire_executor.kernels.compile_gate

# Correctness, bits and figures on a GPU; skipped with one line where there is none.
gpu-check: $(if $(GPU_PYTHON),,$(VENV)/.dev)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(GPU_CHECK_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	PATH=$(CURDIR)/$(BIN):$$PATH scripts/check_protos.sh

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write

protos: $(VENV)/.dev
	PATH=$(CURDIR)/$(BIN):$$PATH scripts/generate_protos.sh protos

bench: $(VENV)/.dev
	$(BIN)/stepwire pull $(MODEL)
	$(BIN)/python -m benchmarks all
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf $(VENV)
