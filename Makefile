# Every target works in a fresh clone; the environment is made where VENV says.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A stamp file records an install, and is older than these when the install is out of date.
SPEC := pyproject.toml constraints.txt
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test

# Tests run in as many processes, of one thread each: networks this small gain nothing from a second.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

PROMPT ?= a red apple
OUT ?= apple.png

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench docs lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): $(SPEC) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[image]'
	@touch $@

$(TEST_STAMP): $(SPEC) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[image,video,audio,3d,metrics,bench,solvers,caches,dev]'
	@touch $@

demo: $(DEMO_STAMP) ## install what an image needs and make one
	$(BIN)/suite image "$(PROMPT)" -o "$(OUT)"
	@echo "The picture is $(OUT), in $(CURDIR)"

lint: $(TEST_STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(TEST_STAMP) ## build the documentation; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: lint docs ## lint, documentation and the quick tests
	$(PYTEST)

test-all: lint docs ## the same with the slow tests
	$(PYTEST) -m ""

bench: $(TEST_STAMP) ## measure; prints its tables
	$(BIN)/python -m pytest tests/benchmarks -m bench -s -q

format: $(TEST_STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets made, the environment included
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
