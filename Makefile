# make quickstart   the whole life of a small model, offline, in minutes
# make test         everything the project promises, checked
# make test-fast    units, one family of parity, the shape of the code: under two minutes
# make test-browser the page in Chromium (Debian: apt-get install chromium-headless-shell, which takes less than
#                   chromium); SLMKIT_SCREENSHOTS=FOLDER keeps pictures
# make test-kill    a run killed a hundred times and resumed, compared with one that nobody killed
# make test-transformers4   the comparisons with transformers 4
# make test-space   the page of a Space, with gradio beside what is installed (its versions are not those of the rest)
# make test-hosts   two hosts, one of which is lost in mid-run (root, iproute2)
# make test-load    the server with 500 clients that leave, 50 that do not read, and attacks of many kinds
# make test-long    everything in its long form: more cases at random, more exports, models read far past their length
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's view of the pinned set: the same versions for everybody.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Tests wait for servers, browsers and signals, so there are more workers than cores. A worker begins with consecutive
# tests, whose fixtures are then made once, and takes some of another's when it has ended its own.
WORKERS = --numprocesses $(shell $(PYTHON) -c "import os; print(max(2, os.cpu_count() * 3 // 2))") --dist worksteal

.PHONY: quickstart test test-fast test-browser test-transformers4 test-space test-long test-load test-hosts test-kill lint types check format clean

quickstart: $(VENV)/.installed
	$(BIN)/slm quickstart

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-browser: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) tests/serving -k page

test-kill: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kill --no-output

# The comparisons once more with the last version of transformers before 5, beside the one that is installed.
test-transformers4: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/transformers4 --upgrade "transformers<5" "huggingface_hub<1" \
		"tokenizers<=0.23.0" requests urllib3 charset_normalizer idna certifi
	PYTHONPATH=$(VENV)/transformers4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) tests/parity

test-space: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --target $(VENV)/gradio --upgrade gradio==6.31.0
	PYTHONPATH=$(VENV)/gradio OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/export/test_folders.py -k page_of_a_space

# Tests that have a longer form (`tests/long.py`) in that form: an hour, half of it for 131,072 tokens.
test-long: $(VENV)/.installed-test
	SLMKIT_TEST_LONG=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $$(grep -l "^from tests.long import" -r tests)

# Hundreds of clients, and schemathesis: some minutes.
test-load: $(VENV)/.installed-test
	SLMKIT_TEST_LOAD=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving/test_load.py tests/serving/test_batches.py

# Two network namespaces joined by a cable that is cut: some minutes.
test-hosts: $(VENV)/.installed-test
	SLMKIT_TEST_HOSTS=1 $(BIN)/python -m pytest tests/hosts

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

check: lint types test

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slmkit needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version, so that no other package decides which build is taken.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable ".[train,serve,constrain]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable ".[train,optim,hub,cluster,serve,track,test]"
	touch $@
