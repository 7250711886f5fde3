"""The runner of exported networks without PyTorch gives what `restore` gives."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dgunet import create_model, onnx_runner, restore
from dgunet.apps.export import export_model
from dgunet.runtime.errors import ROOT

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network whose result depends on the tile, and its file."""
    torch.manual_seed(0)
    model = create_model("denoising_dgunet", width=8, growth=4, stages=1).eval()
    for parameter in model.parameters():
        parameter.data *= 1.2
    model.local = {"tile": 48}
    path = tmp_path_factory.mktemp("exported") / "network.onnx"
    export_model(model, path)
    return model, path


@pytest.fixture(scope="module")
def network(exported):
    return onnx_runner.load(exported[1])


def photo(height: int, width: int, dtype=np.float32, channels: int = 3) -> np.ndarray:
    # The file clamps the estimate of each tile, `restore` their blend: values that stay within [0, 1].
    x = 0.4 + 0.2 * np.random.default_rng(0).random((height, width, channels), dtype=np.float32)
    return x if dtype == np.float32 else (x * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (9, 61), (48, 49), (97, 131), (64, 200)])
@pytest.mark.parametrize("tile, overlap", [("auto", None), (None, None), (32, 0), (40, 20), (67, 9)])
def test_as_restore(exported, network, size, tile, overlap):
    image = photo(*size)
    expected = restore(exported[0], image, tile, overlap)
    assert np.abs(expected - image).max() > 0.02
    np.testing.assert_allclose(onnx_runner.restore(network, image, tile, overlap), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_types(exported, network, dtype):
    image = photo(50, 61).astype(np.float64) if dtype == np.float64 else photo(50, 61, dtype)
    restored, expected = onnx_runner.restore(network, image), restore(exported[0], image)
    assert restored.dtype == dtype
    scale = 1 if dtype == np.float64 else np.iinfo(dtype).max
    assert np.abs(restored / scale - expected / scale).max() <= max(1e-4, 1 / scale if scale > 1 else 0)


def test_grey(exported, network):
    image = photo(40, 57, channels=1)
    expected = restore(exported[0], image.repeat(3, axis=2)).mean(axis=2, keepdims=True)
    np.testing.assert_allclose(onnx_runner.restore(network, image), expected, atol=1e-4)
    np.testing.assert_allclose(onnx_runner.restore(network, image[..., 0]), expected[..., 0], atol=1e-4)


def test_large_images_are_cut_into_tiles(network, monkeypatch):
    done = []
    monkeypatch.setattr(onnx_runner, "LARGE", 100 * 100)
    monkeypatch.setattr(onnx_runner, "TILE", 96)
    monkeypatch.setattr(network, "tile", None)
    for size in (100, 101):
        onnx_runner.restore(network, photo(size, 100), progress=lambda *counts: done.append(counts))
    assert done == [(1, 1), (1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    "image, options, message",
    [
        (np.full((9, 9, 3), np.nan), {}, "NaN"),
        (np.full((9, 9, 3), 255.0), {}, r"in \[0, 1\], got 255"),
        (np.zeros((9, 9, 3), np.int64), {}, "int64"),
        (np.zeros((9, 9, 4)), {}, r"\(9, 9, 4\)"),
        (np.zeros((0, 9, 3)), {}, r"\(0, 9, 3\)"),
        ([[0.5]], {}, "not a list"),
        (np.zeros((9, 9)), {"tile": 8}, "at least 16"),
        (np.zeros((9, 9)), {"tile": 32, "tile_overlap": 17}, "half a tile"),
    ],
)
def test_what_is_wrong_is_said(network, image, options, message):
    with pytest.raises(ValueError, match=message):
        onnx_runner.restore(network, image, **options)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.onnx is not a readable ONNX file"):
        onnx_runner.load(tmp_path / "a.onnx")


def test_this_file_alone_is_enough(exported, network, tmp_path):
    """Copied elsewhere, and without PyTorch."""
    shutil.copy(onnx_runner.__file__, tmp_path)
    image = photo(70, 61, np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(np.dstack([image, image[..., 0]])).save(tmp_path / "clear.png")
    (tmp_path / "not.png").write_text("not an image")
    code = (
        "import sys, onnx_runner; status = onnx_runner.main(sys.argv[1:]);"
        "assert not {'torch', 'dgunet'} & sys.modules.keys(); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(exported[1]), "photo.png", "clear.png", "not.png", "--out", "done"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2 and "error: not.png: cannot identify" in ran.stderr and "Traceback" not in ran.stderr
    np.testing.assert_array_equal(Image.open(tmp_path / "done/photo.png"), onnx_runner.restore(network, image))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "done/clear.png"))[..., 3], image[..., 0])
    assert onnx_runner.main([str(exported[1]), str(tmp_path / "photo.png"), "--out", str(tmp_path / "photo.png")]) == 2
    np.testing.assert_array_equal(Image.open(tmp_path / "photo.png"), image)


def test_importing_it_imports_no_pytorch():
    code = "import sys, dgunet.onnx_runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
