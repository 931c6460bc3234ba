#!/usr/bin/env bash
# Runs in the project folder inside the new conda environment. Snakemake copies environment definitions elsewhere, so that a relative
# `-r tessera.lock` in tessera.yaml would not be found; the digest (written by `make lock`) makes a new lock a new environment.
set -euo pipefail
echo "a8cfc51af5a29e22136ea3546aca8f6794e21e47e8a74cac4d8e5e8f4f389e05  envs/tessera.lock" | sha256sum --check --quiet
python -m pip install --require-hashes --requirement envs/tessera.lock
python -m pip install --no-deps --no-build-isolation --editable .
