"""Images -> saliency maps: one protocol, a registry.

A new estimator is one file, and its options in `options.py`.
"""

from precompute.estimators.base import Estimator
from precompute.estimators.options import (
    ESTIMATORS,
    EstimatorOptions,
    FunctionOptions,
    ScdaOptions,
    SpectralOptions,
)

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "EstimatorOptions",
    "FunctionOptions",
    "ScdaOptions",
    "SpectralOptions",
]
