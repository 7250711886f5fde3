"""Cut large image pairs into patches, which training reads many times faster than whole images.

    python scripts/prepare_patches.py sidd --source SIDD_Medium_Srgb/Data --out Datasets/SIDD/train
    python scripts/prepare_patches.py gopro --source Datasets/GoPro/train --out Datasets/GoPro/train_patches
    python scripts/prepare_patches.py rain --source Datasets/train --out Datasets/train_patches

sidd takes patches at random positions from one folder per scene, the layout of SIDD-Medium. gopro and rain take a
regular grid from SOURCE/input and SOURCE/target; they differ only in their defaults. In both cases the patches of one
name in OUT/input and OUT/target show the same place.

The positions in an image depend only on --seed and on its name: the same command always writes the same files, and
an added image changes no others. OUT must be new or empty; nothing is deleted or overwritten.
"""

import os
import re
import shutil
import signal
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import Parser, UserError, at_least, command_imports, is_free, run_cli

with command_imports(__name__):
    import cv2
    import numpy as np
    from natsort import natsorted

    from dgunet.data.images import read_image, write_image
    from dgunet.data.pairs import Pair, find_pairs, index_by_name, pair_size, report_skipped_files
    from dgunet.runtime.errors import describe_error
    from dgunet.runtime.files import IMAGE_SUFFIXES, nfc
    from dgunet.runtime.progress import progress_bar


SIDD_NAME = re.compile(r"(?!\.)(?:.*_)?(NOISY|GT)_SRGB_(\w+)", re.IGNORECASE)
# Training crops are 256 pixels wide: with an overlap of 256, every crop of the whole image lies inside a patch.
GRIDS = {
    "gopro": {"size": 512, "overlap": 256, "max_side": 800},  # 1280x720 images become 4 x 2 patches
    "rain": {"size": 512, "overlap": 256, "max_side": 640},  # most of Rain13K is smaller and stays whole
}

Box = tuple[int, int, int, int]  # top, left, height, width


class Cut(NamedTuple):
    """A pair of images and its patches: [(file name without suffix, box), ...]."""

    pair: Pair
    patches: list[tuple[str, Box]]


# --------------------------------------------------------------------------------------------------------- what to cut


