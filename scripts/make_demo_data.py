"""Make a small data set for one task, without any download.

    python scripts/make_demo_data.py --task denoising
    python scripts/make_demo_data.py --task denoising --noise gaussian --sigma 25 --out Datasets/demo/awgn25
    python scripts/make_demo_data.py --task denoising --noise photo --screens 40 --source my_photos --out Datasets/photo
    python scripts/make_demo_data.py --task deraining --copies 5 --out Datasets/demo/more_rain
    python scripts/make_demo_data.py --task deblurring --extent 0 15 --sharp 0.25 --source my_photos --out Datasets/blur

The clean images are photographs from the scikit-image package; ``--source`` and ``--test_source`` replace them by
yours. The degradation is synthetic and seeded by the image's name: the same command always writes the same files, and
an added image changes no others. Folders, as the tasks read them:

    denoising, deblurring    OUT/{train,val,test}/{input,target}/*.png
    deraining                OUT/{train,val}/{input,target}/*.png and OUT/test/DEMO/{input,target}/*.png
    compressive_sensing      OUT/{train,val,test}/*.png (clean; the loader does the sensing)

No photograph and no scene is in two splits. The degradations are in dgunet/data/synthesis.py.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import ROOT, Parser, UserError, at_least, command_imports, is_free, run_cli

with command_imports(__name__):
    import cv2
    import numpy as np

    from dgunet.data import synthesis
    from dgunet.data.pairs import images_by_name
    from dgunet.data.samples import SPLITS, SamplePhoto, sample_photos
    from dgunet.evaluation.metrics import evaluate_pair
    from dgunet.runtime.files import match_unicode_form, nfc

TASKS = ("denoising", "deraining", "deblurring", "compressive_sensing")
MANIFEST = "demo.json"
EXTENT = [5.0, 15.0]  # pixels
VERSION = 1  # to be raised when a change here changes the images, so that older folders are recognised


# -------------------------------------------------------------------------------------------------------- clean images


def folder_photos(folder: Path) -> list[SamplePhoto]:
    """The user's images in a folder (not below it), naturally sorted."""
    return [SamplePhoto(name, path) for name, path in images_by_name(folder).items()]


@dataclass(frozen=True)
class Screen:
    """A rendered screen: windows of text, boxes and curves, with the hard edges that photographs do not have."""

    name: str
    seed: int

    def load(self, height: int = 320, width: int = 480) -> np.ndarray:
        """(height, width, 3) uint8 RGB, the same for the same seed."""
        rng = np.random.default_rng(self.seed)
        from matplotlib import get_data_path

        fonts = sorted(Path(get_data_path(), "fonts/ttf").glob("DejaVuSans*.ttf"))
        from PIL import Image, ImageDraw, ImageFont

        dark = rng.random() < 0.3

        def colour(ink: bool) -> tuple[int, ...]:
            low, high = (0, 110) if ink != dark else (190, 256)
            shade = rng.integers(low, high, 3)
            return tuple(int(value) for value in (shade if rng.random() < 0.4 else shade[[0, 0, 0]]))

        screen = Image.new("RGB", (width, height), colour(ink=False))
        draw = ImageDraw.Draw(screen)
        for _ in range(rng.integers(2, 6)):  # windows
            left, top = int(rng.integers(-40, width - 80)), int(rng.integers(-30, height - 60))
            right, bottom = left + int(rng.integers(100, 360)), top + int(rng.integers(60, 260))
            paper, ink = colour(ink=False), colour(ink=True)
            draw.rectangle((left, top, right, bottom), fill=paper, outline=ink)
            if rng.random() < 0.25:  # a curve
                points = np.cumsum(rng.normal(0, 4, right - left)) + (top + bottom) / 2
                steps = zip(range(left, right), np.clip(points, top + 2, bottom - 2), strict=True)
                draw.line(list(steps), fill=colour(ink=True), width=int(rng.integers(1, 3)))
                continue
            size = int(rng.integers(9, 22))
            font = ImageFont.truetype(str(fonts[rng.integers(len(fonts))]), size)
            for line in range(top + 4, bottom - size, int(1.4 * size)):
                words = ("".join(map(chr, rng.integers(33, 127, rng.integers(2, 10)))) for _ in range(8))
                text = " ".join(words)[: max(1, int((right - left) / size * 1.6))]
                draw.text((left + 5, line), text, fill=ink, font=font)
        return np.array(screen)

    def digest(self) -> str:
        return f"screen {self.seed}"

    crop = short_side = None


def choose_photos(args) -> dict[str, list[SamplePhoto]]:
    """{"train": [SamplePhoto, ...], "val": ..., "test": ...}: embedded ones, or the user's where asked for."""
    photos = {}
    if args.source is None:
        photos["train"], photos["val"] = sample_photos("train"), sample_photos("val")
    else:
        own = folder_photos(args.source)
        if len(own) <= args.val_count:
            raise UserError(f"--source: {args.source} has {len(own)} images; add some, or choose a smaller --val_count")
        # The last by name: in a numbered series they are the least likely to show a training scene again.
        photos["train"], photos["val"] = own[: -args.val_count], own[-args.val_count :]
    for split, count, first in (("train", args.screens, 0), ("val", -(-args.screens // 10), 10**6)):
        photos[split] = photos[split] + [Screen(f"screen{k}", first + k) for k in range(1, count + 1)]
    own_test = args.test_source is not None
    photos["test"] = folder_photos(args.test_source) if own_test else sample_photos("test")
    return photos


def fingerprints(photos: dict[str, list[SamplePhoto]]) -> dict[str, dict[str, str]]:
    """{split: {name: which part of which file}}; a UserError if two splits share a file."""
    prints, split_of = {split: {} for split in SPLITS}, {}
    for split in SPLITS:
        for photo in photos[split]:
            digest = photo.digest()
            if split_of.setdefault(digest, split) != split:
                raise UserError(f"{photo.path} is in {split_of[digest]} and in {split}; splits need different images")
            prints[split][photo.name] = f"{digest} crop={photo.crop} short_side={photo.short_side}"
    return prints


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> the bytes of a PNG file, always the same for the same pixels."""
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # noise hardly compresses at any level
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), fast)[1].tobytes()


# ------------------------------------------------------------------------------------------------------------- writing


def make_degradation(args) -> synthesis.Degrade | None:
    """The task's function (image, rng) -> image; None for compressive sensing, where the loader measures."""
    gaussian = partial(synthesis.gaussian_noise, sigma=args.sigma)
    noises = {"sensor": synthesis.sensor_noise, "gaussian": gaussian, "photo": synthesis.photo_noise}
    blur = partial(synthesis.motion_blur, extent=args.extent, sharp=args.sharp)
    return {"denoising": noises.get(args.noise), "deblurring": blur, "deraining": synthesis.rain_streaks}.get(args.task)


def split_files(photos: list[SamplePhoto], split: str, args) -> Iterator[tuple[str, bytes, float | None]]:
    """Yield (relative path, PNG bytes, PSNR against the target or None) of every file of a split."""
    degradation = make_degradation(args)
    folder = "test/DEMO" if (args.task, split) == ("deraining", "test") else split
    for photo in photos:
        clean = photo.load()
        target = encode_png(clean)
        if degradation is None:
            yield f"{folder}/{photo.name}.png", target, None
            continue
        copies = args.copies if split == "train" else 1
        for copy in range(1, copies + 1):
            name = f"{photo.name}_{copy}.png" if split == "train" else f"{photo.name}.png"
            degraded = synthesis.degrade_image(clean, degradation, args.seed, name)
            yield f"{folder}/target/{name}", target, None
            yield f"{folder}/input/{name}", encode_png(degraded), evaluate_pair(degraded, clean, "train_rgb")[0]


def write_into(folder: Path, photos: dict[str, list[SamplePhoto]], manifest: dict, args) -> list[str]:
    """Write every split and the manifest into an empty folder; returns the report, one line per split."""
    report, checksums = [], {}
    for split in SPLITS:
        scores = []
        for relative, data, score in split_files(photos[split], split, args):
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            checksums[relative] = zlib.crc32(data)
            scores += [score] if score is not None else []
        line = f"  {split:5s} {len(photos[split])} clean images"
        different = [
            score for score in scores if math.isfinite(score)
        ]  # --noise photo and --sharp leave some as they are
        if scores:
            line += f", {len(scores)} pairs, input PSNR {np.mean(different or [math.inf]):.2f} dB"
        if len(different) < len(scores):
            line += f" without the {len(scores) - len(different)} that are not degraded"
        report.append(line)
    text = json.dumps({**manifest, "files": checksums}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return report


def write_all(out: Path, photos: dict[str, list[SamplePhoto]], manifest: dict, args) -> list[str]:
    """Write beside `out` and rename at the end: `out` is complete or not there."""
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        report = write_into(part, photos, manifest, args)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # only there if something failed
    return report


def check_existing(out: Path, manifest: dict) -> bool:
    """True if `out` holds exactly what would be written, False if it is free, otherwise a UserError."""
    if is_free(out):
        return False
    try:
        old = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        old_files, old_images = dict(old["files"]), old.get("images", old.get("pictures"))  # its name before 0.3
        unrecorded = {"--extent": EXTENT, "--screens": 0, "--sharp": 0}  # in older folders
        old_options = unrecorded | old["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out: {out} holds files that this script did not write; choose another --out") from None
    for option, value in manifest["options"].items():
        if old_options.get(option) != value:
            raise UserError(
                f"--out: {out} was made with {option} {old_options.get(option)}, not {value}; choose another"
            )
    if old_images != manifest["images"]:
        options = "--source, --test_source, --val_count, or another scikit-image"
        raise UserError(f"--out: {out} was made from other images ({options}); choose another --out")
    check_files(out, old_files)
    return True


def check_files(out: Path, checksums: dict[str, int]):
    """Raise a UserError unless `out` holds the manifest's files, unchanged, and no others but hidden ones.

    checksums: {path relative to `out`: CRC-32 of the file}.
    """
    present = {nfc(p.relative_to(out).as_posix()) for p in out.rglob("[!.]*") if p.is_file()} - {MANIFEST}
    checksums = {nfc(name): checksum for name, checksum in checksums.items()}
    for name in sorted(present - set(checksums)):
        raise UserError(f"--out: {out / name} was not written by this script; choose another --out")
    for name, checksum in checksums.items():
        if name not in present or zlib.crc32(match_unicode_form(out / name).read_bytes()) != checksum:
            happened = "changed" if name in present else "removed"
            raise UserError(f"--out: {out / name} was {happened}; choose another --out, or remove {out}")


# -------------------------------------------------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--out", type=Path, help="folder to write; default Datasets/demo/TASK in the repository")
    add("--source", type=Path, help="folder of your own clean images for train and val")
    add("--test_source", type=Path, help="folder of your own clean images for test")
    add("--val_count", type=at_least(1), help="how many of --source, the last by name, go to val; default 5")
    add("--copies", type=at_least(1), help="degraded versions of each training image; default 3")
    add("--noise", choices=("sensor", "gaussian", "photo"), help="kind of noise, denoising only; default sensor")
    screens = "rendered screens added to train, and a tenth as many to val; denoising and deblurring"
    add("--screens", type=at_least(0), help=screens)
    add("--sigma", type=float, help="of --noise gaussian, on the scale 0 to 255; default 25")
    add("--extent", type=float, nargs=2, metavar="PX", help="range of the blur, deblurring only; default 5 15")
    add("--sharp", type=float, metavar="SHARE", help="of the images that are left sharp, deblurring only; default 0")
    add("--seed", type=at_least(0), default=1234, help="default 1234")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """Refuse options that would be ignored or cannot work, then fill in the defaults that depend on other options."""
    tasks = dict.fromkeys(("noise", "sigma"), ["denoising"]) | dict.fromkeys(("extent", "sharp"), ["deblurring"])
    for option, own in (tasks | {"screens": ["denoising", "deblurring"]}).items():
        if getattr(args, option) is not None and args.task not in own:
            raise UserError(f"--{option} is for --task {' or '.join(own)}, not for {args.task}")
    if args.sigma is not None and args.noise != "gaussian":
        raise UserError("--sigma needs --noise gaussian")
    if args.task == "compressive_sensing" and args.copies is not None:
        raise UserError("--copies has no meaning for --task compressive_sensing, whose images stay clean")
    if args.val_count is not None and args.source is None:
        raise UserError("--val_count needs --source")
    if args.task == "denoising":
        args.noise = args.noise or "sensor"
    if args.noise == "gaussian":
        args.sigma = 25.0 if args.sigma is None else args.sigma
        if not 0 < args.sigma <= 255:
            raise UserError(f"--sigma must be above 0 and at most 255, not {args.sigma:g}")
    if args.task == "deblurring":
        args.extent = args.extent or EXTENT
        low, high = args.extent
        if not 0 <= low <= high < math.inf:
            raise UserError(f"--extent is a range of at least 0 pixels, not {low:g} {high:g}")
        args.sharp = args.sharp or 0.0
        if not 0 <= args.sharp <= 1:
            raise UserError(f"--sharp is a share from 0 to 1, not {args.sharp:g}")
    args.copies, args.val_count, args.screens = args.copies or 3, args.val_count or 5, args.screens or 0
    args.out = args.out or ROOT / "Datasets" / "demo" / args.task


def make_manifest(photos: dict[str, list[SamplePhoto]], args) -> dict:
    """What decides the content of every file; two runs with equal manifests write equal files."""
    options = {"version": VERSION, "--task": args.task}
    if args.task != "compressive_sensing":  # nothing is random there
        options |= {"--seed": args.seed, "--copies": args.copies}
    if args.task == "denoising":
        options |= {"--noise": args.noise, "--sigma": args.sigma, "--screens": args.screens}
    if args.task == "deblurring":
        options |= {"--extent": args.extent, "--sharp": args.sharp, "--screens": args.screens}
    return {"options": options, "images": fingerprints(photos)}


def main(argv=None):
    args = parse_args(argv)
    out = args.out.resolve()  # so that a link to a folder can be filled
    photos = choose_photos(args)
    manifest = make_manifest(photos, args)
    if check_existing(out, manifest):
        print(f"{out} is already complete; nothing to do")
        return
    report = write_all(out, photos, manifest, args)
    print(f"wrote {args.task} demo data to {out}", *report, sep="\n")


if __name__ == "__main__":
    run_cli(main)
