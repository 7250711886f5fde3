"""The demo in the browser: its functions, and a visit to its page."""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgunet import DGUNet
from dgunet.apps import demo
from dgunet.apps.figures import restore_stages
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data.transforms import to_uint8
from dgunet.model.sampling import num_rows
from dgunet.runtime.errors import UserError, describe_error

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def image() -> np.ndarray:
    down, right = np.mgrid[0:1:64j, 0:1:96j]
    return (255 * np.stack([down, right, 0.5 * (down + right)], axis=-1)).astype(np.uint8)


def saved_network(path: Path, model: DGUNet) -> Path:
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, path)
    return path


def saved(path: Path, image: np.ndarray, **options) -> Path:
    Image.fromarray(image).save(path, **options)
    return path


# Images of visitors


def test_reads_what_cameras_and_scanners_write(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    turned, told = demo.read_photo(saved(tmp_path / "turned.png", image, exif=exif), 10**6)
    assert np.array_equal(turned, np.rot90(image, -1)) and told == ""
    deep = saved(tmp_path / "deep.png", image[..., 0].astype(np.uint16) * 257)
    read, told = demo.read_photo(deep, 10**6)
    assert np.array_equal(read, np.repeat(image[..., :1], 3, axis=2)) and told == "Your image was rounded to 8 bits."
    clear = saved(tmp_path / "clear.png", np.dstack([image, np.zeros((64, 96), np.uint8)]))
    read, told = demo.read_photo(clear, 10**6)
    assert (read == 255).all() and "white" in told


def test_scales_large_images_down_and_says_so(tmp_path, image):
    read, told = demo.read_photo(saved(tmp_path / "a.png", image), 64 * 96 // 4)
    assert read.shape == (32, 48, 3) and "scaled from 96x64 to 48x32" in told


def test_the_network_follows_the_kind_of_noise():
    pytest.importorskip("gradio")
    gaussian, real = "denoising_gaussian", "denoising_photo"
    networks = [network for network in demo.list_networks() if network.task == "denoising"]
    assert [network.name for network in networks] == [gaussian, real]  # the first one is shown at first
    tab = demo._Tab("denoising", networks, torch.device("cpu"), 10**6)
    for way, given, expected in (
        ("Gaussian noise", real, gaussian), ("Gaussian noise", gaussian, gaussian),
        ("camera noise at high ISO", gaussian, real), (demo.UNCHANGED, real, real),
        (demo.UNCHANGED, gaussian, gaussian),
    ):  # fmt: skip
        *_, chosen, told = tab.update_controls(way, given)
        assert chosen["value"] == expected and told.startswith(f"**{expected}**")
    own = demo.Network("own", "denoising", Path("own.pth"))
    for others in ([], networks):
        tab = demo._Tab("denoising", [own, *others], torch.device("cpu"), 10**6)
        assert tab.update_controls("Gaussian noise", "own")[2]["value"] == "own"


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "^This file is empty"),
        (b"no image", "^This file is not an image"),
        (bomb(1, 1), "at least 32x32"),
        (bomb(9_000, 9_000), "9000x9000"),
        (bomb(90_000, 90_000), "more than can be read"),
        (bomb(64, 64), "damaged"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path, content, told):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=told):
        demo.read_photo(tmp_path / "a.png", 10**6)


# What is computed


def test_every_task_degrades_by_its_strength(image):
    for name, task in demo.TASKS.items():
        for way in task.ways:
            _, low, high, usual = task.strength
            weak, strong, again = (demo.degrade(name, image, way, s, seed=1) for s in (max(low, 1), high, high))
            assert strong.shape == image.shape and strong.dtype == np.uint8 and np.array_equal(strong, again)
            assert low <= usual <= high and demo.psnr(strong, image) < np.inf
            assert np.array_equal(weak, strong) == (way == "camera noise at high ISO")
    assert demo.degrade("denoising", image, demo.UNCHANGED, 25, 0) is image
    assert demo.degrade("compressive_sensing", image, None, 0, 0).shape == (64, 96)


