# make quickstart   everything from an empty machine to a trained model and a sample
# make test         the tests            make test-slow   the long ones
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test test-slow
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(RUN) tools/quickstart.py

test: $(VENV)/installed-dev
	$(RUN) -m pytest

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -m slow

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than 3.10; try make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "error: cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }

$(VENV)/installed: setup.py constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed
