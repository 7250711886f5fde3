"""Make a small data set for one task, without any download.

    python scripts/make_demo_data.py --task denoising
    python scripts/make_demo_data.py --task denoising --noise gaussian --sigma 25 --out Datasets/demo/awgn25
    python scripts/make_demo_data.py --task deraining --copies 5 --out Datasets/demo/more_rain
    python scripts/make_demo_data.py --task deblurring --source my_sharp_photos --out Datasets/my_blur

The clean pictures are photographs that ship inside the scikit-image package; ``--source`` and
``--test_source`` put your own in their place. The degradation is synthetic and seeded by picture name, so the
same command always gives the same files and adding a picture changes no other. Folders, as the task's own
loader expects them:

    denoising, deblurring    OUT/{train,val,test}/{input,target}/*.png
    deraining                OUT/{train,val}/{input,target}/*.png and OUT/test/DEMO/{input,target}/*.png
    compressive_sensing      OUT/{train,val,test}/*.png (clean; the loader does the sensing)

No photograph and no scene is in two splits. The degradations are those of dgunet/synthesis.py.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from natsort import natsorted

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dgunet.errors import UserError, optional, run_cli  # noqa: E402
from dgunet.files import open_file  # noqa: E402
from dgunet.synthesis import gaussian_noise, motion_blur, rain_streaks, sensor_noise  # noqa: E402

cv2 = optional("cv2")

TASKS = ("denoising", "deraining", "deblurring", "compressive_sensing")
SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MANIFEST = "demo.json"
VERSION = 1  # raise it when a change here changes the pictures, so that older folders are recognised as such
MIN_SIDE = 32  # pixels; anything smaller is a thumbnail or an icon, not something to train on


# ------------------------------------------------------------------------------------------------------------
# Clean pictures
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A clean picture: where it is and which part of it is used.

    name: stem of the file to be written; crop: (top, left, height, width) in pixels or None for the whole;
    short_side: size the shorter side is reduced to, or None to keep it.
    """

    name: str
    path: Path
    crop: tuple | None = None
    short_side: int | None = None

    def load(self):
        """(H, W, 3) uint8 RGB; a grey picture gets three equal channels."""
        image = read_rgb(self.path)
        if self.crop:
            top, left, height, width = self.crop
            image = image[top : top + height, left : left + width]
        if self.short_side:
            scale = self.short_side / min(image.shape[:2])
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        return image

    def digest(self):
        """Hexadecimal digest of the file, the same for two crops of it."""
        with open_file(self.path) as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]


# What scikit-image carries inside its package, less what is no photograph (text, logos, drawings,
# chessboards) or no sharp one: (file, crop, short side). The two motorcycles are one scene seen by two
# cameras and stay together. The retina's crop leaves out the black frame; reducing the two large ones
# removes their JPEG blocks.
EMBEDDED = {
    "train": {
        "brick": ("brick.png", None, None),
        "coins": ("coins.png", None, None),
        "grass": ("grass.png", None, None),
        "gravel": ("gravel.png", None, None),
        "hubble": ("hubble_deep_field.jpg", None, 512),
        "moon": ("moon.png", None, None),
        "motorcycle_left": ("motorcycle_left.png", None, None),
        "motorcycle_right": ("motorcycle_right.png", None, None),
        "retina": ("retina.jpg", (206, 206, 1000, 1000), 512),
        "rocket": ("rocket.jpg", None, None),
        "tissue": ("ihc.png", None, None),
    },
    "val": {
        "camera_coat": ("camera.png", (256, 0, 256, 256), None),
        "camera_face": ("camera.png", (0, 128, 256, 256), None),
        "camera_tripod": ("camera.png", (256, 256, 256, 256), None),
    },
    "test": {
        "astronaut": ("astronaut.png", None, None),
        "cat": ("chelsea.png", None, None),
        "coffee": ("coffee.png", None, None),
    },
}


def embedded_photos(split):
    """The photographs of one split that ship with scikit-image, as a list of :class:`Photo`."""
    spec = importlib.util.find_spec("skimage")  # its files only; skimage.data itself may try to download
    if spec is None:
        raise UserError(
            "the built-in photographs come with scikit-image: pip install scikit-image, or give --source and "
            "--test_source"
        )
    folder = Path(spec.origin).parent / "data"
    photos = [Photo(name, folder / file, crop, side) for name, (file, crop, side) in EMBEDDED[split].items()]
    for photo in photos:
        if not photo.path.is_file():
            raise UserError(
                f"this scikit-image has no {photo.path.name} in {folder}: pip install -U scikit-image, or "
                "give --source and --test_source"
            )
    return photos


