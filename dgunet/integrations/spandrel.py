"""DGUNet for spandrel, with which ComfyUI and chaiNNer load networks of every architecture.

After `install()` its ``ModelLoader().load_from_file("weights.safetensors")`` gives a function of pictures (1, 3, H, W)
in [0, 1]. Needs ``pip install ".[spandrel]"``.
"""

from dgunet.checkpoint import load_model
from dgunet.errors import optional
from dgunet.model import DGUNet
from dgunet.proximal import MULTIPLE

spandrel = optional("spandrel")


class DGUNetArch(spandrel.Architecture[DGUNet]):
    """Knows DGUNets by the names of their weights. Those tell all but how often a shared middle stage is applied:
    as in the paper, so that there are 7 stages in all.
    """

    def __init__(self):
        super().__init__(id="DGUNet", detect=spandrel.util.KeyCondition.has_all("last.rho"))

    def load(self, state_dict: dict) -> spandrel.ImageModelDescriptor[DGUNet]:
        """The network of a state dict.

        Raises:
            UserError: it is of none, or of one for measurements instead of pictures.
        """
        model = load_model("the state dict", content={**state_dict})
        if model.degradation is not None:
            raise spandrel.UnsupportedModelError("this DGUNet restores from measurements; spandrel is for pictures")
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
            tiling=spandrel.ModelTiling.DISCOURAGED,  # instance norm sees a picture as a whole
            call_fn=lambda model, image: model(image)[0],
        )


def install():
    """Make spandrel's loaders know DGUNets; a second time it does nothing."""
    spandrel.MAIN_REGISTRY.add(spandrel.ArchSupport.from_architecture(DGUNetArch()), ignore_duplicates=True)
