"""Saliency estimators: the protocol, the implementations and the registry of names.

To add an estimator, write one file and add its options to `options.py`.
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
