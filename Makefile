# Two commands for a newcomer: `make quickstart` and `make test`. Both set up .venv on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint types newest clean

help:  ## Lists the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMP)  ## Trains a small MSA model and its dense twin on a CPU, compares and reports.
	JAX_PLATFORMS=cpu $(BIN)/python -m experiments.quickstart

test: $(STAMP)  ## Runs the test suite.
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart=0

lint: $(STAMP)  ## Style, and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## Static types.
	$(BIN)/pyrefly check

newest: .venv-newest/.installed  ## A quick subset of the tests on the newest jax and flax.
	JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -n $(WORKERS) -m fast

clean:  ## Deletes the environments; runs stay.
	rm -rf $(VENV) .venv-newest

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "Python >= 3.12 is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv-newest/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --upgrade -e '.[test]'
	@touch $@
