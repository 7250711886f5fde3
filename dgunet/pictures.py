"""Any picture that a phone or a scanner makes: read as it is meant to look, and written as it came.

`data.read_image` reads what networks are trained on and tested with, and refuses what is anything else.
"""

import contextlib
import io
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dgunet.errors import UserError, optional
from dgunet.files import IMAGE_SUFFIXES, open_file, replacing
from dgunet.transforms import upright

SUFFIXES = IMAGE_SUFFIXES  # what is taken from a folder
MAX_PIXELS = 2**30  # of a picture: OpenCV's limit
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass
class Picture:
    """A picture, upright.

    pixels: (H, W, 3) RGB or (H, W) grey, uint8 or uint16; alpha: its transparency, (H, W) of the same type, or None;
    keep: what Pillow writes with it (``icc_profile``, ``exif``, ``dpi``); notes: what is not as it was in the file.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    keep: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _opened(path: Path):
    """The picture as Pillow opens it, which reads its header.

    Raises:
        UserError: nothing that Pillow knows, here or while it is decoded.
    """
    image = optional("PIL.Image")
    if path.suffix.lower() in (".heic", ".heif", ".hif"):
        with contextlib.suppress(ImportError):
            optional("pillow_heif").register_heif_opener()
    with open_file(path) as file:
        limit, image.MAX_IMAGE_PIXELS = image.MAX_IMAGE_PIXELS, None  # 179 megapixels, less than some scans have
        try:
            with image.open(file) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise UserError(f"{path} has {opened.width}x{opened.height} pixels, more than can be read")
                yield opened
        except (UserError, ImportError, MemoryError):
            raise
        except image.UnidentifiedImageError as error:
            raise UserError(f"{path} {_unknown(path)}") from error
        except Exception as error:  # damaged files fail in many ways
            raise UserError(f"{path} cannot be read ({error or type(error).__name__}); it may be damaged") from error
        finally:
            image.MAX_IMAGE_PIXELS = limit


def _unknown(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".heic", ".heif", ".hif"):
        return "is a HEIC picture; pip install pillow-heif, or export it as JPEG"
    if suffix in (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"):
        return "is a camera's raw file; develop it to JPEG, or to TIFF or PNG of 16 bits"
    if path.stat().st_size == 0:
        return "is empty"
    return "is no picture that can be read; convert it to PNG or JPEG"


def look_at(path: str | Path) -> tuple[int, int, str]:
    """Height and width (of the picture as stored) and format (``"JPEG"``, ``"PNG"``, ...) from the file's header.

    Raises:
        UserError: as `read_picture`.
    """
    with _opened(Path(path)) as image:
        return image.height, image.width, "JPEG" if image.format == "MPO" else image.format


def read_picture(path: str | Path) -> Picture:
    """Read a picture of any kind: grey, 8 or 16 bits, with transparency, a palette or CMYK; turned upright by its EXIF.

    Raises:
        UserError: unreadable, damaged, of floating-point values, or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    with _opened(path) as image:
        notes, keep = [], {}
        mode, kind, profile = image.mode, image.format, image.info.get("icc_profile")
        raw = str(image.tile[0][3:]) if image.tile else ""
        if kind != "MPO" and getattr(image, "n_frames", 1) > 1:  # an MPO's others are previews
            notes.append(f"the first of its {image.n_frames} pictures")
        image.load()
        if mode in ("RGB", "RGBA") and ";16" in raw:  # which Pillow has reduced to 8
            pixels, alpha = _decode_deep(path)
            pixels = pixels[..., 0] if "LA;16" in raw else pixels
        elif mode.startswith("I"):
            pixels, alpha = np.asarray(image), None
            if pixels.min() < 0 or pixels.max() > 65535:
                raise UserError(f"{path} has values of 32 bits; save it with 16")
            pixels = pixels.astype(np.uint16)
            if isinstance(clear := image.info.get("transparency"), int):
                alpha = np.where(pixels == clear, 0, 65535).astype(np.uint16)
        elif mode == "F":
            raise UserError(f"{path} has floating-point values, whose range is not known; save it with 16 bits")
        else:
            if (bits := _bits(path, image, raw)) > 8:
                notes.append(f"{bits} bits, now 8")
            reduced = _in_eight_bits(image, profile, notes)
            pixels, alpha = np.asarray(reduced), None
            if reduced.mode in ("LA", "RGBA"):
                colours, alpha = pixels[..., :-1], pixels[..., -1]
                pixels = colours[..., 0] if reduced.mode == "LA" else colours
        turn, exif = _exif(image, keeping=kind in ("JPEG", "MPO", "PNG", "WEBP", "HEIF", "AVIF"))
    if turn != 1:
        pixels, alpha = upright(pixels, turn), None if alpha is None else upright(alpha, turn)
        notes.append("turned upright, as its EXIF data says")
    if pixels.ndim == 2 and mode != "1":
        notes.append("grey, and stays so")
    if pixels.dtype == np.uint16:
        notes.append("16 bits per channel, which are kept")
    if alpha is not None:
        notes.append("its transparency is kept as it is")
    if profile and profile[16:20] == (b"GRAY" if pixels.ndim == 2 else b"RGB "):  # not that of CMYK, say
        keep["icc_profile"] = profile
    dpi = image.info.get("dpi")
    if exif:
        keep["exif"] = exif
    if dpi and all(1 < float(value) <= 65535 for value in dpi):  # which every format holds
        keep["dpi"] = tuple(float(value) for value in dpi)
    return Picture(np.ascontiguousarray(pixels), alpha, keep, notes)


