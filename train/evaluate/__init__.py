"""Evaluations of a trained encoder; this package imports `train`, never the other way round."""
