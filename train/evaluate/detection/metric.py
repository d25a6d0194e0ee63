"""Average precision by pycocotools, for both COCO and VOC."""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from schemas.precision import autocast
from train.distributed import gather_objects, is_main, raise_on_all_ranks, rank, world_size
from train.evaluate.detection.data import AnnotatedImage, DetectionDataset
from train.evaluate.detection.loader import decode_masks, load_image
from train.evaluate.detection.model import Detector

Detection = dict[str, Any]
"""One detection in the format of COCO's result files; `bbox` is x, y, width, height."""


def to_coco_format(image: AnnotatedImage, detections: dict[str, Tensor]) -> list[Detection]:
    """Convert a detector's output for an image; a mask consists of its pixels above one half."""
    boxes = detections["boxes"].cpu().numpy()
    rows = []
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        row: Detection = {
            "image_id": image.image_id,
            "category_id": int(detections["labels"][index]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(detections["scores"][index]),
        }
        if "masks" in detections:
            pixels = (detections["masks"][index, 0] > 0.5).cpu().numpy().astype(np.uint8)
            row["segmentation"] = coco_mask.encode(np.asfortranarray(pixels))
        rows.append(row)
    return rows


def detect_all(
    detector: Detector, data: DetectionDataset, precision: str, device: torch.device
) -> list[Detection]:
    """Detect objects in every image; ranks share the work, rank 0 returns all detections.

    Raises:
        UserError: an image does not match its annotation; on rank 0, the others exit.
    """
    detector.eval()
    own: list[Detection] = []
    with raise_on_all_ranks():
        for image in data.images[rank() :: world_size()]:
            with autocast(precision, device):
                (detections,) = detector.detect([load_image(image).to(device)])
            own += to_coco_format(image, detections)
    detector.train()
    parts = gather_objects(own)
    return [row for part in parts for row in part] if is_main() else []


def average_precision(data: DetectionDataset, detections: list[Detection]) -> dict[str, float]:
    """Compute AP, AP50 and AP75, 0 to 1, of boxes and, if the dataset has masks, of masks.

    VOC is scored by COCO's metric too: AP over IoU 0.5 to 0.95 with 101 recalls. Ignored objects
    are passed to it as crowds. Without detections all scores are 0.
    """
    truth = build_ground_truth(data)
    kinds = {"box": "bbox"} | ({"mask": "segm"} if data.has_masks else {})
    scores: dict[str, float] = {}
    for name, kind in kinds.items():
        values = [0.0, 0.0, 0.0]
        if detections:
            with redirect_stdout(io.StringIO()):  # pycocotools prints its tables
                loaded = truth.loadRes([dict(row) for row in detections])
                evaluation = COCOeval(truth, loaded, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = [max(0.0, float(value)) for value in evaluation.stats[:3]]
        scores |= dict(zip((f"{name}_AP", f"{name}_AP50", f"{name}_AP75"), values, strict=True))
    return scores


def build_ground_truth(data: DetectionDataset) -> COCO:
    """Convert a dataset for pycocotools; labels become categories."""
    annotations: list[dict[str, Any]] = []
    for image in data.images:
        pixels = decode_masks(image) if data.has_masks else None
        for index, (x0, y0, x1, y1) in enumerate(image.boxes.tolist()):
            row = {
                "id": len(annotations) + 1,
                "image_id": image.image_id,
                "category_id": int(image.labels[index]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": int(image.ignored[index]),
            }
            if pixels is not None:
                row["segmentation"] = coco_mask.encode(np.asfortranarray(pixels[index]))
                row["area"] = float(pixels[index].sum())
            annotations.append(row)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [
            {"id": image.image_id, "height": image.size[0], "width": image.size[1]}
            for image in data.images
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(data.classes, 1)],
        "annotations": annotations,
    }
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
