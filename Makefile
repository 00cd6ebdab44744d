# Every command of the project. `make check` and `make test` are what CI runs, in its order.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)/clients
CLIENTS_STAMP := $(CLIENTS)/.installed
PEERS := $(VENV)/training-peers
PEERS_STAMP := $(PEERS)/.installed
SERVING_PEERS := $(VENV)/serving-peers
# PyTriton needs Python 3.11 below 3.11.7: Debian 12 has one.
PYTRITON_PYTHON ?= /usr/bin/python3
PROTOS := protos/vae/v1/vae.proto protos/inference/inference.proto
DEMO := demo
BASE ?= main

.DEFAULT_GOAL := help
.PHONY: help setup clients training-peers serving-peers fmt check test demo serve bench bench-peers bench-against perf-analyzer image-locks image-test protos clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create the environment with the tested versions

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@echo 'installing the tested versions into $(VENV) (a minute or two)'
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[serving,load,tracing,training,tensorboard,ray-train,dev]'
	@touch $@

clients: $(CLIENTS_STAMP) ## create the environment of tritonclient, for the tests against it

# Inside the other, so that both are ignored and removed together.
$(CLIENTS_STAMP): .ci/clients.txt | $(STAMP)
	$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --requirement .ci/clients.txt
	@touch $@

training-peers: $(PEERS_STAMP) ## fetch pythae and Pyro, for `vae-train bench`

# A folder of packages, no environment: they run on our PyTorch, as a comparison wants it.
$(PEERS_STAMP): .ci/training-peers.txt | $(STAMP)
	rm -rf $(PEERS)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --target $(PEERS) --requirement .ci/training-peers.txt
	@touch $@

serving-peers: $(SERVING_PEERS)/mlserver/.installed $(SERVING_PEERS)/pytriton/.installed ## fetch MLServer and PyTriton, for `make bench-peers`

$(SERVING_PEERS)/mlserver/.installed: .ci/peers-mlserver.txt | $(STAMP)
	$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(SERVING_PEERS)/pytriton/.installed: .ci/peers-pytriton.txt | $(STAMP)
	@$(PYTRITON_PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 11, 7) else "PyTriton needs Python 3.11 below 3.11.7, this is " + sys.version.split()[0] + ": name one, make serving-peers PYTRITON_PYTHON=PATH")'
	$(PYTRITON_PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --requirement $<
	@touch $@

fmt: $(STAMP) ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(STAMP) ## lint, types, architecture, wire contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	@.ci/breaking $(BIN)/buf $(BASE)

test: $(STAMP) $(CLIENTS_STAMP) $(PEERS_STAMP) ## pass the whole test suite
	@.ci/debian
	$(BIN)/python -m pytest

demo: $(STAMP) ## train, export, serve on a local Ray, call every method, write pictures
	$(BIN)/vae-train fit digits --threads 1 --output-dir $(DEMO)/run  # small nets: a second thread gains nothing
	$(BIN)/vae-train export $(DEMO)/run $(DEMO)/bundle
	$(BIN)/vae-train data digits --split test --out $(DEMO)/test.npy > /dev/null
	$(BIN)/vae-serve demo --bundle $(DEMO)/bundle --data $(DEMO)/test.npy --out $(DEMO)

$(DEMO)/bundle/manifest.json:
	$(MAKE) demo

serve: $(STAMP) $(DEMO)/bundle/manifest.json ## keep the demo's model up on port 50051 until Ctrl-C
	$(BIN)/vae-serve up --bundle $(DEMO)/bundle

bench: $(STAMP) ## what distribution costs: echo, in-process and Ray, alternating
	$(BIN)/python -m tests.benchmarks.engines

bench-peers: $(STAMP) ## beside MLServer, PyTriton and plain Ray Serve, recorded; OPTIONS=--quick for a look
	$(BIN)/python -m tests.benchmarks.peers $(OPTIONS)

bench-against: $(STAMP) ## what the change since BASE costs, alternating with it
	git worktree add --force --detach $(VENV)/base $(BASE)
	$(BIN)/python -m tests.benchmarks.against $(VENV)/base --key; code=$$?; git worktree remove --force $(VENV)/base; exit $$code

perf-analyzer: $(STAMP) ## sweep concurrency with NVIDIA's perf_analyzer and record it (Linux x86-64)
	$(BIN)/python -m tests.benchmarks.perf_analyzer

image-locks: ## lock the packages of the images again, after a change of dependencies
	deploy/image/lock

image-test: $(STAMP) ## build the images without a registry, start them, call the service (root, ten minutes)
	VAE_IMAGE_TEST=1 $(BIN)/python -m pytest tests/deploy/test_image_run.py

protos: $(STAMP) ## generate the stubs from the wire contract
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $(PROTOS)

clean: ## remove what the targets made
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