def _bits(path: Path, image, raw: str) -> int:
    """Bits per channel in the file, of which Pillow gives 8; ``raw`` is how it decodes them."""
    if image.format == "PPM" and (largest := re.search(r"', (\d+)\)", raw)):
        return int(largest[1]).bit_length()
    if image.format == "JPEG2000":
        with open_file(path) as file:
            header = file.read().partition(b"\xff\x4f\xff\x51")[2]  # what follows the markers SOC and SIZ
        return (header[38] & 0x7F) + 1 if len(header) > 38 else 8
    return 16 if ";16" in raw else 8


def _in_eight_bits(image, profile: bytes | None, notes: list[str]):
    """In one of the modes L, LA, RGB, RGBA."""
    mode, clear = image.mode, "transparency" in image.info
    if mode in ("L", "LA", "RGB", "RGBA") and not clear:
        return image
    if mode == "1":
        notes.append("black and white, now grey")
    if mode in ("1", "L"):
        return image.convert("LA" if clear else "L")
    if mode in ("CMYK", "LAB"):
        notes.append(f"{mode}, now RGB")
        cms = optional("PIL.ImageCms")
        with contextlib.suppress(cms.PyCMSError, OSError):
            source = io.BytesIO(profile) if profile else cms.createProfile("LAB") if mode == "LAB" else None
            if source is not None:
                return cms.profileToProfile(image, source, cms.createProfile("sRGB"), outputMode="RGB")
    elif mode in ("P", "PA"):
        notes.append("a palette, now RGB")
    return image.convert("RGBA" if clear or mode in ("LA", "La", "PA", "RGBa") else "RGB")


