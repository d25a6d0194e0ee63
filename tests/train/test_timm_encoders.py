"""ConvNets of timm: trained, written, read back, exported; refusals."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import train.trainer
from schemas import UserError
from tests.train.runs import config, metrics
from train.encoders import build_encoder, compute_feature_map, load_encoder
from train.evaluate.detection.model import DetectorConfig
from train.evaluate.export import ExportOptions, export
from train.methods import MaskCoConfig, MoCoConfig, Setup
from train.sync_bn import GlobalBatchNorm, convert_sync_bn_

NAME = "timm:test_byobnet"  # 0.5 M parameters, normalization and activation in one layer


def test_a_timm_encoder_trains_and_is_what_timm_builds(shards, tmp_path):
    settings = config(shards, tmp_path, encoder=NAME, crop_size=56, epochs=1, sync_bn=True)
    train.trainer.train(replace(settings, method=MoCoConfig(queue=20, projection=8)))
    assert len(metrics(tmp_path)) == 3
    encoder, metadata, _ = load_encoder(str(tmp_path))
    assert metadata["encoder"] == NAME
    path = export(ExportOptions(encoder=str(tmp_path), format="timm"))
    other = timm.create_model("test_byobnet", num_classes=0)
    other.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(2, 3, 56, 56)
    assert torch.equal(other.eval()(x), encoder.eval()(x))
    for form in ("torchvision", "detectron2"):
        with pytest.raises(UserError, match="take --format timm or safetensors"):
            export(ExportOptions(encoder=str(tmp_path), format=form))
    sha = {"path": str(tmp_path), "sha256": "", "masks": False, "short_sides": (64,)}
    with pytest.raises(UserError, match="network of timm; the C4 detector"):
        DetectorConfig(**sha).build(Setup(encoder=NAME, batch_size=2, classes=2))


@pytest.mark.parametrize("name", ["test_byobnet", "test_convnext", "test_resnet"])
def test_maps_and_features_have_the_encoders_width(name):
    encoder, width = build_encoder(f"timm:{name}")
    images = torch.randn(2, 3, 96, 96)
    assert compute_feature_map(encoder, images).shape == (2, width, 3, 3)
    assert encoder(images).shape == (2, width)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_tinny", "did you mean timm:convnext_tiny"),
        ("test_vit", r"attention layers \(Attention\)"),
        ("swin_tiny_patch4_window7_224", "attention layers"),
        ("test_mambaout", "has no map at stride 32: from 64 pixels it makes"),
    ],
)
def test_networks_without_a_suitable_map_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        build_encoder(f"timm:{name}")


def test_a_network_of_timm_without_the_prefix_is_refused_with_it():
    with pytest.raises(UserError, match="'convnext_tiny': did you mean timm:convnext_tiny"):
        build_encoder("convnext_tiny")


def test_options_only_for_torchvision_are_refused():
    with pytest.raises(UserError, match="--stem small: is for torchvision's ResNets only"):
        build_encoder(NAME, "small")
    setup = Setup(encoder="timm:mobilenetv3_small_050", batch_size=4)
    with pytest.raises(UserError, match="288 channels in its last map but 1024 after"):
        MaskCoConfig(queue=8).build(setup)


def test_synchronized_norms_keep_their_activation():
    """timm's layers normalize and activate at once; a norm alone would leave negative values."""
    torch.manual_seed(0)
    encoder, _ = build_encoder(NAME)
    own, _ = build_encoder(NAME)
    own.load_state_dict(encoder.state_dict())
    converted = convert_sync_bn_(encoder)
    assert any(isinstance(m, GlobalBatchNorm) for m in converted.modules())
    assert converted.state_dict().keys() == own.state_dict().keys()
    x = torch.randn(4, 3, 64, 64)
    for mode in (True, False):
        torch.testing.assert_close(converted.train(mode)(x), own.train(mode)(x))
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
