"""The metrics against values that the papers' own evaluation scripts gave (see golden/metrics/README.md).

python tests/test_metrics.py      prints the largest difference for each protocol
"""

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.io import loadmat

from dgunet.evaluation.metrics import PROTOCOLS, AlignmentError, evaluate_pair, mean_psnr, psnr_batch

GOLDEN = Path(__file__).parent / "golden" / "metrics"
PAIRS = json.loads((GOLDEN / "metrics.json").read_text())
FLOATS = json.loads((GOLDEN / "float_metrics.json").read_text())

PSNR_TOLERANCE, SSIM_TOLERANCE = 1e-3, 1e-5
# The alignment of realblur_aligned is OpenCV's, and the golden values are those of OpenCV 5.
SAME_OPENCV = cv2.__version__.startswith("5.")
ALIGNED_TOLERANCES = (1e-4, 1e-5) if SAME_OPENCV else (0.1, 2e-3)

PINNED_ALIGNMENTS = [name for name, row in PAIRS.items() if row["realblur_aligned"]["psnr"] is not None]
# On the 16 pixels of astronaut_tiny it depends on the processor's instructions whether an alignment is found.
FAILING_ALIGNMENTS = [
    name
    for name, row in PAIRS.items()
    if "stops with an error" in row["realblur_aligned"].get("note", "") and name != "astronaut_tiny"
]
UNPINNED_ALIGNMENTS = [name for name, row in PAIRS.items() if "not pinned" in row["realblur_aligned"].get("note", "")]


