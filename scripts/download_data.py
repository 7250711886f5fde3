"""Download the published data sets and the authors' weights to where the tasks read them.

    python scripts/download_data.py --list                    # names, groups, sizes, and where each goes
    python scripts/download_data.py deraining                 # what a task trains and tests on
    python scripts/download_data.py gopro-test hide weights

What is complete is skipped, existing files are not overwritten, and an interrupted download is resumed. Archives are
kept in ROOT/downloads and removed once unpacked and checked. If Google refuses to serve one, fetch it with a browser,
put it there under the name that the error gives, and start again.
"""

import contextlib
import errno
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from common import Parser, UserError, command_imports, run_cli

with command_imports(__name__):
    from prepare_patches import sidd_pairs

    from dgunet.data.pairs import find_pairs
    from dgunet.runtime.distributed import lock_dir
    from dgunet.runtime.files import IMAGE_SUFFIXES
    from dgunet.runtime.progress import progress_bar

SIDES = {"input": ("input", "input_crops"), "target": ("target", "target_crops", "groundtruth", "gt")}
CS = "compressive_sensing"
UNITS = {
    "pairs": "pairs", "scenes": "pairs", "mat": "files", "images": "images", "set": "images", "weights": "files",
}  # fmt: skip
DISK_ERRORS = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS}  # a browser would not help


@dataclass(frozen=True)
class Download:
    """A file on Google Drive (for weights and compressive sensing, perhaps a folder), and its contents.

    ``folders`` maps each folder it fills, below --root (weights: below --weights_root), to the number of things in it,
    None where that is not known. Kinds: pairs (input/ and target/), scenes (SIDD-Medium's folders), mat (the
    ``files``), images (several downloads share a folder, so names get a prefix), set (images with a folder of their
    own), weights.
    """

    name: str
    group: str  # empty: in no group, only downloaded by its name
    id: str
    kind: str
    folders: dict[str, int | None]
    size: str = "?"  # about, unpacked
    files: tuple[str, ...] = ()
    exact: bool = True  # whether another number is an error, not a warning
    then: str = ""  # what to do next
    parts: tuple[str, ...] = ()  # other downloads that hold some of its images

    @property
    def names(self) -> list[str]:
        """Its name and its groups."""
        if not self.group:
            return [self.name]
        tests = ["all-test"] if self.kind == "set" or any("test" in folder for folder in self.folders) else []
        return [self.name, self.group, *tests, "all"]


