# Every target that runs Python uses the virtual environment that `setup` makes, and makes it first.
# The versions stand in constraints.txt. CPU by default; `make setup CUDA=1` in a fresh checkout, or
# with another VENV, takes fbgemm's CUDA build instead.

.DEFAULT_GOAL := help
.PHONY: help setup tools demo test soak lint clean

PYTHON ?= python3
VENV ?= .venv
CUDA ?=
DATA ?= synthetic
ROOT ?=
DEMO_ARGS ?=
TEST_ARGS ?=

RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/setup.stamp

# The stamp holds the build it was made for: the two builds of fbgemm overwrite each other's files.
BUILT := $(shell cat $(STAMP) 2>/dev/null)
BUILD := $(or $(if $(CUDA),cuda),$(BUILT),cpu)
ifneq ($(BUILD),$(or $(BUILT),$(BUILD)))
$(error $(VENV) holds the $(BUILT) build, and the $(BUILD) build was asked for; name another VENV)
endif
FBGEMM_cpu := fbgemm-gpu-cpu
FBGEMM_cuda := fbgemm-gpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with pinned versions (CUDA=1, PYTHON=python3, VENV=.venv)

# What the C++ operators are built of, while the package is installed.
OPERATORS := setup.py $(wildcard torchrec_kvshare/attention/build.py torchrec_kvshare/attention/*.cpp)

# torch first and torchrec without dependencies: torchrec's metadata asks for the CUDA fbgemm. The
# package without isolation, so that its operators are built by pinned tools, and offline if changed.
$(STAMP): setup.cfg constraints.txt $(OPERATORS)
	command -v g++ >/dev/null || $(MAKE) tools TOOLS=g++:g++ || echo "No g++: attention without C++."
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	$(INSTALL) --no-deps torchrec $(FBGEMM_$(BUILD))
	$(INSTALL) --no-build-isolation --editable '.[parquet,plots,tiers,metrics,triton,server,load,test,lint]'
	@echo "If pip says above that torchrec misses fbgemm-gpu: $(FBGEMM_$(BUILD)) stands in for it."
	@echo $(BUILD) > $@

# Debian's packages, each behind the command or file that shows it is there.
TOOLS := g++:g++ cmake:cmake make:make openssl:openssl redis-server:redis-server \
	/usr/include/nlohmann/json.hpp:nlohmann-json3-dev nginx:nginx chromium:chromium \
	chromedriver:chromium-driver

tools: ## what the suite needs beyond Python: a C++ compiler, cmake, a JSON header, Redis, nginx, Chromium
	for tool in $(TOOLS); do \
		command -v $${tool%:*} >/dev/null || test -e $${tool%:*} || \
			{ apt-get update && apt-get install --yes $${tool#*:}; } || exit; \
	done

demo: $(STAMP) ## train, export and score end to end (DATA=synthetic, ROOT=folder of the data, DEMO_ARGS)
	$(RUN) -m pipelines.demo data=$(DATA) $(if $(ROOT),'data.root=$(ROOT)') $(DEMO_ARGS)

test: $(STAMP) tools ## run the whole suite (TEST_ARGS)
	$(RUN) -m pytest $(TEST_ARGS)

soak: $(STAMP) tools ## run the suite with its stress tests at full length (TEST_ARGS)
	KVSHARE_SOAK=1 $(RUN) -m pytest $(TEST_ARGS)

lint: $(STAMP) ## ruff's rules, ruff's format, mypy
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +
