"""Every figure that the README quotes, from one command each."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first
