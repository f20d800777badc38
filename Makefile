# quickstart, test and check install what they need into .venv first; a second call installs nothing.
# Options go in ARGS, as in: make quickstart ARGS="--algorithm dapo"; make test ARGS="-k ledger"

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Modules are compiled once, also where the environment says that Python keeps nothing: tests start
# hundreds of processes, and to compile what each imports takes longer than to import it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install quickstart test test-fast test-all test-gpu bench chaos fuzz histories torn check docs format clean

help:
	@echo "make quickstart   install, then train a tiny model by reinforcement learning"
	@echo "make test         install, then run the tests (test-fast: fewer; test-all: the long ones too)"
	@echo "make test-gpu     what a machine with a GPU runs first: aligntune doctor --gpu, and the tests of GPUs"
	@echo "make bench        what can be measured; make bench NAME=control measures it"
	@echo "make chaos        kill and stop processes of runs, and see that nothing is lost"
	@echo "make fuzz         try broken configs, data, answers and folders: a result or one line"
	@echo "make histories    random histories of the loop on a virtual clock: the books balance"
	@echo "make torn         tear the files of runs in every way, and see that they go on right"
	@echo "make check        lint, format, types, import contracts, and the site builds"
	@echo "make docs         build the documentation site into site/"
	@echo "make format       let ruff put the code in order"
	@echo "make install      only install, into .venv"
	@echo "make clean        remove .venv and caches"
	@echo "make test-clients install OpenEnv and verifiers apart, 1 GB, and test that they speak to us"

install:
	@bash scripts/install.sh

quickstart: install
	.venv/bin/aligntune quickstart $(ARGS)

# Two workers, each with a Ray of its own; tests/conftest.py says what goes after what.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: install
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-fast: install
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(ARGS)

test-all: install
	.venv/bin/python -m pytest -m "slow or not slow" $(ARGS)

test-gpu: install
	.venv/bin/aligntune doctor --gpu
	.venv/bin/python -m pytest -m gpu $(ARGS)

bench: install
	.venv/bin/python -m tests.bench $(NAME)

chaos: install
	.venv/bin/python -m tests.chaos $(ARGS)

fuzz: install
	.venv/bin/python -m tests.fuzz $(ARGS)

histories: install
	.venv/bin/python -m tests.histories $(ARGS)

torn: install
	.venv/bin/python -m tests.torn $(ARGS)

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(BUILD_SITE)

# Without a network, and a warning is an error; the variable silences an advertisement of the theme's.
BUILD_SITE := NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

docs: install
	$(BUILD_SITE)

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: test-clients
test-clients: install
	bash scripts/install_clients.sh
	.venv/bin/python -m pytest tests/actors/environments/test_real_clients.py $(ARGS)
