# make quickstart | ladder | test | test-fast | ecosystem | lint | clean. PYTHON=python3.12 picks the interpreter of a new .venv.
.PHONY: quickstart ladder test test-fast ecosystem lint format clean

PYTHON ?= python3
export PYTHON
RUN := .venv/bin/

# One thread per process: the tests start up to eight processes on few cores.
test test-fast: export OMP_NUM_THREADS = 1
# Hundreds of processes start: none should have to compile what others have, whatever the user's setting is.
test test-fast: export PYTHONDONTWRITEBYTECODE =

# Without an NVIDIA GPU, DeepSpeed is told so (it guesses from what is installed) and tests marked gpu are deselected.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU '),0)
export DS_ACCELERATOR ?= cpu
ALL := not gpu
FAST := not slow and not gpu
else
FAST := not slow
endif

quickstart: .venv/.installed
	$(RUN)python tools/quickstart.py

# Four sizes on the quickstart's data, and a fifth whose loss is predicted first. Interrupted, it goes on.
ladder: .venv/.installed
	$(RUN)python tools/quickstart.py --data-only
	$(RUN)python tools/ladder.py run examples/ladder.yaml
	$(RUN)python tools/ladder.py report examples/ladder.yaml

test: .venv/.installed
	.ci/test $(RUN)python -m pytest --durations=15 -m "$(ALL)"

test-fast: .venv/.installed
	.ci/test --merged $(RUN)python -m pytest -m "$(FAST)"

# Exports in the libraries that they are for, each in an environment of its own in .venv-ecosystem.
ecosystem: .venv/.installed
	.ci/ecosystem

lint: .venv/.installed
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy llama_ds tools

format: .venv/.installed
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

# Leaves runs/ alone: it holds trained models.
clean:
	rm -rf .venv .venv-ecosystem .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: setup.py constraints.txt .ci/install.sh
	bash .ci/install.sh
