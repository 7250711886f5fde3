"""What is wrong with a photograph, and which network mends it, for `dgunet restore`.

A small convolutional classifier looks at up to 24 crops of an image, and names one of `DEGRADATIONS` with its
probability. A classifier and not the networks' own answers judged: a network that finds rain in hair or blur in a
defocused background is as sure of it as of the real thing, each takes seconds, and the classifier a fraction of one.
``scripts/train_diagnosis.py`` trains it, ``automatic.yaml``, beside its weights, records how it was trained, and
``studies/measure_restore.py`` measures what it is worth.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from dgunet.checkpoints.load import load_model
from dgunet.checkpoints.safetensors import read_weights
from dgunet.data.transforms import as_colour, pad_to
from dgunet.inference import restore
from dgunet.model.network import DGUNet
from dgunet.runtime.errors import UserError

# What is recognised, and the network for it (None: the image stays as it is).
NETWORKS: dict[str, str | None] = {
    "clean": None,
    "gaussian noise": "denoising_gaussian",
    "camera noise": "denoising_photo",  # coarse and coloured, from a sensor or a film
    "JPEG blocks": "denoising_photo",
    "rain": "deraining_mixture",
    "blur": "deblurring_motion",
}
DEGRADATIONS = tuple(NETWORKS)
# The same for `dgunet denoise`, which only asks which of its networks suits: that for photographs does the least harm.
DENOISERS = {**dict.fromkeys(NETWORKS, "denoising_photo"), "gaussian noise": "denoising_gaussian"}
WEIGHTS = Path(__file__).with_name("automatic.safetensors")
CROP, MOST_CROPS = 160, 24  # pixels, and crops of an image that are looked at
SURE = 0.9  # probability from which a network is used at full strength
# Below this probability these are not used: they cost a dry or a soft image more decibels than they may gain. (No clean
# image that is held out from the classifier's training reaches it.)
LEAST = {"rain": 0.6, "blur": 0.6}


class Classifier(nn.Module):
    """Crops (B, 3, H, W), RGB in [0, 1], to logits (B, 6) of `DEGRADATIONS`: five convolutions, mean and maximum."""

    def __init__(self, channels: tuple[int, ...] = (24, 32, 64, 96, 128)):
        super().__init__()
        layers = []
        for k, (before, after) in enumerate(zip((3, *channels), channels)):  # noqa: B905 (one shorter)
            convolution = nn.Conv2d(before, after, 3, stride=1 if k == 0 else 2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels[-1], len(DEGRADATIONS))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features((x - 0.5) / 0.25)
        return self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))


@dataclass(frozen=True)
class Diagnosis:
    """The probability of each of `DEGRADATIONS`, the most probable first."""

    probabilities: dict[str, float]

    @property
    def degradation(self) -> str:
        return next(iter(self.probabilities))

    @property
    def confidence(self) -> float:
        return self.probabilities[self.degradation]

    def __str__(self):
        if self.confidence >= 0.6:
            return f"{self.degradation} ({100 * self.confidence:.0f} % sure)"
        return " or ".join(f"{name} ({100 * p:.0f} %)" for name, p in self.probabilities.items() if p >= 0.15)


@dataclass(frozen=True)
class Candidate:
    """An answer to a degradation: the name of a network and its strength, see `inference.restore`."""

    degradation: str
    network: str | None  # None: leave the image as it is
    strength: float


def diagnose(image: np.ndarray) -> Diagnosis:
    """Recognise the degradation of an image.

    Args:
        image: (H, W, 3) RGB or (H, W) grey, uint8, uint16 or floats in [0, 1].

    Raises:
        UserError: another shape or type.
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise UserError(f"an image to diagnose is (H, W, 3) or (H, W), got {image.shape}")
    classifier, temperature = _classifier()
    with torch.inference_mode():
        logits = classifier(cut_crops(image)) / temperature
        # The mean over crops, and not their product: what one crop shows, its neighbours show as well.
        probabilities = logits.log_softmax(dim=1).mean(dim=0).softmax(dim=0).tolist()
    found = zip(DEGRADATIONS, probabilities, strict=True)
    return Diagnosis(dict(sorted(found, key=lambda pair: -pair[1])))


