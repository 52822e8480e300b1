# Every target does its own set-up. `make test` and `make demo` need python3 (3.10 or newer), a C++ compiler
# and make; `make cuda-build` also nvcc. TORCH chooses the torch that is installed and built against:
#   make test TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
FLOOR_VENV ?= .venv-floor

build_tools := "scikit-build-core>=0.11" "pybind11>=2.13" "ninja>=1.11" "cmake>=3.28" numpy
strict := -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON
# An editable install knows the packages that there were when it was made.
sources := CMakeLists.txt pyproject.toml $(wildcard cmake/* csrc/*.* csrc/*/*.* python/fgbg_cuda/*/__init__.py python/fgbg_cuda/*/*/__init__.py)
run := $(VENV)/bin/python

.PHONY: build test emulate fuzz asan demo bench nvcc-is-there cuda-build floor wheel gpu-check lint docs clean

# Says which folders are environments of this Makefile's making: others are neither emptied nor installed into.
made := made-by-fgbg_cuda

# $(call new_environment,FOLDER)
define new_environment
@test ! -e $(1) -o -e $(1)/$(made) || { echo "$(1) was not made by this Makefile and is left alone: name" \
  "another folder (make VENV=.venv-of-mine), or remove it yourself"; exit 1; }
$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "python 3.10 or newer is needed"'
$(PYTHON) -m venv --clear $(1)
@touch $(1)/$(made)
$(1)/bin/python -m pip install --quiet --upgrade pip
endef

build: $(VENV)/built

# The name of the torch requirement is part of the stamp, so that another TORCH makes another environment.
stamp = $(1)/$(subst =,-,$(subst >,-,$(subst <,-,$(2)))).installed
torch_stamp := $(call stamp,$(VENV),$(TORCH))
cuda_stamp := $(call stamp,$(CUDA_VENV),$(CUDA_TORCH))

$(torch_stamp):
	$(call new_environment,$(VENV))
	@echo "Installing $(TORCH) and the build tools: minutes, most of it downloads"
	$(run) -m pip install --quiet "$(TORCH)" $(build_tools)
	touch $@

$(VENV)/built: $(torch_stamp) $(sources)
	@echo "Compiling, and installing what the tests need: the first time about five minutes on two cores"
	$(run) -m pip install --quiet --no-build-isolation $(strict) -C build-dir=build/$(notdir $(VENV)) -e ".[examples,dev,docs]"
	$(run) -c 'from fgbg_cuda import build_info; i = build_info(); print("built:", i, i["cuda_missing"] or "", sep="\n")'
	touch $@

# A process for each core, each with as many threads: those that wait must not spin.
pytest_parallel := OMP_WAIT_POLICY=passive $(run) -m pytest -n auto --dist loadfile

test: build
	$(pytest_parallel) tests

# The tests of the ops on the CUDA kernels' own sources, compiled by g++ and run on the CPU: see tests/emulation. Some
# compile these for half a minute each, and are not to wait for each other because they share a file.
emulate: build
	$(pytest_parallel) --dist worksteal --devices emulated tests

# Random calls against the specification: make fuzz N=10000 SEED=7
N ?= 10000
SEED ?= 1

fuzz: build
	FGBG_FUZZ_CASES=$(N) FGBG_FUZZ_SEED=$(SEED) $(run) -m pytest tests/test_fuzz.py

# The tests of the ops on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (g++). Their
# runtimes have to be loaded before python, which is not instrumented (nor is torch), with libstdc++, whose
# exceptions they watch. -S: without it an editable install would come before PYTHONPATH.
asan_site := $(CURDIR)/build/asan/site
asan_tests := $(addprefix tests/test_,$(addsuffix .py,values dtypes layouts losses numerics philox errors \
  derivatives determinism transforms dispatcher nn fuzz call_alone forward_gradients saved_draws hard_selection \
  weights latents distributions slots adopting))
asan_run := LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(lib).so))" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$(asan_site):$$($(run) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(run) -S

asan: build
	CXX=g++ $(run) -m pip install --quiet --no-build-isolation --no-deps --upgrade --target $(asan_site) \
	  -C build-dir=build/asan/cmake -C install.strip=false \
	  -C cmake.define.FGBG_SANITIZE=address,undefined .
	$(asan_run) -c 'import fgbg_cuda; assert "$(asan_site)" in fgbg_cuda.__file__, fgbg_cuda.__file__'
	$(asan_run) -m pytest -p no:cacheprovider $(asan_tests)

