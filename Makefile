# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS := OMP_NUM_THREADS=1
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test test-all test-times lint check bench docs pages notebooks clean

demo: $(VENV)/.base ## ten parties, eight methods, embedded data, one to three minutes
	$(OFFLINE) $(BIN)/fedlora demo

PYTEST := $(THREADS) $(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(VENV)/.dev ## the first tier: every guarantee in one process, and one real run of each real part; offline
	$(PYTEST)

test-all: $(VENV)/.dev ## both tiers, offline
	$(PYTEST) -m ""

test-times: $(VENV)/.dev ## both tiers, then the twenty slowest tests and the sum by folder
	rm -f build/test-times.jsonl && mkdir -p build
	$(PYTEST) -m "" --times build/test-times.jsonl
	$(BIN)/python -m scripts.test_times build/test-times.jsonl

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/mypy

check: lint test-all ## what CI runs
	@echo "make check: lint and tests passed"

pages: $(VENV)/.dev ## generated pages and figures of docs/, from the code and the measured results
	$(BIN)/python -m scripts.pages

notebooks: $(VENV)/.dev ## runs the notebooks of examples/ and stores their outputs, half a minute
	$(BIN)/python -m scripts.notebooks

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
