"""Images on disk: reading and writing them, matching pairs, packed files, and the split for training."""

import contextlib
import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from natsort import natsorted
from torch import Tensor

from dgunet.errors import UserError, one_line, shorten_list
from dgunet.files import IMAGE_SUFFIXES, atomic_write, escaped, nfc
from dgunet.photos import MAX_PIXELS, opened, orientation, read_photo
from dgunet.tiff import Tiff
from dgunet.transforms import apply_orientation

PACK_FORMAT = "dgunet images 1"
WRITABLE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # formats of `write_image`
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # which operating systems add to folders


class Packed(NamedTuple):
    """An image in a file that scripts/pack_dataset.py wrote."""

    file: Path
    key: str  # of the HDF5 dataset: NAME, input/NAME or target/NAME

    def __str__(self) -> str:
        return f"{self.file}:{self.key}"


class Pair(NamedTuple):
    """A degraded image and its ground truth."""

    name: str
    input: Path | Packed
    target: Path | Packed


def read_image(source: str | Path | Packed, grey: bool = False) -> np.ndarray:
    """Read an 8-bit RGB image as (H, W, 3) uint8, turned upright where its EXIF data says so.

    The format is detected from the content, not from the suffix. JPEG, PNG, BMP, TIFF and WebP are always read; other
    formats (GIF, AVIF, JPEG 2000, PPM, TGA, HEIC with pillow-heif, ...) where the installed Pillow reads them.

    Args:
        source: a file, or an image in a packed one.
        grey: whether a grey image is read as well, as (H, W).

    Raises:
        UserError: unreadable, a camera's raw file, grey, with transparency, of other than 8 bits per channel, or (in
            other formats than the five) of several frames.
    """
    return open_image(source, grey)[:, :]


def open_image(source: str | Path | Packed, grey: bool = False):
    """An image to take a crop from: has ``.shape``, and ``[top:bottom, left:right]`` gives what `read_image` would.

    Of a packed image only the crop is read.

    Raises:
        UserError: as `read_image`.
    """
    if isinstance(source, Packed):
        return _PackedImage(source)
    return _decode(Path(source), grey)


def read_luma(source: str | Path | Packed) -> np.ndarray:
    """Luminance of an image, (H, W) uint8: OpenCV's full-range Y of YCrCb; grey images as they are.

    Reads what the published sets of compressive sensing come in: grey, colour and palette images, .png, .tif, ...

    Raises:
        UserError: unreadable, with transparency, or not 8 bits per channel.
    """
    return open_luma(source)[:, :]


def open_luma(source: str | Path | Packed):
    """An image's luminance to take a crop from, as `open_image`; single images are packed as luminance already."""
    image = open_image(source, grey=True)
    if len(image.shape) == 2:
        return image
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[:, :, 0]


# Formats whose 8-bit pixels OpenCV decodes as Pillow does, in half to two thirds of its time.
_BY_OPENCV = ("JPEG", "MPO", "PNG", "BMP", "WEBP")


def _plain(image, grey: bool) -> bool:
    """Whether the header says that an image can be trained on: RGB (or grey) of 8 bits without transparency."""
    if isinstance(image, Tiff):
        mode = image.mode
    else:
        known = image.format in _BY_OPENCV and "transparency" not in image.info and ";16B" not in str(image.tile)
        mode = image.mode if known else ""
    return mode in (("RGB", "P", "L") if grey else ("RGB", "P"))


def _decode(path: Path, grey: bool) -> np.ndarray:
    with opened(path) as (image, file):
        kind = image.format
        if kind not in _BY_OPENCV or not _plain(image, grey):
            return _read_checked(path, kind, grey)
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the UserError says what is wrong
        file.seek(0)
        colour = cv2.IMREAD_GRAYSCALE if image.mode == "L" else cv2.IMREAD_COLOR
        pixels = None
        with contextlib.suppress(cv2.error):  # an absurd size
            pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None or pixels.shape[:2] != (image.height, image.width):  # `image_size` believes the header
            raise UserError(f"{path} cannot be decoded; it may be damaged: replace or remove it")
        pixels = pixels if image.mode == "L" else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        return apply_orientation(pixels, orientation(image, file))


def _read_checked(path: Path, kind: str, grey: bool) -> np.ndarray:
    """An image as `read_photo` reads it, unless it would not be what is in the file; ``kind``: its format."""
    image = read_photo(path)
    lossy = r"\d+ (bits|further)|(CMYK|LAB)\b" + ("" if kind in ("TIFF", "WEBP") else "|the first of")
    lost = [note for note in image.notes if re.match(lossy, note)]
    if image.pixels.dtype != np.uint8:
        problem = "has 16 bits per channel"
    elif image.alpha is not None:
        problem = "has transparency (RGBA)"
    elif lost:
        problem = f"would be read otherwise than it is ({lost[0]})"
    elif image.pixels.ndim == 2 and not grey:
        problem = "is grey"
    else:
        return np.require(image.pixels, requirements="W")  # Pillow's memory is not
    needed = "8-bit grey or RGB" if grey else "8-bit RGB"
    raise UserError(f"{path} {problem}, but {needed} is needed; convert it")


def write_image(path: str | Path, image: np.ndarray):
    """Write (H, W, 3) or (H, W) uint8 RGB to a file whose ending says the format; the folder is made if needed.

    The file appears when it is complete.
    """
    import cv2

    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise UserError(f"{path}: give it an ending that says the format, such as {path.name}.png")
    try:
        ok, encoded = cv2.imencode(path.suffix, image[..., ::-1] if image.ndim == 3 else image)
    except cv2.error:
        ok = False
    if not ok:
        height, width = image.shape[:2]
        raise UserError(f"{path}: {width}x{height} pixels cannot be written in this format; choose .png or .tif")
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def list_images(folder: str | Path, report: bool = True) -> list[Path]:
    """Images directly inside a folder, naturally sorted (img2 before img10): files with the suffix of an image.

    Args:
        folder: path of the folder.
        report: whether to list other files on stderr (see `report_skipped_files`).

    Raises:
        UserError: no such folder, no image in it, or two whose names differ in Unicode form alone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder.absolute()}; check the path, or see the task's README for the data layout")
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    paths = natsorted((path for path in there if path.suffix.lower() in IMAGE_SUFFIXES), key=lambda path: path.name)
    if not paths:
        raise UserError(f"no images in {folder.absolute()} (recognised suffixes: {', '.join(sorted(IMAGE_SUFFIXES))})")
    index_by_name((path.name, path) for path in paths)
    if report:
        report_skipped_files(folder, [path for path in there if path.suffix.lower() not in IMAGE_SUFFIXES])
    return paths


_reported: set[Path] = set()  # folders


def report_skipped_files(folder: Path, others: list[Path]):
    """Print once per folder, in a line on stderr, which files are skipped; not those of operating systems."""
    others = [
        path for path in others if path.name.lower() not in SYSTEM_FILES and not path.name.startswith(("@", "__MACOSX"))
    ]
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if others and first and folder.absolute() not in _reported:
        _reported.add(folder.absolute())
        names = natsorted(one_line(f"{path.name}/" if path.is_dir() else path.name) for path in others)
        print(f"note: skipped in {one_line(str(folder))}, not images: {shorten_list(names)}", file=sys.stderr)


def index_by_name(named: Iterable[tuple[str, Path | Packed]]) -> dict[str, Path | Packed]:
    """A dict of the sources by name, normalised to Unicode's form NFC.

    Raises:
        UserError: two sources of one name.
    """
    found: dict[str, tuple[str, Path | Packed]] = {}
    for name, source in named:
        key = nfc(name)
        if key in found:
            other_name, other = found[key]
            if name == other_name:
                own = source.key if isinstance(source, Packed) else source.name
                raise UserError(f"{other} and {own} have the same name; keep one of the two")
            raise UserError(
                f"{escaped(other)} and {escaped(source)} have names that differ in their Unicode form alone (NFC, "
                "NFD) and look the same; keep one of the two"
            )
        found[key] = name, source
    return {key: source for key, (_, source) in found.items()}


def images_by_name(folder: str | Path, report: bool = True) -> dict[str, Path]:
    """The images directly inside a folder by their names without suffix (in Unicode's form NFC), naturally sorted.

    Raises:
        UserError: as `list_images`; two images of one name.
    """
    return index_by_name((path.stem, path) for path in list_images(folder, report))


def find_pairs(root: str | Path, check_sizes: bool = True) -> list[Pair]:
    """Pairs of ``root/input`` and ``root/target``, matched by file name (without suffix).

    Names are compared in Unicode's form NFC, which a `Pair` has, since macOS and Linux write different forms.

    Args:
        root: the folder, or a file that scripts/pack_dataset.py made of it.
        check_sizes: read all headers and compare the sizes.

    Raises:
        UserError: a missing or empty folder, an image without partner, two images of one name; with
            ``check_sizes``, also a pair whose sizes differ or an image whose header shows that it is unsuitable.
    """
    root = Path(root)
    packed = root.is_file()
    inputs, targets = (
        index_by_name((name, Packed(root, f"{side}/{name}")) for name in list_packed(root, side))
        if packed
        else images_by_name(root / side)
        for side in ("input", "target")
    )
    for have, lack, other in ((inputs, targets, "target"), (targets, inputs, "input")):
        alone = [path for name, path in have.items() if name not in lack]
        if alone:
            more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
            raise UserError(f"{alone[0]} has no partner of the same name in {root / other}{more}; add or remove it")
    pairs = [Pair(name, inputs[name], targets[name]) for name in natsorted(inputs)]
    if not check_sizes:
        return pairs
    with ThreadPoolExecutor(1 if packed else 16) as pool:
        list(pool.map(pair_size, pairs))
    return pairs


def pair_size(pair: Pair) -> tuple[int, int]:
    """(height, width) of both images, from their headers; raises as `find_pairs` does."""
    a, b = image_size(pair.input), image_size(pair.target)
    if a != b:
        raise UserError(f"{pair.input} is {a[1]}x{a[0]} but {pair.target} is {b[1]}x{b[0]}; a pair must have one size")
    return a


def hold_out(items: list, count: int, source: str | Path) -> tuple[list, list]:
    """Split images or pairs into (training, validation): the last in natural order are held out.

    Neighbours in that order are often frames of one scene, so that at most one scene is in both parts.

    Args:
        items: images or pairs.
        count: how many to hold out at most; no more than a tenth of the items, but at least one.
        source: the folder or packed file, for the message.
    """
    if count < 1 or len(items) < 2:
        raise UserError(
            f"cannot hold out {count} of the {len(items)} images in {source} for validation; set "
            "TRAINING.VAL_HOLD_BACK, or TRAINING.VAL_DIR to a folder for validation"
        )
    count = min(count, max(len(items) // 10, 1))
    return items[:-count], items[-count:]


def exclude(items: list[Path | Packed | Pair], listing: str | Path) -> list:
    """Exclude the images or pairs that a text file lists, one name per line, with or without suffix.

    Names are compared in Unicode's form NFC. Patches and copies, which scripts/prepare_patches.py and make_demo_data.py
    name NAME_1, NAME_2, ..., are excluded with their image.

    Raises:
        UserError: no such file, it names none of the images, or all of them.
    """
    try:
        lines = [line.strip() for line in Path(listing).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"TRAINING.EXCLUDE: cannot read {listing}; it is a text file with one name to a line"
        ) from error

    def stem(name: str) -> str:
        return nfc(Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name)

    def name(item) -> str:
        return item.key if isinstance(item, Packed) else item.name

    def excluded(item) -> bool:
        own = stem(name(item))
        return own in names or re.sub(r"_\d+$", "", own) in names

    names = set(map(stem, lines))
    left = [item for item in items if not excluded(item)]
    if len(left) in (0, len(items)):
        which = "none" if left else "all"
        raise UserError(
            f"TRAINING.EXCLUDE: {listing} names {which} of the {len(items)} images, as {name(items[0])}; correct it, "
            'or exclude nothing with TRAINING.EXCLUDE ""'
        )
    return left


def fingerprint(items: list[Path | Packed | Pair]) -> dict[str, Tensor | bool]:
    """Names and sizes that identify training data, independent of their location, for `changed_items`.

    Sizes are in bytes for files, in pixels for packed images (``packed``).
    """
    names, sizes, packed = [], [], False
    for name, source in _sources(items):
        packed = isinstance(source, Packed)
        names.append(_digest(name))
        sizes.append(_PackedImage(source).size if packed else os.stat(source).st_size)
    return {"names": torch.tensor(names), "sizes": torch.tensor(sizes), "packed": packed}


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little", signed=True)


def changed_items(items: list[Path | Packed | Pair], then: dict[str, Tensor | bool]) -> str:
    """In words, how training data differ from those of the `fingerprint` ``then``; empty if they do not."""
    now = fingerprint(items)
    before = dict(zip(then["names"].tolist(), then["sizes"].tolist(), strict=True))
    names, after = {}, {}
    for (name, _), key, size in zip(_sources(items), now["names"].tolist(), now["sizes"].tolist(), strict=True):
        if key not in before and (old := _digest(unicodedata.normalize("NFD", name))) in before:
            key = old  # of a run before 0.3, when names were not normalised
        names[key], after[key] = name, size
    new = [names[key] for key in after if key not in before]
    comparable = now["packed"] == then["packed"]
    other = [names[key] for key in after if comparable and before.get(key, after[key]) != after[key]]
    gone = len(before.keys() - after.keys())
    parts = [f"{len(some)} {what} ({some[0]}{', ...' if len(some) > 1 else ''})"
            for some, what in ((new, "new"), (other, "of another size")) if some]  # fmt: skip
    return ", ".join(parts + ([f"{gone} gone"] if gone else []))


def _sources(items: list[Path | Packed | Pair]) -> Iterator[tuple[str, Path | Packed]]:
    """(name, source) of all images; a name is the same in a folder and in its packed file."""
    for item in items:
        if isinstance(item, Pair):
            yield f"input/{item.name}", item.input
            yield f"target/{item.name}", item.target
        else:
            yield nfc(item.key if isinstance(item, Packed) else item.name), item


def find_images(root: str | Path) -> list[Path | Packed]:
    """The images of a folder, or of a file that scripts/pack_dataset.py made of it; raises as `list_images` does."""
    root = Path(root)
    if not root.is_file():
        return list_images(root)
    return list(index_by_name((name, Packed(root, name)) for name in list_packed(root, "/")).values())


def list_packed(file: Path, group: str) -> list[str]:
    """Names in one group of a packed file (``input``, ``target``, or ``/`` for images without a partner), sorted.

    Raises:
        UserError: not such a file, a damaged one, or one of the other kind.
    """
    with _damage_named(file):
        content = _packed_file(file)
        pairs = "input" in content
        names = natsorted(map(os.fsdecode, content[group])) if pairs == (group != "/") else None
    if names is None:
        kind = "image pairs" if pairs else "single images"
        raise UserError(f"{file} holds {kind}, which is not what this task trains on; see scripts/pack_dataset.py")
    if not names:
        raise UserError(f"no images in {file}; pack the folder again")
    return names


@contextlib.contextmanager
def _damage_named(source: Path | Packed) -> Iterator[None]:
    """Around reading a packed file: its damage, which shows in many ways, becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source} is damaged; pack the folder again with scripts/pack_dataset.py") from error


