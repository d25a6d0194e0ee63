"""Checkpoints of other projects as saliency backbones and as evaluated encoders.

Each holds a ResNet-18 with random weights under the names and in the nesting of its project.
"""

import argparse
import collections
import pathlib
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from precompute.estimators import ScdaOptions
from precompute.estimators.weights import load_weights
from schemas import UserError
from schemas.weights import fit_weights, get_shapes
from train.encoders import build_encoder, load_encoder, print_once


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return build_encoder("resnet18")[0].state_dict()


@pytest.fixture(scope="module")
def other() -> dict[str, torch.Tensor]:
    """Return another copy of the network, such as a key encoder."""
    torch.manual_seed(4)
    return build_encoder("resnet18")[0].state_dict()


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


class Config(dict):
    """A configuration class such as yacs' CfgNode: a dict with attributes."""


class Logger:
    def __init__(self) -> None:
        self.level = 3
        self.path = pathlib.PurePosixPath("a/b")


def extras() -> dict:
    """Return what checkpoints hold besides weights, of classes unknown to weights_only."""
    config = Config(lr=0.1)
    config.frozen = True
    return {
        "args": argparse.Namespace(lr=0.3, dist_url="tcp://a:1"),
        "cfg": config,
        "hyper_parameters": {"logger": Logger(), "when": collections.deque([1, 2])},
        "best_acc1": np.float64(0.5),
        "history": collections.defaultdict(list, loss=[1.0]),
        "epoch": 200,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{}]},
    }


def numbered(state: dict) -> dict:
    """Use names of nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples."""
    children = [name for name, _ in torchvision.models.resnet18().named_children()]
    return {
        f"{children.index(name.split('.')[0])}.{name.partition('.')[2]}": value
        for name, value in state.items()
    }


HEAD = {"module.projector.0.weight": torch.zeros(3, 3), "queue": torch.zeros(4, 8)}
FILES = {
    "moco.pth.tar": lambda a, b: {
        "arch": "resnet18",
        "state_dict": under("module.encoder_q.", a)
        | {"module.encoder_q.fc.0.weight": torch.zeros(2, 2)}
        | under("module.encoder_k.", b)
        | HEAD,
    },
    "mocov3.pth.tar": lambda a, b: {
        "state_dict": under("module.base_encoder.", a) | under("module.momentum_encoder.", b)
    },
    "solo.ckpt": lambda a, b: {
        "state_dict": under("backbone.", a) | under("momentum_backbone.", b) | HEAD
    },
    "lightly.ckpt": lambda a, b: {"state_dict": under("backbone.", numbered(a)) | HEAD},
    "dino.pth": lambda a, b: {
        "student": under("module.backbone.", b) | HEAD,
        "teacher": under("backbone.", a) | {"head.mlp.0.weight": torch.zeros(2, 2)},
    },
    "swav.pth.tar": lambda a, b: under("module.", a) | HEAD | {"module.prototypes.weight": HEAD},
    "vicreg.pth": lambda a, b: {"model": under("module.backbone.", a) | HEAD},
    "simsiam.pth.tar": lambda a, b: {"state_dict": under("module.encoder.", a) | HEAD},
    "byol.pt": lambda a, b: {
        "online_network_state_dict": under("encoder.", a),
        "target_network_state_dict": under("encoder.", b),
    },
    "vissl.torch": lambda a, b: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", a), "heads": dict(HEAD)}}
        }
    },
    "compiled.bin": lambda a, b: {"model_state_dict": under("module._orig_mod.", a)},
    "torchvision.pth": lambda a, b: a | {"fc.weight": torch.zeros(10, 512)},
    "half": lambda a, b: {name: value.half() for name, value in a.items()},
    "uncounted.pth": lambda a, b: {k: v for k, v in a.items() if "batches" not in k},
    "ordered.pt": lambda a, b: collections.OrderedDict(a),
}


def loaded_backbone(path) -> nn.Module:
    """Fill the trunk as the SCDA estimator does; tracing the network each time takes seconds."""
    model = torchvision.models.resnet18()
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    load_weights(backbone, model, "resnet18", str(path))
    return backbone


