"""The demo in the browser: its functions, and a visit to its page."""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgunet import DGUNet, restore
from dgunet.apps import demo, demo_html, demo_visit
from dgunet.apps.figures import restore_stages
from dgunet.automatic import Candidate, Diagnosis
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data.photos import Photo, read_comment, read_photo, restored_name
from dgunet.data.transforms import to_uint8
from dgunet.model.sampling import num_rows
from dgunet.runtime.errors import UserError, describe_error
from dgunet.runtime.hardware import autocast_dtype

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


# Photographs of visitors


def test_reads_what_cameras_and_scanners_write(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    turned = demo_visit.read_photo(saved(tmp_path / "turned.png", image, exif=exif), 10**6)
    assert np.array_equal(turned.photo.pixels, np.rot90(image, -1)) and turned.notes == []
    deep = demo_visit.read_photo(saved(tmp_path / "deep.png", image[..., 0].astype(np.uint16) * 257), 10**6).photo
    assert deep.pixels.dtype == np.uint16 and np.array_equal(demo_visit.shown(deep), np.dstack([image[..., 0]] * 3))
    clear = np.dstack([image, np.zeros((64, 96), np.uint8)])
    clear = demo_visit.read_photo(saved(tmp_path / "clear.png", clear), 10**6).photo
    assert np.array_equal(clear.pixels, image) and (demo_visit.shown(clear) == 255).all()


def test_scales_large_images_down_and_says_so(tmp_path, image):
    clear = np.dstack([image, image[..., 0]])
    visit = demo_visit.read_photo(saved(tmp_path / "a.png", clear), 64 * 96 // 4)
    assert visit.photo.pixels.shape == (32, 48, 3) and visit.photo.alpha.shape == (32, 48)
    assert "from 96x64 to 48x32" in visit.notes[0]


@pytest.mark.parametrize(
    "name, kind, written",
    [("a.JPG", "JPEG", "a.JPG"), ("a.jpg", "PNG", "a.png"), ("a.PNG", "PNG", "a.PNG"), ("a b.heic", "HEIF", "a b.png")],
)
def test_the_name_is_kept(name, kind, written):
    assert restored_name(Path(name), kind) == Path(written)


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
        demo_visit.read_photo(tmp_path / "a.png", 10**6)


# What is computed


def test_examples_are_degraded_by_a_strength():
    for name, way in demo_visit.WAYS.items():
        _, low, high, usual = way.slider or ("", 1, 2, 1)
        clean = demo_visit.examples()["cat"]
        weak, strong, again = (demo_visit.degrade_example("cat", name, s).photo.pixels for s in (low, high, high))
        assert strong.shape == clean.shape and strong.dtype == np.uint8 and np.array_equal(strong, again)
        assert low <= usual <= high and np.array_equal(weak, strong) == (way.slider is None)
        assert np.array_equal(strong, clean) == (name == "nothing")


@pytest.mark.parametrize("strength", [0, 0.4, 1])
def test_strength_blends_the_photograph_with_the_restored_one(image, strength):
    photo = Photo(image.astype(np.uint16) * 257, keep={"dpi": (72, 72)})
    restored = np.random.default_rng(0).random(image.shape, np.float32)
    blended = demo_visit.blend(photo, restored, strength)
    expected = (1 - strength) * photo.pixels + strength * 65535 * restored
    assert blended.pixels.dtype == np.uint16 and abs(blended.pixels - expected).max() < 1
    assert blended.keep == photo.keep
    grey = demo_visit.blend(Photo(image[..., 0]), restored, strength).pixels
    assert abs(grey - ((1 - strength) * image[..., 0] + 255 * strength * restored.mean(axis=2))).max() < 1


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
    assert abs(stages[0].astype(int) - demo_visit.initial_estimate(model.degradation, luma)).max() <= 1


def followed(steps) -> tuple[list[str], object]:
    """The texts of `follow`, and its result."""
    told = []
    while True:
        try:
            told += next(steps).values()
        except StopIteration as end:
            return told, end.value


def test_progress_says_what_is_done_and_how_long_the_rest_takes(monkeypatch):
    now, asked, proceed = 100.0, threading.Event(), threading.Event()
    monkeypatch.setattr(demo_visit.time, "monotonic", lambda: now)

    def compute(report):
        nonlocal now
        report(0, "stage 1 of 4")
        now += 10
        report(0.25, "stage 2 of 4")
        asked.set()
        proceed.wait(30)
        return "done"

    steps = demo_visit.follow(compute, "Removing <rain>", "status")
    first = next(steps)
    assert asked.wait(30) and list(first) == ["status"]
    text = next(steps)["status"]
    assert "Removing &lt;rain&gt;: 25 %, about 30 s left" in text and "stage 2 of 4" in text and 'value="0.250"' in text
    proceed.set()
    assert followed(steps)[1] == "done"


def test_one_restoration_at_a_time_and_the_unwanted_ends():
    started, proceed, reports, done = threading.Event(), threading.Event(), [], []

    def first(report):
        report(0, "a")
        started.set()
        assert proceed.wait(30)
        reports.append(1)
        report(0.5, "b")
        reports.append(2)

    wanted = True
    steps = demo_visit.follow(first, "first", "status", lambda: wanted)
    next(steps)
    assert started.wait(30)
    second = demo_visit.follow(lambda report: done.append(report(0, "c")) or "second", "second", "status")
    assert "waiting" in next(second)["status"] and not done
    wanted = False
    assert followed(steps) == ([], None)
    proceed.set()
    assert followed(second)[1] == "second" and reports == [1]  # it ended at its next step


# The page


PIXELS = 64 * 96


@pytest.fixture
def page(tmp_path, tiny_model, monkeypatch):
    """The tab for photographs, with small networks under the names of those that come with dgunet."""
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    networks = [
        demo.Network(
            name, task, saved_network(tmp_path / f"{name}.pth", tiny_model(f"{task}_dgunet", stages=2)), "Tests."
        )
        for name, task in {"denoising_photo": "denoising", "deraining_mixture": "deraining"}.items()
    ]
    sensing = tiny_model("compressive_sensing_dgunet", ratio=0.25, stages=1)
    networks.append(demo.Network("cs_25", demo.SENSING, saved_network(tmp_path / "cs_25.pth", sensing)))
    found = Diagnosis({"camera noise": 0.7, "clean": 0.2, "rain": 0.1})
    monkeypatch.setattr(demo, "diagnose", lambda image: found)
    answers = [("camera noise", "denoising_photo", 0.8), ("clean", None, 1.0), ("rain", "deraining_mixture", 1.0)]
    monkeypatch.setattr(demo, "choose", lambda diagnosis: [Candidate(*answer) for answer in answers])
    return demo.build(networks, torch.device("cpu"), PIXELS).restoring


def updates(steps) -> dict:
    """The last update of each component; of one with several properties, those of `gradio.update`."""
    found = {}
    for step in steps:
        found |= step
    return found


def files_of(view: str) -> list[np.ndarray]:
    """The images of a view's HTML."""
    return [np.asarray(Image.open(part.split('"')[0])) for part in view.split("gradio_api/file=")[1:]]


def opened(page, path) -> tuple:
    first = updates(page.open(str(path), None))
    visit = first[page.visit]
    return visit, first, updates(page.examine(visit))


def test_a_photograph_is_restored_as_it_is(tmp_path, page, image):
    visit, first, then = opened(page, saved(tmp_path / "photo.png", image))
    assert first[page.own] is None and len(files_of(first[page.view])) == 1
    assert np.array_equal(files_of(first[page.view])[0], image)  # shown at once, with nothing added
    assert then[page.told] == "This photograph seems to have **camera noise** (70 % sure)."
    before, after = files_of(then[page.view])
    [network] = visit.estimates
    assert network.name == "denoising_photo" and np.array_equal(before, image)
    assert np.array_equal(after, visit.estimates[network].stages[-1])
    assert np.array_equal(visit.estimates[network].stages[0], image)
    assert then[page.strength]["value"] == 0.8 and then[page.download]["value"] == "Download photo.png"
    assert 'type="range"' in then[page.view] and "aria-label" in then[page.view]


def test_candidates_are_shown_side_by_side(tmp_path, page, image, monkeypatch):
    visit, _, then = opened(page, saved(tmp_path / "photo.png", image))
    cards = then[page.cards].split("</button>")[:-1]
    assert [("best guess" in card, 'aria-pressed="true"' in card) for card in cards] == [(True,) * 2] + 2 * [
        (False,) * 2
    ]
    for card, words in zip(
        cards, ("Remove camera noise, strength 0.8", "Leave it as it is", "Remove rain"), strict=True
    ):
        assert f"<span>{words}</span>" in card
    crops = files_of(then[page.cards])
    assert np.array_equal(crops[1], image) and not np.array_equal(crops[0], crops[2])
    left = updates(page.pick(visit, 1))
    assert len(files_of(left[page.view])) == 1 and left[page.download] == left[page.strength] == {
        "visible": False, "__type__": "update"
    }  # fmt: skip
    other = updates(page.pick(visit, 2))
    assert other[page.other] == "deraining_mixture" and other[page.strength]["value"] == 1
    monkeypatch.setattr(demo, "compute_estimates", None)  # nothing is computed again
    assert files_of(updates(page.pick(visit, 0))[page.view])[1].tobytes() == files_of(then[page.view])[1].tobytes()
    stage = files_of(page.show_stage(visit, 1))[1]
    assert np.array_equal(stage, visit.estimates[visit.chosen.network].stages[1])
    by_name = updates(page.remove(visit, "deraining_mixture"))
    assert np.array_equal(files_of(by_name[page.view])[1], files_of(other[page.view])[1])


def test_the_download_is_what_the_command_writes(tmp_path, page, image):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    visit, *_ = opened(page, saved(tmp_path / "Holiday (1).JPG", image, exif=exif, quality=95))
    path = Path(updates(page.save(visit, 0.5))[page.file])
    assert path.name == "Holiday (1).JPG" and Image.open(path).getexif()[0x010F] == "a camera"
    assert Image.open(path).format == "JPEG" and read_comment(path).startswith("restored by dgunet")
    deep = (image.astype(np.uint16) * 257)[..., 0] + 3
    visit, *_ = opened(page, saved(tmp_path / "scan.png", deep))
    written = read_photo(updates(page.save(visit, 0.5))[page.file]).pixels
    model = demo.load(visit.chosen.network, torch.device("cpu"))
    expected = restore(model, np.dstack([deep] * 3) / np.float32(65535), strength=0.5).mean(axis=2) * 65535
    assert written.dtype == np.uint16 and abs(written - expected).max() < 2
    visit, *_ = opened(page, saved(tmp_path / "web.webp", image, lossless=True))
    written = read_photo(updates(page.save(visit, 1))[page.file]).pixels
    expected = restore(model, image, bf16=autocast_dtype("auto", torch.device("cpu")) is not None)
    assert visit.name == "web.png" and abs(written - expected.astype(int)).max() <= 1


def test_scaling_is_named_at_the_download(tmp_path, page, image):
    _, _, then = opened(page, saved(tmp_path / "large.png", np.tile(image, (2, 2, 1))))
    assert "from 192x128 to 96x64" in then[page.told]
    assert then[page.download]["value"] == "Download large.png, scaled down to 96x64 pixels"


def test_errors_are_sentences(tmp_path, page, image, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no image")
    told = updates(page.open(str(tmp_path / "broken.png"), None))
    assert told[page.told].startswith("⚠️ This file is not an image") and page.visit not in told
    for steps in (page.pick(None, 0), page.remove(None, "denoising_photo"), page.save(None, 1)):
        assert "drop it again" in updates(steps)[page.status]

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(demo, "compute_estimates", fails)
    assert "memory" in opened(page, saved(tmp_path / "photo.png", image))[2][page.status]
    assert updates(page.examine(None)) == {page.own: None}  # an upload that could not be read


def test_another_photograph_ends_what_is_computed(tmp_path, page, image, monkeypatch):
    started, proceed = threading.Event(), threading.Event()

    def slow(network, image, device, report):
        report(0, "stage 1")
        started.set()
        assert proceed.wait(30)
        report(0.5, "stage 2")

    visit = updates(page.open(str(saved(tmp_path / "photo.png", image)), None))[page.visit]
    monkeypatch.setattr(demo, "compute_estimates", slow)
    steps = page.examine(visit)
    while "Comparing" not in str(next(steps).get(page.status)):
        pass
    assert started.wait(30)
    updates(page.open(str(tmp_path / "photo.png"), visit))
    assert page.view not in updates(steps) and visit.estimates == {}
    proceed.set()


def test_says_what_is_wrong_and_how_sure_it_is():
    remove = demo.Choice("", demo.Network("n", "denoising", Path("n")))
    for found, best, sentence in (
        ({"clean": 0.9}, demo.UNCHANGED, "**Nothing seems to be wrong** with this photograph (90 % sure)."),
        ({"gaussian noise": 1.0}, remove, "This photograph seems to have **Gaussian noise** (100 % sure)."),
        ({"rain": 0.4}, demo.UNCHANGED, "(40 % sure). That is too unsure to change it."),
    ):
        assert demo._sentence(Diagnosis(found), best).endswith(sentence)


def test_an_example_is_degraded_and_scored(page):
    first = updates(page.open_example("cat", "Gaussian noise", 25, None))
    visit = first[page.visit]
    assert np.array_equal(files_of(first[page.view])[0], visit.photo.pixels) and visit.truth is not None
    then = updates(page.examine(visit))
    score = demo_visit.psnr(visit.photo.pixels, visit.truth)
    assert f"PSNR {score:.2f} dB before" in then[page.status] and f"| 0 | {score:.2f} dB |" in then[page.table]


def test_own_networks_are_offered_first(tmp_path, page, image):
    shipped = next(iter(page.networks.values()))
    own = demo.Network("mine", "denoising", shipped.path)
    page.networks = {"mine": own, **page.networks}
    visit, _, then = opened(page, saved(tmp_path / "photo.png", image))
    assert visit.choices[0] == demo.Choice("Your mine", own) and visit.best == visit.choices[1]
    assert then[page.other] == "mine"


def test_iphone_photographs_are_offered_where_they_can_be_read(page, monkeypatch):
    monkeypatch.setattr(demo.Sensing, "build", lambda *_: None)
    find = importlib.util.find_spec
    for there in (True, False):
        known = {"pillow_heif": there}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest, known=known: known.get(name) or find(name))
        types = demo.build(list(page.networks.values()), torch.device("cpu"), PIXELS).restoring.own.file_types
        assert types[0] == "image" and (".heic" in types) == there


def test_network_for_all_ratios_has_a_slider(tmp_path, page, image, tiny_model):
    small = dict(stages=1, growth=4, final_growth=4)
    networks = [
        demo.Network(name, demo.SENSING, saved_network(tmp_path / f"{name}.pth", model))
        for name, model in (
            ("cs_1to50", tiny_model("compressive_sensing_dgunet", ratio=(0.01, 0.5), **small)),
            ("cs_4to10", tiny_model("compressive_sensing_dgunet", ratio=(0.04, 0.1), **small)),
            ("cs_25", tiny_model("compressive_sensing_dgunet", ratio=0.25, **small)),
        )
    ]
    tab = demo.build([*page.networks.values(), *networks], torch.device("cpu"), PIXELS).sensing
    assert list(tab.networks) == ["1 to 50 %", "4 to 10 %", "25 %"]
    ends = [tuple(tab.ratios(label).values()) for label in tab.networks]
    assert ends == [(1, 50, 25, True), (4, 10, 10, True), (0, 100, 0, False)]
    starts, visit = {}, demo.Visit(Photo(image), "photo.png")
    for label, percent in (("1 to 50 %", 1), ("1 to 50 %", 17), ("25 %", 0)):
        told = tab.preview(visit, label, percent)
        found = updates(tab.reconstruct(visit, label, percent))
        rows = num_rows((percent or 25) / 100, 32)
        assert f"{rows} measurements" in told[tab.status] and "Your photograph" in told[tab.status]
        luminance, start = files_of(told[tab.view])
        assert np.array_equal(luminance, demo_visit.luminance(visit))
        assert np.array_equal(start, found[tab.found].stages[0])
        assert np.array_equal(files_of(found[tab.view])[1], found[tab.found].stages[-1])
        starts[label, percent] = found[tab.found].stages
    assert len({stages[-1].tobytes() for stages in starts.values()}) == len(starts)
    assert "An example" in tab.preview(None, "25 %")[tab.status]


def test_networks_of_one_name_are_all_to_choose_from():
    networks = [
        demo.Network(name, "denoising", Path(folder, f"{name}.pth"))
        for folder, name in [("b", "best"), ("c", "best"), ("d/c", "best"), ("own", "gaussian"), ("it", "gaussian")]
    ]
    found = demo_visit.by_label(networks)
    assert list(found) == ["best", "best (c)", "best (c, 2)", "gaussian", "gaussian (it)"]
    assert list(found.values()) == networks


def test_old_images_of_the_page_are_removed(tmp_path, monkeypatch, image):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    old = demo_html.cache_folder() / "old.png"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    demo_html.draw_view(image)
    assert [file.suffix for file in demo_html.cache_folder().iterdir()] == [".png"] and not old.exists()


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
            visit(browser.new_page(), url, tmp_path, playwright.TimeoutError)
            browser.close()
    finally:
        server.send_signal(signal.SIGTERM)  # as Ctrl-C, which a shell may have told its children to ignore
        rest = server.communicate(timeout=60)[0]
    assert (server.returncode, rest) == (0, "")
    assert [file for place in places.values() for file in place.rglob("*") if file.is_file()] == []


def visit(page, url: str, folder: Path, not_yet: type[Exception]):
    elsewhere = []
    page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or elsewhere.append(r.url))
    page.set_default_timeout(60_000)
    page.set_viewport_size({"width": 390, "height": 844})  # a phone
    page.goto(url)
    own = page.locator("#own input[type=file]")
    # A file that is none, then an image.
    told = page.get_by_text("This file is not an image that can be read").first
    for _ in range(20):  # the page may not listen yet
        own.set_input_files(folder / "broken.png")
        with contextlib.suppress(not_yet):
            told.wait_for(timeout=3000)
            break
    told.wait_for()
    own.set_input_files(folder / "photo.png")
    after = page.locator("#photo_view .after")
    after.wait_for()
    page.get_by_text("96x64 pixels, ").first.wait_for()
    sizes = page.locator("#photo_view img").evaluate_all("images => images.map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[96, 64], [96, 64]]
    frame = page.locator("#photo_view .pair").bounding_box()
    assert frame["y"] + frame["height"] < 844 and page.evaluate("document.documentElement.scrollWidth") <= 390
    # The handle, by keyboard.
    handle = page.locator("#photo_view input[type=range]")
    handle.focus()
    for key, clip in (("ArrowRight", "51%"), ("Home", "0%"), ("End", "100%")):
        page.keyboard.press(key)
        assert after.evaluate("e => getComputedStyle(e).clipPath").endswith(f" {clip})")
    # Strength changes what is shown, and nothing is fetched for it.
    shown = after.get_attribute("src")
    page.locator("#strength input[type=number]").fill("0.25")
    page.keyboard.press("Enter")
    page.wait_for_function("getComputedStyle(document.querySelector('#photo_view .after')).opacity == '0.25'")
    assert after.get_attribute("src") == shown
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(folder / "got.png")
    got, y = np.asarray(Image.open(folder / "got.png")), np.asarray(Image.open(folder / "photo.png"))
    assert download.value.suggested_filename == "photo.png" and got.shape == y.shape and not np.array_equal(got, y)
    # Another candidate, as it is.
    page.locator("#cards button").get_by_text("Leave it as it is").click()
    after.wait_for(state="detached")
    page.get_by_role("tab", name="Compressive sensing").click()
    page.get_by_text("Your photograph: left its luminance").first.wait_for()
    assert elsewhere == []
