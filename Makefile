# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# Test workers; each computes with one thread.
WORKERS ?= 2
ARGS ?=

.PHONY: setup demo test test-gpu check format lint types bench bench-memory bench-peer clean

setup: $(STAMP)

# Repeated only when the pins, the dependencies or the kernels change.
$(STAMP): constraints.txt pyproject.toml hatch_build.py $(wildcard src/quartet/kernels/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,trackers,quantization,deepspeed,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/quartet demo $(ARGS)

test: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Kernels for GPUs where there is none: run by Triton's interpreter, then compiled. Triton has a folder to itself: libraries do
# other things where it is installed. On a GPU these are tests like all others.
TRITON := .triton
GPU_TESTS := tests/kernels/test_gpu_training.py tests/kernels/test_gpu_decoding.py tests/models/test_gpu_layer.py \
	tests/rollout/test_gpu_step.py
PYTEST_GPU := PYTHONPATH=$(TRITON) $(BIN)/pytest -n $(WORKERS) $(ARGS)

test-gpu: $(STAMP) $(TRITON)/.set-up
	TRITON_INTERPRET=1 $(PYTEST_GPU) $(GPU_TESTS)
	$(PYTEST_GPU) tests/kernels/test_gpu_compiled.py

$(TRITON)/.set-up:
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TRITON) triton==3.6.0
	touch $@

check: format lint types test

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# For the benchmarks only: TRL in two environments of its own (1.12 for PPO, 1.16 for fine-tuning), and what draws the plots.
BENCH := .bench
BENCH_STAMP := $(BENCH)/.set-up

bench-peer: $(BENCH_STAMP)

$(BENCH_STAMP): $(STAMP) benchmarks/peer/requirements-ppo.txt benchmarks/peer/requirements-sft.txt
	$(PYTHON) -m venv $(BENCH)/peer
	$(BENCH)/peer/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/peer/requirements-ppo.txt
	$(PYTHON) -m venv $(BENCH)/sft
	$(BENCH)/sft/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/peer/requirements-sft.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	touch $(BENCH_STAMP)

bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/ppo_iteration.py $(ARGS)

bench-memory: $(BENCH_STAMP)
	$(BIN)/python benchmarks/memory.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