RAIN = {"test/Test100": 100, "test/Rain100H": 100, "test/Rain100L": 100, "test/Test2800": 2800, "test/Test1200": 1200}
SIDD = ("ValidationNoisyBlocksSrgb.mat", "ValidationGtBlocksSrgb.mat")
DND = ("info.mat", *(f"images_srgb/{k:04d}.mat" for k in range(1, 51)))
CUT = "python scripts/prepare_patches.py sidd --source {root}/SIDD_Medium_Srgb/Data --out {root}/SIDD/train"
# fmt: off
# The ids are those of the Restormer family, whose archives have the layout that the original reads; for CS and the
# weights they are the original's own. Sizes are estimated from the number and the size of the images.
DOWNLOADS = [
    Download("gopro-train", "deblurring", "1zgALzrLCC_tcXKu_iHQTHukKUVT1aodI", "pairs", {"GoPro/train": 2103}, "4 GB"),
    Download("gopro-test", "deblurring", "1k6DTSHu4saUgrGTYkkZXTptILyG9RRll", "pairs", {"GoPro/test": 1111}, "2 GB"),
    Download("hide", "deblurring", "1XRomKYJF1H92g1EuD06pCQe4o6HlwB7A", "pairs", {"HIDE/test": 2025}, "4 GB"),
    Download("realblur-r", "deblurring", "1glgeWXCy7Y0qWDc0MXBTUlZYJf8984hS", "pairs", {"RealBlur_R/test": 980},
             "1 GB"),
    Download("realblur-j", "deblurring", "1Rb1DhhXmX7IXfilQ-zL9aGjQfAAvQTrW", "pairs", {"RealBlur_J/test": 980},
             "1 GB"),
    Download("rain13k-train", "deraining", "14BidJeG4nSNuFNFDf99K-7eErCq4i47t", "pairs", {"train": 13712}, "2 GB",
             exact=False),  # some copies have a pair less
    Download("rain13k-test", "deraining", "1P_-RAvltEoEhfT-9GrWRdpEi6NSswTs8", "pairs", RAIN, "1 GB"),
    Download("sidd-train", "denoising", "1UHjWZzLPGweA9ZczmV8lFSRcIxqiOVJw", "scenes",
             {"SIDD_Medium_Srgb/Data": None}, "12 GB", then=f"now cut it into patches: {CUT}"),
    Download("sidd-val", "denoising", "1Fw6Ey1R-nCHN9WEpxv0MnMqxij-ECQYJ", "pairs", {"SIDD/val": None}, "0.3 GB"),
    Download("sidd-test", "denoising", "11vfqV-lqousZTuAit1Qkqghiv_taY0KZ", "mat", {"SIDD/test": 2}, "0.5 GB", SIDD),
    Download("dnd", "denoising", "1CYCDhaVxYYcXhSfEVDUwkvJDtGxeQ10G", "mat", {"DND/test": 51}, "?", DND),
    Download("div2k-bsd400", CS, "1eW4eC3eazqRYnjXoIOXNX-xOYSwoIoHf", "images", {"train/DIV2K_BSD400": None}, "4 GB",
             parts=("bsd400", "div2k")),
    Download("set11-bsd68", CS, "11WXTqqD4cZtymJJ_WObYb2s1vv1Dlr-2", "set", {"Set11": 11, "BSD68": 68}, "10 MB"),
    Download("bsd400", "", "1idKFDkAHJGAFDn1OyXZxsTbOSBx9GS8N", "images", {"train/DIV2K_BSD400": 400}, "0.1 GB"),
    Download("div2k", "", "13wLWWXvFkuYYVZMMAYiMVdSA7iVEf2fM", "images", {"train/DIV2K_BSD400": None}, "4 GB"),
    Download("weights", "all-weights", "1bitvtmJAE1iKpFmdGx3OrN6Xti0JRPLc", "weights", {"restoration": None}, "1 GB"),
    Download("weights-cs", "all-weights", "1euV8SnXHuYswwbm9FaV1y5RQRLd58ou_", "weights", {CS: None}, "0.2 GB"),
]
# fmt: on


def images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES)


def side(folder: Path, name: str) -> Path | None:
    """The folder of inputs or targets in ``folder``, whatever the publisher calls it."""
    return next((folder / alias for alias in SIDES[name] if (folder / alias).is_dir()), None)


def own_images(item: Download, folder: Path) -> int:
    return sum(path.name.startswith(f"{item.name}_") for path in images_in(folder))


def marker(item: Download, folder: Path) -> Path:
    return folder / f".{item.name}.complete"  # holds the number of images; several downloads share their folder


def check(item: Download, folder: Path, expected: int | None) -> int:
    """The number of things in a folder; a ``UserError`` if it is not the expected one."""
    count = {
        "pairs": lambda: len(find_pairs(folder, check_sizes=False)),
        "scenes": lambda: len(sidd_pairs(folder)),
        "mat": lambda: sum((folder / name).is_file() for name in item.files),
        "images": lambda: own_images(item, folder),
        "set": lambda: len(images_in(folder)),
        "weights": lambda: sum(path.suffix in {".pth", ".pt", ".pkl"} for path in folder.rglob("*")),
    }
    found = count[item.kind]()
    if found == 0 or (item.exact and expected not in (None, found)):
        raise UserError(f"{folder} has {found} {UNITS[item.kind]} instead of {expected or 'some'}")
    if expected not in (None, found):
        print(f"warning: {item.name} has {found} {UNITS[item.kind]}, expected were {expected}", file=sys.stderr)
    return found


