"""Weighted k-nearest-neighbour classification of frozen features.

The rule of Wu et al. (CVPR 2018, instance discrimination), as DINO and others use it: by cosine
similarity, the k nearest vote with weight exp(similarity / 0.07), and the heaviest class wins.
"""

import torch
from torch import Tensor

from schemas import UserError

TEMPERATURE = 0.07
NEIGHBOURS = (20, 200)
CHUNK = 1024  # queries at a time: 1024 x 126,689 similarities of ImageNet-100 are 519 MB


def check_neighbours(
    neighbours: tuple[int, ...], others: int, option: str = "--neighbours"
) -> None:
    """Raises UserError, under the option's name, unless each can be had of `others` images."""
    if not neighbours or not 1 <= min(neighbours) <= max(neighbours) <= others:
        raise UserError(
            f"{option} {' '.join(map(str, neighbours))}: each must be between 1 and {others}, "
            "the number of images to choose from"
        )


@torch.inference_mode()
def knn_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    *,
    classes: int,
    neighbours: tuple[int, ...] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy for each number of neighbours, 0 to 1.

    Args:
        train: L2-normalised features (N, D) and labels (N,), 0 <= label < classes.
        test: the same of the images to classify; None for leave-one-out: each training image is
            classified by all the others.

    Raises:
        UserError: fewer images than neighbours, or none asked for.
    """
    features, labels = train
    queries, targets = train if test is None else test
    check_neighbours(neighbours, len(features) - (test is None))
    most = max(neighbours)
    correct = dict.fromkeys(neighbours, 0)
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ features.T  # (chunk, N)
        if test is None:
            similarity.diagonal(offset=start).fill_(-torch.inf)  # not its own neighbour
        similarity, nearest = similarity.topk(most, dim=1)  # (chunk, most), descending
        weights, votes = (similarity / temperature).exp(), labels[nearest]
        for k in neighbours:
            score = weights.new_zeros(len(weights), classes)
            score.scatter_add_(1, votes[:, :k], weights[:, :k])
            hits = score.argmax(dim=1) == targets[start : start + CHUNK]
            correct[k] += int(hits.sum())
    return {k: count / len(queries) for k, count in correct.items()}
