"""Pictures on disk: reading, pairing, packing, and which of them are trained on."""

import hashlib
import io
import os
import re
import shlex
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgunet.errors import UserError, optional
from dgunet.files import open_file, replacing
from dgunet.transforms import upright

natsorted = optional("natsort").natsorted

PACK_FORMAT = "dgunet pictures 1"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 2**30  # of a picture: OpenCV's limit


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


def read_image(source: str | Path | Packed, grey: bool = False) -> np.ndarray:
    """Read an 8-bit RGB picture as (H, W, 3) uint8, turned upright where its EXIF data says so.

    Args:
        source: a file, or a picture in a packed one.
        grey: whether a grey picture is read as well, as (H, W).

    Raises:
        UserError: unreadable, grey, with transparency, or not 8 bits per channel: the network would be given
            something else than the user sees, so the message says how to convert the picture.
    """
    return open_image(source, grey)[:, :]


def open_image(source: str | Path | Packed, grey: bool = False):
    """A picture to take a crop from: has ``.shape``, and ``[top:bottom, left:right]`` gives what `read_image` would.

    Of a packed picture only the crop is read.

    Raises:
        UserError: as `read_image`.
    """
    if isinstance(source, Packed):
        return _PackedPicture(source)
    try:
        with open_file(source) as file:
            return _decode(source, file.read(), grey)
    except MemoryError as error:
        raise UserError(f"{source} needs more memory than there is; make it smaller, or remove it") from error


def read_luma(source: str | Path | Packed) -> np.ndarray:
    """Luminance of a picture, (H, W) uint8: OpenCV's full-range Y of YCrCb; grey pictures as they are.

    Reads what the published sets of compressive sensing come in: grey, colour and palette pictures, .png, .tif, ...

    Raises:
        UserError: unreadable, with transparency, or not 8 bits per channel.
    """
    return open_luma(source)[:, :]


def open_luma(source: str | Path | Packed):
    """A picture's luminance to take a crop from, as `open_image`; single pictures are packed as luminance already."""
    picture = open_image(source, grey=True)
    if len(picture.shape) == 2:
        return picture
    cv2 = optional("cv2")
    return cv2.cvtColor(picture, cv2.COLOR_RGB2YCrCb)[:, :, 0]


class _Header(NamedTuple):
    """What the first bytes of a file say of the picture in it."""

    size: tuple[int, int]  # height and width of the upright picture
    mode: str  # RGB, P (a palette of RGB), L (grey), or another one in Pillow's words, which does not suit
    turn: int = 1  # EXIF orientation that decoding does not heed
    plain_png: tuple[int, int] | None = None  # height and width as stored, of a PNG that kornia reads


def _header(file: BinaryIO) -> _Header | None:
    """The header of a picture; None where it cannot be told, which does not mean that nothing can read the picture."""
    magic = file.read(4)
    file.seek(0)
    kinds = {b"\xff\xd8": "Jpeg", b"BM": "Bmp", b"II": "Tiff", b"MM": "Tiff", b"RI": "WebP"}
    try:
        if magic == b"\x89PNG":
            return _png_header(file)
        kind = kinds[magic[:2]]
        # Not Image.open: that refuses photographs of 180 megapixels.
        image = getattr(optional(f"PIL.{kind}ImagePlugin"), f"{kind}ImageFile")(file)
        if kind == "Tiff":  # whose orientation OpenCV heeds, and Pillow in this size or not, as its version may be
            width, height, turn = (int(image.tag_v2.get(tag, 1)) for tag in (256, 257, 274))
            return _Header((width, height) if 5 <= turn <= 8 else (height, width), image.mode)
        turn = image.getexif().get(0x0112, 1)
        turn = turn if turn in range(1, 9) else 1
        return _Header(image.size if turn >= 5 else image.size[::-1], image.mode, turn)
    except ImportError:
        raise
    except Exception:  # a damaged header fails in many ways
        return None


