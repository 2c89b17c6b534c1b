# make demo    fine-tune a real language model on real data, in under 15 minutes on two cores
# make test    the test suite
# make lint    ruff (style and format) and mypy (types)
# make parity  against transformers and PEFT, in an environment with torch
# make bench   our training step and PEFT's in alternation, for a machine with nothing else to do
# make bench-demo  what the demo learnt, and what PEFT learns from the same rows

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARITY := .venv-parity

.NOTPARALLEL:
.PHONY: demo test lint parity bench bench-demo format clean

demo: $(VENV)/installed
	$(BIN)/jlora fetch smollm2 --to models/smollm2
	$(BIN)/jlora fetch sentiment --to data/sentiment
	$(BIN)/jlora train --config examples/sentiment.toml $(if $(wildcard runs/demo/config.toml),--resume)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Nothing is skipped where something is missing: the model and the data are fetched first.
parity: $(PARITY)/installed
	$(PARITY)/bin/jlora fetch smollm2 --to models/smollm2
	$(PARITY)/bin/jlora fetch smollm2-gguf --to models/smollm2-gguf
	$(PARITY)/bin/jlora fetch sentiment --to data/sentiment
	$(PARITY)/bin/python -m pytest tests/parity

bench: $(VENV)/installed $(PARITY)/installed
	$(BIN)/python benchmarks/step_vs_peft.py --peft-python $(PARITY)/bin/python

# What `make demo` made, against PEFT on the same rows in the same order.
bench-demo: demo $(PARITY)/installed
	$(PARITY)/bin/python benchmarks/demo_vs_peft.py --run runs/demo

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(PARITY) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps are touched last, so that an install that failed is tried again.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

# PyPI's torch for Linux brings gigabytes of CUDA along; to spare them, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(PARITY)/installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --editable ".[test,parity]"
	touch $@