def _decode_deep(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    cv2 = optional("cv2")
    with open_file(path) as file:
        pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise UserError(f"{path} cannot be read with its 16 bits per channel; save it as PNG")
    return pixels[..., 2::-1], pixels[..., 3] if pixels.shape[2] == 4 else None


def _exif(image, keeping: bool) -> tuple[int, bytes | None]:
    """The orientation that decoding did not heed, 1 to 8, and the other data without it; damaged data says nothing."""
    try:
        exif = image.getexif()
        turn = exif.pop(_ORIENTATION, 1)
        return turn if turn in range(1, 9) else 1, exif.tobytes() if keeping and len(exif) else None
    except Exception:  # fails in many ways
        return 1, None


def write_picture(path: str | Path, picture: Picture, comment: str):
    """Write a picture as PNG, or as JPEG (quality 95, colours in full resolution) where the file's ending says so.

    What it is to keep is written with it, and a comment, see `comment_of`. The file appears when it is complete.

    Raises:
        UserError: the format does not hold it, as a JPEG of more than 65500 pixels in a row.
    """
    path = Path(path)
    pixels, alpha = picture.pixels, picture.alpha
    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    try:
        encode = _deep_png if pixels.dtype == np.uint16 else _jpeg if is_jpeg(path) else _png
        encoded = encode(pixels, picture.keep, comment)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written in its format ({error})") from error
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")


def _jpeg(pixels: np.ndarray, keep: dict, comment: str) -> bytes:
    options = keep | dict(quality=95, subsampling=0, comment=comment)
    if len(options.get("exif", b"")) > 65000:  # more than the format holds
        del options["exif"]
    encoded = io.BytesIO()
    optional("PIL.Image").fromarray(pixels).save(encoded, "JPEG", **options)
    return encoded.getvalue()


def _png(pixels: np.ndarray, keep: dict, comment: str) -> bytes:
    info = optional("PIL.PngImagePlugin").PngInfo()
    info.add_text("Comment", comment)
    encoded = io.BytesIO()
    optional("PIL.Image").fromarray(pixels).save(encoded, "PNG", pnginfo=info, **keep)
    return encoded.getvalue()


def _deep_png(pixels: np.ndarray, keep: dict, comment: str) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write in colour."""
    if pixels.shape[2:] == (2,):  # OpenCV has no grey with transparency
        pixels = pixels[..., [0, 0, 0, 1]]
    if pixels.ndim == 3:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    encoded = optional("cv2").imencode(".png", pixels)[1].tobytes()
    chunks = [(b"tEXt", b"Comment\0" + comment.encode("latin-1", "replace"))]
    if "icc_profile" in keep and not (pixels.ndim == 3 and keep["icc_profile"][16:20] == b"GRAY"):
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(keep["icc_profile"])))
    if "exif" in keep:
        chunks.append((b"eXIf", keep["exif"].removeprefix(b"Exif\0\0")))
    if "dpi" in keep:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in keep["dpi"]), 1)))
    added = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return encoded[:33] + added + encoded[33:]  # after the signature and the IHDR chunk


def comment_of(path: str | Path) -> str | None:
    """The comment that `write_picture` wrote into a file; None where there is no file, or none of ours."""
    path = Path(path)
    try:
        with _opened(path) as image:
            comment = image.info.get("comment", image.info.get("Comment"))
    except UserError:
        return None
    return comment.decode("latin-1") if isinstance(comment, bytes) else comment


def noise_level(image: np.ndarray) -> float:
    """Estimate of the standard deviation of white noise in (..., H, W, C) pictures, in their unit; nan for tiny ones.

    The median of the absolute second differences along both axes (Immerkaer's mask), which smooth areas make and edges
    do not reach. Fine texture counts as noise.
    """
    differences = np.diff(np.diff(image[..., :1024, :1024, :], 2, axis=-3), 2, axis=-2)
    return float(np.median(np.abs(differences)) / (0.6745 * 6)) if differences.size else float("nan")


def trained_noise(content: dict) -> tuple[float, float] | None:
    """Weakest and strongest Gaussian noise, in 8-bit levels, that a checkpoint says its weights are for."""
    match content.get("noise_sigma"):
        case [int() | float() as low, int() | float() as high]:  # anything else is not an entry of ours
            return low, high
    return None


def tell_sigmas(trained: tuple[float, float]) -> str:
    """That noise in words: ``25``, or ``0 to 50``."""
    low, high = trained
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def unlike_noise(level: float, trained: tuple[float, float]) -> str | None:
    """``"weaker"`` or ``"stronger"``, where an estimated `noise_level` is outside of what a network was trained for."""
    low, high = trained
    # The estimates are 0.7 to 1.1 of the truth where noise is visible, more where it is weaker than texture, and two
    # thirds of it after JPEG has halved the colours' resolution.
    return "weaker" if level < low / 2 else "stronger" if level > 4 / 3 * high else None
