"""Benchmarks: one command for each figure that the README quotes."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first
