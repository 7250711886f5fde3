"""Exported networks without PyTorch, by dgunet/onnx_runner.py and in a browser by web/, give what `restore` gives."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading

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
        parameter.data *= 2
    model.local = {"tile": 48}
    path = tmp_path_factory.mktemp("exported") / "network.onnx"
    export_model(model, path)
    return model, path


@pytest.fixture(scope="module")
def network(exported):
    return onnx_runner.load(exported[1])


def photo(height: int, width: int, dtype=np.float32, channels: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).random((height, width, channels), dtype=np.float32)
    return x if dtype == np.float32 else (x * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (9, 61), (48, 49), (97, 131), (64, 200)])
@pytest.mark.parametrize("tile, overlap", [("auto", None), (None, None), (32, 0), (40, 20), (67, 9)])
def test_as_restore(exported, network, size, tile, overlap):
    image = photo(*size)
    expected = restore(exported[0], image, tile, overlap)
    assert np.abs(expected - image).max() > 0.1
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


# -------------------------------------------------------------------------------------------------- in a browser

WEB = ROOT / "web"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Given the sizes, tiles and images of the test as JSON, it prints what tiles.js makes of them.
SCRIPT = """
import { readFileSync } from "node:fs";
import { metadata, ramp, restore, tileGrid } from "./tiles.js";
const { grids, ramps, image, tile, overlap, file } = JSON.parse(readFileSync(0));
const half = (data, height, width) => data.map((value, i) => value / 2 + (i % width) / width);
const steps = [];
const run = (progress) => restore(half, { ...image, data: Float32Array.from(image.data) }, { tile, overlap, progress });
const restored = await run((done, count) => void steps.push([done, count]));
console.log(JSON.stringify({
  grids: grids.map((grid) => tileGrid(...grid)), ramps: ramps.map((one) => [...ramp(...one)]),
  restored: [...restored], steps, stopped: await run((done) => done < 1), about: metadata(readFileSync(file)),
}));
"""


@pytest.mark.skipif(NODE is None, reason="needs node (Debian: apt-get install nodejs)")
def test_tiles_in_javascript(exported, network, monkeypatch):
    grids = [(*size, tile, overlap, 8) for size in ((9, 61), (97, 131), (640, 200)) for tile, overlap in
             ((None, None), (32, 0), (40, 20), (67, 9), (192, None))]  # fmt: skip
    ramps = [(48, 12), (9, 0), (200, 64)]
    x = photo(50, 61)
    image = dict(data=x.transpose(2, 0, 1).ravel().tolist(), channels=3, height=50, width=61)
    given = dict(grids=grids, ramps=ramps, image=image, tile=40, overlap=11, file=str(exported[1]))
    ran = subprocess.run(
        [NODE, "--input-type=module", "-e", SCRIPT], cwd=WEB, input=json.dumps(given), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for grid, theirs in zip(grids, found["grids"], strict=True):
        areas, overlap = onnx_runner.tile_grid(*grid)
        corners = [[rows.start, rows.stop, columns.start, columns.stop] for rows, columns in areas]
        assert theirs == {"areas": corners, "overlap": overlap}
    for size, theirs in zip(ramps, found["ramps"], strict=True):
        np.testing.assert_allclose(theirs, onnx_runner.ramp(*size), rtol=1e-6)
    monkeypatch.setattr(type(network), "__call__", lambda self, y: y / 2 + np.arange(y.shape[3]) / y.shape[3])
    expected = onnx_runner.restore(network, x, tile=40, tile_overlap=11)
    np.testing.assert_allclose(np.reshape(found["restored"], (3, 50, 61)).transpose(1, 2, 0), expected, atol=1e-5)
    assert found["steps"] == [[0, 4], [1, 4], [2, 4], [3, 4]] and found["stopped"] is None
    assert found["about"] == network.about


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.skipif(
    not (WEB / "node_modules" / "onnxruntime-web").exists(), reason="needs onnxruntime-web (cd web && npm install)"
)
def test_page(exported, tmp_path):
    """It restores an image of several tiles by a network that is chosen, and asks no other host for anything."""
    playwright = pytest.importorskip("playwright.sync_api")
    image = photo(77, 101, np.uint8)
    Image.fromarray(image).save(tmp_path / "my photo.png")
    (tmp_path / "other.onnx").write_text("not a network")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=WEB))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, asked, errors = f"http://127.0.0.1:{server.server_port}/", [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.set_input_files("#model", tmp_path / "other.onnx")
        page.wait_for_selector("text=other.onnx cannot be used: not an ONNX file, or damaged.")
        page.set_input_files("#model", exported[1])
        page.wait_for_selector("text=Ready: choose an image.")
        page.set_input_files("#image", tmp_path / "my photo.png")
        page.wait_for_selector("#result:not([hidden])")
        page.focus("#slider")
        page.keyboard.press("End")
        assert page.get_attribute("#pair", "style") == "--at: 100%;"
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == "my photo.png"
        download.value.save_as(tmp_path / "restored.png")
        page.goto((WEB / "index.html").as_uri())
        assert "python -m http.server" in page.inner_text("#served")
        browser.close()
    server.shutdown()
    restored = np.asarray(Image.open(tmp_path / "restored.png").convert("RGB"))
    expected = restore(exported[0], image.astype(np.float32) / 255)
    assert np.abs(restored / 255 - expected).max() < 0.5 / 255 + 1e-3  # rounded to 8 bits
    assert not errors and all(url.startswith((address, "blob:", "file:")) for url in asked)
