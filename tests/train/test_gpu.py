"""What only a GPU can show. Skipped elsewhere."""

from dataclasses import replace

import pytest
import torch

from tests.train.runs import config
from train.config import resolved
from train.feed import Feed, SyntheticViews
from train.loop import prepare, train
from train.methods import MoCoConfig, Setup
from train.step import Step, placed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_never_waits_for_the_device(clip):
    device = torch.device("cuda", 0)
    settings = config("", "", method=MoCoConfig(queue=64), device="cuda", crop_size=56)
    settings = resolved(
        replace(settings, optim=replace(settings.optim, clip_gradient=clip)), device
    )
    setup = Setup(encoder="resnet18", batch_size=8)
    step = Step(placed(settings.method.build(setup), settings, device), settings, device)
    feed = Feed(SyntheticViews(64, settings.recipe, 8, device, 1, 0), memory=4)
    for _ in range(2):  # cuDNN picks its kernels
        step(feed.parts(1), 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        told = [step(feed.parts(1), 0.01) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(scalars["loss"].isfinite() for scalars in told)


def test_images_are_channels_last_as_the_weights_are(shards):
    """So no layer copies its input."""
    job = prepare(config(shards, "", device="cuda"))
    batch = next(iter(job.views))
    assert batch.query.is_contiguous(memory_format=torch.channels_last)
    weight = next(p for p in job.method.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_whole_job_runs(shards, tmp_path):
    assert train(config(shards, tmp_path, device="cuda")).exists()
