# make demo     the main job, on the embedded model
# make test     every check that runs in minutes: style, types, layers, tests, README code blocks, examples
# make test-slow     all tests, the slow ones too, with the shapes in all signatures checked at each call
# make bench-peers   other quantisers beside this one, hours: an environment for each in .venv-peers, tables in out/peers
#
# They make a virtual environment in .venv where there is none, and install what is missing.
#
#   PYTHON=python3.12      the interpreter that makes the environment (3.11 or newer)
#   TORCH="torch==2.13.0"  what pip is asked for where .venv has no torch yet
#   TORCH_INDEX=URL        where pip looks for that torch, for example the CPU or CUDA address that PyTorch's page gives

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.bitmend-installed
INSTALLED_DEV := $(VENV)/.bitmend-installed-dev

# Two test processes of one thread each: the models are so small that more threads only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# Shapes in signatures are checked at each call where the mathematics is tested. In whole runs that takes more than twice the
# time of everything else, so that only `make test-slow` does it there.
SHAPES := --jaxtyping-packages=bitmend,beartype.beartype
MATHEMATICS := tests/numerics tests/linalg tests/packing tests/runtime tests/solvers tests/testing/laws tests/testing/reference

comma := ,

# The torch that is in the environment, to the letter (a CPU build says 2.13.0+cpu), so that no dependency replaces it.
PIN_TORCH := import importlib.metadata as m; print("torch==" + m.version("torch"))

.PHONY: help demo test test-slow bench-peers format clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	$(BIN)/bitmend demo

# The tests come last, so that their closing line is the last thing shown.
test: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) $(SHAPES) -m "not slow" $(MATHEMATICS)
	$(PYTEST) -m "not slow" $(addprefix --ignore=,$(MATHEMATICS))

test-slow: $(INSTALLED_DEV)
	$(PYTEST) $(SHAPES)

# A peer that cannot be installed is told there, and again as a row of the table; the others run all the same.
bench-peers: $(INSTALLED)
	-$(BIN)/python benchmarks/peers/environments.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers/bench_peers.py --output out/peers

format: $(INSTALLED_DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bitmend needs Python 3.11 or newer, but PYTHON is $(PYTHON); name another with PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: one that is already there is kept; otherwise pip takes a CPU build where one lies ready, and
# its index's default build elsewhere. The constraint then keeps that torch while everything else is installed.
define install
$(BIN)/python -c '$(PIN_TORCH)' >/dev/null 2>&1 || \
  $(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
$(BIN)/python -c '$(PIN_TORCH)' > $(VENV)/torch-constraint.txt
$(BIN)/python -m pip install --constraint $(VENV)/torch-constraint.txt --editable $(1)
touch $@
endef

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(call install,.)

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	$(call install,'.[dev$(comma)export]')
	touch $(INSTALLED)

# Keeps the environment, because torch is large: delete $(VENV) by hand to begin anew.
clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build out
	rm -f $(INSTALLED) $(INSTALLED_DEV) $(VENV)/torch-constraint.txt
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
