"""Pictures on disk: reading, pairing, cropping, and the order in which training sees them.

A training sample is a function of (seed, epoch, index) alone: datasets are indexed with (epoch, index), and draw
from a generator seeded with these numbers. Neither the number of loading workers nor that of training processes
changes a sample, and a resumed epoch sees what the first one would have seen.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from natsort import natsorted
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dgunet.errors import UserError
from dgunet.transforms import dihedral, pad_to

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class Pair(NamedTuple):
    """A degraded picture and its ground truth."""

    name: str
    input: Path
    target: Path


def read_image(path: str | Path) -> np.ndarray:
    """Read an 8-bit RGB picture as (H, W, 3) uint8, turned upright where its EXIF data says so.

    Raises:
        UserError: unreadable, grey, with transparency, or not 8 bits per channel: the network would be given
            something else than the user sees, so the message says how to convert the picture.
    """
    import cv2

    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    # UNCHANGED shows what is in the file but leaves rotated photographs rotated; only JPEGs are, and they are 8-bit.
    jpeg = encoded[:2].tobytes() == b"\xff\xd8"
    image = cv2.imdecode(encoded, cv2.IMREAD_ANYCOLOR if jpeg else cv2.IMREAD_UNCHANGED) if encoded.size else None
    if image is None:
        raise UserError(f"{path} is not a picture that can be read, or is damaged; replace or remove it")
    kind = None
    if image.dtype != np.uint8:
        kind = f"has {8 * image.itemsize} bits per channel"
    elif image.ndim == 2:
        kind = "is grey"
    elif image.shape[2] == 4:
        kind = "has transparency (RGBA)"
    elif jpeg and _is_cmyk(encoded):
        kind = "is CMYK"
    if kind is not None:
        raise UserError(f"{path} {kind}, but 8-bit RGB is needed; convert it, e.g. {_conversion(path)}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: str | Path, image: np.ndarray):
    """Write (H, W, 3) or (H, W) uint8 RGB to a file whose ending says the format; the folder is made if needed."""
    import cv2

    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: give it an ending that says the format, such as {path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, encoded = cv2.imencode(path.suffix, image[..., ::-1] if image.ndim == 3 else image)
    if not ok:
        raise OSError(f"cannot encode {path}")
    encoded.tofile(path)


def list_images(folder: str | Path) -> list[Path]:
    """Pictures directly inside a folder, naturally sorted (img2 before img10).

    Raises:
        UserError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder.absolute()}; check the path, or see the task's README for the data layout")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not paths:
        raise UserError(f"no pictures in {folder.absolute()} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return natsorted(paths, key=lambda p: p.name)


def find_pairs(root: str | Path, check_sizes: bool = True) -> list[Pair]:
    """Pairs of ``root/input`` and ``root/target``, matched by file name (without its ending).

    Raises:
        UserError: a missing or empty folder, a picture without partner, two pictures of one name; with
            ``check_sizes``, also a pair whose sizes differ or a picture whose header shows that it is unsuitable.
    """
    root = Path(root)
    sides = []
    for side in ("input", "target"):
        by_name: dict[str, Path] = {}
        for path in list_images(root / side):
            if path.stem in by_name:
                raise UserError(f"{by_name[path.stem]} and {path.name} have the same name; keep one of the two")
            by_name[path.stem] = path
        sides.append(by_name)
    inputs, targets = sides
    for have, lack, other in ((inputs, targets, "target"), (targets, inputs, "input")):
        alone = [path for name, path in have.items() if name not in lack]
        if alone:
            more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
            raise UserError(f"{alone[0]} has no partner of the same name in {root / other}{more}; add or remove it")
    pairs = [Pair(name, inputs[name], targets[name]) for name in inputs]
    if not check_sizes:
        return pairs
    with ThreadPoolExecutor(16) as pool:
        sizes = pool.map(lambda pair: (image_size(pair.input), image_size(pair.target)), pairs)
        for pair, (a, b) in zip(pairs, sizes, strict=True):
            if a != b:
                raise UserError(
                    f"{pair.input} is {a[1]}x{a[0]} but {pair.target} is {b[1]}x{b[0]}; a pair must have one size"
                )
    return pairs


def hold_back(items: list, count: int, source: str | Path) -> tuple[list, list]:
    """Split pictures or pairs for training and validation: the last ``count`` in natural order are held back.

    Neighbours in that order are often frames of one scene, which should not be on both sides.
    """
    if not 0 < count < len(items):
        raise UserError(
            f"cannot hold {count} of the {len(items)} in {source} back for validation; set TRAINING.VAL_HOLD_BACK, or "
            "TRAINING.VAL_DIR to a folder for validation"
        )
    return items[:-count], items[-count:]


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an upright picture, from its header alone; raises as `read_image` does."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            suitable = image.mode in ("RGB", "P")
            turned = image.format == "JPEG" and image.getexif().get(0x0112, 1) >= 5  # EXIF orientation
    except Exception as error:  # a damaged header fails in many ways
        raise UserError(f"{path} is not a picture that can be read, or is damaged; replace or remove it") from error
    if not suitable:
        read_image(path)  # says what is wrong with it
    return (width, height) if turned else (height, width)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) uint8 to a (C, H, W) float32 tensor in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)


