"""Score a DGUNet for known blurs on the images of Levin et al. beside deepinv's own methods, as in docs/deepinv.md.

    python studies/score_known_blur.py --data levin --weights checkpoints/deblurring/known_blur_cpu/model_best.pth \\
        --denoiser denoising_gaussian

The folder holds im1_kernel1_img.png, ..., gt/im1.png and gt/kernel1.png, ...: 4 grey images, each photographed with 8
camera shakes that were measured ("Understanding and evaluating blind deconvolution algorithms", CVPR 2009).

Scores are computed as the authors do: the photographs are shifted against the sharp images, so the restored image is
shifted by up to SHIFT pixels, in steps of a quarter, to where it fits best, and MARGIN pixels on each side are cropped.
"""

import re
import statistics
import time
from argparse import Namespace
from pathlib import Path

from shared import Parser, UserError, command_imports, markdown_table, run_cli

with command_imports(__name__):
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from dgunet.checkpoints.load import load_model
    from dgunet.data.images import read_image, to_tensor
    from dgunet.data.transforms import center_crop, to_uint8, unit_range
    from dgunet.evaluation.metrics import evaluate_pair
    from dgunet.model.degradations import Blur

MARGIN, SHIFT = 15, 6  # one of the photographs is shifted by 5.25 pixels


def read_grey(path: Path) -> Tensor:
    """(1, 1, H, W) in [0, 1]."""
    return unit_range(to_tensor(read_image(path, grey=True)))[None]


def read_kernel(path: Path, x: Tensor, y: Tensor) -> Tensor:
    """(h, w), sum 1; turned by 180 degrees if that explains the photograph y of image x better: the files differ."""
    kernel = read_grey(path)[0, 0]
    kernel = kernel / kernel.sum()

    def max_correlation(kernel: Tensor) -> float:
        """The highest correlation of y with the blurred image, over all shifts of it."""
        spectrum = torch.fft.fft2(x - x.mean()) * torch.fft.fft2(kernel, x.shape[-2:])
        correlation = torch.fft.ifft2(spectrum.conj() * torch.fft.fft2(y - y.mean())).real.max()
        return (correlation / spectrum.abs().square().sum().sqrt()).item()

    return max(kernel, kernel.rot90(2), key=max_correlation)


def methods(args: Namespace) -> dict:
    """{name: a function of a photograph and its kernel that returns an image of the same size}."""
    import deepinv

    from dgunet.integrations.deepinv import Denoiser, Reconstructor

    def on_larger_image(algorithm):
        """Estimate the image beyond the borders, too, from where light is blurred into the photograph; crop it."""

        def run(y: Tensor, kernel: Tensor) -> Tensor:
            physics = deepinv.physics.Blur(kernel[None, None], padding="valid", use_fft=True)
            sides = [(taps // 2,) * 2 for taps in kernel.shape]
            start = F.pad(y, sides[1] + sides[0], mode="replicate")
            return center_crop(algorithm(y, physics, init=(start, start)), *y.shape[-2:])

        return run

    optim = deepinv.optim
    variation = optim.FISTA(
        data_fidelity=optim.L2(), prior=optim.TVPrior(n_it_max=20), lambda_reg=args.tv, stepsize=1.0, max_iter=100
    )
    found = {"blurred": lambda y, kernel: y, "total variation": on_larger_image(variation)}
    if args.denoiser:
        denoiser = Denoiser(load_model(args.denoiser))
        found["plug-and-play (DPIR)"] = on_larger_image(optim.DPIR(args.pnp, denoiser))
    if args.weights:
        dgunet = Reconstructor(load_model(args.weights)).eval()
        found["DGUNet"] = lambda y, kernel: dgunet(y, Blur(kernel))
    return found


def aligned_score(restored: Tensor, target: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of 8-bit images, the restored one shifted to where its error is least."""
    target = target[..., MARGIN:-MARGIN, MARGIN:-MARGIN]

    def shifted(down: float, right: float) -> Tensor:
        top, left = MARGIN + down // 1, MARGIN + right // 1
        part = restored[..., int(top) : int(top) + target.shape[-2] + 1, int(left) : int(left) + target.shape[-1] + 1]
        part = torch.lerp(part[..., :-1, :], part[..., 1:, :], down % 1)  # bilinear, as the authors do
        return torch.lerp(part[..., :-1], part[..., 1:], right % 1)

    def error(place: tuple[float, float]) -> float:
        return (shifted(*place) - target).square().mean().item()

    whole = range(-SHIFT, SHIFT + 1)
    row, column = min(((i, j) for i in whole for j in whole), key=error)
    quarters = [k / 4 for k in range(-4, 5)]
    best = min(((row + a, column + b) for a in quarters for b in quarters), key=error)
    return evaluate_pair(*(to_uint8(x[0, 0].numpy()) for x in (shifted(*best), target)), "gaussian_rgb")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--weights", help="a DGUNet for any known blur")
    parser.add_argument("--denoiser", help="a DGUNet for Gaussian noise, the prior of plug-and-play")
    parser.add_argument("--tv", type=float, default=5e-4, help="weight of total variation (default: %(default)s)")
    parser.add_argument("--pnp", type=float, default=0.01, help="noise level of DPIR (default: %(default)s)")
    parser.add_argument("--images", default="*", help="names of the images, as in im1_* (default: all)")
    args = parser.parse_args()
    photographs = sorted(args.data.glob(f"{args.images}_img.png"))
    if not photographs:
        raise UserError(f"no {args.images}_img.png in {args.data}; --data names the folder of Levin's photographs")
    scores, seconds, compared = {}, {}, methods(args)
    for path in photographs:
        numbers = re.fullmatch(r"(im\d+)_(kernel\d+)_img", path.stem)
        if numbers is None:
            raise UserError(f"{path} is not named as im1_kernel1_img.png")
        y, x = read_grey(path), read_grey(args.data / f"gt/{numbers[1]}.png")
        kernel = read_kernel(args.data / f"gt/{numbers[2]}.png", x, y)
        for name, restore in compared.items():
            started = time.monotonic()
            with torch.no_grad():
                restored = restore(y, kernel)
            seconds.setdefault(name, []).append(time.monotonic() - started)
            scores.setdefault(name, []).append(aligned_score(restored, x))
        print(path.stem, *(f"{name} {found[-1][0]:.2f}" for name, found in scores.items()), sep="  ", flush=True)
    rows = []
    for name, found in scores.items():
        psnr, ssim = map(statistics.fmean, zip(*found, strict=True))
        rows.append([name, f"{psnr:.2f}", f"{ssim:.3f}", f"{statistics.fmean(seconds[name]):.1f}"])
    print("\n" + markdown_table([f"{len(photographs)} photographs", "PSNR (dB)", "SSIM", "seconds each"], rows))


if __name__ == "__main__":
    run_cli(main)
