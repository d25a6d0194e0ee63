"""Small datasets and short runs that several test files share."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train.trainer
from pipeline.recipes import RECIPES
from schemas import Sample, write_dataset
from train.config import TrainConfig
from train.methods import (
    ADIOSConfig,
    MaskCoConfig,
    MethodConfig,
    MoCoConfig,
    Setup,
    SimCLRConfig,
    SupervisedConfig,
)

IMAGES = 26  # 3 steps of 8 and 2 images left out


def write_images(
    url: Path, label: int | None = None, classes: Sequence[str] = ("a", "b"), seed: int = 0
) -> str:
    generator = np.random.default_rng(seed)

    def samples():
        for i in range(IMAGES):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((48, 40)).save(file, "JPEG")
            saliency = generator.random((28, 28), dtype=np.float32)
            yield Sample(
                key=f"image{i}",
                image=file.getvalue(),
                extension="jpg",
                saliency=saliency,
                label=i % 2 if label is None else label,
                height=40,
                width=48,
            )

    write_dataset(str(url), samples(), name="test", classes=list(classes), shard_samples=10)
    return str(url)


def config(data: str, out: Path | str, **changes) -> TrainConfig:
    small = TrainConfig(
        data=data,
        out=str(out),
        method=MoCoConfig(queue=20),
        recipe=RECIPES["hp"],
        encoder="resnet18",
        crop_size=28,
        batch_size=8,
        epochs=2,
        log_steps=2,
        device="cpu",
    )
    return replace(small, **changes)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def metrics(out: Path) -> list[dict]:
    """Return the rows of all steps."""
    return [row for row in lines(out) if "loss" in row]


def scores(out: Path) -> list[dict]:
    """Return the rows of all evaluated epochs."""
    return [row for row in lines(out) if "loss" not in row]


def told(out: Path) -> list[tuple]:
    """Return the values that must not depend on how often a run was stopped."""
    names = ("step", "epoch", "loss", "contrastive_accuracy", "lr")
    return [tuple(row[name] for name in names) for row in metrics(out)]


class StopError(Exception):
    """Raised by `stopped_after`."""


@contextmanager
def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop a run in this block after `step`, before it is logged or saved."""
    add = train.trainer.MetricsBuffer.add

    def stopping(self, scalars, waited, **known):
        add(self, scalars, waited, **known)
        if known["step"] == step:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(train.trainer.MetricsBuffer, "add", stopping)
        with pytest.raises(StopError):
            yield


ARGUMENTS = {
    "--recipe": "hp",
    "--encoder": "resnet18",
    "--crop-size": "28",
    "--batch-size": "8",
    "--queue": "20",
    "--epochs": "2",
    "--device": "cpu",
}


def command(data: str, out: Path | str, **changes: str) -> list[str]:
    options = {"--data": data, "--out": str(out), **ARGUMENTS, **changes}
    return [part for option in options.items() for part in option]


METHOD_STEPS: dict[str, tuple[MethodConfig, str]] = {
    "moco-hp": (MoCoConfig(queue=64), "hp"),
    "moco-blur": (MoCoConfig(queue=64), "blur"),
    "moco-mean": (MoCoConfig(queue=64), "mean"),
    "simclr-hp": (SimCLRConfig(), "hp"),
    "maskco": (MaskCoConfig(queue=64), "maskco"),
    "adios-s": (ADIOSConfig(), "none"),
    "adios": (ADIOSConfig(single=False, masks=2), "none"),
    "supervised-hp": (SupervisedConfig(), "hp"),
}
"""Every method and every kind of fill, as cases for tests of a step."""


def method_step(
    name: str, device: str, *, grad_accum_steps: int = 1, clip: float | None = None
) -> tuple[TrainConfig, Setup]:
    """Return options and setup for `METHOD_STEPS`: ResNet-18, 8 images of 224 pixels, bf16."""
    method, recipe = METHOD_STEPS[name]
    settings = config(
        "",
        "",
        method=method,
        recipe=RECIPES[recipe],
        crop_size=224,
        grad_accum_steps=grad_accum_steps,
        precision="bf16",
        device=device,
    )
    settings = replace(settings, optim=replace(settings.optim, clip_gradient=clip, lr=0.1))
    setup = Setup(encoder="resnet18", batch_size=8, classes=8, grad_accum_steps=grad_accum_steps)
    return settings, setup
