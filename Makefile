# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors

# The Python that .venv is created with, 3.10 or later: make test PYTHON=python3.12
PYTHON ?= python3
PYTEST_ARGS ?=
# A checkout of another Detectron2, built in place: make test and make matrix import it instead.
DETECTRON2 ?=
MATRIX_ARGS ?=
# Test files run in parallel, with a thread each; tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(if $(DETECTRON2),PYTHONPATH=$(abspath $(DETECTRON2))) \
  .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
FUZZ_MINUTES ?= 60
FUZZ_REPLAY ?=
SOAK_MINUTES ?= 30
SOAK_ARGS ?=

V := .venv/bin
DONE := .venv/.setup
LOG := build/setup.log
SANITIZE := build/sanitize
FUZZ := build/fuzz
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EMULATOR_FILES := $(shell find tests/cuda_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cuh')
OPS_INPUTS := setup.py pyproject.toml tools/toolchain.py $(CXX_FILES)
OPS_VARIABLES := FORCE_CPU|FORCE_CUDA|TORCH_CUDA_ARCH_LIST|CUDA_HOME|CUDA_PATH|DCN_SANITIZE|DCN_PORTABLE|CXX|CC|C(XX|PP)?FLAGS|LDFLAGS
# The user's own packages and pip settings stay out of .venv.
CLEAN := env -u PYTHONPATH -u PYTHONHOME -u PIP_TARGET -u PIP_PREFIX PYTHONNOUSERSITE=1 PIP_USER=0 \
  PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# $(call stage,name,command): run a command; print its name before and its time after.
define stage
@echo "== $(1)"; start=$$(date +%s); \
$(2); status=$$?; seconds=$$(($$(date +%s) - start)); \
if [ $$status -eq 0 ]; then echo "== $(1): $$seconds s"; \
else echo "== $(1): FAILED after $$seconds s"; exit $$status; fi
endef

# $(call logged,name,command): the same with the output in the log; print its end on failure.
logged = $(call stage,$(1),mkdir -p build; { $(CLEAN) $(2); } >> $(LOG) 2>&1 < /dev/null || { \
  tail -n 15 $(LOG); echo "The whole output is in $(LOG)"; false; })

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help python venv setup test test-slow matrix demo bench gpu-check lint format sanitize fuzz soak emulator \
  check-detectron2 emulate emulate-checked clean distclean check-style always

help:
	@echo "make setup      create .venv and compile the ops: minutes the first time, 8 GB of disk"
	@echo "make test       setup, style check and quick tests"
	@echo "make test-slow  setup, style check and all tests"
	@echo "make matrix     build and test the ops with the oldest and the newest PyTorch: half an hour"
	@echo "make demo       setup, then train and test a small deformable detector: minutes"
	@echo "make bench      setup, then benchmark: half an hour; BENCH_ARGS=--quick for a short one"
	@echo "make gpu-check  build, test and time the CUDA kernels on a GPU without a network: 9 minutes"
	@echo "make lint       check the style; make format fixes it"
	@echo "make sanitize   tests of the ops with address and undefined-behaviour sanitizers"
	@echo "make fuzz       random calls of the ops under the sanitizers, guided by coverage: FUZZ_MINUTES (60)"
	@echo "make soak       ops, models, kills and memory over SOAK_MINUTES (30)"
	@echo "make emulate    tests of the CUDA kernels without a GPU, by an emulator on the CPU"
	@echo "make emulate-checked  all of them with checks of every memory access: 12 minutes"
	@echo "make clean      remove build outputs; make distclean removes .venv too (output/ stays)"
	@echo "Variables: PYTHON, FORCE_CPU, FORCE_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS, PYTEST_ARGS, BENCH_ARGS,"
	@echo "  GPU_CHECK_ARGS, MATRIX_ARGS, FUZZ_REPLAY, SOAK_ARGS"
	@echo "DETECTRON2=path  test with another Detectron2: a checkout, built in place"
	@echo "TORCH_CUDA_ARCH_LIST=release compiles for all GPU architectures of a release, 7.5 to 12.0"

# In shell, since an old Python may fail to parse a script.
python:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "$(PYTHON) was not found: install Python 3.10 or later (apt install python3 python3-venv)," \
	    "or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -n 1), but 3.10 or later is needed: name" \
	    "one with PYTHON=..." >&2; exit 1; }

