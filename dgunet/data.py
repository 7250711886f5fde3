"""Pictures on disk: reading, pairing, packing, cropping, and the order in which training sees them.

A training sample is a function of (seed, epoch, index) alone: datasets are indexed with (epoch, index), and draw
from a generator seeded with these numbers. Neither the number of loading workers nor that of training processes
changes a sample, and a resumed epoch sees what the first one would have seen.
"""

import os
import struct
from collections.abc import Callable, Iterator
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

PACK_FORMAT = "dgunet pictures 1"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class Packed(NamedTuple):
    """A picture in a file that scripts/pack_dataset.py wrote."""

    file: Path
    key: str  # of the HDF5 dataset: NAME, input/NAME or target/NAME

    def __str__(self) -> str:
        return f"{self.file}:{self.key}"


class Pair(NamedTuple):
    """A degraded picture and its ground truth."""

    name: str
    input: Path | Packed
    target: Path | Packed


def read_image(source: str | Path | Packed) -> np.ndarray:
    """Read an 8-bit RGB picture as (H, W, 3) uint8, turned upright where its EXIF data says so.

    Raises:
        UserError: unreadable, grey, with transparency, or not 8 bits per channel: the network would be given
            something else than the user sees, so the message says how to convert the picture.
    """
    return open_image(source)[:, :]


