"""DGUNet for spandrel, with which ComfyUI and chaiNNer load networks of every architecture.

After `install()` its ``ModelLoader().load_from_file("weights.safetensors")`` gives a function of images (1, 3, H, W)
in [0, 1]. Needs ``pip install ".[spandrel]"``.
"""

import spandrel
import torch
from torch import Tensor

from dgunet.checkpoint import load_model
from dgunet.model import DGUNet
from dgunet.pretrained import list_pretrained
from dgunet.proximal import MULTIPLE
from dgunet.weights import read_weights


class DGUNetArch(spandrel.Architecture[DGUNet]):
    """Knows DGUNets by the names of their weights.

    Those tell all but how often a shared middle stage is applied, and what a file says of it spandrel does not hand on.
    Weights that come with dgunet are recognised; others with one middle stage are taken to have 7 stages, as in the
    paper, and are only right if they do.
    """

    def __init__(self):
        super().__init__(id="DGUNet", detect=spandrel.util.KeyCondition.has_all("last.rho"))

    def load(self, state_dict: dict) -> spandrel.ImageModelDescriptor[DGUNet]:
        """The network of a state dict.

        Raises:
            UserError: it is of none, or of one for measurements instead of images.
        """
        # Spandrel moves the model to its device itself.
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
            tiling=spandrel.ModelTiling.DISCOURAGED,  # instance norm sees an image as a whole
            call_fn=lambda model, image: model(image)[0],
        )


def _shipped(weights: dict) -> dict:
    """The ``model`` entry of the weights that come with dgunet, if these are some of them."""
    for record in list_pretrained():
        content = read_weights(record.path)
        ours = content["state_dict"]
        if ours.keys() == weights.keys() and all(torch.equal(ours[name], weights[name]) for name in ours):
            return {"model": content["model"]}
    return {}


def install():
    """Make spandrel's loaders know DGUNets; a second time it does nothing."""
    spandrel.MAIN_REGISTRY.add(spandrel.ArchSupport.from_architecture(DGUNetArch()), ignore_duplicates=True)
