# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv. `make test` downloads nothing
# after that. `make test-all` runs the remaining tests as well, and takes hours.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)
PYTEST := $(BIN)/python -m pytest -q --numprocesses logical --dist worksteal
CPP := $(wildcard native/src/*.h native/src/*/*.h native/src/*/*.cpp native/tests/*.h native/tests/*.cpp)

# Tests start Python a hundred times, and each would recompile what is not cached.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all pytest native-tests check format sanitize fuzz releases mutants families bench study
.PHONY: docs pages wheel clean qemu qemu-python

demo: $(VENV)/cli
	$(BIN)/qkv demo

test: $(VENV)/ready
	$(MAKE) --no-print-directory --jobs=2 pytest check

pytest: $(VENV)/ready native-tests
	PYTHONPATH=$(wildcard build/browser) $(PYTEST) -m "not (long or network or vision)"

# The kernel's own tests, on all cores before any test runs.
native-tests: $(VENV)/ready
	$(BIN)/python tests/native_tests.py

# All tests: in addition the whole grid through FlexAttention under Dynamo, the demo's default model from the registry,
# timm and torchvision, pages in Chromium where there is one, the kernel under sanitizers, every family of transformers,
# and some of the planted bugs.
test-all: check sanitize build/vision build/browser native-tests $(VENV)/docs
	PYTHONPATH=build/browser $(PYTEST) -m "not vision"
	PYTHONPATH=build/vision $(BIN)/python -m pytest -q -m vision tests/integrations/torch/test_models.py
	PYTHONPATH=tests $(BIN)/python -m families.sweep --check
	PYTHONPATH=build/browser $(BIN)/python tests/mutants.py --sample 12

# Not in .venv: with a torchvision of another build than torch, transformers cannot be imported.
build/vision: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ --constraint constraints.txt timm torchvision

# Not in .venv: 45 MB, for the tests of one file.
build/browser: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ --constraint constraints.txt playwright greenlet \
		pyee axe-playwright-python

check: $(VENV)/ready
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/typos
	$(BIN)/zizmor --quiet --offline --min-severity medium .github
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 src

format: $(VENV)/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# The kernel's own tests under sanitizers: of memory and arithmetic for all instruction sets of this machine, of threads,
# which no instruction set changes, for the best one.
sanitize: build/sanitize-address build/sanitize-thread

build/sanitize-address: SANITIZE = address,undefined
build/sanitize-thread: SANITIZE = thread
build/sanitize-thread: ISAS = $$($(BIN)/python -c "from qkv.kernels import supported_isas; print(supported_isas()[0])")
build/sanitize-%: $(VENV)/ready FORCE
	$(BIN)/cmake -S . -B $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DQKV_TESTS=ON -DQKV_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build $@
	$(BIN)/ctest --test-dir $@ --parallel 2 --output-on-failure --no-tests=error --tests-regex "^$(or $(ISAS),.*)$$"

# The kernel's own tests on processors that this machine is not, under QEMU: aarch64 with and without dot products, and
# x86-64 with AVX2 and without, some of them; then the instructions of calls on aarch64. Needs qemu-user and
# g++-aarch64-linux-gnu. EMULATED are parts of the names of tests to run on aarch64: all of them by default.
EMULATED ?=
ON_ARM = -L /usr/aarch64-linux-gnu build/qemu-aarch64/native/tests/qkv_tests

# Neither a processor with NEON alone nor one with dot products of int8 alone may take the wider instruction set.
qemu: build/qemu-aarch64 native-tests
	$(BIN)/ctest --test-dir $< --parallel 2 --output-on-failure --no-tests=error
	qemu-aarch64 -cpu cortex-a72 $(ON_ARM) test_step_keys test_few_rows
	qemu-aarch64 -cpu neoverse-n1 $(ON_ARM) test_step_keys test_few_rows
	qemu-x86_64 -cpu Haswell build/native-tests/qkv_tests test_append test_few_rows test_nonfinite.cpp
	qemu-x86_64 -cpu Westmere build/native-tests/qkv_tests test_append test_few_rows test_nonfinite.cpp test_int8
	$(BIN)/python benchmarks/instructions.py

# The contract on the kernel in a Python for aarch64, which this downloads: Debian's and torch, 200 MB.
qemu-python: build/qemu-aarch64
	$(BIN)/python tests/emulated_python.py

build/qemu-aarch64: $(VENV)/ready FORCE
	$(BIN)/cmake -S . -B $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DQKV_TESTS=ON \
		-DCMAKE_TOOLCHAIN_FILE=native/aarch64.cmake "-DQKV_SELECTED=$(subst $(eval) ,;,$(strip $(EMULATED)))"
	$(BIN)/cmake --build $@

FORCE:

# Random calls against the formula, caches against concatenation, damaged files: CASES of each, starting at SEED, and
# SECONDS for files.
CASES ?= 100000
SECONDS ?= 300
SEED ?= 0

fuzz: $(VENV)/fuzz
	PYTHONPATH=tests $(BIN)/python -m fuzz.attention --forward $(CASES) --backward $$(($(CASES) / 10)) --seed $(SEED)
	PYTHONPATH=tests $(BIN)/python -m fuzz.caches --steps $$(($(CASES) / 10)) --seed $(SEED)
	PYTHONPATH=tests $(BIN)/python -m fuzz.files --seconds $(SECONDS)

# Tests on the oldest and the newest release of torch, transformers and matplotlib that pyproject.toml allows: gigabytes.
releases: $(VENV)/ready
	$(BIN)/python tests/releases.py

mutants: $(VENV)/ready
	$(BIN)/python tests/mutants.py

# Every supported model family of transformers; writes their table in docs/transformers.md.
families: $(VENV)/ready
	PYTHONPATH=tests $(BIN)/python -m families.sweep

bench: $(VENV)/peers
	$(BIN)/python benchmarks/kernel.py
	$(BIN)/python benchmarks/grid.py
	$(BIN)/python benchmarks/avx2.py
	$(BIN)/python benchmarks/interleaved.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/rotary.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/one_line.py
	$(BIN)/python benchmarks/llamacpp.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/train_gpt.py
	$(BIN)/python benchmarks/latent.py
	$(BIN)/python benchmarks/sequences.py
	$(BIN)/python benchmarks/paged.py
	$(BIN)/python benchmarks/see.py
	$(BIN)/python benchmarks/page.py

# Each rewrites its page; they take 30, 20, 2, 40 and 5 minutes on two idle cores.
study: $(VENV)/ready
	$(BIN)/python studies/grouped_query/run.py
	$(BIN)/python studies/multi_query_smollm2/run.py
	$(BIN)/python studies/the_review/run.py
	$(BIN)/python studies/windows_smollm2/run.py
	$(BIN)/python studies/scale_out/run.py

# The site, opened by build/docs/index.html. A warning is an error; nothing is fetched.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W -n --keep-going -q -b html docs build/docs

# What is written by code: the page of the command line, and pictures.
pages: $(VENV)/ready
	$(BIN)/python docs/commands.py
	$(BIN)/python docs/pictures.py

# A wheel for Linux on this machine, or with MACHINE=aarch64 for another one, and the source distribution, in dist. The
# same commit and compiler give the same bytes. On macOS and Windows, cibuildwheel builds them.
wheel: $(VENV)/ready
	$(BIN)/python packaging/wheel.py $(if $(MACHINE),--machine $(MACHINE))

clean:
	rm -rf $(VENV) dist build

# The command alone, without what tests and linters need.
$(VENV)/cli: pyproject.toml constraints.txt CMakeLists.txt native/isas.cmake $(wildcard native/src/*.h native/src/*/*)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[cli]'
	touch $@

# Extras of the installed package, which is not built again for them.
$(VENV)/ready: $(VENV)/cli
	$(INSTALL) 'qkv[dev]'
	touch $@

$(VENV)/fuzz: $(VENV)/ready
	$(INSTALL) 'qkv[fuzz]'
	touch $@

# Python 3.11 or later.
$(VENV)/docs: $(VENV)/cli
	$(INSTALL) 'qkv[docs]'
	touch $@

# llama.cpp is built for this machine, in some ten minutes, without what reads pictures.
$(VENV)/peers: $(VENV)/ready
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(INSTALL) 'qkv[bench]'
	touch $@
