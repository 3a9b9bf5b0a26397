# `make` lists the targets. All of them work from a fresh clone with Python 3.11 or newer and a C++20 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers fit 2 cores; each test process computes on one thread.
TEST_WORKERS ?= 2
TEST_FLAGS ?=
BENCH_FLAGS ?= --benchmark-disable-gc
DEMO_FLAGS ?= --data glyphs --methods sgd,freeze,refresh,local --seeds 1 --train-size 4000 --test-size 1000

# What runs a second time with the CUDA kernels, on an emulated GPU.
EMULATED_TESTS := tests/emulated tests/test_ops.py tests/test_ops_update.py tests/test_ops_errors.py tests/test_ops_compile.py \
  tests/test_learning_proofs.py tests/test_learning_modules.py tests/test_checkpointing.py tests/test_compiled_training.py tests/gpu/test_gpu_semantics.py

# What runs a third time on the sanitized CPU half: what reads and writes memory, without torch.compile and processes of their own.
SANITIZED_TESTS := tests/test_ops.py tests/test_ops_update.py tests/test_ops_errors.py tests/test_ops_memory.py tests/test_ops_fuzz.py tests/test_gram_sums.py
# Loaded before Python, whose own allocations (leaks at exit) are not what is tested.
SANITIZERS = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libubsan.so)

# What `make soak` repeats many times, and `make test` a few.
SOAK_TESTS := tests/train/test_resume.py::test_killed_at_random_moments tests/test_soak.py

CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := setup.py localsgd_ext/_cuda_toolkit.py csrc/sources.txt $(wildcard $(shell find csrc -type f))

.DEFAULT_GOAL := help
.PHONY: help venv build demo test native mutants emulated sanitized soak lint format bench clean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.built ## Set up .venv once: PyTorch, every tool, the package in editable form (5.5 GB, minutes)

build: venv ## Rebuild the extension after an edit in csrc/ (seconds)

$(VENV)/.installed: pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++20 compiler is needed (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-build-isolation -c requirements.txt -e '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	@touch $@.start
	$(BIN)/python setup.py -q build_ext --inplace
	@mv $@.start $@  # dated before the build, so that an edit made during it counts as new

demo: venv ## Train a small CNN with SGD, a frozen prefix, one that is refreshed and a Hebbian one: table and picture in runs/demo (under 5 minutes)
	rm -rf runs/demo
	$(BIN)/localsgd compare $(DEMO_FLAGS) --out runs/demo

test: venv native emulated sanitized ## Run every test: native, on the emulated GPU, and Python (under 25 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --benchmark-disable --emulated $(EMULATED_TESTS) $(TEST_FLAGS)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --benchmark-disable $(TEST_FLAGS)

emulated: venv ## Build the module whose CUDA kernels run on an emulated GPU: pytest --emulated
	$(BIN)/python tests/second_build.py emulated

sanitized: venv ## Build the CPU half under AddressSanitizer and UBSan and run the native tests and those of the operations on it
	$(BIN)/python tests/second_build.py sanitized
	$(BIN)/ctest --test-dir build/sanitized --output-on-failure --no-tests=error
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -n $(TEST_WORKERS) --benchmark-disable --sanitized --fuzz-share 0.15 $(SANITIZED_TESTS) $(TEST_FLAGS)

soak: venv ## Kill 50 runs at random moments, make a million updates and look at the memory (a quarter of an hour)
	$(BIN)/python -m pytest --benchmark-disable --soak --timeout 7200 -s $(SOAK_TESTS) $(TEST_FLAGS)

native: venv ## Build the kernels without Python or PyTorch and run their C++ tests
	$(BIN)/cmake -S . -B build/native -DLOCALSGD_CUDA=OFF # the extension's build has compiled those; here they are emulated
	$(BIN)/cmake --build build/native --parallel 2
	$(BIN)/ctest --test-dir build/native --output-on-failure --no-tests=error

mutants: venv ## Plant faults in the device code, one at a time, and see the emulated tests fail (half an hour on 2 idle cores; goes on where it was)
	$(BIN)/python tests/native/mutations.py --jobs 2

lint: venv ## Check formatting, style and types
	@failed=0; \
	for check in 'ruff check .' 'ruff format --check .' 'mypy' 'clang-format --dry-run --Werror $(CPP_FILES)'; do \
	  echo "$$check" | cut -c 1-60; $(BIN)/$$check || failed=1; \
	done; exit $$failed

format: venv ## Format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: venv ## Run the benchmarks
	@ls benchmarks/*.py >/dev/null 2>&1 || { echo "benchmarks/ holds none yet" >&2; exit 1; }
	$(BIN)/python -m pytest $(BENCH_FLAGS) benchmarks

clean: ## Remove what was built (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache localsgd_ext/_C*.so localsgd_ext/_build_info.json $(VENV)/.built
	find localsgd_ext tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