def sidd_pairs(source: Path) -> list[Pair]:
    """The pairs ``NNNN_NOISY_SRGB_010.PNG``, ``NNNN_GT_SRGB_010.PNG`` in the folders of ``source``, one per scene."""
    hint = "--source is the folder that holds one folder per scene, in SIDD_Medium_Srgb the one named Data"
    if not source.is_dir():
        raise UserError(f"no folder {source}; {hint}")
    scenes = natsorted((p for p in source.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: p.name)
    if not scenes:
        raise UserError(f"no folders in {source}; {hint}")
    pairs = []
    for scene in scenes:
        there = sorted(path for path in scene.iterdir() if not path.name.startswith("."))
        found = {path: SIDD_NAME.fullmatch(path.stem) for path in there if path.suffix.lower() in IMAGE_SUFFIXES}
        sides = {
            side: index_by_name((match[2], path) for path, match in found.items() if match and match[1].upper() == side)
            for side in ("NOISY", "GT")
        }
        if not any(sides.values()):
            raise UserError(f"no *_NOISY_SRGB_*.PNG in {scene}; complete or move this folder ({hint})")
        report_skipped_files(scene, [path for path in there if not found.get(path)])
        for have, lack in (("NOISY", "GT"), ("GT", "NOISY")):
            for number in natsorted(sides[have].keys() - sides[lack].keys()):
                path = sides[have][number]
                partner = re.sub(f"{have}(?=_SRGB)", lack, path.name, flags=re.IGNORECASE)
                raise UserError(f"{path} has no partner {partner} beside it; add or remove it")
        pairs += [Pair(f"{nfc(scene.name)}_{n}", sides["NOISY"][n], sides["GT"][n]) for n in natsorted(sides["NOISY"])]
    return pairs


def random_boxes(height: int, width: int, size: int, count: int, rng: np.random.Generator) -> list[Box]:
    """``count`` squares at random positions of an image; the first ones do not depend on ``count``."""
    draw = [rng.integers([height - size + 1, width - size + 1]) for _ in range(count)]
    return [(int(top), int(left), size, size) for top, left in draw]


def grid_boxes(height: int, width: int, size: int, overlap: int, max_side: int) -> list[Box]:
    """Overlapping squares that cover an image; the last ones end at its border.

    An image with no side above ``max_side`` is one box; a side shorter than ``size`` is not cut.
    """
    if max(height, width) <= max_side:
        return [(0, 0, height, width)]

    def starts(length):
        return [*range(0, length - size, size - overlap), length - size] if length > size else [0]

    return [(top, left, min(size, height), min(size, width)) for top in starts(height) for left in starts(width)]


def plan_boxes(args, pair: Pair, height: int, width: int) -> list[Box]:
    if args.task != "sidd":
        return grid_boxes(height, width, args.size, args.overlap, args.max_side)
    if min(height, width) < args.size:
        raise UserError(f"{pair.input} is {width}x{height}, smaller than a patch; choose a --size below {args.size}")
    rng = np.random.default_rng([args.seed, zlib.crc32(pair.name.encode())])
    return random_boxes(height, width, args.size, args.patches, rng)


def plan(args) -> list[Cut]:
    """The patches of all pairs, whose sizes are checked here."""
    pairs = sidd_pairs(args.source) if args.task == "sidd" else find_pairs(args.source, check_sizes=False)
    cuts, owner = [], {}
    with ThreadPoolExecutor(16) as pool:
        for pair, (height, width) in zip(pairs, pool.map(pair_size, pairs), strict=True):
            boxes = plan_boxes(args, pair, height, width)
            digits = len(str(len(boxes)))
            names = [f"{pair.name}_{k:0{digits}d}" for k in range(1, len(boxes) + 1)]
            if boxes == [(0, 0, height, width)]:
                names = [pair.name]  # the whole image keeps its name
            for name in names:
                if owner.setdefault(name, pair) is not pair:
                    raise UserError(f"{owner[name].input} and {pair.input} both give a patch {name}.png; rename one")
            cuts.append(Cut(pair, list(zip(names, boxes, strict=True))))
    return cuts


def estimate_bytes(cuts: list[Cut], samples: int = 3) -> int:
    """An estimate of the bytes to be written, from a patch of a few images."""
    pixels, encoded = 0, 0
    for k in np.linspace(0, len(cuts) - 1, min(samples, len(cuts))).round().astype(int):
        pair, [(_, (top, left, height, width)), *_] = cuts[k]
        for path in (pair.input, pair.target):
            encoded += cv2.imencode(".png", read_image(path)[top : top + height, left : left + width])[1].size
            pixels += height * width
    total = 2 * sum(height * width for cut in cuts for _, (_, _, height, width) in cut.patches)
    return total * encoded // pixels


# ------------------------------------------------------------------------------------------------------------- cutting


def write_patches(cut: Cut, folder: Path) -> int:
    """Write the patches of one pair; returns the bytes written."""
    written = 0
    for side, path in (("input", cut.pair.input), ("target", cut.pair.target)):
        image = read_image(path)
        for name, (top, left, height, width) in cut.patches:
            file = folder / side / f"{name}.png"
            # OpenCV's default PNG compression: levels 1 to 3 save 2 to 20 % of the space, take two to three times as
            # long to write, and do not read faster.
            write_image(file, image[top : top + height, left : left + width])
            written += file.stat().st_size
    return written


def start_worker():
    cv2.setNumThreads(0)  # the processes share the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C


def write_all(cuts: list[Cut], out: Path, part: Path, workers: int) -> int:
    """Write to ``part`` and rename it to ``out`` at the end, which is so complete or not there; the bytes written."""
    part.mkdir(parents=True)
    try:
        with ProcessPoolExecutor(min(workers, len(cuts)), initializer=start_worker) as pool:
            done = pool.map(partial(write_patches, folder=part), cuts)  # the first to fail cancels the others
            written = sum(progress_bar(done, total=len(cuts), desc=out.name, unit="pair"))
        os.replace(part, out)
    except BrokenProcessPool as error:
        message = f"a process was killed, perhaps for lack of memory; remove the unfinished {part}, use fewer --workers"
        raise UserError(message) from error
    except (UserError, OSError) as error:
        raise UserError(f"{describe_error(error)}; then remove the unfinished {part} and start again") from error
    return written


def format_bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# -------------------------------------------------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{sidd,gopro,rain}")
    workers = min(os.cpu_count() or 1, 16)

    def add_task(name, about, source, size):
        add = tasks.add_parser(name, help=about, description=about).add_argument
        add("--source", type=Path, required=True, help=source)
        add("--out", type=Path, required=True, help="folder for input/ and target/; must be new or empty")
        add("--size", type=at_least(1), default=size, help="side of a patch in pixels; default %(default)s")
        add("--workers", type=at_least(1), default=workers, help="processes; changes no patch; default %(default)s")
        return add

    add = add_task("sidd", "random patches from SIDD-Medium's scenes", "SIDD_Medium_Srgb/Data, a folder per scene", 256)
    add("--patches", type=at_least(1), default=300, help="patches per pair of images; default %(default)s")
    add("--seed", type=at_least(0), default=1234, help="of the positions; default %(default)s")

    for name, default in GRIDS.items():
        about = f"a grid of patches from {'GoPro' if name == 'gopro' else 'Rain13K'}'s images"
        add = add_task(name, about, "folder with input/ and target/", default["size"])
        text = "least overlap of neighbours in pixels; from the side of the training crops on (256 in the paper) every "
        text += "crop of the whole image is in a patch; default %(default)s"
        add("--overlap", type=at_least(0), default=default["overlap"], help=text)
        text = "images with no side longer than this stay whole; 0 cuts all. An image counts once per patch in an "
        text += "epoch, so large ones weigh more; default %(default)s"
        add("--max_side", type=at_least(0), default=default["max_side"], help=text)

    args = parser.parse_args(argv)
    if args.task in GRIDS and args.overlap >= args.size:
        raise UserError(f"--overlap {args.overlap} must be less than --size {args.size}")
    return args


def main(argv=None):
    args = parse_args(argv)
    out = args.out.resolve()
    part = out.with_name(f".{out.name}.part")
    if not is_free(out):
        raise UserError(f"--out: {out} already holds files; choose another --out, or move that folder away")
    if part.exists():
        raise UserError(f"{part} is of an interrupted run, or another run is writing to it; if none is, remove it")
    cuts = plan(args)
    total = sum(len(cut.patches) for cut in cuts)
    whole = sum(cut.patches[0][0] == cut.pair.name for cut in cuts)
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    print(f"{args.source}: {len(cuts)} pairs of images" + (f", of which {whole} stay whole" if whole else ""))
    print(f"{total} pairs of patches will be written to {out}")
    print(f"they will take about {format_bytes(estimate_bytes(cuts))}; {format_bytes(free)} are free", flush=True)
    written = write_all(cuts, out, part, args.workers)
    print(f"wrote {total} pairs of patches, {format_bytes(written)}, to {out}/input and {out}/target")


if __name__ == "__main__":
    run_cli(main)
