# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# Test workers; each computes with one thread.
WORKERS ?= 2
ARGS ?=

.PHONY: setup demo test check format lint types clean

setup: $(STAMP)

# Repeated only when the pins or the dependencies change.
$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,trackers,quantization,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/quartet demo $(ARGS)

test: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: format lint types test

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
