"""The command `detection`: train a detector from an encoder and test it, as in the paper's table.

It uses the trainer of `train`: it runs under torchrun, in bf16, and resumes by the same command.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro

from pipeline.recipes import RECIPES
from schemas import UserError
from schemas.counts import format_count
from schemas.settings import fields_of, flatten, to_plain
from train.config import TrainConfig, resolve_config
from train.distributed import is_main, raise_on_all_ranks, rank, world_size
from train.encoders import compute_digest, load_encoder
from train.evaluate import results
from train.evaluate.detection.coco import read_coco
from train.evaluate.detection.contact_sheet import write_sheet
from train.evaluate.detection.data import DetectionDataset
from train.evaluate.detection.loader import DetectionLoader
from train.evaluate.detection.metric import average_precision, detect_all
from train.evaluate.detection.model import Detector, DetectorConfig
from train.evaluate.detection.voc import read_voc
from train.methods import Method, MethodConfig, Setup
from train.optim import OptimConfig
from train.option_ranges import check_ranges
from train.process_group import pick_device
from train.trainer import TrainingJob, train_job
from train.training_step import prepare_model_

REFERENCE_BATCH, REFERENCE_LR = 16, 0.02
"""detectron2's batch size and learning rate; the rate scales linearly with the batch."""

WARMUP_UNITS = 1


@dataclass(frozen=True)
class Schedule:
    """Iterations in `units` equal parts; the learning rate is divided by 10 at each milestone.

    The trainer treats a part as an epoch: it ends with a checkpoint, and the first one warms up.
    """

    iterations: int
    units: int
    milestones: tuple[int, ...]

    def compute_part(self, iterations: int | None) -> int:
        """Return the iterations of one part, for this total or by default the schedule's own.

        Raises:
            UserError: the total cannot be divided into equal parts.
        """
        total = self.iterations if iterations is None else iterations
        part, remainder = divmod(total, self.units)
        if remainder or part < 1:
            nearest = sorted({max(1, part) * self.units, max(1, part + 1) * self.units})
            raise UserError(
                f"--iterations {total}: the schedule has {self.units} equal parts; take "
                f"{' or '.join(map(str, nearest))}"
            )
        return part


SCHEDULES = {
    # MoCo's configurations for detectron2 (docs/method.md): warm-up of 100 and 1000 iterations
    "voc24k": Schedule(24_000, 240, (180, 220)),
    "1x": Schedule(90_000, 90, (60, 80)),
    "2x": Schedule(180_000, 180, (120, 160)),
    # ours, to compare encoders within an hour
    "short": Schedule(3_000, 30, (20, 26)),
}
SHORT_SIDES = {"voc": tuple(range(480, 801, 32)), "coco": tuple(range(640, 801, 32))}


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Train a detector on VOC 07+12 or COCO from an encoder, and test it."""

    encoder: str = tyro.MISSING
    """Folder of a run, or a file of weights: encoder.safetensors or a foreign checkpoint."""
    dataset: Literal["voc", "coco"] = tyro.MISSING
    """voc: Faster R-CNN, 07+12 trainval to 07 test. coco: Mask R-CNN, train2017 to val2017."""
    root: str = tyro.MISSING
    """Folder with VOCdevkit, or with annotations/ and train2017/."""
    out: str | None = None
    """Folder of the detector's own run; by default detection-DATASET in the encoder's folder."""
    schedule: Literal["1x", "2x", "voc24k", "short"] = "short"
    """Number of iterations and learning rate schedule."""
    iterations: int | None = None
    """Another number of iterations for the same schedule; a multiple of its parts."""
    years: tuple[Literal["2007", "2012"], ...] = ("2007", "2012")
    """voc: years to train on; tests always use 2007."""
    train_annotations: str | None = None
    """coco: path of another annotation file for train2017."""
    test_annotations: str | None = None
    """coco: path of another annotation file for val2017."""
    batch_size: int = 16
    """Global batch: images per step over all processes."""
    short_sides: tuple[int, ...] | None = None
    """Short sides in pixels in training, one drawn for each image; by default detectron2's."""
    test_side: int = 800
    """Short side in pixels in tests."""
    rois: int = 512
    """Proposals per image on which losses are computed (detectron2's number); fewer are
    cheaper."""
    proposals: int = 1000
    """Proposals per image that are classified in tests (detectron2's number); fewer are
    cheaper."""
    workers: int = 4
    """Processes per rank that read images; 0 reads them in the rank itself."""
    seed: int = 0
    """Random seed for new layers, image order and flips."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a GPU, else cpu."""
    rank_timeout: int = 600
    """Seconds after which a process that does not answer counts as dead and the job ends."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the networks; losses are fp32. auto: bf16 if the device supports it."""
    log_steps: int = 20
    """Steps between two log lines."""


