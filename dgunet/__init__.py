"""DGUNet: deep generalized unfolding networks for image restoration (Mou, Wang, Zhang; CVPR 2022)."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from dgunet._moved import MovedFinder

if TYPE_CHECKING:
    from dgunet.checkpoints.load import load_model
    from dgunet.inference import restore
    from dgunet.model.network import DGUNet
    from dgunet.model.variants import create_model, list_models
    from dgunet.runtime.errors import UserError

__version__ = "0.2.1"
__all__ = ["DGUNet", "UserError", "create_model", "list_models", "load_model", "restore"]

# Imported when first asked for, so that `dgunet --help` need not wait for PyTorch.
_MODULES = {
    "load_model": "checkpoints.load",
    "UserError": "runtime.errors",
    "restore": "inference",
    **dict.fromkeys(("DGUNet", "create_model", "list_models"), "model"),
}


sys.meta_path.append(MovedFinder())


def __getattr__(name: str):
    if name in _MODULES:
        value = globals()[name] = getattr(import_module(f"dgunet.{_MODULES[name]}"), name)
        return value
    if name.isidentifier() and not name.startswith("_"):
        try:
            return import_module(f"dgunet.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"dgunet.{name}":  # something that the module needs
                raise
    raise AttributeError(f"module 'dgunet' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
