"""The weights that come with dgunet, by name."""

import difflib
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dgunet.checkpoints.safetensors import read_about
from dgunet.model.variants import find_variant
from dgunet.runtime.errors import ROOT, UserError

IN_REPOSITORY = "[A-Z]*/pretrained_models/*/weights.safetensors"
# Names of version 0.2, for one release, and the weights that replace theirs.
FORMER_NAMES = {"denoising_real": "denoising_photo", "deraining_streaks": "deraining_mixture"}


@dataclass(frozen=True)
class Record:
    """What is known of weights: metadata of their file, from the ``record.yaml`` beside it."""

    name: str  # by which `load_model` knows them
    task: str  # "denoising", ...
    path: Path  # of the .safetensors file
    trained_for: str  # a sentence
    not_for: str  # a sentence
    scores: dict[str, list[float]]  # by test set: PSNR in dB, SSIM
    trained_on: str
    licence: str
    hours: float  # that the training took on the hardware
    hardware: str
    date: str  # year-month-day
    noise_sigma: tuple[float, float] | None = None  # weakest and strongest noise they were trained for, 8-bit
    local: dict[str, int] | bool = False  # windows for local statistics, see `inference.restore`; False: none pay


def list_pretrained() -> list[Record]:
    """The records of all weights that come with dgunet, sorted by name."""
    return list(_records().values())


def find_pretrained(name: str) -> Record:
    """The record of the weights of this name, or with a warning of those that have replaced them.

    Raises:
        UserError: no weights have it.
    """
    records = _records()
    if name in FORMER_NAMES:
        warnings.warn(f"the weights {name} are now {FORMER_NAMES[name]}", FutureWarning, stacklevel=3)
        name = FORMER_NAMES[name]
    if name not in records:
        guess = difflib.get_close_matches(name, records, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"known are {', '.join(records) or 'none'}"
        raise UserError(f"no weights {name!r:.100}, neither a file nor a name; {hint}")
    return records[name]


def locate(weights: str | Path) -> Path:
    """The file of a path, or of the name of weights that come with dgunet.

    Raises:
        UserError: it can only be a name, and no weights have it.
    """
    path = Path(weights)
    if path.suffix or path.name != str(weights) or os.path.isfile(path):
        return path
    return path if os.path.exists(path) and path.name not in _records() else find_pretrained(path.name).path


@cache
def _records() -> dict[str, Record]:
    packed = Path(__file__).parents[1] / "pretrained_models"  # where the wheel has them (pyproject.toml)
    files = packed.glob("*/*/weights.safetensors") if packed.exists() else ROOT.glob(IN_REPOSITORY)
    records = []
    for path in files:
        about = read_about(path)
        fields = {name: tuple(v) if name == "noise_sigma" and v else v for name, v in about["record"].items()}
        records.append(Record(task=find_variant(about["model"]["name"]).task, path=path, **fields))
    by_number = [(re.sub(r"\d+", lambda number: number[0].zfill(4), record.name), record) for record in records]
    return {record.name: record for _, record in sorted(by_number, key=lambda pair: pair[0])}
