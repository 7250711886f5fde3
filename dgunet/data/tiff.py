"""TIFF images as their tags describe them: what is not understood is refused, never guessed.

tifffile decodes grey and RGB of 8 to 16 bits, and Pillow the others: it reduces colours of 16 bits to 8.
"""

import logging
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dgunet.runtime.errors import UserError

_PREDICTABLE = {5, 8, 32946, 34925, 50000}  # of Compression: LZW, Deflate, Deflate, LZMA, Zstandard
_LOSSLESS = {1, 32773, *_PREDICTABLE}  # and none, PackBits
_FAX_AND_JPEG = {2, 3, 4, 6, 7, 32771}
# PhotometricInterpretation: how many samples are the colour of a pixel
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_PREMULTIPLIED = 1  # of ExtraSamples
_ALPHA = {_PREMULTIPLIED, 2, 999}  # which Corel Draw writes
_UNPRINTED = logging.NullHandler()  # what tifffile logs: damage is told by the errors here


def is_tiff(prefix: bytes) -> bool:
    return prefix[:2] in (b"II", b"MM") and prefix[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+")


class Tiff:
    """The first image of a TIFF file.

    height, width: as stored, not turned by ``orientation`` (1 to 8); bits: per sample; n_frames: images in the file but
    its thumbnails; mode: "RGB" or "L" of 8 bits and nothing else, or ""; direct: whether `read` reads it, or else
    Pillow, which reads the others rightly; premultiplied: whether alpha has been multiplied with the colours; further:
    samples of a pixel that are neither colour nor alpha; tag_v2, info: as in Pillow, of both what is used here.

    Raises:
        UserError: it has a property that neither understands, which is named. Damaged files raise other errors.
    """

    format = "TIFF"

    def __init__(self, path: Path, file: BinaryIO):
        import tifffile

        logging.getLogger("tifffile").addHandler(_UNPRINTED)
        file.seek(0)
        pages = tifffile.TiffFile(file).pages
        self._page = page = pages[0]
        self.tag_v2 = page.tags
        self.n_frames = 1 + sum(not other.is_reduced for other in pages[1:])
        for tag in (256, 257, 262):
            if not isinstance(self.tag_v2.valueof(tag), int):
                raise ValueError(f"the tag {tag} is missing or no number")
        if page.is_reduced or page.photometric in (32803, 34892) or 50706 in self.tag_v2:
            raise UserError(f"{path} is a camera's raw file; develop it to JPEG, or to TIFF or PNG of 16 bits")
        self.width, self.height, self.orientation = page.imagewidth, page.imagelength, self.tag_v2.valueof(274, 1)
        self.bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
        self._colours = _COLOURS.get(page.photometric, 1)
        unnamed = max(page.samplesperpixel - self._colours, 0)
        extra = (*page.extrasamples, *[0] * unnamed)[:unnamed]  # without a kind: unspecified
        self._alpha = next((k for k, kind in enumerate(extra) if kind in _ALPHA), None)
        self.premultiplied = self._alpha is not None and extra[self._alpha] == _PREMULTIPLIED
        self.further = unnamed - (self._alpha is not None)
        self.direct = page.photometric < 3 and self.bits >= 8 and page.compression in _LOSSLESS
        if refused := [what for what, found in self._not_understood().items() if found]:
            advice = "save it as RGB or grey, of 8 or 16 bits per channel, uncompressed or with LZW or Deflate"
            raise UserError(f"{path} is a TIFF with {refused[0]}, which is not understood; {advice}")
        plain = self.direct and self.bits == 8 and not extra
        self.mode = ("RGB" if self._colours == 3 else "L") if plain else ""
        self.info = self._info()

    def _not_understood(self) -> dict[str, bool]:
        """Properties that an image cannot have to be read, and whether this one has them."""
        page, kind, bits, samples = self._page, self._page.photometric, self.bits, self._page.samplesperpixel
        number = {2: "signed", 3: "floating-point"}.get(page.sampleformat, "complex or mixed")
        predictable = page.predictor == 2 and bits in (8, 16) and page.compression in _PREDICTABLE
        few_or_many = samples < self._colours or (self._colours == 1 and samples > 2)
        planes = page.planarconfig == 2 and samples > 1
        by_any = {
            f"colours of the kind {kind} (PhotometricInterpretation)": kind not in _COLOURS,
            f"the compression {page.compression} (Compression)": page.compression not in _LOSSLESS | _FAX_AND_JPEG,
            f"{number} values (SampleFormat {page.sampleformat})": page.sampleformat not in (1, 4),  # 4: undefined
            f"{page.bitspersample} bits per channel (BitsPerSample)": page.bitspersample != bits or bits > 16,
            f"the arrangement {page.planarconfig} (PlanarConfiguration)": page.planarconfig not in (1, 2),
            f"{page.imagedepth} layers (ImageDepth)": page.imagedepth != 1,
        }
        by_tifffile = {
            f"{samples} channels (SamplesPerPixel) where {self._colours} and alpha are usual": few_or_many,
            "alpha that grey was multiplied with (ExtraSamples 1) where white is 0": kind == 0 and self.premultiplied,
            f"the predictor {page.predictor} for {bits} bits (Predictor)": page.predictor != 1 and not predictable,
        }
        by_pillow = {
            "big-endian offsets of 64 bits (BigTIFF)": page.parent.is_bigtiff and page.parent.byteorder == ">",
            f"{bits} bits of the colours {kind} (PhotometricInterpretation)": bits > 8 and (kind, bits) != (5, 16),
            "other inks than cyan, magenta, yellow and black (InkSet)": kind == 5 and self.tag_v2.valueof(332, 1) != 1,
            "planes (PlanarConfiguration 2) of other colours than RGB": planes and (kind, bits) != (5, 8),
            "uncompressed YCbCr colours (PhotometricInterpretation 6)": kind == 6 and page.compression == 1,
        }
        return by_any | (by_tifffile if self.direct else by_pillow)

    def _info(self) -> dict:
        tags, names = self.tag_v2, {34675: "icc_profile", 700: "xmp", 33723: "photoshop", 34377: "photoshop"}
        info = {name: tags.valueof(tag) for tag, name in names.items() if isinstance(tags.valueof(tag), bytes)}
        if tags.valueof(296, 2) in (2, 3) and 282 in tags and 283 in tags:
            info["dpi"] = self._page.get_resolution("INCH")
        return info

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Its pixels, (H, W, 3) RGB or (H, W) grey, uint8 or uint16, and its alpha of the same type, (H, W), or None.

        Black is 0 and white the highest value, whatever the file has; 9 to 15 bits are scaled to 16; colours that alpha
        has been multiplied with are divided by it.
        """
        page, count = self._page, math.prod(self._page.chunked)
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))[:count]
        if len(parts) < count or not all(map(all, parts)):  # tifffile takes them for black
            raise ValueError("strips or tiles are missing")
        planes = page.asarray(squeeze=False, maxworkers=1)[:, 0]
        samples = planes.transpose(1, 2, 0, 3).reshape(self.height, self.width, page.samplesperpixel)
        if self.bits not in (8, 16):
            samples = np.round(np.arange(2**self.bits) * (65535 / (2**self.bits - 1))).astype(np.uint16)[samples]
        pixels, most = samples[..., : self._colours], np.iinfo(samples.dtype).max
        alpha = None if self._alpha is None else samples[..., self._colours + self._alpha]
        if page.photometric == 0:  # white is
            pixels = ~pixels
        if self.premultiplied:
            below = np.maximum(alpha, 1).astype(np.uint32)[..., None]
            divided = (pixels.astype(np.uint32) * np.uint32(most) + below // 2) // below
            pixels = np.minimum(divided, most).astype(samples.dtype)
        return pixels if self._colours == 3 else pixels[..., 0], alpha
