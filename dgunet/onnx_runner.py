"""Restore images of any size with a network that `dgunet export` wrote as ONNX: NumPy and ONNX Runtime are enough.

    python -m dgunet.onnx_runner denoiser.onnx photo.png --out restored.png      # also the command dgunet-onnx
    python onnx_runner.py denoiser.onnx photos/*.jpg --out restored              # this file alone, copied elsewhere

It imports nothing of dgunet, nor PyTorch; Pillow only to read and write files.

    network = load("denoiser.onnx")
    restored = restore(network, image)  # (H, W, 3), uint8, uint16 or floats in [0, 1]; same type out as in
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

LARGE = 1024 * 1024  # pixels; larger images are restored in tiles
TILE = 512  # of networks whose record recommends none


class Network:
    """An exported network: ``network(y)`` maps (B, C, H, W), float32, to the restored images, not clamped.

    ``about`` are the file's metadata, ``channels`` C, ``multiple`` what H and W must be multiples of, ``tile`` the
    side of the tiles that the record of the weights recommends, or None.

    Raises:
        ValueError: a file that is not such a network.
    """

    def __init__(self, path: str | Path, providers: list | None = None):
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=providers or ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise ValueError(f"{path} is not a readable ONNX file: {str(error):.200}") from error
        self.about = self.session.get_modelmeta().custom_metadata_map
        taken = self.session.get_inputs()
        if "multiple" not in self.about or [value.name for value in taken] != ["y"]:
            raise ValueError(f"{path} was not written by dgunet export")
        if self.about.get("task") == "compressive_sensing":
            raise ValueError(f"{path} restores from measurements, not from images: it takes {self.about['input']}")
        self.channels, self.multiple = taken[0].shape[1], int(self.about["multiple"])
        self.tile = int(self.about["tile"]) if "tile" in self.about else None

    def __call__(self, y: np.ndarray) -> np.ndarray:
        return self.session.run(["unclamped"], {"y": y})[0]


load = Network


def restore(network: Network, image: np.ndarray, tile="auto", tile_overlap=None, progress=None) -> np.ndarray:
    """Restore an image of any size, as `dgunet.restore` does with the same tiles.

    Args:
        network: of `load`.
        image: (H, W, C), or (H, W) grey: uint8, uint16, or floats in [0, 1]. A grey image is given to a network for
            colour as three equal channels, whose mean is the result.
        tile: side in pixels of the tiles that the image is restored in, at least 16; None for the whole image at once;
            "auto" for what the record of the weights recommends, else the whole image up to a megapixel, else 512.
        tile_overlap: pixels that neighbouring tiles share at least, at most half a tile; seams are blended linearly
            over them. None for a quarter of the tile, at most 64.
        progress: is called with (tiles done, tiles) after each tile.

    Returns:
        The restored image, of the same shape and type as ``image``.

    Raises:
        ValueError: an unsuitable shape, type, range or tile, or NaN pixels.
    """
    x, scale = _check(image, network.channels)
    if isinstance(tile, str) and tile == "auto":
        large = x.shape[0] * x.shape[1] > LARGE
        tile = network.tile or (TILE if large else None)
    if not (tile is None or (_whole(tile) and tile >= 16)):
        raise ValueError(f"tile is None, 'auto' or at least 16 pixels, got {tile!r}")
    most = math.inf if tile is None else tile // 2
    if not (tile_overlap is None or (_whole(tile_overlap) and 0 <= tile_overlap <= most)):
        raise ValueError(f"tile_overlap is from 0 to half a tile, got {tile_overlap!r}")
    x = np.broadcast_to(x, (*x.shape[:2], network.channels)).transpose(2, 0, 1)
    areas, overlap = tile_grid(*x.shape[1:], tile, tile_overlap, network.multiple)
    out, weight = np.zeros(x.shape, np.float32), np.zeros(x.shape[1:], np.float32)
    for done, (rows, columns) in enumerate(areas, 1):
        part = x[:, rows, columns]
        height, width = part.shape[1:]
        restored = network(pad(part, network.multiple)[None])[0, :, :height, :width]
        if not np.isfinite(restored).all():
            raise ValueError("the network gave NaN or infinite values: its weights are damaged, or need more precision")
        factors = ramp(height, overlap)[:, None] * ramp(width, overlap)
        out[:, rows, columns] += factors * restored
        weight[rows, columns] += factors
        if progress is not None:
            progress(done, len(areas))
    out = np.clip(out / weight, 0, 1).transpose(1, 2, 0)
    if image.ndim == 2 or image.shape[2] != network.channels:
        out = out.mean(axis=2, keepdims=True)
    if scale != 1:
        out = (out * np.float32(scale)).round()
    return np.ascontiguousarray(out.astype(image.dtype).reshape(image.shape))


def _whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(image: np.ndarray, channels: int) -> tuple[np.ndarray, int]:
    """The image as (H, W, 1 or C), float32 in [0, 1], and the number that stands for 1."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the image is a NumPy array, not a {type(image).__name__}")
    scale = 1 if image.dtype.kind == "f" else {"u1": 255, "u2": 65535}.get(image.dtype.str[1:])
    if scale is None:
        raise ValueError(f"the image is of uint8, uint16 or floats in [0, 1], got {image.dtype}")
    x = image[..., None] if image.ndim == 2 else image
    if x.ndim != 3 or not x.size or x.shape[2] not in (1, channels):
        kind = "grey" if channels == 1 else f"grey or of {channels} channels"
        raise ValueError(f"the network takes images (H, W, C), {kind}; got shape {image.shape}")
    x = x.astype(np.float32) / np.float32(scale)
    if not np.isfinite(x).all():
        raise ValueError("the image has pixels that are NaN or infinite; replace them before restoring")
    if x.max() > 4 or x.min() < -3:  # strong noise stays within this
        raise ValueError(f"floats are in [0, 1], got {x.min():.3g} to {x.max():.3g}; divide by 255 (or 65535)")
    return x, scale


