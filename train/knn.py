"""Weighted k-nearest-neighbor classification of frozen features, also while an encoder trains.

The rule of Wu et al. (CVPR 2018, instance discrimination), used by DINO and others: the k nearest
neighbors by cosine similarity vote with weight exp(similarity / 0.07), and the class with the
largest total wins.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schemas import UserError
from train.config import TrainConfig, make_cache
from train.distributed import rank, world_size
from train.features import extract_features, open_eval_views, open_labeled_pair, remove_masks
from train.methods import Method

TEMPERATURE = 0.07
CHUNK = 1024  # queries at a time: 1024 x 126,689 similarities of ImageNet-100 are 519 MB


def check_neighbors(
    neighbors: tuple[int, ...], available: int, option: str = "--neighbors"
) -> None:
    """Raise UserError, under the option's name, unless each lies between 1 and `available`."""
    if not neighbors or not 1 <= min(neighbors) <= max(neighbors) <= available:
        raise UserError(
            f"{option} {' '.join(map(str, neighbors))}: each must be between 1 and {available}, "
            "the number of images to choose from"
        )


@torch.inference_mode()
def compute_knn_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    *,
    classes: int,
    neighbors: tuple[int, ...],
) -> dict[int, float]:
    """Compute the top-1 accuracy, 0 to 1, for each number of neighbors.

    Ranks share the images to classify, in the chunks that a single process takes, so it returns the
    same accuracies. All ranks must call it with the same images.

    Args:
        train: L2-normalized features (N, D) and labels (N,), 0 <= label < classes.
        test: the same for the images to classify; None for leave-one-out: each training image is
            classified by all others.

    Raises:
        UserError: there are fewer images than neighbors, or `neighbors` is empty.
    """
    features, labels = train
    queries, targets = train if test is None else test
    check_neighbors(neighbors, len(features) - (test is None))
    most = max(neighbors)
    correct = torch.zeros(len(neighbors), dtype=torch.long, device=queries.device)
    for start in range(rank() * CHUNK, len(queries), world_size() * CHUNK):
        similarity = queries[start : start + CHUNK] @ features.T  # (chunk, N)
        if test is None:
            similarity.diagonal(offset=start).fill_(-torch.inf)  # an image is not its own neighbor
        similarity, nearest = similarity.topk(most, dim=1)  # (chunk, most), descending
        weights, votes = (similarity / TEMPERATURE).exp(), labels[nearest]
        for number, k in enumerate(neighbors):
            score = weights.new_zeros(len(weights), classes)
            score.scatter_add_(1, votes[:, :k], weights[:, :k])
            hits = score.argmax(dim=1) == targets[start : start + CHUNK]
            correct[number] += hits.sum()
    if world_size() > 1:
        dist.all_reduce(correct)
    counts = correct.tolist()
    return {k: count / len(queries) for k, count in zip(neighbors, counts, strict=True)}


class OnlineKnn:
    """kNN accuracy of an encoder while it trains.

    The trainer calls it on all ranks after each epoch; it returns scores every `knn.epochs` epochs
    and after the last one.

    Raises:
        UserError: the data has no labels, or too few images for so many neighbors.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        knn = config.knn
        assert knn.data is not None
        self.train_set, test_set = open_labeled_pair(knn.data, knn.test_data)
        available = len(self.train_set) - (test_set is None)
        check_neighbors(knn.neighbors, available, "--knn.neighbors")
        self.cache = make_cache(config.cache, config.cache_gb)
        self.urls = [url for url in (knn.data, knn.test_data) if url is not None]
        for url in self.urls:  # report unreadable data now, not after the first epoch
            open_eval_views(url, remove_masks(config.recipe), device, knn.batch_size, self.cache)

    def __call__(self, method: Method, epoch: int) -> dict[str, float]:
        knn = self.config.knn
        if epoch % knn.epochs and epoch != self.config.epochs:
            return {}
        encoder = copy_with_statistics_of_rank_0(method.exported())
        features = [
            extract_features(
                encoder,
                remove_masks(self.config.recipe),
                url,
                self.device,
                knn.batch_size,
                self.config.precision,
                self.cache,
            )
            for url in self.urls
        ]
        accuracy = compute_knn_accuracy(
            features[0],
            features[1] if len(features) > 1 else None,
            classes=len(self.train_set.classes),
            neighbors=knn.neighbors,
        )
        return {f"knn_{k}": value for k, value in accuracy.items()}


def copy_with_statistics_of_rank_0(encoder: nn.Module) -> nn.Module:
    """Copy the encoder with rank 0's batch statistics, which are those that get exported."""
    encoder = copy.deepcopy(encoder)
    if world_size() > 1:
        for buffer in encoder.buffers():
            dist.broadcast(buffer, 0)
    return encoder
