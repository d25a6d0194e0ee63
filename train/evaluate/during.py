"""kNN accuracy of an encoder while it trains."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from train.config import TrainConfig, cache_of
from train.distributed import world_size
from train.features import extract, labelled_pair, plain_views, unmasked
from train.knn import check_neighbours, knn_accuracy
from train.methods import Method


class KnnDuringTraining:
    """Called on all ranks after each epoch; every `knn.epochs` of them it has scores.

    Raises:
        UserError: the data has no labels, or too few images for so many neighbours.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        knn = config.knn
        assert knn.data is not None
        self.train, test = labelled_pair(knn.data, knn.test_data)
        check_neighbours(knn.neighbours, len(self.train) - (test is None), "--knn.neighbours")
        self.cache = cache_of(config.cache, config.cache_gb)
        self.urls = [url for url in (knn.data, knn.test_data) if url is not None]
        for url in self.urls:  # what cannot be read is told now
            plain_views(url, unmasked(config.recipe), device, knn.batch_size, self.cache)

    def __call__(self, method: Method, epoch: int) -> dict[str, float]:
        knn = self.config.knn
        if epoch % knn.epochs and epoch != self.config.epochs:
            return {}
        encoder = of_the_first_rank(method.exported())
        found = [
            extract(
                encoder,
                unmasked(self.config.recipe),
                url,
                self.device,
                knn.batch_size,
                self.config.precision,
                self.cache,
            )
            for url in self.urls
        ]
        accuracy = knn_accuracy(
            found[0],
            found[1] if len(found) > 1 else None,
            classes=len(self.train.classes),
            neighbours=knn.neighbours,
        )
        return {f"knn_{k}": value for k, value in accuracy.items()}


def of_the_first_rank(encoder: nn.Module) -> nn.Module:
    """A copy with rank 0's batch statistics, which are those of the encoder that is written."""
    encoder = copy.deepcopy(encoder)
    if world_size() > 1:
        for buffer in encoder.buffers():
            dist.broadcast(buffer, 0)
    return encoder
