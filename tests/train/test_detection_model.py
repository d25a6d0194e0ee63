"""Detection: parts of the network, float32 outputs, one layer4 batch per step, two ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from schemas.precision import autocast
from tests.train.detection_data import odd_coco, options_of, write_coco, write_encoder
from train.encoders import build_encoder, save_encoder
from train.evaluate.detection import command
from train.evaluate.detection.data import AnnotatedImage, DetectionDataset
from train.evaluate.detection.loader import DetectionBatch, FlipDataset, collate
from train.evaluate.detection.metric import average_precision, to_coco_format
from train.evaluate.detection.model import Detector, DetectorConfig
from train.evaluate.export import to_detectron2_name
from train.methods import Setup
from train.training_step import TrainingStep

CPU = torch.device("cpu")
NORM = ("weight", "bias", "running_mean", "running_var")


def detector(masks: bool = True, side: int = 64, rois: int = 8, proposals: int = 8) -> Detector:
    config = DetectorConfig(
        path="", sha256="", masks=masks, short_sides=(side,), test_side=side, rois=rois,
        proposals=proposals,
    )  # fmt: skip
    return config.build(Setup(encoder="resnet18", batch_size=2, classes=2))


def batch_of(data: DetectionDataset) -> DetectionBatch:
    """Return a batch of the first two images."""
    batch = collate(
        [
            FlipDataset(data.select_trainable(), data.has_masks, 0)[place, place]
            for place in range(2)
        ]
    )
    assert isinstance(batch, list)
    return DetectionBatch(*map(list, batch))


def tensors(values: Any) -> Iterator[Tensor]:
    """Return all tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    else:
        for part in values.values() if isinstance(values, dict) else values:
            yield from tensors(part)


def put_out(network: nn.Module, name: str) -> list[Any]:
    """Record all outputs of a part from now on."""
    seen: list[Any] = []
    part = network.get_submodule(name)
    part.register_forward_hook(lambda _part, _inputs, output: seen.append(output))
    return seen


def test_detector_has_the_modules_of_r50_c4_and_the_encoders_weights(tmp_path):
    """The encoder's weights have the names of detectron2's R50-C4, and all of them train."""
    torch.manual_seed(0)
    network, _ = build_encoder("resnet50")
    save_encoder(tmp_path / "encoder.safetensors", network, {"encoder": "resnet50"})
    config = DetectorConfig(path=str(tmp_path), sha256="", masks=True, short_sides=(96,))
    method = config.build(Setup(encoder="resnet50", batch_size=2, classes=80))
    body, heads = method.network.backbone, method.network.roi_heads
    assert torch.equal(body.conv1.weight, network.conv1.weight)
    assert torch.equal(heads.box_head.layer4[2].conv3.weight, network.layer4[2].conv3.weight)
    assert body(torch.randn(1, 3, 64, 64)).shape == (1, 1024, 4, 4)
    maps = heads.box_head(torch.randn(2, 1024, 14, 14))
    assert maps.shape == (2, 2048, 7, 7)
    assert heads.mask_predictor(maps).shape == (2, 81, 14, 14)
    assert heads.box_predictor.cls_score.out_features == 81
    assert method.network.rpn.anchor_generator.num_anchors_per_location() == [15]
    assert all(p.requires_grad for p in method.parameters())
    blocks = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}
    expected = {"stem.conv1.weight", *(f"stem.conv1.norm.{x}" for x in NORM)}
    for stage, count in blocks.items():
        for block in range(count):
            convs = ["conv1", "conv2", "conv3"] + ["shortcut"] * (block == 0)
            for conv in convs:
                expected |= {f"{stage}.{block}.{conv}.weight"}
                expected |= {f"{stage}.{block}.{conv}.norm.{x}" for x in NORM}
    names = {to_detectron2_name(name) for name in network.state_dict()}
    assert {name for name in names if not name.endswith("num_batches_tracked")} == expected
    theirs = resnet50().state_dict()
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in theirs.items() if not k.startswith("fc.")
    }


