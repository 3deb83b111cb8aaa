# LLM OS. `make demo` shows it, `make test` tests it, `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXAMPLE := examples/clinic-and-bank
# For example: make demo DATA="--data bank-intents=train.csv"
DATA   ?=
SEED   ?= 1
MODELS := smollm2-135m-instruct minilm-l6

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check chaos format bench bench-engine lock clean models

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.demo models ## boot the kernel, launch three agents, ask them real questions
	@$(BIN)/llmos run $(EXAMPLE)/system.toml --questions $(EXAMPLE)/questions.toml $(DATA)

# What starts a Ray runs by itself: two at a time would take each other's processors.
test: $(VENV)/.dev models ## all tests (real Ray, real models)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not cluster and not chaos"
	@$(BIN)/python -m pytest -m "cluster and not chaos"

test-fast: $(VENV)/.dev ## only what needs neither Ray nor models
	@$(BIN)/python -m pytest -m "not cluster and not models and not slow"

check: $(VENV)/.dev ## linters, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p llmos
	@$(BIN)/lint-imports

chaos: $(VENV)/.dev ## lost nodes and heads; 200 random kills on SQLite and on PostgreSQL; SEED=n
	@$(BIN)/python -m pytest -m chaos
	@$(BIN)/python -m tests.chaos --kills 200 --seed $(SEED) --store sqlite
	@$(BIN)/python -m tests.chaos --kills 200 --seed $(SEED) --store postgres

format: $(VENV)/.dev ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev models ## benchmarks/throughput.py: agents against plain transformers
	@$(BIN)/python -m benchmarks.throughput

bench-engine: $(VENV)/.dev models ## benchmarks/engine.py: the engines against the library's own ways
	@$(BIN)/python -m benchmarks.engine

models: $(VENV)/.demo ## have the demo's models in the model store
	@$(BIN)/llmos models pull $(MODELS) >/dev/null

lock: ## write requirements.lock anew from a fresh environment
	@sh scripts/lock.sh $(PYTHON)

clean: ## remove the environment and caches (the model store stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: LLM OS needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "       Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv. On Debian: apt-get install python3-venv"; exit 1; }
	@echo "Making the environment in $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# -e: the demo shows the code in this folder. The lock file constrains what is chosen.
$(VENV)/.demo: $(VENV)/.python pyproject.toml requirements.lock
	@echo "Installing the locked dependencies (torch is the large one) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml requirements.lock
	@echo "Installing the tools for tests and checks …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
