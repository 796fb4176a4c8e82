# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors

# The Python that .venv is made with, 3.10 or later: make test PYTHON=python3.12
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

V := .venv/bin
SANITIZE := build/sanitize
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Python that was named is obeyed; a default one does not replace the .venv that is there.
SETUP_FLAGS := $(if $(filter file,$(origin PYTHON)),,--rebuild-for-python)

# $(call stage,name,command): run it, with its name before and its time after.
define stage
@echo "== $(1)"; start=$$(date +%s); \
$(2); status=$$?; seconds=$$(($$(date +%s) - start)); \
if [ $$status -eq 0 ]; then echo "== $(1): $$seconds s"; \
else echo "== $(1): FAILED after $$seconds s"; exit $$status; fi
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help python setup test test-slow demo bench lint format sanitize clean distclean check-style

help:
	@echo "make setup      .venv with everything: minutes the first time, 8 GB of disk"
	@echo "make test       set-up, style and the quick tests"
	@echo "make test-slow  the same with all tests"
	@echo "make demo       set-up and the demo: a detector trained from scratch, minutes"
	@echo "make bench      set-up and the benchmark: half an hour; BENCH_ARGS=--quick shows its form"
	@echo "make lint       check the style; make format mends it"
	@echo "make sanitize   the tests of the ops with address and undefined-behaviour checks"
	@echo "make clean      remove what was built; make distclean removes .venv too (output/ stays)"
	@echo "Variables: PYTHON, FORCE_CPU, FORCE_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS, PYTEST_ARGS, BENCH_ARGS"
	@echo "TORCH_CUDA_ARCH_LIST=release compiles for every GPU of a release, 7.5 to 12.0"

# Here rather than in a script, which an old Python could not even read.
python:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "$(PYTHON) is not there: install Python 3.10 or later (apt install python3 python3-venv)," \
	    "or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -n 1), and 3.10 or later is needed: name one" \
	    "with PYTHON=..." >&2; exit 1; }

setup: python
	@"$(PYTHON)" tools/setup_environment.py $(SETUP_FLAGS)

check-style:
	$(call stage,style,$(V)/ruff check . && $(V)/ruff format --check . \
	  && $(V)/clang-format --dry-run --Werror $(CXX_FILES))

lint: setup check-style

format: setup
	$(V)/ruff check --fix . ; $(V)/ruff format .
	$(V)/clang-format -i $(CXX_FILES)

test: setup check-style
	$(call stage,tests,$(V)/python -m pytest -m "not slow" $(PYTEST_ARGS))

test-slow: setup check-style
	$(call stage,all tests,$(V)/python -m pytest $(PYTEST_ARGS))

demo: setup
	$(call stage,demo,$(V)/python tools/demo.py)

bench: setup
	@$(V)/python tools/benchmark.py $(BENCH_ARGS)

# A copy of its own, so that the ordinary build stays as it is; times are kept, so that only what
# changed is compiled. libstdc++ is loaded early for the sanitizer to find its exceptions.
sanitize: setup
	@mkdir -p $(SANITIZE)
	@cd $(SANITIZE) && rm -rf csrc dcn_plugin tests tools
	@cp -Rp setup.py pyproject.toml README.md LICENSE csrc dcn_plugin tests tools $(SANITIZE)
	@rm -f $(SANITIZE)/dcn_plugin/*.so $(SANITIZE)/dcn_plugin/_build_info.json
	$(call stage,build with sanitizers,cd $(SANITIZE) && DCN_SANITIZE=address$(comma)undefined \
	  ../../$(V)/python setup.py -q build_ext --inplace > build.log 2>&1 \
	  || { tail -n 30 build.log; false; })
	$(call stage,tests with sanitizers,cd $(SANITIZE) && \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  ../../$(V)/python -m pytest -m "not slow" tests/ops $(PYTEST_ARGS))

comma := ,

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f dcn_plugin/*.so dcn_plugin/_build_info.json
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean
	rm -rf .venv
