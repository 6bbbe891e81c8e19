# make demo: train a model from nothing, in minutes, and talk to it.   make test: everything that is checked.
# JOBS=1: that many tests at a time; as many as there are cores without it.
# make standin: compile for a GPU that is not there, with the CUDA build of torch, of which it installs 5 GB.
PYTHON ?= python3
JOBS ?= auto
BIN := .venv/bin

.PHONY: demo test standin lint clean

demo: .venv/installed-demo
	$(BIN)/hotlap speedrun tiny

test: .venv/installed-dev
	$(BIN)/pytest -n $(JOBS) --dist loadgroup

standin: .venv-standin/installed
	TRITON_CACHE_DIR=$(CURDIR)/.venv-standin/cache/triton .venv-standin/bin/pytest -m standin -n $(JOBS) tests/gpu_stand_in

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed-demo: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot,web]'
	@touch $@

.venv/installed-dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

.venv-standin/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-standin
	sed '/^torch==/d; /^triton==/d' constraints.txt > .venv-standin/constraints.txt
	.venv-standin/bin/python -m pip install -q -c .venv-standin/constraints.txt \
		-e . torch==2.11.0 pytest pytest-xdist
	@.venv-standin/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' \
		|| { echo "error: the package index offers torch without CUDA, and this needs it with"; exit 1; }
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than 3.10; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-standin build *.egg-info
