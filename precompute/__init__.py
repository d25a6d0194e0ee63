"""Source images -> shards with saliency, a Ray job."""
