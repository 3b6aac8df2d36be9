# make demo: install and predict the paper's comparison.  make test: install and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint wheel-check benchmarks clean

demo: $(VENV)/installed
	$(BIN)/expert-router simulate examples/paper.yaml --out results/paper

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel as a user gets it: in an environment of its own, run outside the checkout.
wheel-check: $(VENV)/installed-dev
	sh tests/wheel_check.sh $(BIN)/python

benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.classifier

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