@cache
def read_rgb(path):
    image = cv2.cvtColor(cv2.imread(str(GOLDEN / path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    image.setflags(write=False)
    return image


def read_pair(name):
    return read_rgb(f"pairs/{name}_restored.png"), read_rgb(f"pairs/{name}_target.png")


@cache
def read_sidd_blocks():
    files = FLOATS["sidd_blocks"]
    restored = loadmat(GOLDEN / files["restored"])["Idenoised"]
    return restored, loadmat(GOLDEN / files["target"])["ValidationGtBlocksSrgb"]


def noisy_pair(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (height, width, channels) if channels else (height, width)
    target = rng.integers(30, 226, shape)
    restored = target + rng.integers(-25, 26, shape)
    return restored.astype(np.uint8), target.astype(np.uint8)


def assert_matches(measured, expected, tolerances=(PSNR_TOLERANCE, SSIM_TOLERANCE)):
    """``expected`` is an entry of the golden files, where infinity is the string "inf"."""
    assert all(type(value) is float for value in measured)
    psnr, ssim = measured
    assert psnr == pytest.approx(float(expected["psnr"]), abs=tolerances[0], rel=0)
    if expected["ssim"] is None:
        assert math.isnan(ssim)
    else:
        assert ssim == pytest.approx(expected["ssim"], abs=tolerances[1], rel=0)


# Golden values


def test_every_protocol_has_golden_values():
    assert all(set(row) == set(PROTOCOLS) for row in PAIRS.values())


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "realblur_aligned"])
@pytest.mark.parametrize("name", PAIRS)
def test_pair(name, protocol):
    assert_matches(evaluate_pair(*read_pair(name), protocol), PAIRS[name][protocol])


@pytest.mark.parametrize("name", PINNED_ALIGNMENTS)
def test_aligned_pair(name):
    if name == "chelsea_blue_lsb" and not SAME_OPENCV:
        pytest.skip("nearly equal images: the value depends on the build of the alignment")
    measured = evaluate_pair(*read_pair(name), "realblur_aligned")
    assert_matches(measured, PAIRS[name]["realblur_aligned"], ALIGNED_TOLERANCES)


@pytest.mark.parametrize("name", UNPINNED_ALIGNMENTS)
def test_unpinned_alignment_gives_a_score(name):
    psnr, ssim = evaluate_pair(*read_pair(name), "realblur_aligned")
    if name == "rocket_identical":
        assert psnr > 60 and ssim > 0.999
    else:
        assert math.isfinite(psnr) and -1 <= ssim <= 1


@pytest.mark.parametrize("name", FAILING_ALIGNMENTS)
def test_failing_alignment_raises_and_can_be_left_out(name):
    restored, target = read_pair(name)
    with pytest.raises(AlignmentError, match="cannot be aligned"):
        evaluate_pair(restored, target, "realblur_aligned")
    psnr, ssim = evaluate_pair(restored, target, "realblur_aligned", align=False)
    assert math.isfinite(psnr) and -1 <= ssim <= 1


@pytest.mark.parametrize("dark", ["restored", "target", "both"])
def test_images_without_gradient_cannot_be_aligned(dark):
    """Of a black image, whose gradient is zero however it is computed, no shift can be told."""
    noisy, clean = noisy_pair(32, 40)
    black = np.zeros_like(clean)
    restored, target = {"restored": (black, clean), "target": (noisy, black), "both": (black, black)}[dark]
    with pytest.raises(AlignmentError, match="cannot be aligned"):
        evaluate_pair(restored, target, "realblur_aligned")


def test_tiny_images_are_aligned_or_told():
    restored, target = read_pair("astronaut_tiny")
    try:
        psnr, ssim = evaluate_pair(restored, target, "realblur_aligned")
    except AlignmentError as error:
        assert "cannot be aligned" in str(error)
        psnr, ssim = evaluate_pair(restored, target, "realblur_aligned", align=False)
    assert math.isfinite(psnr) and -1 <= ssim <= 1


@pytest.mark.parametrize("block", FLOATS["sidd_blocks"]["blocks"])
def test_sidd_block(block):
    restored, target = read_sidd_blocks()
    index = tuple(map(int, block.split(",")))
    measured = evaluate_pair(restored[index], target[index], "sidd_unit_range")
    assert_matches(measured, FLOATS["sidd_blocks"]["blocks"][block])


@pytest.mark.parametrize("name", FLOATS["cs_float"])
def test_compressive_sensing_float_luma(name):
    case = FLOATS["cs_float"][name]
    measured = evaluate_pair(np.load(GOLDEN / case["restored"]), read_rgb(case["target"]), "cs_y")
    assert_matches(measured, case)


@pytest.mark.parametrize("name", FLOATS["train_float"])
def test_training_psnr_of_float_output(name):
    case = FLOATS["train_float"][name]
    measured = evaluate_pair(np.load(GOLDEN / case["restored"]), read_rgb(case["target"]), "train_rgb")
    assert_matches(measured, case)


def mean_of(scores):
    psnr, ssim = np.mean(scores, axis=0)
    return float(psnr), float(ssim)


def test_average_of_sidd_blocks():
    restored, target = read_sidd_blocks()
    scores = [evaluate_pair(restored[i], target[i], "sidd_unit_range") for i in np.ndindex(restored.shape[:2])]
    assert_matches(mean_of(scores), FLOATS["sidd_blocks"]["average"])


def test_average_of_compressive_sensing():
    scores = [
        evaluate_pair(np.load(GOLDEN / case["restored"]), read_rgb(case["target"]), "cs_y")
        for case in FLOATS["cs_float"].values()
    ]
    assert_matches(mean_of(scores), FLOATS["cs_float_average"])


@pytest.mark.parametrize("protocol", FLOATS["set_averages"])
def test_averages_of_sets(protocol):
    expected = FLOATS["set_averages"][protocol]
    means = {
        name: mean_of([evaluate_pair(*read_pair(pair), protocol) for pair in row["pairs"]])
        for name, row in expected.items()
        if "pairs" in row
    }
    for name, measured in means.items():
        assert_matches(measured, expected[name])
    if "mean_of_sets" in expected:
        assert_matches(mean_of(list(means.values())), expected["mean_of_sets"])


# What distinguishes a protocol from its look-alikes


PSNR, SSIM = 0, 1


@pytest.mark.parametrize(
    ("name", "protocol", "which", "correct", "mistaken"),
    [
        ("chelsea_blue_lsb", "deraining_y", PSNR, 61.23333, 71.27025),
        ("chelsea_blue_lsb", "deraining_y", SSIM, 0.9997721, 0.9999882),
        ("coffee_blur", "deraining_y", PSNR, 27.23446, 27.24011),
        ("coffee_blur", "deraining_y", SSIM, 0.8526511, 0.8540493),
        ("coffee_blur", "rgb_matlab", SSIM, 0.9594036, 0.8316705),
        ("coffee_negative", "rgb_matlab", SSIM, -0.7224483, -0.0430573),
        ("rocket_identical", "cs_y", PSNR, 100.0, math.inf),
    ],
)
def test_values_that_betray_a_mistake(name, protocol, which, correct, mistaken):
    tolerance = (PSNR_TOLERANCE, SSIM_TOLERANCE)[which]
    measured = evaluate_pair(*read_pair(name), protocol)[which]
    assert abs(measured - correct) < tolerance < abs(measured - mistaken)


def test_training_psnr_clamps():
    case = FLOATS["train_float"]["chelsea_gamma"]
    psnr, _ = evaluate_pair(np.load(GOLDEN / case["restored"]), read_rgb(case["target"]), "train_rgb")
    assert psnr == pytest.approx(29.03841, abs=PSNR_TOLERANCE) and abs(psnr - 28.67381) > 0.1


@pytest.mark.parametrize("protocol", ["rgb_matlab", "sidd_unit_range"])
def test_three_dimensional_ssim_of_a_grey_image_is_the_two_dimensional_one(protocol):
    restored, target = read_pair("camera_grey_rgb")
    in_grey = evaluate_pair(restored[..., 0], target[..., 0], protocol)
    assert_matches(in_grey, PAIRS["camera_grey_rgb"][protocol])


def test_three_dimensional_ssim_against_a_full_kernel():
    from scipy.ndimage import correlate

    restored, target = (image.astype(np.float64) for image in noisy_pair(13, 9))
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel = np.einsum("i,j,k", taps, taps, taps) / taps.sum() ** 3

    def mean(volume):
        return correlate(volume, kernel, mode="nearest")

    mean_r, mean_t = mean(restored), mean(target)
    variance_r, variance_t = mean(restored**2) - mean_r**2, mean(target**2) - mean_t**2
    covariance = mean(restored * target) - mean_r * mean_t
    c1, c2 = 2.55**2, 7.65**2
    ssim_map = (2 * mean_r * mean_t + c1) * (2 * covariance + c2)
    ssim_map /= (mean_r**2 + mean_t**2 + c1) * (variance_r + variance_t + c2)

    _, ssim = evaluate_pair(restored.astype(np.uint8), target.astype(np.uint8), "rgb_matlab")
    assert ssim == pytest.approx(ssim_map.mean(), abs=1e-10)


def test_channel_order_of_the_three_dimensional_ssim():
    restored, target = read_pair("coffee_blur")
    rgb, bgr, grb = (
        evaluate_pair(restored[..., order], target[..., order], "rgb_matlab")[SSIM]
        for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2])
    )
    assert rgb == pytest.approx(bgr, abs=1e-12) and abs(rgb - grb) > 1e-4


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "realblur_aligned"])
def test_symmetric_in_the_two_images(protocol):
    restored, target = read_pair("coffee_posterised")
    forth, back = evaluate_pair(restored, target, protocol), evaluate_pair(target, restored, protocol)
    assert forth == pytest.approx(back, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_grey_and_strided_images(protocol):
    restored, target = read_pair("chelsea_gamma")
    flipped = evaluate_pair(restored[:, ::-1], target[:, ::-1], protocol)
    copied = evaluate_pair(restored[:, ::-1].copy(), target[:, ::-1].copy(), protocol)
    assert flipped == pytest.approx(copied, rel=1e-9, nan_ok=True)
    psnr, _ = evaluate_pair(restored[..., 1], target[..., 1], protocol)
    assert 20 < psnr < 40


def test_sidd_clamps_the_restored_image():
    restored, target = noisy_pair(16, 16)
    overshooting = np.where(restored > 200, 1.5, restored / np.float32(255)).astype(np.float32)
    clamped = evaluate_pair(overshooting.clip(0, 1), target, "sidd_unit_range")
    assert evaluate_pair(overshooting, target, "sidd_unit_range") == clamped


def test_realblur_ignores_a_global_factor_and_aligns():
    _, target = read_pair("coffee_blur")
    darker = (target * 0.5).round().astype(np.uint8)
    psnr, _ = evaluate_pair(darker, target, "realblur_aligned", align=False)
    assert psnr > 45
    restored, target = read_pair("astronaut_misaligned")
    aligned, _ = evaluate_pair(restored, target, "realblur_aligned")
    unaligned, _ = evaluate_pair(restored, target, "realblur_aligned", align=False)
    assert aligned > unaligned + 3


@pytest.mark.parametrize("align", [True, False])
def test_realblur_black_image(align):
    _, target = noisy_pair(32, 32)
    black = np.zeros_like(target)
    if align:
        with pytest.raises(AlignmentError):
            evaluate_pair(black, target, "realblur_aligned")
    else:
        psnr, ssim = evaluate_pair(black, target, "realblur_aligned", align=False)
        assert math.isfinite(psnr) and math.isfinite(ssim)


@pytest.mark.parametrize("protocol", ["sidd_unit_range", "cs_y", "train_rgb"])
def test_nan_pixel_makes_the_score_nan(protocol):
    restored, target = noisy_pair(16, 16, channels=None)
    broken = restored / np.float32(255)
    broken[5, 5] = np.nan
    assert all(math.isnan(value) for value in evaluate_pair(broken, target, protocol))


# Errors


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shape_mismatch(protocol):
    restored, target = noisy_pair(32, 40)
    with pytest.raises(ValueError, match=r"\(32, 40, 3\) and \(32, 32, 3\)"):
        evaluate_pair(restored, target[:, :32], protocol)


@pytest.mark.parametrize("shape", [(32,), (32, 32, 1), (32, 32, 4), (1, 32, 32, 3)])
def test_not_a_image(shape):
    image = np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match="H x W x 3"):
        evaluate_pair(image, image, "rgb_matlab")


