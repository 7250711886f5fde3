"""scripts/download_data.py, with archives as the publishers pack them and a stand-in for the network."""

import errno
import io
import shutil
import sys
import tarfile
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import download_data as script
import pytest
import torch
import yaml

from dgunet.runtime.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]

ITEMS = {item.name: item for item in script.DOWNLOADS}
PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"


def pairs(prefix, count=3, sides=("input", "target")):
    return [f"{prefix}/{side}/img{k}.png" for side in sides for k in range(1, count + 1)]


# What is in each archive, and the (small) numbers that the table expects of it here.
CONTENTS = {
    "gopro-train": (pairs("train"), [3]),
    "gopro-test": (pairs("test/GoPro"), [3]),
    "hide": (pairs("HIDE"), [3]),
    "realblur-r": (pairs("test/RealBlur_R"), [3]),
    "realblur-j": (pairs("."), [3]),
    "rain13k-train": (pairs("train/Rain13K", 4), [4]),
    "rain13k-test": (
        [file for k, name in enumerate(script.RAIN, 1) for file in pairs(name, k)],
        [1, 2, 3, 4, 5],
    ),
    "sidd-train": ([f"train/000{k}_S6/000{k}_{side}_SRGB_010.PNG" for k in (1, 2) for side in ("GT", "NOISY")], [None]),
    "sidd-val": (pairs("val/SIDD", sides=("input_crops", "target_crops")), [None]),
    "sidd-test": ([f"test/SIDD/{name}" for name in script.SIDD], [2]),
    "dnd": ([f"test/DND/{name}" for name in script.DND], [51]),
    "div2k-bsd400": ([f"DIV2K_BSD400/{k}.png" for k in range(3)], [None]),
    "set11-bsd68": (["test/Set11/a.tif", "test/Set11/b.tif", *(f"test/BSD68/{k}.png" for k in range(3))], [2, 3]),
    "bsd400": ([f"BSD400/{k}.jpg" for k in range(5)], [5]),
    "div2k": ([f"DIV2K/DIV2K_train_HR/000{k}.png" for k in range(1, 7)], [None]),
    "weights": (["Denoising/DGUNet.pth", "Deraining/DGUNet_plus.pth"], [None]),
    "weights-cs": (["models/cs_ratio_10.pth"], [None]),
}


