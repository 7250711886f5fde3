"""scripts/prepare_patches.py: which patches it writes, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import prepare_patches as prepare
import pytest
from processes import run_forked

from dgunet.data.images import read_image, write_image
from dgunet.data.pairs import find_pairs
from dgunet.runtime.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

SHIFT = 50  # of every input against its target
SCENES = ("0001_001_S6_00100_00060_3200_L", "0002_001_S6_00100_00020_3200_N", "0010_002_G4_00100_00060_5500_L")
SMALL = ("--patches", 4, "--size", 32)


def run(task, source, out, *options, workers=1):
    prepare.main([task, "--source", str(source), "--out", str(out), "--workers", str(workers), *map(str, options)])


def contents(folder):
    """{relative path: bytes} of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def add_pair(input, target, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256 - SHIFT, (height, width, 3), dtype=np.uint8)
    write_image(target, image)
    write_image(input, image + np.uint8(SHIFT))


def add_scene(source, scene, seed):
    for number in ("010", "011"):
        names = (source / scene / f"{scene[:4]}_{kind}_SRGB_{number}.PNG" for kind in ("NOISY", "GT"))
        add_pair(*names, 40 + seed, 57, [seed, int(number)])


@pytest.fixture
def sidd(tmp_path):
    """SIDD-Medium's layout: three scenes of two pairs, 40 to 42 pixels high and 57 wide."""
    source = tmp_path / "Data"
    for seed, scene in enumerate(SCENES):
        add_scene(source, scene, seed)
    return source


@pytest.fixture
def paired(tmp_path):
    """input/ and target/ with a large, a narrow and a small pair."""
    source = tmp_path / "paired"
    for seed, (name, height, width) in enumerate((("large", 61, 83), ("narrow", 20, 90), ("small", 37, 50))):
        add_pair(source / "input" / f"{name}.png", source / "target" / f"{name}.png", height, width, seed)
    return source


def test_sidd(sidd, tmp_path):
    out = tmp_path / "SIDD" / "train"
    run("sidd", sidd, out, *SMALL)
    names = [f"{scene}_{number}_{k}" for scene in SCENES for number in ("010", "011") for k in (1, 2, 3, 4)]
    assert [pair.name for pair in find_pairs(out)] == names
    assert sorted(p.name for p in out.iterdir()) == ["input", "target"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["train"], "nothing else is left"
    whole = read_image(sidd / SCENES[1] / "0002_GT_SRGB_011.PNG")
    windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32), (0, 1)).transpose(0, 1, 3, 4, 2)
    places = set()
    for pair in find_pairs(out):
        input, target = read_image(pair.input), read_image(pair.target)
        assert input.shape == (32, 32, 3)
        assert np.array_equal(input, target + np.uint8(SHIFT)), "aligned"
        if pair.name.startswith(f"{SCENES[1]}_011"):
            places |= {tuple(p) for p in np.argwhere((windows == target).all((2, 3, 4)))}
    assert len(places) == 4, "four different places of this very image"


def test_sidd_depends_on_seed_and_name_alone(sidd, tmp_path):
    outs = {name: tmp_path / name for name in ("one", "two", "more", "longer", "seed")}
    run("sidd", sidd, outs["one"], *SMALL, workers=1)
    run("sidd", sidd, outs["two"], *SMALL, workers=2)
    run("sidd", sidd, outs["longer"], "--patches", 6, "--size", 32)
    run("sidd", sidd, outs["seed"], *SMALL, "--seed", 5)
    add_scene(sidd, "0000_001_S6_00100_00060_3200_L", seed=9)
    run("sidd", sidd, outs["more"], *SMALL)
    made = {name: contents(out) for name, out in outs.items()}
    assert len(made["one"]) == 48
    assert made["one"] == made["two"]
    assert made["one"].items() < made["more"].items() and len(made["more"]) == 64
    assert made["one"].items() < made["longer"].items()
    assert made["one"].keys() == made["seed"].keys() and made["one"] != made["seed"]


def test_random_boxes_reach_every_border():
    boxes = prepare.random_boxes(34, 33, 32, 200, np.random.default_rng(0))
    assert {box[:2] for box in boxes} == {(top, left) for top in range(3) for left in range(2)}