def test_unknown_protocol_names_the_known_ones():
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError) as error:
        evaluate_pair(image, image, "psnr")
    assert all(name in str(error.value) for name in ("'psnr'", *PROTOCOLS))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, bool])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_wrong_dtype(protocol, dtype):
    good, wrong = np.zeros((16, 16), np.uint8), np.zeros((16, 16), dtype)
    takes_float = protocol in ("sidd_unit_range", "cs_y", "train_rgb")
    if not (dtype is np.float32 and takes_float):
        with pytest.raises(ValueError, match=f"{protocol} needs restored as a .*uint8.*{wrong.dtype}"):
            evaluate_pair(wrong, good, protocol)
    if not (dtype is np.float32 and takes_float and protocol != "cs_y"):
        with pytest.raises(ValueError, match=f"{protocol} needs target as a .*uint8.*{wrong.dtype}"):
            evaluate_pair(good, wrong, protocol)


def test_tensor_instead_of_array():
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="got Tensor"):
        evaluate_pair(torch.from_numpy(image), image, "rgb_matlab")


def test_compressive_sensing_wants_the_luma_of_a_float_image():
    restored, target = noisy_pair(16, 16)
    with pytest.raises(ValueError, match="luma"):
        evaluate_pair(restored / np.float32(255), target, "cs_y")
    with pytest.raises(ValueError, match="differ in shape"):
        evaluate_pair(restored[:8, :, 0] / np.float32(255), target, "cs_y")


