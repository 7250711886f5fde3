"""Random damage to whatever is read as data: it is told in one line, or did not matter."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pack_dataset
import pytest
import reconstruct
import tifffile
import torch
from PIL import Image

import dgunet.data.packed
from dgunet import UserError, create_model
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data.images import image_size, open_image, read_image
from dgunet.data.pairs import find_pairs
from dgunet.data.photos import read_photo, write_photo
from dgunet.model.sampling import sampling_operator
from dgunet.runtime.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
EXTREMES = (0, 1, 2, 255, 65535, 100_000, 2**31 - 1, 2**31, 2**32 - 1)


def told(call: Callable, *args, **kwargs):
    """What a call returns; None if it raised a UserError of one line. Any other error is a failure."""
    try:
        return call(*args, **kwargs)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three faults: bits, words, runs, cuts, repetitions."""
    broken = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(broken)) if rng.random() < 0.5 else rng.integers(min(len(broken), 128)))
        match rng.integers(6):
            case 0 | 1:
                broken[at] ^= 1 << int(rng.integers(8))
            case 2:
                word = struct.pack(rng.choice(["<I", ">I"]), rng.choice(EXTREMES))
                broken[at : at + 4] = word[: len(broken) - at]
            case 3:
                run = int(rng.integers(1, 40))
                broken[at : at + run] = rng.bytes(len(broken[at : at + run]))
            case 4:
                del broken[max(at, 1) :]
            case 5:
                broken[at:at] = broken[at : at + int(rng.integers(1, 40))]
    return bytes(broken)


# ------------------------------------------------------------------------------------------------------------ images


def smooth_image() -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8), (31, 22), interpolation=cv2.INTER_CUBIC)