class PairedPatches(Dataset):
    """Random aligned crops of picture pairs, for training.

    ``dataset[epoch, index]`` is ``(input, target)``, two (3, patch, patch) float32 tensors in [0, 1]. Pictures
    smaller than the crop are extended by reflection. A task changes `augment`, or adds to `__getitem__`.

    Args:
        root: folder with ``input/`` and ``target/``, every pair of which is checked now; or pairs.
        patch: side of the crops in pixels.
        repeat: how often each picture counts in an epoch.
        flip: random flips and rotations.
        seed: of all randomness.
    """

    def __init__(self, root: str | Path | list[Pair], patch: int, repeat: int = 1, flip: bool = True, seed: int = 1234):
        if patch < 8 or patch % 8:
            raise UserError(f"TRAINING.TRAIN_PS must be a multiple of the network's 8 pixels, got {patch}")
        self.pairs = root if isinstance(root, list) else find_pairs(root)
        self.patch, self.repeat, self.flip, self.seed = patch, repeat, flip, seed

    def __len__(self) -> int:
        return len(self.pairs) * self.repeat

    def generator(self, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
        """The generator of one sample; another ``stream`` is independent of the crop and augmentation."""
        return np.random.default_rng([self.seed, epoch, index, stream])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        rng = self.generator(epoch, index)
        pair = self.pairs[index % len(self.pairs)]
        pictures = [read_image(pair.input), read_image(pair.target)]
        height, width = pictures[0].shape[:2]
        top = rng.integers(max(height - self.patch, 0) + 1)
        left = rng.integers(max(width - self.patch, 0) + 1)
        crops = [to_tensor(p[top : top + self.patch, left : left + self.patch]) for p in pictures]
        crops = [pad_to(crop[None], self.patch, self.patch)[0] for crop in crops]
        return self.augment(rng, *crops)

    def augment(self, rng: np.random.Generator, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The original's flips and rotations: of 9 equally likely choices, two leave the crop as it is."""
        k = int(rng.integers(9)) % 8 if self.flip else 0
        return dihedral(input, k).contiguous(), dihedral(target, k).contiguous()


class PairedCentres(Dataset):
    """Central crops of picture pairs, for validation: ``dataset[index]`` is ``(input, target)``.

    Args:
        root: folder with ``input/`` and ``target/``, or pairs.
        patch: side of the crops in pixels, 0 for whole pictures. Crops are cut to multiples of 8.
    """

    def __init__(self, root: str | Path | list[Pair], patch: int):
        self.pairs = root if isinstance(root, list) else find_pairs(root)
        self.patch = patch
        # that occur; crops of one size can be batched
        self.sizes = {self.crop_size(*image_size(pair.input), pair.input) for pair in self.pairs}

    def __len__(self) -> int:
        return len(self.pairs)

    def crop_size(self, height: int, width: int, path: Path) -> tuple[int, int]:
        if self.patch:
            height, width = min(height, self.patch), min(width, self.patch)
        if min(height, width) < 8:
            raise UserError(f"{path} is smaller than 8x8 pixels, too small to validate with; remove it")
        return height - height % 8, width - width % 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        crops = []
        for path in (pair.input, pair.target):
            picture = read_image(path)
            height, width = self.crop_size(*picture.shape[:2], path)
            top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
            crops.append(to_tensor(picture[top : top + height, left : left + width]))
        return tuple(crops)


class EpochBatches(Sampler):
    """Batches of (epoch, index) keys: this process's share of every global batch of an epoch.

    The order is a permutation drawn from (seed, epoch). What does not fill a batch at the end is left out; a data
    set smaller than one batch is gone through as often as a batch needs, with other random crops each time.
    Set ``epoch`` and ``start`` (batches already done) before iterating.
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.size, self.batch, self.seed = size, batch, seed
        self.rank, self.world = rank, world
        self.epoch, self.start = 1, 0

    @property
    def steps(self) -> int:
        """Batches in a whole epoch."""
        return max(self.size // self.batch, 1)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(max(self.size, self.batch))
        share = self.batch // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * share
            yield [(self.epoch, int(index)) for index in order[first : first + share]]


def _is_cmyk(encoded: np.ndarray) -> bool:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return image.mode == "CMYK"


def _conversion(path: str | Path) -> str:
    path = Path(path)
    return f"`convert {path.name} -alpha off -depth 8 -colorspace sRGB -type TrueColor {path.stem}_rgb.png`"
