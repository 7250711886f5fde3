"""The command `dgunet` on tiny images of every kind, and any image read and written."""

import base64
import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import cv2
import numpy as np
import psutil
import pytest
import tifffile
import torch
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from dgunet import automatic, load_model, restore
from dgunet.apps import batch as restoring
from dgunet.apps import cli as command
from dgunet.checkpoints import registry as pretrained
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data import photos
from dgunet.data.photos import Photo, noise_warning, probe, read_comment, read_photo, write_photo
from dgunet.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def colours(height: int = 16, width: int = 24, seed: int = 0, dtype=np.uint8) -> np.ndarray:
    """A smooth image, so that JPEG keeps it."""
    small = np.random.default_rng(seed).uniform(0.2, 0.8, (3, 4, 3))
    return (cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) * np.iinfo(dtype).max).astype(dtype)


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def weights(tmp_path, tiny_model) -> Path:
    model = tiny_model(stages=2)
    path = tmp_path / "weights.pth"
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, path)
    return path


@pytest.fixture
def dgunet(tmp_path, weights, capsys, monkeypatch) -> Callable[..., Done]:
    """``dgunet("denoise", ...)`` runs the command in ``tmp_path``, where the photographs are put."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> Done:
        capsys.readouterr()
        words = [str(word) for word in words]
        if words[0] in command.RESTORING and "--weights" not in words:
            words += ["--weights", str(weights)]
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


def save(path: str, pixels: np.ndarray = None, **options) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours() if pixels is None else pixels).save(path, **options)
    return path


def files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------- reading


class Kind(NamedTuple):
    suffix: str
    write: Callable[[Path], None]
    told: list[str] = []  # of each note, a part
    loss: float = 0  # mean difference from `colours`


def kinds() -> dict[str, Kind]:
    rgb, grey = Image.fromarray(colours()), Image.fromarray(colours()[..., 0])
    deep = colours(dtype=np.uint16)[..., ::-1]
    clear = rgb.copy()
    clear.putalpha(grey)
    return {
        "plain": Kind(".webp", lambda p: rgb.save(p, lossless=True)),
        "grey": Kind(".png", grey.save, ["grey"]),
        "grey_16": Kind(".png", lambda p: cv2.imwrite(str(p), deep[..., 2]), ["grey", "16 bits"]),
        "deep_png": Kind(".png", lambda p: cv2.imwrite(str(p), deep), ["16 bits"]),
        "deep_tif": Kind(".tif", lambda p: cv2.imwrite(str(p), deep), ["16 bits"]),
        "deep_rgba": Kind(
            ".png", lambda p: cv2.imwrite(str(p), np.dstack([deep, deep[..., 2]])), ["16 bits", "transparency"]
        ),
        "rgba": Kind(".png", clear.save, ["transparency"]),
        "grey_alpha": Kind(".png", clear.convert("LA").save, ["grey", "transparency"], 60),
        "palette": Kind(".gif", rgb.quantize(256).save, ["a palette, now RGB"], 4),
        "clear_palette": Kind(
            ".png", lambda p: rgb.quantize(64).save(p, transparency=3), ["a palette, now RGB", "transparency"], 8
        ),
        "cmyk": Kind(".jpg", lambda p: rgb.convert("CMYK").save(p, quality=100), ["CMYK, now RGB"], 3),
        "cmyk_tif": Kind(".tif", rgb.convert("CMYK").save, ["CMYK, now RGB"], 1),
        "grey_clear": Kind(".png", lambda p: grey.save(p, transparency=90), ["grey", "transparency"]),
        "deep_ppm": Kind(".ppm", lambda p: cv2.imwrite(str(p), deep), ["16 bits, now 8"], 1),
        "fax_clear": Kind(
            ".png",
            lambda p: grey.convert("1").save(p, transparency=1),
            ["black and white, now grey", "transparency"],
            255,
        ),
        "fax": Kind(".tif", grey.convert("1").save, ["black and white, now grey"], 255),
        "film": Kind(
            ".gif", lambda p: rgb.save(p, save_all=True, append_images=[grey]), ["first of its 2", "a palette"], 4
        ),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_image_is_read_and_said(tmp_path, kind):
    suffix, write, told, loss = kinds()[kind]
    path = tmp_path / f"a{suffix}"
    write(path)
    image = read_photo(path)
    expected = colours(dtype=np.uint16 if "16 bits" in told else np.uint8)
    expected = expected[..., 0] if "grey" in told or kind.startswith("fax") else expected
    assert image.pixels.shape == expected.shape and image.pixels.dtype == expected.dtype
    assert np.abs(image.pixels.astype(float) - expected).mean() <= loss
    assert len(image.notes) == len(told) and all(map(str.__contains__, image.notes, told))
    assert (image.alpha is not None) == ("transparency" in told)
    if kind in ("rgba", "deep_rgba"):
        np.testing.assert_array_equal(image.alpha, expected[..., 0])
    write_photo(tmp_path / "again.png", image, "of mine")
    again = read_photo(tmp_path / "again.png")
    np.testing.assert_array_equal(again.pixels, image.pixels)
    assert (again.alpha is None) == (image.alpha is None)
    if image.alpha is not None:
        np.testing.assert_array_equal(again.alpha, image.alpha)
    assert read_comment(tmp_path / "again.png") == "of mine"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", "deep .png", "deep .tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 5])
def test_turned_upright_once(tmp_path, suffix, orientation):
    deep, suffix = "deep" in suffix, suffix.split()[-1]
    upright = colours(16, 24, dtype=np.uint16 if deep else np.uint8)
    steps = {1: (0, False), 3: (2, False), 6: (1, False), 8: (3, False), 5: (1, True)}[orientation]
    stored = np.rot90(upright[:, ::-1] if steps[1] else upright, steps[0])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Camera"
    path = tmp_path / f"a{suffix}"
    if deep and suffix == ".tif":
        tag = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, np.ascontiguousarray(stored), extratags=tag, photometric="rgb")
    elif deep:
        write_photo(path, Photo(np.ascontiguousarray(stored), keep={"exif": exif.tobytes()}), "")
    else:
        options = {".jpg": dict(quality=100, subsampling=0), ".webp": dict(lossless=True)}.get(suffix, {})
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    image = read_photo(path)
    assert image.pixels.shape == upright.shape
    assert np.abs(image.pixels / 255.0 - upright / 255.0).max() < 0.05
    write_photo(tmp_path / "again.jpg" if suffix == ".jpg" else tmp_path / "again.png", image, "")
    (again,) = tmp_path.glob("again.*")
    assert read_photo(again).pixels.shape == upright.shape
    written = Image.open(again).getexif()
    assert written.get(0x0112, 1) == 1 and written.get(0x010F) == (None if suffix == ".tif" else "Camera")


@pytest.mark.parametrize("deep", [False, True])
def test_colour_profile_and_resolution_are_kept(tmp_path, deep):
    pixels = colours(dtype=np.uint16 if deep else np.uint8)
    write_photo(tmp_path / "a.png", Photo(pixels, keep={"icc_profile": SRGB, "dpi": (300, 300)}), "")
    image = read_photo(tmp_path / "a.png")
    assert image.keep["icc_profile"] == SRGB and image.keep["dpi"] == pytest.approx((300, 300), abs=0.1)
    np.testing.assert_array_equal(image.pixels, pixels)
    assert np.array_equal(cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)[..., ::-1], pixels)


def test_the_former_module_of_photos_warns(tmp_path):
    sys.modules.pop("dgunet.pictures", None)
    with pytest.warns(DeprecationWarning, match="dgunet.data.photos"):
        from dgunet.pictures import read_picture
    np.testing.assert_array_equal(read_picture(save(tmp_path / "a.png")).pixels, colours())


def test_bmp_of_16_bits_per_pixel_is_read(tmp_path):
    """Five or six bits per channel: not to be taken for 16 bits per channel."""
    header = struct.pack("<2sIHHIIiiHHIIiiII3I", b"BM", 66 + 8 * 4, 0, 0, 66, 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0,
                         0xF800, 0x07E0, 0x001F)  # fmt: skip
    (tmp_path / "a.bmp").write_bytes(header + np.full((4, 4), 0xF800, "<u2").tobytes())
    image = read_photo(tmp_path / "a.bmp")
    assert image.pixels.dtype == np.uint8 and (image.pixels == [255, 0, 0]).all() and image.notes == []


@pytest.mark.parametrize("value", [4e9, 65536, 0.5, float("nan")])
def test_resolutions_that_no_format_holds_are_left_out(tmp_path, value):
    path = save(tmp_path / "a.tif", dpi=(300, 300))
    with Image.open(path) as image:
        image.tag_v2[282] = value if value == value else IFDRational(0, 0)
        image.save(tmp_path / "b.tif", tiffinfo=image.tag_v2)
    assert Image.open(tmp_path / "b.tif").info["dpi"] != (300, 300)
    for name, kept in ("a.tif", True), ("b.tif", False):
        image = read_photo(tmp_path / name)
        assert ("dpi" in image.keep) == kept
        write_photo(tmp_path / "again.png", image, "")
        write_photo(tmp_path / "again.jpg", image, "")


def test_converted_colours_keep_the_rest(tmp_path, monkeypatch):
    """Orientation, EXIF and resolution of a CMYK JPEG, whose colours its profile converts."""

    def converted(image, *args, **options):
        return Image.fromarray(np.asarray(image.convert("RGB")))  # which has no info, as that of ImageCms

    monkeypatch.setattr(ImageCms, "profileToProfile", converted)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    path = tmp_path / "a.jpg"
    Image.fromarray(colours()).convert("CMYK").save(path, exif=exif, dpi=(300, 300), icc_profile=bytes(128))
    image = read_photo(path)
    assert image.pixels.shape == (24, 16, 3) and image.keep["dpi"] == (300, 300)
    assert image.notes == ["CMYK, now RGB", "turned upright, as its EXIF data says"]
    write_photo(path, image, "")
    assert dict(Image.open(path).getexif()) == {0x0112: 1, 0x010F: "Camera"}


def test_transparent_value_of_16_bits(tmp_path):
    pixels = colours(dtype=np.uint16)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=int(pixels[3, 4]))
    image = read_photo(tmp_path / "a.png")
    np.testing.assert_array_equal(image.alpha, np.where(pixels == pixels[3, 4], 0, 65535))
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.alpha.dtype == np.uint16 and "its transparency is kept as it is" in image.notes
    write_photo(tmp_path / "b.png", image, "")
    np.testing.assert_array_equal(read_photo(tmp_path / "b.png").alpha, image.alpha)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_jpeg_2000_of_16_bits_is_reduced_and_said(tmp_path, dtype):
    assert cv2.imwrite(str(tmp_path / "a.jp2"), colours(64, 96, dtype=dtype))
    image = read_photo(tmp_path / "a.jp2")
    assert image.pixels.dtype == np.uint8 and image.notes == (["16 bits, now 8"] if dtype == np.uint16 else [])


def test_profile_of_other_colours_is_not_kept(tmp_path):
    save(tmp_path / "grey.png", colours()[..., 0], icc_profile=SRGB)
    assert "icc_profile" not in read_photo(tmp_path / "grey.png").keep


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC.*export it as JPEG"),
        ("a.nef", b"MM\0*" + bytes(99), "raw file; develop it"),
        ("a.png", b"", "is empty"),
        ("a.jpg", b"hello", "a.jpg.*convert it"),
        ("a.tif", None, "floating-point"),
        ("cut.png", b"cut", "may be damaged"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, name, content, told):
    path = tmp_path / name
    if content is None:
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
    else:
        path.write_bytes(content if content != b"cut" else save(tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(UserError, match=told) as error:
        read_photo(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


TIFFS = {  # how tifffile writes it; extra samples are 0 to 1 from the left to the right
    "planar": dict(photometric="rgb", planarconfig="separate"),
    "planar_deflate": dict(
        photometric="rgb", planarconfig="separate", compression="zlib", predictor=True, rowsperstrip=5
    ),
    "tiles": dict(photometric="rgb", tile=(16, 16), compression="zlib", predictor=True),
    "planar_tiles": dict(photometric="rgb", tile=(16, 16), planarconfig="separate"),
    "big_endian": dict(photometric="rgb", byteorder=">", compression="zlib", predictor=True),
    "big_tiff": dict(photometric="rgb", bigtiff=True, rowsperstrip=3),
    "big_endian_big_tiff": dict(photometric="rgb", bigtiff=True, byteorder=">", compression="lzw"),
    "white_is_zero": dict(photometric="miniswhite"),
    "white_is_zero_big_endian": dict(photometric="miniswhite", byteorder=">"),
    "infrared": dict(photometric="rgb", extrasamples=["unspecified"]),
    "infrared_planar": dict(photometric="rgb", extrasamples=["unspecified"], planarconfig="separate"),
    "more": dict(photometric="rgb", extrasamples=["unassalpha", "unspecified", "unspecified"]),
    "premultiplied": dict(photometric="rgb", extrasamples=["assocalpha"]),
    "premultiplied_planar": dict(photometric="rgb", extrasamples=["assocalpha"], planarconfig="separate"),
    "alpha": dict(photometric="rgb", extrasamples=["unassalpha"]),
    "grey_alpha": dict(photometric="minisblack", extrasamples=["unassalpha"]),
    "grey_premultiplied": dict(photometric="minisblack", extrasamples=["assocalpha"], planarconfig="separate"),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("name", TIFFS)
def test_tiff_is_what_its_tags_say(tmp_path, name, dtype):
    options, most = dict(TIFFS[name]), np.iinfo(dtype).max
    truth = colours(37, 50, dtype=dtype)
    truth = truth if options["photometric"] == "rgb" else truth[..., 0]
    extra = options.get("extrasamples", [])
    ramp = np.linspace(0.1, 1, 50)[None].repeat(37, 0)
    stored = most - truth if options["photometric"] == "miniswhite" else truth
    planes = np.dstack([stored, *[(ramp * most).astype(dtype)] * len(extra)])
    if "assocalpha" in extra:
        planes[..., :-1] = np.round(planes[..., :-1] * (planes[..., -1:] / most))
    if options.get("planarconfig") == "separate":
        planes = np.ascontiguousarray(planes.transpose(2, 0, 1))
    order = options.get("byteorder", "<")
    tifffile.imwrite(tmp_path / "a.tif", planes.squeeze().astype(planes.dtype.newbyteorder(order)), **options)
    assert probe(tmp_path / "a.tif") == (37, 50, "TIFF")
    image = read_photo(tmp_path / "a.tif")
    assert image.pixels.dtype == dtype and image.pixels.shape == truth.shape
    assert np.abs(image.pixels.astype(int) - truth).max() <= (6 if "assocalpha" in extra else 0)  # what is left of them
    transparent = set(extra) & {"assocalpha", "unassalpha"}
    assert (image.alpha is not None) == bool(transparent)
    if transparent:
        np.testing.assert_array_equal(image.alpha, (ramp * most).astype(dtype))
    assert any("further channel" in note for note in image.notes) == ("unspecified" in extra)
    write_photo(tmp_path / "again.png", image, "")
    again = cv2.imread(str(tmp_path / "again.png"), cv2.IMREAD_UNCHANGED)
    again = again[..., 2::-1] if again.ndim == 3 else again
    np.testing.assert_array_equal(again if truth.ndim == again.ndim else again[..., 0], image.pixels)


@pytest.mark.parametrize("photometric", ["rgb", "minisblack", "miniswhite"])
def test_tiff_of_12_bits_is_scaled_to_16(tmp_path, photometric):
    truth = colours(20, 31, dtype=np.uint16) if photometric == "rgb" else colours(20, 31, dtype=np.uint16)[..., 0]
    twelve = truth >> 4
    bits = (np.dstack([twelve, 4095 - twelve])[..., 1:] if photometric == "miniswhite" else twelve).reshape(20, -1, 1)
    packed = np.packbits((bits >> np.arange(11, -1, -1) & 1).astype(np.uint8).reshape(20, -1), axis=1)
    tifffile.imwrite(tmp_path / "a.tif", packed, photometric="minisblack", rowsperstrip=20)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        tags = file.pages[0].tags
        for name, value in dict(
            ImageWidth=31,
            BitsPerSample=12,
            SamplesPerPixel=3 if photometric == "rgb" else 1,
            PhotometricInterpretation=dict(rgb=2, minisblack=1, miniswhite=0)[photometric],
        ).items():
            tags[name].overwrite(value)
    image = read_photo(tmp_path / "a.tif")
    assert image.pixels.dtype == np.uint16 and np.abs(image.pixels.astype(int) - truth).max() <= 16
    assert image.notes[0] == "12 bits, now 16"


def test_tags_beside_the_image_do_not_matter(tmp_path):
    """Resolution as text, an orientation that is none, a unit that is a fraction."""
    odd = [(282, 2, 6, "72dpi", True), (283, 2, 6, "72dpi", True), (274, 2, 2, "x", True), (296, 5, 1, (1, 2), True)]
    for k in range(len(odd)):
        tifffile.imwrite(tmp_path / "a.tif", colours(), photometric="rgb", extratags=[odd[k]])
        np.testing.assert_array_equal(read_photo(tmp_path / "a.tif").pixels, colours())


def test_12_bits_in_16_are_told(tmp_path):
    for name in "a.tif", "a.png":
        cv2.imwrite(str(tmp_path / name), colours(dtype=np.uint16) >> 4)
        (told,) = [note for note in read_photo(tmp_path / name).notes if "far too dark" in note]
        assert "4095" in told and "12 bits" in told


@pytest.mark.parametrize(
    "dtype, channels, options, told",
    [
        (np.int16, 1, {}, "signed"),
        (np.int8, 3, {}, "signed"),
        (np.float32, 3, {}, "floating-point"),
        (np.float16, 1, {}, "floating-point"),
        (np.uint32, 1, {}, "32 bits"),
        (np.uint32, 3, {}, "32 bits"),
        (np.uint16, 5, dict(photometric="minisblack", planarconfig="contig"), "5 channels"),
        (np.uint16, 3, dict(photometric="cielab"), "PhotometricInterpretation"),
        (np.uint8, 3, dict(photometric="icclab"), "PhotometricInterpretation"),
        (np.uint8, 3, dict(photometric="ycbcr"), "YCbCr"),
        (np.uint16, 4, dict(photometric="separated", planarconfig="separate"), "PlanarConfiguration"),
        (np.uint8, 3, dict(subfiletype=1), "raw file"),  # a preview, as in DNG and NEF
        (np.uint8, 4, dict(photometric="separated", bigtiff=True, byteorder=">"), "BigTIFF"),
    ],
)
def test_tiff_that_is_not_understood_is_refused(tmp_path, dtype, channels, options, told):
    pixels = np.zeros((16, 24) if channels == 1 else (16, 24, channels), dtype)
    if options.get("planarconfig") == "separate":
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    photometric = "minisblack" if channels == 1 else "rgb"
    tifffile.imwrite(tmp_path / "a.tif", pixels, **(dict(photometric=photometric) | options))
    with pytest.raises(UserError, match=told) as error:
        read_photo(tmp_path / "a.tif")
    assert str(tmp_path / "a.tif") in str(error.value)


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value), little-endian, as no library lets one write it."""
    body, extra, end = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        body += struct.pack("<HHI", tag, kind, count)
        body += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", end + len(extra))
        extra += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + bytes(4) + extra


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
ODD_TAGS = {
    "resolution of -1/0": (282, 10, 1, struct.pack("<ii", -1, 0)),
    "unit of resolution 70000": (296, 4, 1, struct.pack("<I", 70000)),
    "model as a number": (272, 11, 1, struct.pack("<f", 1.5)),
    "maker outside of the file": (271, 2, 4, struct.pack("<I", 90000)),
    "artist in UTF-8": (315, 2, 13, "Jürgen Groß".encode()),
    "unknown type": (271, 99, 1, b"abcd"),
    "directory that is none": (0x8769, 4, 1, struct.pack("<I", 99999)),
    "makers' note": (37500, 7, 12, b"Nikon\0\2\1abcd"),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("name", ODD_TAGS)
def test_exif_that_pillow_cannot_write_is_kept(tmp_path, name, suffix):
    data = exif_of(TURNED, ODD_TAGS[name])
    if "outside" in name:
        data = data.replace(struct.pack("<HHI", 271, 2, 4), struct.pack("<HHI", 271, 2, 4000))
    path = save(tmp_path / f"a{suffix}", exif=data)
    image = read_photo(path)
    assert image.pixels.shape == (24, 16, 3) and image.notes == ["turned upright, as its EXIF data says"]
    again = tmp_path / ("again.jpg" if suffix == ".jpg" else "again.png")
    write_photo(again, image, "")
    with Image.open(again) as image:
        assert image.size == (16, 24) and image.getexif().get(0x0112, 1) == 1
        written = image.info["exif"]
    assert struct.pack("<H", ODD_TAGS[name][0]) in written and ODD_TAGS[name][3] in written
    assert read_photo(again).pixels.shape == (24, 16, 3)


def test_exif_that_is_none_is_told(tmp_path):
    image = read_photo(save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage"))
    assert "exif" not in image.keep and ["EXIF" in note for note in image.notes] == [True]


# 8x8 pixels of 10 bits, which Pillow does not write
AVIF = (
    b"AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAAAAAOcGl0bQ"
    b"AAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAMgAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABqaXBycAAA"
    b"AEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAAgAAAABdpcG1hAAAAAA"
    b"AAAAEAAQQBAoMEAAAAOm1kYXQSAAoIOAi/5wICAJAyJBAAADBmQnIhnl8cLVwamk+ma9ENH7Zd0JvW5zUmq6iWHJ5SnA=="
)
HDR_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description hdrgm:Version="1.0"/></x:xmpmeta>'


def dropped() -> dict[str, tuple[str, Callable[[Path], None], list[str]]]:
    """Suffix, how it is written, and of each note a part."""
    rgb, grey = Image.fromarray(colours()), Image.fromarray(colours()[..., 0])
    two, avif = dict(format="MPO", save_all=True, append_images=[grey]), base64.b64decode(AVIF)
    wide = avif.replace(b"nclx\0\2\0\2", b"nclx\0\x09\0\x10")

    def pages(path):
        with tifffile.TiffWriter(path) as writer:
            for subfile in 0, 1, 0:
                writer.write(colours(dtype=np.uint16), photometric="rgb", subfiletype=subfile)

    return {
        "second image": (".jpg", lambda path: rgb.save(path, **two), ["first of its 2"]),
        "gain map": (".jpg", lambda path: rgb.save(path, xmp=HDR_XMP, **two), ["gain map", "XMP"]),
        "video": (".jpg", lambda path: rgb.save(path, xmp=b'<a GCamera:MotionPhoto="1"/>'), ["video", "XMP"]),
        "bits": (".avif", lambda path: path.write_bytes(avif), ["10 bits, now 8"]),
        "colours": (".avif", lambda path: path.write_bytes(wide), ["colour space", "10 bits, now 8"]),
        "metadata of TIFF": (
            ".tif",
            lambda path: tifffile.imwrite(path, colours(), extratags=[(700, 1, 5, b"<xmp>", True)], photometric="rgb"),
            ["XMP"],
        ),
        "pages": (".tif", pages, ["first of its 2 ", "16 bits"]),
        "fifth channel": (
            ".tif",
            lambda path: tifffile.imwrite(
                path, np.zeros((8, 8, 5), np.uint8), photometric="separated", extrasamples=["unspecified"]
            ),
            ["CMYK", "1 further channel"],
        ),
    }


@pytest.mark.parametrize("name", dropped())
def test_what_is_not_kept_is_told(tmp_path, name):
    suffix, write, told = dropped()[name]
    write(tmp_path / f"a{suffix}")
    notes = read_photo(tmp_path / f"a{suffix}").notes
    assert len(notes) == len(told) and all(map(str.__contains__, notes, told)), notes


BOX = b"\0\0\0\x18ftyp"


@pytest.mark.parametrize(
    "content, told",
    [
        (BOX + b"heic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (BOX + b"mif1\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (BOX + b"isom\0\0\0\0isomavc1" + bytes(99), "video"),
        (BOX + b"qt  \0\0\0\0qt  qt  " + bytes(99), "video"),
        (BOX + b"avif\0\0\0\0mif1avif" + bytes(99), "AVIF|damaged"),
        (BOX + b"crx \0\0\0\1crx isom" + bytes(99), "raw file"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(99), "raw file"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "raw file"),
        (b"%PDF-1.7\n" + bytes(99), "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\n<!DOCTYPE html>\n<html>", "web page"),
        (b"\xff\x0a" + bytes(99), "JPEG XL"),
    ],
)
def test_a_file_is_what_its_bytes_say(tmp_path, content, told):
    (tmp_path / "a.JPG").write_bytes(content)
    for read in read_photo, probe:
        with pytest.raises(UserError, match=told) as error:
            read(tmp_path / "a.JPG")
        assert str(error.value).startswith(str(tmp_path / "a.JPG"))


def test_heic_of_another_name_is_given_to_pillow_heif(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: asked.append(1)))
    (tmp_path / "a.JPG").write_bytes(BOX + b"heic\0\0\0\0mif1heic" + bytes(99))
    with pytest.raises(UserError, match="HEIC"):
        read_photo(tmp_path / "a.JPG")
    assert asked


def test_a_jpeg_named_as_a_raw_file_is_read(tmp_path):
    shutil.copy(save(tmp_path / "a.jpg"), tmp_path / "a.dng")
    assert read_photo(tmp_path / "a.dng").pixels.shape == (16, 24, 3)


def test_the_preview_in_a_raw_file_is_not_taken_for_it(tmp_path):
    shutil.copy(save(tmp_path / "a.tif"), tmp_path / "a.nef")
    with pytest.raises(UserError, match="raw file"):
        read_photo(tmp_path / "a.nef")


def test_what_jpeg_cannot_hold_is_told(tmp_path):
    with pytest.raises(UserError, match="a.jpg cannot be written in its format"):
        write_photo(tmp_path / "a.jpg", Photo(np.zeros((1, 66000, 3), np.uint8)), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "suffix, mode", [(".png", "RGB"), (".tif", "RGB"), (".tif", "1"), (".tif", "P"), (".gif", "P")]
)
def test_scans_larger_than_pillow_opens_by_itself(tmp_path, monkeypatch, suffix, mode):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(colours()).convert(mode).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_photo(path).pixels.shape[:2] == (16, 24) and Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(photos, "MAX_PIXELS", 10)
    with pytest.raises(UserError, match="24x16 pixels, more than can be read"):
        read_photo(path)


def test_reads_that_overlap_leave_the_limit_of_pillow(tmp_path, monkeypatch):
    """It is one for the process, and another thread may rely on it at any time."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    one, two = photos.opened(save(tmp_path / "a.png")), photos.opened(save(tmp_path / "b.tif"))
    one.__enter__()
    assert Image.MAX_IMAGE_PIXELS == 10
    two.__enter__()
    one.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 10
    two.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_noise_unlike_the_training():
    warned = lambda level, trained: (noise_warning(level, trained) or "fits").split()[0]  # noqa: E731
    assert [warned(level, (25, 25)) for level in (1, 16, 25, 50)] == ["less", "fits", "fits", "more"]
    assert [warned(level, (0, 50)) for level in (0, 50, 80)] == ["fits", "fits", "more"]


# ----------------------------------------------------------------------------------------------------------- restoring


def test_folders_and_files_of_every_kind(dgunet, weights):
    """Each becomes what `restore` makes of it; names and folders are kept; a second run finds all done."""
    Path("photos").mkdir()
    for kind, (suffix, write, *_) in kinds().items():
        write(Path("photos", kind + suffix))
    for name in ("photos/day 2/b.jpeg", "photos/.hidden/c.jpg", "photos/.d.jpg"):
        save(name)
    Path("photos/notes.txt").write_text("none")
    done = dgunet("denoise", "photos", "--out", "restored/here", "--no-bf16")
    count = len(kinds()) + 1
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == f"{count} restored, in restored/here"
    expected = {name + (".jpg" if name == "cmyk" else ".png") for name in kinds()}
    assert files("restored/here") == sorted({*expected, "day 2/b.jpeg"})
    model = load_model(weights)
    for name in ("deep_tif", "rgba", "plain", "grey_16"):
        (path,) = Path("photos").glob(f"{name}.*")
        degraded, restored = read_photo(path), read_photo(f"restored/here/{name}.png")
        scale = np.iinfo(degraded.pixels.dtype).max
        y = degraded.pixels.astype(np.float32) / scale
        x = restore(model, np.dstack([y] * 3)).mean(axis=2) if y.ndim == 2 else restore(model, y)
        assert np.abs(restored.pixels / scale - x).max() < 0.6 / scale + 1e-6
        assert restored.pixels.dtype == degraded.pixels.dtype and not np.array_equal(restored.pixels, degraded.pixels)
        assert np.array_equal(restored.alpha, degraded.alpha)
    for told in ("CMYK, now RGB: photos/cmyk", "16 bits per channel", "written as PNG: photos/cmyk_tif.tif, "):
        assert sum(line.startswith("note: ") and told in line for line in done.out.splitlines()) == 1
    stamps = [os.stat(Path("restored/here", name)).st_mtime_ns for name in files("restored/here")]
    again = dgunet("denoise", "photos", "--out", "restored/here", "--no-bf16")
    assert again.status == 0 and again.out.splitlines()[-1] == f"0 restored, {count} done before, in restored/here"
    assert stamps == [os.stat(Path("restored/here", name)).st_mtime_ns for name in files("restored/here")]


def test_names_and_places(dgunet):
    """A folder beside others keeps its name; what was restored before is no input; nothing is overwritten."""
    for k, name in enumerate(("a/x.png", "a/x.jpg", "b/x.png", "y.png", "c/y.png", "a/z.tif", "a/z.png")):
        save(name, colours(seed=k))
    done = dgunet("denoise", "a", "b/", "y.png", "c/y.png", "y.png", "--out", "out")
    assert done.status == 2
    assert files("out") == ["a/x.jpg", "a/x.png", "a/z.png", "b/x.png", "y.png"]
    refused = [line for line in done.err.splitlines() if line.startswith("not restored")]
    assert len(refused) == 2 and "c/y.png: would be written to out/y.png, as y.png is" in refused[1]
    assert done.out.splitlines()[-1] == "5 restored, in out; 2 not, see above: a/z.tif, c/y.png"
    again = dgunet("denoise", ".", "--out", "out", "--tile", "auto")
    assert "3 done before" in again.out or again.status == 2
    assert files("out") == ["a/x.jpg", "a/x.png", "a/z.png", "b/x.png", "c/y.png", "y.png"]


def test_photographs_are_never_written_to(dgunet):
    save("a/x.png")
    save("a/sub/x.png", colours(seed=2))
    before = {name: Path("a", name).read_bytes() for name in files("a")}
    one = dgunet("denoise", "a", "--out", "a", "--overwrite")
    two = dgunet("denoise", "a/x.png", "--out", "a", "--overwrite")
    three = dgunet("denoise", "a/sub/x.png", "a/x.png", "--out", "a", "--overwrite")
    Path("linked").symlink_to("a")
    four = dgunet("denoise", "a", "--out", "linked", "--overwrite")
    assert [done.status for done in (one, two, three, four)] == [2] * 4
    five = dgunet("denoise", "a/sub", "--out", "a", "--overwrite")  # a/x.png is none of those to be restored
    assert five.status == 2 and "not from dgunet" in five.err
    assert all("choose another" in done.err for done in (one, two, three, four, five))
    assert {name: Path("a", name).read_bytes() for name in files("a")} == before


def test_results_of_other_images_weights_and_settings_are_not_taken_for_done(dgunet, tiny_model):
    save("a/x.png")
    save("b/x.png", colours(seed=1))
    assert dgunet("denoise", "a/x.png", "--out", "out").status == 0
    first = Path("out/x.png").read_bytes()
    model = tiny_model(stages=2, seed=1)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, "other.pth")
    for changed in (["b/x.png"], ["a/x.png", "--weights", "other.pth"], ["a/x.png", "--tile", "16"]):
        done = dgunet("denoise", *changed, "--out", "out")
        assert done.status == 2 and "out/x.png is there already" in done.err and "--overwrite" in done.err
        assert Path("out/x.png").read_bytes() == first
    save("a/x.png", colours(seed=3))
    assert dgunet("denoise", "a/x.png", "--out", "out").status == 2
    assert dgunet("denoise", "a/x.png", "--out", "out", "--overwrite").status == 0
    assert Path("out/x.png").read_bytes() != first
    shutil.move("a/x.png", "moved.png")
    shutil.move("moved.png", "b/x.png")
    assert "1 done before" in dgunet("denoise", "b/x.png", "--out", "out").out


def test_one_bad_image_costs_no_other(dgunet):
    save("a/1.png")
    save("a/2.jpg").write_bytes(save("a/2.jpg").read_bytes()[:400])
    Path("a/3.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    save("a/4.png")
    Path("none").mkdir()
    done = dgunet("denoise", "a", "missing.png", "none", "--out", "out")
    assert done.status == 2 and files("out") == ["a/1.png", "a/4.png"]
    told = done.err.splitlines()
    assert len(told) == 4 and done.out.splitlines()[-1].startswith("2 restored, in out; 4 not, see above: a/2.jpg, ")
    for name, reason in ("a/2.jpg", "damaged"), ("3.heic", "HEIC"), ("missing.png", "no such"), ("none", "no images"):
        assert any(name in line and reason in line for line in told)
    assert dgunet("denoise", "none", "--out", "new").status == 2 and not Path("new").exists()


def test_places_that_cannot_be_used_cost_no_other(dgunet, monkeypatch):
    """Links to nothing, folders that may not be read or written to, names too long to be written."""
    long = "x" * 251 + ".png"  # as long as the disk takes
    for name in ("a/1.png", f"a/{long}", "a/secret/2.png", "a/sub/3.png", "else/4.png"):
        save(name)
    Path("a/0.jpg").symlink_to("/nowhere/x.jpg")
    Path("a/linked").symlink_to(Path("else").resolve())
    Path("out").mkdir()
    Path("out/sub").write_text("a file in the way")
    scan = os.scandir

    def guarded(path):
        if "secret" in os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    reasons = {
        "a/secret": "Permission denied",
        "a/0.jpg": "a/0.jpg: No such file or directory",
        "a/sub/3.png": "out/sub: File exists",
    }
    for told in "2 restored, in out", "0 restored, 2 done before, in out":
        done = dgunet("denoise", "a", "--out", "out")
        refused = [line for line in done.err.splitlines() if line.startswith("not restored: ")]
        assert done.status == 2 and files("out") == ["1.png", "sub", long] and len(refused) == len(reasons)
        for name, reason in reasons.items():
            assert any(name in line and reason in line for line in refused), name
        assert "note: a link to a folder, not followed; restore it by its own name: a/linked" in done.out.splitlines()
        assert done.out.splitlines()[-1].startswith(f"{told}; 3 not, see above: ")


def test_strength(dgunet, weights):
    """A share of the change; another one is another setting."""
    save("x.png", colours(24, 32))
    for strength in ("0", "0.5", "1"):
        assert dgunet("denoise", "x.png", "--out", strength, "--strength", strength, "--no-bf16").status == 0
    y, none, half, whole = (read_photo(f"{folder}/x.png").pixels.astype(float) for folder in (".", "0", "0.5", "1"))
    assert np.array_equal(none, y) and np.abs(half - (y + whole) / 2).max() <= 1 and np.abs(whole - y).max() > 3
    assert "other weights or settings" in dgunet("denoise", "x.png", "--out", "1", "--strength", "0.9", "--no-bf16").err
    wrong = dgunet("denoise", "x.png", "--strength", "50")
    assert wrong.status == 2 and "--strength" in wrong.err and not Path("restored").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_where_it_is_faster(dgunet, monkeypatch, fast):
    """But not for 16 bits, unless it is asked for."""
    write_photo("deep.png", Photo(colours().astype(np.uint16) * 257), "a photograph")
    save("plain.png")
    monkeypatch.setattr(restoring, "autocast_dtype", lambda choice, device: torch.bfloat16 if fast else None)
    used = []
    monkeypatch.setattr(restoring, "restore", lambda *a, bf16, **k: used.append(bf16) or restore(*a, bf16=bf16, **k))
    for words, expected in (([], [False, fast]), (["--bf16"], [True, True]), (["--no-bf16"], [False, False])):
        used.clear()
        done = dgunet("denoise", "deep.png", "plain.png", "--overwrite", *words)
        assert used == expected and ("in bfloat16," in done.out) == (fast and not words)
        assert done.out.splitlines()[-1] == "2 restored, in restored"


class Page(HTMLParser):
    """The images of a page, and the labels of its sliders."""

    def __init__(self, path: Path):
        super().__init__()
        self.images, self.labels = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes["src"])
        if tag == "input":
            self.labels.append(attributes["aria-label"])


def test_page_of_before_and_after(dgunet):
    """Of all that are in --out now; what browsers cannot show is there as a copy."""
    save("a/x & <b>.png")
    save("a/sub/100%.jpg")
    tifffile.imwrite("a/scan.tif", colours().astype(np.uint16) * 257, photometric="rgb")
    assert dgunet("denoise", "a/x & <b>.png", "--out", "out").status == 0
    done = dgunet("denoise", "a", "--out", "out", "--compare")
    assert done.status == 0 and f"before and after: {Path('out/compare.html')}" in done.out
    page = Page(Path("out/compare.html"))
    assert len(page.labels) == 3 and any(label.startswith("x & <b>.png:") for label in page.labels)
    shown = [Path(unquote(urlparse(image).path)) for image in page.images]
    after, before = ([Path("out") / path for path in shown[k::2]] for k in (0, 1))
    assert {path.relative_to("out").as_posix() for path in after} == {"scan.png", "sub/100%.jpg", "x & <b>.png"}
    pairs = dict(zip((path.name for path in after), before, strict=True))
    assert pairs["100%.jpg"] == Path("a/sub/100%.jpg").absolute() and pairs["scan.png"] == Path("out/before/scan.png")
    copy = read_photo(pairs["scan.png"]).pixels
    assert copy.dtype == np.uint8 and np.array_equal(copy, colours())
    again = dgunet("denoise", "a", "--out", "out", "--compare")
    assert again.out.splitlines()[-1] == "0 restored, 3 done before, in out"
    assert len(Page(Path("out/compare.html")).labels) == 3


def test_figure_of_stages(dgunet):
    save("grey.png", colours(24, 24)[..., 0])
    assert dgunet("denoise", "grey.png", "--out", "out").status == 0
    assert "1 restored" in dgunet("denoise", "grey.png", "--out", "out", "--stages").out
    assert files("out") == ["grey.png", "grey.png.stages.png"]
    assert min(Image.open("out/grey.png.stages.png").size) > 400
    assert "1 done before" in dgunet("denoise", "grey.png", "--out", "out", "--stages").out
    assert "1 restored" in dgunet("denoise", "grey.png", "--out", "out", "--stages", "--overwrite").out
    again = dgunet("denoise", "out", "--out", "again")
    assert "1 restored, in again" in again.out and files("again") == ["grey.png"]
    assert "left out: out/grey.png.stages.png" in again.out


def test_figures_replace_nothing_else(dgunet):
    for name in ("a/x.png", "a/x.png.stages.png", "b/x.png.stages.png"):
        save(name, colours(seed=len(name)))
    before = Path("b/x.png.stages.png").read_bytes()
    done = dgunet("denoise", "a/x.png", "a/x.png.stages.png", "--out", "out", "--stages")
    assert "x.png.stages.png, as a/x.png.stages.png is; choose another --out" in done.err and done.status == 2
    assert files("out") == ["x.png.stages.png", "x.png.stages.png.stages.png"]
    done = dgunet("denoise", "a/x.png", "b/x.png.stages.png", "--out", "b", "--stages", "--overwrite")
    assert done.err.count("b/x.png.stages.png is a photograph to be restored itself") == 2
    done = dgunet("denoise", "a/x.png", "--out", "b", "--stages", "--overwrite")
    assert "b/x.png.stages.png is there already, and not from dgunet" in done.err and done.status == 2
    assert files("b") == ["x.png.stages.png"] and Path("b/x.png.stages.png").read_bytes() == before


@pytest.mark.parametrize("name", ["$\\alpha^$.png", b"caf\xe9.png", "two\nlines.png"])
def test_figure_of_a_image_of_any_name(dgunet, name):
    save(os.fsdecode(name))
    done = dgunet("denoise", os.fsdecode(name), "--out", "out", "--stages")
    assert done.status == 0, done.err
    assert len(files("out")) == 2


def test_interrupted_it_keeps_what_is_done_and_goes_on(dgunet, monkeypatch):
    for name in ("a/1.png", "a/2.png", "a/3.png"):
        save(name, colours(seed=int(name[2])))
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return restore(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(restoring, "restore", interrupted)
        done = dgunet("denoise", "a", "--out", "out")
    assert done.status == 130 and done.err.strip().endswith("interrupted")
    assert done.out.splitlines()[-1] == "stopped: 1 restored, in out; the same command goes on with the others"
    assert files("out") == ["1.png"]
    assert dgunet("denoise", "a", "--out", "out").out.splitlines()[-1] == "2 restored, 1 done before, in out"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_ends_it_in_one_line(dgunet, monkeypatch, number):
    for name in ("a/1.png", "a/2.png"):
        save(name)
    write = Path.write_bytes

    def full(path, data):
        if "2.png" in path.name:
            raise OSError(number, os.strerror(number))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = dgunet("denoise", "a", "--out", "out")
    assert done.status == 2 and files("out") == ["1.png"] and "stopped: 1 restored" in done.out
    assert done.err.splitlines()[-1].startswith(f"error: out/2.png: {os.strerror(number)}; ")


def test_out_of_memory_costs_no_other(dgunet, monkeypatch):
    save("a/1.png", colours(32, 32))
    save("a/2.png")

    def short(model, image, **options):
        if image.shape[0] == 32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return restore(model, image, **options)

    monkeypatch.setattr(restoring, "restore", short)
    done = dgunet("denoise", "a", "--out", "out")
    assert done.status == 2 and files("out") == ["2.png"] and "--tile 512" in done.err


def test_tiles(dgunet, weights, monkeypatch):
    pixels = colours(40, 150)
    save("x.png", pixels)
    assert dgunet("denoise", "x.png", "--out", "tiled", "--tile", "32").status == 0
    expected = restore(load_model(weights), pixels, tile=32)
    assert np.abs(read_photo("tiled/x.png").pixels.astype(int) - expected).max() <= 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    done = dgunet("denoise", "x.png", "--out", "auto")
    assert "in tiles" in done.out and "of 128 pixels" in done.out and "UserWarning" not in done.err
    assert "tiles" not in dgunet("denoise", "x.png", "--out", "whole", "--tile", "whole").out.replace("test_tiles", "")
    for side in ("8", "many", "-1"):
        bad = dgunet("denoise", "x.png", "--out", "o", "--tile", side)
        assert bad.status == 2 and "--tile is whole, auto, or a side" in bad.err


def test_progress_counts_every_stage_and_tile(weights):
    model, image, seen = load_model(weights), np.zeros((40, 150, 3), np.float32), []
    for tile in (None, 32):
        seen.clear()
        with restoring._counting(model, seen.append):
            restore(model, image, tile=tile)
        work = restoring._work(40, 152 if tile is None else 150, tile)  # padded to a multiple of 8
        assert sum(seen) == pytest.approx(model.stages * work, rel=0.1) and len(seen) % model.stages == 0


def test_noise_that_the_network_is_not_for_is_told(dgunet, tiny_model):
    model, rng = tiny_model(stages=2), np.random.default_rng(0)
    content = {"state_dict": model.state_dict(), "model": describe_model(model), "noise_sigma": [25, 25]}
    save_checkpoint(content, "sigma25.pth")
    clean = colours(64, 64)
    for name, sigma in {"clean": 0, "clean too": 0, "fits": 25, "strong": 60}.items():
        save(f"a/{name}.png", (clean + rng.normal(0, sigma, clean.shape)).clip(0, 255).round().astype(np.uint8))
    lines = dgunet("denoise", "a", "--out", "out", "--weights", "sigma25.pth").out.splitlines()
    told = [line for line in lines if "noise than this network is for (sigma 25)" in line]
    assert len(told) == 3
    assert told[0].startswith("note: a/clean too.png: about sigma 0, less noise")
    assert told[1].startswith("note: a/strong.png: about sigma ") and "more noise" in told[1]
    assert told[2].startswith("note: less noise") and told[2].endswith("a/clean too.png, a/clean.png")
    save_checkpoint(content | {"noise_sigma": None}, "any.pth")
    assert "noise than" not in dgunet("denoise", "a", "--out", "any", "--weights", "any.pth").out


def test_mistakes_are_one_line(dgunet):
    save("x.png")
    Path("file").write_text("")
    for words, told in [
        (["x.png", "--out", "file"], "file"),
        (["x.png", "--out", "out", "--weights", "none.pth"], "none.pth"),
        (["x.png", "--out", "out", "--weights", "denoising_gausian"], "denoising_gausian"),
        (["x.png", "--out", "out", "--device", "cuda:9"], "--device"),
        (["nothing.png", "--out", "out"], "nothing.png: there is no such file"),
    ]:
        done = dgunet("denoise", *words)
        assert done.status == 2 and told in done.err and "Traceback" not in done.err
        assert not Path("out").exists() or not files("out")


# ------------------------------------------------------------------------------------------ the rest of the command


def test_default_networks_are_shipped_and_of_the_task():
    shipped = {record.name: record.task for record in pretrained.list_pretrained()}
    assert all(shipped[default] == task for task, default, _ in command.RESTORING.values() if default)
    assert all(shipped[name] == "denoising" for name in automatic.DENOISERS.values())
    assert set(automatic.NETWORKS.values()) - {None} <= shipped.keys()


def test_list(dgunet):
    told = dgunet("list").out
    records = json.loads(dgunet("list", "--json").out)
    assert {"denoising_gaussian", "deraining_mixture"} <= {record["name"] for record in records}
    for record in records:
        assert record["name"] in told and record["trained_for"] in told and record["bytes"] > 2**20
    assert "dgunet derain uses deraining_mixture" in told


def test_modules_of_their_own_are_imported_when_used(dgunet, monkeypatch):
    calls = []
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--port", type=int), run=lambda args: calls.append(args.port)
    )
    monkeypatch.setitem(sys.modules, "dgunet.apps.demo", module)
    assert dgunet("demo", "--port", "7").status == 0 and calls == [7]


def test_real_command_line(run_command, weights, tmp_path):
    """As a process: help without PyTorch, then an image."""
    code = "import sys; from dgunet.command import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    told = run_command(["-c", code]).stdout
    assert "denoise" in told and told.endswith("False\n")
    save(tmp_path / "x.png")
    done = run_command(["-m", "dgunet", "denoise", "x.png", "no.png", "--out", "o", "--weights", weights])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert files(tmp_path / "o") == ["x.png"] and "no.png" in done.stderr