@pytest.mark.parametrize(
    ("protocol", "side"),
    [
        ("deraining_y", 11),
        ("realblur_aligned", 11),
        ("cs_y", 7),
        ("rgb_matlab", 1),
        ("sidd_unit_range", 1),
        ("train_rgb", 1),
    ],
)
def test_smallest_image(protocol, side):
    psnr, _ = evaluate_pair(*noisy_pair(side, side), protocol, align=False)
    assert math.isfinite(psnr)
    for height, width in [(side - 1, 20), (20, side - 1)]:
        with pytest.raises(ValueError, match=f"at least {side} x {side} pixels, got {height} x {width}"):
            evaluate_pair(*noisy_pair(height, width), protocol)


# PSNR of a batch


def test_psnr_batch_agrees_with_the_protocol_image_by_image():
    names = ["astronaut_noise25", "camera_grey_rgb", "coffee_posterised"]
    restored, target = (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        for images in zip(*map(read_pair, names), strict=True)
    )
    values = psnr_batch(restored, target)
    assert values.shape == (3,) and values.dtype == torch.float32
    expected = torch.tensor([PAIRS[name]["train_rgb"]["psnr"] for name in names])
    torch.testing.assert_close(values, expected, atol=PSNR_TOLERANCE, rtol=0)


def test_psnr_batch_clamps_both_and_is_infinite_for_equal_images():
    restored = torch.tensor([1.5, 0.6]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    target = torch.tensor([1.2, 0.5]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    values = psnr_batch(restored, target)
    assert values[0] == math.inf
    assert values[1].item() == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_psnr_batch_is_float32_whatever_comes_in(dtype):
    target = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    values = psnr_batch(target.to(dtype) + 0.125, target)
    assert values.dtype == torch.float32 and not values.requires_grad
    assert values.item() == pytest.approx(20 * math.log10(8), abs=1e-4)


def test_psnr_batch_reads_no_value_on_the_host():
    # A meta tensor has no values: anything that needed one would raise.
    values = psnr_batch(torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, 3, 8, 8, device="meta"))
    assert values.shape == (4,) and values.device.type == "meta"


@pytest.mark.parametrize(
    ("restored", "target"),
    [
        pytest.param(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), id="broadcast"),
        pytest.param(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), id="no_batch"),
        pytest.param(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), id="integers"),
    ],
)
def test_psnr_batch_errors(restored, target):
    with pytest.raises(ValueError, match="psnr_batch needs"):
        psnr_batch(restored, target)


