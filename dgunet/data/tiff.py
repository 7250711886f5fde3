"""TIFF images as their tags describe them: what is not understood is refused, never guessed.

Pillow reduces colours of 16 bits to 8, OpenCV ignores most tags, and tifffile decodes LZW only with imagecodecs. Here
Pillow's libtiff decompresses, and NumPy makes samples of the bytes.
"""

import contextlib
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dgunet.runtime.errors import UserError

_MOST_SAMPLES = 16  # per pixel
_PREDICTABLE = {5, 8, 32946, 34925, 50000}  # of Compression: LZW, Deflate, Deflate, LZMA, Zstandard
_LOSSLESS = {1, 32773, *_PREDICTABLE}  # and none, PackBits
_FAX_AND_JPEG = {2, 3, 4, 6, 7, 32771}
# PhotometricInterpretation: how many samples are the colour of a pixel
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_STRAIGHT, _PREMULTIPLIED = (2, 999), (1,)  # of ExtraSamples: kinds of alpha; Corel Draw writes 999


def is_tiff(prefix: bytes) -> bool:
    return prefix[:2] in (b"II", b"MM") and prefix[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+")


class Tiff:
    """The first image of a TIFF file.

    height, width: as stored, not turned by ``orientation`` (1 to 8); bits: per sample; n_frames: images in the file but
    its thumbnails; mode: "RGB" or "L" of 8 bits and nothing else, or ""; direct: whether `read` reads it, or else
    Pillow, which reads the others rightly; further: samples of a pixel that are neither colour nor alpha; tag_v2, info:
    as in Pillow, of the latter what is used here.

    Raises:
        UserError: it has a property that neither understands, which is named. Damaged files raise other errors.
    """

    format = "TIFF"

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self.tag_v2, self.n_frames = self._directories()
        one, every = self._one, self._every
        self.width, self.height, self.orientation = one(256), one(257), every(274, (1,))[0]
        self._compression, self._photometric, self._planar = one(259, 1), one(262), one(284, 1)
        if one(254, 0) & 1 or self._photometric in (32803, 34892) or 50706 in self.tag_v2:
            raise UserError(f"{path} is a camera's raw file; develop it to JPEG, or to TIFF or PNG of 16 bits")
        self._samples = one(277, 3 if self._compression in (6, 7) and self._photometric in (2, 6) else 1)
        self._check_layout(every(258, (1,)), every(339, (1,)))
        colours = _COLOURS[self._photometric]
        unnamed = max(self._samples - colours, 0)
        self._extra = (every(338) + (0,) * unnamed)[:unnamed]  # without a kind: unspecified
        self._alpha = next((k for k, kind in enumerate(self._extra) if kind in _STRAIGHT + _PREMULTIPLIED), None)
        self.further = unnamed - (self._alpha is not None)
        self.direct = self._photometric < 3 and self.bits >= 8 and self._compression in _LOSSLESS
        if self.direct:
            self._check_samples(colours)
        else:
            self._check_for_pillow()
        plain = self.direct and self.bits == 8 and not self._extra
        self.mode = ("RGB" if colours == 3 else "L") if plain else ""
        self.info = self._info()

    def _directories(self):
        """The first directory of tags, and the number of images that are no thumbnails of others."""
        import PIL.TiffImagePlugin as plugin

        self._file.seek(0)
        header = self._file.read(8)
        header += self._file.read(8) if header[2:4] == b"+\0" else b""
        if header[2:4] == b"\0+":
            self._refuse("big-endian offsets of 64 bits (BigTIFF)")
        first = plugin.ImageFileDirectory_v2(header)
        self._file.seek(first.next)
        first.load(self._file)
        count, at, seen, other = 1, first.next, set(), plugin.ImageFileDirectory_v2(header)
        while at and at not in seen:
            seen.add(at)
            self._file.seek(at)
            other.load(self._file)
            count += other.get(254, 0) not in (1, 3, 5)
            at = other.next
        return first, count

    def _every(self, tag: int, default: tuple = ()) -> tuple:
        found = self.tag_v2.get(tag, default)
        return found if isinstance(found, tuple) else (found,)

    def _one(self, tag: int, default: int | None = None) -> int:
        found = self._every(tag, (default,))[0]
        if not isinstance(found, int):
            raise ValueError(f"the tag {tag} is {'missing' if found is None else 'no number'}")
        return found

    def _refuse(self, what: str):
        advice = "save it as RGB or grey, of 8 or 16 bits per channel, uncompressed or with LZW or Deflate"
        raise UserError(f"{self._path} is a TIFF with {what}, which is not understood; {advice}")

    def _check_layout(self, bits: tuple, kinds: tuple):
        if self._photometric not in _COLOURS:
            self._refuse(f"colours of the kind {self._photometric} (PhotometricInterpretation)")
        if self._compression not in _LOSSLESS | _FAX_AND_JPEG:
            self._refuse(f"the compression {self._compression} (Compression)")
        if set(kinds) - {1, 4}:  # 4: undefined, to be treated as unsigned
            named = "floating-point" if 3 in kinds else "signed" if 2 in kinds else "complex"
            self._refuse(f"{named} values (SampleFormat {max(kinds)})")
        if len(set(bits[: self._samples])) > 1 or max(bits) > 16:
            self._refuse(f"{', '.join(map(str, dict.fromkeys(bits)))} bits per channel (BitsPerSample)")
        self.bits = bits[0]
        if self._planar not in (1, 2):
            self._refuse(f"the arrangement {self._planar} (PlanarConfiguration)")

    def _check_samples(self, colours: int):
        if not colours <= self._samples <= _MOST_SAMPLES or (colours == 1 and self._samples > 2):
            self._refuse(f"{self._samples} channels (SamplesPerPixel) where {colours} and alpha are usual")
        if self._photometric == 0 and self.premultiplied:
            self._refuse("alpha that grey was multiplied with (ExtraSamples 1) where white is 0")
        predictor = self._one(317, 1)
        if predictor != 1 and (predictor != 2 or self.bits not in (8, 16) or self._compression not in _PREDICTABLE):
            self._refuse(f"the predictor {predictor} for {self.bits} bits (Predictor)")

    def _check_for_pillow(self):
        if self.bits > 8 and (self._photometric, self.bits) != (5, 16):
            self._refuse(f"{self.bits} bits of the kind of colour {self._photometric} (PhotometricInterpretation)")
        if self._photometric == 5 and self._one(332, 1) != 1:
            self._refuse("other inks than cyan, magenta, yellow and black (InkSet)")
        if self._planar == 2 and self._samples > 1 and (self._photometric, self.bits) != (5, 8):
            self._refuse("colours one after the other (PlanarConfiguration 2) that are not RGB")
        if self._photometric == 6 and self._compression == 1:
            self._refuse("uncompressed YCbCr colours (PhotometricInterpretation 6)")

    def _info(self) -> dict:
        names = {34675: "icc_profile", 700: "xmp", 33723: "photoshop", 34377: "photoshop"}
        info = {names[tag]: self.tag_v2[tag] for tag in names if isinstance(self.tag_v2.get(tag), bytes)}
        unit = {2: 1, 3: 2.54}.get(self._every(296, (2,))[0])
        if unit and 282 in self.tag_v2 and 283 in self.tag_v2:
            with contextlib.suppress(TypeError, ValueError):  # they are no numbers
                info["dpi"] = tuple(float(unit * self._every(tag)[0]) for tag in (282, 283))
        return info

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Its pixels, (H, W, 3) RGB or (H, W) grey, uint8 or uint16, and its alpha of the same type, (H, W), or None.

        Black is 0 and white the highest value, whatever the file has; colours that alpha has been multiplied with are
        divided by it.
        """
        samples = self._decode()
        colours = _COLOURS[self._photometric]
        pixels = samples[..., :colours] if colours > 1 else samples[..., 0]
        if self._photometric == 0:  # white is
            pixels = ~pixels
        if self._alpha is None:
            return pixels, None
        alpha = samples[..., colours + self._alpha]
        if self._extra[self._alpha] in _PREMULTIPLIED:
            most, below = np.iinfo(pixels.dtype).max, np.maximum(alpha, 1).astype(np.uint32)
            below = below if colours == 1 else below[..., None]
            divided = (pixels.astype(np.uint32) * np.uint32(most) + below // 2) // below
            pixels = np.minimum(divided, most).astype(pixels.dtype)
        return pixels, alpha

    @property
    def premultiplied(self) -> bool:
        return self._alpha is not None and self._extra[self._alpha] in _PREMULTIPLIED

    def _decode(self) -> np.ndarray:
        """(H, W, samples), uint8 or uint16; what has 9 to 15 bits is scaled to 16."""
        tiled = 324 in self.tag_v2
        offsets, sizes = self._every(324 if tiled else 273), self._every(325 if tiled else 279)
        side = self._one(322) if tiled else self.width
        height = self._one(323) if tiled else min(self._one(278, self.height), self.height)
        planes, each = (self._samples, 1) if self._planar == 2 else (1, self._samples)
        if not 0 < side <= max(self.width, 2**16):
            raise ValueError(f"tiles of {side} pixels")
        across = -(-self.width // side)  # tiles in a row
        parts = across * -(-self.height // height)
        if len(offsets) < planes * parts or len(sizes) not in (0, len(offsets)):
            raise ValueError(f"{len(offsets)} strips or tiles instead of {planes * parts}")
        row = -(-side * each * self.bits // 8)  # bytes in a row of a tile or strip
        self._file.seek(0)
        content = self._file.read()
        if len(content) >= 2**32 - 2**26:
            self._refuse("more than 4 GB")
        if self._compression == 1 and across * row * self.height * planes > len(content):
            raise ValueError("it ends too early")
        # The same compressed data as an image with one grey 8-bit pixel for each byte.
        tags = {256: [across * row], 257: [self.height], 258: [8], 259: [self._compression], 262: [1], 277: [1]}
        tags |= {266: [self._one(266, 1)]} | ({322: [row], 323: [height]} if tiled else {278: [height]})
        decoded = []
        for plane in range(planes):
            own = slice(plane * parts, (plane + 1) * parts)
            where = {324: offsets[own], 325: sizes[own]} if tiled else {273: offsets[own], 279: sizes[own]}
            where = {tag: values for tag, values in where.items() if values}  # libtiff computes missing sizes
            file = b"II*\0" + struct.pack("<I", len(content)) + content[8:] + _directory(tags | where, len(content))
            raw = ("L", "raw", False, 0)
            from PIL import Image

            grey = Image.frombytes("L", (across * row, self.height), file, "libtiff", raw)
            values = self._values(np.asarray(grey).reshape(self.height, across, row), side * each)
            values = values.reshape(self.height, across, side, each)
            if self._one(317, 1) == 2:
                values = np.cumsum(values, axis=2, dtype=values.dtype)
            decoded.append(values.reshape(self.height, across * side, each)[:, : self.width])
        return decoded[0] if planes == 1 else np.concatenate(decoded, axis=2)

    def _values(self, rows: np.ndarray, count: int) -> np.ndarray:
        """The first ``count`` samples of each row of bytes (..., row)."""
        if self.bits == 8:
            return rows
        if self.bits == 16:
            self._file.seek(0)
            return rows.view(">u2" if self._file.read(2) == b"MM" else "<u2").astype(np.uint16)
        bits = np.unpackbits(rows, axis=-1)[..., : count * self.bits].reshape(*rows.shape[:-1], count, self.bits)
        padded = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(16 - self.bits, 0)])
        values = np.packbits(padded, axis=-1).view(">u2")[..., 0]
        scaled = np.round(np.arange(2**self.bits) * (65535 / (2**self.bits - 1))).astype(np.uint16)
        return scaled[values]


def _directory(tags: dict[int, list[int]], at: int) -> bytes:
    """A directory of TIFF tags, little-endian, to be placed at offset ``at`` of a file."""
    entries, more, end = struct.pack("<H", len(tags)), b"", at + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHI", tag, 4, len(values))
        entries += packed if len(values) == 1 else struct.pack("<I", end + len(more))
        more += packed if len(values) > 1 else b""
    return entries + bytes(4) + more
