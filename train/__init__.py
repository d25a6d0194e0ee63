"""Masked views -> encoder: methods, the trainer under torchrun, evaluations of an encoder."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first
