# Saliency once, offline; masked views on the device; any method on top.
#
# Every target sets up what it needs on first use and passes ARGS="..." on to its command.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# the first Python on the path that starts and is of a version that every package has wheels for
FITS := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python $(FITS) 2>/dev/null && echo $$python && break; done)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

METHOD ?= moco
PROTOCOL ?= knn
RECIPE ?= hp
NPROC ?= 1
SPLIT ?= train
ESTIMATOR ?= $(if $(filter demo,$(DATASET)),spectral,scda)
OUT ?= out/$(or $(DATASET),demo)
RUN ?= out/runs/$(METHOD)-$(RECIPE)
ARGS ?=
STUDY ?= out/study/$(SCALE)
SCALE ?= cpu
TIER ?= 1
SIDE_BY_SIDE ?= $(if $(filter cpu,$(SCALE)),2,0)
# folder of images:folder of shards
TRANSFER := caltech101/train:caltech101-train caltech101/test:caltech101-test \
	flowers102/train:flowers102-train flowers102/test:flowers102-test
STUDY_SETS_cpu := imagenette160/train:train imagenette160/val:val $(TRANSFER)
STUDY_SETS_gpu-small := imagenette2/train:train imagenette2/val:val $(TRANSFER)
STUDY_SETS_gpu := imagenet100/train:train imagenet100/val:val $(TRANSFER)
SALIENCY ?=
# not `auto`: maps in bf16 differ, and runs of one table may come from several machines
STUDY_PRECISION_cpu = $(if $(filter scda,$(ESTIMATOR)),--estimator.precision fp32)
# a free port, and no name of this machine that must be resolved
ALONE := --standalone --local-addr 127.0.0.1
LAUNCH = $(if $(filter 1,$(NPROC)),$(PY) -m train,OMP_NUM_THREADS=1 $(VENV)/bin/torchrun $(ALONE) --nproc-per-node $(NPROC) -m train)

# $(call need,NAME,EXAMPLE): stop with one line when a variable is not given
need = @test -n "$($(1))" || { echo "error: give $(1)=..., for example: $(2)" >&2; exit 2; }

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Make .venv with everything pinned in requirements.txt

