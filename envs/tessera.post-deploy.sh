#!/usr/bin/env bash
# Runs in the project folder inside the new conda environment. Snakemake copies environment definitions elsewhere, so that a relative
# `-r tessera.lock` in tessera.yaml would not be found; the digest (written by `make lock`) makes a new lock a new environment.
set -euo pipefail
echo "ce4882a507343dc9a593ad90dbfad2f23649ce0204a6aea7fc2ea558a0861bc7  envs/tessera.lock" | sha256sum --check --quiet
python -m pip install --require-hashes --requirement envs/tessera.lock
python -m pip install --no-deps --no-build-isolation --editable .
