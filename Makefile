# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS := OMP_NUM_THREADS=1
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test lint check bench docs pages clean

demo: $(VENV)/.base ## ten parties, eight methods, embedded data, one to three minutes
	$(OFFLINE) $(BIN)/fedlora demo

test: $(VENV)/.dev ## all tests, offline
	$(THREADS) $(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/mypy

check: lint test ## what CI runs
	@echo "make check: lint and tests passed"

pages: $(VENV)/.dev ## generated pages and figures of docs/, from the code and the measured results
	$(BIN)/python -m scripts.pages

docs: pages ## the site, in build/site; open build/site/index.html
	$(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedlora needs Python 3.11 or newer; set PYTHON=python3.11 (found: $$($(PYTHON) --version 2>&1))"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
