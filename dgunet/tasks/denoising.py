"""Denoising: real noise (SIDD, DND), and Gaussian noise that is added to clean images."""

import argparse
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path

import numpy as np

from dgunet.data.datasets import MixupPatches
from dgunet.data.images import read_image, read_luma
from dgunet.data.transforms import unit_range
from dgunet.evaluation.cli import Benchmark, Evaluation, add_tiling, custom_folder, noise_sigma
from dgunet.evaluation.runner import restore_images
from dgunet.evaluation.sets import ImageSet, Sample, image_samples
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import atomic_write
from dgunet.tasks import Task, own_variants
from dgunet.training.cli import Training, crop_options

TRAIN = """Train DGUNet for denoising.

    dgunet train denoising                                             # the paper's DGUNet on SIDD, every GPU here
    dgunet train denoising --config dgunet_plus GPU "[0, 1]" OPTIM.BATCH_SIZE 8
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m dgunet train denoising
    dgunet train denoising TRAINING.RESUME True                        # continue where it stopped

--help_config explains the config keys.
"""

TEST = """Test DGUNet for denoising, or denoise images.

    dgunet test denoising --weights model.pth --dataset SIDD              # the paper's table, from the .mat blocks
    dgunet test denoising --weights model.pth --dataset DND               # writes the files to submit
    dgunet test denoising --weights model.pth --dataset path/to/folder    # pairs in input/ and target/, or images
    dgunet test denoising --dataset path/to/folder                        # our own weights: Gaussian noise
    dgunet test denoising --weights model.pth --dataset CBSD68_25 Kodak24_25              # clean sets, noise added
    dgunet test denoising --weights model.pth --dataset path/to/folder --sigma 15 25 50   # clean images of yours

The weights may be this repository's or the original authors'; the variant is recognised. PSNR and SSIM are computed as
for SIDD: RGB in [0, 1], not rounded to 8 bits, SSIM over three dimensions. Where Gaussian noise is added it is neither
clipped nor rounded, but the result is rounded to 8 bits; SSIM is the mean of the three channels'. An interrupted test
resumes.
"""


def mixup_patches(cfg, pairs) -> MixupPatches:
    mixup = dict(mixup=cfg.AUGMENT.MIXUP, mixup_from=cfg.AUGMENT.MIXUP_FROM_EPOCH)
    return MixupPatches(pairs, **mixup, **crop_options(cfg))


# ------------------------------------------------------------------------------- the MATLAB files of SIDD and of DND


def read_mat(path: Path, key: str) -> np.ndarray:
    """One array of a MATLAB file, version 5 or 7.3, in MATLAB's axis order.

    Raises:
        UserError: no such file, not a MATLAB file, or without that variable.
    """
    import h5py

    if not path.is_file():
        raise UserError(f"no {path.absolute()}; see Denoising/README.md for where the benchmark's files belong")
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                return np.array(file[key]).T  # HDF5 holds MATLAB's axes in reverse
        from scipy.io import loadmat

        return loadmat(path, variable_names=[key])[key]
    except KeyError as error:
        raise UserError(f"{path} has no variable {key}; it is another file than the benchmark's") from error
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} is not a MATLAB file, or is damaged; download it again") from error