@pytest.mark.slow
def test_only_backbone_and_heads_compute_in_bf16(tmp_path):
    data = odd_coco(tmp_path)
    # few RoIs, because bf16 is slow on a CPU without instructions for it
    method = detector(rois=4, proposals=2).train()
    inside = [put_out(method.network, name) for name in ("backbone.layer3", "roi_heads.box_head")]
    outside = [
        put_out(method.network, name)
        for name in (
            "backbone", "rpn.head", "rpn.anchor_generator", "rpn", "roi_heads.box_roi_pool",
            "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads",
        )
    ]  # fmt: skip
    batch = batch_of(data)
    with autocast("bf16", CPU):
        losses = method(batch)
        method.eval()
        method.network.roi_heads.score_thresh = 0.0  # it is untrained
        found = method.detect(batch.images[:1])
    assert {x.dtype for x in tensors(inside)} == {torch.bfloat16}
    floats = [x for x in tensors([outside, losses, found]) if x.is_floating_point()]
    assert {x.dtype for x in floats} == {torch.float32}
    assert found[0].keys() == {"boxes", "labels", "scores", "masks"}
    assert len(found[0]["boxes"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_perfect_proposal_is_kept_as_it_is(monkeypatch, precision):
    """Small boxes far from the corner, which bf16 would shift by up to two pixels."""
    boxes = torch.tensor([[601.3, 417.7, 633.9, 441.1], [523.2, 301.4, 570.8, 333.3]])
    method = detector(masks=False, side=120).eval()
    predictor = method.network.roi_heads.box_predictor
    for parameter in predictor.parameters():
        nn.init.zeros_(parameter)
    predictor.cls_score.bias.data[1] = 5.0
    proposals = 120 / 480 * boxes
    monkeypatch.setattr(method.network.rpn, "forward", lambda *_: ([proposals], {}))
    with autocast(precision, CPU):
        (found,) = method.detect([torch.rand(3, 480, 640)])
    one = AnnotatedImage(
        0, Path("a.png"), (480, 640), boxes.numpy(), np.ones(2, np.int64), np.zeros(2, bool),
        np.ones(2, bool), [],
    )  # fmt: skip
    scores = average_precision(
        DetectionDataset("t", [one], ("a", "b"), False), to_coco_format(one, found)
    )
    assert scores["box_AP"] == pytest.approx(1)


def test_masks_take_the_positive_rows_of_the_boxes_maps(tmp_path):
    """layer4 and the extra norm see one batch per step, no second one of objects only."""
    method = detector().train()
    heads = method.network.roi_heads
    maps, asked = put_out(method.network, "roi_heads.box_head"), []
    heads.mask_predictor.register_forward_pre_hook(lambda _part, inputs: asked.extend(inputs))
    for steps in (1, 2):
        method(batch_of(odd_coco(tmp_path / str(steps))))
        counts = [x for k, x in heads.box_head.named_buffers() if k.endswith("batches_tracked")]
        assert [int(count) for count in counts] == [steps] * len(counts)
        rows = torch.tensor([[torch.equal(x, y) for y in maps[-1]] for x in asked[-1]])
        assert rows.any(1).all()
        assert 0 < len(asked[-1]) < len(maps[-1])
    method.eval()
    heads.score_thresh = 0.0
    (found,) = method.detect([torch.rand(3, 96, 128)])
    assert len(maps) == 4  # proposals, and the boxes predicted from them
    assert torch.equal(asked[-1], maps[-1])
    assert found["masks"].shape == (len(found["boxes"]), 1, 96, 128)


# -- two ranks


def step_of(options: command.DetectionOptions) -> tuple[list[str], dict[str, Tensor]]:
    """Make a step on this rank; return its images, and weights and statistics after it."""
    *_, job = command.prepare_detection(options)
    batch = next(iter(job.views))
    TrainingStep(job.method, job.config, job.device)([batch], lr=0.01)
    state = {key: x.detach().clone() for key, x in job.method.state_dict().items()}
    return batch.sample_keys, state


@pytest.mark.slow
def test_two_ranks_make_one_step(tmp_path, two_ranks):
    root = tmp_path / "coco"
    write_coco(root, "train2017")
    write_coco(root, "val2017")
    options = options_of(root, write_encoder(tmp_path / "run"), batch_size=4)
    (keys, state), (other_keys, other_state) = two_ranks(step_of, options)
    assert len(keys) == len(other_keys) == 2
    assert not {*keys} & {*other_keys}
    assert all(torch.equal(x, other_state[key]) for key, x in state.items())
    *_, job = command.prepare_detection(options)
    before = job.method.state_dict()
    moved = {key for key, x in state.items() if not torch.equal(x, before[key])}
    assert {key for key in before if key.endswith(("running_mean", "conv1.weight"))} <= moved
