# Two commands on a bare machine: `make run` and `make test`. Both set up .venv first.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready

.PHONY: run test test-gpu test-releases lint audit clean

run: $(READY)  ## what runs here, whether its numbers are right, and on a GPU how fast it is
	$(VENV)/bin/sglang-router-gemm doctor
	@# Without a GPU the benchmark makes this check itself, and times nothing.
	if nvidia-smi -L >/dev/null 2>&1; then $(VENV)/bin/sglang-router-gemm check; fi
	$(VENV)/bin/python benchmark/kernels/deepseek/benchmark_deepgemm_dsv3_router_gemm_blackwell.py --quick

test: lint  ## lint and every test that this machine can run
	$(VENV)/bin/python -m pytest

test-gpu: $(READY)  ## the tests that need a Hopper or Blackwell GPU
	$(VENV)/bin/python -m pytest -m gpu

test-releases: $(READY)  ## every SGLang release since 0.5.11, from its wheel
	$(VENV)/bin/python -m pytest -m releases

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --severity-level medium --recursive python benchmark

audit: $(READY)  ## known vulnerabilities of what the tests have installed
	$(VENV)/bin/python .ci/audit.py

# The real SGLang is the dependency: about 4 minutes and 11 GB.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV)
