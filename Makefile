# make chat, make test: each sets up all it needs on a fresh machine (Python 3.11+, a C++ compiler).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=

.PHONY: chat test soak fuzz check lint types sanitize neon setup setup-dev clean

chat: setup
	@$(BIN)/glm5 chat $(if $(MODEL),--model "$(MODEL)")

test: setup-dev
	@# One thread a worker: workers with several would wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The random tests once more, with many times their cases: hours.
SOAK ?= 100
soak: setup-dev
	GLM5_SOAK=$(SOAK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/layers tests/kernels tests/runtime tests/fuzz

# Damaged files of every kind, 20,000 of them: a minute. FUZZ=1000 for half a million.
FUZZ ?= 31
fuzz: setup-dev
	GLM5_SOAK=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/fuzz

check: lint types test

lint: setup-dev
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes

types: setup-dev
	$(BIN)/mypy

# The kernels' tests once more, on a library that watches its own memory and arithmetic.
SANITIZED := build/sanitized
sanitize: setup-dev
	@mkdir -p build; $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S . -B $(SANITIZED) -DGLM5_SANITIZE=ON -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > $(SANITIZED).log 2>&1 || (cat $(SANITIZED).log; exit 1)
	@$(BIN)/cmake --build $(SANITIZED) --parallel >> $(SANITIZED).log 2>&1 || (tail -30 $(SANITIZED).log; exit 1)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 GLM5_NATIVE_MODULE=$$(ls $(SANITIZED)/_cpu*.so) \
	  $(BIN)/python -m pytest tests/kernels/test_odd_shapes.py

# The NEON kernels, cross-compiled and run in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user-static).
CROSS := aarch64-linux-gnu-g++ -std=c++17 -O1 -ffp-contract=off -Wall -Wextra -Werror -Wno-psabi -DGLM5_NEON -Isrc/glm5/kernels/cpu/src
neon:
	@mkdir -p build/neon
	@for part in isa_portable dispatch threads; do $(CROSS) -c src/glm5/kernels/cpu/src/$$part.cpp -o build/neon/$$part.o || exit 1; done
	@$(CROSS) -march=armv8.2-a+dotprod+fp16 -c src/glm5/kernels/cpu/src/isa_neon.cpp -o build/neon/isa_neon.o
	@$(CROSS) -static tests/kernels/cross/neon_check.cpp build/neon/*.o -o build/neon/check -lpthread
	qemu-aarch64-static build/neon/check

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# torch goes first and alone: the pin gives a CPU build where pip finds one.
NATIVE := CMakeLists.txt $(wildcard src/glm5/kernels/cpu/src/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "glm5 needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	@command -v $${CXX:-c++} > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null \
	  || { echo "glm5 needs a C++ compiler (Debian: apt install g++; macOS: xcode-select --install)"; exit 2; }
	@test -x $(BIN)/python || { echo "making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (a large download) ..."
	@$(PIP) torch
	@echo "compiling the kernels and installing glm5 (a few minutes) ..."
	@$(PIP) -e .
	@touch $@

# What tests and checks need, read out of pyproject.toml: `.[dev]` would compile the kernels again.
$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing what the tests need ..."
	@$(BIN)/python -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'], sep='\n')" \
	  > $(VENV)/dev.txt
	@$(PIP) -r $(VENV)/dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
