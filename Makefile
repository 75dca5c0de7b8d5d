# Every target sets up .venv by itself (constraints.txt, once) and then runs.
#   make demo    train a small model that chooses its own data, two CPU processes, no download
#   make test    lint, types, tests: what CI runs
#   make check   the same with the slow tests (sanitizers, nvcc for every architecture), and the GPU tests where
#                there is a GPU
#   make bench   the benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A module's tests share its process groups and files, so they stay on one worker.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope
EVERYTHING := $(if $(shell command -v nvidia-smi),gpu or not gpu,not gpu)

.PHONY: demo test check bench lint
.DELETE_ON_ERROR:

demo: $(READY)
	@$(BIN)/python -m dataflex.demo

test: lint
	@$(PYTEST)

check: lint
	@$(PYTEST) -m "$(EVERYTHING)"

bench: $(READY)
	@$(BIN)/python benchmarks/bench_step.py

lint: $(READY)
	@$(BIN)/ruff check --quiet . && echo "ruff: clean"
	@$(BIN)/mypy dataflex

$(READY): constraints.txt pyproject.toml setup.py .ci/make_venv.py
	@$(PYTHON) .ci/make_venv.py $(VENV)
	@touch $@
