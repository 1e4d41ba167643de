# make demo: the whole way on simulated recordings; make test: what CI runs. Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
export TQDM_MININTERVAL ?= 1

.PHONY: install demo test bench notebooks readme docs lab clean

install: .venv/.installed

.venv/.installed: settings.ini setup.py constraints.txt pahcl/csrc/selective_scan.c
	@echo 'Making .venv with PyTorch and all tools: 2 GB (with CUDA, on Linux, several more), some minutes without a word.'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python tools/install_hooks.py
	touch $@

demo: install
	$(BIN)/pahcl_downstream all --demo

# Clean notebooks, fresh exports, readable code, README, every notebook once, tests, coverage: see tools/run_tests.py.
test: install
	$(BIN)/python tools/run_tests.py

# Speed and memory of the scan, of whole training steps, of the views and of pretraining; takes some minutes.
bench: install
	. $(BIN)/activate && export OMP_NUM_THREADS=2 && for name in scan encoders lengths views pretraining; do python benchmarks/$$name.py || exit 1; done

# Rerun all notebooks in a Jupyter kernel, so that their saved outputs are those of this code.
notebooks: install
	. $(BIN)/activate && OMP_NUM_THREADS=1 python tools/run_nbs.py && nbdev_clean

readme: install
	. $(BIN)/activate && python tools/readme.py

# The site in _docs, without quarto; it opens from the folder.
docs: install
	. $(BIN)/activate && python tools/build_docs.py

# The notebooks in JupyterLab: trusted, so that saved sounds play; they find their figures' style. It starts in nbs, or
# the hook that saves them clean finds no file; without pings, of which the server's limits contradict each other.
lab: install
	. $(BIN)/activate && nbdev_trust && cd nbs && MATPLOTLIBRC=$(CURDIR)/nbs PYTHONWARNINGS='ignore:Overriding existing' \
	    jupyter lab --KernelManager.transport=ipc --ServerApp.tornado_settings="{'ws_ping_interval': 0}"

clean:
	rm -rf .tests-*.log .coverage* .venv _docs _proc demo build dist *.egg-info