def folder_photos(folder, option):
    """The user's pictures in a folder (not below it), naturally sorted, as a list of :class:`Photo`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--{option}: there is no folder {folder}")
    files = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    paths = natsorted(files, key=str)
    if not paths:
        raise UserError(f"--{option}: {folder} holds no picture ({', '.join(SUFFIXES)})")
    seen = {}
    for path in paths:
        if path.stem in seen:
            twins = f"{seen[path.stem].name} and {path.name}"
            raise UserError(f"--{option}: {twins} in {folder} share a name; rename one of them")
        seen[path.stem] = path
    return [Photo(path.stem, path) for path in paths]


def choose_photos(args):
    """{"train": [Photo, ...], "val": ..., "test": ...}: embedded ones, or the user's where asked for."""
    photos = {}
    if args.source is None:
        photos["train"], photos["val"] = embedded_photos("train"), embedded_photos("val")
    else:
        own = folder_photos(args.source, "source")
        if len(own) <= args.val_count:
            raise UserError(
                f"--source: {args.source} holds {len(own)} pictures, of which {args.val_count} are held out "
                "for validation; give more pictures or a smaller --val_count"
            )
        # The last by name: in a numbered series they are the least likely to show a training scene again.
        photos["train"], photos["val"] = own[: -args.val_count], own[-args.val_count :]
    own_test = args.test_source is not None
    photos["test"] = folder_photos(args.test_source, "test_source") if own_test else embedded_photos("test")
    return photos


def fingerprints(photos):
    """{split: {name: which part of which file}}; a UserError if two splits share a file."""
    prints, split_of = {}, {}
    for split in SPLITS:
        prints[split] = {}
        for photo in photos[split]:
            digest = photo.digest()
            if split_of.setdefault(digest, split) != split:
                both = f"both in {split_of[digest]} and in {split}"
                raise UserError(f"{photo.path} is {both}; the splits need different pictures")
            prints[split][photo.name] = f"{digest} crop={photo.crop} short_side={photo.short_side}"
    return prints


def read_rgb(path):
    """An 8-bit picture as (H, W, 3) uint8 RGB; transparency is dropped, the camera's orientation applied."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:  # an empty file, or an absurd size in the header
        image = None
    if image is None:
        raise UserError(f"{path} is not a picture that can be read; repair or remove it")
    if image.dtype != np.uint8:
        raise UserError(f"{path} is not an 8-bit picture ({image.dtype}); convert it to 8 bits per channel")
    if min(image.shape[:2]) < MIN_SIDE:
        raise UserError(
            f"{path} has {image.shape[1]}x{image.shape[0]} pixels, less than {MIN_SIDE}x{MIN_SIDE}; remove it"
        )
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)


def encode_png(image):
    """(H, W, 3) uint8 RGB -> the bytes of a PNG file, always the same for the same pixels."""
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # noise hardly compresses at any level
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), fast)
    if not done:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def psnr(a, b):
    """PSNR in dB of two uint8 pictures of the same shape, over all channels."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------


def make_degradation(args) -> Callable | None:
    """The function (image, rng) -> image of the task; None where the loader does it (compressive sensing)."""
    if args.task == "denoising":
        return sensor_noise if args.noise == "sensor" else partial(gaussian_noise, sigma=args.sigma)
    return {"deraining": rain_streaks, "deblurring": motion_blur, "compressive_sensing": None}[args.task]


