"""Testing: test sets, restoring them, the literature's protocols, tables of scores."""

from dgunet._moved import former_names
from dgunet.evaluation.runner import evaluate, restore_images
from dgunet.evaluation.scoresheet import Result, Row, ScoreSheet
from dgunet.evaluation.sets import ImageSet, Sample, image_samples, paired, pairs_or_images

__all__ = [
    "ImageSet", "Result", "Row", "Sample", "ScoreSheet", "evaluate", "image_samples", "paired", "pairs_or_images",
    "restore_images",
]  # fmt: skip

__getattr__ = former_names(__name__)
