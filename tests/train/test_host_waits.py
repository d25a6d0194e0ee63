"""A step of each method never makes the host wait; `meta` tensors stand for those on a GPU."""

from dataclasses import replace

import pytest
import torch

import train.distributed
import train.methods.adios
from pipeline.recipes import RECIPES
from tests.train.host_waits import HostWaits
from tests.train.runs import config
from train.feed import SyntheticViews, split
from train.methods import (
    ADIOSConfig,
    MaskCoConfig,
    MoCoConfig,
    Setup,
    SimCLRConfig,
    SupervisedConfig,
)
from train.step import Step, placed

CPU = torch.device("cpu")
METHODS = {
    "moco": (MoCoConfig(queue=64), "hp"),
    "simclr": (SimCLRConfig(), "hp"),
    "adios-s": (ADIOSConfig(), "none"),
    "adios": (ADIOSConfig(single=False), "none"),
    "maskco": (MaskCoConfig(queue=64), "maskco"),
    "supervised": (SupervisedConfig(), "none"),
}
WAITS = {
    "item": lambda x, host: x.sum().item(),
    "tolist": lambda x, host: x[0, 0].tolist(),
    "branch": lambda x, host: 1 if x.sum() > 0 else 0,
    "nonzero": lambda x, host: x.nonzero(),
    "mask": lambda x, host: x[x > 0],
    "masked assignment": lambda x, host: x.__setitem__(x > 0, x[0]),
    "host index": lambda x, host: x[torch.arange(2)],
    "from the device": lambda x, host: x.cpu(),
    "to the device": lambda x, host: host.to("meta"),
    "into the device": lambda x, host: x.copy_(host),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_check_notices(name):
    x, host = torch.zeros(3, 3, device="meta"), torch.zeros(3, 3)
    with HostWaits(), pytest.raises(AssertionError, match="waits for"):
        WAITS[name](x, host)


def test_the_check_lets_pinned_copies_pass():
    pinned = torch.zeros(3)
    with HostWaits([pinned]):
        assert pinned.to("meta", non_blocking=True).is_meta
        assert torch.ones(3).sum().item() == 3  # of the host's own memory


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(monkeypatch, name, parts):
    method, recipe_name = METHODS[name]
    recipe = replace(RECIPES[recipe_name], crop_size=56)
    settings = config(
        "", "", method=method, recipe=recipe, crop_size=56, accumulate=parts, precision="fp32"
    )
    settings = replace(settings, optim=replace(settings.optim, clip_gradient=1.0, lr=0.1))
    setup = Setup(encoder="resnet18", batch_size=8, crop_size=56, classes=1000, accumulate=parts)
    built = placed(method.build(setup), settings, CPU).to("meta")
    step = Step(built, settings, torch.device("meta"))
    batch = SyntheticViews(64, recipe, 8, CPU, 1, 0).batch
    tensors = {n: v.to("meta") for n, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    batch = replace(batch, **tensors)
    pinned = []

    def to_device(tensor, device):
        pinned.append(tensor)
        return tensor.to(device, non_blocking=True)

    real = torch.autocast  # which knows no meta
    monkeypatch.setattr(torch, "autocast", lambda _, *given, **named: real("cpu", *given, **named))
    for module in (train.distributed, train.methods.adios):
        monkeypatch.setattr(module, "to_device", to_device)
    with HostWaits(pinned):
        told = [step(split(batch, parts), 0.01) for _ in range(2)]
    assert all(scalars["loss"].is_meta for scalars in told)
