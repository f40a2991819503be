# make quickstart   everything, from an empty machine to a trained model and a sample
# make test         the tests
# make test-slow    the long ones
# make test-slurm   those of the Slurm scripts under a real Slurm, started for them: apt install slurm-wlm munge iproute2
# make docs         the site of docs/ in docs/_build, on Python 3.11 or newer
# make test-pythons the tests on every promised Python that is here, each in an environment of its own
#
# PYTHON: the interpreter to start from, 3.10 or newer.   VENV: where the virtual environment lies.
# pip takes the default torch of your platform; a torch that VENV has already, in the pinned version, stays.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test test-slow test-slurm test-pythons docs
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	@$(RUN) -m megachiar quickstart

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -m slow

test-slurm: $(VENV)/installed-dev
	$(RUN) -m pytest -m slow -rs tests/test_real_slurm.py

docs: $(VENV)/installed-docs
	$(RUN) -m sphinx -W --keep-going -q docs docs/_build
	@echo "open docs/_build/index.html"

test-pythons:
	@.ci/pythons

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null \
		|| { echo "error: there is no $(PYTHON); name a Python >= 3.10 with: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than 3.10 ($$($(PYTHON) --version 2>&1)); try: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/installed
