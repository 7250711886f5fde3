"""DGUNet: deep generalized unfolding networks for image restoration (Mou, Wang, Zhang; CVPR 2022)."""

from dgunet.checkpoint import load_model
from dgunet.errors import UserError
from dgunet.inference import restore
from dgunet.model import DGUNet, create_model, list_models

__version__ = "0.1.0"
__all__ = ["DGUNet", "UserError", "create_model", "list_models", "load_model", "restore"]
