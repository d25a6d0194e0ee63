"""Tests of the search for crashing images: children are spawned, exceptions are not suppressed."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from ray import cloudpickle

from precompute.crash_bisect import CrashProbe, find_crashing_images
from precompute.sources import SourceImage
from schemas import UserError

# a spawned process cannot import this file as a module
cloudpickle.register_pickle_by_value(sys.modules[__name__])

IMAGES = [SourceImage(str(index), str(index), 0) for index in range(4)]


class Builder:
    """Fake ShardBuilder: some of its images kill the process, others raise an exception."""

    def __init__(self, deadly: set[str], raising: set[str], error: Exception | None = None):
        self.deadly, self.raising, self.error = deadly, raising, error

    def __call__(self) -> "Builder":
        return self

    def make(self, images: list[SourceImage], refused: dict[str, str]) -> Iterator[None]:
        for image in images:
            if image.key in self.raising:
                raise self.error or RuntimeError(f"CUDA cannot be used, image {image.key}")
            if image.key in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            yield


@pytest.mark.slow
def test_images_that_kill_their_process_are_found() -> None:
    found = find_crashing_images(IMAGES, Builder({"3"}, set()))  # type: ignore[arg-type]
    assert found == {"3": "the process that read it died (SIGKILL)"}


def test_an_exception_in_the_child_ends_the_search_with_its_text() -> None:
    """If it were suppressed, the result would be "no image kills a process", hiding later ones."""
    with pytest.raises(UserError, match="RuntimeError: CUDA cannot be used, image 1"):
        find_crashing_images(IMAGES, Builder({"3"}, {"1"}))  # type: ignore[arg-type]


def test_an_error_without_a_text_does_not_count_as_survival() -> None:
    with pytest.raises(UserError, match="the search for an image that kills its worker failed"):
        find_crashing_images(IMAGES, Builder(set(), {"1"}, UserError("")))  # type: ignore[arg-type]


def test_the_child_is_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's import initializes CUDA, and a fork of a process that has done so cannot use CUDA."""
    methods: list[str | None] = []
    get_context = multiprocessing.get_context

    def remember(method: str | None = None) -> multiprocessing.context.BaseContext:
        methods.append(method)
        return get_context(method)

    monkeypatch.setattr(multiprocessing, "get_context", remember)
    probe = CrashProbe(Builder(set(), set()))  # type: ignore[arg-type]
    try:
        assert probe.survives(IMAGES)
        assert probe.survives(IMAGES[:1]), "one child serves any number of lists"
    finally:
        probe.close()
    assert methods == ["spawn"]


class DyingBuilder(Builder):
    """Dies while it is built, as in a worker with too little memory for its network."""

    def __call__(self) -> Builder:
        os.kill(os.getpid(), signal.SIGKILL)
        return self


def test_no_image_is_at_fault_if_the_child_dies_before_it_reads_one() -> None:
    with pytest.raises(UserError, match=r"before it read any image \(SIGKILL\); no image is rej"):
        find_crashing_images(IMAGES, DyingBuilder(set(), set()))  # type: ignore[arg-type]
