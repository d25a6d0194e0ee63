"""The command `detection`: train a detector from an encoder and test it, as in the paper's table.

The trainer is `train`'s: under torchrun, in bf16, resumed by the same command.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro

from pipeline.recipes import RECIPES
from schemas import UserError
from train.config import TrainConfig, resolved
from train.distributed import is_main, rank, together, world_size
from train.encoders import digest, load_encoder
from train.evaluate import results
from train.evaluate.detection.coco import read_coco
from train.evaluate.detection.data import Pictures
from train.evaluate.detection.metric import average_precision, detect_all
from train.evaluate.detection.model import Detector, DetectorConfig
from train.evaluate.detection.show import write_sheet
from train.evaluate.detection.views import DetectionViews
from train.evaluate.detection.voc import read_voc
from train.job import Job
from train.loop import train_job
from train.methods import Method, Setup
from train.optim import OptimConfig
from train.session import pick_device
from train.step import placed

REFERENCE_BATCH, REFERENCE_LR = 16, 0.02
"""detectron2's; the rate grows in proportion to the batch."""

WARMUP_UNITS = 1


@dataclass(frozen=True)
class Schedule:
    """Iterations in `units` equal parts, the rate a tenth from each of `drops` on.

    A part is what the loop calls an epoch: a checkpoint, and the first one warms up.
    """

    iterations: int
    units: int
    drops: tuple[int, ...]

    def part(self, iterations: int | None) -> int:
        """Iterations of a part, where there are so many in all; by default the schedule's own.

        Raises:
            UserError: they do not come in equal parts.
        """
        asked = self.iterations if iterations is None else iterations
        part, rest = divmod(asked, self.units)
        if rest or part < 1:
            nearest = sorted({max(1, part) * self.units, max(1, part + 1) * self.units})
            raise UserError(
                f"--iterations {asked}: the schedule has {self.units} equal parts; take "
                f"{' or '.join(map(str, nearest))}"
            )
        return part


