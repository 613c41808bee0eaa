# Two commands: `make quickstart` (from nothing to a report) and `make test` (every test).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help quickstart test check format bench bench-memory bench-data bench-packing bench-exports bench-anchors scale soak vit-l cifar10 campaign clean

help:
	@echo "make quickstart   install, pack digits, train with OAT on two processes (or every GPU), evaluate, report"
	@echo "make test         every test, on real processes, two files at a time (OAT_TEST_DATA=FOLDER adds those on real photos)"
	@echo "make check        format, lint and types"
	@echo "make format       mend format and lint"
	@echo "make bench        our training step and loss against bare PyTorch; global anchors against each rank's own"
	@echo "make bench-memory what DDP and ZeRO-1, 2, 3 hold of ViT-L-16 on two CPU processes, against theory"
	@echo "make bench-data   our loader against webdataset, ImageFolder, streaming, DALI; decoding alone (BENCH_FLAGS=...)"
	@echo "make bench-packing   pack against tar, verify against sha256sum"
	@echo "make bench-exports SPLIT=FOLDER   many networks exported, and how far each export is from the network"
	@echo "make bench-anchors DATA=FOLDER   training and testing with OAT, and with class anchors, over cross-entropy"
	@echo "make scale        an index of 100 million samples: opening it, planning over it, and the memory of both"
	@echo "make soak SPLIT=FOLDER   the loader over many epochs, and whether its memory grows"
	@echo "make vit-l        ViT-L-16 takes steps under ZeRO-2 and ZeRO-3 on two CPU processes"
	@echo "make campaign     faults at random moments, real ones, and whether every run ends as if nothing had happened (root)"
	@echo "make cifar10 CIFAR10=FOLDER   the README's CIFAR-10 runs, from a folder of train/ and test/ images"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.12 (or another)"; exit 1; }
	@echo "installing into $(VENV) (PyTorch for Linux brings CUDA: about 6 GB, some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

quickstart: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/quickstart.sh

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/step.py
	$(BIN)/torchrun --standalone --nproc_per_node 2 benchmarks/scope.py

bench-memory: $(READY)
	$(BIN)/python benchmarks/memory.py

bench-data: $(READY)
	$(BIN)/python benchmarks/data.py $(BENCH_FLAGS)

bench-packing: $(READY)
	$(BIN)/python benchmarks/packing.py $(BENCH_FLAGS)

bench-exports: $(READY)
	@test -n "$(SPLIT)" || { echo "error: say which packed split: make bench-exports SPLIT=packed/photos/test"; exit 1; }
	$(BIN)/python benchmarks/exports.py "$(SPLIT)"

bench-anchors: $(READY)
	@test -n "$(DATA)" || { echo "error: say which packed set: make bench-anchors DATA=packed/cifar10"; exit 1; }
	$(BIN)/python benchmarks/anchors.py "$(DATA)" $(BENCH_FLAGS)

scale: $(READY)
	$(BIN)/python benchmarks/scale.py $(BENCH_FLAGS)

soak: $(READY)
	@test -n "$(SPLIT)" || { echo "error: say which packed split: make soak SPLIT=packed/cifar10/train"; exit 1; }
	$(BIN)/python benchmarks/soak.py "$(SPLIT)" $(BENCH_FLAGS)

vit-l: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh benchmarks/vit_l.sh

campaign: $(READY)
	$(BIN)/python tests/campaign.py $(CAMPAIGN_FLAGS)

cifar10: $(READY)
	@test -n "$(CIFAR10)" || { echo "error: say where the images are: make cifar10 CIFAR10=FOLDER"; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/cifar10.sh "$(CIFAR10)"

# Caches only: packed sets and runs are yours.
clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
