"""scripts/make_demo_data.py: what it writes, what it refuses, and that its degradations do what they say."""

import json
import sys
from functools import partial
from pathlib import Path

import cv2
import make_demo_data as demo
import numpy as np
import pytest
from processes import run_forked

from dgunet.data import synthesis
from dgunet.data.images import read_image
from dgunet.data.samples import EMBEDDED, SPLITS, sample_photos
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.runtime.errors import UserError

pytest.importorskip("skimage")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

PAIRED = ("denoising", "deraining", "deblurring")
DEGRADATIONS = {
    "sensor_noise": (synthesis.sensor_noise, 19.5, 24.5),
    "gaussian_noise": (synthesis.gaussian_noise, 20.0, 21.5),  # sigma 25 is 20.17 dB, a little more with clipping
    "bayer_noise": (synthesis.bayer_noise, 20.0, 50.0),
    "grain": (synthesis.grain, 18.0, 60.0),
    "rain_streaks": (synthesis.rain_streaks, 19.0, 29.0),
    "added_rain": (synthesis.added_rain, 9.0, 35.0),
    "motion_blur": (synthesis.motion_blur, 17.0, 30.0),
}


def run(task, out, *options):
    demo.main(["--task", task, "--out", str(out), *map(str, options)])


def contents(folder):
    """{relative path: bytes} of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def photo(name):
    split = next(split for split, photos in EMBEDDED.items() if name in photos)
    return next(p for p in sample_photos(split) if p.name == name).load()


def psnr(a, b):
    return evaluate_pair(a, b, "train_rgb")[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One finished folder per task: {task: path}."""
    root = tmp_path_factory.mktemp("demo")
    for task in demo.TASKS:
        run(task, root / task, *(["--copies", 1] if task in PAIRED else []))
    return {task: root / task for task in demo.TASKS}


@pytest.fixture
def own(tmp_path):
    """A user's folder with seven small images, of several formats, one of them grey."""
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(7):
        image = cv2.resize(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), (53, 47))
        suffix = (".png", ".jpg", ".tif", ".BMP")[k % 4]
        cv2.imwrite(str(folder / f"p{k + 5}{suffix}"), image if k else image[..., 0])
    return folder