SCHEDULES = {
    # MoCo's configurations for detectron2 (docs/method.md): warm-up 100 and 1000 iterations
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
    """A run's folder, or a file of weights: encoder.safetensors or a checkpoint from elsewhere."""
    dataset: Literal["voc", "coco"] = tyro.MISSING
    """voc: Faster R-CNN, 07+12 trainval to 07 test. coco: Mask R-CNN, train2017 to val2017."""
    root: str = tyro.MISSING
    """The folder with VOCdevkit, or with annotations/ and train2017/."""
    out: str | None = None
    """The detector's own folder; detection-DATASET in the encoder's when not given."""
    schedule: Literal["1x", "2x", "voc24k", "short"] = "short"
    """Of iterations and rate."""
    iterations: int | None = None
    """Another length for the same schedule; a multiple of its parts."""
    years: tuple[Literal["2007", "2012"], ...] = ("2007", "2012")
    """voc: which years are trained on; tests are of 2007."""
    train_annotations: str | None = None
    """coco: the path of another annotation file for train2017."""
    test_annotations: str | None = None
    """coco: the path of another annotation file for val2017."""
    batch_size: int = 16
    """Pictures a step, of all processes together."""
    short_sides: tuple[int, ...] | None = None
    """Pixels of the short side in training, one drawn for each picture; detectron2's by default."""
    test_side: int = 800
    """Pixels of the short side in tests."""
    rois: int = 512
    """Proposals of a picture that losses are taken on; detectron2's. Fewer cost less."""
    proposals: int = 1000
    """Proposals of a picture that are classified in tests; likewise."""
    workers: int = 4
    """Processes that read pictures, for each rank; 0 for none."""
    seed: int = 0
    """Of new layers, order and flips."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the networks; losses are fp32."""
    log_steps: int = 20
    """Steps between two log lines."""


def evaluate(options: DetectionOptions) -> dict[str, Any]:
    """Train, test, append a row to results.jsonl beside the encoder, return it; on all ranks.

    Raises:
        UserError: encoder, data or options do not fit.
    """
    with together():
        metadata, path, known, asked, job = prepare(options)
        if is_main():
            for data in (known, asked):
                print(f"{data.name}: {len(data.pictures)} pictures, {told(data)}", flush=True)
    train_job(job)
    cast(DetectionViews, job.views).close()
    found = detect_all(cast(Detector, job.method), asked, job.config.precision, job.device)
    row: dict[str, Any] = {}
    with together():
        if is_main():
            accuracy = average_precision(asked, found)
            write_sheet(job.out, asked, found)
            row = results.row_of(
                "detection",
                metadata,
                known,
                asked,
                accuracy,
                schedule=options.schedule,
                iterations=job.total_steps,
                batch_size=options.batch_size,
                seed=options.seed,
            )
            results.append(path.parent, [row])
    return row


def prepare(
    options: DetectionOptions,
) -> tuple[dict[str, str], Path, Pictures, Pictures, Job]:
    """Read the sets and build what the loop trains."""
    device = pick_device(options.device)
    _, metadata, path = load_encoder(options.encoder)
    known, asked = read_sets(options)
    check_sets(known, asked)
    given = training(options, metadata["encoder"], path, known)
    config = resolved(given, device)
    torch.manual_seed(options.seed)
    setup = Setup(
        encoder=config.encoder,
        sync_bn=True,
        batch_size=options.batch_size,
        classes=len(known.classes),
        seed=options.seed,
    )
    built: Method = placed(config.method.build(setup), config, device)
    views = DetectionViews(
        known,
        batch_size=options.batch_size // world_size(),
        unit=SCHEDULES[options.schedule].part(options.iterations),
        workers=options.workers,
        device=device,
        rank=rank(),
        world_size=world_size(),
        seed=options.seed,
    )
    job = Job(
        given=given,
        config=config,
        device=device,
        data_name=known.name,
        data_digest=known.digest,
        method=built,
        views=views,
    )
    return metadata, path, known, asked, job


def training(options: DetectionOptions, encoder: str, path: Path, known: Pictures) -> TrainConfig:
    """The options of `train` for a detector on `known`, from the encoder's file at `path`."""
    schedule = SCHEDULES[options.schedule]
    method = DetectorConfig(
        path=str(path),
        sha256=digest(path),
        masks=known.masks,
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
            drop_epochs=schedule.drops,
            warmup_epochs=WARMUP_UNITS,
        ),
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        keep_checkpoints=1,
        log_steps=options.log_steps,
    )


def read_sets(options: DetectionOptions) -> tuple[Pictures, Pictures]:
    """What is trained and what is tested on."""
    if options.dataset == "voc":
        return (
            read_voc(options.root, options.years, "trainval"),
            read_voc(options.root, ("2007",), "test"),
        )
    return (
        read_coco(options.root, "train2017", options.train_annotations),
        read_coco(options.root, "val2017", options.test_annotations),
    )


def check_sets(known: Pictures, asked: Pictures) -> None:
    """Raises UserError where what is tested is not what is trained."""
    if known.classes != asked.classes:
        raise UserError(f"{asked.name}: has other classes than {known.name}")
    if known.masks != asked.masks:
        having, lacking = (known, asked) if known.masks else (asked, known)
        raise UserError(f"{lacking.name}: has no segmentations, but {having.name} has")
    if not known.trainable():
        raise UserError(f"{known.name}: no picture has an object to train on")
    if not asked.testable():
        raise UserError(f"{asked.name}: no picture has an object to be found")


def sentence(row: dict[str, Any]) -> str:
    """The row for a person."""
    scores = ", ".join(f"{name} {value:.2%}" for name, value in row["accuracy"].items())
    return f"trained on {row['data']}, tested on {row['test_images']} pictures: {scores}"


def told(data: Pictures) -> str:
    """What was left out or changed, in words."""
    left = len(data.pictures) - len(data.trainable())
    parts = [f"{left} without an object to train on"]
    return ", ".join(parts + [f"{count} {what}" for what, count in data.odd.items()])