@pytest.mark.parametrize("height, width", [(720, 1280), (512, 801), (513, 1025), (300, 900), (1600, 100), (801, 801)])
def test_grid_boxes_cover_and_overlap(height, width):
    boxes = prepare.grid_boxes(height, width, size=512, overlap=256, max_side=800)
    covered = np.zeros((height, width), bool)
    for top, left, h, w in boxes:
        assert (h, w) == (min(512, height), min(512, width))
        assert 0 <= top <= height - h and 0 <= left <= width - w
        covered[top : top + h, left : left + w] = True
    assert covered.all()
    for axis in (0, 1):
        starts = sorted({box[axis] for box in boxes})
        assert all(0 < b - a <= 256 for a, b in zip(starts, starts[1:], strict=False))


def test_grid_boxes_of_known_images():
    gopro = prepare.GRIDS["gopro"]
    starts = [box[:2] for box in prepare.grid_boxes(720, 1280, **gopro)]
    assert starts == [(top, left) for top in (0, 208) for left in (0, 256, 512, 768)]
    assert prepare.grid_boxes(600, 800, **gopro) == [(0, 0, 600, 800)]
    assert prepare.grid_boxes(321, 481, **prepare.GRIDS["rain"]) == [(0, 0, 321, 481)]


@pytest.mark.parametrize("task", ["gopro", "rain"])
def test_grid(paired, tmp_path, task, capsys):
    out = tmp_path / "patches"
    options = ("--size", 32, "--overlap", 12, "--max_side", 50)
    run(task, paired, out, *options, workers=2)
    printed = capsys.readouterr().out
    assert "3 pairs of images, of which 1 stay whole" in printed and "wrote 17 pairs of patches" in printed
    large = [f"large_{k:02d}" for k in range(1, 13)]
    assert [pair.name for pair in find_pairs(out)] == [*large, *(f"narrow_{k}" for k in (1, 2, 3, 4)), "small"]
    for name in ("small", *large):
        assert np.array_equal(
            read_image(out / "input" / f"{name}.png"), read_image(out / "target" / f"{name}.png") + np.uint8(SHIFT)
        )
    assert np.array_equal(read_image(out / "input" / "small.png"), read_image(paired / "input" / "small.png"))
    assert read_image(out / "input" / "narrow_4.png").shape == (20, 32, 3)

    rebuilt = np.zeros_like(read_image(paired / "target" / "large.png"))
    boxes = prepare.grid_boxes(61, 83, size=32, overlap=12, max_side=50)
    for name, (top, left, height, width) in zip(large, boxes, strict=True):
        rebuilt[top : top + height, left : left + width] = read_image(out / "target" / f"{name}.png")
    assert np.array_equal(rebuilt, read_image(paired / "target" / "large.png"))


def test_announces_the_space(sidd, tmp_path, capsys):
    run("sidd", sidd, tmp_path / "out", *SMALL)
    printed = capsys.readouterr().out
    assert "6 pairs of images" in printed and "24 pairs of patches will be written" in printed
    said = float(printed.split("about ")[1].split(" MB")[0]) * 1e6
    written = sum(map(len, contents(tmp_path / "out").values()))
    assert said == pytest.approx(written, rel=0.3, abs=5e4)


@pytest.mark.parametrize("file", ["input/old.png", "notes.txt"])
def test_refuses_existing_output(sidd, tmp_path, file):
    out = tmp_path / "out"
    (out / file).parent.mkdir(parents=True)
    (out / file).write_bytes(b"precious")
    with pytest.raises(UserError, match=str(out)):
        run("sidd", sidd, out, *SMALL)
    assert contents(out) == {file: b"precious"}
    assert not (tmp_path / ".out.part").exists()


