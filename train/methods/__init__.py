"""Methods by name. A new one: a file with its options and its class, and its place in METHODS.

`LinearProbe` is trained by the same loop and is no way to pretrain, so it has no name there.
"""

from train.methods.adios import ADIOS, ADIOSConfig
from train.methods.maskco import MaskCo, MaskCoConfig
from train.methods.method import Method, MethodConfig, Setup
from train.methods.moco import MoCo, MoCoConfig
from train.methods.probe import LinearProbe, LinearProbeConfig
from train.methods.simclr import SimCLR, SimCLRConfig
from train.methods.supervised import Supervised, SupervisedConfig

METHODS: dict[str, type[MethodConfig]] = {
    config.name: config
    for config in (MoCoConfig, SimCLRConfig, SupervisedConfig, ADIOSConfig, MaskCoConfig)
}

__all__ = [
    "ADIOS",
    "METHODS",
    "ADIOSConfig",
    "LinearProbe",
    "LinearProbeConfig",
    "MaskCo",
    "MaskCoConfig",
    "Method",
    "MethodConfig",
    "MoCo",
    "MoCoConfig",
    "Setup",
    "SimCLR",
    "SimCLRConfig",
    "Supervised",
    "SupervisedConfig",
]
