# Every target sets up what it needs: `make demo` or `make test` on a fresh clone is enough.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PLATFORM := $(shell uname -s)

# The first Python that is new enough and can make a virtual environment.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; break; fi; done)

# mlx's Linux wheel brings no backend of its own; a Mac's wheel brings Metal.
ifeq ($(PLATFORM),Linux)
EXTRAS ?= cpu,hf,dev
else
EXTRAS ?= hf,dev
endif

# One thread a worker: workers that each start a thread a core run slower than one after the other. Three of them on two
# cores: tests wait a fifth of their time, for processes of their own and for disks.
JOBS ?= 3
# A file is one worker's, for what its tests share, and the short files come last, so that no worker waits long.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
MODEL ?=

.PHONY: help demo test check compat bench docs format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## fine-tune SmolLM2-135M with LoRA on real rows, plot, answer, verify in PEFT (MODEL=hub/id)
	$(BIN)/python examples/demo.py $(MODEL)

test: $(VENV)/.installed  ## everything but the wide comparisons
	$(PYTEST) -m "not wide" compat_tests tests

compat: $(VENV)/.installed  ## the comparisons with transformers, trl, peft and mlx-lm, the wide ones included
	$(PYTEST) compat_tests

check: $(VENV)/.installed  ## format, lint, types and layers, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed  ## side by side with mlx-lm and TRL: prints ratios, keeps figures and a chart in bench-output
	$(BIN)/python benchmarks/sft_step.py --json bench-output/sft_step.json --chart bench-output/sft_step.png

docs: $(VENV)/.docs  ## build the pages into docs/_build
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo "docs/_build/index.html"

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist docs/_build demo-output bench-output *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.system
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# OpenBLAS for fast matrix products, and the C++ compiler that mx.compile calls on the Linux CPU.
# Never an error: where they cannot be installed the line says what to do, and the rest goes on.
$(VENV)/.system: $(BIN)/python
ifeq ($(PLATFORM),Linux)
	@missing=""; \
	$(BIN)/python -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null || missing="libopenblas0-pthread"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	  then echo "installed $$missing"; \
	  else echo "MLX on the Linux CPU wants these (matrix products are 145x slower without): apt-get install $$missing"; \
	  fi; \
	fi
endif
	@touch $@

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Python 3.11 or newer with its venv module is needed: apt-get install python3 python3-venv, or brew install python"; \
	  exit 1; \
	fi
	$(PYTHON) -m venv $(VENV)
