# `make demo` and `make test` work on a fresh machine with Python 3.10 or later: they make a virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# uv installs several times faster; pip does where there is none (a shim on the path may be there and not work).
UV := $(shell $(BIN)/uv --version >/dev/null 2>&1 && echo $(BIN)/uv || { uv --version >/dev/null 2>&1 && echo uv; })
INSTALL := $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install)
# Tests run in one process a core; PARALLEL= runs them in one.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
CODE := vqad tests benchmarks docs examples

SITE := docs/_build/html

.PHONY: help demo test test-quick docs lint types format clean

help:
	@echo "make demo        learn real solar cells and write a page of heatmaps (a few minutes)"
	@echo "make test        run all tests; make test-quick leaves out the slow ones"
	@echo "make docs        run the examples and build the site in $(SITE); minutes on two CPU cores"
	@echo "make lint        check style; make format mends it; make types checks annotations"
	@echo "make clean       remove the environment and everything that was made"
	@echo "The environment is $(VENV): make test VENV=/some/folder takes another."

demo: $(VENV)/.installed-demo
	$(BIN)/vqad demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Warnings are errors; an example that fails is one. OPTIONS="-D plot_gallery=0" builds without running the examples.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -b html -q -W --keep-going $(OPTIONS) docs $(SITE)
	@echo "site: $(SITE)/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Installed in place, so that only a change of pyproject.toml asks for it again.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf docs/_build docs/generated docs/gallery docs/sg_execution_times.rst
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