def _png_header(file: BinaryIO) -> _Header | None:
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return None
    chunks = {}
    while b"IDAT" not in chunks:  # those before the pixels
        length, kind = struct.unpack(">I4s", file.read(8))
        data = file.read(length + 4) if kind != b"IDAT" else b""
        if data and zlib.crc32(kind + data[:-4]) != int.from_bytes(data[-4:], "big"):
            return None
        chunks[kind] = data[:-4]
    width, height, depth, colour = struct.unpack(">IIBB3x", chunks[b"IHDR"])
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1) * width * height
    if bits > 8 * 1032 * file.seek(0, os.SEEK_END):  # the most that deflate can do; asked for more, decoders choke
        return None
    exif = chunks[b"eXIf"] if b"eXIf" in chunks else _exif_at_the_end(file)
    turn = 1 if exif is None else _orientation(exif)
    if b"tRNS" in chunks:
        mode = "RGBA"
    else:
        mode = "P" if colour == 3 else {(8, 2): "RGB", (8, 0): "L"}.get((depth, colour), "another")
    size = height, width
    return _Header(size[::-1] if turn >= 5 else size, mode, turn, size if mode == "RGB" else None)


def _exif_at_the_end(file: BinaryIO) -> bytes | None:
    """The data of a PNG's eXIf chunk in the last 128 KiB, as ExifTool puts it, where there is one."""
    file.seek(max(file.seek(0, os.SEEK_END) - 2**17, 0))
    tail = file.read()
    start = tail.find(b"eXIf", 4)
    while start >= 4:
        end = start + 4 + int.from_bytes(tail[start - 4 : start], "big")
        if zlib.crc32(tail[start:end]).to_bytes(4, "big") == tail[end : end + 4]:  # not by chance among the pixels
            return tail[start + 4 : end]
        start = tail.find(b"eXIf", start + 1)
    return None


def _orientation(exif: bytes) -> int:
    """1 to 8; a damaged block says nothing."""
    data = optional("PIL.Image").Exif()
    try:
        data.load(exif)
        turn = data.get(0x0112, 1)
    except Exception:  # fails in many ways
        return 1
    return turn if turn in range(1, 9) else 1


def _decode(path, encoded: bytes, grey: bool) -> np.ndarray:
    header = _header(io.BytesIO(encoded))
    if header is None:
        if encoded.startswith(b"\x89PNG"):  # checksums do not lie
            raise UserError(_damaged(path))
        return _decode_any(path, encoded, "another", grey)
    height, width = header.size
    if height * width > MAX_PIXELS:
        raise UserError(f"{path} says that it has {width}x{height} pixels, more than can be read; remove it")
    if header.plain_png is not None:
        image = _decode_png(path, encoded, header.plain_png)
    else:
        image = _decode_any(path, encoded, header.mode, grey)
    image = upright(image, header.turn)
    if image.shape[:2] != header.size:  # `image_size` believed it
        raise UserError(_damaged(path))
    return image


def _decode_png(path, encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    """The pixels that OpenCV and Pillow give, in a third of their time."""
    decode = optional("kornia_rs.io").decode_image_png_u8
    try:
        return decode(encoded, size, "rgb")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it has no class of its own, and its panics are no Exception
        raise UserError(_damaged(path)) from error


def _damaged(path) -> str:
    return f"{path} is not a picture that can be read, or is damaged; replace or remove it"


def _decode_any(path, encoded: bytes, mode: str, grey: bool) -> np.ndarray:
    cv2 = optional("cv2")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong is told below
    try:
        # UNCHANGED shows what is in the file.
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED) if encoded else None
    except cv2.error as error:  # an absurd size
        raise UserError(_damaged(path)) from error
    if image is None:
        raise UserError(_damaged(path))
    kind = None
    if image.dtype != np.uint8:
        kind = f"has {8 * image.itemsize} bits per channel"
    elif mode == "CMYK":
        kind = "is CMYK"
    elif mode == "RGBA" or image.shape[2:] == (4,):
        kind = "has transparency (RGBA)"
    elif image.ndim == 2 and not grey:
        kind = "is grey"
    if kind is not None:
        needed = "8-bit grey or RGB" if grey else "8-bit RGB"
        how = f", e.g. {_conversion(path)}" if image.itemsize < 4 else ""  # whoever made it knows the range of floats
        raise UserError(f"{path} {kind}, but {needed} is needed; convert it{how}")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _conversion(path: str | Path) -> str:
    path = Path(path)
    code = "import sys, cv2; cv2.imwrite(sys.argv[2], cv2.imread(sys.argv[1]))"
    out = path.with_name(f"{path.stem}_rgb.png")
    return f'`python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(out))}`'


