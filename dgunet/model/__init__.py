"""The network. In the paper's words:

network.py                      unrolled stages, gradient step (FGDM)
proximal.py                     proximal mapping (IPMM): U-Net, supervised head
fusion.py                       inter-stage information pathways: ISFF, feature fusion
projection.py                   subspace projection (NBNet)
layers.py, instance_norm.py     the convolution blocks of these
degradations.py, sampling.py    A and A_adjoint: learned, blur, block sampling
variants.py                     the networks of the tables
local.py                        not in the paper: local statistics at test time
"""

from dgunet._moved import former_names
from dgunet.model.network import ARGUMENTS, DGUNet, FinalStage, Stage
from dgunet.model.variants import VARIANTS, Variant, create_model, find_variant, list_models

__all__ = [
    "ARGUMENTS", "VARIANTS", "DGUNet", "FinalStage", "Stage", "Variant", "create_model", "find_variant",
    "list_models",
]  # fmt: skip

__getattr__ = former_names(__name__)  # names of version 0.2, with a warning
