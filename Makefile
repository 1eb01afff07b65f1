# What there is to do here. `make demo` and `make test` set up what they need.
PYTHON ?= python3
FUZZ_SECONDS ?= 600
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup tools kube demo test test-slow test-vllm soak fuzz fuzz-short fuzzer check fix bench bench-routing docs protos lock

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON")'
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/epp demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# h2spec and a grpc-go client for tests/interop, helm for tests/deploy; needs Go. Without them those tests are skipped.
tools: setup
	$(BIN)/python -m scripts.tools interop deploy

# A real kube-apiserver, and kubectl; needs Go, and seven minutes the first time. etcd comes from the system.
kube: setup
	$(BIN)/python -m scripts.tools kube

# A minute of load and faults, and a minute of every property with more examples.
test-slow: setup
	$(BIN)/python -m pytest -m slow --timeout 300 $(ARGS)
	EPP_EXAMPLES=500 $(BIN)/python -m pytest -m "hypothesis and not slow" --timeout 300 $(ARGS)

# Two real vLLM servers, which you have: EPP_VLLM is a command that serves on $PORT; docs/load.md. No other run has these tests.
test-vllm: setup
	@test -n "$$EPP_VLLM" || { echo "set EPP_VLLM to a command that serves vLLM on 127.0.0.1:\$$PORT (docs/load.md)"; exit 2; }
	$(BIN)/python -m pytest tests/vllm $(ARGS)

# The long forms of the two, ten minutes and as long as it takes.
soak: setup
	EPP_SOAK_SECONDS=600 $(BIN)/python -m pytest -m slow --timeout 1200 tests/slow/test_soak.py $(ARGS)

# Our own HTTP/2 under a coverage-guided fuzzer for ten minutes and more, and every property for as long as it takes.
fuzz: fuzzer
	$(BIN)/python -m fuzz.http2 connection -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m fuzz.http2 heads -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m fuzz.http2 messages -max_total_time=$(FUZZ_SECONDS)
	EPP_EXAMPLES=20000 $(BIN)/python -m pytest -m "hypothesis and not slow" --timeout 7200 $(ARGS)

fuzz-short: fuzzer
	$(BIN)/python -m fuzz.http2 short

# Not in the lock: it has wheels for few platforms, and nothing else needs it.
fuzzer: setup
	$(PIP) install atheris==3.0.0

check: setup docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy epp tests bench scripts fuzz
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m scripts.protos --check
	$(BIN)/python -m scripts.lock --check

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Twelve minutes. Each program alone: `.venv/bin/python -m bench.request --rows light,duplex`; docs/performance.md.
bench: setup
	$(BIN)/python -m bench.request
	$(BIN)/python -m bench.fleet --subjects wire
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.decision
	$(BIN)/python -m bench.prompt
	$(BIN)/python -m bench.metrics
	$(BIN)/python -m bench.http2
	$(BIN)/python -m bench.scrape

# What each routing policy makes of the same traffic, in virtual time; TRACE=FILE adds Mooncake's. docs/routing.md.
bench-routing: setup
	$(BIN)/python -m bench.routing --trace "$(TRACE)" $(ARGS)

docs: setup
	$(BIN)/python -m scripts.links

protos: setup
	$(BIN)/python -m scripts.protos

# Take the newest versions that pyproject.toml allows.
lock: setup
	$(PIP) install --upgrade pip
	$(PIP) install --upgrade -e '.[demo]' --group dev
	$(BIN)/python -m scripts.lock
