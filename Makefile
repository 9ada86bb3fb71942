# `make help` lists the targets. Everything happens in .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
ECOSYSTEM := .venv-ecosystem

.DEFAULT_GOAL := help
.PHONY: help install demo clean duration test lint types tests slow test-ecosystem docs format lock

##@ To use Upright

help:  ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "%s%s\n", gap, substr($$0, 5); gap = "\n"} \
		/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make the environment in .venv (once)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Upright needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,wandb,dev]'
	@touch $@

demo: install  ## fit -> test -> export -> verify -> infer on real digits
	@$(BIN)/upright demo

clean:  ## remove the environments and the caches of the tools
	rm -rf .venv $(ECOSYSTEM) build .mypy_cache .pytest_cache .ruff_cache src/*.egg-info

##@ To contribute

test: duration lint types tests  ## before every commit: lint, types, tests (about 10 minutes on 2 cores)

duration:
	@echo "Lint, types and the default tests take about 10 minutes on 2 cores."

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy
	$(BIN)/mypy

tests: install  ## pytest, without the slow tests (about 8 minutes on 2 cores)
	$(BIN)/pytest -n 2 $(PYTEST_OPTIONS)

slow: install  ## pytest, the slow tests (an hour); .ci/run chooses a part of them
	$(BIN)/pytest -n 2 -m slow

test-ecosystem:  ## pytest with the index's torch, timm, albumentations, Ray, ... in an environment of its own (7 GB)
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,timm,ray]' \
		torchvision albumentations schedulefree 'moto[server]' pyspark pytest pytest-timeout pytest-xdist
	$(ECOSYSTEM)/bin/python -m pytest -m ecosystem tests/ecosystem tests/training/test_schedule_free.py

docs: install  ## build the documentation in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install  ## let ruff sort imports, fix what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

EXPORT := uv export --quiet --frozen --no-dev --no-emit-project --no-header --no-annotate

lock:  ## write uv.lock and container.txt from pyproject.toml, with the versions of constraints.txt (needs uv)
	uv lock $$(sed -n 's/^\([^#].*==.*\)/--upgrade-package \1/p' constraints.txt)
	{ echo '# Packages of the Containerfile with their hashes, from uv.lock. `make lock` writes this file.'; \
		$(EXPORT) --extra serve; $(EXPORT) --extra dev | sed -n '/^setuptools==/,/[^\\]$$/p'; } > container.txt
