# make quickstart   environment, data, training, comparison, report: about ten minutes on two cores
# make test         the test suite
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
OUT ?= runs/quick
# Large arrays on huge pages: steps on CPU take up to a third less time. Ignored outside glibc.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart setup test reference lint smoke smoke-newest clean

quickstart: $(VENV)/.installed
	$(PY) -m experiments.specialise.run --scale=quick --out=$(OUT)

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slm needs Python 3.11 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps -e .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PY) -m pip install -q -e '.[test]'
	touch $@

test: $(VENV)/.test
	$(PY) -m pytest -n 2 --dist=loadfile

# Installs torch and transformers, which the tests compare with where they are present.
reference: $(VENV)/.test
	$(PY) -m pip install -q -e '.[reference]'

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

smoke: $(VENV)/.installed
	bash tests/smoke.sh $(PY)

# The same on the newest releases of what slm requires, where a Python of 3.12 or newer is at hand.
NEWEST := .venv-newest/bin/python
smoke-newest:
	@for python in python3.13 python3.12; do \
	  if $$python -c '' 2>/dev/null; then \
	    $$python -m venv .venv-newest && $(NEWEST) -m pip install -q --upgrade -e . && \
	    $(NEWEST) -c 'import jax, sys; print("smoke run: Python", sys.version.split()[0], "jax", jax.__version__)' && \
	    exec bash tests/smoke.sh $(NEWEST); \
	    exit 1; \
	  fi; \
	done; echo 'smoke run on the newest jax: skipped, no python3.12 or newer on PATH'

# Leaves runs/: what is trained there took time.
clean:
	rm -rf $(VENV) .venv-newest
