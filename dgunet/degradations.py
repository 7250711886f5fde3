"""Known and learned degradations by their public names; see `dgunet.model.degradations` and `dgunet.model.sampling`."""

from dgunet.model.degradations import Blur, Degradation, LearnedDegradation, MotionBlur
from dgunet.model.sampling import BlockSampling, FirstRows, ScalableSampling, init_sampling_matrix, sampling_operator

__all__ = [
    "BlockSampling", "Blur", "Degradation", "FirstRows", "LearnedDegradation", "MotionBlur", "ScalableSampling",
    "init_sampling_matrix", "sampling_operator",
]  # fmt: skip
