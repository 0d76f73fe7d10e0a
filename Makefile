# make demo: a virtual environment, then real text from the model in ckpts/ on two ranks.   make test, make lint, make bench.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format bench

demo: $(VENV)/ready
	$(BIN)/torchrun --standalone --nproc_per_node=2 tools/example.py -m ./ckpts -t ckpts/tokenizer.model

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/torchrun --standalone --nproc_per_node=4 -m benchmarks.layer.bench_moe_layer
	$(BIN)/python -m benchmarks.model.bench_loading --size_gb 1

# torch first, in the version of constraints.txt: fairscale is built against it, without a build environment of its own
# that would fetch another torch.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	$(BIN)/python -m mixtralkit.ops.cpu.build
	touch $@