# Create .venv if there is none, if filling it was interrupted (pip cannot repair half-installed
# packages), if it was moved, or if PYTHON names another version.
venv: python
	@if [ -e .venv ] && [ ! -d $(DONE) ]; then \
	  echo ".venv exists, but make setup did not create it: move it away and try again" >&2; exit 1; fi
	@wanted="$$("$(PYTHON)" -c 'import platform; print(platform.python_version())')"; \
	found="$$($(V)/python -c 'import platform; print(platform.python_version())' 2> /dev/null)"; \
	if [ -e $(DONE)/packages.done ] && [ -n "$$found" ] && \
	  { [ ! -e $(DONE)/folder ] || grep -qx "$(CURDIR)" $(DONE)/folder; } && \
	  { [ "$(origin PYTHON)" = file ] || [ "$$found" = "$$wanted" ]; }; then exit 0; fi; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: apt install python3-venv, or name another" \
	    "with PYTHON=..." >&2; exit 1; }; \
	"$(PYTHON)" -c 'import sys; sys.path.insert(0, "tools"); import toolchain as t; t.find_compiler()' \
	  || exit 1; \
	free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1000000) }'); \
	if [ "$$free" -lt 8 ]; then echo "$(CURDIR) has $$free GB of free disk, but 8 GB are needed:" \
	  "free some (pip cache purge helps), or move the folder to a larger disk" >&2; exit 1; fi; \
	echo "== creating .venv with Python $$wanted; $$free GB of disk are free"; \
	mkdir -p build && rm -rf build/old-venv && { [ ! -e .venv ] || mv .venv build/old-venv; } && \
	mkdir -p $(DONE) && rm -rf build/old-venv $(LOG) && \
	$(CLEAN) "$(PYTHON)" -m venv --prompt dcn_plugin .venv && echo "$(CURDIR)" > $(DONE)/folder

$(DONE)/packages.done: requirements.txt
	@rm -f $@
	$(call logged,installing the packages (minutes; 3 GB of downloads the first time),\
	  $(V)/python -m pip install --progress-bar off -r requirements.txt)
	@touch $@

$(DONE)/detectron2.done: tools/get_detectron2.py $(DONE)/packages.done
	$(call logged,installing Detectron2 0.6,$(V)/python tools/get_detectron2.py --force)
	@touch $@

# What the ops depend on beside the contents of files; it is written only if it changes.
$(DONE)/variables: always
	@{ env | grep -E '^($(OPS_VARIABLES))=' | LC_ALL=C sort; command -v nvcc; \
	  ls /usr/local/cuda/bin/nvcc; echo $(OPS_INPUTS); } > $@.new 2> /dev/null; \
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# -v brings the compiler's warnings into the log.
$(DONE)/ops.done: $(DONE)/detectron2.done $(DONE)/variables $(OPS_INPUTS)
	$(call logged,compiling the ops and installing dcn_plugin,\
	  $(V)/python -m pip install -v --no-deps --no-build-isolation -e . || \
	  { echo "If the compiler was killed: the memory is too small; try make setup MAX_JOBS=1"; false; })
	@touch $@

setup: venv
	@[ -e dcn_plugin/_build_info.json ] || rm -f $(DONE)/ops.done
	@$(MAKE) --no-print-directory -s $(DONE)/ops.done
	@echo "The environment is ready: .venv"

check-style:
	$(call stage,style,$(V)/ruff check . && $(V)/ruff format --check . \
	  && $(V)/clang-format --dry-run --Werror $(CXX_FILES) $(EMULATOR_FILES))

lint: setup check-style

format: setup
	$(V)/ruff check --fix . ; $(V)/ruff format .
	$(V)/clang-format -i $(CXX_FILES) $(EMULATOR_FILES)

check-detectron2:
	@[ -z "$(DETECTRON2)" ] || [ -e "$(DETECTRON2)/detectron2/__init__.py" ] || { echo \
	  "DETECTRON2 must be a checkout of Detectron2 without spaces in its path, got $(DETECTRON2)" >&2; exit 1; }

test: check-detectron2 setup check-style
	$(call stage,tests,$(PYTEST) -m "not slow" $(PYTEST_ARGS))

test-slow: check-detectron2 setup check-style
	$(call stage,all tests,$(PYTEST) $(PYTEST_ARGS))

matrix: check-detectron2 setup
	@$(CLEAN) $(V)/python tools/matrix.py $(if $(DETECTRON2),--detectron2 $(DETECTRON2)) $(MATRIX_ARGS)

demo: setup
	$(call stage,demo,$(V)/python tools/demo.py)