def test_fills_an_empty_folder_and_refuses_a_file(sidd, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run("sidd", sidd, out, *SMALL)
    assert len(contents(out)) == 48
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        run("sidd", sidd, tmp_path / "file", *SMALL)


def test_reports_an_interrupted_run(sidd, tmp_path):
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / "half.png").write_bytes(b"half")
    with pytest.raises(UserError, match=r"\.out\.part.*remove"):
        run("sidd", sidd, tmp_path / "out", *SMALL)
    assert contents(part) == {"half.png": b"half"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, other", [("NOISY", "GT"), ("GT", "NOISY")])
def test_missing_partner(sidd, tmp_path, kind, other):
    (sidd / SCENES[1] / f"0002_{kind}_SRGB_011.PNG").unlink()
    message = f"0002_{other}_SRGB_011.PNG.* 0002_{kind}_SRGB_011.PNG"
    with pytest.raises(UserError, match=message):
        run("sidd", sidd, tmp_path / "out", *SMALL)


def test_missing_partner_in_paired_folders(paired, tmp_path):
    (paired / "target" / "narrow.png").unlink()
    with pytest.raises(UserError, match=r"narrow\.png"):
        run("gopro", paired, tmp_path / "out")


@pytest.mark.parametrize("task", ["sidd", "gopro"])
def test_sizes_differ(sidd, paired, tmp_path, task):
    path = {"sidd": sidd / SCENES[0] / "0001_GT_SRGB_010.PNG", "gopro": paired / "target" / "large.png"}[task]
    write_image(path, np.zeros((50, 60, 3), np.uint8))
    with pytest.raises(UserError, match=rf"{path.name}.*60x50"):
        run(task, {"sidd": sidd, "gopro": paired}[task], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sidd_of_other_suffixes_and_what_is_none_of_it(sidd, tmp_path, capsys):
    scene = sidd / SCENES[0]
    for kind in ("NOISY", "GT"):
        (scene / f"0001_{kind}_SRGB_010.PNG").rename(scene / f"0001_{kind}_SRGB_010.jfif")
    for name in ("0001_METADATA_RAW_010.MAT", "Thumbs.db", "preview.png"):
        (scene / name).write_text("")
    run("sidd", sidd, tmp_path / "out", *SMALL)
    assert len(find_pairs(tmp_path / "out")) == 2 * 4 * len(SCENES)
    (told,) = capsys.readouterr().err.splitlines()
    assert "0001_METADATA_RAW_010.MAT" in told and "preview.png" in told and "Thumbs" not in told


def test_wrong_source(sidd, tmp_path):
    for source, message in (
        (tmp_path / "nowhere", "nowhere.*--source"),
        (sidd.parent, "NOISY.*Data.*--source"),
        (sidd / SCENES[0], f"{SCENES[0]}.*--source"),
    ):
        with pytest.raises(UserError, match=message):
            run("sidd", source, tmp_path / "out", *SMALL)


def test_too_small_for_a_patch(sidd, tmp_path):
    with pytest.raises(UserError, match="0001_NOISY_SRGB_010.PNG.*57x40.*--size"):
        run("sidd", sidd, tmp_path / "out", "--patches", 4, "--size", 41)
    run("sidd", sidd, tmp_path / "out", "--patches", 4, "--size", 40)


def test_unreadable_header(sidd, tmp_path):
    (sidd / SCENES[2] / "0010_GT_SRGB_010.PNG").write_bytes(b"not an image")
    with pytest.raises(UserError, match="0010_GT_SRGB_010.PNG"):
        run("sidd", sidd, tmp_path / "out", *SMALL)


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_image_ends_the_run(sidd, tmp_path, workers):
    path = sidd / SCENES[0] / "0001_GT_SRGB_011.PNG"  # its header is whole, and it is not among the samples
    path.write_bytes(path.read_bytes()[:1000])
    out, part = tmp_path / "out", tmp_path / ".out.part"
    with pytest.raises(UserError, match=rf"{path.name} .*; then remove the unfinished {part}"):
        run("sidd", sidd, out, *SMALL, workers=workers)
    assert not out.exists() and part.exists()


def test_two_images_with_patches_of_one_name(paired, tmp_path):
    for side in ("input", "target"):
        (paired / side / "small.png").rename(paired / side / "narrow_2.png")
    with pytest.raises(UserError, match=r"narrow\.png.*narrow_2\.png.*narrow_2\.png"):
        run("rain", paired, tmp_path / "out", "--size", 32, "--overlap", 12, "--max_side", 50)


def test_command_line(sidd, tmp_path):
    out = tmp_path / "out"
    good = ["sidd", "--source", sidd, "--out", out, "--patches", "2", "--size", "32", "--workers", "2"]

    def command(*arguments):
        call = [sys.executable, SCRIPTS / "prepare_patches.py", *arguments]
        return run_forked(call, cwd=tmp_path)

    done = command(*good)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "wrote 12 pairs of patches" in done.stdout and len(contents(out)) == 24
    again = command(*good)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.startswith("error: ") and str(out) in again.stderr and again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "{sidd,gopro,rain}"),
        (["celeba"], "celeba"),
        (["sidd", "--source", "a"], "--out"),
        (["sidd", "--source", "a", "--out", "b", "--patches", "0"], "--patches"),
        (["sidd", "--source", "a", "--out", "b", "--size", "big"], "--size: invalid number value: 'big'"),
        (["sidd", "--source", "a", "--out", "b", "--overlap", "2"], "--overlap 2"),
        (["gopro", "--source", "a", "--out", "b", "--seed", "2"], "--seed 2"),
        (["gopro", "--source", "a", "--out", "b", "--size", "256"], "--overlap 256"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(UserError) as caught:
        prepare.main(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
