"""Compressive sensing: images are measured block by block and reconstructed."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dgunet.data.datasets import CenterCropDataset, LumaPatches
from dgunet.data.images import read_luma, to_tensor
from dgunet.data.pairs import find_images
from dgunet.data.transforms import pad_to_blocks, unit_range
from dgunet.evaluation.cli import Benchmark, Evaluation, custom_folder, noise_sigma
from dgunet.evaluation.sets import ImageSet, image_samples
from dgunet.inference import estimate
from dgunet.model.network import DGUNet
from dgunet.model.sampling import RATIOS, BlockSampling, ScalableSampling, sampling_operator
from dgunet.runtime.errors import UserError
from dgunet.tasks import Task, own_variants
from dgunet.training.cli import Training, crop_options

TRAIN = """Train DGUNet for compressive sensing, of 32x32 blocks where MODEL.BLOCK says nothing else.

    dgunet train compressive_sensing MODEL.RATIO 0.25                   # step 1: blocks, one by one
    dgunet train compressive_sensing --config dgunet_step2 MODEL.RATIO 0.25 \\
        MODEL.WEIGHTS checkpoints/compressive_sensing/DGUNet/model_best.pth    # step 2: deblocking
    dgunet train compressive_sensing MODEL.RATIO "[0.01, 0.5]"          # one network for all ratios from 1 to 50 %
    dgunet train compressive_sensing MODEL.MATRIX fixed                 # do not learn the sampling matrix
    dgunet train compressive_sensing TRAINING.RESUME True               # continue where it stopped

Ratios of the paper: 0.01, 0.04, 0.1, 0.25, 0.5. Give each its own MODEL.SESSION. --help_config explains
the config keys.
"""

TEST = """Test DGUNet for compressive sensing: measure images and reconstruct them.

    dgunet test compressive_sensing                                            # our own weights, ratio 25 %
    dgunet test compressive_sensing --weights model.pth                        # the paper's table: Set11 and BSD68
    dgunet test compressive_sensing --weights model.pth --dataset path/to/images --save_images
    dgunet test compressive_sensing --weights model.pth --whole                # whole images, not 128x128 tiles
    dgunet test compressive_sensing --weights model.pth --ratio 0.17           # of a network for a range of ratios
    dgunet test compressive_sensing --noise 5 --bits 8                         # measurements as a real sensor's
    dgunet test compressive_sensing --score_only reconstructed                 # score reconstructed/Set11/...

PSNR and SSIM as the original's test script computes them: on the luminance of OpenCV, unrounded, 128x128 tiles that are
reconstructed separately. A network for a range of ratios is tested at those of the paper that are in it, where --ratio
says nothing else. "input" in the table is x_0 = A_adjoint(y). An interrupted test resumes.
"""

# ------------------------------------------------------------------------------------------------------------ training


def block_sampling(cfg, train_set: LumaPatches) -> BlockSampling:
    """The measurement of compressive sensing; its matrix may start from components of the training images' blocks."""
    start = cfg.MODEL.MATRIX_START
    if start == "pca" and not len(train_set):
        start = "orthonormal"  # a dry run before there are images
    return sampling_operator(cfg.MODEL.RATIO, cfg.MODEL.MATRIX, start, lambda: train_set.blocks(), cfg.MODEL.BLOCK)


def luma_patches(cfg, paths) -> LumaPatches:
    return LumaPatches(paths, block=cfg.MODEL.BLOCK, **crop_options(cfg))


def luma_blocks(cfg, paths) -> CenterCropDataset:
    """As the original does, in blocks as large as those trained on, each restored by itself."""
    return CenterCropDataset(paths, cfg.TRAINING.VAL_PS, luma=True, multiple=cfg.MODEL.BLOCK, area=256)


# ------------------------------------------------------------------------------------- measuring and reconstructing

TILE = 128  # side of the original's tiles, pixels
BATCH = 16  # tiles at a time


def disturb(y: Tensor, matrix: Tensor, noise: float = 0, bits: int = 0) -> Tensor:
    """Measurements as a real sensor gives them.

    Args:
        y: an image's, (B, M, h, w).
        matrix: that measured it, (M, N).
        noise: standard deviation of Gaussian noise, in 8-bit levels: on a row's measurements ``noise / 255`` times the
            row's length, as if each pixel had it. The same random numbers every time.
        bits: of a uniform quantiser, of each row between its least and its largest measurement; 0 for none.
    """
    if noise:
        random = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        y = y + noise / 255 * matrix.norm(dim=1)[:, None, None] * random
    if bits:
        least, largest = y.amin(dim=(0, 2, 3), keepdim=True), y.amax(dim=(0, 2, 3), keepdim=True)
        step = ((largest - least) / (2**bits - 1)).clamp_min(1e-12)
        y = least + step * ((y - least) / step).round()
    return y


