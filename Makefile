# Two commands on a bare machine: `make run` and `make test`. Both set up .venv first.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready

.PHONY: help run test test-gpu test-releases lint audit clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/  \1:/p' Makefile | column -t -s :

run: $(READY)  ## what runs here, whether its numbers are right, and on a GPU how fast it is
	$(VENV)/bin/sglang-router-gemm doctor
	@# Without a GPU the benchmark makes this check itself, and times nothing.
	if nvidia-smi -L >/dev/null 2>&1; then $(VENV)/bin/sglang-router-gemm check; fi
	$(VENV)/bin/python benchmark/kernels/deepseek/benchmark_deepgemm_dsv3_router_gemm_blackwell.py --quick

test:  ## lint, types, and every test that this machine can run
	@echo "Lint, types and tests: about 15 minutes on 2 idle cores."
	@$(MAKE) --no-print-directory lint
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test-gpu: $(READY)  ## the tests that need a Hopper or Blackwell GPU
	$(VENV)/bin/python -m pytest -m gpu

test-releases: $(READY)  ## every SGLang release since 0.5.11, from its wheel
	$(VENV)/bin/python -m pytest -m releases

lint: $(READY)  ## ruff, mypy and bandit
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --severity-level medium --recursive plugin python benchmark docs

audit: $(READY)  ## known vulnerabilities of what the tests have installed
	$(VENV)/bin/python .ci/audit.py

# The real SGLang is the dependency. pip downloads and unpacks it without a word.
$(READY): pyproject.toml
	@echo "Installing SGLang and what it needs into $(VENV): about 4 minutes and 11 GB."
	@$(PYTHON) -m venv $(VENV)
	@while sleep 60 >/dev/null 2>&1; do echo "  $$(du -sh $(VENV) | cut -f 1) so far"; done & \
	reporter=$$!; trap 'kill $$reporter' EXIT; trap 'exit 1' INT TERM; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

clean:  ## remove .venv
	rm -rf $(VENV)
