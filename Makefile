# Each target does all its own set-up, and only what is not done yet.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST_ARGS ?=
FUZZ_ARGS ?=
MACHINES_ARGS ?=
DIST_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Use the active environment if it has torch >= 2.10, else our own; `make ACTIVE= ...` insists on our own.
ACTIVE := $(shell $(PYTHON) .ci/env.py active 2>/dev/null)
PY := $(or $(ACTIVE),.venv/bin/python)
BIN := $(dir $(PY))
# There is one stamp per set of requirements installed into that environment. Stamps don't count once the
# environment is a new one, or another checkout has been installed into it.
STAMPS := build/env/$(subst /,_,$(PY))
STALE := $(if $(wildcard $(PY)),$(if $(shell $(PY) .ci/env.py installed),,stale),stale)

STARTED := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-full machines fuzz sanitize dist bench docs site lint format clean stale
.SECONDARY:
.NOTPARALLEL:

help:
	@echo 'make demo       runs the demo: python -m examples.demo'
	@echo 'make test       runs the tests; PYTEST_ARGS="-k voxel" selects some, WORKERS=0 runs them in one process'
	@echo 'make test-full  runs all tests, the whole capability matrix and one more peer; takes an hour on two cores'
	@echo 'make machines   runs the demo on variants of this machine: instructions, threads, seeds, torch versions;'
	@echo '                MACHINES_ARGS="--verify --python PATH" also checks numbers, and adds another torch;'
	@echo '                MACHINES_ARGS="--tests=-n2" runs the tests instead of the demo'
	@echo 'make fuzz       compares random calls of every op with its reference; FUZZ_ARGS="--seconds 600 --op relu"'
	@echo 'make sanitize   runs the C++ kernels under address, undefined-behaviour and thread sanitizers'
	@echo 'make dist       builds sdist and manylinux_2_28 wheel in dist/, audits the wheel and tests it beside torch alone;'
	@echo '                DIST_ARGS="--python PATH" tests it beside another torch too, and writes docs/compatibility.md'
	@echo 'make bench      times every op beside its peers, at small sizes'
	@echo 'make site       builds the documentation as HTML: build/site/index.html'
	@echo 'make docs       writes the generated parts of README.md and of docs/ (runs the whole matrix)'
	@echo 'make lint       runs ruff, mypy and clang-format;  make format  applies them'
	@echo 'make build      compiles the C++ kernels, in place'
	@echo 'make clean      removes what these made, .venv included'
	@echo
	@echo 'Environment: the active one if it has torch >= 2.10, else .venv, made here with $(TORCH).'
	@echo 'Variables: PYTHON=$(PYTHON) (>= 3.10, makes .venv), TORCH=$(TORCH), ACTIVE= (use .venv regardless)'

demo: $(STAMPS)/tools build
	@echo "Set-up: the environment and the C++ kernels took $$(($$(date +%s) - $(STARTED))) s"
	$(PY) -m examples.demo

bench: $(STAMPS)/tools build
	$(PY) -m benchmarks --quick

docs: $(STAMPS)/test build
	$(PY) docs/update_readme.py

site: $(STAMPS)/docs build
	rm -rf build/site
	$(PY) -m sphinx -q -E -W --keep-going docs build/site
	@echo 'the site: build/site/index.html'

test: $(STAMPS)/test build
	$(PY) tests/peers.py
	$(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

fuzz: $(STAMPS)/test build
	$(PY) tests/fuzz.py $(FUZZ_ARGS)

sanitize: $(STAMPS)/test
	$(PY) tests/sanitize/run.py address
	$(PY) tests/sanitize/run.py thread

dist: $(STAMPS)/dist
	$(PY) .ci/dist.py $(DIST_ARGS)

test-full: $(STAMPS)/test $(STAMPS)/docs $(STAMPS)/peers build
	$(PY) tests/peers.py --compile
	$(PY) -m pytest --full -n $(WORKERS) $(PYTEST_ARGS)

machines: $(STAMPS)/tools build
	$(PY) tests/machines.py $(MACHINES_ARGS)

lint: $(STAMPS)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)clang-format --dry-run -Werror csrc/*.cpp csrc/*.h

format: $(STAMPS)/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i csrc/*.cpp csrc/*.h

# ninja decides which files to compile.
build: | $(STAMPS)/env
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf .venv build dist out docs/generated *.egg-info custom_ops/_C.abi3.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed before anything that depends on it, and nothing is built in isolation, or pip
# would fetch a torch of its own choice.
$(STAMPS)/env: $(if $(STALE),stale)
ifeq ($(ACTIVE),)
	@$(PYTHON) .ci/env.py supported
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(TORCH)
endif
	$(PY) -m pip install -q "setuptools>=77" ninja
	@mkdir -p $(@D) && touch $@

# Installs the package in editable form, with the extra that the stamp is named after.
$(STAMPS)/%: $(STAMPS)/env pyproject.toml setup.py
	$(PY) -m pip install -q --no-build-isolation -e '.[$*]'
	@touch $@

stale:
