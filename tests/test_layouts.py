"""Pairs in other layouts than input/ and target/: patterns of names, published sets, lists."""

import csv
from pathlib import Path

import numpy as np
import pytest
from processes import run_script

from dgunet import UserError
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data.images import write_image
from dgunet.data.pairs import changed_items, find_pairs, fingerprint
from dgunet.evaluation.sets import pairs_or_images
from dgunet.runtime.errors import run_cli
from dgunet.tasks import find_task

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*paths: str, size: tuple[int, int] = (24, 24)):
    for number, path in enumerate(paths):
        write_image(Path(path), np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))


def found(*args, **options) -> dict[str, tuple[str, str]]:
    pairs = find_pairs(*args, **options)
    return {name: (input.relative_to(Path()).as_posix(), target.as_posix()) for name, input, target in pairs}


@pytest.mark.parametrize(
    ("files", "pairs", "told"),
    [
        (["a_input.png", "a_gt.jpg"], {"a": ("a_input.png", "a_gt.jpg")}, "*_input with *_gt"),
        (
            ["rain-10.png", "norain-10.png", "rain-2.png", "norain-2.png"],
            {"2": ("rain-2.png", "norain-2.png"), "10": ("rain-10.png", "norain-10.png")},
            "rain-* with norain-*",
        ),
        (
            ["rain/rain-1.png", "norain/norain-1.png"],
            {"1": ("rain/rain-1.png", "norain/norain-1.png")},
            "rain/rain-* with norain/norain-*",
        ),
        (["lq/b.png", "gt/b.png"], {"b": ("lq/b.png", "gt/b.png")}, "lq/* with gt/*"),
        (["blur/b.png", "sharp/b.png"], {"b": ("blur/b.png", "sharp/b.png")}, "blur/* with sharp/*"),
    ],
)
def test_published_layouts_are_recognised_and_named(capsys, files, pairs, told):
    write(*(f"set/{file}" for file in files))
    assert found("set") == {name: (f"set/{one}", f"set/{other}") for name, (one, other) in pairs.items()}
    assert capsys.readouterr().err == f"note: pairs in set: {told}\n"
    assert [sample.name for sample in pairs_or_images(Path("set")).samples] == list(pairs)


def test_raw_scenes_of_gopro(capsys):
    for scene in ("GOPR0372_07_00", "GOPR0374_11_00"):
        write(*(f"raw/{scene}/{kind}/0000{k}.png" for kind in ("blur", "blur_gamma", "sharp") for k in (1, 2)))
    names = [f"{scene}-0000{k}" for scene in ("GOPR0372_07_00", "GOPR0374_11_00") for k in (1, 2)]
    pairs = found("raw")
    assert list(pairs) == names
    assert pairs[names[0]] == ("raw/GOPR0372_07_00/blur_gamma/00001.png", "raw/GOPR0372_07_00/sharp/00001.png")
    err = capsys.readouterr().err
    assert (
        "pairs in raw: */blur_gamma/* with */sharp/*" in err and "TRAINING.PAIRS" in err and "--pairs '*/blur/*'" in err
    )
    other = found("raw", names=("*/blur/*", "*/sharp/*"))
    assert list(other) == names and other[names[0]][0] == "raw/GOPR0372_07_00/blur/00001.png"
    write("raw/GOPR0372_07_00/sharp/00003.png")
    with pytest.raises(UserError, match=r"sharp/00003.png has no partner of the same name in raw \(\*/blur_gamma/\*\)"):
        find_pairs("raw")


def test_two_layouts_are_refused_and_named():
    write("set/a_input.png", "set/a_gt.png", "set/a_target.png")
    for call in (find_pairs, lambda path: pairs_or_images(Path(path))):
        with pytest.raises(
            UserError, match=r"\*_input with \*_gt, or \*_input with \*_target; choose by TRAINING.PAIRS"
        ):
            call("set")
    assert found("set", names=("*_input", "*_target")) == {"a": ("set/a_input.png", "set/a_target.png")}
    write("set/input/b.png", "set/target/b.png")
    assert list(found("set")) == ["b"]  # the usual one comes first


def test_a_folder_of_images_is_none_of_pairs():
    write("set/a_input.png", "set/a_gt.png", "set/holiday.png")
    assert not pairs_or_images(Path("set")).targets
    with pytest.raises(UserError, match="no folder .*set/input"):
        find_pairs("set")


def test_two_folders():
    write("x/1.png", "y/1.png", "x/2.png", "y/2.png", "z/1_gt.png", "z/2_gt.png", "w/1_input.png", "w/2_input.png")
    assert found("x", target="y") == {"1": ("x/1.png", "y/1.png"), "2": ("x/2.png", "y/2.png")}
    assert found("w", target="z")["2"] == ("w/2_input.png", "z/2_gt.png")
    assert found("x", target="z", names=("*", "*_gt"))["1"] == ("x/1.png", "z/1_gt.png")
    write("y/3.png")
    with pytest.raises(UserError, match="y/3.png has no partner of the same name in x;"):
        find_pairs("x", target="y")


