# Every target that runs Python first makes the virtual environment of `setup`, and runs in it.
# constraints.txt pins the versions. CPU by default; `make setup CUDA=1`, in a fresh checkout or
# with another VENV, installs fbgemm's CUDA build instead.

# The suite starts a hundred processes: they share compiled files also where this is set.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup tools demo test soak lint clean

PYTHON ?= python3
VENV ?= .venv
CUDA ?=
DATA ?=
ROOT ?=
DEMO_ARGS ?=
TEST_ARGS ?=

RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/setup.stamp

# The stamp names the build in the environment: fbgemm's two builds overwrite each other's files.
BUILT := $(shell cat $(STAMP) 2>/dev/null)
BUILD := $(or $(if $(CUDA),cuda),$(BUILT),cpu)
ifneq ($(BUILD),$(or $(BUILT),$(BUILD)))
$(error $(VENV) holds the $(BUILT) build, not the $(BUILD) build; set another VENV)
endif
FBGEMM_cpu := fbgemm-gpu-cpu
FBGEMM_cuda := fbgemm-gpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with pinned versions (CUDA=1, PYTHON=python3, VENV=.venv)

# Sources of the C++ operators, which are built while the package is installed.
OPERATORS := setup.py $(wildcard torchrec_kvshare/attention/build.py torchrec_kvshare/attention/*.cpp)

# torch first, then torchrec without dependencies: its metadata asks for the CUDA fbgemm. The package
# without build isolation, so that pinned tools build its operators, also offline.
$(STAMP): setup.cfg constraints.txt $(OPERATORS)
	@command -v g++ >/dev/null || $(MAKE) --no-print-directory tools TOOLS=g++:g++ || \
		echo "No g++: attention without C++."
	@echo "setup 1/4: virtual environment $(VENV)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: torch"
	@$(INSTALL) torch setuptools
	@echo "setup 3/4: torchrec and $(FBGEMM_$(BUILD))"
	@$(INSTALL) --no-deps torchrec $(FBGEMM_$(BUILD))
	@echo "setup 4/4: this package with its C++ operators, and its extras"
	@$(INSTALL) --no-build-isolation --editable '.[parquet,prepare,ray,plots,tiers,metrics,triton,server,load,test,lint]'
	@echo "If pip says above that torchrec needs fbgemm-gpu: $(FBGEMM_$(BUILD)) replaces it."
	@echo $(BUILD) > $@

# Debian packages, each after the command or file that shows it is installed.
TOOLS := g++:g++ cmake:cmake make:make openssl:openssl redis-server:redis-server \
	/usr/include/nlohmann/json.hpp:nlohmann-json3-dev nginx:nginx chromium:chromium \
	chromedriver:chromium-driver

tools: ## install what the suite needs beyond Python: a C++ compiler, cmake, a JSON header, Redis, nginx, Chromium
	@for tool in $(TOOLS); do \
		command -v $${tool%:*} >/dev/null || test -e $${tool%:*} || \
			{ echo "installing $${tool#*:}" && apt-get -qq update && apt-get -qq install --yes $${tool#*:}; } || exit; \
	done

demo: $(STAMP) ## train, export and score end to end (DATA=name, ROOT=folder of the data, DEMO_ARGS)
	@$(RUN) -m pipelines.demo $(if $(DATA),data=$(DATA)) $(if $(ROOT),'data.root=$(ROOT)') $(DEMO_ARGS)

test: $(STAMP) tools ## run the whole suite (TEST_ARGS)
	$(RUN) -m pytest $(TEST_ARGS)

soak: $(STAMP) tools ## run the suite with its stress tests at full length (TEST_ARGS)
	KVSHARE_SOAK=1 $(RUN) -m pytest $(TEST_ARGS)

lint: $(STAMP) ## run ruff check, ruff format --check and mypy
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +
