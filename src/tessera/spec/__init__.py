"""The complete, validated description of an experiment, resolved from parts. Nothing downstream reads anything else."""
