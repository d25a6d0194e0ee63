"""Average precision by pycocotools, for COCO and for VOC alike."""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from train.config import autocast
from train.distributed import gather_objects, is_main, rank, together, world_size
from train.evaluate.detection.data import Picture, Pictures
from train.evaluate.detection.model import Detector
from train.evaluate.detection.loader import image_of, masks_of

Found = dict[str, Any]
"""One detection as COCO's result files have it; `bbox` is x, y, width, height."""


def found_in(one: Picture, detections: dict[str, Tensor]) -> list[Found]:
    """What a detector says of a picture, as plain values; a mask is its pixels above one half."""
    boxes = detections["boxes"].cpu().numpy()
    rows = []
    for place, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        row: Found = {
            "image_id": one.number,
            "category_id": int(detections["labels"][place]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(detections["scores"][place]),
        }
        if "masks" in detections:
            pixels = (detections["masks"][place, 0] > 0.5).cpu().numpy().astype(np.uint8)
            row["segmentation"] = coco_mask.encode(np.asfortranarray(pixels))
        rows.append(row)
    return rows


def detect_all(
    detector: Detector, data: Pictures, precision: str, device: torch.device
) -> list[Found]:
    """Detections in every picture, on rank 0; the ranks share the work.

    Raises:
        UserError: a picture is not as its annotation says; on rank 0, the others exit.
    """
    detector.eval()
    own: list[Found] = []
    with together():
        for one in data.pictures[rank() :: world_size()]:
            with autocast(precision, device):
                (detections,) = detector.detect([image_of(one).to(device)])
            own += found_in(one, detections)
    detector.train()
    parts = gather_objects(own)
    return [row for part in parts for row in part] if is_main() else []


def average_precision(data: Pictures, found: list[Found]) -> dict[str, float]:
    """AP, AP50 and AP75 of boxes, and of masks where the set has them: shares, 0 to 1.

    COCO's metric for VOC too: AP over IoU 0.5 to 0.95 with 101 recalls. Ignored objects are crowds
    to it. Nothing found is 0.
    """
    truth = ground_truth(data)
    kinds = {"box": "bbox"} | ({"mask": "segm"} if data.masks else {})
    scores: dict[str, float] = {}
    for name, kind in kinds.items():
        values = [0.0, 0.0, 0.0]
        if found:
            with redirect_stdout(io.StringIO()):  # it prints its tables
                evaluation = COCOeval(truth, truth.loadRes([dict(row) for row in found]), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = [max(0.0, float(value)) for value in evaluation.stats[:3]]
        scores |= dict(zip((f"{name}_AP", f"{name}_AP50", f"{name}_AP75"), values, strict=True))
    return scores


def ground_truth(data: Pictures) -> COCO:
    """The set as pycocotools wants it, from what was read: labels are categories."""
    annotations: list[dict[str, Any]] = []
    for one in data.pictures:
        pixels = masks_of(one) if data.masks else None
        for place, (x0, y0, x1, y1) in enumerate(one.boxes.tolist()):
            row = {
                "id": len(annotations) + 1,
                "image_id": one.number,
                "category_id": int(one.labels[place]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": int(one.ignored[place]),
            }
            if pixels is not None:
                row["segmentation"] = coco_mask.encode(np.asfortranarray(pixels[place]))
                row["area"] = float(pixels[place].sum())
            annotations.append(row)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [
            {"id": one.number, "height": one.size[0], "width": one.size[1]} for one in data.pictures
        ],
        "categories": [{"id": place, "name": name} for place, name in enumerate(data.classes, 1)],
        "annotations": annotations,
    }
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
