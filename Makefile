# `make` lists what there is. Every target makes .venv and installs what it needs; a second call finds it done.
PYTHON ?= python3
RUN := .venv/bin/python
ARGS ?=
RACES ?= # options of make emulate for its part under ThreadSanitizer

PACKAGING := setup.py pyproject.toml tools/install.py tools/compile/compilers.txt
TRAIN := .venv/installed-train
TEST := .venv/installed-test
FRAMEWORKS := .venv/installed-frameworks
BENCH := .venv/installed-bench
DOCS := .venv/installed-docs
BROWSER := .venv/installed-browser
SITE := build/site
OUT ?= build/gpu
# Every kernel in every variant; the rest of the suite repeats them with other values, and ThreadSanitizer takes its time.
OP_TESTS = tests/ops/test_batch_norm.py tests/ops/test_softmax_cross_entropy.py tests/ops/test_parameter_update.py
PARALLEL = -n auto --dist worksteal
# Several processes share the cores: threads of BLAS would wait for one another.
test test-fast test-mpi frameworks emulate mutants coverage: export OPENBLAS_NUM_THREADS = 1
unexport PYTHONDONTWRITEBYTECODE # without bytecode every process that a test starts would compile all it imports
CXX_FILES = $(shell find cuda tools/emulator benchmarks -name "*.cu" -o -name "*.cuh" -o -name "*.h" -o -name "*.cpp")

.DEFAULT_GOAL := help
.PHONY: help train test test-fast test-mpi frameworks everything check format compile emulate mutants coverage bench host-cost first-call
.PHONY: features traffic sass notebooks docs docs-check clean
.PHONY: gpu gpu-test gpu-sanitize gpu-bench gpu-dry-run

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(TRAIN) ## train with and without batch norm and compare; options: make train ARGS="--epochs 3"
	.venv/bin/bnkernels train $(ARGS)

test: $(TEST) ## run the whole test suite; says what it skips and why
	$(RUN) -m pytest -q $(PARALLEL) -m "not mpi" $(ARGS)

test-fast: $(TEST) ## a quick look: every second test, without the slow ones
	$(RUN) -m pytest -q $(PARALLEL) -m "not slow and not mpi" --every 2 $(ARGS)

test-mpi: $(TEST) ## ranks under mpiexec: synchronised batch norm, data-parallel training, and every fault that one can have
	BNKERNELS_REQUIRE_MPI=1 $(RUN) -m pytest -q -m mpi $(ARGS) tests/distributed tests/benchmarks/test_distributed.py

frameworks: $(FRAMEWORKS) ## install PyTorch too, and run what compares with it, layers in other frameworks, examples
	$(RUN) -m pytest -q $(PARALLEL) $(ARGS) tests/compat tests/examples tests/nn/test_state_dict.py

everything: test test-mpi check compile emulate mutants coverage frameworks ## all that can be checked without a GPU, whole: more than an hour

check: $(TEST) ## lint and formatting of Python and CUDA, and the mirror rule
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) -m pytest -q tests/test_layout.py

format: $(TEST) ## format Python and CUDA
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

compile: $(TEST) ## compile every kernel for every architecture with the oldest and the newest NVRTC; compare with the baseline
	$(RUN) -m tools.compile $(ARGS)

emulate: $(TEST) ## run the op tests on emulated kernels under AddressSanitizer + UBSan, then ThreadSanitizer
	$(RUN) -m tools.emulator run asan -- -q $(PARALLEL) -m "emulator and not slow" $(ARGS) tests
	$(RUN) -m tools.emulator run tsan -- -q $(PARALLEL) -m "emulator and not slow" $(RACES) $(OP_TESTS) tests/regress/test_tileops_1727.py \
		tests/ops/test_batch_norm_cooperative.py::test_the_order_of_blocks_and_threads_changes_no_bit tests/ops/test_mini_batch.py \
		tests/ops/test_batch_norm_cooperative_groups.py::test_the_order_of_blocks_changes_no_bit_of_groups \
		tests/ops/test_layer_norm.py::test_the_order_of_blocks_and_threads_changes_no_bit \
		tests/ops/test_layer_norm_long_rows.py::test_the_order_of_blocks_and_threads_changes_no_bit \
		tests/ops/test_linear_layer_norm.py::test_the_order_of_blocks_and_threads_changes_no_bit \
		tests/ops/test_linear_batch_norm.py::test_the_order_of_blocks_and_threads_changes_no_bit \
		tests/ops/test_linear_softmax_cross_entropy.py::test_the_order_of_blocks_and_threads_changes_no_bit \
		tests/ops/test_fused_training_multi_block.py::test_the_order_of_blocks_and_threads_changes_no_bit