# The tiles and their seams are those of dgunet/inference.py, which tests/test_without_pytorch.py compares.


def tile_grid(
    height: int, width: int, tile: int | None, overlap: int | None, step: int
) -> tuple[list[tuple[slice, slice]], int]:
    """The tiles (rows, columns) of an image, and the number of pixels that neighbours share at least."""
    if tile is None or (height <= tile and width <= tile):
        return [(slice(0, height), slice(0, width))], 0
    overlap = min(tile // 4, 64) if overlap is None else overlap
    tile, overlap = tile // step * step, -(-overlap // step) * step
    overlap = min(overlap, tile - step)
    rows, columns = (_cut(size, tile, overlap, step) for size in (height, width))
    return [(down, right) for down in rows for right in columns], overlap


def _cut(size: int, tile: int, overlap: int, step: int) -> list[slice]:
    """Tiles along one side, evenly spread, that begin at multiples of ``step``."""
    if size <= tile:
        return [slice(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    tile = math.ceil((size + (count - 1) * overlap) / count / step) * step
    starts = [math.ceil(i * (size - tile) / (count - 1) / step) * step for i in range(count)]
    return [slice(start, min(start + tile, size)) for start in starts]


def ramp(size: int, overlap: int) -> np.ndarray:
    """Weights along one side of a tile, which fall linearly over the overlap towards its borders."""
    position = np.arange(size, dtype=np.float32)
    distance = np.minimum(position, size - 1 - position) + 1
    margin = overlap // 4  # the outermost quarter, the worst of a tile, counts only where there is no other tile
    return np.clip((distance - margin) / np.float32(overlap + 1 - 2 * margin), np.float32(1e-6), 1)


def pad(x: np.ndarray, multiple: int) -> np.ndarray:
    """Pad (C, H, W) at the right and bottom to multiples: by reflection, by replication where it is too small."""
    for axis in (1, 2):
        missing = -x.shape[axis] % multiple
        mode = "reflect" if missing < x.shape[axis] else "edge"
        x = np.pad(x, [(0, missing if i == axis else 0) for i in range(3)], mode=mode)
    return np.ascontiguousarray(x, dtype=np.float32)


# ----------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    """Run the command of these arguments; returns its exit status, 2 if an image could not be restored."""
    parser = argparse.ArgumentParser(
        prog="dgunet-onnx", description="Restore images with an exported network, without PyTorch."
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a file that dgunet export wrote, .onnx")
    add("images", nargs="+", type=Path, metavar="IMAGES", help="what Pillow reads; turned by EXIF, written as PNG")
    add("--out", type=Path, default=Path("restored"), help="a folder, or of one image a .png file (default: restored)")
    add("--tile", default="auto", help="side of tiles in pixels; whole; or auto: as the record of the weights says")
    add("--overlap", type=int, metavar="N", help="pixels that tiles share (default: a quarter of a tile, at most 64)")
    args = parser.parse_args(argv)
    try:
        tile = {"auto": "auto", "whole": None}[args.tile] if args.tile in ("auto", "whole") else int(args.tile)
        network = load(args.model)
    except (ValueError, ImportError) as error:
        hint = "; pip install onnxruntime pillow" if isinstance(error, ImportError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    one, failed = args.out.suffix.lower() == ".png", 0
    if one and len(args.images) > 1:
        parser.error("--out is a folder where there are several images")
    for path in args.images:
        out = args.out if one else args.out / f"{path.stem}.png"
        try:
            _restore_file(network, path, out, tile, args.overlap)
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


def _restore_file(network: Network, path: Path, out: Path, tile, overlap: int | None):
    from PIL import Image, ImageOps

    if out.exists():
        raise ValueError(f"{out} exists; remove it, or choose another --out")
    Image.MAX_IMAGE_PIXELS = None  # tiles bound the memory
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, grey
        pixels, alpha = np.asarray(image).astype(np.uint16), None
    else:
        grey = image.mode in ("1", "L", "LA")
        transparent = "A" in image.getbands() or "transparency" in image.info
        alpha = image.convert("RGBA").getchannel("A") if transparent else None
        pixels = np.asarray(image.convert("L" if grey or network.channels == 1 else "RGB"))

    def say(done: int, count: int):
        if sys.stderr.isatty() and count > 1:
            print(f"\r{path}: tile {done} of {count}", end="\n" if done == count else "", file=sys.stderr, flush=True)

    restored = Image.fromarray(restore(network, pixels, tile, overlap, say))
    if alpha is not None:
        restored.putalpha(alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    restored.save(out)
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