def degrade(clean, degradation, seed, name):
    """Apply a degradation to (H, W, 3) uint8 RGB, with a random stream of its own for this file name."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.round(degradation(clean.astype(np.float32) / 255, rng) * 255).astype(np.uint8)


def split_files(photos, split, args):
    """Yield (relative path, PNG bytes, PSNR against the target or None) for every file of a split."""
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
            degraded = degrade(clean, degradation, args.seed, name)
            yield f"{folder}/target/{name}", target, None
            yield f"{folder}/input/{name}", encode_png(degraded), psnr(degraded, clean)


def write_into(folder, photos, manifest, args):
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
        line = f"  {split:5s} {len(photos[split])} clean pictures"
        report.append(f"{line}, {len(scores)} pairs, input PSNR {np.mean(scores):.2f} dB" if scores else line)
    text = json.dumps({**manifest, "files": checksums}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return report


def write_all(out, photos, manifest, args):
    """Write beside `out` and rename at the end: whatever happens, `out` is complete or not there."""
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        report = write_into(part, photos, manifest, args)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # only there if something failed
    return report


def check_existing(out, manifest):
    """True if `out` holds exactly what would be written, False if free, a UserError if anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"--out: {out} is a file; choose another --out")
    if not any(out.iterdir()):
        return False
    try:
        old = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        old_files, old_options, old_pictures = dict(old["files"]), dict(old["options"]), old["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        foreign = f"--out: {out} holds files that this script did not write"
        raise UserError(f"{foreign}; choose another --out") from None
    for option, value in manifest["options"].items():
        if old_options.get(option) != value:
            raise UserError(
                f"--out: {out} was made with {option} {old_options.get(option)} and now it is {value}; "
                f"choose another --out, or the former {option}"
            )
    if old_pictures != manifest["pictures"]:
        raise UserError(
            f"--out: {out} was made from other pictures (--source, --test_source, --val_count, or another "
            "scikit-image); choose another --out"
        )
    check_files(out, old_files)
    return True


def check_files(out, checksums):
    """Raise a UserError unless `out` holds the manifest's files, unchanged, and no others but hidden ones.

    checksums: {path relative to `out`: CRC-32 of the file}.
    """
    present = {p.relative_to(out).as_posix() for p in out.rglob("[!.]*") if p.is_file()} - {MANIFEST}
    for name in sorted(present - set(checksums)):
        raise UserError(f"--out: {out / name} was not written by this script; choose another --out")
    for name, checksum in checksums.items():
        if name not in present or zlib.crc32((out / name).read_bytes()) != checksum:
            happened = "changed" if name in present else "removed"
            raise UserError(f"--out: {out / name} was {happened}; choose another --out, or remove {out}")


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the whole usage
        raise UserError(f"{message} (see --help)")


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--out", type=Path, help="folder to write; default Datasets/demo/TASK in the repository")
    add("--source", type=Path, help="folder of your own clean pictures for train and val")
    add("--test_source", type=Path, help="folder of your own clean pictures for test")
    add("--val_count", type=int, help="how many of --source, the last by name, go to val; default 5")
    add("--copies", type=int, help="degraded versions of each training picture; default 3")
    add("--noise", choices=("sensor", "gaussian"), help="kind of noise, denoising only; default sensor")
    add("--sigma", type=float, help="of --noise gaussian, on the scale 0 to 255; default 25")
    add("--seed", type=int, default=1234, help="default 1234")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """Refuse what would be ignored or cannot work, then fill in the defaults that depend on other options."""
    if args.task != "denoising" and (args.noise is not None or args.sigma is not None):
        raise UserError(f"--noise and --sigma are for --task denoising, not for {args.task}")
    if args.sigma is not None and args.noise != "gaussian":
        raise UserError("--sigma needs --noise gaussian")
    if args.task == "compressive_sensing" and args.copies is not None:
        raise UserError("--copies has no meaning for --task compressive_sensing, whose pictures stay clean")
    if args.val_count is not None and args.source is None:
        raise UserError("--val_count needs --source")
    if args.task == "denoising":
        args.noise = args.noise or "sensor"
    if args.noise == "gaussian" and args.sigma is None:
        args.sigma = 25.0
    args.copies = 3 if args.copies is None else args.copies
    args.val_count = 5 if args.val_count is None else args.val_count
    args.out = args.out or ROOT / "Datasets" / "demo" / args.task
    if args.sigma is not None and not 0 < args.sigma <= 255:
        raise UserError(f"--sigma must be above 0 and at most 255, not {args.sigma:g}")
    for option in ("copies", "val_count"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be at least 1, not {getattr(args, option)}")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, not {args.seed}")


def make_manifest(photos, args):
    """What decides the content of every file; two runs with equal manifests write equal files."""
    options = {"version": VERSION, "--task": args.task}
    if args.task != "compressive_sensing":  # nothing is random there
        options |= {"--seed": args.seed, "--copies": args.copies}
    if args.task == "denoising":
        options |= {"--noise": args.noise, "--sigma": args.sigma}
    return {"options": options, "pictures": fingerprints(photos)}


def main(argv=None):
    args = parse_args(argv)
    try:
        make_demo_data(args)
    except OSError as error:  # no permission, disk full, ...
        raise UserError(f"{error.filename or args.out}: {error.strerror}") from None


def make_demo_data(args):
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
