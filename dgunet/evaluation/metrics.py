"""PSNR and SSIM, one protocol for each way in which the literature on these tasks computes them.

The same two images get different numbers from different papers' scripts: luma or RGB, rounded or not, one
SSIM window or another. A score is therefore asked for by the name of its protocol:

================  ====================================  ===================  =========================
protocol          used for                              restored, target     as computed by
================  ====================================  ===================  =========================
deraining_y       Rain100L/H, Test100, Test1200/2800    uint8, uint8         ``evaluate_PSNR_SSIM.m``
rgb_matlab        GoPro, HIDE                           uint8, uint8         ``evaluate_GOPRO_HIDE.m``
gaussian_rgb      CBSD68, Kodak24 with Gaussian noise   uint8, uint8         KAIR's test scripts
sidd_unit_range   SIDD validation blocks                float32 or uint8     ``evaluate_SIDD.m``
cs_y              Set11, BSD68                          float32 luma, uint8  the test script's own code
realblur_aligned  RealBlur-J, RealBlur-R                uint8, uint8         ``evaluate_RealBlur.py``
train_rgb         validation during training            float32 or uint8     ``train.py``
================  ====================================  ===================  =========================

    psnr, ssim = evaluate_pair(restored, target, "rgb_matlab")

- ``deraining_y``: luma of MATLAB's ``rgb2ycbcr`` (16..235), rounded to integers first; peak 255; SSIM with an 11 x 11
  Gaussian window where it fits into the image.
- ``rgb_matlab``: one mean over all pixels and channels; peak 255; MATLAB's ``ssim`` of an H x W x 3 array, which is
  three-dimensional: the Gaussian window runs over the channels too, edges replicated.
- ``gaussian_rgb``: the same PSNR; SSIM is the mean of the three channels', with the window of ``deraining_y``.
- ``sidd_unit_range``: as ``rgb_matlab``, on the range [0, 1], in double; the restored image is clamped to it.
- ``cs_y``: OpenCV's full-range luma (0..255) of the uint8 images; a float luma is clamped to [0, 1] and not rounded;
  exactly 100 dB for equal images; SSIM with a uniform 7 x 7 window.
- ``realblur_aligned``: the restored image matched to the target in intensity and aligned by a homography, scored where
  they overlap; not symmetric in the two. The alignment is OpenCV's iteration, whose rounding depends on the
  processor: on photographs scores agree to some 1e-5 dB, on images of a few pixels it may fail on one machine only.
- ``train_rgb``: both clamped to [0, 1], arithmetic in float32; no SSIM.

Values are per image; the score of a set is the mean of its images' values (PSNR averaged in dB; of images that
equal their targets it is infinite, see `mean_psnr`). For deraining the overall figure is the mean of the sets'
means, whatever their sizes.

Every SSIM here (Wang et al., 2004) is the mean, over the image, of

    (2 m_r m_t + C1) (2 c_rt + C2) / ((m_r^2 + m_t^2 + C1) (v_r + v_t + C2))

with C1 = (0.01 L)^2 and C2 = (0.03 L)^2; m, v, c are the means, variances and covariance in a sliding window
and L the nominal range. The protocols differ in the window, at the borders, and in what they call an image.
"""

import contextlib
import difflib
import functools
import io
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgunet.data.transforms import as_colour, unit_range
from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object, is_object_name

# cv2, scipy and skimage are imported where they are used: a model that is only trained or run needs neither.

_GAUSSIAN_TAPS = 11
_GAUSSIAN_SIGMA = 1.5
_GAUSSIAN_RADIUS = _GAUSSIAN_TAPS // 2


class AlignmentError(ValueError):
    """The ECC alignment of ``realblur_aligned`` found no warp from the restored image to its target."""


