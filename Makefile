# make train, reproduce, docs, test, test-slow, test-exhaustive, test-oracle, test-harness, test-aot, test-aot-models, test-aot-gpu, test-gpu, test-tpu, native, lint, clean. Each sets up what it needs in .venv, from GNU make, Python and a package index.
#   make train CONFIG=configs/hybrid_8k.py:150m WORKDIR=/data/run1 ARGS="--config.data.tokenizer=tokenizer.json"
#   make train EXTRA=gpu          # or tpu; "gpu hf" also reads and trains tokenizers
PYTHON ?= python3
CONFIG ?= configs/hybrid_8k.py
WORKDIR ?= runs/$(subst :,_,$(subst .py,,$(notdir $(CONFIG))))
ARGS ?=
EXTRA ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312).txt
VENV_PYTHON := .venv/bin/python
INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# One process more than processors, but at most four: tests also wait for files and for processes that they start.
PROCESSES := $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))' 2>/dev/null)
PARALLEL := --numprocesses=$(PROCESSES) --dist=loadfile

.PHONY: train reproduce docs test test-slow test-exhaustive test-oracle test-harness test-aot test-aot-models test-aot-gpu test-gpu test-tpu native lint clean

train: .venv/.train $(EXTRA:%=.venv/.%)
	$(VENV_PYTHON) launch/train.py --config='$(CONFIG)' --workdir='$(WORKDIR)' $(ARGS)

# The layouts of the paper on the recall probe, three seeds: half an hour on two cores; ARGS="--seeds=1" takes a third of it.
reproduce: .venv/.train
	$(VENV_PYTHON) tools/study.py studies/layouts --seeds=3 --out=runs/reproduce $(ARGS)

test: .venv/.test
	$(VENV_PYTHON) -m pytest $(PARALLEL) -m 'not slow' $(ARGS)

# Several processes that train as one, runs that are broken on purpose, the benches, most meshes, and what else takes long.
test-slow: .venv/.test
	$(VENV_PYTHON) -m pytest $(PARALLEL) -m 'slow and not exhaustive' $(ARGS)

# Half an hour: the slowest tests, and further cases of the others.
test-exhaustive: .venv/.test
	$(VENV_PYTHON) -m pytest $(PARALLEL) -m exhaustive $(ARGS)

# Compiles for TPUs, and for H100s, that are not here. The second installs several GB.
test-aot: .venv/.test .venv/.tpu
	$(VENV_PYTHON) -m pytest tests/test_aot.py tests/test_aot_experts.py -rs -k 'not whole_step' $(ARGS)

# Steps of whole models, of 1B, 8B and 30B parameters, at up to 1,048,576 tokens: half an hour.
test-aot-models: .venv/.test .venv/.tpu
	$(VENV_PYTHON) -m pytest tests/test_aot.py -rs -k whole_step $(ARGS)

test-aot-gpu: .venv/.test .venv/.gpu
	$(VENV_PYTHON) -m pytest tests/test_aot.py -rs -k 'not whole_step or H100' $(ARGS)

# The kernels on this machine's own device.
test-gpu: .venv/.test .venv/.gpu
	TEST_PLATFORM=cuda $(VENV_PYTHON) -m pytest tests/test_device.py $(ARGS)

test-tpu: .venv/.test .venv/.tpu
	TEST_PLATFORM=tpu $(VENV_PYTHON) -m pytest tests/test_device.py $(ARGS)

# Against the library that defines the families of docs/families.md, which brings PyTorch. Its models are small: one thread each.
test-oracle: .venv/.test .venv/.oracle
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest $(PARALLEL) --dist=worksteal tests/oracle $(ARGS)

# Tasks of lm-evaluation-harness, whose library `make test` does without.
test-harness: .venv/.test .venv/.harness
	$(VENV_PYTHON) -m pytest tests/test_harness.py -rs $(ARGS)

# The pages of docs/ as HTML, in docs/_build/html; warnings are errors.
docs: .venv/.docs
	$(VENV_PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)

# The CPU kernel in C++, by this machine's compiler: train.kernel=auto then means it.
native: .venv/.train
	$(VENV_PYTHON) -c 'from hybrid_attn.commands import build_kernel; build_kernel.start()'

lint: .venv/.test
	$(VENV_PYTHON) -m ruff check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written when its step is done, so an interrupted one is done again.
.venv/.python-$(VERSION):
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "$(PYTHON) is Python $(VERSION) and 3.11 is the oldest that runs this; name a newer one: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.train: .venv/.python-$(VERSION) pyproject.toml $(CONSTRAINTS)
	@echo "installing into .venv, once; the first time it takes minutes"
	$(INSTALL) --editable .
	@touch $@

.venv/.test: .venv/.train
	$(INSTALL) --editable '.[dev]'
	@touch $@

.venv/.tpu .venv/.gpu .venv/.hf .venv/.data .venv/.oracle .venv/.harness .venv/.docs: .venv/.%: .venv/.train
	$(INSTALL) --editable '.[$*]'
	@touch $@
