"""Tests that need a GPU; skipped without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import MaskedViews
from schemas import UserError
from tests.train.runs import METHOD_STEPS, config, method_step
from train.data import BatchStream
from train.process_group import translate_out_of_memory
from train.trainer import prepare_job, train
from train.training_step import TrainingStep, prepare_model_

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", METHOD_STEPS)
def test_a_step_never_waits_for_the_device(name, shards):
    """No step waits, from the loader's batch on; `test_host_waits.py` checks it without a GPU."""
    device = torch.device("cuda", 0)
    settings, setup = method_step(name, "cuda", grad_accum_steps=2, clip=1.0)
    step = TrainingStep(
        prepare_model_(settings.method.build(setup), settings, device), settings, device
    )
    stream = BatchStream(MaskedViews(shards, settings.recipe, 8, device="cuda"), memory=4)
    for _ in range(2):  # cuDNN chooses its kernels, and the views are compiled
        step(stream.next_micro_batches(2), 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scalars = [step(stream.next_micro_batches(2), 0.01) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(one["loss"].isfinite() for one in scalars)


def test_images_are_channels_last_as_the_weights_are(shards):
    """Layouts match, so no layer copies its input."""
    job = prepare_job(config(shards, "", device="cuda"))
    batch = next(iter(job.views))
    assert batch.query.is_contiguous(memory_format=torch.channels_last)
    weight = next(p for p in job.method.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_whole_job_runs(shards, tmp_path):
    assert train(config(shards, tmp_path, device="cuda")).exists()


def test_a_full_gpu_gives_a_one_line_error():
    with pytest.raises(UserError) as raised, translate_out_of_memory():
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert re.match(
        r"the GPU is out of memory \(1048576.00 GiB more were requested\): --grad-accum-steps",
        str(raised.value),
    )


TWO_GPUS = """
import os, torch
from train.distributed import all_gather, rank, shuffle_across_ranks
from train.sync_bn import GlobalBatchNorm
from train.process_group import pick_device, join_process_group

with join_process_group(60, "cuda"):
    device = pick_device("cuda")
    assert device.index == int(os.environ["LOCAL_RANK"])
    assert all_gather(torch.tensor([rank()], device=device)).tolist() == [0, 1]
    x = torch.arange(8.0, device=device).view(8, 1, 1, 1) + 8 * rank()
    share, restore = shuffle_across_ranks(x, torch.Generator().manual_seed(1))
    assert torch.equal(restore(share.flatten(1)), x.flatten(1))

    values = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    own = values.split([1, 7])[rank()].to(device).requires_grad_()
    norm = GlobalBatchNorm.convert(torch.nn.BatchNorm2d(3)).to(device)
    (norm(own.detach()) ** 3).sum()  # the communicator exists
    norm = GlobalBatchNorm.convert(torch.nn.BatchNorm2d(3)).to(device)
    torch.cuda.set_sync_debug_mode("error")
    result = norm(own)
    (result**3).sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    whole = values.double().requires_grad_()
    expected = torch.nn.BatchNorm2d(3).double()(whole)
    (expected**3).sum().backward()
    for found, wanted in ((result, expected), (own.grad, whole.grad)):
        wanted = wanted.detach().split([1, 7])[rank()]
        torch.testing.assert_close(found.detach().cpu().double(), wanted, atol=1e-4, rtol=1e-4)
    print("agreed", flush=True)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_connect_by_nccl(tmp_path):
    """Each rank has a GPU; rows come back; uneven shares are normalized as one batch."""
    script = tmp_path / "ranks.py"
    script.write_text(TWO_GPUS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreed") == 2