def read_sidd(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """SIDD's validation blocks: noisy and clean, each (40, 32, 256, 256, 3) uint8 (any number of images and blocks).

    Reads ``ValidationNoisyBlocksSrgb.mat`` and ``ValidationGtBlocksSrgb.mat``, of MATLAB version 5 or 7.3.
    """
    blocks = []
    for key in ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb"):
        array = read_mat(folder / f"{key}.mat", key)
        if array.ndim != 5 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
            raise UserError(
                f"{folder / key}.mat should hold uint8 blocks (images, blocks, H, W, 3), "
                f"got {array.dtype} {array.shape}"
            )
        blocks.append(array)
    if blocks[0].shape != blocks[1].shape:
        raise UserError(f"noisy and clean SIDD blocks in {folder} differ: {blocks[0].shape} and {blocks[1].shape}")
    return tuple(blocks)


def read_dnd(folder: Path) -> dict[str, np.ndarray]:
    """DND's images: file names below ``images_srgb/`` and the boxes of each, by HDF5 references in ``info.mat``.

    A row of boxes is (top, left, bottom, right) of a crop to be restored, counted from 1 and inclusive.
    """
    import h5py

    info = folder / "info.mat"
    if not info.is_file():
        raise UserError(f"no {info.absolute()}; see Denoising/README.md for where the benchmark's files belong")
    try:
        with h5py.File(info) as file:
            references = np.array(file["info"]["boundingboxes"]).ravel()
            boxes = [np.array(file["info"][reference]).T.astype(int) for reference in references]
        sound = all((b[:, :2] >= 1).all() and (b[:, 2:] >= b[:, :2]).all() and b.shape[1:] == (4,) for b in boxes)
    except Exception as error:
        raise UserError(f"{info} is not DND's info.mat, or is damaged; download it again") from error
    if not sound:
        raise UserError(f"{info} holds something else than boxes (top, left, bottom, right); download it again")
    return {f"{number:04d}.mat": image_boxes for number, image_boxes in enumerate(boxes, start=1)}


def read_dnd_image(path: Path, boxes: np.ndarray) -> np.ndarray:
    """One of DND's images, (H, W, 3) float32 in [0, 1], which its boxes lie in."""
    image = read_mat(path, "InoisySRGB")
    if image.dtype.kind != "f" or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{path} should hold an image (H, W, 3) of floats, got {image.dtype} {image.shape}")
    if (boxes[:, 2:] > image.shape[:2]).any():
        raise UserError(f"{path} is smaller than its boxes in info.mat; download it again")
    return image.astype(np.float32)


class SiddBlocks(ImageSet):
    """The validation blocks; the restored ones are written as the benchmark's ``Idenoised.mat`` (single)."""

    def __init__(self, source: Path):
        noisy, clean = read_sidd(source.parent)
        files = tuple(sorted(source.parent.glob("*.mat")))
        samples = []
        for i in range(len(noisy)):
            name = f"{i + 1:04d}"
            blocks = tuple(f"{name}_{j + 1:02d}" for j in range(noisy.shape[1]))
            read = partial(lambda i: (noisy[i], clean[i]), i)
            samples.append(Sample(name, files, read, blocks, title=f"SIDD's image {name}"))
        super().__init__(samples)

    def _part(self, folder: Path, sample: Sample) -> Path:
        return folder / "parts" / f"{sample.name}.npy"  # so that an interrupted test need not do it again

    def keep(self, folder: Path, sample: Sample, restored: np.ndarray):
        with atomic_write(self._part(folder, sample)) as temporary, open(temporary, "wb") as file:
            np.save(file, restored)

    def kept(self, folder: Path, sample: Sample) -> bool:
        return self._part(folder, sample).exists()

    def finish(self, folder: Path, complete: bool) -> str | None:
        whole = folder / "Idenoised.mat"
        if not complete:
            whole.unlink(missing_ok=True)
            return None
        write_mat(whole, {"Idenoised": np.stack([np.load(self._part(folder, sample)) for sample in self.samples])})
        return f"wrote {whole}"


class DndCrops(ImageSet):
    """The benchmark's submission: for each image a .mat file with its 20 restored crops (1-based boxes)."""

    def __init__(self, info: Path):
        def read(path: Path, boxes: np.ndarray) -> tuple[list[np.ndarray], None]:
            image = read_dnd_image(path, boxes)
            return [image[top - 1 : bottom, left - 1 : right] for top, left, bottom, right in boxes], None

        samples = []
        for name, boxes in read_dnd(info.parent).items():
            path = info.parent / "images_srgb" / name
            crops = tuple(f"{path.stem}_{k + 1:02d}" for k in range(len(boxes)))
            read_crops = partial(read, path, boxes)
            samples.append(Sample(name, (info, path), read_crops, crops, title=f"DND's image {name}"))
        super().__init__(samples, targets=False)

    def keep(self, folder: Path, sample: Sample, restored: list[np.ndarray]):
        crops = np.empty((1, len(restored)), dtype=object)
        crops[0, :] = restored
        content = {"Idenoised": crops, "israw": False, "eval_version": "1.0"}
        write_mat(folder / "matfiles" / sample.name, content)

    def kept(self, folder: Path, sample: Sample) -> bool:
        return (folder / "matfiles" / sample.name).exists()

    def finish(self, folder: Path, complete: bool) -> str:
        if not complete:
            return f"{folder / 'matfiles'} is incomplete: not to be submitted"
        server = "https://noise.visinf.tu-darmstadt.de"
        return f"wrote {folder / 'matfiles'}; its scores come from the benchmark's server, {server}"


def write_mat(path: Path, content: dict):
    with atomic_write(path) as temporary:
        from scipy.io import savemat

        savemat(temporary, content, appendmat=False)


def with_noise(clean: np.ndarray, sigma: float) -> np.ndarray:
    """A clean 8-bit image with Gaussian noise, float32: in [0, 1] but for the noise, neither clipped nor rounded.

    As KAIR's test scripts add it: with seed 0 for each image, whose noise is the same every time.
    """
    noise = np.random.RandomState(0).normal(0, sigma / 255, clean.shape)
    return (unit_range(clean) + noise).astype(np.float32)


def gaussian(place: str, sigma: float, read: Callable[[Path], np.ndarray] = read_image, usual=True) -> Benchmark:
    """Clean images, colour or grey as ``read`` reads them, with noise."""

    def noisy(path: Path) -> tuple[np.ndarray, np.ndarray]:
        clean = read(path)
        return with_noise(clean, sigma), clean

    opened = partial(image_samples, read=noisy, read_image=read)
    return Benchmark(place, "gaussian_rgb", open=opened, sigma=sigma, usual=usual)


@wraps(restore_images)  # whose options it has
def denoise(model, degraded, **options):
    """`restore_images`; of a grey image (H, W) the mean of what a colour network makes of three equal channels."""
    if isinstance(degraded, np.ndarray) and degraded.ndim == 2:
        restored, _ = restore_images(model, np.repeat(degraded[..., None], 3, axis=2), **options)
        return restored.mean(axis=2), degraded
    return restore_images(model, degraded, **options)


BENCHMARKS = {
    "SIDD": Benchmark(
        "SIDD/test/ValidationNoisyBlocksSrgb.mat",
        "sidd_unit_range",
        dict(dgunet=(39.88, 0.959), dgunet_plus=(39.91, 0.960)),
        open=SiddBlocks,
        self_ensemble=True,
    ),
    # scored by its server; the paper has 40.04/0.956, DGUNet+ 40.12/0.957, with the self-ensemble as for SIDD
    "DND": Benchmark("DND/test/info.mat", None, open=DndCrops, self_ensemble=True),
    # of Nam et al. (2016), the 15 crops that the literature on real noise scores: of 8-bit RGB
    "CC15": Benchmark("CC15", "gaussian_rgb", usual=False),
    "Nam25": Benchmark("nam25", "gaussian_rgb", usual=False),  # 25 other pairs of Nam et al., on which CBDNet is scored
    **{f"{name}_{sigma}": gaussian(name, sigma) for name in ("CBSD68", "Kodak24") for sigma in (15, 25, 50)},
    **{f"Set12_{sigma}": gaussian("Set12", sigma, read_luma, usual=False) for sigma in (15, 25, 50)},
}


def add_options(add: Callable):
    add_tiling(add)
    what = "the --dataset is clean images of your own: add Gaussian noise of these standard deviations (8-bit levels)"
    add("--sigma", nargs="+", type=noise_sigma, default=[], metavar="S", help=what)


def own(args: argparse.Namespace) -> dict[str, Benchmark]:
    if not args.sigma:
        return custom_folder("sidd_unit_range")(args)
    published = {name.lower() for name in BENCHMARKS}
    if not published.isdisjoint(map(str.lower, args.dataset or BENCHMARKS)):
        raise UserError("--sigma adds noise to clean images of your own; name their folder with --dataset")
    return {f"_{sigma:g}": gaussian("", sigma) for sigma in args.sigma}


TASK = Task(
    "denoising",
    own_variants("denoising"),
    training=Training(
        uses=("AUGMENT.MIXUP",),
        syntheses=("gaussian_noise", "found_noise", "sensor_noise", "bayer_noise", "grain", "photo_noise"),
        make_train_set=mixup_patches,
    ),
    evaluation=Evaluation(BENCHMARKS, own, "denoising_gaussian", method=denoise, add_options=add_options),
    train_help=TRAIN,
    test_help=TEST,
)
