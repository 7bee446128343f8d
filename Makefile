# Needs only Python >= 3.11 and make. Everything is installed into .venv.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
SCRIPTS := Scripts
else
PYTHON ?= python3
SCRIPTS := bin
endif
VENV ?= .venv
BIN := $(VENV)/$(SCRIPTS)
ARGS ?=

.PHONY: setup demo play test lint bench docs package clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "drivesim needs Python 3.11 or newer; set PYTHON=python3.11 (or newer)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/drivesim demo $(ARGS)

# Drive in the packaged world model, in the browser.
play: setup
	$(BIN)/drivesim play $(ARGS)

# A process for each core: most tests use one. Files stay whole, for what their tests share.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measures drivesim and its peers on this machine, and updates the machine's table in docs/speed.md.
bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.bench $(ARGS)

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

# The documentation as a site, in site/; a dead link fails.
docs: $(VENV)/installed-docs
	$(BIN)/zensical build --clean --strict

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# A wheel, in a clean environment, outside the checkout: help, then synth -> train -> roll out.
package: setup
	rm -rf build dist
	$(BIN)/python -m build --wheel
	sh tests/wheel_smoke.sh $(PYTHON) dist/*.whl constraints.txt

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache
