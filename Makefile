# Two commands are all one needs; each sets everything up in .venv first, and only once:
#
#   make quickstart    train a small model on real text, and see what its experts learnt
#   make test          style, types and tests; `make test-all` adds the long proofs
#
# PYTHON=python3.12    another Python, 3.11 or newer
# ARGS="..."           further settings of the quickstart: make quickstart ARGS="training.tokens=100_000"
# TORCH="..."          another build of PyTorch. `torch==2.13.0` is the build that pip finds first: on
#                      Linux the CUDA build, unless pip is set up to find a CPU build too. With a GPU
#                      and such a pip, this takes the CUDA build all the same:
#                          make quickstart TORCH="torch===2.13.0"
#                      and this insists on a CPU build:
#                          make quickstart TORCH="torch==2.13.0+cpu"
# WORKERS=2            processes that run the tests

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
ARGS ?=

# Set up again when what is installed has changed, and not when only a file's date has.
KEY := $(shell { cat setup.py constraints.txt; echo '$(TORCH)'; } | cksum | cut -d ' ' -f 1)
READY := .venv/.ready-$(KEY)
PIP := .venv/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input

.PHONY: help setup quickstart test test-all lint types clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(READY)

quickstart: $(READY)
	.venv/bin/python -m train.pretrain --config configs/quickstart.yaml $(ARGS)

test: lint types
	.venv/bin/python -m pytest -m "not slow" -n $(WORKERS)

test-all: lint types
	.venv/bin/python -m pytest -n $(WORKERS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(READY)
	.venv/bin/mypy moe kernels train

# What was downloaded (data/) and trained (runs/) stays.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find kernels moe train tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Tests reach no network, and the worker processes share the cores.
test test-all: export HF_HUB_OFFLINE = 1
test test-all: export OMP_NUM_THREADS = 1
test test-all: export TOKENIZERS_PARALLELISM = false

# PyTorch comes first and by itself, so that nothing else chooses its build. DeepSpeed has no wheel:
# it is packed here without compiling (DS_BUILD_OPS=0), with the tools already in .venv, because a
# build environment of its own could bring a second PyTorch.
$(READY):
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "make: there is no $(PYTHON); install Python 3.11 or newer, or: make PYTHON=/path/to/python3" >&2; \
	    exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed; with another one: make PYTHON=python3.12" >&2; \
	    exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	    exit 2; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	    echo "Making a virtual environment in .venv"; "$(PYTHON)" -m venv --clear .venv; }
	@echo "Installing PyTorch ($(TORCH))"
	@$(PIP) install --no-compile -c constraints.txt setuptools wheel "$(TORCH)"
	@echo "Installing the other dependencies (a minute or two)"
	@DS_BUILD_OPS=0 $(PIP) install --no-compile -c constraints.txt --use-pep517 --no-build-isolation \
	    --editable '.[test]'
	@rm -f .venv/.ready-* && touch $@
