# Everything from a bare machine with Python 3.11 or newer, pip, make and a C++ compiler:
#   make demo    sets everything up and runs the demo
#   make test    sets everything up and runs the Python tests
# The environment is the active one ($VIRTUAL_ENV), else .venv, which is created; VENV=... names
# another. A torch that is already there is kept and built against.

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
PYTEST_WORKERS ?= --numprocesses=logical --maxprocesses=8 --dist=loadfile
DEMO_ARGS ?=

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
READY := $(VENV)/.gauge_ext-ready
CPP_FILES = $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# cmake looks for ninja on PATH, where an environment that is not activated has none.
CMAKE := PATH="$(BIN):$$PATH" cmake
CTEST := PATH="$(BIN):$$PATH" ctest
# Nothing here needs a model hub, and no test may wait for one.
export HF_HUB_OFFLINE := 1

.PHONY: help setup build demo test test-js cpp-test cuda-check asan lint format clean

help:
	@echo 'make demo      set up, then the whole way on a real model: train, export, validate, search'
	@echo 'make test      set up, then the Python tests            (PYTEST_ARGS="tests/ops -x",'
	@echo '               PYTEST_WORKERS= runs them in one process, as a debugger wants it)'
	@echo 'make cpp-test  set up, then the C++ tests'
	@echo 'make test-js   set up, then graphs in onnxruntime-node and -web (needs node, npm, chromium)'
	@echo 'make cuda-check  compile the CUDA kernels, where there is an nvcc; no GPU is needed'
	@echo 'make asan      C++ tests and tests/ops under the address and undefined sanitizers'
	@echo 'make lint      ruff, mypy, clang-format;  make format  repairs what can be'
	@echo 'make build     recompile what changed under csrc/'
	@echo 'make clean     remove what was built; the virtual environment stays'

# A Python without ensurepip (Debian without python3-venv) can still make an environment: pip, run
# from outside, puts pip into it.
$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, PYTHON=... names one; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install pip; }

$(READY): pyproject.toml setup.py _build/torch_env.py _build/cmake_tools.py | $(PY)
	$(PY) _build/torch_env.py > /dev/null || $(PY) -m pip install '$(TORCH)'
	$(PY) -m pip install 'setuptools>=77' 'pybind11>=3' $$($(PY) _build/cmake_tools.py)
	$(PY) -m pip install --no-build-isolation -e '.[demo,export,test]'
	@touch $@

setup: $(READY)

# Asks CMake each time (about two seconds): it alone knows whether torch or a source file changed.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m gauge_ext demo $(DEMO_ARGS)

# A process for each core, each with whole files, whose fixtures are often shared by their tests.
test: build
	GAUGE_EXT_REQUIRE_COMPILED=1 $(PY) -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

# Without its install script onnxruntime-node downloads no CUDA libraries; the CPU's are in it.
test-js: build
	cd tests/export/js && ONNXRUNTIME_NODE_INSTALL=skip npm install --no-audit --no-fund --no-save
	NODE_PATH=tests/export/js/node_modules GAUGE_EXT_REQUIRE_JS=1 $(PY) -m pytest \
	  tests/export/adapters/test_adapter_js.py tests/export/proof/test_proof_runtimes.py $(PYTEST_ARGS)

cpp-test: $(READY)
	$(CMAKE) --preset debug -DPython_EXECUTABLE=$(PY) --log-level=NOTICE
	$(CMAKE) --build --preset debug --target gauge_ext_tests gauge_ext_cuda_tests
	$(CTEST) --preset debug

# Everything for the GPU is compiled, nothing linked: an nvcc is enough, torch may be one for the CPU.
cuda-check: $(READY)
	$(CMAKE) --preset debug -DPython_EXECUTABLE=$(PY) --log-level=NOTICE
	$(CMAKE) --build --preset debug --target cuda_check

# The second half runs Python on the sanitized libraries, so the sanitizers' runtimes come first;
# leaks are Python's own. The ordinary build is put back whatever the tests say.
asan: export ASAN_OPTIONS := detect_leaks=0
asan: export UBSAN_OPTIONS := halt_on_error=1:print_stacktrace=1
asan: build
	$(CMAKE) --preset asan -DPython_EXECUTABLE=$(PY) --log-level=NOTICE
	$(CMAKE) --build --preset asan
	$(CTEST) --preset asan
	install build/asan/*.so gauge_ext/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  GAUGE_EXT_REQUIRE_COMPILED=1 $(PY) -m pytest $(PYTEST_WORKERS) tests/ops $(PYTEST_ARGS); status=$$?; \
	  $(PY) setup.py -q build_ext --inplace; exit $$status

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info gauge_ext/*.so $(READY)
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
