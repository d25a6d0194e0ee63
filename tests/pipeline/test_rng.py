"""Random streams: their dependencies and their distributions."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from numpy.random import Philox

from pipeline.rng import PURPOSES, BatchRng, Rng

TRIALS = 20_000


def rng(samples: object = 3, seed: int = 0, epoch: int = 0, purpose="crop", copy: int = 0) -> Rng:
    return Rng(seed, epoch, np.atleast_1d(samples), purpose, copy)  # type: ignore[arg-type]


def test_a_stream_is_numpys_philox() -> None:
    for seed, epoch, sample, copy in ((0, 0, 0, 0), (5, 9, 10**9, 2), (2**63, 2**40, 7, 0)):
        for number, purpose in enumerate(PURPOSES):
            bits = Philox(
                key=np.array([seed, sample], np.uint64),
                counter=np.array([0, copy, number, epoch], np.uint64),
            )
            expected = bits.random_raw(200)
            own = rng(sample, seed, epoch, purpose, copy)
            parts = [own.draw_words(count)[0] for count in (1, 2, 61, 0, 70, 66)]
            assert np.array_equal(np.concatenate(parts), expected)


def test_numbers_depend_on_nothing_but_their_own_stream() -> None:
    samples = np.array([4, 0, 99, 12, 7])
    whole = BatchRng(1, 2, samples).stream("query")
    together = [whole.uniform(5, 3), whole.normal(5, 2, 2), whole.uniform(10, 2)]
    for row in (slice(0, 1), slice(2, 4), slice(4, 5)):
        part = BatchRng(1, 2, samples).stream("query", rows=row)
        count = row.stop - row.start
        assert torch.equal(part.uniform(count, 3), together[0][row])
        assert torch.equal(part.normal(count, 2, 2), together[1][row])
        assert torch.equal(part.uniform(2 * count, 2), together[2][2 * row.start : 2 * row.stop])


def test_every_stream_is_another_one() -> None:
    choices = itertools.product((0, 1), (0, 1), (0, 1), PURPOSES, (0, 1))
    streams = {
        tuple(rng(sample, seed, epoch, purpose, copy).draw_words(4)[0].tolist())
        for sample, seed, epoch, purpose, copy in choices
    }
    assert len(streams) == 16 * len(PURPOSES)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    """Test correlations of adjacent samples, epochs, seeds, purposes and numbers of a stream."""
    samples = np.arange(TRIALS)
    columns = [
        *rng(samples).uniform_on_host(TRIALS, 3).T,
        rng(samples + 1).uniform_on_host(TRIALS),
        rng(samples, epoch=1).uniform_on_host(TRIALS),
        rng(samples, seed=1).uniform_on_host(TRIALS),
        rng(samples, purpose="photometric").uniform_on_host(TRIALS),
        rng(samples, copy=1).uniform_on_host(TRIALS),
    ]
    table = torch.stack(columns).numpy()
    assert table.dtype == np.float64
    assert table.min() >= 0
    assert table.max() < 1
    for column in table:
        counts = np.histogram(column, 50, (0, 1))[0]
        chi = ((counts - TRIALS / 50) ** 2 / (TRIALS / 50)).sum()
        assert chi < 49 + 6 * np.sqrt(98)
    off = np.corrcoef(table) - np.eye(len(table))
    # column 3 is column 0 of the next sample, so it is compared with its neighbor
    assert np.abs(off).max() < 5.5 / TRIALS**0.5


def test_normal_numbers_have_the_moments_of_a_normal() -> None:
    values = rng(np.arange(400)).normal(400, 3, 32, 16).double().flatten()
    count = len(values)
    assert values.isfinite().all()
    assert values.abs().max() < 5.5
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = values.pow(power).std() / count**0.5
        assert abs(values.pow(power).mean() - moment) < 5.5 * spread
    inside = [(values.abs() < limit).double().mean() for limit in (1.0, 2.0, 3.0)]
    for share, expected in zip(inside, (0.682689, 0.954500, 0.997300), strict=True):
        assert abs(share - expected) < 5.5 * (expected * (1 - expected) / count) ** 0.5
    pairs = values.view(-1, 2)
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 5.5 / len(pairs) ** 0.5


def test_normal_numbers_are_the_quantiles_of_their_bits() -> None:
    from scipy.special import ndtri

    words = rng().draw_words(8).astype("<u8")
    whole = words.view("<i4").astype(np.int64) >> 8
    expected = ndtri((whole + 2**23 + 0.5) / 2**24)
    np.testing.assert_allclose(rng().normal(1, 16).numpy(), expected, rtol=2e-5, atol=2e-6)


def test_the_numbers_never_change() -> None:
    own = rng(np.array([0, 5, 10**12]), seed=11, epoch=3)
    digest = hashlib.sha256(own.uniform_on_host(3, 101).numpy().astype("<f8").tobytes()).hexdigest()
    assert digest[:16] == "7ea00d664a7cc175"


@pytest.mark.gpu
def test_a_gpu_gets_the_numbers_of_the_host() -> None:
    cpu, cuda = (BatchRng(1, 2, np.arange(9), device).stream("fill") for device in ("cpu", "cuda"))
    assert torch.equal(cpu.uniform(9, 50), cuda.uniform(9, 50).cpu())
    torch.testing.assert_close(cpu.normal(9, 50), cuda.normal(9, 50).cpu())