def test_stages_are_those_of_the_network(tiny_model, image):
    model = tiny_model(stages=3)
    told = []
    stages = restore_stages(model, image[:50, :70], progress=lambda done, doing: told.append((round(done, 2), doing)))
    assert len(stages) == 4 and np.array_equal(stages[0], image[:50, :70])
    assert told == [(0, "stage 1 of 3"), (0.33, "stage 2 of 3"), (0.67, "stage 3 of 3")]
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        estimates = model(x)[::-1]
    for stage, estimate in zip(restore_stages(model, image, bf16=True)[1:], estimates, strict=True):
        expected = to_uint8(estimate[0].permute(1, 2, 0).numpy())
        assert abs(stage.astype(int) - expected).mean() < 0.6  # in bfloat16, where that is fast


def test_large_images_are_restored_in_tiles_of_whole_blocks(tiny_model, image):
    luma = np.tile(image[..., 1], (3, 3))[:150, :250]
    model = tiny_model("compressive_sensing_dgunet", ratio=0.5, stages=2)
    told = []
    stages = restore_stages(model, luma, tile=128, overlap=64, progress=lambda done, doing: told.append(doing))
    assert told[-1] == "stage 2 of 2, tile 6 of 6" and all(stage.shape == luma.shape for stage in stages)
    # Blocks are measured one by one: were tiles not of whole ones, x_0 would differ.
    assert abs(stages[0].astype(int) - demo.initial_estimate(model.degradation, luma)).max() <= 1


def test_network_for_all_ratios_has_a_slider(tmp_path, image, tiny_model):
    small = dict(stages=1, growth=4, final_growth=4)
    networks = [
        demo.Network(name, "compressive_sensing", saved_network(tmp_path / f"{name}.pth", model))
        for name, model in (
            ("cs_1to50", tiny_model("compressive_sensing_dgunet", ratio=(0.01, 0.5), **small)),
            ("cs_4to10", tiny_model("compressive_sensing_dgunet", ratio=(0.04, 0.1), **small)),
            ("cs_25", tiny_model("compressive_sensing_dgunet", ratio=0.25, **small)),
        )
    ]
    tab = demo._Tab("compressive_sensing", networks, torch.device("cpu"), 10**6)
    assert list(tab.networks) == ["1 to 50 %", "4 to 10 %", "25 %"]
    ends = [tuple(tab.ratios(label).values()) for label in tab.networks]
    assert ends == [(1, 50, 25, True), (4, 10, 10, True), (0, 100, 0, False)]
    starts = {}
    for label, percent in (("1 to 50 %", 1), ("1 to 50 %", 17), ("25 %", 0)):
        start, text = tab.preview(image, None, 0, 0, label, percent)[:2]
        found = tab.restore(image, None, 0, 0, label, percent, lambda *_, **__: None)[-1]
        rows = num_rows((percent or 25) / 100, 32)
        assert f"of {rows} measurements" in text and np.array_equal(start[1], found.stages[0])
        starts[label, percent] = found.stages
    assert len({stages[-1].tobytes() for stages in starts.values()}) == len(starts)


def test_tells_of_other_noise_than_the_network_is_for(image):
    network = demo.Network("n", "denoising", Path("n"), noise_sigma=(25, 25))
    assert "less noise" in (weaker := demo._noise_warning(network, image, 5)) and "sigma 25" in weaker
    assert "more noise" in demo._noise_warning(network, image, 50) and demo._noise_warning(network, image, 25) == ""
    assert "less noise" in demo._noise_warning(network, image)  # which has none


def test_networks_of_one_name_are_all_to_choose_from():
    networks = [
        demo.Network(name, "denoising", Path(folder, f"{name}.pth"))
        for folder, name in [("b", "best"), ("c", "best"), ("d/c", "best"), ("own", "gaussian"), ("it", "gaussian")]
    ]
    tab = demo._Tab("denoising", networks, torch.device("cpu"), 10**6)
    assert list(tab.networks) == ["best", "best (c)", "best (c, 2)", "gaussian", "gaussian (it)"]
    assert list(tab.networks.values()) == networks


