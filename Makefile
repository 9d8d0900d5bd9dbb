# Every habit is one word. The environment is made when a word needs it, from pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-oldest check format clean

demo: $(VENV)/ready  ## train on real reviews, plainly and adversarially, and show both
	$(RUN) examples/demo.py

test: $(VENV)/ready  ## the default suite
	$(RUN) -m pytest -m "not slow"

test-slow: $(VENV)/ready  ## what the default suite has no time for
	$(RUN) -m pytest -m slow

test-oldest: .venv-oldest/ready  ## the suite on the oldest transformers that is supported
	.venv-oldest/bin/python -m pytest -m "not slow"

check: $(VENV)/ready  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/ready: constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-oldest/ready: constraints-oldest.txt setup.cfg
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build dist *.egg-info
