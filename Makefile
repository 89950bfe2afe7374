# The commands of the project; `make help` lists them.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
SHARED ?= ../shared
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help serve test faults lint accuracy clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

serve: .venv/serve ## Serve the embedded model on http://HOST:PORT
	$(BIN)/mixer-serve --host $(HOST) --port $(PORT)

test: .venv/test lint ## Check style and types, run the tests with branch coverage
	$(BIN)/pytest --cov --cov-report=term

faults: .venv/test ## Prove every promise under load, faults and attack, with its figure; 15 minutes
	$(BIN)/pytest tests/faults -m 'slow or not slow' --durations=0 --durations-min=5

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

accuracy: .venv/test ## Measure the embedded model on CIFAR-10's test images, through the serving pipeline
	$(BIN)/mixer-export evaluate app/models/mixer-cifar10.onnx $(SHARED)/data/cifar10.tar.xz

clean: ## Remove the virtual environment and all caches
	rm -rf .venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Mixer Serve needs Python 3.11 or newer: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/serve: .venv/python pyproject.toml
	$(PIP) install --editable '.[cpu]'
	@touch $@

# torch comes from a local wheel where there is one; the constraint keeps its release the same.
.venv/test: .venv/python pyproject.toml constraints.txt
	$(PIP) install --editable '.[cpu,export,dev]' --constraint constraints.txt
	@touch $@ .venv/serve
