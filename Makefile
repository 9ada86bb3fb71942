# `make help` lists the targets. Everything happens in .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo docs test lint types tests slow format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make the environment in .venv (once)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Upright needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,wandb,dev]'
	@touch $@

demo: install  ## fit -> test -> export -> verify -> infer on real digits
	@$(BIN)/upright demo

test: lint types tests  ## before every commit: lint, types, tests (about 10 minutes on 2 cores)

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy
	$(BIN)/mypy

tests: install  ## pytest, without the slow tests (about 8 minutes on 2 cores)
	$(BIN)/pytest -n 2 $(PYTEST_OPTIONS)

slow: install  ## pytest, the slow tests (an hour); .ci/run chooses a part of them
	$(BIN)/pytest -n 2 -m slow

docs: install  ## build the documentation in site/; a warning is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

format: install  ## let ruff sort imports, fix what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and what tools cached
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
