# make demo: the whole way on simulated recordings; make test: what CI runs. Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
export TQDM_MININTERVAL ?= 1

.PHONY: install demo test bench notebooks readme docs clean

install: .venv/.installed

.venv/.installed: settings.ini setup.py constraints.txt pahcl/csrc/selective_scan.c
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/pahcl_downstream all --demo

# What nbdev_clean and nbdev_export would change is compared with a copy, so that uncommitted work does not matter.
# One thread a worker: two notebook workers on two cores must not fight over them.
test: export OMP_NUM_THREADS := 1
test: export PATH := $(CURDIR)/$(BIN):$(PATH)
test: install
	rm -rf .before && mkdir .before && cp -r nbs pahcl .before
	nbdev_clean && nbdev_export
	diff -r -x __pycache__ -x '.*' -x '*.yml' .before/nbs nbs && diff -r -x __pycache__ .before/pahcl pahcl
	rm -rf .before
	python tools/check_nbs.py
	python tools/readme.py --check
	timeout 1200 nbdev_test --timing --n_workers 2
	pytest --quiet --durations=10 --cov=pahcl --cov-report=term --cov-fail-under=85 tests

# Speed and memory of the scan, of whole training steps, of the views and of pretraining; takes some minutes.
bench: install
	. $(BIN)/activate && export OMP_NUM_THREADS=2 && for name in scan encoders lengths views pretraining; do python benchmarks/$$name.py || exit 1; done

# Rerun all notebooks in a Jupyter kernel, so that their saved outputs are those of this code.
notebooks: install
	. $(BIN)/activate && OMP_NUM_THREADS=1 python tools/run_nbs.py && nbdev_clean

readme: install
	. $(BIN)/activate && python tools/readme.py

# The site in _docs, without quarto.
docs: install
	. $(BIN)/activate && python tools/build_docs.py

clean:
	rm -rf .before .venv _docs _proc demo build dist *.egg-info
