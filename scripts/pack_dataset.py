"""Pack a training folder into one HDF5 file, from which crops are read without decoding whole images.

    python scripts/pack_dataset.py Datasets/GoPro/train            # input/ and target/: writes Datasets/GoPro/train.h5
    python scripts/pack_dataset.py Datasets/train/DIV2K_BSD400 --luma      # compressive sensing: luminance, no pairs
    python Deblurring/train.py TRAINING.TRAIN_DIR Datasets/GoPro/train.h5

Training sees the same samples from either. The images are not compressed: the file takes height x width x 3 bytes for
each (GoPro 12 GB, Rain13K 15 GB). It is written under another name first: an unfinished one is never taken for a whole.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.errors import UserError, command_imports, run_cli

with command_imports(__name__):
    import h5py
    import numpy as np

    from dgunet.data import PACK_FORMAT, find_pairs, list_images, read_image, read_luma
    from dgunet.distributed import lock_dir
    from dgunet.files import atomic_write, nfc
    from dgunet.progress import progress_bar

# Random crops of 256 touch 9 to 16 chunks of this side, those of 128 touch 4 to 9: little is read in vain.
CHUNK = 96


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with input/ and target/, or with images (--luma)")
    parser.add_argument("--out", type=Path, help="file to write (default: SOURCE.h5)")
    parser.add_argument("--luma", action="store_true", help="pack the luminance of a folder of single images")
    args = parser.parse_args()
    out = args.out or args.source.resolve().with_name(f"{args.source.resolve().name}.h5")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or give another --out")
    images = dict(luma_images(args.source) if args.luma else paired_images(args.source))
    out.parent.mkdir(parents=True, exist_ok=True)
    alone = lock_dir(out.parent, "packing", "wait for its end")
    with alone, atomic_write(out) as unfinished, h5py.File(unfinished, "w") as file:
        pack(file, images, read_luma if args.luma else read_image)
    print(f"wrote {out}: {len(images)} images, {out.stat().st_size / 2**30:.2f} GiB")


def paired_images(source: Path) -> Iterator[tuple[str, Path]]:
    for pair in find_pairs(source):
        yield f"input/{pair.name}", pair.input
        yield f"target/{pair.name}", pair.target


def luma_images(source: Path) -> Iterator[tuple[str, Path]]:
    for path in list_images(source):
        yield nfc(path.name), path


def pack(file: h5py.File, images: dict[str, Path], read):
    """Write every image as a dataset of its own, in chunks that random crops touch few of."""
    file.attrs["format"] = PACK_FORMAT
    workers = os.cpu_count()
    with ThreadPoolExecutor(workers) as pool, progress_bar(total=len(images), unit="image") as bar:
        names = list(images)
        for start in range(0, len(names), 4 * workers):  # decoded images that wait take memory
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
