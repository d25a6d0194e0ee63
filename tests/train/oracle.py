"""The networks and losses of the methods in numpy float64, as loops over the formulas.

No line is shared with the code under test. Weights are dicts of arrays, with torch's names.
"""

import math

import numpy as np


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def moco_loss(q, key, queue, hard, *, rho, tau):
    """Compute -log of the positive's share of the denominator; hard[i] belong to query i."""
    total = 0.0
    for i in range(len(q)):
        similar = [dot(q[i], key[i])]
        similar += [dot(q[i], n) for n in queue]
        similar += [rho * dot(q[i], n) for n in hard[i]]
        denominator = sum(math.exp(s / tau) for s in similar)
        total -= math.log(math.exp(similar[0] / tau) / denominator)
    return total / len(q)


def simclr_loss(q, k, hard, *, rho, tau, hard_for_keys=False, hard_of_others=False):
    """Compute NT-Xent over all 2 M anchors; hard[i] belong to image i."""
    m = len(q)
    z = [*q, *k]
    total = 0.0
    for i in range(2 * m):
        positive = i + m if i < m else i - m
        denominator = sum(math.exp(dot(z[i], z[j]) / tau) for j in range(2 * m) if j != i)
        if i < m or hard_for_keys:
            for owner in range(m):
                if owner == i % m or hard_of_others:
                    denominator += sum(math.exp(rho * dot(z[i], h) / tau) for h in hard[owner])
        total -= math.log(math.exp(dot(z[i], z[positive]) / tau) / denominator)
    return total / (2 * m)


def features(images, w):
    """Compute `tests.train.ranks.Tiny`: convolution, batch statistics of all images, ReLU, mean."""
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    maps = np.zeros((len(images), 6, 4, 4))
    for row in range(4):
        for column in range(4):
            patch = padded[:, :, row : row + 3, column : column + 3]
            maps[:, :, row, column] = np.einsum("nchw,fchw->nf", patch, w["encoder.conv.weight"])
    maps += w["encoder.conv.bias"][None, :, None, None]
    if "encoder.norm.weight" in w:
        mean = maps.mean(axis=(0, 2, 3), keepdims=True)
        maps = (maps - mean) / np.sqrt(maps.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
        maps = maps * w["encoder.norm.weight"][None, :, None, None]
        maps += w["encoder.norm.bias"][None, :, None, None]
    return np.maximum(maps, 0).mean(axis=(2, 3))


def embed(images, w):
    """Compute features, two linear layers, and normalize to unit length."""
    hidden = np.maximum(features(images, w) @ w["head.0.weight"].T + w["head.0.bias"], 0)
    z = hidden @ w["head.2.weight"].T + w["head.2.bias"]
    return z / np.linalg.norm(z, axis=1, keepdims=True)
