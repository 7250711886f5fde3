"""Images of phones and scanners: all kinds are read, upright, and written again with their metadata.

`images.read_image` reads images to train and test with, and refuses other kinds.
"""

import contextlib
import io
import os
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dgunet.data.tiff import Tiff, is_tiff
from dgunet.data.transforms import apply_orientation
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import RAW_SUFFIXES, atomic_write, open_file

MAX_PIXELS = 2**30  # of an image: OpenCV's limit
_ORIENTATION = 0x0112  # the EXIF tag
_EXIF_BYTES = 65533  # that a JPEG holds
# File types that `_file_type` detects and that are not read, with advice.
_NOT_READ = {
    "raw": "is a camera's raw file; develop it to JPEG, or to TIFF or PNG of 16 bits",
    "AVIF": "is an AVIF image that this Pillow cannot read; pip install -U pillow, or export it as JPEG",
    "video": "is a video; save its frames as PNG",
    "PDF": "is a PDF document; export its pages as PNG",
    "SVG": "is an SVG drawing; export it as PNG",
    "JPEG XL": "is a JPEG XL image; export it as JPEG or PNG",
    "web page": "is a web page; save the image itself",
}
# How files of some of these types begin.
_SIGNATURES = {
    "raw": rb"FUJIFILMCCD-RAW|II(RO|RS|U\0)|MMOR|(II|MM)(\*\0|\0\*|\+\0|\0\+)....CR",  # the last is Canon's
    "video": rb"....(moov|mdat|wide)|.{8}AVI |\x1a\x45\xdf\xa3",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "PDF": rb"(?i).*%pdf-",
    "SVG": rb"(?i)[\xef\xbb\xbf \t\r\n]*(?=<).*<svg",
    "web page": rb"(?i)[\xef\xbb\xbf \t\r\n]*<(!doctype )?html",
}
# Extra content of some photographs: a pattern in the file's bytes, and its name.
_EXTRA_CONTENT = {
    rb"hdrgm:|hdrgainmap|urn:iso:std:iso:ts:21496": "its gain map (what makes it HDR)",
    rb"(MotionPhoto|MicroVideo)[ =>\"']+1": "its video (motion photo)",
    rb"GDepth:|aux:depth|auxid:2\b|aux:disparity": "its depth map",
}