def pack(names, extra=("__MACOSX/train/input/._img1.png", "__MACOSX/train/target/._img1.png")):
    """A zip file's bytes; every file holds its own name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in (*names, *extra):
            file.writestr(name.removeprefix("./"), name)
    return buffer.getvalue()


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


class Drive:
    """Stands for gdown: ``served`` maps ids to a file's bytes, a folder's {name: bytes}, or an error to raise."""

    def __init__(self):
        self.served = {ITEMS[name].id: pack(content) for name, (content, _) in CONTENTS.items()}
        self.calls = []

    def serve(self, name, what):
        self.served[ITEMS[name].id] = what

    def download(self, id, output, resume):
        self.calls.append((id, output, resume))
        what = self.served[id]
        if isinstance(what, dict):
            raise RuntimeError("Cannot retrieve the public link of the file.\n  Check the permission")
        if isinstance(what, BaseException):
            Path(f"{output}abcd.part").write_bytes(b"half")
            raise what
        if what is None:
            return None
        Path(output).write_bytes(what)
        return output

    def download_folder(self, id, output, resume):
        what = self.served[id]
        if not isinstance(what, dict):
            raise RuntimeError("Failed to retrieve folder contents")
        for name, content in what.items():
            path = Path(output) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return [str(Path(output) / name) for name in what]


@pytest.fixture
def drive(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drive = Drive()
    module = types.SimpleNamespace(download=drive.download, download_folder=drive.download_folder)
    monkeypatch.setitem(sys.modules, "gdown", module)
    small = [replace(d, folders=dict(zip(d.folders, CONTENTS[d.name][1], strict=True))) for d in script.DOWNLOADS]
    monkeypatch.setattr(script, "DOWNLOADS", small)
    return drive


def fails(*arguments):
    """The message of the one-line error that a command ends with."""
    with pytest.raises(UserError) as caught:
        script.main(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_and_again(drive, capsys):
    script.main(["all"])
    expected = []
    for folder in ["GoPro/train", "GoPro/test", "HIDE/test", "RealBlur_R/test", "RealBlur_J/test", "SIDD/val"]:
        expected += pairs(folder)
    expected += pairs("train", 4)
    for k, name in enumerate(("Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"), 1):
        expected += pairs(f"test/{name}", k)
    expected += [f"SIDD_Medium_Srgb/Data/000{k}_S6/000{k}_{s}_SRGB_010.PNG" for k in (1, 2) for s in ("GT", "NOISY")]
    expected += ["SIDD/test/ValidationNoisyBlocksSrgb.mat", "SIDD/test/ValidationGtBlocksSrgb.mat"]
    expected += ["DND/test/info.mat", *(f"DND/test/images_srgb/{k:04d}.mat" for k in range(1, 51))]
    expected += [f"train/DIV2K_BSD400/div2k-bsd400_{k}.png" for k in range(3)]
    expected += ["train/DIV2K_BSD400/.div2k-bsd400.complete", "Set11/a.tif", "Set11/b.tif"]
    expected += [f"BSD68/{k}.png" for k in range(3)]
    assert files(Path("Datasets")) == sorted(expected), "and no archive or part is left"
    weights = ["compressive_sensing/models/cs_ratio_10.pth", "restoration/Denoising/DGUNet.pth"]
    assert files(Path("checkpoints/authors")) == sorted([*weights, "restoration/Deraining/DGUNet_plus.pth"])
    assert Path("Datasets/GoPro/train/input/img1.png").read_text() == "train/input/img1.png"
    assert Path("Datasets/SIDD/val/target/img2.png").read_text() == "val/SIDD/target_crops/img2.png"
    printed = capsys.readouterr().out
    assert "gopro-test: 3 pairs in Datasets/GoPro/test" in printed
    assert "prepare_patches.py sidd --source Datasets/SIDD_Medium_Srgb/Data --out Datasets/SIDD/train" in printed
    assert len(drive.calls) == 15 and all(resume for _, _, resume in drive.calls)

    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    script.main(["all"])
    assert len(drive.calls) == 15
    assert capsys.readouterr().out.count(": already in ") == 15
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_fills_the_folders_that_the_configurations_name():
    filled = {f"Datasets/{folder}" for item in ITEMS.values() for folder in item.folders}
    named = set()
    for path in (ROOT / "configs").rglob("*.yaml"):
        training = yaml.safe_load(path.read_text()).get("TRAINING", {})
        named |= {training.get(key) for key in ("TRAIN_DIR", "VAL_DIR")}
    named = {folder for folder in named if folder and "demo" not in folder}
    assert len(named) >= 5
    # prepare_patches.py makes the first, make_demo_data.py the others
    by_hand = {"Datasets/SIDD/train", "Datasets/photo/train", "Datasets/photo/val"}
    assert named - filled == by_hand


def test_groups_and_list(drive, capsys):
    script.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ITEMS, "compressive_sensing", "all-test", "Datasets/GoPro/train"))
    sizes = {line.split()[0]: line for line in listed.splitlines()}
    assert all(f" {item.size} " in sizes[name] for name, item in ITEMS.items())
    script.main(["deraining", "rain13k-test", "--root", "elsewhere", "--keep_archives"])
    assert [id for id, _, _ in drive.calls] == [ITEMS["rain13k-train"].id, ITEMS["rain13k-test"].id]
    assert files(Path("elsewhere/downloads")) == ["rain13k-test.zip", "rain13k-train.zip"]
    script.main(["all-test"])
    tests = {"gopro-test", "hide", "realblur-r", "realblur-j", "rain13k-test", "sidd-test", "dnd", "set11-bsd68"}
    assert {id for id, _, _ in drive.calls[2:]} == {ITEMS[name].id for name in tests}
    assert "celeba" in fails("celeba") and "--list" in fails()


def test_weights_as_folder_or_single_file(drive):
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer)
    drive.serve("weights", {"Denoising.pth": b"1", "more/Deblurring.pth": b"2"})
    drive.serve("weights-cs", buffer.getvalue())  # a zip file, too, which must stay one
    script.main(["all-weights", "--weights_root", "w"])
    assert files(Path("w")) == [
        "compressive_sensing/weights-cs.pth",
        "restoration/Denoising.pth",
        "restoration/more/Deblurring.pth",
    ]
    assert torch.load("w/compressive_sensing/weights-cs.pth", weights_only=True) == {"state_dict": {}}


def test_tar(drive):
    Path("train/Rain13K/input").mkdir(parents=True)
    Path("train/Rain13K/target").mkdir()
    for name in pairs("train/Rain13K", 4):
        Path(name).write_text("x")
    drive.serve("rain13k-train", Path(shutil.make_archive("a", "gztar", base_dir="train")).read_bytes())
    script.main(["rain13k-train"])
    assert files(Path("Datasets")) == sorted(pairs("train", 4))


def test_google_refuses(drive, monkeypatch, capsys):
    by_hand = f"https://drive.google.com/open?id={ITEMS['hide'].id} in a browser, save the file as {{}}"
    archive = Path("Datasets/downloads/hide.zip")
    for refusal, reason in (
        (PAGE, "web page"),
        (RuntimeError("Too many users have viewed\n or downloaded this file"), "Too many users have viewed or"),
        (ConnectionError("no route to host"), "Google Drive"),
        (None, "no file"),
    ):
        drive.serve("hide", refusal)
        message = fails("hide")
        assert "hide" in message and reason in message and by_hand.format(archive) in message
        assert not archive.exists() and not Path("Datasets/HIDE").exists()

    calls = len(drive.calls)
    archive.write_bytes(pack(CONTENTS["hide"][0]))  # as told
    monkeypatch.setitem(sys.modules, "gdown", None)  # not even needed
    script.main(["hide"])
    assert len(drive.calls) == calls and "is there already" in capsys.readouterr().out
    assert len(files(Path("Datasets/HIDE/test"))) == 6 and not archive.exists()


def test_one_line_and_exit_status(drive, capsys):
    drive.serve("weights", RuntimeError("quota"))
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: script.main(["weights"]))
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and all(word in stderr for word in ("weights", "quota", "https://drive"))
    assert stderr.count("\n") == 1


def test_without_gdown(drive, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    message = fails("dnd")
    assert "pip install gdown" in message and "https://drive.google.com" in message


def test_disk_full(drive):
    drive.serve("dnd", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device"):  # as it is: no browser would help
        script.main(["dnd"])


def test_two_downloads_at_once_do_not_write_the_same_archive(drive):
    """The second, which finds the first at work, ends in a line."""
    told, whole = [], drive.download

    def download(**options):
        told.append(fails("gopro-test"))
        return whole(**options)

    sys.modules["gdown"].download = download
    script.main(["gopro-test"])
    assert len(told) == len(drive.calls) == 1 and str(Path("Datasets/downloads")) in told[0]
    assert files(Path("Datasets")) == sorted(f"GoPro/test/{name[2:]}" for name in pairs("."))


def test_interrupted_download_goes_on(drive):
    drive.serve("gopro-test", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        script.main(["gopro-test"])
    assert files(Path("Datasets")) == ["downloads/gopro-test.zipabcd.part"], "kept for gdown to resume"
    drive.serve("gopro-test", pack(CONTENTS["gopro-test"][0]))
    script.main(["gopro-test"])
    assert drive.calls[0] == drive.calls[1] == (ITEMS["gopro-test"].id, "Datasets/downloads/gopro-test.zip", True)
    assert len(files(Path("Datasets/GoPro/test"))) == 6


@pytest.mark.parametrize("name", ["gopro-train", "rain13k-test", "dnd", "div2k", "weights"])
@pytest.mark.parametrize("where", ["extract", "rename"])
def test_interrupted_unpacking_leaves_nothing_half_made(drive, monkeypatch, name, where):
    whole = {"extract": zipfile.ZipFile.extract, "rename": script.os.rename}[where]
    calls = []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == (2 if name in ("div2k", "rain13k-test") else 1):
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile if where == "extract" else script.os, where, stop)
        with pytest.raises(KeyboardInterrupt):
            script.main([name])
    left = [f for f in files(Path()) if "/downloads/" not in f]
    assert where == "rename" and name in ("div2k", "rain13k-test") or not left
    if name == "rain13k-test" and left:  # one of two renames: the only case that is not mended by itself
        assert "Datasets/test/Test100" in fails(name)
        shutil.rmtree("Datasets/test/Test100/input")
    script.main([name])
    assert len(drive.calls) == 1, "the archive was kept"
    script.main([name])
    assert len(drive.calls) == 1 and not [f for f in files(Path()) if ".part" in f or "/downloads/" in f]


def test_part_of_a_killed_run_is_replaced(drive):
    old = Path("Datasets/HIDE/.test.part/input/old.png")
    killed = Path("Datasets/HIDE/.hide.part/input/old.png")
    for path in (old, killed):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    script.main(["hide"])
    assert old.exists() and not killed.exists()


@pytest.mark.parametrize("content", [PAGE, b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"PK\3\4 cut", b"whatever", b""])
def test_not_an_archive(drive, content):
    archive = Path("Datasets/downloads/gopro-train.zip")
    archive.parent.mkdir(parents=True)
    archive.write_bytes(content)
    message = fails("gopro-train")
    assert str(archive) in message and ("web page" in message) == (content == PAGE)
    assert archive.read_bytes() == content, "it may be the user's"
    assert files(Path("Datasets")) == ["downloads/gopro-train.zip"]


def test_damaged_zip(drive):
    content = bytearray(pack(CONTENTS["hide"][0]))
    content[content.index(b"HIDE/input/img1.png", 40)] ^= 1  # in the stored file
    drive.serve("hide", bytes(content))
    assert "hide.zip" in fails("hide")
    assert files(Path("Datasets")) == ["downloads/hide.zip"]


@pytest.mark.parametrize("evil", ["../../evil.txt", "/evil.txt", "C:\\evil.txt", "a\\..\\..\\evil.txt"])
def test_zip_that_leaves_its_folder(drive, evil):
    """Its other files are unpacked, and nothing is written outside the folder."""
    Path("in/a").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("in/a")
        drive.serve("hide", pack(CONTENTS["hide"][0], extra=(evil,)))
        script.main(["hide"])
    assert files(Path()) == sorted(pairs("in/a/Datasets/HIDE/test")) and not Path("/evil.txt").exists()


@pytest.mark.parametrize("kind", ["path", "link"])
def test_tar_that_leaves_its_folder(drive, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        member = tarfile.TarInfo("../../evil.txt" if kind == "path" else "link")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        file.addfile(member)
    drive.serve("hide", buffer.getvalue())
    assert "hide.zip" in fails("hide")
    assert files(Path()) == ["Datasets/downloads/hide.zip"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gopro-test", pairs("test", 2), "gopro-test.zip/test has 2 pairs instead of 3"),
        ("gopro-test", pairs("test")[:-1], "test/input/img3.png has no partner of the same name"),
        ("gopro-test", ["test/a.png"], "gopro-test.zip has no folder that may be gopro-test's test"),
        ("gopro-test", pairs("a") + pairs("b"), "gopro-test.zip has no folder that may be"),
        ("gopro-test", pairs("a/test") + pairs("b/test"), "gopro-test.zip has more than one folder that may be"),
        ("rain13k-test", pairs("test/Test100", 1), "no folder that may be rain13k-test's Rain100H"),
        ("dnd", CONTENTS["dnd"][0][:-1], "DND has 50 files instead of 51"),
        ("sidd-train", CONTENTS["sidd-train"][0][:-1], "has no partner 0002_NOISY_SRGB_010.PNG"),
        ("weights", ["readme.txt"], "weights.zip has 0 files instead of some"),
        ("bsd400", CONTENTS["bsd400"][0][:-1], "BSD400 has 4 images instead of 5"),
    ],
)
def test_archive_with_other_content(drive, name, content, message):
    drive.serve(name, pack(content))
    told = fails(name)
    assert message in told and ".part" not in told
    assert f"downloads/{name}.zip and start again, or unpack it yourself to " in told
    assert [Path(f).name for f in files(Path())] == [f"{name}.zip"]


def test_named_folder_of_several(drive):
    drive.serve("gopro-test", pack(pairs("GoPro/train", 5) + pairs("GoPro/test")))
    script.main(["gopro-test"])
    assert len(files(Path("Datasets/GoPro/test"))) == 6


def test_rain13k_with_a_pair_less_is_accepted(drive, capsys):
    drive.serve("rain13k-train", pack(pairs("train")))
    for _ in range(2):
        script.main(["rain13k-train"])
        (warning,) = capsys.readouterr().err.splitlines()
        assert "rain13k-train has 3 pairs" in warning and "4" in warning
    assert len(drive.calls) == 1


def write(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("precious")


@pytest.mark.parametrize(
    "name, there, message",
    [
        (
            "gopro-test",
            pairs("Datasets/GoPro/test", 2),
            "test has 2 pairs instead of 3. Move Datasets/GoPro/test/input",
        ),
        ("gopro-test", ["Datasets/GoPro/test/input/a.png"], "no folder "),
        ("dnd", ["Datasets/DND/test/info.mat"], "has 1 files instead of 51. Move Datasets/DND/test away"),
        ("sidd-test", ["Datasets/SIDD/test/Idenoised.mat"], "has 0 files instead of 2"),
        ("div2k", ["Datasets/train/DIV2K_BSD400/0001.png"], "0001.png is of unknown origin"),
        ("weights", ["checkpoints/authors/restoration/notes.txt"], "Move checkpoints/authors/restoration away"),
        ("hide", ["Datasets/HIDE/test/input"], "hide is there but incomplete"),
    ],
)
def test_what_is_there_stays(drive, name, there, message):
    write(*there)
    assert message in fails("realblur-j", name)
    assert files(Path()) == sorted(there) and not drive.calls, "told before anything is downloaded"


def test_beside_what_is_there(drive):
    write(*pairs("Datasets/test/Rain100L"), "Datasets/train/DIV2K_BSD400/bsd400_1.jpg", "Datasets/GoPro/notes.txt")
    Path("Datasets/GoPro/test").mkdir()
    script.main(["rain13k-test", "rain13k-train", "gopro-test"])
    assert Path("Datasets/test/Rain100L/input/img1.png").read_text() == "precious"
    assert len(files(Path("Datasets/test/Test1200"))) == 10
    assert len(files(Path("Datasets/train"))) == 9 and len(files(Path("Datasets/GoPro"))) == 7


def test_images_are_counted_against_their_marker(drive):
    script.main(["bsd400", "div2k"])
    Path("Datasets/train/DIV2K_BSD400/div2k_0003.png").unlink()
    script.main(["bsd400", "div2k"])
    assert len(drive.calls) == 3 and Path("Datasets/train/DIV2K_BSD400/div2k_0003.png").exists()


def test_compressive_sensing_has_the_originals_images(drive):
    """Its archives may also be folders on the drive."""
    drive.serve("set11-bsd68", {f"Set/{name}": b"1" for name in ("Set11/a.tif", "Set11/b.tif", "BSD68/1.png")})
    assert "BSD68 has 1 images instead of 3" in fails("compressive_sensing")
    drive.serve("set11-bsd68", {name: b"1" for name in CONTENTS["set11-bsd68"][0]})
    shutil.rmtree("Datasets/downloads")
    script.main(["compressive_sensing"])
    assert len(files(Path("Datasets/train"))) == 4 and len(files(Path("Datasets/BSD68"))) == 3


def test_the_same_images_do_not_come_twice(drive):
    message = fails("div2k-bsd400", "bsd400")
    assert "div2k-bsd400" in message and " bsd400" in message
    script.main(["div2k"])
    message = fails("compressive_sensing")
    assert "of div2k," in message and "div2k-bsd400" in message
    shutil.rmtree("Datasets/train")
    script.main(["compressive_sensing"])
    message = fails("bsd400")
    assert "div2k-bsd400" in message and " bsd400" in message


def test_root_behind_a_link(drive):
    Path("disk").mkdir()
    Path("Datasets").mkdir()
    Path("Datasets/GoPro").symlink_to(Path("disk").resolve())
    script.main(["gopro-train"])
    assert files(Path("disk")) == sorted(pairs("train"))