def write_image(path: str | Path, image: np.ndarray):
    """Write (H, W, 3) or (H, W) uint8 RGB to a file whose ending says the format; the folder is made if needed.

    The file appears when it is complete.
    """
    cv2 = optional("cv2")
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: give it an ending that says the format, such as {path.name}.png")
    try:
        ok, encoded = cv2.imencode(path.suffix, image[..., ::-1] if image.ndim == 3 else image)
    except cv2.error:
        ok = False
    if not ok:
        height, width = image.shape[:2]
        raise UserError(f"{path}: {width}x{height} pixels cannot be written in this format; choose .png or .tif")
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


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
    packed = root.is_file()
    inputs, targets = (
        {name: Packed(root, f"{side}/{name}") for name in list_packed(root, side)}
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
    """(height, width) of both pictures, from their headers; raises as `find_pairs` does."""
    a, b = image_size(pair.input), image_size(pair.target)
    if a != b:
        raise UserError(f"{pair.input} is {a[1]}x{a[0]} but {pair.target} is {b[1]}x{b[0]}; a pair must have one size")
    return a


def hold_back(items: list, count: int, source: str | Path) -> tuple[list, list]:
    """Split pictures or pairs for training and validation: the last in natural order are held back.

    Neighbours in that order are often frames of one scene: so but one scene at most is on both sides.

    Args:
        items: pictures or pairs.
        count: how many to hold back at most; a tenth of few items is less, but at least one is.
        source: where they come from.
    """
    if count < 1 or len(items) < 2:
        raise UserError(
            f"cannot hold {count} of the {len(items)} in {source} back for validation; set TRAINING.VAL_HOLD_BACK, or "
            "TRAINING.VAL_DIR to a folder for validation"
        )
    count = min(count, max(len(items) // 10, 1))
    return items[:-count], items[-count:]


def exclude(items: list[Path | Packed | Pair], listing: str | Path) -> list:
    """Leave out the pictures, or pairs, that a text file names: one to a line, with or without ending.

    Also their parts and copies, as scripts/prepare_patches.py and make_demo_data.py name them: NAME_1, NAME_2, ...

    Raises:
        UserError: no such file, it names none of the pictures, or all of them.
    """
    try:
        lines = [line.strip() for line in Path(listing).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"TRAINING.EXCLUDE: cannot read {listing}; it is a text file with one name to a line"
        ) from error

    def bare(name: str) -> str:
        return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name

    def name(item) -> str:
        return item.key if isinstance(item, Packed) else item.name

    def meant(item) -> bool:
        own = bare(name(item))
        return own in names or re.sub(r"_\d+$", "", own) in names

    names = set(map(bare, lines))
    left = [item for item in items if not meant(item)]
    if len(left) in (0, len(items)):
        which = "none" if left else "all"
        raise UserError(
            f"TRAINING.EXCLUDE: {listing} names {which} of the {len(items)} pictures, as {name(items[0])}; mend it, "
            'or leave nothing out by TRAINING.EXCLUDE ""'
        )
    return left


def fingerprint(items: list[Path | Packed | Pair]) -> dict[str, Tensor | bool]:
    """What tells training data from others, wherever they lie: the files' names, and how large each is.

    Of files the size is in bytes, of packed pictures in pixels: ``packed`` says which.
    """
    names, sizes, packed = [], [], False
    for name, source in _sources(items):
        packed = isinstance(source, Packed)
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        names.append(int.from_bytes(digest, "little", signed=True))
        sizes.append(_PackedPicture(source).size if packed else os.stat(source).st_size)
    return {"names": torch.tensor(names), "sizes": torch.tensor(sizes), "packed": packed}


def changed_items(items: list[Path | Packed | Pair], then: dict[str, Tensor | bool]) -> str:
    """How training data differ from those that ``then`` is the `fingerprint` of, in words; empty if they do not."""
    now = fingerprint(items)
    before = dict(zip(then["names"].tolist(), then["sizes"].tolist(), strict=True))
    after = dict(zip(now["names"].tolist(), now["sizes"].tolist(), strict=True))
    names = dict(zip(after, (name for name, _ in _sources(items)), strict=True))
    new = [names[key] for key in after if key not in before]
    comparable = now["packed"] == then["packed"]
    other = [names[key] for key in after if comparable and before.get(key, after[key]) != after[key]]
    gone = len(before.keys() - after.keys())
    told = [f"{len(some)} {what} ({some[0]}{', ...' if len(some) > 1 else ''})"
            for some, what in ((new, "new"), (other, "of another size")) if some]  # fmt: skip
    return ", ".join(told + ([f"{gone} gone"] if gone else []))


def _sources(items: list[Path | Packed | Pair]) -> Iterator[tuple[str, Path | Packed]]:
    """(name, where it lies) of all pictures; the names are the same in a folder and packed."""
    for item in items:
        if isinstance(item, Pair):
            yield f"input/{item.name}", item.input
            yield f"target/{item.name}", item.target
        else:
            yield (item.key if isinstance(item, Packed) else item.name), item


def find_images(root: str | Path) -> list[Path | Packed]:
    """The pictures of a folder, or of a file that scripts/pack_dataset.py made of it; raises as `list_images` does."""
    root = Path(root)
    return [Packed(root, name) for name in list_packed(root, "/")] if root.is_file() else list_images(root)


def list_packed(file: Path, group: str) -> list[str]:
    """Names in one group of a packed file (``input``, ``target``, or ``/`` for pictures without a partner), sorted.

    Raises:
        UserError: not such a file, a damaged one, or one of the other kind.
    """
    try:
        content = _packed_file(file)
        pairs = "input" in content
        names = natsorted(map(os.fsdecode, content[group])) if pairs == (group != "/") else None
    except UserError:
        raise
    except Exception as error:  # damage shows in many ways
        raise UserError(_damaged_pack(file)) from error
    if names is None:
        kind = "picture pairs" if pairs else "single pictures"
        raise UserError(f"{file} holds {kind}, which is not what this task trains on; see scripts/pack_dataset.py")
    if not names:
        raise UserError(f"no pictures in {file}; pack the folder again")
    return names


def _damaged_pack(source) -> str:
    return f"{source} is damaged; pack the folder again with scripts/pack_dataset.py"


class _PackedPicture:
    """A picture in a packed file; of a pair (H, W, 3), a single one (H, W)."""

    def __init__(self, source: Packed):
        self.source = source
        try:
            self.pixels = _packed_file(source.file)[os.fsencode(source.key)]  # names need not be UTF-8
            self.shape, dtype = tuple(self.pixels.shape), self.pixels.dtype
        except KeyError as error:
            raise UserError(f"there is no {source.key} in {source.file}; pack the folder again") from error
        except UserError:
            raise
        except Exception as error:  # damage shows in many ways
            raise UserError(_damaged_pack(source)) from error
        channels = (3,) if "/" in source.key else ()
        if dtype != np.uint8 or self.shape[2:] != channels or len(self.shape) < 2 or not 0 < self.size <= MAX_PIXELS:
            raise UserError(_damaged_pack(source))

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, area) -> np.ndarray:
        try:
            return self.pixels[area]
        except Exception as error:  # damage shows in many ways
            raise UserError(_damaged_pack(self.source)) from error


_open_files: dict = {}  # packed files by path


def _packed_file(file: Path):
    """The open file."""
    if file in _open_files:
        return _open_files[file]
    h5py = optional("h5py")
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


if hasattr(os, "register_at_fork"):  # loading processes that share an open HDF5 file would share its state
    os.register_at_fork(before=_close_packed_files)


def image_size(source: str | Path | Packed, grey: bool = False) -> tuple[int, int]:
    """(height, width) of an upright picture, from its header alone; arguments and exceptions as of `read_image`."""
    if isinstance(source, Packed):
        return open_image(source).shape[:2]
    with open_file(source) as file:
        header = _header(file)
    suits = ("RGB", "P", "L") if grey else ("RGB", "P")
    if header is None or header.mode not in suits or header.size[0] * header.size[1] > MAX_PIXELS:
        return read_image(source, grey).shape[:2]  # knows more, or says what is wrong with it
    return header.size


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) or (H, W) to a (C, H, W) tensor of the same type; see `transforms.unit_range`."""
    return torch.from_numpy(np.array(image if image.ndim == 2 else image.transpose(2, 0, 1))).view(-1, *image.shape[:2])
