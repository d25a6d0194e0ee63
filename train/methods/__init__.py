"""Methods by name. A new one: a file with its options and its class, and its place in METHODS;
or, from elsewhere, `--method FILE.py:Options` or `module:Options`.

`LinearProbe` is trained by the same loop and is no way to pretrain, so it has no name there.
"""

from schemas import UserError
from schemas.cli import imported, lookup, name_by_import
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


def find_method(name: str) -> type[MethodConfig]:
    """Return the options of the method of that name, of `FILE.py:Options` or `module:Options`.

    Raises:
        UserError: there are no such options.
    """
    if ":" not in name:
        return lookup("method", name, METHODS)
    found = imported("method", name)
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise UserError(f"method {name!r}: is no subclass of train.methods.MethodConfig")
    return found


def name_of(method: type[MethodConfig]) -> str:
    """What `find_method` finds it by."""
    if METHODS.get(method.name) is method:
        return method.name
    return name_by_import(method)


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
    "find_method",
    "name_of",
]
