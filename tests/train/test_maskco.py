"""MaskCo against the formula as loops; pooling of regions; ablation of the head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from pipeline import RECIPES, Batch
from schemas import UserError
from tests.train import oracle
from train.config import TrainConfig
from train.data import SyntheticViews
from train.distributed import rank, world_size
from train.encoders import ENCODERS, build_encoder, compute_feature_map
from train.methods import MaskCoConfig, Setup
from train.training_step import TrainingStep, prepare_model_

SIDE, TAU = 64, 0.3


def method_of(**options):
    torch.manual_seed(0)
    config = MaskCoConfig(**{"queue": 11, "projection": 5, "temperature": TAU, **options})
    return config.build(Setup(encoder="resnet18", batch_size=4))


def batch_of(regions: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(4, 3, SIDE, SIDE, generator=generator) for _ in range(2))
    start = torch.rand(2, 4, regions, 2, generator=generator) * SIDE / 2
    boxes = torch.cat([start, start + SIDE / 3], dim=-1)
    valid = torch.ones(4, regions, dtype=torch.bool)
    valid[1, 0] = valid[3, -1] = valid[3, 0] = False
    return Batch(
        query=query,
        key=key,
        hard_negative=None,
        label=torch.zeros(4).long(),
        query_regions=boxes[0],
        key_regions=boxes[1],
        region_valid=valid,
    )


def test_feature_map_is_what_the_encoder_pools():
    encoder, _ = build_encoder("resnet18")
    encoder.eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    maps = compute_feature_map(encoder, images)
    assert maps.shape == (2, 512, 2, 2)
    torch.testing.assert_close(maps.mean(dim=(2, 3)), encoder(images))


@pytest.mark.parametrize("others", [False, True])
def test_loss_equals_the_formula_over_valid_regions(others):
    method, batch = method_of(other_regions=others).eval(), batch_of()
    with torch.no_grad():
        maps = method.prediction(compute_feature_map(method.encoder, batch.query))
        q = method.project_regions(maps, batch.query_regions, batch.query, method.head)
        maps = compute_feature_map(method.momentum_encoder, batch.key)
        k = method.project_regions(maps, batch.key_regions, batch.key, method.momentum_head)
    q, k = q.view(4, 3, -1).double().numpy(), k.view(4, 3, -1).double().numpy()
    queue, losses = method.queue.double().numpy(), []
    for i in range(4):
        for r in range(3):
            if not batch.region_valid[i, r]:
                continue
            similar = [oracle.dot(q[i, r], k[i, r])] + [oracle.dot(q[i, r], n) for n in queue]
            if others:
                similar += [
                    oracle.dot(q[i, r], k[i, s])
                    for s in range(3)
                    if s != r and batch.region_valid[i, s]
                ]
            shares = np.exp(np.array(similar) / TAU)
            losses.append(-np.log(shares[0] / shares.sum()))
    result = method(batch)
    assert len(losses) == 9
    assert result["loss"].item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert result["regions_valid"].item() == pytest.approx(9 / 12)


def test_a_region_is_pooled_where_it_is():
    """With one nonzero cell in a map of 4 x 4, a box around it has the highest value."""
    method = method_of()
    maps = torch.zeros(1, 512, 4, 4)
    maps[0, :, 2, 1] = 1.0  # pixels 16-32 across, 32-48 down of 64
    boxes = torch.tensor([[[16.0, 32, 32, 48], [32.0, 16, 48, 32], [0.0, 0, 64, 64]]])
    images = torch.zeros(1, 3, 64, 64)
    pooled = []
    with torch.no_grad():
        method.project_regions(maps, boxes, images, Keep(pooled))
    warm, cold, whole = pooled[0].mean(dim=1).tolist()
    assert warm > 0.5
    assert cold < 0.1
    assert cold < whole < warm


class Keep(nn.Module):
    def __init__(self, kept: list) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return x


def test_without_valid_regions_loss_and_gradient_are_zero():
    method, batch = method_of().train(), batch_of()
    batch.region_valid[:] = False
    result = method(batch)
    result["loss"].backward()
    assert result["loss"].item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in method.parameters())


def test_key_branch_follows_and_only_its_regions_enter_the_queue():
    method, batch = method_of(ema_momentum=0.5).train(), batch_of(regions=2)
    with torch.no_grad():
        method.encoder.conv1.weight.add_(1.0)
    before, student = (
        m.conv1.weight.detach().clone() for m in (method.momentum_encoder, method.encoder)
    )
    method.begin_step()
    torch.testing.assert_close(method.momentum_encoder.conv1.weight, (before + student) / 2)
    start = method.queue.clone()
    method(batch)["loss"].backward()
    assert torch.equal(method.queue, start)
    ((keys, _),) = method.new_keys
    method.end_step()
    assert batch.region_valid.tolist() == [[True] * 2, [False, True], [True] * 2, [False] * 2]
    assert torch.equal(method.queue[:5], keys[[0, 1, 3, 4, 5]])
    assert torch.equal(method.queue[5:], start[5:])
    assert method.queue_next == 5
    assert all(p.grad is None for p in method.momentum_encoder.parameters())


def test_the_prediction_head_can_be_left_out():
    with_head, without = method_of(), method_of(prediction_head=False)
    assert any(name.startswith("prediction.") for name, _ in with_head.named_parameters())
    assert not any(name.startswith("prediction.") for name, _ in without.named_parameters())
    assert set(without.exported().state_dict()) == set(with_head.exported().state_dict())


def test_a_recipe_without_regions_is_refused():
    batch = batch_of()
    plain = Batch(query=batch.query, key=batch.key, hard_negative=None, label=batch.label)
    with pytest.raises(UserError, match="take --recipe maskco"):
        method_of()(plain)


def test_a_note_says_how_regions_weigh_in_micro_batches():
    setup = Setup(encoder="resnet18", batch_size=4, grad_accum_steps=2)
    (note,) = MaskCoConfig(queue=11).build(setup).notes(9)
    assert "the 2 micro-batches of a step weigh the same" in note
    assert method_of().notes(9) == []


def smooth(module: nn.Module) -> nn.Module:
    """Build it without kinks: across a kink, rounding alone would change a gradient."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(2))
        else:
            smooth(child)
    return module