def evaluate_pair(
    restored: np.ndarray, target: np.ndarray, protocol: str, *, align: bool = True
) -> tuple[float, float]:
    """PSNR in dB and SSIM of a restored image against its target, as the named protocol computes them.

    Args:
        restored, target: NumPy arrays, H x W x 3 in RGB order or H x W, of the same shape: uint8, or float32 of the
            nominal range [0, 1] where the protocol scores unrounded images. For ``cs_y`` a float32 ``restored`` is the
            luma alone, H x W, of a target that may be a colour image.
        protocol: one of ``PROTOCOLS``, see above.
        align: False makes ``realblur_aligned`` skip the alignment (the intensities are still matched) and score the
            whole image; the other protocols never align.

    Returns:
        ``(psnr, ssim)``, two Python floats. PSNR is ``inf`` for equal images (except in ``cs_y``), SSIM is
        ``nan`` in ``train_rgb``. A NaN pixel makes both NaN.

    Raises:
        AlignmentError: ``realblur_aligned`` on images that cannot be aligned: flat or inverted ones everywhere, tiny
            ones as the processor rounds.
        ValueError: unknown protocol; a dtype that the protocol does not take; shapes that differ or are no
            image's; sides below 11 (``deraining_y``, ``gaussian_rgb``, ``realblur_aligned``) or below 7 (``cs_y``).

    >>> white, grey = np.full((16, 16, 3), 255, np.uint8), np.full((16, 16, 3), 230, np.uint8)
    >>> psnr, ssim = evaluate_pair(white, grey, "rgb_matlab")
    >>> f"{psnr:.3f} {ssim:.3f}"
    '20.172 0.995'
    """
    record = find_protocol(protocol)
    _check_images(restored, target, protocol)
    # OpenCV does not read every strided view, such as the flipped channels of an image that it has loaded.
    restored, target = np.ascontiguousarray(restored), np.ascontiguousarray(target)
    options = {"align": align} if record.aligns else {}
    psnr, ssim = record.score(restored, target, **options)
    return float(psnr), float(ssim)


@torch.no_grad()
def psnr_batch(restored: Tensor, target: Tensor) -> Tensor:
    """PSNR of each image of a batch, for validation while training (the protocol ``train_rgb``).

        20 log10(1 / rmse),    rmse over all pixels and channels of one image, both clamped to [0, 1]

    Args:
        restored, target: floating-point tensors (B, C, H, W) of the same shape and device, nominal range [0, 1].

    Returns:
        float32 tensor (B,) in dB on the same device, ``inf`` for equal images. Nothing is copied to the host.

    Raises:
        ValueError: integer tensors, other than four dimensions, or two shapes.

    >>> psnr_batch(torch.full((2, 3, 8, 8), 0.6), torch.full((2, 3, 8, 8), 0.5))
    tensor([20.0000, 20.0000])
    """
    floating = restored.is_floating_point() and target.is_floating_point()
    if restored.shape != target.shape or restored.ndim != 4 or not floating:
        raise ValueError(
            "psnr_batch needs two floating-point tensors of one shape (B, C, H, W), "
            f"got {tuple(restored.shape)}, {restored.dtype} and {tuple(target.shape)}, {target.dtype}"
        )
    difference = restored.float().clamp(0, 1) - target.float().clamp(0, 1)
    rmse = difference.square().mean(dim=(1, 2, 3)).sqrt()
    return 20 * torch.log10(1 / rmse)


def mean_psnr(values: Iterable[float]) -> tuple[float, int]:
    """Mean PSNR of images in dB, and how many equal their targets, so that theirs is infinite.

    Those are left out of the mean, unless all are; the mean of none is NaN.
    """
    values = list(values)
    finite = [value for value in values if value != math.inf]
    mean = statistics.fmean(finite) if finite else math.inf if values else math.nan
    return mean, len(values) - len(finite)


Metric = Callable[[np.ndarray, np.ndarray], float]  # of a restored image and its target, as of `evaluate_pair`


