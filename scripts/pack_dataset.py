"""Pack a training folder into one HDF5 file, from which crops are read without decoding whole images.

    python scripts/pack_dataset.py Datasets/GoPro/train            # input/ and target/: writes Datasets/GoPro/train.h5
    python scripts/pack_dataset.py Datasets/train/DIV2K_BSD400 --luma      # compressive sensing: luminance, no pairs
    python Deblurring/train.py TRAINING.TRAIN_DIR Datasets/GoPro/train.h5

The training samples are the same from both. The images are not compressed: the file takes height x width x 3 bytes for
each (GoPro 12 GB, Rain13K 15 GB). It gets its name when it is complete.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Parser, UserError, command_imports, run_cli

with command_imports(__name__):
    import h5py
    import numpy as np

    from dgunet.data.images import read_image, read_luma
    from dgunet.data.packed import PACK_FORMAT
    from dgunet.data.pairs import find_pairs, list_images
    from dgunet.runtime.distributed import lock_dir
    from dgunet.runtime.files import atomic_write, nfc
    from dgunet.runtime.progress import progress_bar

# A random crop of 256 pixels touches 9 to 16 chunks of this side, one of 128 touches 4 to 9: little else is read.
CHUNK = 96


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source", type=Path, help="folder of input/ and target/, or of images (--luma); a list of pairs"
    )
    names = "patterns of inputs and targets, such as '*_input' '*_gt' (default: input/* target/*, or as is known)"
    parser.add_argument("--pairs", nargs=2, metavar=("INPUT", "TARGET"), help=names)
    parser.add_argument("--out", type=Path, help="file to write (default: SOURCE.h5)")
    parser.add_argument("--luma", action="store_true", help="pack the luminance of a folder of single images")
    args = parser.parse_args()
    out = args.out or args.source.resolve().with_name(f"{args.source.resolve().name}.h5")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or give another --out")
    if args.luma:
        images = {nfc(path.name): path for path in list_images(args.source)}
    else:
        pairs = find_pairs(args.source, names=args.pairs and tuple(args.pairs))
        images = {f"{side}/{pair.name}": getattr(pair, side) for pair in pairs for side in ("input", "target")}
    out.parent.mkdir(parents=True, exist_ok=True)
    alone = lock_dir(out.parent, "packing", "wait until it ends")
    with alone, atomic_write(out) as unfinished, h5py.File(unfinished, "w") as file:
        pack(file, images, read_luma if args.luma else read_image)
    print(f"wrote {out}: {len(images)} images, {out.stat().st_size / 2**30:.2f} GiB")


def pack(file: h5py.File, images: dict[str, Path], read):
    """Write every image as a dataset of its own, in chunks of which random crops touch few."""
    file.attrs["format"] = PACK_FORMAT
    workers = os.cpu_count()
    with ThreadPoolExecutor(workers) as pool, progress_bar(total=len(images), unit="image") as bar:
        names = list(images)
        for start in range(0, len(names), 4 * workers):  # waiting decoded images take memory
            batch = names[start : start + 4 * workers]
            for name, image in zip(batch, pool.map(read, (images[n] for n in batch)), strict=True):
                write(file, name, image)
                bar.update()


def write(file: h5py.File, name: str, image: np.ndarray):
    free = shutil.disk_usage(Path(file.filename).parent).free
    if image.nbytes * 2 > free:
        raise UserError(f"the disk is full: {free / 2**20:.0f} MiB left at {Path(file.filename).parent}")
    chunks = (min(CHUNK, image.shape[0]), min(CHUNK, image.shape[1]), *image.shape[2:])
    file.create_dataset(os.fsencode(name), data=image, chunks=chunks)


if __name__ == "__main__":
    run_cli(main)
