# make demo       on a CPU, from scratch: SFT, samples, pairs, DPO at five betas, against the limit (under 3 minutes)
# make test       the test suite; at the end it lists what was skipped and why
# make test-fast  the test suite without its slow tests
# make check      lint, format, lines of code against the budgets, imports against the rooms
# Each makes .venv and installs what it needs. TORCH says which torch, for example one of
# another build: make demo TORCH="torch --index-url ADDRESS", with an address of pytorch.org.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

demo: .venv/demo.installed
	$(BIN)/python demo.py

test: .venv/dev.installed
	$(BIN)/python -m pytest -q -n 2 -rs

test-fast: .venv/dev.installed
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not slow"

check: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.size
	$(BIN)/python -m pytest -q tests/test_house.py

# torch first and alone: the other packages then take the build that is there
.venv/demo.installed: requirements.txt | .venv
	$(PIP) $(TORCH)
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev.installed: requirements.txt requirements-dev.txt | .venv
	$(PIP) $(TORCH)
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nanopref needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`: name another with make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

.PHONY: demo test test-fast check
