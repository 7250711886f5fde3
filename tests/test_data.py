"""Images on disk: what is read, what is refused, and which crops training sees."""

import collections
import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pack_dataset
import pytest
import torch
from PIL import Image, features
from processes import run_forked

import dgunet.data.pairs
from dgunet import UserError
from dgunet.data.datasets import (
    CenterCropDataset,
    LumaPatches,
    MixupPatches,
    PairedPatches,
    SaturationPatches,
    SyntheticPatches,
)
from dgunet.data.images import image_size, read_image, read_luma, write_image
from dgunet.data.loader import ResumableBatchSampler
from dgunet.data.packed import Packed
from dgunet.data.pairs import changed_items, exclude, find_images, find_pairs, fingerprint, hold_out, list_images
from dgunet.data.synthesis import find_degradation
from dgunet.data.transforms import dihedral, pad_to, undo_dihedral, unit_range
from dgunet.evaluation.scoresheet import ScoreSheet
from dgunet.model.sampling import sampling_operator
from dgunet.runtime.distributed import lock_dir
from dgunet.runtime.errors import describe_error


def random_image(height=40, width=48, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def smooth_image(height=40, width=64) -> np.ndarray:
    """Dark left, bright right; red grows downwards: every turn of it looks different."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 0 * x], axis=-1).astype(np.uint8)


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_written_image_comes_back(tmp_path, ending):
    path = tmp_path / "new folder" / f"a{ending}"
    write_image(path, random_image())
    assert np.array_equal(read_image(path), random_image())
    assert np.array_equal(np.asarray(Image.open(path)), random_image())  # RGB to others, too
    assert image_size(path) == (40, 48)


def test_palette_image_is_read_as_rgb(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255, 0, 10
    Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), image)


def test_path_that_is_not_ascii(tmp_path):
    write_image(tmp_path / "Bühne 1 雨.png", random_image())
    assert np.array_equal(read_image(tmp_path / "Bühne 1 雨.png"), random_image())


def save_unsuitable(path: Path, kind: str):
    image = Image.fromarray(random_image())
    if kind == "16 bits":
        cv2.imwrite(str(path), random_image().astype(np.uint16) * 257)
    elif kind == "32 bits":
        cv2.imwrite(str(path), random_image().astype(np.float32))
    else:
        image.convert(kind).save(path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.png", "L", "grey"),
        ("a.jpg", "L", "grey"),
        ("a.png", "1", "grey"),
        ("a.png", "RGBA", "transparency"),
        ("a.png", "LA", "transparency"),
        ("a.png", "16 bits", "16 bits"),
        ("a.tif", "32 bits", "floating-point"),
        ("a.jpg", "CMYK", "CMYK"),
    ],
)
def test_image_of_another_kind(tmp_path, name, kind, message):
    save_unsuitable(tmp_path / name, kind)
    found = refusal(read_image, tmp_path / name)
    assert str(tmp_path / name) in found and message in found


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5])
def test_damaged_image(tmp_path, ending, share):
    path = tmp_path / f"a{ending}"
    write_image(path, random_image())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found = refusal(read_image, path)
    assert str(path) in found and ("damaged" if share else "empty") in found


def test_text_named_like_a_image(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for call in (read_image, image_size):
        assert str(tmp_path / "a.png") in refusal(call, tmp_path / "a.png")


def test_missing_image(tmp_path):
    assert refusal(read_image, tmp_path / "a.png") == f"cannot read {tmp_path / 'a.png'}: No such file or directory"
    assert str(tmp_path / "a.png") in refusal(image_size, tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["JPEG", "MPO", "PNG", "PNG, exif at the end", "PNG palette", "WEBP", "TIFF", "TIFF LZW"]
)
def test_photograph_is_turned_upright(tmp_path, kind, orientation):
    upright = smooth_image()
    # as a camera held otherwise stores it: the inverse of what the tag asks for
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of PIL's transpositions
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": dict(quality=95), "WEBP": dict(lossless=True), "TIFF LZW": dict(compression="tiff_lzw")}
    if kind == "PNG palette":
        stored = stored.convert("P")
    if kind == "MPO":  # of a camera that adds a preview
        options["MPO"] = dict(quality=95, save_all=True, append_images=[stored.resize((8, 8))])
    path = tmp_path / "a.png"
    stored.save(path, kind.split()[0].strip(","), exif=exif, **options.get(kind, {}))
    if kind == "PNG, exif at the end":
        content = path.read_bytes()
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    image = read_image(path)
    assert image_size(path) == image.shape[:2] == (40, 64)
    assert np.abs(image.astype(int) - upright).mean() < (12 if kind == "PNG palette" else 3)
    assert np.array_equal(read_luma(path), cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[:, :, 0])


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.ppm", "PPM"), ("a.tga", "TGA"), ("a.jp2", "JPEG2000"), ("a.gif", "GIF"), ("a.avif", "AVIF"), ("a.jpe", "JPEG"),
     ("a.jfif", "JPEG"), ("a.dib", "BMP"), ("png.jpg", "PNG"), ("jpeg.png", "JPEG"), ("ppm.png", "PPM"),
     ("tiff.bmp", "TIFF"), ("avif.jpg", "AVIF"), ("png.dng", "PNG")],
)  # fmt: skip
def test_image_is_what_its_bytes_say_in_every_format_that_can_be_read(tmp_path, name, kind):
    """Of a folder for training, too, whatever the suffix."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
        Image.fromarray(smooth_image()).save(tmp_path / side / name, kind)
    (pair,) = find_pairs(tmp_path)
    image = read_image(pair.input)
    assert image.dtype == np.uint8 and image_size(pair.input) == image.shape[:2] == (40, 64)
    worst = np.abs(image.astype(int) - smooth_image()).max()
    assert worst <= {"JPEG": 12, "GIF": 20, "AVIF": 12}.get(kind, 0)


def test_turned_avif_is_read_upright(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(smooth_image())).save(tmp_path / "a.avif", exif=exif)
    assert image_size(tmp_path / "a.avif") == (40, 64)
    assert np.abs(read_image(tmp_path / "a.avif").astype(int) - smooth_image()).mean() < 3


def save_other(path: Path, kind: str):
    """What is an image by its name or bytes, and cannot be trained on as it is."""
    image, deep = Image.fromarray(smooth_image()), smooth_image().astype(np.uint16) * 4
    if kind == "deep":
        if not (cv2.haveImageWriter(path.name) and (path.suffix != ".avif" or features.check("avif"))):
            pytest.skip("nothing here writes it")
        options = [cv2.IMWRITE_AVIF_DEPTH, 10] if path.suffix == ".avif" else []
        path.write_bytes(cv2.imencode(path.suffix, deep, options)[1].tobytes())
    elif kind == "animated":
        image.save(path, save_all=True, append_images=[Image.fromarray(255 - smooth_image())])
    elif kind in ("RGBA", "L", "LA"):
        image.convert(kind).save(path)
    elif isinstance(kind, dict):
        image.save(path, "TIFF", tiffinfo=kind)
    else:
        path.write_bytes(kind)


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [("a.heic", HEIC, "HEIC"), ("a.jpg", HEIC, "HEIC"), ("a.png", b"<!DOCTYPE html><html>", "web page"),
     ("a.jxl", b"\xff\x0a" + bytes(99), "JPEG XL"), ("a.cr3", b"\0\0\0\x18ftypcrx " + bytes(99), "raw"),
     ("a.jpg", b"FUJIFILMCCD-RAW " + bytes(99), "raw"), ("a.nef", {}, "raw"), ("a.tif", {50706: b"\1\4\0\0"}, "raw"),
     ("a.tif", {254: 1}, "raw"), ("a.ppm", "deep", "bits"), ("a.jp2", "deep", "bits"), ("a.avif", "deep", "10 bits"),
     ("a.gif", "animated", "2"), ("a.tga", "RGBA", "transparency"), ("a.pgm", "L", "grey"),
     ("a.ppm", b"P6\n9 9\n255\n", "")],
)  # fmt: skip
def test_image_that_cannot_be_used_is_refused_by_name(tmp_path, name, kind, word):
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
        save_other(tmp_path / side / name, kind)
    told = refusal(find_pairs, tmp_path)
    assert str(tmp_path / "input" / name) in told and word in told
    assert told == refusal(read_image, tmp_path / "input" / name)
    if word == "grey":
        assert read_luma(tmp_path / "input" / name).shape == (40, 64)