def encoded(kind: str, mode: str = "RGB", turn: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    Image.fromarray(smooth_image()).convert(mode).save(file, kind, exif=exif, **options)
    return file.getvalue()


IMAGES = {
    "png": dict(kind="PNG"),
    "png turned": dict(kind="PNG", turn=6),
    "png palette": dict(kind="PNG", mode="P"),
    "png grey": dict(kind="PNG", mode="L"),
    "png grey bits": dict(kind="PNG", mode="1"),
    "png transparent": dict(kind="PNG", mode="RGBA"),
    "jpeg": dict(kind="JPEG", turn=8),
    "jpeg progressive": dict(kind="JPEG", progressive=True),
    "jpeg grey": dict(kind="JPEG", mode="L"),
    "jpeg cmyk": dict(kind="JPEG", mode="CMYK"),
    "bmp": dict(kind="BMP"),
    "bmp palette": dict(kind="BMP", mode="P"),
    "bmp grey": dict(kind="BMP", mode="L"),
    "tiff": dict(kind="TIFF", turn=5),
    "tiff lzw": dict(kind="TIFF", compression="tiff_lzw"),
    "tiff deflate": dict(kind="TIFF", compression="tiff_adobe_deflate", mode="L"),
    "webp": dict(kind="WEBP", turn=3),
    "webp lossless": dict(kind="WEBP", lossless=True),
}


def with_checksums(png: bytes) -> bytes:
    """The same chunks, as far as they can be followed, with the checksums that belong to them."""
    mended, at = bytearray(png), 8
    while at + 12 <= len(mended):
        (length,) = struct.unpack_from(">I", mended, at)
        if at + 12 + length > len(mended):
            break
        struct.pack_into(">I", mended, at + 8 + length, zlib.crc32(mended[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(mended)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", IMAGES)
def test_damaged_images(tmp_path, name, fuzz):
    whole = encoded(**IMAGES[name])
    path = tmp_path / "a.png"
    path.write_bytes(whole)
    expected = told(read_image, path, grey=True)
    assert (expected is None) == (IMAGES[name].get("mode") in ("RGBA", "CMYK"))
    rng = np.random.default_rng(list(name.encode()))
    for _ in range(20 * fuzz):
        content = damage(whole, rng)
        mended = name.startswith("png") and rng.random() < 0.5
        path.write_bytes(with_checksums(content) if mended else content)
        image, size = told(read_image, path, grey=True), told(image_size, path)
        if image is not None:
            assert image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and image.flags.c_contiguous
            assert size in (None, image.shape[:2])  # None: a grey one
            assert image.ndim == 2 or size is not None
            if name.startswith("png") and not mended:  # the others have no checksums
                assert np.array_equal(image, expected)


def deep_tiff(**options) -> bytes:
    file = io.BytesIO()
    planes = smooth_image().astype(np.uint16) * 257
    if options.get("planarconfig") == "separate":
        planes = np.ascontiguousarray(planes.transpose(2, 0, 1))
    tifffile.imwrite(file, planes, photometric="rgb", **options)
    return file.getvalue()


PHOTOGRAPHS = {
    "deep tiff": lambda: deep_tiff(rowsperstrip=5),
    "deep tiff tiles": lambda: deep_tiff(tile=(16, 16), compression="zlib", predictor=True),
    "deep tiff planes": lambda: deep_tiff(planarconfig="separate", byteorder=">"),
    "tiff cmyk": lambda: encoded("TIFF", mode="CMYK"),
    "jpeg": lambda: encoded("JPEG", turn=6),
    "png": lambda: encoded("PNG", turn=6),
    "avif": lambda: encoded("AVIF", turn=6),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_damaged_photographs(tmp_path, name, fuzz):
    whole, path = PHOTOGRAPHS[name](), tmp_path / "a"
    path.write_bytes(whole)
    assert told(read_photo, path) is not None
    rng = np.random.default_rng(list(name.encode()))
    for _ in range(20 * fuzz):
        content = damage(whole, rng)
        path.write_bytes(with_checksums(content) if name == "png" else content)
        image = told(read_photo, path)
        if image is not None:
            assert image.pixels.dtype in (np.uint8, np.uint16) and image.pixels.shape[2:] in ((), (3,))
            assert image.alpha is None or image.alpha.shape == image.pixels.shape[:2]
            told(write_photo, tmp_path / "again.png", image, "")


# -------------------------------------------------------------------------------------------------------- packed files


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "all.h5"
    images = {f"{side}/{k}.png": smooth_image()[: 20 + k] for side in ("input", "target") for k in range(3)}
    with pack_dataset.h5py.File(path, "w") as file:
        pack_dataset.pack(file, images, lambda image: image)
    return path


def crops(path: Path) -> list[np.ndarray]:
    return [open_image(source)[:16, 4:20] for pair in find_pairs(path) for source in (pair.input, pair.target)]


def test_damaged_packed_files(tmp_path, packed, fuzz):
    whole, path = packed.read_bytes(), tmp_path / "a.h5"
    rng = np.random.default_rng(1)
    for _ in range(60 * fuzz):
        path.write_bytes(damage(whole, rng))
        for image in told(crops, path) or []:
            assert image.dtype == np.uint8 and image.shape == (16, 16, 3)
        dgunet.data.packed._close_packed_files()


# -------------------------------------------------------------------------------------------------------- measurements


def measurements(**changed) -> dict[str, np.ndarray]:
    y = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    arrays = dict(y=y, matrix=np.ones((5, 64), np.float32), height=np.array(12), width=np.array(20))
    return {name: array for name, array in (arrays | changed).items() if array is not None}


def read(path: Path, arrays: dict | None = None):
    if arrays is not None:
        np.savez(path, **arrays)
    return reconstruct.read_measurements(path, rows=5, block=8)


def test_damaged_measurements(tmp_path, fuzz):
    path = tmp_path / "a.npz"
    expected = read(path, measurements())
    assert np.array_equal(expected[0], measurements()["y"]) and expected[2:] == (12, 20)
    whole, rng = path.read_bytes(), np.random.default_rng(2)
    for _ in range(60 * fuzz):
        path.write_bytes(damage(whole, rng))
        found = told(read, path)
        if found is not None:  # checksums tell damage, but for a name, which makes an array unknown
            assert np.array_equal(found[0], expected[0]) and found[2:] in ((12, 20), (16, 24))


KINDS = ("f4", "f8", "f2", "i8", "u1", "?", "c8", "U3", "S5", "M8[s]", "V4", "O", [("a", "f4"), ("b", "i4")])


def test_foreign_arrays_for_measurements(tmp_path, fuzz):
    rng = np.random.default_rng(3)
    for _ in range(30 * fuzz):
        name = rng.choice(["y", "matrix", "height", "width"])
        shape = rng.choice([1, 2, 3, 5, 8, 64], size=rng.integers(5))
        kind = np.dtype(KINDS[rng.integers(len(KINDS))])
        values = np.zeros(shape, kind)
        if kind.kind in "fiu":
            values = (rng.choice([0, 1, 7, 12, 1e4, -5, np.nan, np.inf]) * np.ones(shape)).astype("f8")
            with np.errstate(all="ignore"):
                values = values.astype(kind)
        found = told(read, tmp_path / "a.npz", measurements(**{name: values}))
        if found is not None:
            y, matrix, height, width = found
            assert y.dtype == matrix.dtype == np.float32 and y.shape[0] == 5 and y.ndim == 3
            assert np.isfinite(y).all() and np.isfinite(matrix).all()
            assert y.shape[1] * 8 - 8 < height <= y.shape[1] * 8 and y.shape[2] * 8 - 8 < width <= y.shape[2] * 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(height=np.array(-5)), "height of 2 blocks is a whole number from 9 to 16, got -5"),
        (dict(height=np.array(8)), "got 8"),
        (dict(width=np.array(25)), "width of 3 blocks is a whole number from 17 to 24, got 25"),
        (dict(width=np.array(20.5)), "got 20.5"),
        (dict(width=np.array([20, 20])), "got an array (2,)"),
        (dict(width=None), "one of height and width"),
        (dict(y=None), "no array y"),
        (dict(y=np.full((5, 2, 3), np.nan)), "y has values that are not finite"),
        (dict(y=np.full((5, 2, 3), 1e300)), "y has values that are not finite"),
        (dict(y=np.zeros((4, 2, 3))), "the network reads (5, rows, columns)"),
        (dict(y=np.zeros((5, 0, 3))), "the network reads (5, rows, columns)"),
        (dict(y=np.zeros((5, 2, 3), complex)), "y should hold numbers, got complex128"),
        (dict(matrix=np.full((5, 64), np.inf)), "matrix has values that are not finite"),
        (dict(y=np.array([{}])), "is not an .npz file of arrays"),
        (dict(y=np.zeros((5, 200, 300))), "too many to read"),
    ],
)
def test_unsuitable_measurements(tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr(reconstruct, "MAX_BYTES", 2**20)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.npz", measurements(**changed))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_measurements_that_the_network_makes_no_numbers_of(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = create_model("compressive_sensing_dgunet", width=8, growth=4, final_growth=4, stages=2)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "model.pth")
    np.savez(tmp_path / "a.npz", y=np.full((256, 1, 1), 3e38, np.float32))
    words = ["a.npz", "--weights", "model.pth", "--out", "a.png", "--ignore_matrix", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words])
    with pytest.raises(SystemExit) as end:
        run_cli(reconstruct.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "the network gave NaN or infinite values" in said and said.count("\n") == 1
    assert "a.npz" in said and not Path("a.png").exists()


def test_measurements_of_whole_blocks_need_no_size(tmp_path):
    assert read(tmp_path / "a.npz", measurements(height=None, width=None))[2:] == (16, 24)
    assert read(tmp_path / "a.npz", measurements(height=np.array([12.0])))[2:] == (12, 20)


@pytest.mark.parametrize("kind", ["text", "empty", "npz", "objects", "bool", "nan", "cut", "claims", "vector"])
def test_unsuitable_sampling_matrix(tmp_path, kind):
    path = tmp_path / "matrix.npy"
    values = {"bool": np.ones((5, 1024), bool), "nan": np.full((5, 1024), np.nan), "vector": np.zeros(1024)}
    np.save(path, np.array([{}]) if kind == "objects" else values.get(kind, np.ones((5, 1024))))
    if kind == "text":
        path.write_text("no matrix")
    elif kind == "npz":
        np.savez(open(path, "wb"), matrix=np.ones((5, 1024)))
    elif kind in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 1000 * (kind == "cut")])
    elif kind == "claims":  # more than any machine has
        path.write_bytes(path.read_bytes().replace(b"(5, 1024)", b"(5000000000000, 1024)")[:20000])
    with pytest.raises(UserError, match="MODEL.MATRIX_START") as error:
        sampling_operator(0.25, "fixed", str(path))
    assert "\n" not in str(error.value)
