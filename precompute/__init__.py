"""Turn source images into shards with saliency maps, as a Ray job."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's folder first