$(READY): requirements.txt pyproject.toml
	@$(or $(PYTHON),false) $(FITS) 2>/dev/null || { \
		echo "error: no Python 3.11, 3.12 or 3.13 here; name one by PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.txt)"
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --compile-bytecode -r requirements.txt
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --no-deps -e .
	@touch $(READY)

.PHONY: lock
lock: $(READY) ## Compile requirements.txt anew from the ranges in pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --upgrade \
		--no-emit-index-url --no-header --no-annotate -o requirements.txt pyproject.toml

.PHONY: demo
demo: $(READY) ## Generated scenes -> shards -> plain and masked MoCo v2 -> a table of kNN accuracies
	$(PY) examples/demo.py --out out/demo $(ARGS)

.PHONY: precompute
precompute: $(READY) ## DATASET=folder ROOT=... OUT=...: images -> shards with saliency
	$(call need,DATASET,make precompute DATASET=folder ROOT=photos OUT=out/photos)
	$(PY) -m precompute --dataset $(DATASET) --root "$(ROOT)" --out "$(OUT)" --split $(SPLIT) \
		--estimator $(ESTIMATOR) $(ARGS)

.PHONY: verify
verify: $(READY) ## DATA=...: every byte of the shards against their tables
	$(call need,DATA,make verify DATA=out/photos)
	$(PY) -m schemas verify "$(DATA)" $(ARGS)

.PHONY: info
info: $(READY) ## DATA=...: counts, classes, bytes, rejects by reason, quality of the shuffle
	$(call need,DATA,make info DATA=out/photos)
	$(PY) -m schemas info "$(DATA)"
	$(PY) -m pipeline order --data "$(DATA)" $(ARGS)

.PHONY: preview
preview: $(READY) ## DATA=... RECIPE=hp: a contact sheet of what the network sees
	$(call need,DATA,make preview DATA=out/photos RECIPE=hp)
	$(PY) -m pipeline preview --data "$(DATA)" --recipe $(RECIPE) $(ARGS)

.PHONY: pretrain
pretrain: $(READY) ## DATA=... METHOD=moco RECIPE=hp NPROC=1 RUN=...: shards -> encoder
	$(call need,DATA,make pretrain DATA=out/photos METHOD=moco RECIPE=hp)
	$(LAUNCH) --data "$(DATA)" --out "$(RUN)" --method $(METHOD) --recipe $(RECIPE) $(ARGS)

.PHONY: report
report: $(READY) ## RUN=...: one page with curves, views, configuration and evaluations
	$(PY) -m train.report "$(RUN)" $(ARGS)

.PHONY: evaluate
evaluate: $(READY) ## ENCODER=... DATA=...: PROTOCOL=knn (or linear) accuracy of an encoder
	$(call need,DATA,make evaluate ENCODER=out/runs/moco-hp DATA=out/photos)
	$(call need,ENCODER,make evaluate ENCODER=out/runs/moco-hp DATA=out/photos)
	$(PY) -m train.evaluate $(PROTOCOL) --encoder "$(ENCODER)" --data "$(DATA)" $(ARGS)

.PHONY: bench
bench: bench-loader bench-precompute bench-fidelity bench-train ## DATA=... ROOT=...: all of these

.PHONY: bench-loader
bench-loader: $(READY) ## DATA=...: views/s of the loader beside the usual ways, median and spread
	$(call need,DATA,make bench-loader DATA=out/photos)
	$(PY) -m bench loader --data "$(DATA)" $(ARGS)

.PHONY: bench-remote
bench-remote: $(READY) ## DATA=...: first batch and images/s from S3 at a distance, beside local
	$(call need,DATA,make bench-remote DATA=out/photos)
	$(PY) -m bench remote --data "$(DATA)" $(ARGS)

.PHONY: bench-precompute
bench-precompute: $(READY) ## ROOT=...: the precompute job on a folder of photos, beside its ceilings
	$(call need,ROOT,make bench-precompute ROOT=photos)
	$(PY) -m bench precompute --root "$(ROOT)" $(ARGS)

.PHONY: bench-order
bench-order: $(READY) ## Seconds and memory to plan a batch of 10^9 samples
	$(PY) -m bench order $(ARGS)

.PHONY: bench-kernels
bench-kernels: $(READY) ## Kernels and bytes of a batch of views on a GPU, counted without one
	$(PY) -m bench kernels $(ARGS)

.PHONY: gpu-check
gpu-check: $(READY) ## [DATA=...]: the first session on a GPU: what works there, and how fast
	$(PY) -m bench.gpu_session $(if $(DATA),--data "$(DATA)") $(ARGS)

.PHONY: bench-train
bench-train: $(READY) ## DATA=...: training steps alone, fed by the loader, and the released way
	$(call need,DATA,make bench-train DATA=out/photos)
	$(PY) -m bench train --data "$(DATA)" $(ARGS)

.PHONY: study
study: $(READY) ## ROOT=... [SCALE=cpu] [TIER=1] [SIDE_BY_SIDE=2]: arms of the method on real data, a table
	$(call need,ROOT,make study ROOT=data)
	for set in $(STUDY_SETS_$(SCALE)); do \
		$(PY) -m precompute --dataset folder --root "$(ROOT)/$${set%%:*}" --shard-samples 500 \
			--out "$(STUDY)/shards/$${set##*:}" --name "$$(basename $${set%%/*})" \
			--estimator $(ESTIMATOR) $(STUDY_PRECISION_$(SCALE)) $(SALIENCY) || exit; \
	done
	$(PY) -m examples.study --shards $(STUDY)/shards --out $(STUDY) --scale $(SCALE) --tier $(TIER) \
		--side-by-side $(SIDE_BY_SIDE) $(ARGS)

.PHONY: bench-fidelity
bench-fidelity: $(READY) ## ROOT=...: stored maps against online ones, on crops of photos
	$(call need,ROOT,make bench-fidelity ROOT=photos)
	$(PY) -m bench fidelity --root "$(ROOT)" $(ARGS)

.PHONY: test
test: $(READY) ## All tests; one thread each, as two that wait for each other cost four times as much
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

.PHONY: test-fast
test-fast: $(READY) ## The tests that are not marked slow, for the daily loop
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

.PHONY: lint
lint: $(READY) ## Format, lint, types, shell scripts, Dockerfile
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck .ci/run examples/*.sh examples/*.slurm
	$(VENV)/bin/hadolint Dockerfile

.PHONY: clean
clean: ## Remove .venv and what the demo wrote
	rm -rf $(VENV) out/demo