def open_image(source: str | Path | Packed):
    """A picture to take a crop from: has ``.shape``, and ``[top:bottom, left:right]`` gives what `read_image` would.

    Of a packed picture only the crop is read.

    Raises:
        UserError: as `read_image`.
    """
    if isinstance(source, Packed):
        return _open_packed(source)
    try:
        encoded = np.fromfile(source, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    size = _plain_png_size(encoded)
    return _decode(source, encoded) if size is None else _decode_png(source, encoded, size)


def _plain_png_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """(height, width) of a PNG of the usual kind: 8-bit RGB, without a transparent colour. None for any other file."""
    header = struct.Struct(">8s4x4sIIBB3x")
    if encoded.size < header.size:
        return None
    signature, kind, width, height, depth, colour = header.unpack_from(encoded)
    if (signature, kind, depth, colour) != (b"\x89PNG\r\n\x1a\n", b"IHDR", 8, 2):
        return None
    kind, position = b"", header.size + 4  # its checksum
    while kind not in (b"IDAT", b"tRNS") and position + 8 <= encoded.size:  # the chunks before the pixels
        length, kind = struct.unpack_from(">I4s", encoded, position)
        position += length + 12
    return None if kind == b"tRNS" else (height, width)


def _decode_png(path, encoded: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels that OpenCV and Pillow give, in a third of their time."""
    from kornia_rs.io import decode_image_png_u8

    try:
        return decode_image_png_u8(encoded.tobytes(), size, "rgb")
    except Exception as error:  # it has no class of its own
        raise UserError(_damaged(path)) from error


def _damaged(path) -> str:
    return f"{path} is not a picture that can be read, or is damaged; replace or remove it"


def _decode(path, encoded: np.ndarray) -> np.ndarray:
    import cv2

    # UNCHANGED shows what is in the file but leaves rotated photographs rotated; only JPEGs are, and they are 8-bit.
    jpeg = encoded[:2].tobytes() == b"\xff\xd8"
    image = cv2.imdecode(encoded, cv2.IMREAD_ANYCOLOR if jpeg else cv2.IMREAD_UNCHANGED) if encoded.size else None
    if image is None:
        raise UserError(_damaged(path))
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


def images_by_name(folder: str | Path) -> dict[str, Path]:
    """The pictures directly inside a folder by their names without ending, naturally sorted.

    Raises:
        UserError: as `list_images`; two pictures of one name.
    """
    by_name: dict[str, Path] = {}
    for path in list_images(folder):
        if path.stem in by_name:
            raise UserError(f"{by_name[path.stem]} and {path.name} have the same name; keep one of the two")
        by_name[path.stem] = path
    return by_name


def find_pairs(root: str | Path, check_sizes: bool = True) -> list[Pair]:
    """Pairs of ``root/input`` and ``root/target``, matched by file name (without its ending).

    Args:
        root: the folder, or a file that scripts/pack_dataset.py made of it.
        check_sizes: open all headers and compare the sizes.

    Raises:
        UserError: a missing or empty folder, a picture without partner, two pictures of one name; with
            ``check_sizes``, also a pair whose sizes differ or a picture whose header shows that it is unsuitable.
    """
    root = Path(root)
    if root.is_file():
        names = list_packed(root, "input")
        return [Pair(name, Packed(root, f"input/{name}"), Packed(root, f"target/{name}")) for name in names]
    inputs, targets = (images_by_name(root / side) for side in ("input", "target"))
    for have, lack, other in ((inputs, targets, "target"), (targets, inputs, "input")):
        alone = [path for name, path in have.items() if name not in lack]
        if alone:
            more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
            raise UserError(f"{alone[0]} has no partner of the same name in {root / other}{more}; add or remove it")
    pairs = [Pair(name, inputs[name], targets[name]) for name in natsorted(inputs)]  # the order of a packed file
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


def find_images(root: str | Path) -> list[Path | Packed]:
    """The pictures of a folder, or of a file that scripts/pack_dataset.py made of it; raises as `list_images` does."""
    root = Path(root)
    return [Packed(root, name) for name in list_packed(root, "/")] if root.is_file() else list_images(root)


def list_packed(file: Path, group: str) -> list[str]:
    """Names in one group of a packed file (``input``, or ``/`` for pictures without a partner), naturally sorted.

    Raises:
        UserError: not such a file, or one of the other kind.
    """
    content = _packed_file(file)
    if ("input" in content) != (group == "input"):
        kind = "picture pairs" if "input" in content else "single pictures"
        raise UserError(f"{file} holds {kind}, which is not what this task trains on; see scripts/pack_dataset.py")
    return natsorted(content[group])


def _open_packed(source: Packed):
    try:
        return _packed_file(source.file)[source.key]
    except KeyError as error:
        raise UserError(f"there is no {source.key} in {source.file}; pack the folder again") from error


_open_files: dict = {}  # packed files by path


def _packed_file(file: Path):
    """The open file."""
    if file in _open_files:
        return _open_files[file]
    import h5py

    try:
        content = h5py.File(file)
    except OSError as error:
        raise UserError(
            f"{file} is not a packed data set, or is damaged; see scripts/pack_dataset.py ({error})"
        ) from error
    if content.attrs.get("format") != PACK_FORMAT:
        raise UserError(f"{file} was not written by scripts/pack_dataset.py")
    _open_files[file] = content
    return content


def _close_packed_files():
    while _open_files:
        _open_files.popitem()[1].close()


os.register_at_fork(before=_close_packed_files)  # loading processes that share an open HDF5 file would share its state


def image_size(path: str | Path | Packed) -> tuple[int, int]:
    """(height, width) of an upright picture, from its header alone; raises as `read_image` does."""
    from PIL import Image

    if isinstance(path, Packed):
        return open_image(path).shape[:2]
    try:
        with Image.open(path) as image:
            width, height = image.size
            suitable = image.mode in ("RGB", "P")
            turned = image.format == "JPEG" and image.getexif().get(0x0112, 1) >= 5  # EXIF orientation
    except Exception as error:  # a damaged header fails in many ways
        raise UserError(_damaged(path)) from error
    if not suitable:
        read_image(path)  # says what is wrong with it
    return (width, height) if turned else (height, width)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) or (H, W) to a (C, H, W) tensor of the same type; see `transforms.unit_range`."""
    return torch.from_numpy(np.array(image if image.ndim == 2 else image.transpose(2, 0, 1))).view(-1, *image.shape[:2])


class RandomPatches(Dataset):
    """What training data sets share: crops that are a function of (seed, epoch, index).

    Crops are uint8, and become floats on the device (`transforms.unit_range`): a fourth of the way for the bytes.

    Args:
        items: pictures or pairs.
        patch: side of the crops in pixels, a multiple of ``multiple``.
        repeat: how often each item counts in an epoch.
        flip: whether to augment by flips and rotations.
        seed: of all randomness.
    """

    multiple = 8

    def __init__(self, items: list, patch: int, repeat: int, flip: bool, seed: int):
        if patch < self.multiple or patch % self.multiple:
            raise UserError(f"TRAINING.TRAIN_PS must be a multiple of {self.multiple} pixels, got {patch}")
        self.items, self.patch, self.repeat, self.flip, self.seed = items, patch, repeat, flip, seed

    def __len__(self) -> int:
        return len(self.items) * self.repeat

    def generator(self, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
        """The generator of one sample; another ``stream`` is independent of the crop and augmentation."""
        return np.random.default_rng([self.seed, epoch, index, stream])

    def crop(self, rng: np.random.Generator, *pictures) -> list[np.ndarray]:
        """The same random area of each picture, smaller than ``patch`` where the pictures are."""
        height, width = pictures[0].shape[:2]
        top = int(rng.integers(max(height - self.patch, 0) + 1))
        left = int(rng.integers(max(width - self.patch, 0) + 1))
        return [p[top : min(top + self.patch, height), left : min(left + self.patch, width)] for p in pictures]

    def extend(self, crop: np.ndarray) -> Tensor:
        """A crop as a (C, patch, patch) tensor, extended by reflection where it is too small."""
        return pad_to(to_tensor(crop)[None], self.patch, self.patch)[0]


class PairedPatches(RandomPatches):
    """Random aligned crops of picture pairs, for training.

    ``dataset[epoch, index]`` is ``(input, target)``, two (3, patch, patch) tensors: uint8, or float32 in [0, 1] where a
    task's augmentation computes with them. Pictures smaller than the crop are extended by reflection. A task changes
    `augment`, or adds to `__getitem__`.

    Args:
        root: folder with ``input/`` and ``target/``, every pair of which is checked now, its packed file, or pairs.
        patch, repeat, flip, seed: see `RandomPatches`.
    """

    def __init__(self, root: str | Path | list[Pair], patch: int, repeat: int = 1, flip: bool = True, seed: int = 1234):
        super().__init__(root if isinstance(root, list) else find_pairs(root), patch, repeat, flip, seed)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        rng = self.generator(epoch, index)
        pair = self.items[index % len(self.items)]
        crops = self.crop(rng, open_image(pair.input), open_image(pair.target))
        return self.augment(rng, *map(self.extend, crops))

    def augment(self, rng: np.random.Generator, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The original's flips and rotations: of 9 equally likely choices, two leave the crop as it is."""
        k = int(rng.integers(9)) % 8 if self.flip else 0
        return dihedral(input, k).contiguous(), dihedral(target, k).contiguous()


class SyntheticPatches(RandomPatches):
    """Random crops of clean pictures, degraded on the way: ``dataset[epoch, index]`` is ``(input, target)``.

    No crop is seen twice with the same degradation. Both are (3, patch, patch), input float32, target uint8.

    Args:
        items: pictures.
        degrade: a function of `dgunet.synthesis`: picture (H, W, 3) in [0, 1] and generator to degraded picture.
        patch, repeat, flip, seed: see `RandomPatches`.
        margin: pixels around the crop that are degraded with it, so that rain falls and blur comes in from outside.
    """

    def __init__(
        self, items: list, degrade: Callable, patch: int, repeat: int = 1, flip: bool = True, seed: int = 1234,
        margin: int = 32,
    ):  # fmt: skip
        super().__init__(items, patch + 2 * margin, repeat, flip, seed)
        self.degrade, self.margin = degrade, margin

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        rng = self.generator(epoch, index)
        (crop,) = self.crop(rng, open_image(self.items[index % len(self.items)]))
        target = self.extend(crop)
        if self.flip:
            target = dihedral(target, int(rng.integers(8)))
        degraded = self.degrade(target.permute(1, 2, 0).numpy().astype(np.float32) / 255, rng)
        inside = (..., slice(self.margin, -self.margin or None), slice(self.margin, -self.margin or None))
        return to_tensor(degraded)[inside].contiguous(), target[inside].contiguous()


class PairedCentres(Dataset):
    """Central crops of picture pairs, for validation: ``dataset[index]`` is ``(input, target)``, (3, H, W) uint8.

    Args:
        root: folder with ``input/`` and ``target/``, or pairs.
        patch: side of the crops in pixels, 0 for whole pictures. Crops are cut to multiples of 8.
    """

    def __init__(self, root: str | Path | list[Pair], patch: int):
        self.pairs = root if isinstance(root, list) else find_pairs(root)
        self.patch = patch
        # Those that occur: crops of one size can be batched.
        self.sizes = {self.crop_size(*image_size(pair.input), pair.input) for pair in self.pairs}

    def __len__(self) -> int:
        return len(self.pairs)

    def crop_size(self, height: int, width: int, path: Path | Packed) -> tuple[int, int]:
        if self.patch:
            height, width = min(height, self.patch), min(width, self.patch)
        if min(height, width) < 8:
            raise UserError(f"{path} is smaller than 8x8 pixels, too small to validate with; remove it")
        return height - height % 8, width - width % 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        crops = []
        for path in (pair.input, pair.target):
            picture = open_image(path)
            height, width = self.crop_size(*picture.shape[:2], path)
            top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
            crops.append(to_tensor(picture[top : top + height, left : left + width]))
        return tuple(crops)


class SyntheticCentres(PairedCentres):
    """Central crops of clean pictures, each degraded in its own way, always the same: for validation.

    ``dataset[index]`` is ``(input, target)``, input float32 and target uint8; the arguments are those of
    `SyntheticPatches`.
    """

    def __init__(self, items: list, degrade: Callable, patch: int, seed: int = 1234):
        super().__init__([Pair(str(item), item, item) for item in items], patch)
        self.degrade, self.seed = degrade, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _, target = super().__getitem__(index)
        rng = np.random.default_rng([self.seed, index])
        return to_tensor(self.degrade(target.permute(1, 2, 0).numpy().astype(np.float32) / 255, rng)), target


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