def evaluate(options: DetectionOptions) -> dict[str, Any]:
    """Train, test, append a row to results.jsonl beside the encoder, return it; on all ranks.

    Raises:
        UserError: unsuitable encoder, data or options.
    """
    with raise_on_all_ranks():
        metadata, path, train_set, test_set, job = prepare_detection(options)
        if is_main():
            untrainable = len(train_set.images) - len(train_set.select_trainable())
            print(describe_set(train_set, f"{untrainable} without an object to train on"))
            print(describe_set(test_set), flush=True)
    train_job(job)
    cast(DetectionLoader, job.views).close()
    detections = detect_all(cast(Detector, job.method), test_set, job.config.precision, job.device)
    row: dict[str, Any] = {}
    with raise_on_all_ranks():
        if is_main():
            accuracy = average_precision(test_set, detections)
            write_sheet(job.out, test_set, detections)
            row = results.build_row(
                "detection",
                metadata,
                train_set,
                test_set,
                accuracy,
                schedule=options.schedule,
                iterations=job.total_steps,
                batch_size=options.batch_size,
                seed=options.seed,
                precision=job.config.precision,
                **list_network_settings(job.config.method),
            )
            results.append(path.parent, [row])
    return row


def list_network_settings(method: MethodConfig) -> dict[str, Any]:
    """Return the settings of the detector that its accuracy depends on."""
    settings = to_plain(fields_of(method))
    return {name: value for name, value in settings.items() if name not in ("path", "sha256")}


def prepare_detection(
    options: DetectionOptions,
) -> tuple[dict[str, str], Path, DetectionDataset, DetectionDataset, TrainingJob]:
    """Return the encoder's metadata and path, the training and test sets, and the training job."""
    check_ranges(flatten(options))
    device = pick_device(options.device)
    _, metadata, path = load_encoder(options.encoder)
    if is_main():
        results.check_writable(path.parent)
    train_set, test_set = read_sets(options)
    check_sets(train_set, test_set)
    user_config = build_train_config(options, metadata["encoder"], path, train_set)
    config = resolve_config(user_config, device)
    torch.manual_seed(options.seed)
    setup = Setup(
        encoder=config.encoder,
        sync_bn=True,
        batch_size=options.batch_size,
        classes=len(train_set.classes),
        seed=options.seed,
    )
    method: Method = prepare_model_(config.method.build(setup), config, device)
    loader = DetectionLoader(
        train_set,
        batch_size=options.batch_size // world_size(),
        epoch_steps=SCHEDULES[options.schedule].compute_part(options.iterations),
        workers=options.workers,
        device=device,
        rank=rank(),
        world_size=world_size(),
        seed=options.seed,
    )
    job = TrainingJob(
        user_config=user_config,
        config=config,
        device=device,
        data_name=train_set.name,
        data_digest=train_set.digest,
        method=method,
        views=loader,
    )
    return metadata, path, train_set, test_set, job


def build_train_config(
    options: DetectionOptions, encoder: str, path: Path, train_set: DetectionDataset
) -> TrainConfig:
    """Build the options of `train` for a detector, from the encoder's file at `path`."""
    schedule = SCHEDULES[options.schedule]
    method = DetectorConfig(
        path=str(path),
        sha256=compute_digest(path),
        masks=train_set.has_masks,
        short_sides=options.short_sides or SHORT_SIDES[options.dataset],
        test_side=options.test_side,
        rois=options.rois,
        proposals=options.proposals,
    )
    return TrainConfig(
        data=options.root,
        out=options.out or str(path.parent / f"detection-{options.dataset}"),
        method=method,
        recipe=RECIPES["none"],
        encoder=encoder,
        sync_bn=True,
        batch_size=options.batch_size,
        epochs=schedule.units,
        optim=OptimConfig(
            lr=REFERENCE_LR * options.batch_size / REFERENCE_BATCH,
            decay_norms=False,
            schedule="steps",
            milestones=schedule.milestones,
            warmup_epochs=WARMUP_UNITS,
        ),
        seed=options.seed,
        device=options.device,
        rank_timeout=options.rank_timeout,
        precision=options.precision,
        keep_checkpoints=1,
        log_steps=options.log_steps,
    )


def read_sets(options: DetectionOptions) -> tuple[DetectionDataset, DetectionDataset]:
    """Read the training set and the test set."""
    if options.dataset == "voc":
        return (
            read_voc(options.root, options.years, "trainval"),
            read_voc(options.root, ("2007",), "test"),
        )
    return (
        read_coco(options.root, "train2017", options.train_annotations),
        read_coco(options.root, "val2017", options.test_annotations),
    )


def check_sets(train_set: DetectionDataset, test_set: DetectionDataset) -> None:
    """Raise UserError if the test set does not match the training set, or either is unusable."""
    if train_set.classes != test_set.classes:
        raise UserError(f"{test_set.name}: has other classes than {train_set.name}")
    if train_set.has_masks != test_set.has_masks:
        having, lacking = (train_set, test_set) if train_set.has_masks else (test_set, train_set)
        raise UserError(f"{lacking.name}: has no segmentations, but {having.name} has")
    if not train_set.select_trainable():
        raise UserError(f"{train_set.name}: no image has an object to train on")
    if not test_set.is_testable():
        raise UserError(f"{test_set.name}: no image has an object to detect")


def format_result(row: dict[str, Any]) -> str:
    """Format the row as one line for the terminal."""
    scores = ", ".join(f"{name} {value:.2%}" for name, value in row["accuracy"].items())
    return (
        f"trained on {row['data']}, tested on {format_count(row['test_images'], 'image')}: {scores}"
    )


def describe_set(data: DetectionDataset, *notes: str) -> str:
    """Describe the size of a set, and what was left out or changed when it was read."""
    changes = [f"{count} {change}" for change, count in data.odd.items()]
    return f"{data.name}: {', '.join([format_count(len(data.images), 'image'), *notes, *changes])}"
