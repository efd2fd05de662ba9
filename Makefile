# make quickstart   environment, train, export, verify, predict, and the table that says what to deploy
# make test         environment and the fast suite
# make check        style, types, import rules
# make test-all     adds slow, browser, fault and soak tests, and other processors
# make test-processors  verifies bundles on emulated processors (needs qemu-user, else it says so and skips)
# make test-web     the static page in Chromium: same pixels, same gates, same labels (needs chromium and npm, else it skips)
# make wheel        dist/ffl_deploy-*.whl, for a machine that has no clone
# make bench        lists the measurements behind the numbers in docs/
# make gpu-kit      packs .gpu/, what a bare machine with a GPU lacks: DATA=CIFAR-100's folder, OFFICIAL=a clone (docs/gpu-acceptance.md)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test check test-all test-processors test-web bench gpu-kit wheel clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The road from images to predictions; what a user installs.
$(VENV)/.ready: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes the first time, about 6 GB with PyTorch for GPUs (much less with TORCH_INDEX=URL, docs/install.md)"
	$(if $(TORCH_INDEX),$(PIP) torch torchvision --index-url $(TORCH_INDEX))
	$(PIP) -e '.[export,predict,cpu]'
	@touch $@

# Everything that the tests use on top.
$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[export,serve,cpu,openvino,tensorrt-rtx,signing,triton,dev]'
	@touch $@

quickstart: $(VENV)/.ready
	$(BIN)/python examples/quickstart.py

# Processes of one thread each: on two cores that is quicker than the other way round. Three, since a third of the time is
# spent waiting for servers and clocks.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser and not fault and not soak and not processor" -n 3 --dist loadfile --max-worker-restart 0

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-all: $(VENV)/.ready-dev
	$(PIP) -e '.[ray]'
	$(BIN)/python -m pytest

# Each test is one process of an emulated CPU, which uses one core.
test-processors: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_processors.py -n 2 --dist loadgroup

# One browser at a time: the thousand pictures keep both cores busy.
test-web: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ffl_deploy/web -m "browser and not slow"

bench: $(VENV)/.ready-dev
	@grep -l __main__ benchmarks/*.py benchmarks/page/*.py
	@echo "each one prints its options with --help"

gpu-kit: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu_acceptance.kit $(if $(DATA),--data $(DATA)) $(if $(OFFICIAL),--official $(OFFICIAL))

wheel: $(BIN)/python
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/ffl_deploy-*.whl

clean:
	rm -rf $(VENV) runs bundles build dist *.egg-info
