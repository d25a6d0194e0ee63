"""Methods by name. A new one: a file with its options and its class, and its place in METHODS."""

from typing import Any

from train.methods.method import Method
from train.methods.moco import MoCo, MoCoConfig
from train.methods.simclr import SimCLR, SimCLRConfig

METHODS: dict[str, type[Method]] = {MoCo.name: MoCo, SimCLR.name: SimCLR}


def method_of(config: Any) -> type[Method]:
    """The method whose options `config` is."""
    return next(method for method in METHODS.values() if method.Config is type(config))


__all__ = ["METHODS", "Method", "MoCo", "MoCoConfig", "SimCLR", "SimCLRConfig", "method_of"]
