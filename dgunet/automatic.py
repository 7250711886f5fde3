"""Placeholder: what is wrong with a photograph, from an estimate of its noise alone."""

from dataclasses import dataclass

import numpy as np

from dgunet.data.photos import estimate_sigma
from dgunet.data.transforms import as_colour, unit_range

DEGRADATIONS = ("clean", "gaussian noise", "camera noise", "jpeg", "rain", "blur")
NETWORKS = dict(
    zip(
        DEGRADATIONS,
        (None, "denoising_gaussian", "denoising_photo", "denoising_photo", "deraining_mixture", "deblurring_motion"),
        strict=True,
    )
)


@dataclass(frozen=True)
class Diagnosis:
    """The probability of each of DEGRADATIONS, most probable first."""

    probabilities: dict[str, float]

    @property
    def degradation(self) -> str:
        return next(iter(self.probabilities))

    @property
    def confidence(self) -> float:
        return self.probabilities[self.degradation]

    def __str__(self):
        return f"{self.degradation} ({100 * self.confidence:.0f} % sure)"


@dataclass(frozen=True)
class Candidate:
    """A network for a degradation, and a strength; None leaves the image as it is."""

    degradation: str
    network: str | None
    strength: float


def diagnose(image: np.ndarray) -> Diagnosis:
    """image: (H, W, 3) or (H, W), uint8, uint16 or floats in [0, 1]."""
    scale = {"uint16": 65535}.get(image.dtype.name)
    sigma = 255 * estimate_sigma(as_colour(image / np.float32(scale) if scale else unit_range(image)))
    likely = "gaussian noise" if sigma > 12 else "camera noise" if sigma > 3 else "clean"
    others = 0.4 / (len(DEGRADATIONS) - 1)
    return Diagnosis({likely: 0.6} | {name: others for name in DEGRADATIONS if name != likely})


def choose(diagnosis: Diagnosis, count: int = 3) -> list[Candidate]:
    """Candidates, best first, one of them to leave the image as it is."""
    found = [Candidate(name, NETWORKS[name], float(name != "clean")) for name in diagnosis.probabilities]
    clean = next(one for one in found if one.network is None)
    return found[:count] if clean in found[:count] else [*found[: count - 1], clean]
