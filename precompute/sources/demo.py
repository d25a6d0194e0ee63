"""Source of generated scenes, which needs no files: `--dataset demo`."""

from collections.abc import Iterator

from precompute.demo_scenes import CLASSES, SCENES, choose_label, draw_scene, to_jpeg
from precompute.sources.base import Source, SourceImage


class DemoScenes(Source):
    """Source of the generated scenes; `root` is not used."""

    classes = CLASSES

    def __init__(self, root: str, split: str, download: bool):
        del root, download
        self.split = split

    def images(self) -> Iterator[SourceImage]:
        for index in range(SCENES):
            yield SourceImage(f"scene-{index:05d}", str(index), choose_label(index))

    def read(self, image: SourceImage) -> bytes:
        return to_jpeg(draw_scene(int(image.location), self.split).image)
