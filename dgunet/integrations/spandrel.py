"""DGUNet for spandrel, the model loader of ComfyUI and chaiNNer.

After `install()`, ``spandrel.ModelLoader().load_from_file("weights.safetensors")`` returns a function of images
(1, 3, H, W) in [0, 1]. Needs ``pip install ".[spandrel]"``.
"""

import spandrel
import torch
from torch import Tensor

from dgunet.checkpoints.load import load_model
from dgunet.checkpoints.registry import list_pretrained
from dgunet.checkpoints.safetensors import read_weights
from dgunet.model.network import DGUNet
from dgunet.model.proximal import MULTIPLE


class DGUNetArch(spandrel.Architecture[DGUNet]):
    """Detects DGUNets by the names of their weights.

    They do not say how often a shared middle stage is applied, and spandrel drops the file's metadata. Weights that
    come with dgunet are recognised; others with one middle stage are assumed to have 7 stages, as in the paper.
    """

    def __init__(self):
        super().__init__(id="DGUNet", detect=spandrel.util.KeyCondition.has_all("last.rho"))

    def load(self, state_dict: dict) -> spandrel.ImageModelDescriptor[DGUNet]:
        """The network of a state dict."""
        # On the CPU: spandrel moves the model to its device.
        weights = {name: value.cpu() for name, value in state_dict.items() if isinstance(value, Tensor)}
        model = load_model("the state dict", content={"state_dict": weights, **_shipped(weights)})
        if model.degradation is not None:
            raise spandrel.UnsupportedModelError("this DGUNet restores from measurements; spandrel is for images")
        return spandrel.ImageModelDescriptor(
            model,
            state_dict,
            architecture=self,
            purpose="Restoration",
            tags=[f"{model.arguments['width']}w", f"{model.stages} stages"],
            supports_half=False,
            supports_bfloat16=True,
            scale=1,
            input_channels=model.channels,
            output_channels=model.channels,
            size_requirements=spandrel.SizeRequirements(multiple_of=MULTIPLE),
            # Statistics are over the whole image: tiles cost, but where a record says otherwise (docs/local.md).
            tiling=spandrel.ModelTiling.SUPPORTED if "tile" in model.local else spandrel.ModelTiling.DISCOURAGED,
            call_fn=lambda model, image: model(image)[0],
        )


def _shipped(weights: dict) -> dict:
    """What else the file holds, if these are weights that come with dgunet."""
    for record in list_pretrained():
        content = read_weights(record.path)
        shipped = content["state_dict"]
        if shipped.keys() == weights.keys() and all(torch.equal(shipped[name], weights[name]) for name in shipped):
            return content
    return {}


def install():
    """Register DGUNet with spandrel's loaders; calling it again does nothing."""
    spandrel.MAIN_REGISTRY.add(spandrel.ArchSupport.from_architecture(DGUNetArch()), ignore_duplicates=True)