def in_place(item: Download, folder: Path, expected: int | None) -> bool:
    """Whether a folder is complete; a ``UserError`` if it is neither that nor empty."""
    if item.kind == "images":
        note = marker(item, folder)
        done = note.exists() and note.read_text() == str(own_images(item, folder))
        ours = tuple(f"{other.name}_" for other in DOWNLOADS if other.kind == "images")
        if not done and (strange := [path for path in images_in(folder) if not path.name.startswith(ours)]):
            raise UserError(f"{strange[0]} is of unknown origin; move the images away, or train on them as they are")
        for other in DOWNLOADS:  # duplicates would count twice in training
            if (other.name in item.parts or item.name in other.parts) and not done and own_images(other, folder):
                raise UserError(f"{folder} has images of {other.name}, as {item.name} has; keep to one of them")
        return done
    # Datasets/train holds the data of two tasks: of pairs, only their own folders matter.
    own = [folder / name for name in SIDES] if item.kind == "pairs" else [folder]
    if not any(path.exists() and (not path.is_dir() or any(path.iterdir())) for path in own):
        return False
    try:
        check(item, folder, expected)
    except UserError as error:
        away = " and ".join(map(str, own))
        raise UserError(f"{item.name} is there but incomplete: {error}. Move {away} away, and start again") from error
    return True


def web_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def fetch(item: Download, downloads: Path) -> Path:
    """The archive, downloaded unless it exists; of weights, perhaps a folder of files."""
    archive = downloads / f"{item.name}.zip"  # whatever its format
    if archive.exists():
        print(f"{item.name}: {archive} is there already")
        return archive
    url = f"https://drive.google.com/open?id={item.id}"  # of a file or a folder
    by_hand = f"open {url} in a browser, save the file as {archive}, and start again"
    try:
        import gdown
    except ImportError as error:
        raise UserError(f"downloading needs gdown: pip install gdown (or {by_hand})") from error
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"{item.name}: downloading {url}", flush=True)
    ways, reasons = [(gdown.download, archive)], []
    if item.group in (CS, "all-weights"):  # the id may be of a folder
        ways.insert(0, (gdown.download_folder, archive.with_suffix("")))
    for download, output in ways:
        try:
            if not download(id=item.id, output=str(output), resume=True):
                raise ValueError("no file was sent")
            if output.is_file() and web_page(output):
                output.unlink()  # the next run would mistake it for the archive
                raise ValueError("Google sent a web page, not the file")
            return output
        except Exception as error:  # of gdown, requests, urllib3, ...
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            offline = "ConnectionError" in type(error).__name__  # its message has five lines
            reasons.append("no connection to Google Drive" if offline else " ".join(str(error).split())[:200])
    raise UserError(f"cannot download {item.name} ({'; '.join(dict.fromkeys(reasons))}); {by_hand}")


def is_checkpoint(path: Path) -> bool:
    """Whether this is a PyTorch file: a pickle, or a zip file that contains one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") for name in file.namelist())
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def unpack(item: Download, archive: Path, folder: Path):
    """Unpack into a new folder; nothing is written outside it."""
    if archive.is_dir():
        shutil.copytree(archive, folder)
        return
    folder.mkdir(parents=True)
    retry = "remove it and start again, or unpack it yourself and put a zip of its contents in its place"
    try:
        if item.kind == "weights" and is_checkpoint(archive):
            shutil.copyfile(archive, folder / f"{item.name}.pth")
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                names = [name for name in file.namelist() if not name.startswith("__MACOSX/")]
                for name in progress_bar(names, desc=item.name, unit="file"):
                    file.extract(name, folder)  # never outside it: without drive, root and ".."
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
        else:
            what = "a web page" if web_page(archive) else "incomplete, or neither a zip nor a tar file"
            raise UserError(f"{archive} is {what}; {retry}")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive} cannot be unpacked, it may be damaged ({error}); {retry}") from error


def holds(item: Download, folder: Path) -> bool:
    """Whether the item's files are directly in this folder."""
    if item.kind == "pairs":
        return all(side(folder, name) for name in SIDES)
    if item.kind == "scenes":
        return any("_SRGB_" in path.name.upper() for path in folder.glob("[!.]*/[!.]*"))
    if item.kind == "mat":
        return (folder / item.files[0]).is_file()
    return bool(images_in(folder))


