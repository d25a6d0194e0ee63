"""Source images -> shards with saliency, a Ray job."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first
