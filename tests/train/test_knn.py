from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from schemas import UserError
from tests.train.runs import config
from train.config import KnnConfig
from train.knn import OnlineKnn, compute_knn_accuracy


def reference(train, labels, test, targets, classes, k, temperature, leave_one_out):
    """Count by hand, one query at a time."""
    hits = 0
    for i, query in enumerate(test):
        similar = [
            (float(query @ other), labels[j])
            for j, other in enumerate(train)
            if not (leave_one_out and i == j)
        ]
        similar.sort(key=lambda pair: -pair[0])
        votes = [0.0] * classes
        for similarity, label in similar[:k]:
            votes[label] += np.exp(similarity / temperature)
        hits += int(np.argmax(votes)) == targets[i]
    return hits / len(test)


def clustered(generator, count):
    labels = generator.integers(0, 3, count)
    features = np.eye(6)[labels] + 0.6 * generator.standard_normal((count, 6))
    return features / np.linalg.norm(features, axis=1, keepdims=True), labels


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_accuracy_equals_a_direct_computation(leave_one_out, monkeypatch):
    monkeypatch.setattr("train.knn.CHUNK", 16)  # chunks end in the middle
    generator = np.random.default_rng(0)
    train, labels = clustered(generator, 70)
    test, targets = (train, labels) if leave_one_out else clustered(generator, 41)
    known = torch.tensor(train), torch.tensor(labels)
    asked = None if leave_one_out else (torch.tensor(test), torch.tensor(targets))
    accuracy = compute_knn_accuracy(known, asked, classes=3, neighbors=(1, 5, 40))
    for k in (1, 5, 40):
        expected = reference(train, labels, test, targets, 3, k, 0.07, leave_one_out)
        assert accuracy[k] == pytest.approx(expected, abs=1e-12)
    assert len(set(accuracy.values())) > 1


def test_an_image_is_not_its_own_neighbor():
    """All labels differ, so each image's own vote would win; all similarities are negative."""
    features = torch.nn.functional.normalize(torch.eye(20) - 1 / 20, dim=1)
    assert compute_knn_accuracy((features, torch.arange(20)), None, classes=20, neighbors=(1,)) == {
        1: 0.0
    }


def test_more_neighbors_than_images_is_refused():
    known = torch.eye(5), torch.arange(5)
    with pytest.raises(UserError, match="5: each must be between 1 and 4"):
        compute_knn_accuracy(known, None, classes=5, neighbors=(5,))
    assert compute_knn_accuracy(known, known, classes=5, neighbors=(5,)) == {5: 1.0}


def test_scores_come_every_few_epochs_and_after_the_last(shards, tmp_path, monkeypatch):
    features = torch.eye(25), torch.arange(25) % 2
    monkeypatch.setattr("train.knn.extract_features", lambda *arguments: features)
    method = SimpleNamespace(exported=torch.nn.Identity)
    knn = KnnConfig(data=shards, neighbors=(1,), epochs=2)
    score = OnlineKnn(config(shards, tmp_path, knn=knn, epochs=5), torch.device("cpu"))
    has_scores = [list(score(method, epoch)) == ["knn_1"] for epoch in range(1, 6)]
    assert has_scores == [False, True, False, True, True]


def accuracy_of_shares(known, asked):
    """Return the accuracies on this rank, and the number of images that it classified itself."""
    classified, topk = [], torch.Tensor.topk

    def counting(similarity, *args, **options):
        classified.append(len(similarity))
        return topk(similarity, *args, **options)

    with patch("train.knn.CHUNK", 16), patch("torch.Tensor.topk", counting):
        accuracy = compute_knn_accuracy(known, asked, classes=3, neighbors=(1, 5, 40))
    return accuracy, sum(classified)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_ranks_share_the_images_to_classify(leave_one_out, two_ranks):
    generator = np.random.default_rng(0)
    known, asked = (tuple(map(torch.tensor, clustered(generator, count))) for count in (70, 41))
    test = None if leave_one_out else asked
    expected, count = accuracy_of_shares(known, test)
    (first, first_count), (second, second_count) = two_ranks(accuracy_of_shares, known, test)
    assert first == second == expected
    # chunks of 16 in turn: 16, 16, 16, 16, 6 or 16, 16, 9
    assert (first_count, second_count) == ((38, 32) if leave_one_out else (25, 16))
    assert first_count + second_count == count


def test_a_rank_may_have_nothing_to_classify(two_ranks):
    known = torch.eye(5), torch.arange(5)
    one = two_ranks(accuracy_of_one_neighbor, known)
    assert one == [{1: 1.0}, {1: 1.0}]


def accuracy_of_one_neighbor(known):
    return compute_knn_accuracy(known, known, classes=5, neighbors=(1,))