# --- degradations ---


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradation_is_plausible_and_pure(name):
    degradation, low, high = DEGRADATIONS[name]
    clean = photo("motorcycle_left")[:301, :403].astype(np.float32) / 255
    before = clean.copy()
    first, again, other = (degradation(clean, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(clean, before)
    assert first.shape == clean.shape and first.dtype == np.float32
    assert first.min() >= 0 and first.max() <= 1
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    psnr = -10 * np.log10(np.mean((first - clean) ** 2))
    assert low < psnr < high


def test_sensor_noise_grows_with_the_signal():
    rng = np.random.default_rng(0)
    spread = []
    for light in (0.1, 0.5):
        grey = synthesis.to_srgb(np.full((200, 200, 3), light, np.float32))
        noisy = synthesis.sensor_noise(grey, rng, shot=(0.01, 0.01), read=(1e-4, 1e-4))
        spread.append(synthesis.to_linear(noisy).std())
    assert spread == pytest.approx(np.sqrt([0.01 * 0.1 + 1e-4, 0.01 * 0.5 + 1e-4]), rel=0.03)


def test_srgb_curve_is_inverted():
    values = np.linspace(0, 1, 256, dtype=np.float32)
    assert np.allclose(synthesis.to_srgb(synthesis.to_linear(values)), values, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_motion_kernel_keeps_light_and_place(seed):
    kernel = synthesis.motion_kernel(np.random.default_rng(seed), extent=(9, 9))
    size = len(kernel)
    assert kernel.shape == (size, size) and size % 2 == 1
    assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1, abs=1e-5)
    rows, cols = np.nonzero(kernel)
    assert 9 <= max(np.ptp(rows), np.ptp(cols)) <= 11  # sub-pixel ends touch one more pixel on each side
    place = np.arange(size) - size // 2
    assert abs(kernel.sum(1) @ place) < 1e-3 and abs(kernel.sum(0) @ place) < 1e-3


def test_motion_blur_of_a_flat_image_changes_nothing():
    flat = np.full((40, 50, 3), 0.6, np.float32)
    assert np.allclose(synthesis.motion_blur(flat, np.random.default_rng(0)), flat, atol=1e-4)


def test_rain_only_brightens_the_dark():
    black = np.zeros((80, 90, 3), np.float32)
    rainy = synthesis.rain_streaks(black, np.random.default_rng(0))
    assert rainy.min() > 0.02  # the veil
    assert np.array_equal(rainy[..., 0], rainy[..., 2])  # rain has no colour
    assert rainy.max() > rainy.min() + 0.3  # a streak


def test_added_rain_is_grey_and_only_added():
    rng = np.random.default_rng(1)
    black = np.zeros((80, 90, 3), np.float32)
    streaks = synthesis.added_rain(black, np.random.default_rng(0))
    assert np.array_equal(streaks[..., 0], streaks[..., 2]) and 0.1 < streaks.max() <= 0.8
    image = rng.random(black.shape, dtype=np.float32)
    assert np.allclose(synthesis.added_rain(image, np.random.default_rng(0)), (image + streaks).clip(0, 1))


def test_noise_of_a_range_and_without_bounds():
    grey = np.full((200, 200, 3), 0.5, np.float32)
    sigmas = [
        synthesis.gaussian_noise(grey, np.random.default_rng(seed), (0, 50), clip=False).std() * 255
        for seed in range(50)
    ]
    assert 0 <= min(sigmas) < 10 and 40 < max(sigmas) < 51
    assert synthesis.gaussian_noise(0 * grey, np.random.default_rng(0), 25, clip=False).min() < -0.2


@pytest.mark.parametrize("noise", [synthesis.bayer_noise, lambda image, rng: synthesis.grain(image, rng, 15)])
def test_grains_are_larger_than_a_pixel(noise):
    grey = np.full((200, 200, 3), 0.5, np.float32)
    left = noise(grey, np.random.default_rng(1)) - 0.5
    likeness = np.corrcoef(left[:, 1:, 0].ravel(), left[:, :-1, 0].ravel())[0, 1]
    assert 0.2 < likeness < 0.95
    assert abs(left.mean()) < 0.01


def test_photo_noise_is_of_every_kind_and_leaves_a_quarter_clean():
    image = photo("astronaut")[:96, :96].astype(np.float32) / 255
    differences = [synthesis.photo_noise(image, np.random.default_rng(seed)) - image for seed in range(200)]
    clean = sum(not difference.any() for difference in differences)
    strengths = [255 * difference.std() for difference in differences if difference.any()]
    assert 35 < clean < 65
    assert min(strengths) < 3 and 20 < max(strengths) < 70


def test_screens_are_rendered_with_the_photographs(tmp_path, own):
    run("denoising", tmp_path / "photo", "--noise", "photo", "--screens", 2, "--source", own, "--val_count", 1)
    names = {path.stem for path in (tmp_path / "photo/train/target").iterdir()}
    assert {f"screen{k}_{copy}" for k in (1, 2) for copy in (1, 2, 3)} <= names
    screen, other = (read_image(tmp_path / f"photo/train/target/screen{k}_1.png") for k in (1, 2))
    assert screen.shape == other.shape == (320, 480, 3) and not np.array_equal(screen, other)
    steps = np.abs(np.diff(screen.astype(int), axis=1)).max(axis=2)
    assert (steps > 100).any() and (steps == 0).mean() > 0.5  # hard edges and flat areas


def test_a_share_of_the_images_stays_sharp(tmp_path, own):
    run(
        "deblurring",
        tmp_path / "blur",
        "--sharp",
        0.5,
        "--screens",
        4,
        "--source",
        own,
        "--val_count",
        1,
        "--copies",
        5,
    )
    inputs = sorted((tmp_path / "blur/train/input").iterdir())
    unchanged = [
        np.array_equal(read_image(path), read_image(path.parents[1] / "target" / path.name)) for path in inputs
    ]
    assert len(unchanged) >= 25 and 0.2 < np.mean(unchanged) < 0.8


def test_found_noise_is_of_every_kind():
    """Half is white noise without bounds; of the rest there are noise that is grey, noise that is not, and JPEGs."""
    grey = np.full((96, 96, 3), 0.5, np.float32)
    kinds, total = {"white": 0, "unclipped": 0, "grey": 0, "jpeg": 0}, 400
    for seed in range(total):
        dark = synthesis.found_noise(0 * grey, np.random.default_rng(seed), 25)
        noise = synthesis.found_noise(grey, np.random.default_rng(seed), 25) - 0.5
        likeness = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
        colour = noise[..., 0] - noise[..., 1] + 1e-9 * noise[..., 2]
        neighbours = np.corrcoef(colour[:, 1:].ravel(), colour[:, :-1].ravel())[0, 1]
        assert noise.dtype == np.float32 and 8 < 255 * noise.std() < 27
        kinds["unclipped"] += dark.min() < 0
        kinds["white"] += abs(likeness) < 0.05 and abs(neighbours) < 0.05
        kinds["grey"] += likeness > 0.95
        kinds["jpeg"] += neighbours > 0.1  # neighbours have one colour
    assert 0.43 * total < kinds["unclipped"] < 0.57 * total < kinds["white"] < 0.7 * total
    assert kinds["grey"] > 0.08 * total and 0.15 * total < kinds["jpeg"] < 0.3 * total


# --- what is written ---


@pytest.mark.parametrize("task", PAIRED)
def test_pairs_lie_where_the_task_looks_for_them(made, task):
    for split in SPLITS:
        folder = made[task] / ("test/DEMO" if (task, split) == ("deraining", "test") else split)
        inputs = sorted(p.name for p in (folder / "input").iterdir())
        assert inputs == sorted(p.name for p in (folder / "target").iterdir())
        assert len(inputs) == len(EMBEDDED[split])
        for name in inputs:
            degraded, clean = (read_image(folder / side / name) for side in ("input", "target"))
            assert degraded.shape == clean.shape and min(clean.shape) == 3
            assert 256 <= min(clean.shape[:2]) <= 512
            assert psnr(degraded, clean) < 45
    assert {p.name for p in made[task].iterdir()} == {*SPLITS, demo.MANIFEST}


def test_compressive_sensing_gets_clean_images(made):
    for split in SPLITS:
        folder = made["compressive_sensing"] / split
        assert {p.stem for p in folder.iterdir()} == set(EMBEDDED[split])
    assert np.array_equal(read_image(folder / "cat.png"), photo("cat"))


@pytest.mark.parametrize("task, low, high", [("denoising", 20, 23), ("deraining", 22, 26), ("deblurring", 22, 27)])
def test_mean_input_psnr(made, task, low, high):
    inputs = sorted((made[task] / "test").rglob("input/*.png"))
    scores = [psnr(read_image(p), read_image(p.parents[1] / "target" / p.name)) for p in inputs]
    assert low < np.mean(scores) < high


def test_no_scene_is_in_two_splits():
    files = {split: {file for file, *_ in photos.values()} for split, photos in EMBEDDED.items()}
    for split in files:  # both views of the motorcycle are one scene
        files[split] = {"motorcycle" if "motorcycle" in file else file for file in files[split]}
    assert sum(map(len, files.values())) == len(set.union(*files.values()))


def test_the_same_command_writes_the_same_bytes(made, tmp_path):
    run("deblurring", tmp_path / "again", "--copies", 1)
    assert contents(tmp_path / "again") == contents(made["deblurring"])


def test_copies_and_other_images_do_not_change_an_image(own, tmp_path):
    run("denoising", tmp_path / "a", "--source", own, "--val_count", 1)
    (own / "p6.jpg").unlink()
    run("denoising", tmp_path / "b", "--source", own, "--val_count", 1, "--copies", 2)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a["train/input/p5_1.png"] != a["train/input/p5_2.png"]
    assert a["train/target/p5_1.png"] == a["train/target/p5_2.png"]
    assert "train/input/p5_3.png" in a and "train/input/p5_3.png" not in b
    assert all(a[name] == data for name, data in b.items() if name != demo.MANIFEST)


def test_noise_without_bounds_is_clipped_not_wrapped():
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    degrade = partial(synthesis.gaussian_noise, sigma=40.0, clip=False)
    noisy = synthesis.degrade_image(ramp, degrade, 0, "a").astype(int)
    assert noisy[:, :2].max() < 200 and noisy[:, -2:].min() > 55
    beyond = np.array([[[-0.5, 0.5, 1.5]]], np.float32).repeat(16, 0).repeat(16, 1)
    assert np.abs(synthesis.jpeg_compress(beyond, 95)[..., [0, 2]] - [0, 1]).max() < 0.15


def test_names_of_images_have_one_unicode_form(own, tmp_path, capsys):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    (own / "p6.jpg").rename(own / f"{nfd}.jpg")
    run("denoising", tmp_path / "a", "--source", own, "--val_count", 1)
    assert f"train/input/{nfc}_1.png" in contents(tmp_path / "a")
    (own / f"{nfd}.jpg").rename(own / f"{nfc}.jpg")
    capsys.readouterr()
    run("denoising", tmp_path / "a", "--source", own, "--val_count", 1)
    assert "nothing to do" in capsys.readouterr().out


def test_own_images_are_split_by_natural_order(own, tmp_path, capsys):
    own_test = tmp_path / "own_test"
    own_test.mkdir()
    cv2.imwrite(str(own_test / "mine.jpeg"), np.full((64, 40, 3), 90, np.uint8))
    run("deraining", tmp_path / "out", "--source", own, "--test_source", own_test, "--val_count", 2)
    names = {p.stem for p in (tmp_path / "out/train/input").iterdir()}
    assert names == {f"p{k}_{copy}" for k in (5, 6, 7, 8, 9) for copy in (1, 2, 3)}
    assert {p.name for p in (tmp_path / "out/val/target").iterdir()} == {"p10.png", "p11.png"}
    assert {p.name for p in (tmp_path / "out/test/DEMO/target").iterdir()} == {"mine.png"}
    report = capsys.readouterr().out
    assert "15 pairs" in report and "dB" in report and str(tmp_path / "out") in report


def test_gaussian_noise_on_request(own, tmp_path):
    run("denoising", tmp_path / "out", "--source", own, "--noise", "gaussian", "--sigma", 10)
    options = json.loads((tmp_path / "out" / demo.MANIFEST).read_text())["options"]
    assert options["--noise"] == "gaussian" and options["--sigma"] == 10
    folder = tmp_path / "out/test"
    pair = [read_image(folder / side / "cat.png").astype(float) for side in ("input", "target")]
    assert np.std(pair[0] - pair[1]) == pytest.approx(10, abs=0.3)


def test_extent_of_the_blur_on_request(own, tmp_path):
    run("deblurring", tmp_path / "sharp", "--source", own, "--extent", 0, 0)
    for path in (tmp_path / "sharp/train/input").iterdir():  # no way, no blur; there and back through linear light
        pair = [read_image(tmp_path / f"sharp/train/{side}/{path.name}").astype(int) for side in ("input", "target")]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    run("deblurring", tmp_path / "usual", "--source", own)
    manifest = tmp_path / "usual" / demo.MANIFEST
    old = json.loads(manifest.read_text())
    assert old["options"].pop("--extent") == [5, 15]  # as in a folder made before there was a choice
    manifest.write_text(json.dumps(old))
    run("deblurring", tmp_path / "usual", "--source", own)
    with pytest.raises(UserError, match=r"--extent \[5\.0, 15\.0\].*\[0\.0, 5\.0\]"):
        run("deblurring", tmp_path / "usual", "--source", own, "--extent", 0, 5)


# --- running again, and refusing ---


def test_running_again_changes_nothing(made, capsys):
    out = made["denoising"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    (out / ".DS_Store").touch()  # a file browser was here
    run("denoising", out, "--copies", 1)
    (out / ".DS_Store").unlink()
    assert "already complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize(
    "options, named",
    [
        (["--task", "deraining", "--copies", 1], "--task"),
        (["--task", "denoising", "--copies", 2], "--copies"),
        (["--task", "denoising", "--copies", 1, "--seed", 5], "--seed"),
        (["--task", "denoising", "--copies", 1, "--noise", "gaussian"], "--noise"),
    ],
)
def test_other_options_are_refused(made, options, named):
    with pytest.raises(UserError, match=f"denoising.*{named} "):
        demo.main([*map(str, options), "--out", str(made["denoising"])])


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=str(out)):
        run("denoising", out)
    assert contents(tmp_path) == {"out/thesis.txt": b"mine"}


def test_added_changed_and_lost_files_are_noticed(own, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be filled
    run("compressive_sensing", out, "--source", own)
    (out / "train/extra.png").touch()
    with pytest.raises(UserError, match=r"extra\.png"):
        run("compressive_sensing", out, "--source", own)
    (out / "train/extra.png").rename(out / "train/p5.png")
    with pytest.raises(UserError, match=r"p5\.png.*changed"):
        run("compressive_sensing", out, "--source", own)
    (out / "train/p5.png").unlink()
    with pytest.raises(UserError, match=r"p5\.png.*removed"):
        run("compressive_sensing", out, "--source", own)
    with pytest.raises(UserError, match="--source"):
        run("compressive_sensing", out)


def test_a_failure_half_way_leaves_nothing(own, tmp_path, monkeypatch):
    (own / "p9.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"p9\.png"):
        run("denoising", tmp_path / "out", "--source", own)
    monkeypatch.setattr(demo, "encode_png", lambda image: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("denoising", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_images_that_cannot_be_used(own, tmp_path):
    def refuse(name, image, line):
        cv2.imwrite(str(own / name), image)
        with pytest.raises(UserError, match=line):
            run("denoising", tmp_path / "out", "--source", own)
        (own / name).unlink()

    refuse("p1.png", np.zeros((40, 40, 3), np.uint16), r"p1\.png.*16")
    refuse("p1.png", np.zeros((40, 31, 3), np.uint8), r"p1\.png.*31x40")
    refuse("p5.tif", np.zeros((40, 40, 3), np.uint8), "p5.png.*p5.tif")
    with pytest.raises(UserError, match="train and.* test"):
        run("denoising", tmp_path / "out", "--source", own, "--test_source", own)


@pytest.mark.parametrize(
    "options, line",
    [
        ("", "--task"),
        ("--task dehazing", "--task.*dehazing"),
        ("--task deraining --sigma 5", "--sigma.*deraining"),
        ("--task deraining --extent 0 5", "--extent.*deraining"),
        ("--task deraining --screens 5", "--screens.*deraining"),
        ("--task deblurring --extent 5 0", "--extent.*5 0"),
        ("--task denoising --sharp 0.5", "--sharp.*denoising"),
        ("--task deblurring --sharp 25", "--sharp.*25"),
        ("--task denoising --sigma 5", "--sigma.*--noise gaussian"),
        ("--task denoising --noise gaussian --sigma nan", "--sigma.*nan"),
        ("--task denoising --copies 0", "--copies.*0"),
        ("--task denoising --val_count 3", "--val_count.*--source"),
        ("--task denoising --seed -1", "--seed.*-1"),
        ("--task compressive_sensing --copies 2", "--copies.*compressive_sensing"),
        ("--task denoising --source nowhere", "nowhere"),
        ("--task denoising --source .", "no images"),
    ],
)
def test_mistakes_are_one_line(options, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line) as error:
        demo.main([*options.split(), "--out", "out"])
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_too_few_images(own, tmp_path):
    with pytest.raises(UserError, match="--val_count"):
        run("denoising", tmp_path / "out", "--source", own, "--val_count", 7)


def test_command_line_exits_with_2(tmp_path):
    command = [sys.executable, SCRIPTS / "make_demo_data.py", "--task", "denoising", "--source", "nowhere"]
    done = run_forked(command, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and str(tmp_path / "nowhere") in done.stderr
    assert done.stderr.count("\n") == 1


def test_default_folder_does_not_depend_on_where_it_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = demo.parse_args(["--task", "deblurring"])
    assert args.out == SCRIPTS.parent / "Datasets" / "demo" / "deblurring"
