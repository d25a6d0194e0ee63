"""Read shards with tools that do not know this project.

Each function yields what the tool sees of a sample: (label, (height, width) of the image as stored,
(height, width) of the map).
"""

import io
import tarfile
from collections.abc import Iterator

import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from schemas import ShardDataset

Seen = tuple[int, tuple[int, int], tuple[int, int]]
MEMBERS = ["jpg", "saliency.png", "cls"]


def by_tarfile(dataset: ShardDataset) -> Iterator[Seen]:
    for url in dataset.shard_urls:
        with tarfile.open(url, "r:") as tar:
            contents = [tar.extractfile(member).read() for member in tar.getmembers()]
        for image, saliency, label in zip(*[iter(contents)] * 3, strict=True):
            sizes = [Image.open(io.BytesIO(content)).size[::-1] for content in (image, saliency)]
            yield int(label), *sizes


def by_webdataset(dataset: ShardDataset) -> Iterator[Seen]:
    for sample in webdataset.WebDataset(dataset.shard_urls, shardshuffle=False).decode("pil"):
        yield sample["cls"], sample["jpg"].size[::-1], sample["saliency.png"].size[::-1]


def by_dali(dataset: ShardDataset) -> Iterator[Seen]:
    @pipeline_def(batch_size=len(dataset), num_threads=2, device_id=None)
    def graph() -> tuple:
        image, saliency, label = fn.readers.webdataset(
            paths=dataset.shard_urls,
            index_paths=dataset.index_urls,
            ext=MEMBERS,
            missing_component_behavior="error",
        )
        pixels = fn.decoders.image(image, device="cpu", adjust_orientation=False)
        return pixels, fn.decoders.image(saliency, device="cpu"), label

    pipeline = graph()
    pipeline.build()
    images, maps, labels = pipeline.run()
    for place in range(len(dataset)):
        label = int(bytes(labels.at(place)))
        yield label, images.at(place).shape[:2], maps.at(place).shape[:2]


READERS = {"tarfile": by_tarfile, "webdataset": by_webdataset, "dali": by_dali}