demo: build
	$(run) -m fgbg_cuda demo

# Everything on this machine (about a quarter of an hour), into benchmarks/results/. For parts of it:
#   make bench BENCH="ops step --dtypes float32"
BENCH ?=

bench: build
	$(run) -m benchmarks $(BENCH)

lint: build
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter csrc/%,$(sources))
	$(run) -m mypy

# The documentation as a site, build/site. A dead link is an error.
docs: build
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict
	@echo "see build/site/index.html"

# An environment of its own: a CUDA torch and the kernels for sm_80, sm_90 and PTX. No GPU is needed. Fails on
# a warning, and on what tools/check_cuda_binary.py finds in the compiled code; the value tests then run on
# the CPU path of that build.
cuda_run := $(CUDA_VENV)/bin/python

$(cuda_stamp):
	$(call new_environment,$(CUDA_VENV))
	@echo "Installing $(CUDA_TORCH), which is several GB"
	$(cuda_run) -m pip install --quiet "$(CUDA_TORCH)" $(build_tools) "pytest>=8"
	touch $@

nvcc-is-there:
	@command -v nvcc > /dev/null || { echo "make cuda-build needs nvcc (CUDA 13) on PATH"; exit 1; }

cuda-build: nvcc-is-there $(cuda_stamp)
	@echo "Compiling the CUDA kernels: about a quarter of an hour on two cores"
	$(cuda_run) -m pip install -v --no-build-isolation --no-deps --force-reinstall $(strict) \
	  -C cmake.define.FGBG_CUDA=ON -C build-dir=build/$(notdir $(CUDA_VENV)) .
	cd tests && ../$(cuda_run) -c 'import fgbg_cuda; info = fgbg_cuda.build_info(); print(info); assert info["cuda"]'
	$(cuda_run) tools/check_cuda_binary.py "$$(cd tests && ../$(cuda_run) -c 'import fgbg_cuda; print(fgbg_cuda._C.__file__)')"
	$(cuda_run) -m pytest tests/test_values.py tests/test_philox.py

# On a machine with an NVIDIA GPU, in an environment that has a CUDA torch, the build tools and pytest. Parts of it,
# and where the results go:   make gpu-check PARTS="build tests" OUT=results
PARTS ?=
OUT ?= build/gpu-check

gpu-check:
	$(PYTHON) tools/gpu_check.py $(PARTS) --out $(OUT)

# Every lower bound of pyproject.toml at once, by the oldest Python: make floor PYTHON=python3.10
# The torch may have CUDA, of another version than nvcc's: hence the CPU kernels alone.
floor_run := $(FLOOR_VENV)/bin/python
uv_pip = $(FLOOR_VENV)/bin/uv pip install --python $(floor_run) --resolution lowest-direct

floor:
	$(call new_environment,$(FLOOR_VENV))
	$(floor_run) -m pip install --quiet uv
	$(uv_pip) --group build -r pyproject.toml
	$(uv_pip) -v --no-build-isolation --no-cache -C cmake.define.FGBG_CUDA=OFF ".[peers,examples,video,hdf5,dev]"
	OMP_WAIT_POLICY=passive $(floor_run) -m pytest -n auto --dist loadfile tests

# A wheel for the torch of .venv, named after it, in dist; tried in an environment of its own, outside the sources.
wheel_venv := build/wheel/environment

wheel: build
	$(call new_environment,$(wheel_venv))
	$(run) tools/make_wheel.py > build/wheel/path
	$(wheel_venv)/bin/python -m pip install --quiet "$(TORCH)" "$$(cat build/wheel/path)"
	cd build/wheel && environment/bin/python $(CURDIR)/tests/smoke.py
	@echo "$$(cat build/wheel/path) works"

# Trained models, in runs, stay, and so does an environment that was not made here.
clean:
	rm -rf build dist
	for folder in $(VENV) $(CUDA_VENV) $(FLOOR_VENV); do if test -e $$folder/$(made); then rm -rf $$folder; fi; done
	find benchmarks examples python tests tools -name __pycache__ -prune -exec rm -rf {} +
