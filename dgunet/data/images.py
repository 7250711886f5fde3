"""Images on disk: reading and writing them, matching pairs, packed files, and the split for training."""

import contextlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgunet.data.packed import Packed, _close_packed_files, _PackedImage
from dgunet.data.photos import opened, orientation, read_photo
from dgunet.data.tiff import Tiff
from dgunet.data.transforms import apply_orientation
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import atomic_write

WRITABLE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # formats of `write_image`


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


def open_complex(source: str | Path | Packed) -> np.ndarray:
    """An image's luminance as a complex image, (H, W, 2) uint8: the real part, and an imaginary part of zeros."""
    luma = open_luma(source)[:, :]
    return np.stack([luma, np.zeros_like(luma)], axis=-1)


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
