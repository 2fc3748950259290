# make demo   set up, then a toy world, sounds of the packaged network, a minute of training, a report
#             (TRAIN=full: trains as the packaged one was, and says before how long; TRAIN=none; SEED=1)
# make test   set up for development, then the tests, on every core
# make quick  likewise, then the tests of a first look: no file that takes long
# make profile   where a training step and a sampling step spend their time (PROFILE="--model medium_16k ...")
# make wheel   sdist and wheel, tested in a bare environment for each of TORCHES
# make gpu    on a machine with a GPU, with what $(PYTHON) has: build, test, tune, measure (STAGES=... for some)
# PYTHON, TORCH, PIP_ARGS and WAVFLOW_BUILD choose interpreter, torch, pip options and kernels.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV ?= .venv
SEED ?= 0
TRAIN ?= quick
STAGES ?=
PROFILE ?=
TORCHES ?= $(TORCH)
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

# Kernels for GPUs take minutes to compile: where no GPU is to be seen, they are left out.
GPU = $(shell nvidia-smi -L 2>/dev/null)$(wildcard /dev/nvidia0)
COMPILER = $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)
WAVFLOW_BUILD ?= $(if $(GPU),auto,$(if $(COMPILER),cpu,auto))

.PHONY: setup demo test quick interpret aot isa avx2 slow lint sanitize profile wheel gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

setup: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "wavflow needs Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "this Python lacks venv or pip: install python3-venv and python3-pip"; exit 1; }
	@test -n "$(COMPILER)" \
	  || echo "no C++ compiler found (Debian: build-essential): the kernels will run as plain torch"
	$(PYTHON) -m venv $(VENV)

# What `make demo` needs. The installed torch is kept if TORCH accepts it; the build itself is
# isolated and needs none. Python compiles what is imported, not all that is installed.
$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	WAVFLOW_BUILD=$(WAVFLOW_BUILD) $(BIN)/python -m pip install --no-compile $(PIP_ARGS) "$(TORCH)" -e ".[demo]"
	$(BIN)/python -m wavflow_kernels
	@touch $@

# What tests and other work on the project need beside it; wavflow itself is not built again.
$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_ARGS) "wavflow[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/wavflow demo --out out/demo --seed $(SEED) --train $(TRAIN)

# Files go to JOBS processes of one thread each, the longest first; single tests where one file is
# all there is.
PYTEST := $(BIN)/pytest -q -n $(JOBS) --durations=30 --durations-min=5 --no-loadscope-reorder --dist
FILES := $(PYTEST) loadfile
TESTS := $(PYTEST) worksteal

test: setup
	$(FILES) -m "not slow and not gpu"
	$(MAKE) interpret

# Everything but the files that take long: they start processes, train or trace.
quick: setup
	$(FILES) -m "not slow and not gpu and not long"

# The op tests of the Triton kernels, in Triton's interpreter.
interpret: setup
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  TRITON_INTERPRET=1 $(TESTS) tests/kernels/test_ops.py -m "not slow and not gpu"; \
	else \
	  echo "triton is not installed: its kernels are not tested ($(BIN)/pip install 'triton>=3.6')"; \
	fi

slow: setup
	$(FILES) -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every Triton kernel compiled without a GPU: by the installed triton for every architecture, by the
# oldest supported for one. What was compiled is kept in build/aot.
OLD_TRITON := build/triton36
aot: setup
	@test -e $(OLD_TRITON)/triton || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(OLD_TRITON) $(PIP_ARGS) triton==3.6.0
	$(BIN)/python -m wavflow_kernels.tools.aot --cache build/aot --json build/aot.json
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m wavflow_kernels.tools.aot --cache build/aot --arch 90 \
	  --json build/aot36.json

# What only exercises the compiled kernels: the matrix in eager mode, and their laws.
KERNEL_TESTS := $(addprefix tests/kernels/test_,ops.py properties.py adaln.py conv1d.py qkv_rope.py \
  rope_attention.py swiglu.py) -k "cpp and eager or property"

# The kernels whose bits depend on the instruction set, in the baseline: of the others
# test_every_instruction_set_gives_the_same_bits shows that they do not.
isa: setup
	WAVFLOW_CPU_ISA=default $(TESTS) \
	  $(addprefix tests/kernels/test_,ops.py conv1d.py rope_attention.py swiglu.py) \
	  -k "cpp and eager and (attention or conv or swiglu) or property or threads"

# What chooses by the processor, on one that knows no more than AVX2.
AVX2_TESTS := $(addprefix tests/,$(addprefix kernels/test_,ops.py conv1d.py rope_attention.py \
  swiglu.py) layers flow systems/test_model.py systems/test_local.py sampling/test_engine.py \
  sampling/test_long.py $(addprefix pipeline/test_,sampler.py training.py) \
  $(addprefix training/test_,trainer.py flops.py))
avx2: setup
	@if $(BIN)/python -c 'import sys, torch; \
	    sys.exit("avx512" in torch.backends.cpu.get_cpu_capability().lower())'; then \
	  echo "avx2: this processor has no AVX-512: make test has tested that way"; \
	else \
	  WAVFLOW_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(TESTS) $(AVX2_TESTS) \
	    -m "not slow and not gpu" \
	    -k "not aot_eager and not inductor and not -reference- and not processes and not killed"; \
	fi

# The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitize
SANITIZER := LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) WAVFLOW_TEST_KERNELS=$(SANITIZED)
sanitize: setup
	WAVFLOW_BUILD=cpu WAVFLOW_SANITIZE=1 $(BIN)/python -m pip install --quiet --no-deps --upgrade \
	  --target $(SANITIZED) $(PIP_ARGS) .
	$(SANITIZER) $(TESTS) -o pythonpath=$(SANITIZED) $(KERNEL_TESTS) -p no:cacheprovider

profile: setup
	$(BIN)/python -m bench.run profile $(PROFILE)

wheel: $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) build
	$(BIN)/python tools/wheel.py $(TORCHES)

# Installs nothing outside build/gpu and needs no network; ends within 9 minutes on an H100.
gpu:
	$(PYTHON) -m bench.gpu $(STAGES)

clean:
	rm -rf build $(VENV) *.egg-info wavflow_kernels/_C*.so