def test_grey_with_transparency_is_no_luminance(tmp_path):
    for name in ("a.tif", "a.png"):
        save_other(tmp_path / name, "LA")
        assert "transparency" in refusal(read_luma, tmp_path / name)


@pytest.fixture
def impatient():
    """Ends a test that waits."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for ever"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_pipe_named_like_a_image(tmp_path, impatient):
    """Opening one would wait until someone writes to it."""
    write_image(tmp_path / "folder" / "b.png", random_image())
    os.mkfifo(tmp_path / "a.png")
    os.symlink(tmp_path / "a.png", tmp_path / "folder" / "a.png")
    for call in (read_image, image_size, read_luma):
        assert (
            refusal(call, tmp_path / "a.png") == f"{tmp_path / 'a.png'} is a pipe or device, not a file; move it away"
        )
        assert "pipe or device" in refusal(call, "/dev/zero")
        assert "is a folder, not a file" in refusal(call, tmp_path / "folder")
    assert "MODEL.MATRIX_START" in refusal(sampling_operator, 0.25, "fixed", str(tmp_path / "a.png"))


@pytest.mark.parametrize("change", [-1, 1])
def test_image_of_another_size_than_its_header_says(tmp_path, monkeypatch, change):
    """Training has planned its crops by the header."""
    path = tmp_path / "a.png"
    write_image(path, random_image(8, 8))
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: cv2.resize(decode(*args), (8, 8 + change)))
    assert "damaged" in refusal(read_image, path)


@pytest.mark.parametrize(
    ("ending", "side"),
    [(".png", 30_000), (".bmp", 32_769)]
    + [(e, s) for e in (".png", ".bmp", ".tif", ".jpg") for s in (100_000, 2**31 - 1)],
)
def test_absurd_size_in_the_header(tmp_path, capfd, ending, side):
    path = tmp_path / f"a{ending}"
    write_image(path, random_image(8, 8))
    content = bytearray(path.read_bytes())
    if ending == ".png":
        struct.pack_into(">II", content, 16, side, side)
        struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    elif ending == ".bmp":
        struct.pack_into("<II", content, 18, side, side)
    elif ending == ".tif":
        for tag in (b"\x00\x01", b"\x01\x01"):
            at = content.index(tag + b"\x03\x00\x01\x00\x00\x00", 8 if content[:2] == b"II" else 0)
            struct.pack_into("<HIi", content, at + 2, 4, 1, side)
    else:
        at = content.index(b"\xff\xc0")
        struct.pack_into(">HH", content, at + 5, min(side, 65500), min(side, 65500))
    path.write_bytes(content)
    for call in (read_image, read_luma):
        assert refusal(call, path).startswith(str(path))
        if ending == ".bmp":
            assert "more than can be read" in refusal(call, path)
    try:
        image_size(path)  # knows the header alone
    except UserError as error:
        assert "\n" not in str(error)
    decoders = ("Corrupt JPEG data: premature end of data segment", "libpng error: Not enough image data")
    assert set(capfd.readouterr().err.splitlines()) <= set(decoders)


# ------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def disk_of(size: int):
    """No file can be written beyond ``size`` bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("size", [0, 3000])
