# The commands of the project; `make help` lists them.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
SHARED ?= ../shared
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help serve test faults lint accuracy bench gpu-check clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

serve: .venv/serve ## Serve the embedded model on http://HOST:PORT
	$(BIN)/mixer-serve --host $(HOST) --port $(PORT)

test: .venv/test lint ## Check style and types, run the tests with branch coverage
	$(BIN)/pytest --cov --cov-report=term

faults: .venv/test ## Prove every promise under load, faults and attack, with its figure; 15 minutes
	$(BIN)/python -m tests.faults

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

accuracy: .venv/test ## Measure the embedded model on CIFAR-10's test images, through the serving pipeline
	$(BIN)/mixer-export evaluate app/models/mixer-cifar10.onnx $(SHARED)/data/cifar10.tar.xz

bench: .venv/test ## Compare speed with peers and with the bare work (BENCH=--quick for a trial)
	$(BIN)/python -m tests.benchmarks --photos $(SHARED)/data/photos.tar $(BENCH)

gpu-check: .venv-gpu/installed ## Prove the CUDA path on this machine's GPU (MODEL=file.onnx for one of your own)
	@$(if $(MODEL),MIXER_GPU_MODEL="$$(realpath "$(MODEL)")") .venv-gpu/bin/python -m pytest -m gpu tests/gpu; \
		code=$$?; [ $$code != 77 ] || echo "gpu-check: no GPU here, exit code 77 (make's own is 2)" >&2; exit $$code

clean: ## Remove the virtual environment and all caches
	rm -rf .venv .venv-gpu .bench .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Mixer Serve needs Python 3.11 or newer: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/serve: .venv/python pyproject.toml
	$(PIP) install --editable '.[cpu,client]'
	@touch $@

# An environment of its own: the two onnxruntime packages would overwrite each other.
.venv-gpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable '.[gpu]' 'httpx2>=2.0' 'pytest>=9.0'
	@touch $@

# torch comes from a local wheel where there is one; the constraint keeps its release the same.
.venv/test: .venv/python pyproject.toml constraints.txt
	$(PIP) install --editable '.[cpu,export,dev]' --constraint constraints.txt
	@touch $@ .venv/serve

# What the images install, with hashes, for every Python and machine that the project allows.
UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' $(LOCK_FLAGS)
# Which images image-test builds: the gpu one holds 2.7 GB and takes 5 minutes.
IMAGES ?= cpu gpu

.PHONY: lock image-test fleet-test

lock: .venv/python ## Renew docker/*.lock from pyproject.toml (LOCK_FLAGS=--upgrade for newer releases)
	$(PIP) install --quiet 'uv>=0.9'
	$(UV_COMPILE) pyproject.toml --extra cpu --output-file docker/cpu.lock
	$(UV_COMPILE) pyproject.toml --extra gpu --output-file docker/gpu.lock
	printf 'hatchling\npip\n' | $(UV_COMPILE) - --output-file docker/build.lock

image-test: .venv/test ## Build the images on a fresh Debian and run them (root, buildah, debootstrap)
	IMAGE_TEST="$(IMAGES)" $(BIN)/pytest -s tests/docker/test_image.py

fleet-test: .venv/test ## Three replicas behind nginx and haproxy: restart, kill, stop, overload them
	FLEET_TEST=1 $(BIN)/pytest -s tests/fleet
