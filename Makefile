# `make serve` and `make test` need Python 3.11 or newer, make and a C compiler; `make install` runs by itself when needed.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
# Passed on: to the server (make serve ARGS='--model DIR'), pytest, the benchmark or docker build.
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test test-slow test-gpu lint format bench bench-gpu bench-scaling bench-startup bench-training image constraints clean

help: ## what each target does
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP) ## create .venv with everything in it

$(STAMP): pyproject.toml constraints.txt $(wildcard model/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quill needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

serve: install ## serve the bundled checkpoint; prints a curl line when it is ready
	@exec $(PY) -m server --host $(HOST) --port $(PORT) $(ARGS)

test: install ## the test suite
	$(PY) -m pytest $(ARGS)

test-slow: install ## the tests that take minutes
	$(PY) -m pytest -m 'slow and not gpu' $(ARGS)

test-gpu: install ## the tests that need a CUDA device
	$(PY) -m pytest -n 0 -m gpu $(ARGS)

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy model server training

format: install ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install ## Quill beside its peers, on this machine
	$(PY) -m benchmarks $(ARGS)

bench-gpu: install ## everything about CUDA in ten minutes: is it right, how fast, which goals are met
	$(PY) -m benchmarks.gpu $(ARGS)

bench-scaling: install ## a step's time against batch, context and queue, as tables and a plot
	$(PY) -m benchmarks.scaling $(ARGS)

bench-startup: install ## time to /ready and memory, beside bare import torch
	$(PY) -m benchmarks.startup $(ARGS)

bench-training: install ## the trainer's tables; beside nanoGPT with NANOGPT=DIR, your clone of it
	$(PY) -m benchmarks.training all $(if $(NANOGPT),--nanogpt '$(NANOGPT)') $(ARGS)

image: ## build the container image
	docker build -t quill $(ARGS) .

constraints: install ## pin what is installed now
	{ sed '/^[^#]/d' constraints.txt; $(PY) -m pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove caches and build outputs, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find model server training tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