@dataclass
class Photo:
    """An upright image.

    pixels: (H, W, 3) RGB or (H, W) grey, uint8 or uint16; alpha: transparency, (H, W) of the same type, or None; keep:
    metadata in Pillow's terms (``icc_profile``, ``exif``, ``dpi``); notes: what was converted or dropped in reading.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    keep: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _file_type(start: bytes) -> str:
    """The type of a file, from its first bytes, if Pillow may not read it; otherwise ""."""
    if start[4:8] == b"ftyp":
        brands = {start[8:12], *(start[k : k + 4] for k in range(16, min(int.from_bytes(start[:4], "big"), 512), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIC"
        return "raw" if start[8:12] == b"crx " else "video"
    return next((kind for kind, pattern in _SIGNATURES.items() if re.match(pattern, start, re.DOTALL)), "")


@contextlib.contextmanager
def opened(path: Path):
    """(image, file): the image as Pillow opens it, which reads its header, or a `Tiff`; and the file it is in.

    Raises:
        UserError: nothing that Pillow knows, here or while it is decoded.
    """
    with open_file(path) as file:
        start = file.read(512)
        try:
            image = _identify(path, file, start)
            if image is None:
                raise UserError(f"{path} {_why_unreadable(path, start)}")
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has {image.width}x{image.height} pixels, more than can be read")
            yield image, file
        except (UserError, ImportError):
            raise
        except MemoryError as error:
            raise UserError(f"{path} needs more memory than there is; make it smaller, or remove it") from error
        except Exception as error:  # damaged files fail in many ways
            raise UserError(
                f"{path} cannot be read ({error or type(error).__name__}); it may be damaged: replace or remove it"
            ) from error


def _identify(path: Path, file, start: bytes):
    """The image in a file, whose first bytes are ``start``, or None.

    As `PIL.Image.open`, but without its limit on pixels, which large scans exceed and which is global.
    """
    import PIL.Image as image

    image.preinit()  # the usual formats first
    image.init()
    kind = _file_type(start)
    if kind == "HEIC":
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    if kind == "raw" or (is_tiff(start) and path.suffix.lower() in RAW_SUFFIXES):
        return None  # what Pillow reads of it is a preview
    if is_tiff(start) and (tiff := Tiff(path, file)).direct:
        return tiff
    for factory, accept in [image.OPEN[name] for name in image.ID]:
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # it is of another format
            accepted = not accept or accept(start[:16])
            if accepted and not isinstance(accepted, str):  # why that format cannot be read here
                file.seek(0)
                return factory(file, "")
    return None


def _why_unreadable(path: Path, start: bytes) -> str:
    """Why a file cannot be read, and what to do."""
    kind = _file_type(start)
    if kind == "HEIC" or (not kind and path.suffix.lower() in (".heic", ".heif", ".hif")):
        with contextlib.suppress(ImportError):
            import pillow_heif  # noqa: F401

            return "is a HEIC image that pillow-heif cannot read; export it as JPEG"
        return "is a HEIC image; pip install pillow-heif, or export it as JPEG"
    if kind := kind or "raw" * (path.suffix.lower() in RAW_SUFFIXES):
        return _NOT_READ[kind]
    if is_tiff(start):
        return "is a TIFF of a kind that cannot be read; save it as RGB or grey, of 8 or 16 bits per channel"
    if not start:
        return "is empty; replace or remove it"
    return "is not an image that can be read; convert it to PNG or JPEG"


def probe(path: str | Path) -> tuple[int, int, str]:
    """Height and width (of the image as stored) and format (``"JPEG"``, ``"PNG"``, ...) from the file's header.

    Raises:
        UserError: as `read_photo`.
    """
    with opened(Path(path)) as (image, _):
        return image.height, image.width, "JPEG" if image.format == "MPO" else image.format


def read_photo(path: str | Path) -> Photo:
    """Read an image of any kind: grey, 8 or 16 bits, with transparency, a palette or CMYK; turned upright by its EXIF.

    Raises:
        UserError: unreadable, damaged, of floating-point values, of a TIFF's properties one that is not understood, or
            larger than `MAX_PIXELS`.
    """
    path = Path(path)
    with opened(path) as (image, file):
        notes, keep = [], {}
        if isinstance(image, Tiff):
            pixels, alpha = _read_tiff(image, notes)
        else:
            pixels, alpha = _read_by_pillow(path, image, file, notes)
        turn = _metadata(image, file, notes, keep)
        black_and_white = getattr(image, "mode", "") == "1"
        profile, dpi = image.info.get("icc_profile"), image.info.get("dpi")
    if turn in range(2, 9):
        pixels, alpha = apply_orientation(pixels, turn), None if alpha is None else apply_orientation(alpha, turn)
        notes.append("turned upright, as its EXIF data says")
    if pixels.ndim == 2 and not black_and_white:
        notes.append("grey, and stays so")
    if pixels.dtype == np.uint16:
        notes.append("16 bits per channel, which are kept")
        if 0 < (bits := int(pixels.max()).bit_length()) <= 14:
            dark = f"no value above {2**bits - 1} of 65535, so far too dark if the file has {bits} bits"
            notes.append(f"{dark}; multiply its values by {2 ** (16 - bits)} before")
    if alpha is not None:
        notes.append("its transparency is kept as it is")
    if profile and profile[16:20] == (b"GRAY" if pixels.ndim == 2 else b"RGB "):  # not that of CMYK, say
        keep["icc_profile"] = profile
    if dpi and all(1 < float(value) <= 65535 for value in dpi):  # which every format holds
        keep["dpi"] = tuple(float(value) for value in dpi)
    return Photo(np.ascontiguousarray(pixels), alpha, keep, notes)


def _read_tiff(image: Tiff, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    if image.n_frames > 1:
        notes.append(f"the first of its {image.n_frames} images")
    pixels, alpha = image.read()
    if image.bits not in (8, 16):
        notes.append(f"{image.bits} bits, now 16")
    if image.further:
        notes.append(_channel_note(image.further))
    if image.premultiplied:
        notes.append("its colours were multiplied by its transparency, and are no longer")
    return pixels, alpha


def _channel_note(number: int) -> str:
    return f"{number} further channel{'s' * (number > 1)}, which the file does not call transparency, not kept"


def _read_by_pillow(path: Path, image, file, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    mode, kind, profile = image.mode, image.format, image.info.get("icc_profile")
    raw = str(image.tile[0][3:]) if image.tile else ""
    at = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(at)
    extra = _extra_content(content, kind, profile)
    notes += [f"{name}, not kept" for name in extra]
    frames = getattr(image, "n_frames", 1)
    if kind == "MPO":  # previews do not count, nor gain maps and depth maps, which have a note
        entries = image.mpinfo.get(0xB002, [])
        frames -= sum("Thumbnail" in str(entry["Attribute"]["MPType"]) for entry in entries)
        frames -= sum("map" in name for name in extra)
    if frames > 1:
        notes.append(f"the first of its {frames} images")
    if kind == "TIFF":
        stored = image.tag_v2[256], image.tag_v2[257]
        # What it decodes into; Pillow would check its size against the limit once more.
        from PIL import Image

        image.im = Image.new(mode, stored).im
    image.load()
    clear, alpha = image.info.get("transparency"), None
    if mode in ("RGB", "RGBA") and ";16B" in raw:  # which Pillow has reduced to 8
        import imagecodecs

        samples = imagecodecs.png_decode(content)
        pixels = samples[..., :3] if samples.shape[2] > 2 else samples[..., 0]
        alpha = samples[..., -1] if samples.shape[2] in (2, 4) else None
    elif mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise UserError(f"{path} has values of 32 bits; save it with 16")
        pixels = pixels.astype(np.uint16)
        if isinstance(clear, int):
            alpha = np.where(pixels == clear, 0, 65535).astype(np.uint16)
    elif mode == "F":
        raise UserError(f"{path} has floating-point values, whose range is not known; save it with 16 bits")
    else:
        if (bits := _bits(content, image, raw)) > 8:
            notes.append(f"{bits} bits, now 8")
        reduced = _to_8_bit(image, profile, notes)
        pixels = np.asarray(reduced)
        if reduced.mode in ("LA", "RGBA"):
            colours, alpha = pixels[..., :-1], pixels[..., -1]
            pixels = colours[..., 0] if reduced.mode == "LA" else colours
    if kind == "TIFF" and alpha is None and (extra := image.tag_v2.get(338)):
        notes.append(_channel_note(len(extra)))
    return pixels, alpha


def _bits(content: bytes, image, raw: str) -> int:
    """Bits per channel in the file, which Pillow reduces to 8; ``raw``: its raw mode."""
    if image.format == "PPM" and (largest := re.search(r"', (\d+)\)", raw)):
        return int(largest[1]).bit_length()
    if image.format == "JPEG2000":
        header = content.partition(b"\xff\x4f\xff\x51")[2]  # what follows the markers SOC and SIZ
        return (header[38] & 0x7F) + 1 if len(header) > 38 else 8
    if image.format == "AVIF":
        flags = [found[1][0] for found in re.finditer(rb"av1C\x81.(.)", content, re.DOTALL)]
        return max((8 if not flag & 0x40 else 12 if flag & 0x20 else 10 for flag in flags), default=8)
    if image.format == "HEIF":
        return image.info.get("bit_depth", 8)
    return 16 if ";16B" in raw else 8


def _extra_content(content: bytes, kind: str, profile: bytes | None) -> list[str]:
    """Names of what a file holds beside the pixels and its metadata."""
    if kind not in ("JPEG", "MPO", "HEIF", "AVIF", "PNG"):
        return []
    found = [name for pattern, name in _EXTRA_CONTENT.items() if kind != "PNG" and re.search(pattern, content)]
    codes = re.findall(rb"(?:colrnclx\0(?=.\0)|cICP)(.)\0?(.)", content[: 2**16], re.DOTALL)
    # Without a profile BT.709's primaries, or unspecified ones, are displayed as sRGB.
    if not profile and any(primaries[0] not in (1, 2) or transfer[0] in (16, 18) for primaries, transfer in codes):
        found.append("its colour space, which is wider than sRGB or that of HDR")
    return found


def _to_8_bit(image, profile: bytes | None, notes: list[str]):
    """Convert to mode L, LA, RGB or RGBA."""
    mode, clear = image.mode, "transparency" in image.info
    if mode in ("L", "LA", "RGB", "RGBA") and not clear:
        return image
    if mode == "1":
        notes.append("black and white, now grey")
    if mode in ("1", "L"):
        return image.convert("LA" if clear else "L")
    if mode in ("CMYK", "LAB"):
        notes.append(f"{mode}, now RGB")
        import PIL.ImageCms as cms

        with contextlib.suppress(cms.PyCMSError, OSError):
            source = io.BytesIO(profile) if profile else cms.createProfile("LAB") if mode == "LAB" else None
            if source is not None:
                return cms.profileToProfile(image, source, cms.createProfile("sRGB"), outputMode="RGB")
    elif mode in ("P", "PA"):
        notes.append("a palette, now RGB")
    return image.convert("RGBA" if clear or mode in ("LA", "La", "PA", "RGBa") else "RGB")


def orientation(image, file) -> int:
    """The EXIF orientation, 1 to 8, of what `opened` gave, from its header; 1 where it has none, or a damaged one.

    Of Pillow's images of a TIFF it is right only once they are loaded.
    """
    from PIL import Image

    turn = 1
    with contextlib.suppress(Exception):  # damaged data fails in many ways
        if isinstance(image, Tiff):
            turn = image.orientation
        else:
            if image.format == "PNG" and "exif" not in image.info:  # ExifTool writes it behind the pixels
                file.seek(max(file.seek(0, os.SEEK_END) - 2**17, 0))
                _, found, exif = file.read().rpartition(b"eXIf")
                image.info |= {"exif": exif} if found else {}
            turn = Image.Image.getexif(image).get(_ORIENTATION)  # a PNG's own method decodes all
    return turn if turn in range(1, 9) else 1


def _metadata(image, file, notes: list[str], keep: dict) -> int:
    """The orientation still to be applied, 1 to 8. Fills ``keep`` with EXIF data, and ``notes`` with what is lost."""
    turn, info, exif = 0, image.info, b""
    try:
        exif = info.get("exif") or b""
        if not exif and (text := info.get("Raw profile type exif")):  # as ImageMagick wrote it into PNG
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        turn, exif = _upright(exif) if exif else (0, b"")
    except (ValueError, struct.error):
        notes.append("its EXIF data is damaged, and not kept")
        exif = b""
    if len(exif) > _EXIF_BYTES and image.format in ("JPEG", "MPO"):
        notes.append("its EXIF data, which is more than a JPEG holds, not kept")
    elif exif:
        keep["exif"] = exif
    if image.format == "TIFF" and 34665 in image.tag_v2:
        notes.append("its EXIF data, not kept")
    if any(info.get(key) for key in ("xmp", "XML:com.adobe.xmp", "photoshop")):
        notes.append("its XMP or IPTC data, not kept")
    return turn if turn in range(1, 9) else orientation(image, file)  # of XMP, too


def _upright(exif: bytes) -> tuple[int, bytes]:
    """The orientation that EXIF data asks for, 0 for none, and the data with orientation 1 and without a thumbnail.

    All other bytes stay as and where they are: Pillow cannot write all that it reads, nor reads all, and offsets within
    makers' notes stay right.

    Raises:
        ValueError, struct.error: it is no EXIF data.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        raise ValueError("no TIFF header")
    data = bytearray(exif)
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    end = at + 2 + 12 * count
    turn = 0
    for entry in range(at + 2, min(end, len(data) - 11), 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag == _ORIENTATION:
            (turn,) = struct.unpack_from(order + {1: "B", 4: "I"}.get(kind, "H"), data, entry + 8)
            struct.pack_into(f"{order}HHIHxx", data, entry, _ORIENTATION, 3, 1, 1)
    if end + 4 <= len(data):
        data[end : end + 4] = bytes(4)  # no other directory follows
    return turn, b"Exif\0\0" + bytes(data)


def write_photo(path: str | Path, image: Photo, comment: str):
    """Write an image as PNG, or as JPEG (quality 95, colours in full resolution) depending on the suffix.

    Its metadata and a comment (see `read_comment`) are written with it, atomically.

    Raises:
        UserError: the format cannot hold it, such as a JPEG of more than 65500 pixels in a row.
    """
    path = Path(path)
    pixels, alpha = image.pixels, image.alpha
    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    try:
        if pixels.dtype == np.uint16:
            encoded = _deep_png(pixels, image.keep, comment)
        elif is_jpeg(path):
            encoded = _encode(pixels, "JPEG", quality=95, subsampling=0, comment=comment, **image.keep)
        else:
            from PIL import PngImagePlugin

            info = PngImagePlugin.PngInfo()
            info.add_text("Comment", comment)
            encoded = _encode(pixels, "PNG", pnginfo=info, **image.keep)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written in its format ({error})") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")