bench: setup
	@$(V)/python tools/benchmark.py $(BENCH_ARGS)

# Without .venv: for a machine with a GPU and PyTorch, but no network.
gpu-check: python
	@"$(PYTHON)" tools/gpu_check.py $(GPU_CHECK_ARGS)

# $(call sanitized_build,folder,flags): in a copy, so that the ordinary build stays as it is; cp -p
# keeps the times, so that only changed files are compiled.
define sanitized_build
@mkdir -p $(1) && cd $(1) && rm -rf csrc dcn_plugin tests tools
@cp -Rp setup.py pyproject.toml README.md LICENSE csrc dcn_plugin tests tools $(1)
@rm -f $(1)/dcn_plugin/*.so $(1)/dcn_plugin/_build_info.json
$(call stage,build with sanitizers,cd $(1) && $(2) DCN_SANITIZE=address$(comma)undefined \
  ../../$(V)/python setup.py -q build_ext --inplace > build.log 2>&1 \
  || { tail -n 30 build.log; false; })
endef
# libstdc++ is preloaded so that the sanitizer finds its exceptions.
SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
  UBSAN_OPTIONS=print_stacktrace=1

sanitize: setup
	$(call sanitized_build,$(SANITIZE))
	$(call stage,tests with sanitizers,cd $(SANITIZE) && $(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 \
	  ../../$(V)/python -m pytest -m "not slow" tests/ops $(PYTEST_ARGS))

# GCC counts the edges that are taken; a result of more than 1 GB is an error, not an allocation.
# atheris stays out of .venv.
fuzz: setup
	$(call sanitized_build,$(FUZZ),CFLAGS=-fsanitize-coverage=trace-pc)
	$(call stage,build of the coverage counters,$(CC) -O2 -shared -fPIC -o $(FUZZ)/counters.so \
	  tests/fuzzing/counters.c)
	$(call stage,installing atheris,[ -e $(FUZZ)/packages/atheris ] || $(CLEAN) $(V)/python -m pip \
	  install -q --no-deps --only-binary :all: --target $(FUZZ)/packages 'atheris>=2.3')
	$(call stage,fuzzing,cd $(FUZZ) && $(SANITIZERS) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	  PYTHONPATH=$(CURDIR)/$(FUZZ):$(CURDIR)/$(FUZZ)/packages \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024:quarantine_size_mb=64 \
	  ../../$(V)/python -m tests.fuzzing --minutes $(FUZZ_MINUTES) $(if $(FUZZ_REPLAY),--replay \
	  $(abspath $(FUZZ_REPLAY))))

# Not in CI: kills, threads and random sizes for half an hour.
soak: setup
	$(call stage,soak,OMP_WAIT_POLICY=passive $(V)/python -m tests.soak --minutes $(SOAK_MINUTES) $(SOAK_ARGS))

# $(call emulated,build,tests): tests of the CUDA kernels on a build of the emulator
emulated = DCN_CUDA_EMULATOR=$(CURDIR)/build/cuda_emulator/$(1)/emulator.so \
  $(PYTEST) -m "cuda and not slow and not gpu" $(2) $(PYTEST_ARGS)
EMULATED_TESTS := tests/ops tests/layers tests/cuda_emulator
# The checked build takes three times as long: in CI, the comparisons with the references.
CHECKED_TESTS := tests/ops/test_deform_conv2d.py tests/ops/test_roi_pool.py tests/ops/test_sanitizer_calls.py \
  tests/cuda_emulator

emulator: setup
	$(call stage,build of the CUDA emulator,$(V)/python -m tests.cuda_emulator.faults copy && \
	  for name in plain checked faults; do $(MAKE) -s -j$$(nproc) -f tests/cuda_emulator/Makefile \
	  NAME=$$name PYTHON=$(V)/python || exit 1; done)

emulate: emulator
	$(call stage,CUDA kernels in the emulator,$(call emulated,plain,$(EMULATED_TESTS)))
	$(call stage,checks of their memory accesses,$(call emulated,checked,$(CHECKED_TESTS)))
	$(call stage,reports of deliberate faults,DCN_CUDA_FAULTS=1 $(PYTEST) -n 0 -s \
	  tests/cuda_emulator/test_faults.py)

emulate-checked: emulator
	$(call stage,checked CUDA kernels,$(call emulated,checked,$(EMULATED_TESTS)))

comma := ,

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f dcn_plugin/*.so dcn_plugin/_build_info.json
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean
	rm -rf .venv
