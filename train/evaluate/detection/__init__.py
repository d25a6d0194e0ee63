"""Detection and instance segmentation from a trained encoder."""
