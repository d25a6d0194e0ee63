"""The search for images that kill their process: spawned children, and nothing suppressed."""

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

# this file is not a module that a spawned process could import
cloudpickle.register_pickle_by_value(sys.modules[__name__])

IMAGES = [SourceImage(str(index), str(index), 0) for index in range(4)]


class Builder:
    """Stands for a ShardBuilder: some of its images kill the process, others raise."""

    def __init__(self, deadly: set[str], raising: set[str]):
        self.deadly, self.raising = deadly, raising

    def __call__(self) -> "Builder":
        return self

    def make(self, images: list[SourceImage], refused: dict[str, str]) -> Iterator[None]:
        for image in images:
            if image.key in self.raising:
                raise RuntimeError(f"CUDA cannot be used, image {image.key}")
            if image.key in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            yield


@pytest.mark.slow
def test_images_that_kill_their_process_are_found() -> None:
    found = find_crashing_images(IMAGES, Builder({"3"}, set()))  # type: ignore[arg-type]
    assert found == {"3": "the process that read it died (SIGKILL)"}


def test_an_exception_in_the_child_ends_the_search_with_its_text() -> None:
    """Suppressed, it would read as 'no image kills a process', and hide those behind it."""
    with pytest.raises(UserError, match="RuntimeError: CUDA cannot be used, image 1"):
        find_crashing_images(IMAGES, Builder({"3"}, {"1"}))  # type: ignore[arg-type]


def test_the_child_is_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of a process that has initialized CUDA cannot use CUDA, and DALI's import does so."""
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
