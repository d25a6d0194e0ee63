"""Masked views -> encoder: methods, the loop under torchrun, the evaluation of an encoder."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first