def restored_name(name: Path, kind: str) -> Path:
    """The name under which a photograph of a format (see `probe`) is written: its own, with .png unless PNG or JPEG."""
    return name if name.suffix.lower() == ".png" or (is_jpeg(name) and kind == "JPEG") else name.with_suffix(".png")


def _encode(pixels: np.ndarray, kind: str, **options) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind, **options)
    return encoded.getvalue()


def _deep_png(pixels: np.ndarray, keep: dict, comment: str) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write in colour."""
    import imagecodecs

    encoded = bytes(imagecodecs.png_encode(pixels))
    chunks = [(b"tEXt", b"Comment\0" + comment.encode("latin-1", "replace"))]
    if "icc_profile" in keep:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(keep["icc_profile"])))
    if "exif" in keep:
        chunks.append((b"eXIf", keep["exif"].removeprefix(b"Exif\0\0")))
    if "dpi" in keep:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in keep["dpi"]), 1)))
    added = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return encoded[:33] + added + encoded[33:]  # after the signature and the IHDR chunk


def read_comment(path: str | Path) -> str | None:
    """The comment that `write_photo` wrote into a file; None if there is no such file or comment."""
    path = Path(path)
    try:
        with opened(path) as (image, _):
            comment = image.info.get("comment", image.info.get("Comment"))
    except UserError:
        return None
    return comment.decode("latin-1") if isinstance(comment, bytes) else comment


def estimate_sigma(image: np.ndarray) -> float:
    """Estimate of the standard deviation of white noise in (..., H, W, C) images, in their unit; nan for tiny ones.

    The median of the absolute second differences along both axes (Immerkaer's mask), robust to edges. Fine texture
    counts as noise.
    """
    differences = np.diff(np.diff(image[..., :1024, :1024, :], 2, axis=-3), 2, axis=-2)
    return float(np.median(np.abs(differences)) / (0.6745 * 6)) if differences.size else float("nan")


def trained_sigma_range(content: dict) -> tuple[float, float] | None:
    """The range of Gaussian sigma, in 8-bit levels, that a checkpoint's weights were trained for, if it says one."""
    match content.get("noise_sigma"):
        case [int() | float() as low, int() | float() as high]:  # anything else is not such an entry
            return low, high
    return None


def format_sigma(trained: tuple[float, float]) -> str:
    """A range of sigma as text: ``25``, or ``0 to 50``."""
    low, high = trained
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def noise_warning(level: float, trained: tuple[float, float]) -> str | None:
    """A sentence on what to expect, if the `estimate_sigma` of an image is outside a network's training range."""
    low, high = trained
    # Estimates are 0.7 to 1.1 of the true sigma for visible noise, more where texture is stronger than the noise, and
    # two thirds of it after JPEG's chroma subsampling.
    if level < low / 2:
        amount, effect = "less", "may blur fine detail; keep the original where that looks better"
    elif level > 4 / 3 * high:
        amount, effect = "more", "may leave some; restore the image at half its size, or with another network"
    else:
        return None
    return f"{amount} noise than this network is for (sigma {format_sigma(trained)}), so that it {effect}"