def cut_crops(image: np.ndarray) -> Tensor:
    """Up to `MOST_CROPS` crops (B, 3, 160, 160) of an image, on a grid over all of it; float32 in [0, 1]."""
    height, width = image.shape[:2]
    image = image[..., 0] if image.shape[2:] == (1,) else image
    rows, columns = (-(-side // CROP) for side in (height, width))
    while rows * columns > MOST_CROPS:
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    crops = []
    for top in np.linspace(0, max(height - CROP, 0), rows).astype(int):
        for left in np.linspace(0, max(width - CROP, 0), columns).astype(int):
            crop = as_colour(image[top : top + CROP, left : left + CROP])
            if crop.dtype.kind == "u":
                crop = crop.astype(np.float32) / np.float32(np.iinfo(crop.dtype).max)
            crops.append(torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1), np.float32)))
    return pad_to(torch.stack(crops), CROP, CROP)


def choose(
    diagnosis: Diagnosis, count: int = 3, networks: Mapping[str, str | None] = MappingProxyType(NETWORKS)
) -> list[Candidate]:
    """The best answers to a diagnosis, the best first.

    Tasks are ranked by the probability of all that their networks are for, and so are the networks of a task. With p
    the task's, the strength of the best is p, from 0.9 on 1: the mean of what the image may have been is
    ``p x_K + (1 - p) y``. That of the others is 1.

    Args:
        diagnosis: what is wrong with the image.
        count: most candidates to return; of at least 2 one leaves the image as it is, if ``networks`` allows it.
        networks: for each of `DEGRADATIONS` the network, or None.
    """
    answers: dict[str | None, list] = {}  # the network's most probable degradation, and the probability of all of them
    tasks: Counter[str] = Counter()
    task_of = lambda network: (network or "").partition("_")[0]  # noqa: E731, of names such as denoising_photo
    for degradation, probability in diagnosis.probabilities.items():
        network = networks[degradation]
        answers.setdefault(network, [degradation, 0.0])[1] += probability
        tasks[task_of(network)] += probability

    def rank(network: str | None) -> tuple:
        degradation, probability = answers[network]
        doubtful = probability < LEAST.get(degradation, 0)
        return doubtful, -tasks[task_of(network)], -probability

    candidates = []
    for network in sorted(answers, key=rank):
        p = tasks[task_of(network)]
        strength = 1.0 if candidates or network is None or p >= SURE else round(p, 1)
        candidates.append(Candidate(answers[network][0], network, strength))
    unchanged = [candidate for candidate in candidates if candidate.network is None]
    if count > 1 and unchanged and unchanged[0] not in candidates[:count]:
        return candidates[: count - 1] + unchanged
    return candidates[:count]


def restore_automatic(image: np.ndarray, device: str = "cpu", **options) -> tuple[np.ndarray, Diagnosis, Candidate]:
    """Restore an image by what `diagnose` finds in it: the image, what was found, and what was done.

    Args:
        image: as for `diagnose`.
        device: that the network runs on.
        options: of `inference.restore`; ``strength`` multiplies the candidate's.

    Returns:
        The restored image, of the same shape and type; ``image`` itself if it is left as it is.
    """
    diagnosis = diagnose(image)
    candidate = choose(diagnosis, 1)[0]
    if candidate.network is None:
        return image, diagnosis, candidate
    model = _network(candidate.network, str(device))
    strength = candidate.strength * options.pop("strength", 1.0)
    grey = image.ndim == 2 or image.shape[2] == 1
    given = as_colour(image.reshape(image.shape[:2])) if grey else image
    restored = restore(model, given, strength=strength, **options)
    if grey:
        restored = restored.mean(axis=2).reshape(image.shape)
        restored = restored.round().astype(image.dtype) if image.dtype.kind == "u" else restored
    return restored, diagnosis, candidate


@cache
def _network(name: str, device: str) -> DGUNet:
    return load_model(name, device=device)


@cache
def _classifier() -> tuple[Classifier, float]:
    """The classifier, on the CPU, and the temperature of its probabilities."""
    tensors = read_weights(WEIGHTS)["state_dict"]
    temperature = float(tensors.pop("temperature"))
    classifier = Classifier()
    classifier.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return classifier.eval(), temperature
