"""Processes of their own that need not import torch and Snakemake again: each is a fork of a server that has."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
"""Unlike forks of the test process, these know nothing of its threads and of what tests changed in it."""
FORKS.set_forkserver_preload(
    [
        "snakemake.cli",
        "snakemake.report.html_reporter",
        "smart_open",
        "pandas",
        "pulp",
        "hypothesis",
        "tessera.cli",
        "tessera.data.check",
        "tessera.data.datamodule",
        "tessera.spec.planning",
        "tessera.training.train",
        "tests.malformed.project",
    ]
)
"""One list for all tests: a test process has one such server, and it imports what the last call of this named."""
