# Everything works on a fresh clone with Python 3.11 (or later) and make.
# `make TARGET PYTHON=python3` uses an interpreter of yours as it is and installs nothing.

BASE_PYTHON ?= python3
BASE ?= main
WORKERS ?= 2
VENV := .venv
PYTHON := $(VENV)/bin/python
TYPED = .typing/fxpress tests tools $(wildcard benchmarks)

# With the root on sys.path our `kernels/` would shadow the package that transformers imports.
export PYTHONSAFEPATH := 1

ifeq ($(origin PYTHON),command line)
export PYTHONPATH := $(CURDIR)/.typing
DEMO_READY := tree
DEV_READY := tree
else
# Ten processes of `make test` import torch and transformers: 10 s each, 4 s once it is compiled.
unexport PYTHONDONTWRITEBYTECODE
DEMO_READY := $(VENV)/.demo-ready
DEV_READY := $(VENV)/.dev-ready
endif

PYTEST = $(PYTHON) -m pytest
OR_NONE = || [ $$? -eq 5 ]  # pytest's status for a group without tests

.DELETE_ON_ERROR:
.PHONY: help demo test check format types tree gpu replay
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_READY) ## optimize a pretrained model on real text, on CPU; leaves demo/report.html
	$(PYTHON) -m fxpress.zoo.demo

# What times something runs with nothing beside it. Triton's interpreter has to be chosen before
# Triton is imported: a process of its own. Large models take up to 5 GB a worker (WORKERS=1 helps).
test: $(DEV_READY) ## run the tests that need no GPU
	$(PYTEST) -n $(WORKERS) -m "not gpu and not timing and not pretrained"
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) tests/kernels_interpreter $(OR_NONE)
	$(PYTEST) -n $(WORKERS) -m "pretrained and not gpu" $(OR_NONE)
	$(PYTEST) -m "timing and not gpu" $(OR_NONE)

check: $(DEV_READY) types ## check format, lint, types and documentation
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) tools/check_docs.py

format: $(DEV_READY) ## format, and mend what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

types: $(DEV_READY) tree ## check types
	$(PYTHON) -m mypy $(TYPED)

tree:
	$(PYTHON) tools/typing_tree.py

gpu: $(DEV_READY) ## run the GPU tests and the benchmarks (COMMIT=id without git, LIMIT=seconds)
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: no CUDA device")'
	$(PYTEST) -m gpu tests/gpu
	$(PYTHON) benchmarks/run.py $(if $(COMMIT),--commit $(COMMIT)) $(if $(LIMIT),--seconds $(LIMIT))

replay: $(DEV_READY) tree ## show how graphs and kernels of the zoo differ from those at BASE=main
	PYTHONPATH=.typing:tools $(PYTHON) tools/replay.py $(BASE)

# The virtual environment

$(PYTHON):
	@$(BASE_PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fxpress needs Python 3.11+")'
	$(BASE_PYTHON) -m venv $(VENV)

# setuptools first, since the build runs without isolation; torch first, so that the pinned version
# and no other is resolved.
define install
	$(PYTHON) -m pip install --quiet --no-compile --constraint constraints.txt setuptools wheel torch
	$(PYTHON) -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[$(1)]'
	touch $@
endef

$(VENV)/.demo-ready: pyproject.toml constraints.txt | $(PYTHON)
	$(call install,cli$(comma)report$(comma)zoo$(comma)hf)

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(PYTHON)
	$(call install,test$(comma)check)

comma := ,