def find_metrics(names: list[str], device: str | torch.device = "cpu") -> dict[str, Metric]:
    """Scores by name: of the pyiqa library (``lpips``, ``dists``, ``niqe``, ...), or functions of one's own.

    A function, ``module:name``, is given a restored image and its target, (H, W, C) or (H, W), as `evaluate_pair` is,
    and returns a number. Those of pyiqa score images as they are, not aligned or cropped; grey ones as three equal
    channels.

    Raises:
        UserError: there is no such metric, or its weights cannot be downloaded.
        ModuleNotFoundError: the library is not installed; the message says what to install.
    """
    found = {name.rpartition(":")[2]: import_object(name, "--metrics") for name in names if is_object_name(name)}
    for name, metric in found.items():
        if not callable(metric):
            raise UserError(f"--metrics {name} is no function of a restored image and its target, but {metric!r:.100}")
    names = [name for name in names if not is_object_name(name)]
    if not names:
        return found
    import pyiqa

    known = pyiqa.list_models()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=3) or known[:8]
            raise UserError(f"--metrics: pyiqa {pyiqa.__version__} has no {name}; near are {', '.join(near)}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints about downloads
                metric = pyiqa.create_metric(name, device=device)
        except Exception as error:  # of any kind: a download, a package that this one needs
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"--metrics {name} does not work here ({reason[0]:.200}): pyiqa downloads most metrics' weights at "
                "their first use; try again with a connection, or leave it out"
            ) from error
        found[f"pyiqa_{name}" if name in ("psnr", "ssim") else name] = functools.partial(
            _score_with, name, metric, device
        )
    return found


@torch.no_grad()
def _score_with(name: str, metric: Callable, device, restored: np.ndarray, target: np.ndarray) -> float:
    """A pyiqa metric's score of two images. Raises a ValueError where it cannot score them (too small ones)."""
    if restored.ndim == 2:
        target = _full_luma(target)
    images = [
        torch.from_numpy(np.ascontiguousarray(as_colour(unit_range(image)).transpose(2, 0, 1)))[None].to(device)
        for image in (restored, target)
    ]
    try:
        return float(metric(*(image.clamp(0, 1) for image in images[: 2 if metric.metric_mode == "FR" else 1])))
    except Exception as error:  # of any kind
        raise ValueError(f"{name} cannot score this image: {' '.join(str(error).split()):.200}") from error


# The protocols: each takes two checked arrays and returns (psnr, ssim).

Scores = tuple[float, float]


def _deraining_y(restored: np.ndarray, target: np.ndarray) -> Scores:
    return _gaussian_rgb(_studio_luma(restored), _studio_luma(target))


def _gaussian_rgb(restored: np.ndarray, target: np.ndarray) -> Scores:
    # scikit-image cuts the window's radius off the map before its mean: what is left are the positions at
    # which the window fits, so its own border rule has no influence.
    ssim = _gaussian_ssim(restored, target, data_range=255, channel_axis=2 if restored.ndim == 3 else None)
    return _psnr(restored, target, peak=255), ssim


def _rgb_matlab(restored: np.ndarray, target: np.ndarray) -> Scores:
    restored, target = restored.astype(np.float64), target.astype(np.float64)
    return _psnr(restored, target, peak=255), _matlab_ssim(restored, target, value_range=255)


def _sidd_unit_range(restored: np.ndarray, target: np.ndarray) -> Scores:
    # Values are rounded to single, as in the .mat file; MATLAB's arithmetic on them is single too, but how
    # accurately it sums is unknown: double is the value that it approximates.
    restored = np.clip(unit_range(restored), 0, 1).astype(np.float64)
    target = unit_range(target).astype(np.float64)
    return _psnr(restored, target, peak=1), _matlab_ssim(restored, target, value_range=1)


def _cs_y(restored: np.ndarray, target: np.ndarray) -> Scores:
    from skimage.metrics import structural_similarity

    if restored.dtype == np.uint8:
        restored = _full_luma(restored).astype(np.float64)
    else:
        restored = np.clip(restored.astype(np.float64), 0, 1) * 255
    target = _full_luma(target).astype(np.float64)
    psnr = 100.0 if np.array_equal(restored, target) else _psnr(restored, target, peak=255)
    return psnr, structural_similarity(restored, target, data_range=255)