# The command


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--megapixels", "0"], "--megapixels is from"),
        (["--port", "70000"], "--port is from"),
        (["--host", "203.0.113.1"], "no address of this machine"),
        (["--weights", "model.pth"], "TASK=FILE"),
        (["--weights", "deblurring=nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told):
    with pytest.raises(UserError, match=told):
        demo.run(arguments(*words))


def test_networks_of_other_tasks_are_refused(tmp_path, tiny_model):
    sensing = saved_network(tmp_path / "sensing.pth", tiny_model("compressive_sensing_dgunet", ratio=0.1))
    with pytest.raises(UserError, match="sensing.pth"):
        demo.run(arguments("--weights", f"denoising={sensing}"))


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError) as error:
        demo.run(arguments())
    assert "[demo]" in describe_error(error.value)  # what the command prints


@pytest.fixture
def own_environment(monkeypatch):
    """The command sets variables, for Gradio, which is imported once."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_a_port_in_use_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port}: in use"):
            demo.run(arguments("--port", str(port)))


def test_one_restoration_at_a_time(own_environment):
    pytest.importorskip("gradio")
    app = demo.build(demo.list_networks(), torch.device("cpu"), 10**6)
    restoring = [function for function in app.fns.values() if function.name == "restore"]
    assert len(restoring) >= 3  # one for each tab with a network
    assert {(function.concurrency_id, function.concurrency_limit) for function in restoring} == {("restore", 1)}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_visit(tmp_path, tiny_model, image):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    weights = saved_network(tmp_path / "tiny.pth", tiny_model(stages=3))
    saved(tmp_path / "photo.png", image)
    (tmp_path / "broken.png").write_bytes(b"no image")
    places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "cwd")}
    for place in places.values():
        place.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "dgunet", "demo", "--weights", f"denoising={weights}", "--no_browser"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=places["cwd"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(places["HOME"]), "TMPDIR": str(places["TMPDIR"])},
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert line.startswith("DGUNet is at http://127.0.0.1:"), line + server.stdout.read()
        url = line.split()[3]
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            visit(browser.new_page(), url, tmp_path)
            browser.close()
    finally:
        server.send_signal(signal.SIGTERM)  # as Ctrl-C, which a shell may have told its children to ignore
        rest = server.communicate(timeout=60)[0]
    assert (server.returncode, rest) == (0, "")
    assert [file for place in places.values() for file in place.rglob("*") if file.is_file()] == []


def visit(page, url: str, folder: Path):
    elsewhere = []
    page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or elsewhere.append(r.url))
    page.set_default_timeout(60_000)
    page.goto(url)
    seen = {"denoising": page.locator("#denoising_caption"), "sensing": page.locator("#compressive_sensing_caption")}

    def says(place, *words: str):
        for word in words:
            place.get_by_text(word).first.wait_for()

    says(seen["denoising"], "with Gaussian noise", "Restore")
    # A file that is none, then an image.
    own = page.locator("#denoising_own")
    own.locator("input[type=file]").set_input_files(folder / "broken.png")
    says(page.locator("#denoising_note"), "This file is not an image that can be read")
    own.get_by_label("Clear").click()
    own.get_by_text("Click to Upload").wait_for()
    own.locator("input[type=file]").set_input_files(folder / "photo.png")
    page.wait_for_function("document.querySelector('#denoising_viewer img').naturalWidth == 96")
    page.get_by_text("nothing: restore it as it is").first.click()
    says(seen["denoising"], "The image as it is.")
    page.get_by_text("Gaussian noise", exact=True).first.click()
    says(seen["denoising"], "Left the original, right with Gaussian noise")
    page.get_by_role("button", name="Restore").first.click()
    says(seen["denoising"], "right restored", "96x64 pixels, restored in")
    stage = page.get_by_label("number input for On the right: the estimate after stage").first
    stage.fill("1")
    stage.press("Enter")
    says(seen["denoising"], "right after stage 1 of 3")
    images = page.locator("#denoising_viewer img")
    sizes = images.evaluate_all("images => images.map(image => [image.naturalWidth, image.naturalHeight])")
    assert sizes == [[96, 64], [96, 64]]
    page.get_by_role("tab", name="Deblurring").click()
    says(page.locator("#deblurring_caption"), "right with camera shake")
    page.get_by_role("tab", name="Compressive sensing").click()
    says(seen["sensing"], "Left the luminance")
    assert elsewhere == []