@torch.inference_mode()
def reconstruct_whole(
    model: DGUNet, luma: np.ndarray, bf16: bool = False, noise: float = 0, bits: int = 0, ratio: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Measure a whole image and reconstruct it at once: x_K and x_0 = A_adjoint(y), (H, W) float32, not clipped.

    ``bf16`` as for `restore`, ``noise`` and ``bits`` as for `disturb`, ``ratio`` as for
    `BlockSampling.at`, by default that of all rows.
    """
    height, width = luma.shape
    operator = model.degradation.at(ratio)
    x = pad_to_blocks(unit_range(to_tensor(luma)[None]), operator.block)
    y = disturb(operator.A(x.to(operator.matrix.device)), operator.matrix, noise, bits)
    results = estimate(model, y, bf16), operator.A_adjoint(y)
    return tuple(x[0, 0, :height, :width].float().cpu().numpy() for x in results)


@torch.inference_mode()
def reconstruct_tiles(
    model: DGUNet, luma: np.ndarray, bf16: bool = False, noise: float = 0, bits: int = 0, ratio: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same in separate tiles, as the original's test script does.

    Zeros are added to the next multiple of `TILE`; a side that is one already gets another whole tile of them, as in
    the original. (They change nothing: what is added is cropped again.)

    Raises:
        ValueError: tiles that are not of whole blocks.
    """
    height, width = luma.shape
    operator = model.degradation.at(ratio)
    padded = F.pad(unit_range(to_tensor(luma)), (0, TILE - width % TILE, 0, TILE - height % TILE))
    rows, columns = (side // TILE for side in padded.shape[1:])
    tiles = padded.view(rows, TILE, columns, TILE).transpose(1, 2).reshape(-1, 1, TILE, TILE)
    finals, initials = [], []
    measured = disturb(operator.A(tiles.to(operator.matrix.device)), operator.matrix, noise, bits)
    for y in measured.split(BATCH):
        finals.append(estimate(model, y, bf16).cpu())
        initials.append(operator.A_adjoint(y).cpu())

    def stitch(parts: list[torch.Tensor]) -> np.ndarray:
        whole = torch.cat(parts).view(rows, columns, TILE, TILE).transpose(1, 2).reshape(rows * TILE, columns * TILE)
        return whole[:height, :width].numpy().copy()

    return stitch(finals), stitch(initials)


# ------------------------------------------------------------------------------------------------------------- testing


def luma(source: Path) -> ImageSet:
    """Images that are their own targets: the network is given their measurements."""

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = read_luma(path)
        return image, image

    return image_samples(source, read, read_image=read_luma)


def benchmark(name: str, dgunet: list[tuple], plus: list[tuple]) -> Benchmark:
    both = {"dgunet": dgunet, "dgunet_plus": plus}
    paper = {f"{key} {r:g}": value for key, values in both.items() for r, value in zip(RATIOS, values, strict=True)}
    return Benchmark(name, "cs_y", paper, open=luma)


BENCHMARKS = {
    "Set11": benchmark(
        "Set11",
        [(22.09, 0.6096), (26.84, 0.8249), (31.07, 0.9123), (36.11, 0.9611), (41.22, 0.9836)],
        [(22.15, 0.6114), (26.83, 0.8230), (30.93, 0.9088), (36.18, 0.9616), (41.24, 0.9837)],
    ),
    "BSD68": benchmark(
        "BSD68",
        [(22.65, 0.5396), (25.55, 0.7008), (28.26, 0.8193), (31.90, 0.9155), (37.01, 0.9714)],
        [(22.70, 0.5406), (25.45, 0.6987), (28.14, 0.8165), (31.98, 0.9158), (37.04, 0.9718)],
    ),
}


def measure_and_reconstruct(model: DGUNet, image: np.ndarray, whole: bool, **how) -> tuple[np.ndarray, np.ndarray]:
    return (reconstruct_whole if whole else reconstruct_tiles)(model, image, **how)


def add_options(add: Callable):
    add("--whole", action="store_true", help=f"whole images, not tiles of {TILE}x{TILE}")
    several = "measurements per pixel, of a network for a range of ratios (default: those of the paper)"
    add("--ratio", type=float, nargs="+", metavar="R", help=several)
    add("--noise", type=noise_sigma, metavar="S", help="standard deviation of noise on measurements, in 8-bit levels")
    add("--bits", type=int, choices=range(1, 17), metavar="1..16", help="measurements rounded to so many bits")


def options(args: argparse.Namespace, benchmark: Benchmark) -> dict:
    disturbed = {"noise": args.noise, "bits": args.bits}
    return {"whole": args.whole} | {name: value for name, value in disturbed.items() if value}


def ratios(model: DGUNet, args: argparse.Namespace) -> dict[str, dict]:
    """The ratios that a network is tested at, by what each adds to a data set's name; nothing of one for one ratio."""
    sampling = model.degradation
    if TILE % sampling.block and not args.whole:
        raise UserError(
            f"blocks of {sampling.block}x{sampling.block} pixels do not fill the original's tiles of {TILE}x{TILE}; "
            "test whole images, --whole"
        )
    for ratio in args.ratio or ():
        sampling.at(ratio)  # refuses those that the network is not for
    if not isinstance(sampling, ScalableSampling):
        return {"": {}}
    inside = [ratio for ratio in RATIOS if sampling.covers(ratio)]
    chosen = args.ratio or inside or [len(sampling.matrix) / sampling.block**2]
    return {f"_{100 * ratio:g}%": {"ratio": ratio} for ratio in chosen}


def paper_key(name: str, model: DGUNet, args: argparse.Namespace, ratio: float | None = None) -> str:
    if args.noise or args.bits:
        return ""
    ratio = ratio or len(model.degradation.matrix) / model.degradation.block**2
    nearest = min(RATIOS, key=lambda r: abs(r - ratio))
    return f"{name} {nearest:g}" if abs(nearest - ratio) < 0.001 else ""


TASK = Task(
    "compressive_sensing",
    own_variants("compressive_sensing"),
    training=Training(
        uses=("MODEL.RATIO", "MODEL.BLOCK", "MODEL.MATRIX"),
        make_train_set=luma_patches,
        make_val_set=luma_blocks,
        find=find_images,
        make_degradation=block_sampling,
    ),
    evaluation=Evaluation(
        BENCHMARKS,
        custom_folder("cs_y", luma),
        "compressive_sensing_25",
        method=measure_and_reconstruct,
        add_options=add_options,
        options=options,
        variants=ratios,
        paper_key=paper_key,
    ),
    train_help=TRAIN,
    test_help=TEST,
)
