"""DGUNet for deepinv: as a reconstructor, as a denoiser for plug-and-play, its degradations as physics.

    pip install ".[deepinv]"

The reverse needs nothing: deepinv's linear operators have ``A`` and ``A_adjoint``, so they are known degradations,
``DGUNet(degradation=physics)``.
"""

import deepinv
from torch import Tensor

from dgunet.data.transforms import pad_to_multiple
from dgunet.model.degradations import Degradation, PaddedDegradation, for_measurements
from dgunet.model.network import DGUNet
from dgunet.model.proximal import MULTIPLE


class Reconstructor(deepinv.models.Reconstructor):
    """A DGUNet as a deepinv reconstructor, for its ``test`` and ``Trainer``; gradients pass.

    If the network's degradation is learned, the physics are ignored; if it is known, the physics replace it. The
    network must have been trained for them: `degradations.MotionBlur` trains for any blur.
    """

    def __init__(self, model: DGUNet):
        super().__init__()
        self.model = model

    def forward(self, y: Tensor, physics: Degradation | None = None, **kwargs) -> Tensor:
        """The restored images x_K, (B, C, H, W), of any size.

        ``y`` is degraded images (B, C, H, W), range [0, 1], or measurements by ``physics``; None stands for the
        network's own known degradation. Further arguments, which deepinv passes to all of its models, are ignored.
        """
        if self.model.degradation is None:
            height, width = y.shape[-2:]
            return self.model(pad_to_multiple(y, MULTIPLE))[0][..., :height, :width]
        whole = PaddedDegradation(for_measurements(self.model.degradation if physics is None else physics, y))
        return whole.crop(self.model(y, whole)[0])


class Denoiser(deepinv.models.Denoiser):
    """A denoising DGUNet as a deepinv denoiser, the prior of its plug-and-play algorithms.

    The network is blind to sigma: it removes the noise that it was trained for, so one for a range of sigmas is best.
    A network for colour restores a grey image as three equal channels, and the mean is returned.
    """

    def __init__(self, model: DGUNet):
        super().__init__()
        self.reconstructor = Reconstructor(model)

    def forward(self, x: Tensor, sigma: float | Tensor | None = None, **kwargs) -> Tensor:
        """The denoised images, (B, C, H, W), range [0, 1]; ``sigma`` is not used."""
        grey = x.shape[1] == 1 and self.reconstructor.model.channels > 1
        if grey:
            x = x.expand(-1, self.reconstructor.model.channels, -1, -1)
        x = self.reconstructor(x)
        return x.mean(1, keepdim=True) if grey else x


class Physics(deepinv.physics.LinearPhysics):
    """A known degradation, such as `BlockSampling` or `Blur`, as a deepinv operator, with the options of
    ``deepinv.physics.LinearPhysics``, e.g. ``noise_model``.
    """

    def __init__(self, degradation: Degradation, **options):
        super().__init__(**options)
        self.degradation = degradation

    def A(self, x: Tensor, **kwargs) -> Tensor:
        return self.degradation.A(x)

    def A_adjoint(self, y: Tensor, **kwargs) -> Tensor:
        return self.degradation.A_adjoint(y)