def test_patterns():
    write("set/1.png", "set/1_gt.png", "set/2.png", "set/2_gt.png")
    assert found("set", names=("*", "*_gt"))["1"] == ("set/1.png", "set/1_gt.png")  # which has the second, too
    for names, told in (
        (("a", "*_gt"), "need a \\*"), (("*/*", "*_gt"), "as many"), (("*_x", "*_gt"), "no images \\*_x in"),
        (("*", "*"), "is both"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            find_pairs("set", names=names)


def test_lists_of_pairs(tmp_path):
    write("set/deep/1.png", "set/clean/one.png", "set/deep/2.png", "set/clean/two, too.png", "set/far/2.png")
    Path("set/a.txt").write_text("# mine\ndeep/1.png clean/one.png\n\n")
    assert found("set/a.txt") == {"1": ("set/deep/1.png", "set/clean/one.png")}
    rows = [("input", "target"), ("deep/2.png", "clean/two, too.png"), ("far/2.png", "clean/one.png")]
    rows += [(tmp_path / "set/deep/1.png", "clean/one.png")]
    with open("set/a.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert [pair.name for pair in find_pairs("set/a.csv")] == ["deep-2", "far-2", "1"]
    for text, told in (
        ("deep/1.png", "line 1: 'deep/1.png' are not the paths of an input and a target"),
        ("deep/1.png none.png", "line 1: no file set/none.png; paths are relative"),
        ("\n", "lists no pairs"),
        ("deep/1.png clean/one.png\ndeep/1.png deep/2.png", "have the same name"),
    ):
        Path("set/b.txt").write_text(text)
        with pytest.raises(UserError, match=told):
            find_pairs("set/b.txt")


def test_training_packing_and_testing_have_them(tmp_path, tiny_model, capsys):
    """By real command lines, from the raw scenes of a set to a score."""
    for scene in ("s1", "s2"):
        write(*(f"raw/{scene}/{kind}/{k}.png" for kind in ("blur", "sharp") for k in range(6)))
    words = (
        "TRAINING.TRAIN_PS 16 TRAINING.VAL_PS 16 TRAINING.WORKERS 0 OPTIM.NUM_EPOCHS 1 OPTIM.BATCH_SIZE 4 DEVICE cpu"
    )
    words += " MODEL.OVERRIDES.width 8 MODEL.OVERRIDES.growth 4 MODEL.OVERRIDES.final_growth 4 MODEL.OVERRIDES.stages 1"
    words = ["--config", "quickstart", *words.split(), "TRAINING.VAL_DIR", "", "TRAINING.REPEAT", "1"]

    def train(*more) -> str:
        find_task("deblurring").train([*words, *more])
        return capsys.readouterr().out

    def refusal(*more) -> str:
        with pytest.raises(UserError) as error:
            find_task("deblurring").train([*words, *more])
        return str(error.value)

    pairs = ["TRAINING.PAIRS", "{input: '*/blur/*', target: '*/sharp/*'}"]
    out = train("MODEL.SESSION", "a", "TRAINING.TRAIN_DIR", "raw", *pairs)
    assert "training    11 images of raw" in out and "done: best PSNR" in out
    folders = ["TRAINING.INPUT_DIR", "raw/s1/blur", "TRAINING.TARGET_DIR", "raw/s1/sharp"]
    folders += ["TRAINING.VAL_INPUT_DIR", "raw/s2/blur", "TRAINING.VAL_TARGET_DIR", "raw/s2/sharp"]
    out = train("--dry_run", "MODEL.SESSION", "b", *folders)
    assert "training    6 images of raw/s1/blur" in out and "validation  6 images of raw/s2/blur" in out
    assert "belong together" in refusal(*folders[:2])
    assert "both patterns" in refusal("TRAINING.PAIRS", "{input: '*_input'}")
    assert "clean images" in refusal(*folders, "SYNTHESIS.NAME", "motion_blur")
    assert "clean images" in refusal(*folders, "MODEL.DEGRADATION", "blur")
    with pytest.raises(UserError, match="TRAINING.PAIRS.input does nothing in compressive sensing"):
        find_task("compressive_sensing").train([*pairs])

    done = run_script(ROOT / "scripts/pack_dataset.py", "raw", "--pairs", "*/blur/*", "*/sharp/*", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not changed_items(find_pairs("raw.h5"), fingerprint(find_pairs("raw")))

    model = tiny_model("deblurring_dgunet", stages=1)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, "a.pth")
    Path("raw/list.csv").write_text("s1/blur/0.png,s1/sharp/0.png\n")
    write("named/1_y.png", "named/1_x.png")
    test = ["--weights", "a.pth", "--device", "cpu", "--dataset"]
    for more in (["raw/list.csv"], ["named", "--pairs", "*_y", "*_x"], ["raw"]):
        with pytest.raises(SystemExit) as end:
            run_cli(lambda more=more: find_task("deblurring").test([*test, *more]))
        assert not end.value.code, capsys.readouterr().err
    rows = list(csv.DictReader(Path("results/deblurring.csv").open()))
    assert [row["images"] for row in rows] == ["1", "1", "12"] and float(rows[0]["psnr"]) > 0
