# `make demo`: environment, data, training, evaluation, table. `make test`: the tests. Afterwards `. .venv/bin/activate` for
# plain `snakemake`, `tessera` and `pytest`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= 3.11
CORES ?= $(shell nproc)
PYTEST ?=
# Test processes; each runs its networks on one thread.
TESTERS ?= 2

UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Snakemake and uv keep a cache below HOME and stop where they may not write it.
ifeq ($(shell test -w "$(HOME)" && echo writable),)
export XDG_CACHE_HOME ?= $(CURDIR)/.snakemake/cache
endif

DEMO := results/mask2former_swin
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	--no-annotate --custom-compile-command "make lock" $(LOCKFLAGS)

PACKAGES := slurm-wlm munge chromium texlive-latex-recommended poppler-utils

.PHONY: demo test tensorrt packages lint lock unlock clean

demo: .venv/.run
	snakemake --cores $(CORES) all results/tables/demo.md
	@echo
	@cat results/tables/demo.md
	@echo
	@echo "Pictures: $(DEMO)/inference/    Training curve: $(DEMO)/metrics.csv    All numbers: results/tables/demo.csv"

test: .venv/.dev
	pytest --numprocesses $(TESTERS) --dist loadfile $(PYTEST)

# For engines, on a machine with an NVIDIA GPU. Not in the locks: NVIDIA's package fetches the libraries itself.
tensorrt: .venv/.run
	$(UV) pip install --python $(BIN)/python --editable '.[tensorrt]'

# Debian's: a real SLURM, a browser for the report, LaTeX for the tables. Without them their tests are left out.
packages:
	@test "$$(id -u)" = 0 || { echo "packages: needs root" >&2; exit 1; }
	dpkg -s $(PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; }

lint: .venv/.dev
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow rules
	snakemake --lint

# New versions: make lock LOCKFLAGS=--upgrade
lock: | $(filter .uv/bin/uv,$(UV))
	for name in tessera dev tensorrt10 tensorrt11; do $(COMPILE) envs/$$name.in --output-file envs/$$name.lock; done
	sed -i "s/^echo \"[0-9a-f]*  /echo \"$$(sha256sum envs/tessera.lock | cut -d' ' -f1)  /" envs/tessera.post-deploy.sh

# After a kill -9 of snakemake; make sure first that no other snakemake runs in this folder.
unlock: .venv/.run
	snakemake --unlock

# Environment and caches only: results, checkpoints and data stay.
clean:
	rm -rf .venv .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis .snakemake/log
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python: | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --python $(PYTHON) .venv

# `install` rather than `sync`: what the tests need may stay when a run needs less. Compiled once here, because every stage starts processes of its own,
# which otherwise would compile all they import again wherever they may not write beside it.
.venv/.run: envs/tessera.lock pyproject.toml | .venv/bin/python
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes --requirement envs/tessera.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

.venv/.dev: envs/dev.lock .venv/.run
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes --requirement envs/dev.lock
	touch $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv
