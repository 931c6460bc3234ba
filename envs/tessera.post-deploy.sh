#!/usr/bin/env bash
# Runs in the project folder inside the new conda environment. Snakemake copies environment definitions elsewhere, so that a relative
# `-r tessera.lock` in tessera.yaml would not be found; the digest (written by `make lock`) makes a new lock a new environment.
set -euo pipefail
echo "4927e014ef53080efecbea502059eac330469a9531e403c36c8f3f05fba17445  envs/tessera.lock" | sha256sum --check --quiet
python -m pip install --require-hashes --requirement envs/tessera.lock
python -m pip install --no-deps --no-build-isolation --editable .
