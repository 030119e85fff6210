# Needs make and Python >= 3.10. Everything else goes into .venv, and the package that runs there is the built wheel.

PYTHON ?= python3
DEMO   ?= demo

VENV     := .venv
BIN      := $(VENV)/bin
ROOMS    := samplers guidance metrics scripts
WHEELS   := build/wheels
SOURCES  := pyproject.toml README.md LICENSE $(shell find $(ROOMS) -name __pycache__ -prune -o -type f -print)
PIP      := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL  := $(PIP) install --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test check format clean help

help:
	@echo "make demo    a picture grid from a bundled model, in $(DEMO)/"
	@echo "make test    the checks and the tests"
	@echo "make check   the checks alone: ruff and mypy"
	@echo "make format  rewrites the sources as the checks want them"
	@echo "make clean   removes what the others made"

demo: $(VENV)/installed
	$(BIN)/fewstep generate --model digits-small --steps 5 --number 50 --output $(DEMO)
	@echo "The pictures are in $(DEMO)/grid.png"

test: check
	$(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(ROOMS:%=--package fewstep.%)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build $(DEMO) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(ROOMS) tests -name __pycache__ -prune -exec rm -rf {} +

# The environment lasts until the requirements change.
$(VENV)/created: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than Python 3.10: name another one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) build setuptools
	@touch $@

# The package is built and installed again whenever one of its files changes. build/ goes first: setuptools would
# pack a module that has been deleted since.
$(VENV)/installed: $(VENV)/created $(SOURCES)
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation --outdir $(WHEELS) . > /dev/null
	$(PIP) uninstall --yes fewstep
	$(INSTALL) "$$(echo $(WHEELS)/fewstep-*.whl)[dev]"
	@touch $@