mutants: $(TEST) ## plant bugs in the kernels: the tests must catch every one
	$(RUN) -m tools.emulator mutants $(ARGS)

coverage: $(TEST) ## lines of cuda/ that the emulated tests of the ops execute
	$(RUN) -m tools.emulator coverage -- $(PARALLEL) $(ARGS)

bench: $(BENCH) ## measure everything that this machine can, beside the rivals; write the results and the tables
	$(RUN) -m benchmarks.everything $(ARGS)

host-cost: $(BENCH) ## time the Python part of a batch-norm call, beside PyTorch's call on one number
	$(RUN) -m benchmarks.ops.host_cost

first-call: $(TEST) ## time what the first call of a new process costs: compilation, and what remains with a warm cache
	$(RUN) -m benchmarks.steps.first_call

features: $(TEST) ## what batch norm can do, and how many tests stand behind each line
	$(RUN) -m tests.features

traffic: $(TEST) ## count the bytes that batch norm moves, on the emulator, against the fewest possible
	$(RUN) -m benchmarks.counts.traffic

sass: $(TEST) ## show the machine code of every kernel: instructions, bytes, registers, occupancy; make sass ARGS="--only 90"
	$(RUN) -m benchmarks.counts.sass $(ARGS)
	$(RUN) -m benchmarks.counts.budget

# Without installing anything, since a GPU machine has its own way: .venv if it has CuPy, else python3, or PYTHON=.
GPU_RUN = $(if $(filter file,$(origin PYTHON)),$(shell $(RUN) -c "import cupy" 2>/dev/null && echo $(RUN) || echo $(PYTHON)),$(PYTHON))

gpu: ## on a GPU machine: facts, tests, sanitizers, benchmarks in 9 minutes, into OUT (build/gpu)
	$(GPU_RUN) -m benchmarks.gpu --out $(OUT) $(ARGS)

gpu-test: ## only the tests of make gpu
	$(GPU_RUN) -m benchmarks.gpu --out $(OUT) --parts test $(ARGS)

gpu-sanitize: ## only compute-sanitizer
	$(GPU_RUN) -m benchmarks.gpu --out $(OUT) --parts sanitize $(ARGS)

gpu-bench: ## only facts and benchmarks
	$(GPU_RUN) -m benchmarks.gpu --out $(OUT) --parts facts,bench $(ARGS)

gpu-dry-run: $(TEST) ## walk all of make gpu on a machine without a GPU, on the emulator: no figures
	$(RUN) -m benchmarks.gpu --dry-run $(ARGS)

notebooks: $(TEST) ## execute the notebooks; keep their outputs: make notebooks ARGS=--overwrite
	$(RUN) -m pytest -q --nbmake $(ARGS) notebooks

docs: $(DOCS) ## build the site from docs/, notebooks/ and the docstrings into build/site; a warning is an error
	rm -rf $(SITE)
	$(RUN) -m sphinx -q -W --keep-going -j auto -c docs -d build/site-doctrees . $(SITE)

docs-check: docs $(BROWSER) ## look at every page in Chromium: links, pictures, errors, widths; screenshots in build/screenshots
	$(RUN) -m tools.site_check $(SITE) build/screenshots

clean: ## remove .venv and everything that is built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps appear only after a whole installation, so a broken one is repeated.
$(TRAIN): $(PACKAGING)
	$(PYTHON) tools/install.py train
	@touch $@

$(FRAMEWORKS): $(PACKAGING)
	$(PYTHON) tools/install.py test torch
	@touch $@ $(TEST) $(TRAIN)

$(BENCH): $(PACKAGING)
	$(PYTHON) tools/install.py test benchmarks
	@touch $@ $(TEST) $(TRAIN) $(FRAMEWORKS)

$(DOCS): $(PACKAGING)
	$(PYTHON) tools/install.py docs
	@touch $@

$(BROWSER): $(PACKAGING)
	$(PYTHON) tools/install.py browser
	@touch $@

$(TEST): $(PACKAGING)
	$(PYTHON) tools/install.py test
	@touch $@ $(TRAIN)
