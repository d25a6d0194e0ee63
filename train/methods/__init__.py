"""Pretraining methods by name.

To add one, write a file with its options and its class and list it in METHODS. A method outside
this project is named `--method FILE.py:Options` or `module:Options`.

`LinearProbe` uses the same trainer but does not pretrain, so it is not in METHODS.
"""

from schemas import UserError
from schemas.cli import digest_source, import_object, lookup, name_by_import
from train.methods.adios import ADIOS, ADIOSConfig
from train.methods.maskco import MaskCo, MaskCoConfig
from train.methods.method import Method, MethodConfig, OptimizationGroup, Setup
from train.methods.moco import MoCo, MoCoConfig
from train.methods.probe import LinearProbe, LinearProbeConfig
from train.methods.simclr import SimCLR, SimCLRConfig
from train.methods.supervised import Supervised, SupervisedConfig

METHODS: dict[str, type[MethodConfig]] = {
    config.name: config
    for config in (MoCoConfig, SimCLRConfig, SupervisedConfig, ADIOSConfig, MaskCoConfig)
}


def find_method(name: str) -> type[MethodConfig]:
    """Return the options class of a method: by name, `FILE.py:Options` or `module:Options`.

    Raises:
        UserError: there is no such class.
    """
    if ":" not in name:
        return lookup("method", name, METHODS)
    options = import_object("method", name)
    if not (isinstance(options, type) and issubclass(options, MethodConfig)):
        raise UserError(f"method {name!r}: is no subclass of train.methods.MethodConfig")
    return options


def get_method_name(method: type[MethodConfig]) -> str:
    """Return the name by which `find_method` finds this class."""
    if METHODS.get(method.name) is method:
        return method.name
    return name_by_import(method)


def digest_method(method: MethodConfig) -> dict[str, str]:
    """Return the sha256 of the file of a method outside this project, as `code.method`.

    A script's or notebook's own class has none: its file holds more than the method.
    """
    module, _, name = get_method_name(type(method)).rpartition(":")
    if module in ("", "__main__"):
        return {}
    return {"code.method": digest_source("method", f"{module}:{name.partition('.')[0]}")}


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
    "OptimizationGroup",
    "Setup",
    "SimCLR",
    "SimCLRConfig",
    "Supervised",
    "SupervisedConfig",
    "digest_method",
    "find_method",
    "get_method_name",
]