# The module itself


def test_import_is_light():
    code = "import sys, dgunet.metrics; print([name for name in ('cv2', 'skimage', 'scipy') if name in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("values", "mean", "identical"),
    [([20, 30], 25, 0), ([20, math.inf, 30, math.inf], 25, 2), ([math.inf], math.inf, 1), ([], math.nan, 0),
     ([20, math.nan, math.inf], math.nan, 1)],
)  # fmt: skip
def test_mean_psnr_leaves_out_and_counts_equal_images(values, mean, identical):
    assert mean_psnr(values) == (pytest.approx(mean, nan_ok=True), identical)


if __name__ == "__main__":
    print(f"{'protocol':18} {'pairs':>5} {'PSNR [dB]':>10} {'SSIM':>10}   largest differences")
    for protocol in PROTOCOLS:
        differences = []
        for name, row in PAIRS.items():
            expected = row[protocol]
            if expected["psnr"] in (None, "inf") or (protocol == "realblur_aligned" and name not in PINNED_ALIGNMENTS):
                continue
            psnr, ssim = evaluate_pair(*read_pair(name), protocol)
            has_ssim = expected["ssim"] is not None
            differences.append((abs(psnr - expected["psnr"]), abs(ssim - expected["ssim"]) if has_ssim else 0.0))
        psnr, ssim = (max(column) for column in zip(*differences, strict=True))
        print(f"{protocol:18} {len(differences):5} {psnr:10.1e} {ssim:10.1e}")