def gradients():
    """Compute loss and gradients of this rank's part of one batch, with SyncBN."""
    torch.manual_seed(0)
    config = TrainConfig(data="", out="", batch_size=4, precision="fp32", sync_bn=True)
    method = prepare_model_(smooth(method_of()), config, torch.device("cpu"))
    whole, share = batch_of(), 4 // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    part = Batch(
        **{
            name: value[rows] if isinstance(value, torch.Tensor) else value
            for name, value in vars(whole).items()
        }
    )
    loss = TrainingStep(method, config, torch.device("cpu"))([part], lr=0.0)["loss"].item()
    names = ("encoder.conv1.weight", "encoder.layer4.1.conv2.weight", "head.2.weight")
    own = dict(method.named_parameters())
    return loss, {name: own[name].grad.clone() for name in names}, method.queue


@pytest.mark.slow
def test_two_ranks_compute_the_gradients_of_one(two_ranks):
    """Ranks have different numbers of valid regions, but each region weighs the same."""
    loss, expected, queue = gradients()
    answers = two_ranks(gradients)
    assert np.mean([answer[0] for answer in answers]) == pytest.approx(loss, abs=1e-5)
    for _, found, its_queue in answers:
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name
        torch.testing.assert_close(its_queue, queue, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compile_reaches_both_encoders_of_maskco(monkeypatch):
    """A backend that runs the graph unchanged counts convolutions, so no compiler is needed."""
    runs, real = [], torch.compile

    def count(graph, _):
        convolutions = sum(
            node.op == "call_function" and getattr(node.target, "__name__", "") == "conv2d"
            for node in graph.graph.nodes
        )

        def run(*args):
            runs.append((torch.is_grad_enabled(), convolutions))
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", lambda model, **_: real(model, backend=count))
    monkeypatch.setitem(ENCODERS, "resnet18", lambda **_: ResNet(BasicBlock, [1, 1, 1, 1]))
    torch._dynamo.reset()
    settings = TrainConfig(data="", out="", precision="fp32", compile=True)
    setup = Setup(encoder="resnet18", batch_size=2, crop_size=64)
    method = MaskCoConfig(queue=8).build(setup)
    keys = list(method.state_dict())
    method = prepare_model_(method, settings, torch.device("cpu"))
    recipe = replace(RECIPES["maskco"], crop_size=64)
    batch = SyntheticViews(8, recipe, 2, torch.device("cpu"), 1, 0).batch
    assert method(batch)["loss"].isfinite()
    network = ENCODERS["resnet18"]()
    in_all = sum(isinstance(layer, torch.nn.Conv2d) for layer in network.modules())
    with_gradient = sum(number for has_gradient, number in runs if has_gradient)
    without = sum(number for has_gradient, number in runs if not has_gradient)
    assert (with_gradient, without) == (in_all, in_all)  # encoder, momentum encoder
    assert list(method.state_dict()) == keys
    torch._dynamo.reset()


def train_convnext():
    """Make two steps with a ConvNeXt, whose head.norm comes after the last map."""
    torch.manual_seed(0)
    settings = TrainConfig(data="", out="", batch_size=4, precision="fp32")
    setup = Setup(encoder="timm:test_convnext", batch_size=4)
    method = prepare_model_(MaskCoConfig(queue=11).build(setup), settings, torch.device("cpu"))
    step = TrainingStep(method, settings, torch.device("cpu"))
    before = {name: value.clone() for name, value in method.encoder.named_parameters()}
    for _ in range(2):
        step([batch_of()], lr=0.1)
    after = dict(method.encoder.named_parameters())
    return {name for name, value in before.items() if torch.equal(value, after[name])}


def test_weights_after_the_map_stay_on_one_rank_and_on_two(two_ranks):
    unused = {"head.norm.weight", "head.norm.bias"}
    assert train_convnext() == unused
    assert two_ranks(train_convnext) == [unused, unused]