def _realblur_aligned(restored: np.ndarray, target: np.ndarray, align: bool) -> Scores:
    restored, target = unit_range(as_colour(restored)), unit_range(as_colour(target))
    energy = np.sum(restored * restored)
    if energy > 0:  # an all-black image has no best factor
        restored = (np.sum(target * restored) / energy) * restored
    mask = np.ones_like(target)
    if align:
        restored, mask = _align(restored, target)
        restored, target = restored * mask, target * mask

    squared_error = np.sum((target - restored) ** 2, dtype=np.float64)
    psnr = _psnr_of_mse(squared_error / np.sum(mask, dtype=np.float64), peak=1)

    _, ssim_map = _gaussian_ssim(target, restored, data_range=1.0, channel_axis=2, full=True)
    inner = (slice(_GAUSSIAN_RADIUS, -_GAUSSIAN_RADIUS),) * 2
    ssim_map, mask = (ssim_map * mask)[inner], mask[inner]
    ssim = np.mean(ssim_map.sum(axis=(0, 1), dtype=np.float64) / mask.sum(axis=(0, 1), dtype=np.float64))
    return psnr, ssim


def _train_rgb(restored: np.ndarray, target: np.ndarray) -> Scores:
    restored, target = (
        torch.from_numpy(np.array(as_colour(unit_range(image)).transpose(2, 0, 1)[None], order="C"))
        for image in (restored, target)
    )
    return psnr_batch(restored, target).item(), float("nan")


_UINT8 = (np.uint8,)
_UNIT_RANGE = (np.float32, np.uint8)


@dataclass(frozen=True)
class Protocol:
    """How one part of the literature scores an image."""

    score: Callable[..., Scores]  # of two checked arrays; with ``align``, where it aligns
    restored: tuple[type, ...] = _UINT8  # accepted types
    target: tuple[type, ...] = _UINT8
    smallest_side: int = 1
    aligns: bool = False
    luma: bool = False  # a float image is the luma alone, of a target that may have colours
    version: int = 1  # raise it with every change that alters a score: scores of other versions are computed again

    @property
    def rounded(self) -> bool:
        """Whether images are scored as they are written to disk, in 8 bits."""
        return np.float32 not in self.restored


PROTOCOLS = {
    "deraining_y": Protocol(_deraining_y, smallest_side=_GAUSSIAN_TAPS),
    "rgb_matlab": Protocol(_rgb_matlab),
    "gaussian_rgb": Protocol(_gaussian_rgb, smallest_side=_GAUSSIAN_TAPS),
    "sidd_unit_range": Protocol(_sidd_unit_range, _UNIT_RANGE, _UNIT_RANGE),
    "cs_y": Protocol(_cs_y, _UNIT_RANGE, smallest_side=7, luma=True),
    "realblur_aligned": Protocol(_realblur_aligned, smallest_side=_GAUSSIAN_TAPS, aligns=True),
    "train_rgb": Protocol(_train_rgb, _UNIT_RANGE, _UNIT_RANGE),
}


def find_protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        ValueError: unknown.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


# What they are made of


def _psnr(restored: np.ndarray, target: np.ndarray, peak: float) -> float:
    difference = restored.astype(np.float64) - target
    return _psnr_of_mse(np.mean(difference * difference), peak)


def _psnr_of_mse(mse: float, peak: float) -> float:
    return float("inf") if mse == 0 else 10 * np.log10(peak**2 / mse)


def _gaussian_ssim(one: np.ndarray, other: np.ndarray, **options):
    """scikit-image's SSIM, with the Gaussian window of Wang et al."""
    from skimage.metrics import structural_similarity

    return structural_similarity(
        one, other, gaussian_weights=True, sigma=_GAUSSIAN_SIGMA, use_sample_covariance=False, **options
    )


