# Every target sets up .venv by itself (constraints.txt, once) and then runs.
#   make demo    train a small model that chooses its own data, two CPU processes, no download
#   make test    lint, types, tests: what CI runs
#   make check   the same with the slow tests (sanitizers, nvcc for every architecture), the GPU tests where there is
#                a GPU, the script of make gpu in small on the CPU, and a dozen faults of tests/mutants that the tests
#                must see
#   make mutants all of those faults, one at a time; MUTANTS="--only scoring --jobs 4" and the like; it goes on where
#                it was stopped
#   make gpu     on a machine with a GPU: all that one is needed for, in 8 minutes (benchmarks/gpu/run.sh)
#   make bench   the benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A module's tests share its process groups and files, so they stay on one worker; conftest.py says which come first.
# With a thread a process: the tests start two ranks at a time, and threads that wait for a core spin.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder
CAMPAIGN := $(BIN)/python -m tests.mutants.run --jobs 2
EVERYTHING := $(if $(shell command -v nvidia-smi),gpu or not gpu,not gpu)

.PHONY: demo test check gpu bench lint mutants
.DELETE_ON_ERROR:

demo: $(READY)
	@$(BIN)/python -m dataflex.demo

test: lint
	@$(PYTEST)

check: lint
	@$(PYTEST) -m "$(EVERYTHING)" --hypothesis-profile drawn
	@benchmarks/gpu/run.sh --device cpu --smoke
	@$(CAMPAIGN) --random 12 --anew --trusted

mutants: lint
	@$(CAMPAIGN) $(MUTANTS)

gpu: $(READY)
	@benchmarks/gpu/run.sh

bench: $(READY)
	@$(BIN)/python benchmarks/bench_step.py

lint: $(READY)
	@$(BIN)/ruff check --quiet . && echo "ruff: clean"
	@$(BIN)/mypy dataflex

$(READY): constraints.txt pyproject.toml setup.py .ci/make_venv.py
	@$(PYTHON) .ci/make_venv.py $(VENV)
	@touch $@
