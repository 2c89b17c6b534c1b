# make demo    fine-tune a real language model on real data, in under 15 minutes on two cores
# make test    the test suite
# make lint    ruff (style and format) and mypy (types)
# make foreign  models of other libraries, in an environment with transformers 4, tunix and others
# make aot     compile for TPUs and GPUs that are not there
# make parity  against transformers and PEFT, in an environment with torch
# make bench   our training step and PEFT's in alternation, for a machine with nothing else to do
# make bench-qlora  our QLoRA step, our LoRA step and google-tunix with qwix, likewise
# make bench-demo  what the demo learnt, and what PEFT learns from the same rows; its answers merged
# make bench-bank  rows on 16 adapters of a bank against one adapter, and switching

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARITY := .venv-parity
FOREIGN := .venv-foreign
AOT := .venv-aot

.NOTPARALLEL:
.PHONY: demo test lint foreign aot parity bench bench-qlora bench-demo bench-bank format clean

# METHOD=qlora trains the same on a base of 4 bits, in runs/demo-qlora.
METHOD ?= lora
DEMO := runs/demo$(patsubst %,-%,$(filter-out lora,$(METHOD)))

demo: $(VENV)/installed
	$(BIN)/jlora fetch smollm2 --to models/smollm2
	$(BIN)/jlora fetch sentiment --to data/sentiment
	$(BIN)/jlora train --config examples/sentiment.toml --method $(METHOD) --output $(DEMO) \
		--resume auto

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

foreign: $(FOREIGN)/installed build/flax-examples
	$(FOREIGN)/bin/python -m pytest -n auto tests/foreign

# Flax's examples are in its source distribution alone.
build/flax-examples: $(FOREIGN)/installed
	rm -rf build/flax-sdist $@
	$(FOREIGN)/bin/python -m pip download --quiet --no-deps --no-binary flax flax==0.12.8 \
		--dest build/flax-sdist
	mkdir -p $@
	tar xzf build/flax-sdist/flax-0.12.8.tar.gz -C $@ --strip-components=2 flax-0.12.8/examples
	touch $@

aot: $(AOT)/installed
	$(AOT)/bin/python -m pytest tests/aot

# Nothing is skipped where something is missing: the model and the data are fetched first, and what
# `make foreign` writes is written.
parity: $(PARITY)/installed $(if $(wildcard build/foreign/names.json),,foreign)
	$(PARITY)/bin/jlora fetch smollm2 --to models/smollm2
	$(PARITY)/bin/jlora fetch smollm2-gguf --to models/smollm2-gguf
	$(PARITY)/bin/jlora fetch sentiment --to data/sentiment
	$(PARITY)/bin/python -m pytest -n auto --dist loadgroup tests/parity

bench: $(VENV)/installed $(PARITY)/installed
	$(BIN)/python benchmarks/step_vs.py --peft-python $(PARITY)/bin/python

bench-qlora: $(VENV)/installed $(FOREIGN)/installed
	$(BIN)/python benchmarks/step_vs.py --sides qlora lora tunix-nf4 \
		--tunix-python $(FOREIGN)/bin/python --rounds 3 --steps 3

# What `make demo` made, against PEFT on the same rows in the same order.
bench-demo: demo $(PARITY)/installed
	$(PARITY)/bin/python benchmarks/demo_vs_peft.py --run $(DEMO)
	$(if $(filter lora,$(METHOD)),$(PARITY)/bin/python benchmarks/demo_merged.py --run $(DEMO))

bench-bank: $(VENV)/installed
	$(BIN)/python benchmarks/bank.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(PARITY) $(FOREIGN) $(AOT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

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

# The last transformers with Flax models is older than what jlora asks for; only its tokenizers are
# used, and not here.
$(FOREIGN)/installed: pyproject.toml
	$(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install --quiet transformers==4.57.6 google-tunix==0.1.7 \
		"jax>=0.10.2" "flax>=0.12.6" "optax>=0.2.8" "orbax-checkpoint>=0.11.34" \
		"pydantic>=2.10" "tomli-w>=1.1" "tyro>=1.0" "pytest>=8.0" "pytest-xdist>=3.6" h5py
	$(FOREIGN)/bin/python -m pip install --quiet --no-deps flaxmodels==0.1.3
	$(FOREIGN)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# With these compilers installed JAX looks for TPUs and GPUs at every start, so they stay apart.
$(AOT)/installed: pyproject.toml
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet --editable ".[aot]"
	touch $@
