# make run and make test do all the set-up on a fresh machine with Python 3.11+, pip and a C/C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := inferflux-core inferflux-auth-oidc inferflux-backend-llamacpp inferflux-backend-torch
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard inferflux-backend-torch/setup.py inferflux-backend-torch/src/*/native/*.c)
SOURCES := $(PACKAGES:%=%/src) tests tools examples

.PHONY: help run test lint format typecheck bench docs clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(INSTALLED)  ## Serve the demo model on http://127.0.0.1:8080
	$(BIN)/inferflux serve $(ARGS)

test: $(INSTALLED)  ## Run the test suite in two processes; with ARGS="-k name" a part of it in one
	$(BIN)/python -m pytest $(or $(ARGS),--numprocesses=2 --dist=worksteal)

lint: $(INSTALLED)  ## Check style and that the generated documentation is current
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python tools/generate_docs.py --check

format: $(INSTALLED)  ## Format all code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

typecheck: $(INSTALLED)  ## mypy --strict over all packages
	$(BIN)/mypy $(PACKAGES:%=%/src)

bench: $(INSTALLED)  ## Measure a running server, e.g. ARGS="--url http://127.0.0.1:8080 -c 16"
	$(BIN)/inferflux bench $(ARGS)

docs: $(INSTALLED)  ## Write the generated reference pages
	$(BIN)/python tools/generate_docs.py

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): constraints-dev.txt requirements-dev.txt $(PACKAGES:%=%/pyproject.toml) $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing. The first time llama-cpp-python compiles for about five minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -r requirements-dev.txt \
		-e './inferflux-core[demo,redis]' -e ./inferflux-auth-oidc -e ./inferflux-backend-llamacpp -e './inferflux-backend-torch[transformers]'
	@touch $@