def _matlab_ssim(restored: np.ndarray, target: np.ndarray, value_range: float) -> float:
    """MATLAB's ``ssim`` of two double arrays H x W (2-D) or H x W x 3 (3-D), edges replicated."""
    from scipy.ndimage import gaussian_filter

    blur = functools.partial(gaussian_filter, sigma=_GAUSSIAN_SIGMA, radius=_GAUSSIAN_RADIUS, mode="nearest")
    mean_r, mean_t = blur(restored), blur(target)
    variances = blur(restored * restored + target * target) - mean_r * mean_r - mean_t * mean_t
    covariance = blur(restored * target) - mean_r * mean_t
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    numerator = (2 * mean_r * mean_t + c1) * (2 * covariance + c2)
    denominator = (mean_r * mean_r + mean_t * mean_t + c1) * (variances + c2)
    return np.mean(numerator / denominator)


def _studio_luma(image: np.ndarray) -> np.ndarray:
    """Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, rounded half up to uint8, of MATLAB's ``rgb2ycbcr``.

    Integers, in units of 1/255000, so that no rounding noise decides the 194 colours that fall on a half.
    """
    if image.ndim == 2:
        return image
    luma = image.astype(np.int32) @ np.array([65481, 128553, 24966], np.int32) + 16 * 255_000
    return ((luma + 127_500) // 255_000).astype(np.uint8)


def _full_luma(image: np.ndarray) -> np.ndarray:
    """OpenCV's full-range luma on uint8: fixed-point, so not always the exact sum rounded."""
    import cv2

    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., 0]


def _align(restored: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Warp ``restored`` onto ``target``, both float32 H x W x 3.

    Returns the warped image and the mask (0 or 1, same shape) of where it is defined.
    """
    import cv2

    (height, width), inverse = target.shape[:2], cv2.WARP_INVERSE_MAP
    # No tolerance, so that always all of the iterations are made.
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 0)
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (target, restored)]
    start = np.eye(3, dtype=np.float32)
    try:
        _, warp = cv2.findTransformECC(*grey, start, cv2.MOTION_HOMOGRAPHY, criteria, inputMask=None, gaussFiltSize=5)
    except cv2.error as error:
        raise AlignmentError(f"the {height} x {width} image cannot be aligned to its target ({error.err})") from error

    into = warp, (width, height)
    warped = cv2.warpPerspective(restored, *into, flags=cv2.INTER_CUBIC | inverse, borderMode=cv2.BORDER_REFLECT)
    mask = cv2.warpPerspective(np.ones_like(restored), *into, flags=cv2.INTER_NEAREST | inverse)  # 0 beyond the border
    if not mask[_GAUSSIAN_RADIUS:-_GAUSSIAN_RADIUS, _GAUSSIAN_RADIUS:-_GAUSSIAN_RADIUS].any():
        raise AlignmentError(f"the {height} x {width} image does not overlap its target once it is aligned")
    return warped, mask


def _check_images(restored: np.ndarray, target: np.ndarray, protocol: str):
    record = PROTOCOLS[protocol]
    for name, image, types in (("restored", restored, record.restored), ("target", target, record.target)):
        if not isinstance(image, np.ndarray) or image.dtype not in types:
            wanted = " or ".join(np.dtype(kind).name for kind in types)
            found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"{protocol} needs {name} as a {wanted} array, got {found}")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"{name} must be H x W x 3 (RGB) or H x W, got shape {image.shape}")
    luma_alone = record.luma and restored.dtype != np.uint8
    if luma_alone and restored.ndim != 2:
        raise ValueError(
            f"{protocol} needs a float restored image as its luma alone, H x W, got shape {restored.shape}"
        )
    if restored.shape != (target.shape[:2] if luma_alone else target.shape):
        raise ValueError(f"restored and target differ in shape: {restored.shape} and {target.shape}")
    if min(restored.shape[:2]) < record.smallest_side:
        raise ValueError(
            f"{protocol} needs at least {record.smallest_side} x {record.smallest_side} pixels, "
            f"got {restored.shape[0]} x {restored.shape[1]}"
        )