class _PackedImage:
    """An image in a packed file; of a pair (H, W, 3), a single one (H, W)."""

    def __init__(self, source: Packed):
        self.source = source
        channels = (3,) if "/" in source.key else ()
        with _damage_named(source):
            self.pixels = _packed_file(source.file)[os.fsencode(source.key)]  # names need not be UTF-8
            self.shape = tuple(self.pixels.shape)
            if self.pixels.dtype != np.uint8 or len(self.shape) != 2 + len(channels) or self.shape[2:] != channels:
                raise ValueError("no image")
            if not 0 < self.size <= MAX_PIXELS:
                raise ValueError("no size of an image")

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, area) -> np.ndarray:
        with _damage_named(self.source):
            return self.pixels[area]


_open_files: dict = {}  # packed files by path


def _packed_file(file: Path):
    """The open file."""
    if file in _open_files:
        return _open_files[file]
    import h5py

    try:
        content = h5py.File(file)
        known = content.attrs.get("format") == PACK_FORMAT
    except Exception as error:  # damage shows in many ways
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} is not a packed data set, or is damaged; see scripts/pack_dataset.py ({reason})"
        ) from error
    if not known:
        content.close()
        raise UserError(f"{file} was not written by scripts/pack_dataset.py")
    _open_files[file] = content
    return content


def _close_packed_files():
    while _open_files:
        _open_files.popitem()[1].close()


if hasattr(os, "register_at_fork"):  # data workers must not share the state of an open HDF5 file
    os.register_at_fork(before=_close_packed_files)


def image_size(source: str | Path | Packed, grey: bool = False) -> tuple[int, int]:
    """(height, width) of an upright image, from its header alone; arguments and exceptions as of `read_image`."""
    if isinstance(source, Packed):
        return open_image(source).shape[:2]
    with opened(Path(source)) as (image, file):
        if _plain(image, grey):
            turned = orientation(image, file) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    return read_image(source, grey).shape[:2]  # decodes it, or says what is wrong with it


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) or (H, W) to a (C, H, W) tensor of the same type; see `transforms.unit_range`."""
    return torch.from_numpy(np.array(image if image.ndim == 2 else image.transpose(2, 0, 1))).view(-1, *image.shape[:2])