def locate(item: Download, tree: Path, folder: Path) -> Path:
    """Find the contents of ``folder`` in the unpacked ``tree``, however nested, and give them our names."""
    if item.kind == "weights":
        return tree
    found = [path for path in [tree, *sorted(tree.rglob("*"))] if path.is_dir() and holds(item, path)]
    if len(item.folders) > 1 or len(found) > 1:
        found = [path for path in found if path.name.lower() == folder.name.lower()]
    if len(found) != 1:
        what = "more than one folder" if found else "no folder"
        raise UserError(f"{tree} has {what} that may be {item.name}'s {folder.name}")
    if item.kind == "pairs":
        for name in SIDES:
            side(found[0], name).rename(found[0] / name)
    elif item.kind == "images":
        for path in images_in(found[0]):
            path.rename(path.with_name(f"{item.name}_{path.name}"))
    return found[0]


def put(item: Download, source: Path, folder: Path):
    """Move complete data into place, by renaming within the file system."""
    if item.kind not in ("pairs", "images"):
        os.rename(source, folder)  # fails unless that is empty or not there
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in [source / name for name in SIDES] if item.kind == "pairs" else images_in(source):
        if item.kind == "pairs" or not (folder / path.name).exists():  # there if a run was interrupted here
            os.rename(path, folder / path.name)
    if item.kind == "images":
        marker(item, folder).write_text(str(own_images(item, folder)))


def install(item: Download, folders: dict[Path, int | None], downloads: Path, keep_archives: bool):
    archive = fetch(item, downloads)
    # Beside the target of a link, not beside the link.
    part = next(iter(folders)).resolve().with_name(f".{item.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    try:
        unpack(item, archive, part)
        try:
            sources = {folder: locate(item, part, folder) for folder in folders}
            counts = {folder: check(item, source, folders[folder]) for folder, source in sources.items()}
        except UserError as error:
            message = str(error).replace(str(part), str(archive))
            by_hand = f"unpack it yourself to {', '.join(map(str, folders))}"
            raise UserError(f"{message}. Remove {archive} and start again, or {by_hand}") from error
        for folder, source in sources.items():
            put(item, source, folder.resolve())
            print(f"{item.name}: {counts[folder]} {UNITS[item.kind]} in {folder}")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if not keep_archives:
        shutil.rmtree(archive) if archive.is_dir() else archive.unlink()


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="data sets or groups of them, see --list")
    add("--list", action="store_true", help="list all data sets and their folders")
    add("--root", type=Path, default=Path("Datasets"), help="folder for data (default: %(default)s)")
    add("--weights_root", type=Path, default=Path("checkpoints/authors"), help="for weights (default: %(default)s)")
    add("--keep_archives", action="store_true", help="keep the archives")
    args = parser.parse_args(argv)
    for name in args.names:
        if not any(name in item.names for item in DOWNLOADS):
            raise UserError(f"nothing is named {name} (see --list)")
    if not args.names and not args.list:
        raise UserError("name what to download (see --list)")
    return args


def main(argv=None):
    args, todo = parse_args(argv), []
    for item in DOWNLOADS:  # all are checked before the first download
        if not args.list and not set(item.names) & set(args.names):
            continue
        base = args.weights_root if item.kind == "weights" else args.root
        folders = {base / folder: expected for folder, expected in item.folders.items()}
        where = ", ".join(map(str, folders))
        if args.list:
            amount = " + ".join(str(n or "?") for n in folders.values())
            print(f"{item.name:14}{', '.join(item.names[1:]):38}{item.size:8}{amount} {UNITS[item.kind]} in {where}")
        elif missing := {folder: n for folder, n in folders.items() if not in_place(item, folder, n)}:
            todo.append((item, missing, base / "downloads"))
        else:
            print(f"{item.name}: already in {where}")
    if args.list:
        print("Sizes are estimates. bsd400 and div2k are in div2k-bsd400, where that is too much or not served.")
    for item, *_ in todo:
        for other, *_ in todo:
            if other.name in item.parts:
                raise UserError(f"{item.name} has the images of {other.name} too; keep to one of them")
    for item, missing, downloads in todo:
        downloads.mkdir(parents=True, exist_ok=True)
        with lock_dir(downloads, "download", "wait until it ends"):  # two would write the same unfinished files
            try:
                install(item, missing, downloads, args.keep_archives)
            finally:
                with contextlib.suppress(OSError):  # on Windows an open file cannot be removed
                    (downloads / ".lock").unlink()
        if item.then:
            print(f"{item.name}: {item.then.format(root=args.root)}")


if __name__ == "__main__":
    run_cli(main)
