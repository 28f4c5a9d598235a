# Everything here sets itself up: a virtual environment in .venv, pinned packages, the extension.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py pyproject.toml
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" cmake

.PHONY: all demo test test-cpp test-python test-sanitize lint bench bench-minilm clean

all: .venv/built

.venv/packages: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/built: .venv/packages $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	touch $@

demo: .venv/built
	$(BIN)/python examples/digits.py

test: lint test-cpp test-python

lint: .venv/packages
	$(BIN)/ruff check .

test-cpp: .venv/packages
	$(CMAKE) -S . -B build/tests -GNinja -DTALLCODEC_PYTHON=OFF -DTALLCODEC_TESTS=ON
	$(CMAKE) --build build/tests
	build/tests/test_kernels

test-python: .venv/built
	$(BIN)/python -m pytest
