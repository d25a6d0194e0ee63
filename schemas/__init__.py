"""The on-disk format: samples, shards and tables. Imports no torch, no DALI, no Ray."""

from schemas.dataset import ShardDataset
from schemas.errors import FormatError, UserError
from schemas.saliency import SaliencyMap
from schemas.sample import Sample
from schemas.tables import DatasetCard, Reject, ShardRow
from schemas.verify import VerifyReport
from schemas.verify_record import Problem
from schemas.writer import write_dataset

__all__ = [
    "DatasetCard",
    "FormatError",
    "Problem",
    "Reject",
    "SaliencyMap",
    "Sample",
    "ShardDataset",
    "ShardRow",
    "UserError",
    "VerifyReport",
    "write_dataset",
]