def test_full_disk_leaves_no_half_image(tmp_path, ending, size):
    path = tmp_path / f"a{ending}"
    with disk_of(size), pytest.raises(OSError) as error:
        write_image(path, random_image())
    assert error.value.filename == str(path) and describe_error(error.value).startswith(f"{path}: ")
    assert not list(tmp_path.iterdir())
    write_image(path, random_image(seed=1))
    with disk_of(size), pytest.raises(OSError):
        write_image(path, random_image())
    assert np.array_equal(read_image(path), random_image(seed=1)) and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        write_image(tmp_path / "file" / "a.png", random_image())
    assert describe_error(error.value).startswith(f"{tmp_path / 'file'}")
    assert "give it an ending" in refusal(write_image, tmp_path / "a", random_image())
    assert "17000x1 pixels cannot be written" in refusal(write_image, tmp_path / "a.webp", random_image(1, 17000))


def test_names_that_are_not_utf8(tmp_path, image_pairs, monkeypatch):
    image_pairs(tmp_path / "pairs", count=2, size=(40, 40))
    name = os.fsdecode(b"img\xff")
    try:
        for side in ("input", "target"):
            (tmp_path / f"pairs/{side}/img2.png").rename(tmp_path / f"pairs/{side}/{name}.png")
    except OSError:
        pytest.skip("this disk takes UTF-8 only")
    pairs = find_pairs(tmp_path / "pairs")
    assert pairs[1].name == name
    samples = [PairedPatches(pairs, 16)[1, 1]]
    monkeypatch.setattr(sys, "argv", ["pack_dataset.py", str(tmp_path / "pairs")])
    pack_dataset.main()
    packed = find_pairs(tmp_path / "pairs.h5")
    assert [pair.name for pair in packed] == [pair.name for pair in pairs]
    samples.append(PairedPatches(packed, 16)[1, 1])
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
    assert not changed_items(packed, fingerprint(pairs))

    sheet = ScoreSheet(tmp_path / "scores", "train_rgb", {}, {name: "its fingerprint"})
    image = read_image(pairs[1].input)
    sheet.add(name, image, image // 2, image)
    assert sheet.finish("set").images == 1
    assert ScoreSheet(tmp_path / "scores", "train_rgb", {}, {name: "its fingerprint"}).done(name)


@pytest.mark.parametrize("kind", ["plain", "interlaced", "transparent colour", "palette"])
def test_every_kind_of_rgb_png(tmp_path, kind):
    path, pixels = tmp_path / "a.png", smooth_image(50, 70)
    image = Image.fromarray(pixels)
    if kind == "palette":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    if kind == "transparent colour":
        image.save(path, transparency=(1, 2, 3), icc_profile=np.random.default_rng(0).bytes(100_000))
    else:
        image.save(path)
    if kind == "interlaced":
        path.write_bytes(interlaced_png(pixels))
    if kind == "transparent colour":
        assert "transparency" in refusal(read_image, path)
        return
    assert np.array_equal(read_image(path), np.asarray(image.convert("RGB")))


def interlaced_png(image: np.ndarray) -> bytes:
    """Adam7, which no encoder at hand writes: seven passes of unfiltered rows."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(
        b"\0" + row.tobytes() for top, left, down, right in passes for row in image[top::down, left::right] if row.size
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 1)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


# ------------------------------------------------------------------------------------------------------------- pairing


def test_pairs_are_naturally_sorted(tmp_path, image_pairs):
    pairs = find_pairs(image_pairs(tmp_path, count=11))
    assert [pair.name for pair in pairs] == [f"img{k}" for k in range(1, 12)]
    assert all((p.input.parent.name, p.target.parent.name) == ("input", "target") for p in pairs)
    assert all(p.input.name == p.target.name for p in pairs)


def test_partners_may_differ_in_format_and_other_files_are_ignored(tmp_path, image_pairs):
    image_pairs(tmp_path, count=2)
    (tmp_path / "target" / "img1.png").rename(tmp_path / "target" / "img1.PNG")
    write_image(tmp_path / "target" / "img2.bmp", random_image())
    (tmp_path / "target" / "img2.png").unlink()
    (tmp_path / "input" / "notes.txt").write_text("no image")
    (tmp_path / "input" / ".hidden.png").write_text("no image")
    assert [p.target.name for p in find_pairs(tmp_path)] == ["img1.PNG", "img2.bmp"]


def test_what_is_no_image_is_told_once(tmp_path, image_pairs, capsys):
    image_pairs(tmp_path, count=2)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.png", ".lock"):
        (tmp_path / "input" / name).write_text("")
    find_pairs(tmp_path)
    assert capsys.readouterr() == ("", "")
    for name in ("notes.txt", "a.psd", "no suffix", "line\nbreak"):
        (tmp_path / "target" / name).write_text("")
    (tmp_path / "target" / "more").mkdir()
    for _ in range(2):
        assert len(find_pairs(tmp_path)) == 2
    out, told = capsys.readouterr()
    assert not out and told.count("\n") == 1 and str(tmp_path / "target") in told
    assert all(name in told for name in ("notes.txt", "a.psd", "no suffix", "more/"))


def in_form(form: str, name: str = "caf\u00e9 \u1e69") -> str:
    return unicodedata.normalize(form, name)


@pytest.fixture
def forms(tmp_path, image_pairs) -> Path:
    """Two pairs, the first of whose names have other Unicode forms in ``input`` and ``target``."""
    image_pairs(tmp_path / "pairs", count=2)
    for side, form in (("input", "NFD"), ("target", "NFC")):
        (tmp_path / f"pairs/{side}/img1.png").rename(tmp_path / f"pairs/{side}/{in_form(form)}.png")
    if in_form("NFD") + ".png" not in os.listdir(tmp_path / "pairs/input"):
        pytest.skip("this disk has one Unicode form only")
    return tmp_path / "pairs"


def test_names_that_differ_in_unicode_form_alone_are_one(forms, monkeypatch):
    pairs = find_pairs(forms)
    assert [pair.name for pair in pairs] == [in_form("NFC"), "img2"]
    for form in ("NFC", "NFD"):
        (forms / "names.txt").write_text(in_form(form) + ".jpg\n", "utf-8")
        assert [pair.name for pair in exclude(pairs, forms / "names.txt")] == ["img2"]
        assert [path.name for path in exclude(find_images(forms / "input"), forms / "names.txt")] == ["img2.png"]
    # packed files have the names in one form; older ones, which have them as they were, are read as well
    monkeypatch.setattr(sys, "argv", ["pack_dataset.py", str(forms)])
    pack_dataset.main()
    packed = forms.with_suffix(".h5")
    with h5py.File(packed, "r+") as file:
        assert in_form("NFC") in file["input"]
        file.move(f"input/{in_form('NFC')}", f"input/{in_form('NFD')}")
    dgunet.data.packed._close_packed_files()
    assert [pair.name for pair in find_pairs(packed)] == [pair.name for pair in pairs]
    assert all(map(np.array_equal, PairedPatches(packed, 16)[1, 0], PairedPatches(pairs, 16)[1, 0]))
    assert not changed_items(find_pairs(packed), fingerprint(pairs))


def test_run_from_before_names_had_one_form_is_resumed(forms, monkeypatch):
    pairs = find_pairs(forms)
    with monkeypatch.context() as context:  # fingerprints were of names as they were on the disk
        paths = [("input", pair.input) for pair in pairs] + [("target", pair.target) for pair in pairs]
        context.setattr(
            dgunet.data.pairs, "_sources", lambda items: [(f"{side}/{path.stem}", path) for side, path in paths]
        )
        before = fingerprint(pairs)
    assert not torch.equal(before["names"], fingerprint(pairs)["names"])
    assert changed_items(pairs, before) == ""
    assert changed_items(pairs[1:], before) == "2 gone"


def test_two_files_whose_names_differ_in_unicode_form_alone(forms):
    shutil.copy(forms / "input" / f"{in_form('NFD')}.png", forms / "input" / f"{in_form('NFC')}.png")
    for call in (lambda: find_pairs(forms), lambda: find_images(forms / "input")):
        told = refusal(call)
        assert "caf\\xe9 \\u1e69.png" in told and "cafe\\u0301 s\\u0323\\u0307.png" in told


@pytest.mark.parametrize(("side", "other"), [("input", "target"), ("target", "input")])
def test_missing_partner(tmp_path, image_pairs, side, other):
    image_pairs(tmp_path, count=4)
    (tmp_path / other / "img2.png").unlink()
    message = refusal(find_pairs, tmp_path)
    assert message.startswith(f"{tmp_path / side / 'img2.png'} has no partner of the same name in {tmp_path / other}")
    assert "more" not in message
    (tmp_path / other / "img3.png").unlink()
    assert "(and 1 more like it)" in refusal(find_pairs, tmp_path)


def test_partner_of_another_size(tmp_path, image_pairs):
    image_pairs(tmp_path, count=3, size=(40, 48))
    write_image(tmp_path / "target" / "img2.png", random_image(48, 40))
    message = refusal(find_pairs, tmp_path)
    assert f"{tmp_path / 'input' / 'img2.png'} is 48x40 but {tmp_path / 'target' / 'img2.png'} is 40x48" in message
    assert len(find_pairs(tmp_path, check_sizes=False)) == 3


def test_unreadable_partner(tmp_path, image_pairs):
    image_pairs(tmp_path, count=3)
    (tmp_path / "target" / "img3.png").write_bytes(b"")
    assert str(tmp_path / "target" / "img3.png") in refusal(find_pairs, tmp_path)


def test_empty_and_missing_folders(tmp_path, image_pairs):
    assert f"no folder {tmp_path / 'input'}" in refusal(find_pairs, tmp_path)
    (tmp_path / "input").mkdir()
    assert f"no images in {tmp_path / 'input'}" in refusal(find_pairs, tmp_path)
    write_image(tmp_path / "input" / "a.png", random_image())
    assert f"no folder {tmp_path / 'target'}" in refusal(find_pairs, tmp_path)
    assert f"no folder {tmp_path / 'none'}" in refusal(list_images, tmp_path / "none")


def test_two_images_of_one_name(tmp_path, image_pairs):
    image_pairs(tmp_path, count=2)
    write_image(tmp_path / "input" / "img1.bmp", random_image())
    message = refusal(find_pairs, tmp_path)
    assert "img1.bmp" in message
    assert "img1.png" in message
    assert "have the same name" in message


@pytest.mark.parametrize(
    ("items", "count", "held"), [(400, 32, 32), (33, 32, 3), (33, 2, 2), (19, 32, 1), (4, 32, 1), (2, 1, 1)]
)
def test_a_tenth_at_most_is_held_back(items, count, held):
    trained, validated = hold_out(list(range(items)), count, "folder")
    assert validated == list(range(items - held, items)) and trained == list(range(items - held))


@pytest.mark.parametrize(("items", "count"), [(1, 32), (10, 0), (10, -3)])
def test_holding_back_what_cannot_be(items, count):
    assert "TRAINING.VAL_HOLD_BACK" in refusal(hold_out, list(range(items)), count, "folder")


@pytest.mark.parametrize("packed", [False, True])
def test_excluded_images_are_left_out(tmp_path, image_pairs, packed):
    folder = image_pairs(tmp_path / "pairs", count=4)
    listing = tmp_path / "names.txt"
    listing.write_text("img2.jpg\n img4 \nabsent.png\n\nimg\n")
    if packed:
        items = [Packed(tmp_path / "p.h5", f"img{k}.png") for k in range(1, 5)]  # as pack_dataset.py --luma names them
        assert [item.key for item in exclude(items, listing)] == ["img1.png", "img3.png"]
    else:
        assert [pair.name for pair in exclude(find_pairs(folder), listing)] == ["img1", "img3"]
        assert [path.name for path in exclude(find_images(folder / "input"), listing)] == ["img1.png", "img3.png"]


def test_excluding_everything_or_nothing_or_by_no_list(tmp_path):
    listing = tmp_path / "names.txt"
    assert f"cannot read {listing}" in refusal(exclude, [Path("a.png")], listing)
    listing.write_bytes(b"\xff\xfe")
    assert f"cannot read {listing}" in refusal(exclude, [Path("a.png")], listing)
    listing.write_text("a")
    assert "names all of the 1 images" in refusal(exclude, [Path("a.png")], listing)
    listing.write_text("a\n", "utf-8-sig")  # as Windows' Notepad may write it
    parts = [Path(name) for name in ("a.png", "a_3.png", "aa_3.png", "a_b.png")]
    assert [path.name for path in exclude(parts, listing)] == ["aa_3.png", "a_b.png"]
    assert "names none of the 1 images, as bsd_a.png" in refusal(exclude, [Path("bsd_a.png")], listing)


def test_fingerprint_knows_training_data(tmp_path, image_pairs):
    folder = image_pairs(tmp_path / "pairs", count=5)
    before = fingerprint(find_pairs(folder))
    assert not changed_items(find_pairs(folder), before)
    folder = folder.rename(tmp_path / "moved")
    assert not changed_items(find_pairs(folder), before)
    shutil.copy(folder / "input/img1.png", folder / "input/img3.png")
    assert changed_items(find_pairs(folder), before) == "1 of another size (input/img3)"
    for side in ("input", "target"):
        shutil.copy(folder / f"{side}/img1.png", folder / f"{side}/img9.png")
        (folder / f"{side}/img2.png").unlink()
    assert (
        changed_items(find_pairs(folder), before) == "2 new (input/img9, ...), 1 of another size (input/img3), 2 gone"
    )
    images = fingerprint(find_images(folder / "input"))
    assert not changed_items(find_images(folder / "input"), images)
    (folder / "input/img4.png").unlink()
    assert changed_items(find_images(folder / "input"), images) == "1 gone"


# ------------------------------------------------------------------------------------------------------ training crops


@pytest.fixture
def shifted(tmp_path) -> Path:
    """Three pairs whose target is the input plus 16."""
    for k in range(3):
        image = np.random.default_rng(k).integers(0, 200, (40, 56, 3)).astype(np.uint8)
        write_image(tmp_path / "input" / f"{k}.png", image)
        write_image(tmp_path / "target" / f"{k}.png", image + 16)
    return tmp_path


def test_sample_is_a_function_of_seed_epoch_and_index(shifted):
    first, second = (PairedPatches(shifted, 16, seed=5) for _ in range(2))
    second[9, 2], second[1, 1]  # what was drawn before does not matter
    for key in ((1, 0), (1, 2), (7, 1)):
        for a, b in zip(first[key], second[key], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(first[1, 0][0], first[2, 0][0])
    assert not torch.equal(first[1, 0][0], first[1, 1][0])
    assert not torch.equal(first[1, 0][0], PairedPatches(shifted, 16, seed=6)[1, 0][0])


@pytest.mark.parametrize("flip", [True, False])
def test_crops_are_aligned(shifted, flip):
    patches = PairedPatches(shifted, 16, flip=flip)
    for epoch in range(1, 12):
        degraded, target = patches[epoch, epoch % 3]
        assert degraded.shape == target.shape == (3, 16, 16)
        assert degraded.dtype == target.dtype == torch.uint8
        assert torch.equal(target, degraded + 16)


def test_crops_are_taken_from_everywhere(tmp_path):
    # the value of a pixel says where it is
    y, x = np.mgrid[0:20, 0:24]
    image = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)
    for side in ("input", "target"):
        write_image(tmp_path / side / "a.png", image)
    patches = PairedPatches(tmp_path, 16, flip=False)
    corners = {tuple(patches[epoch, 0][0][:2, 0, 0].tolist()) for epoch in range(600)}
    assert corners == {(top, left) for top in range(5) for left in range(9)}


@pytest.mark.parametrize("size", [(10, 12), (5, 40), (40, 5), (1, 1)])
def test_small_images_are_extended(tmp_path, size):
    image = random_image(*size)
    for side in ("input", "target"):
        write_image(tmp_path / side / "a.png", image)
    degraded, target = PairedPatches(tmp_path, 16, flip=False)[1, 0]
    assert degraded.shape == (3, 16, 16)
    assert torch.equal(degraded, target)
    present = {tuple(pixel) for pixel in image.reshape(-1, 3)}
    assert {tuple(pixel) for pixel in degraded.permute(1, 2, 0).reshape(-1, 3).numpy()} <= present


def test_repeat(shifted):
    patches = PairedPatches(shifted, 16, repeat=4)
    assert len(patches) == 12
    once, again = patches[1, 0][0], patches[1, 3][0]  # the same image, another crop
    assert not torch.equal(once, again)
    whole = [PairedPatches(shifted, 64, repeat=4, flip=False)[1, k][0] for k in (0, 3, 1)]
    assert torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], whole[2])


def test_of_nine_augmentations_two_change_nothing(shifted):
    patches = PairedPatches(shifted, 16)
    crop = torch.rand(3, 16, 16)
    turned = [dihedral(crop, k) for k in range(8)]
    counts = collections.Counter()
    for epoch in range(3600):
        found, same = patches.augment(patches.generator(epoch, 0), crop, crop)
        assert torch.equal(found, same)
        counts[next(k for k in range(8) if torch.equal(found, turned[k]))] += 1
    assert counts[0] == pytest.approx(800, abs=100)  # 4 standard deviations
    assert all(counts[k] == pytest.approx(400, abs=76) for k in range(1, 8))


def test_plain_index_is_of_the_first_epoch(shifted):
    """For an ordinary DataLoader."""
    patches = PairedPatches(shifted, 16, repeat=2)
    (degraded, target), *rest = torch.utils.data.DataLoader(patches, batch_size=4)
    assert degraded.shape == target.shape == (4, 3, 16, 16) and len(rest) == 1
    assert all(torch.equal(degraded[k], patches[1, k][0]) for k in range(4))
    assert torch.equal(patches[-1][0], patches[1, 5][0]) and torch.equal(patches[np.int64(2)][0], patches[1, 2][0])
    assert len(list(patches)) == 6
    with pytest.raises(IndexError):
        patches[6]
    patches.epoch = 3
    assert torch.equal(patches[2][0], patches[3, 2][0])
    clean = SyntheticPatches([shifted / "target" / f"{k}.png" for k in range(3)], lambda x, rng: x / 2, 16)
    assert all(torch.equal(a, b) for a, b in zip(clean[1], clean[1, 1], strict=True))


@pytest.mark.parametrize("kind", [MixupPatches, SaturationPatches, LumaPatches])
def test_plain_index_in_every_task(shifted, kind):
    if kind is LumaPatches:
        patches = kind(find_images(shifted / "target"), 32, repeat=2)
    else:
        patches = kind(shifted, 16, **(dict(mixup_from=1) if kind is MixupPatches else {}))
    assert len(list(torch.utils.data.DataLoader(patches))) == len(patches)
    assert all(torch.equal(a, b) for a, b in zip(patches[2], patches[1, 2], strict=True))


def test_streams_are_independent(shifted):
    patches = PairedPatches(shifted, 16)
    values = [patches.generator(*key).random() for key in ((1, 2), (1, 2, 1), (2, 1), (1, 3))]
    assert len(set(values)) == 4
    assert patches.generator(1, 2).random() == values[0]


# ------------------------------------------------------------------------------------------------------------- packing


def pack(*arguments) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "scripts" / "pack_dataset.py"
    return run_forked([sys.executable, script, *arguments])


@pytest.fixture
def packed(shifted) -> Path:
    """The same pairs, of several sizes, in one file."""
    for side in ("input", "target"):
        write_image(shifted / side / "large.png", random_image(300, 250, seed=len(side)))
        write_image(shifted / side / "small.png", random_image(10, 12, seed=len(side)))
        write_image(shifted / side / "small (1).png", random_image(16, 24, seed=len(side)))  # sorts after small
    done = pack(shifted, "--out", shifted / "all.h5")
    assert done.returncode == 0, done.stderr
    return shifted / "all.h5"


def test_packed_samples_are_those_of_the_folder(packed):
    folder, file = (PairedPatches(root, 64, repeat=3) for root in (packed.parent, packed))
    assert len(folder) == len(file) == 18
    for key in [(epoch, index) for epoch in (1, 7) for index in range(18)]:
        for a, b in zip(folder[key], file[key], strict=True):
            assert torch.equal(a, b)
    centres = CenterCropDataset(packed.parent, 32), CenterCropDataset(packed, 32)
    assert centres[0].sizes == centres[1].sizes
    for k in range(6):
        for a, b in zip(centres[0][k], centres[1][k], strict=True):
            assert torch.equal(a, b)


def test_packed_file_in_loading_processes(packed):
    """A file that is already open here is opened anew by each forked worker."""
    patches = PairedPatches(packed, 32)
    keys = [[(1, index)] for index in range(5)]
    here = [patches[key[0]][0] for key in keys]
    loader = torch.utils.data.DataLoader(patches, batch_sampler=keys, num_workers=1)
    assert all(torch.equal(batch[0][0], expected) for batch, expected in zip(loader, here, strict=True))


def test_packed_data_are_those_of_the_folder(packed):
    assert not changed_items(find_pairs(packed), fingerprint(find_pairs(packed.parent)))
    assert not changed_items(find_pairs(packed.parent), fingerprint(find_pairs(packed)))
    assert changed_items(find_pairs(packed)[1:], fingerprint(find_pairs(packed))) == "2 gone"


def test_unsuitable_pairs_in_a_packed_file(packed, tmp_path):
    cases = [
        (lambda file: file["target"].move("small", "other"), "small has no partner of the same name in"),
        (lambda file: file["target"].move("large", "small") if file["target"].pop("small") else 0, "has no partner"),
        (lambda file: [file.pop("target/0"), file.copy("target/large", "target/0")], "a pair must have one size"),
        (lambda file: [file.pop("input/0"), file.create_dataset("input/0", data=np.zeros((40, 56), "u1"))], "damaged"),
        (lambda file: [file.pop("input/0"), file.create_dataset("input/0", data=np.zeros((40, 56, 3)))], "is damaged"),
        (lambda file: [file.pop("input/0"), file.create_group("input/0")], "is damaged; pack the folder again"),
        (lambda file: file.pop("target"), "is damaged; pack the folder again"),
        (lambda file: [file["input"].clear(), file["target"].clear()], "no images in"),
    ]
    for number, (change, message) in enumerate(cases):
        path = Path(shutil.copy(packed, tmp_path / f"{number}.h5"))
        with h5py.File(path, "r+") as file:
            change(file)
        assert message in refusal(find_pairs, path)


def test_packing_refuses(packed, tmp_path):
    again = pack(packed.parent, "--out", packed)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "exists; remove it" in again.stderr
    with lock_dir(packed.parent, "packing"):
        second = pack(packed.parent, "--out", packed.with_name("second.h5"))
    assert second.returncode == 2 and "another packing is writing to" in second.stderr
    (tmp_path / "target" / "small.png").write_bytes(b"no image")
    failed = pack(tmp_path, "--out", tmp_path / "other.h5")
    assert failed.returncode == 2 and str(tmp_path / "target" / "small.png") in failed.stderr
    assert not list(tmp_path.glob("*other.h5*"))  # nothing half-written is left


def test_unsuitable_packed_file(packed, tmp_path):
    (tmp_path / "text.h5").write_text("no data set")
    assert refusal(find_pairs, tmp_path / "text.h5").startswith(f"{tmp_path / 'text.h5'} is not a packed data set")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["input"] = 1
    assert "was not written by scripts/pack_dataset.py" in refusal(find_pairs, tmp_path / "foreign.h5")
    assert "holds image pairs" in refusal(find_images, packed)


def test_packed_luminance(tmp_path):
    write_image(tmp_path / "photos" / "a.png", random_image(80, 100))
    write_image(tmp_path / "photos" / "b.jpg", smooth_image(64, 64)[:, :, 0])
    done = pack(tmp_path / "photos", "--luma")
    assert done.returncode == 0, done.stderr
    folder, file = (find_images(root) for root in (tmp_path / "photos", tmp_path / "photos.h5"))
    for k in range(2):
        assert torch.equal(LumaPatches(folder, 32, 1)[3, k][0], LumaPatches(file, 32, 1)[3, k][0])
        assert torch.equal(
            *(CenterCropDataset(items, 64, luma=True, multiple=32, area=256)[k][0] for items in (folder, file))
        )
    assert "holds single images" in refusal(find_pairs, tmp_path / "photos.h5")


# -------------------------------------------------------------------------------------------------- flips and padding


def test_dihedral_has_eight_elements_and_inverses():
    x = torch.rand(2, 3, 5, 5)
    turned = [dihedral(x, k) for k in range(8)]
    assert sum(torch.equal(a, b) for a in turned for b in turned) == 8
    for k in range(8):
        rectangle = torch.rand(2, 3, 4, 7)
        assert torch.equal(undo_dihedral(dihedral(rectangle, k), k), rectangle)


def test_pad_to_reflects_and_replicates():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert pad_to(x, 2, 5)[0, 0].tolist() == [[0, 1, 2, 1, 0], [3, 4, 5, 4, 3]]
    assert pad_to(x, 2, 6)[0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2]  # too narrow to reflect
    assert pad_to(x, 3, 3)[0, 0, :, 0].tolist() == [0, 3, 0]
    assert pad_to(x, 4, 3)[0, 0, :, 0].tolist() == [0, 3, 3, 3]
    assert pad_to(x, 1, 1) is x
    assert torch.equal(pad_to(x.byte(), 4, 6), pad_to(x, 4, 6).byte())


def test_unit_range():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(unit_range(x), torch.arange(256.0) / 255)
    assert unit_range(unit_range(x)).max() == 1
    floats = torch.rand(3)
    assert unit_range(floats) is floats


# ---------------------------------------------------------------------------------------------------- validation crops


def test_centres(tmp_path):
    for name, size in (("a", (41, 50)), ("b", (20, 64)), ("c", (13, 9))):
        for side in ("input", "target"):
            write_image(tmp_path / side / f"{name}.png", random_image(*size, seed=len(side)))
    centres = CenterCropDataset(tmp_path, 32)
    assert centres.sizes == {(32, 32), (16, 32), (8, 8)}
    assert len(centres) == 3
    for k, side in enumerate(("input", "target")):
        expected = read_image(tmp_path / side / "a.png")[4:36, 9:41]
        assert np.array_equal(centres[0][k].permute(1, 2, 0).numpy(), expected)
    whole = CenterCropDataset(tmp_path, 0)
    assert whole.sizes == {(40, 48), (16, 64), (8, 8)}
    assert {tuple(whole[k][0].shape) for k in range(3)} == {(3, 40, 48), (3, 16, 64), (3, 8, 8)}


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp"])
def test_sizes_for_validation_come_from_headers(tmp_path, monkeypatch, ending):
    """Also of grey images: no image is decoded before it is needed."""
    write_image(tmp_path / f"colour{ending}", random_image(70, 100))
    write_image(tmp_path / f"grey{ending}", random_image(64, 99)[:, :, 0])
    monkeypatch.setattr(dgunet.data.images, "_decode", None)
    assert CenterCropDataset(list_images(tmp_path), 32, luma=True, multiple=32, area=256).sizes == {(6, 32, 32)}


@pytest.mark.parametrize("patch", [0, 32])
def test_image_too_small_for_validation(tmp_path, image_pairs, patch):
    image_pairs(tmp_path, count=1, size=(7, 40))
    assert str(tmp_path / "input" / "img1.png") in refusal(CenterCropDataset, tmp_path, patch)


# ------------------------------------------------------------------------------------------------------------- batches


def batches(size, batch, epoch=1, start=0, seed=3, rank=0, world=1) -> list[list[tuple[int, int]]]:
    sampler = ResumableBatchSampler(size, batch, seed, rank, world)
    sampler.epoch, sampler.start = epoch, start
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_epoch_is_a_permutation():
    found = [key for batch in batches(20, 4) for key in batch]
    assert [epoch for epoch, _ in found] == [1] * 20
    assert sorted(index for _, index in found) == list(range(20))
    assert [index for _, index in found] != list(range(20))


def test_order_depends_on_seed_and_epoch_alone():
    indices = [[k for b in batches(20, 4, **o) for _, k in b] for o in ({}, {}, {"epoch": 2}, {"seed": 4})]
    assert indices[0] == indices[1]
    assert indices[0] != indices[2]
    assert indices[0] != indices[3]


@pytest.mark.parametrize(("size", "batch", "steps"), [(23, 4, 6), (21, 4, 6), (20, 4, 5), (5, 32, 1)])
def test_incomplete_batch_is_filled_with_other_crops(size, batch, steps):
    found = batches(size, batch)
    assert len(found) == steps
    assert {len(keys) for keys in found} == {batch}
    indices = [index for keys in found for _, index in keys]
    assert len(set(indices)) == len(indices)  # none is the very same crop
    assert sorted(indices[:size]) == list(range(size))
    assert [index % size for index in indices[size:]] == [indices[k % size] for k in range(len(indices) - size)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(world):
    shares = [batches(24, 8, rank=rank, world=world) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == batches(24, 8)


def test_start_skips_what_is_done():
    assert batches(24, 4, start=2) == batches(24, 4)[2:]
    assert batches(24, 4, start=6) == []


def test_few_images_fill_one_batch(shifted):
    found = batches(3, 8)
    assert len(found) == 1
    assert len({index for _, index in found[0]}) == 8  # eight different crops
    patches = PairedPatches(shifted, 16)
    crops = [patches[key][0] for key in found[0]]
    assert not any(torch.equal(a, b) for k, a in enumerate(crops) for b in crops[:k])
    assert collections.Counter(index % 3 for _, index in found[0]).most_common()[-1][1] >= 2


def test_clean_images_are_degraded_on_the_way(tmp_path, image_pairs):
    """The same sample for the same key, another degradation in another epoch, aligned with its target."""
    images = list_images(image_pairs(tmp_path, size=(80, 90)) / "target")
    degrade = find_degradation("added_rain", {"brightness": [0.3, 0.8]})
    sets = [SyntheticPatches(images, degrade, 32, seed=5) for _ in range(2)]
    (rainy, clean), (again, _), (other, _) = sets[0][1, 2], sets[1][1, 2], sets[0][2, 2]
    assert rainy.shape == clean.shape == (3, 32, 32) and clean.dtype == torch.uint8
    assert torch.equal(rainy, again) and not torch.equal(rainy, other)
    streaks = (rainy - unit_range(clean))[:, rainy.amax(dim=0) < 1]  # where nothing is clipped
    assert streaks.min() > -1e-6 and streaks.max() > 0.1
    assert torch.allclose(streaks[0], streaks[1], atol=1e-6)  # grey: the crops are aligned
    centres = CenterCropDataset(images, 32, degrade=degrade)
    assert torch.equal(centres[0][0], centres[0][0]) and not torch.equal(centres[0][0], centres[1][0])
    assert torch.equal(centres[0][1], CenterCropDataset(find_pairs(tmp_path), 32)[0][1])


def test_size_of_synthetic_crops_is_told_as_it_was_given():
    with pytest.raises(UserError, match="TRAIN_PS must be a multiple of 8 pixels, got 100"):
        SyntheticPatches([], None, 100)


@pytest.mark.parametrize(
    "name, options, message",
    [("snow", {}, "added_rain"), ("gaussian_noise", {"sigmas": 3}, "gaussian_noise has no sigmas; it has sigma, clip")],
)
def test_unknown_degradations_are_told(name, options, message):
    with pytest.raises(UserError, match=message):
        find_degradation(name, options)