def test_the_estimator_takes_such_a_file(trunk, other, tmp_path):
    path = tmp_path / "moco.pth.tar"
    torch.save(FILES[path.name](trunk, other), path)
    found = ScdaOptions("resnet18", str(path), layer="layer4").build().trunk
    assert torch.equal(found.conv1.weight, trunk["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_checkpoints_of_other_projects_load_as_backbone_and_encoder(
    name, trunk, other, tmp_path, capsys
):
    content = FILES[name](trunk, other)
    if name not in ("torchvision.pth", "half", "uncounted.pth", "ordered.pt"):
        content |= extras()
    path = tmp_path / name
    torch.save(content, path, _use_new_zipfile_serialization=name != "moco.pth.tar")
    print_once.cache_clear()
    encoder, metadata, _ = load_encoder(str(path))
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert f"{name}: " in told
    load_encoder(str(path), notes_images=True)
    assert capsys.readouterr().out == f"{path}: evaluated on plain images of 224 pixels\n"
    assert (metadata["encoder"], metadata["stem"]) == ("resnet18", "imagenet")
    if name == "moco.pth.tar":
        assert "state_dict.module.encoder_q, 100 of 244" in told
        assert "it is in state_dict.module.encoder_k too" in told
    backbone = loaded_backbone(path)
    for key, value in trunk.items():
        if "batches" not in key:
            wanted = value.half().float() if name == "half" else value
            assert torch.equal(encoder.state_dict()[key], wanted), key
            assert torch.equal(backbone.state_dict()[key], wanted), key


def test_safetensors_under_a_prefix_and_without_a_suffix(trunk, tmp_path):
    path = tmp_path / "weights"
    save_file(under("model.encoder.", trunk), path)
    assert torch.equal(load_encoder(str(path))[0].conv1.weight, trunk["conv1.weight"])
    assert torch.equal(loaded_backbone(path).conv1.weight, trunk["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "stem"),
    [("resnet34", "imagenet"), ("resnet50", "imagenet"), ("resnet18", "small")],
)
def test_the_architecture_is_found_by_its_shapes(name, stem, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(under("backbone.", build_encoder(name, stem)[0].state_dict()), path)
    _, metadata, _ = load_encoder(str(path))
    assert (metadata["encoder"], metadata["stem"]) == (name, stem)
    assert metadata["crop_size"] == ("32" if stem == "small" else "224")


def test_a_larger_network_is_not_taken_for_a_smaller_one_with_the_same_names(tmp_path):
    """Every weight of a ResNet-18 has its name and its shape in a ResNet-34 too."""
    path = tmp_path / "a.pth"
    torch.save(under("net.", build_encoder("resnet34")[0].state_dict()), path)
    with pytest.raises(UserError, match=r"not weights of resnet18: it has unknown layer1\.2") as e:
        loaded_backbone(path)
    assert "It has net.conv1.weight, net.bn1.weight, " in str(e.value)
    assert "the network conv1.weight, bn1.weight, " in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a.b": torch.zeros(3)},
            r"[Ii]t has a\.b \.\.\., (the network|a ResNet) conv1\.weight, bn1\.weight",
        ),
        ({"model": {"epoch": 3}}, "must map names to tensors"),
        ({"buffers": {0: torch.zeros(3)}}, "must map names to tensors"),
        ([1, 2], "must map names to tensors"),
        ({}, "must map names to tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_names_of_both(content, message, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(content, path)
    for load in (loaded_backbone, lambda p: load_encoder(str(p))):
        with pytest.raises(UserError, match=message) as raised:
            load(path)
        assert "\n" not in str(raised.value)


def test_a_file_of_another_network_is_not_blamed_on_one_encoder(tmp_path):
    path = tmp_path / "mobilenet.pth"
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    with pytest.raises(UserError) as raised:
        load_encoder(str(path))
    message = str(raised.value)
    assert message.startswith(f"{path}: fits none of the known encoders (resnet")
    assert "it has features.0.0.weight, " in message
    assert "nearest" not in message
    assert message.endswith("or the encoder.safetensors of a run, which names its encoder")


def test_the_nearest_encoder_is_named(trunk, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(trunk | {"bn1.weight": torch.zeros(7)}, path)
    with pytest.raises(
        UserError, match=r"nearest is resnet18, but the file has other shapes: bn1\.weight \(7,\)"
    ):
        load_encoder(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"PK\x03\x04cut", b"\x80\x02.", b"x" * 99]
)
def test_files_without_weights_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "resnet50.pth"
    path.write_bytes(content)
    for load in (loaded_backbone, lambda p: load_encoder(str(p))):
        with pytest.raises(
            UserError, match=r"resnet50\.pth: not a (readable )?state_dict"
        ) as raised:
            load(path)
        assert "\n" not in str(raised.value)


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_no_code_of_a_checkpoint_runs(trunk, tmp_path, capsys):
    module = ModuleType("a_module_of_elsewhere")
    module.touch = lambda *args: print("code ran")
    module.touch.__module__, module.touch.__qualname__ = module.__name__, "touch"
    sys.modules[module.__name__] = module

    class Touch:
        def __reduce__(self):
            return module.touch, ("x",)

    try:
        torch.save({"state_dict": trunk, "a": Touch(), "b": Payload()}, tmp_path / "a.ckpt")
    finally:
        del sys.modules[module.__name__]
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for load in (loaded_backbone, lambda path: load_encoder(str(path))[0]):
        assert torch.equal(load(tmp_path / "a.ckpt").conv1.weight, trunk["conv1.weight"])
        with pytest.raises(UserError):
            load(tmp_path / "b.pth")
    assert "code ran" not in capsys.readouterr().out


def test_one_wrong_shape_is_named(trunk):
    state = under("backbone.", trunk) | {"backbone.bn1.weight": torch.zeros(7)}
    with pytest.raises(
        UserError, match=r"has other shapes: bn1\.weight \(7,\), not \(64,\) under backbone"
    ):
        fit_weights({"state_dict": state}, get_shapes(trunk), "a.ckpt", "a resnet18")
