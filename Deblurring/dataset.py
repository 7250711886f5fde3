"""What is special about deblurring data: pairs are also augmented in saturation."""

import numpy as np
from torch import Tensor

from dgunet.data import PairedPatches
from dgunet.errors import optional
from dgunet.transforms import unit_range


class BlurredPatches(PairedPatches):
    """Training crops whose saturation is changed, in a third of them, by the same factor from U(1 - s, 1 + s).

    Args:
        saturation: s, 0.2 in the original; 0 switches it off.
        *args, **kwargs: see `PairedPatches`.
    """

    def __init__(self, *args, saturation: float = 0.2, **kwargs):
        super().__init__(*args, **kwargs)
        self.saturation = saturation

    def augment(self, rng: np.random.Generator, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        input, target = super().augment(rng, input, target)
        if not self.saturation:
            return input, target
        input, target = unit_range(input), unit_range(target)
        if rng.integers(3) == 0:
            adjust_saturation = optional("torchvision.transforms.functional").adjust_saturation
            factor = rng.uniform(1 - self.saturation, 1 + self.saturation)
            input, target = adjust_saturation(input, factor), adjust_saturation(target, factor)
        return input, target
