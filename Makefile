# Every habit is one word. The environment is made when a word needs it, from pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Files of tests on two workers, in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# What depends on no release of transformers is tested with the newest alone: equations, attacks of an evaluation.
NEWEST := $(addprefix --ignore=tests/test_,geometry.py methods.py divergence.py strong.py text.py \
	attacked_batch.py structure.py site.py demo.py benchmarks.py)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-distributed test-trainers test-oldest bench bench-gpu bench-evaluation textattack docs check format clean

demo: $(VENV)/ready  ## train on real reviews, plainly and adversarially, and show both
	$(RUN) examples/demo.py

test: $(VENV)/distributed  ## the default suite, a covering part of the engines included
	$(RUN) -m pytest $(TWO) -m "not slow"

test-slow: $(VENV)/distributed  ## what the default suite has no time for
	$(RUN) -m pytest $(TWO) -m slow

test-distributed: $(VENV)/distributed  ## every engine, attack, scope and launcher, and the table of differences
	$(RUN) -m pytest tests/test_distributed.py tests/test_launch.py tests/test_process_faults.py

test-trainers: $(VENV)/distributed  ## trainers of other libraries: trl, sentence-transformers, setfit, Optuna
	$(RUN) -m pytest $(TWO) -m trainers

test-oldest: .venv-oldest/ready  ## the suite on the oldest transformers that is supported
	.venv-oldest/bin/python -m pytest $(TWO) -m "not slow" $(NEWEST)

bench: $(VENV)/ready  ## what a step costs beside what people use today, on this machine
	$(RUN) benchmarks/step.py --output runs/step

# Without an environment of its own: torch for CUDA is what that machine has.
bench-gpu:  ## what a step costs on a GPU, and the tests that need one; eight minutes
	cd benchmarks && PYTHONPATH=.. $(PYTHON) gpu.py --output ../runs/gpu
	PYTHONPATH=. $(PYTHON) -m pytest -p no:cacheprovider -n 8 tests/test_gpu.py

bench-evaluation: $(VENV)/bench  ## what the evaluation costs beside foolbox
	$(RUN) benchmarks/evaluation.py --output runs/evaluation

textattack: $(VENV)/ready .venv-textattack/ready  ## TextAttack as a second opinion on two saved checkpoints
	$(RUN) examples/textattack/checkpoints.py
	.venv-textattack/bin/python examples/textattack/attack.py runs/textattack/plain runs/textattack/adversarial

# Without --quiet, which would hide warnings from --strict as well.
docs: $(VENV)/docs  ## the site, into runs/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

check: $(VENV)/ready docs  ## style, types and the site
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

$(VENV)/bench: $(VENV)/ready
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[bench]"
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# DeepSpeed is built where it is installed, against the torch that is there.
$(VENV)/distributed: $(VENV)/ready
	$(RUN) -m pip install --quiet -c constraints.txt setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(RUN) -m pip install --quiet -c constraints.txt --no-build-isolation \
		-e ".[deepspeed,ray,trainers,foolbox]" tensorboardX wandb
	touch $@

.venv-oldest/ready: constraints-oldest.txt setup.cfg
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@

# TextAttack can't live beside transformers 5. It reads what that has saved.
.venv-textattack/ready: examples/textattack/constraints.txt setup.cfg
	$(PYTHON) -m venv .venv-textattack
	.venv-textattack/bin/python -m pip install --quiet -c examples/textattack/constraints.txt torch
	.venv-textattack/bin/python -m pip install --quiet -c examples/textattack/constraints.txt textattack -e ".[report]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-textattack runs build dist *.egg-info
