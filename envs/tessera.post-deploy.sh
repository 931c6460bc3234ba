#!/usr/bin/env bash
# Runs in the project folder inside the new conda environment. Snakemake copies environment definitions elsewhere, so that a relative
# `-r tessera.lock` in tessera.yaml would not be found; the digest (written by `make lock`) makes a new lock a new environment.
set -euo pipefail
echo "4c9f5cee1ac9811a9613642bc9209690bce5a107a65839861d435e849801d4e1  envs/tessera.lock" | sha256sum --check --quiet
python -m pip install --require-hashes --requirement envs/tessera.lock
python -m pip install --no-deps --no-build-isolation --editable .
