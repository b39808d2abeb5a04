# make demo: set up everything and run the main job on real data.   make test: set up everything and pass the tests.
# make quick: the tests that together take under two minutes.   make lint, make types: what else a change must pass.
# make long: the tests that take minutes each, such as whole suites by several processes; before an issue is resolved.
# The tests run in two processes; make test WORKERS=8 where there are more cores, WORKERS=0 for one process.
# make mutations: one-line errors, each of which a test must catch; before a release. PART=smc for some of them.
# make wheel: the source archive and the wheel into dist/.
# make docs: the documentation site into site/, without a network; a warning is an error.
# make notebooks: runs those of docs/notebooks and stores their outputs in them; after their code has changed.
# make test COVERAGE=--cov also reports which lines ran; before Python 3.12 that takes about 40 % longer.
# make setup CPU=1: PyTorch's builds for CPUs, without CUDA's libraries, by uv; docs/install.md says more.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2
CPU ?= $(wildcard .venv/requirements-cpu.txt)
CUDA_ONLY := ^(nvidia-|cuda-|triton=|jvp_flash_attention=)

.PHONY: setup packages demo test quick long mutations lint types docs notebooks wheel format clean

setup: .venv/.installed
	@test -z "$(CPU)" || test -e .venv/requirements-cpu.txt || { echo ".venv has PyTorch with CUDA: make clean first"; exit 1; }

packages: .venv/.packages

.venv/.packages: requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or run make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(CPU),)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) --requirement requirements.lock
else
	grep -Ev '$(CUDA_ONLY)' requirements.lock | sed 's/^torch===/torch==/' > .venv/requirements-cpu.txt
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) 'uv>=0.8'
	$(BIN)/uv pip install --quiet $(UV_OPTIONS) --python $(BIN)/python --torch-backend cpu --requirement .venv/requirements-cpu.txt
endif
	touch $@

.venv/.installed: .venv/.packages pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/mfm demo

test: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(COVERAGE)

quick: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not long"

long: setup
	$(BIN)/python -m pytest -q -m long

mutations: setup
	$(BIN)/python -m tests.mutations -j $(WORKERS) $(PART)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

wheel: setup
	$(BIN)/python -m hatchling build -t sdist -t wheel

notebooks: setup
	$(BIN)/python docs/notebooks.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv outputs site dist
