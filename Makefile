# Each target works alone on a fresh clone: it makes .venv and installs into it what it needs.
# Needs Linux and Python >= 3.11 with pip and venv.  ARGS are handed on: make run ARGS="--port 8000"
#
# TORCH overrides what is installed for the model, e.g. make run TORCH="torch==2.13.0 --index-url URL". By default it
# is the index's torch where there is a GPU; elsewhere the CPU build, from the machine's own index if it has it, then
# from PyTorch's, and failing both whatever torch the index has.

ARGS ?=
QUIET := actors/test_inbox.py actors/test_lane.py actors/test_node.py actors/test_spin.py actors/test_supervisor.py \
	system/test_bad_clients.py system/test_death.py system/test_fuzz.py system/test_gpu_equality.py test_cli.py
comma := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
EXTRA := $(if $(GPU),[gpu],)
DEV_EXTRA := $(if $(GPU),[dev$(comma)gpu],[dev])
TORCH_VERSION := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help run test chaos steps fuzz soak lint types fmt perf size clean
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1 \t/p' Makefile

run: $(VENV)/installed ## serve the embedded chat model; ARGS="--model DIR --port 8000 ..."
	@$(BIN)/actorserve run $(ARGS)

# All cores at once, but for QUIET: servers, deaths and wake-ups, which want the machine alone.
test: $(VENV)/installed-dev ## the whole test suite; ARGS="tests/kvstore -q" for a part
	@if test -n "$(ARGS)"; then $(BIN)/python -m pytest $(ARGS); else \
		$(BIN)/python -m pytest -q -n auto --dist worksteal tests $(addprefix --ignore=tests/,$(QUIET)) && \
		$(BIN)/python -m pytest -q $(addprefix tests/,$(QUIET)); fi

chaos: $(VENV)/installed-dev ## actors die and are stopped under live streams, hundreds of times; ARGS="-k stub"
	@$(BIN)/python -m pytest -q -s --thorough tests/system/test_chaos.py tests/system/test_quarantine.py $(ARGS)

steps: $(VENV)/installed-dev ## two million random steps of the scheduler, its pages and its tree, each checked
	@$(BIN)/python -m pytest -q -s -n auto --thorough tests/actors/test_stub_world.py tests/actors/test_many_steps.py $(ARGS)

fuzz: $(VENV)/installed-dev ## ten thousand malformed requests, thousands of clients that leave, do not read, are too many
	@$(BIN)/python -m pytest -q -s --thorough tests/system/test_fuzz.py tests/system/test_bad_clients.py $(ARGS)

soak: $(VENV)/installed-dev ## half an hour of mixed load, and what grows meanwhile; ARGS="--minutes 600 --flags ''"
	@$(BIN)/python -m actorserve.perf.soak $(ARGS)

lint: types ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/installed-dev ## mypy --strict
	@mkdir -p .types && ln -sfn .. .types/actorserve
	@$(BIN)/mypy

fmt: $(VENV)/installed-dev ## format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

perf: $(VENV)/installed-dev ## a benchmark: make perf NAME=lanes
	@test -n "$(NAME)" || { echo "make perf NAME=...; there are:" $(filter-out __init__,$(basename $(notdir $(wildcard perf/*.py)))); exit 2; }
	@$(BIN)/python -m actorserve.perf.$(NAME) $(ARGS)

size: ## lines of code by folder and file
	@for folder in . actors http kvstore models sampler perf tests; do \
		files=$$(find $$folder $$([ $$folder = . ] && echo -maxdepth 1) -name '*.py' | sort); \
		test -z "$$files" || { printf '%7d  %s\n' $$(cat $$files | wc -l) $$folder; wc -l $$files | sed '/ total$$/d;s/^/        /'; }; done

clean: ## remove what make made; the cache folder with the model stays
	rm -rf $(VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------ the virtual environment

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "actorserve needs Python >= 3.11 with pip and venv (on Debian and Ubuntu: python3-venv); name it by make PYTHON=..." >&2; exit 2; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/torch: | $(VENV)/bin/python
	@echo "installing torch (once; a few minutes)"
ifneq ($(TORCH),)
	@$(PIP) $(TORCH)
else ifneq ($(GPU),)
	@$(PIP) --quiet torch
else
	@$(PIP) --quiet torch==$(TORCH_VERSION)+cpu 2>/dev/null \
		|| $(PIP) --quiet --retries 1 torch==$(TORCH_VERSION)+cpu --extra-index-url $(CPU_INDEX) 2>/dev/null \
		|| $(PIP) torch==$(TORCH_VERSION)
endif
	@touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/torch
	@echo "installing actorserve into $(VENV) (once)"
	@$(PIP) --quiet -e '.$(EXTRA)'
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/torch
	@echo "installing actorserve and the development tools into $(VENV) (once)"
	@$(PIP) --quiet -e '.$(DEV_EXTRA)'
	@touch $@ $(VENV)/installed
