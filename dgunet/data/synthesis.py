"""Synthetic degradations of clean images, for training and demonstration.

Each takes an image (H, W, 3), RGB in [0, 1], and the generator of its random numbers, and returns the degraded image,
of the same shape, float32 in [0, 1]; Gaussian noise that is not clipped leaves that range. ``sigma`` is a standard
deviation on the scale 0 to 255, or the range that it is drawn from.
"""

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator

from dgunet.data.transforms import to_uint8
from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object, is_object_name


def to_linear(image: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 1] -> linear light in [0, 1] (IEC 61966-2-1), any shape."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] -> sRGB values in [0, 1], the inverse of :func:`to_linear`."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def _draw(rng: Generator, value: float | tuple[float, float]) -> float:
    return rng.uniform(*value) if np.ndim(value) else value


def gaussian_noise(
    image: np.ndarray, rng: Generator, sigma: float | tuple[float, float] = 25.0, clip: bool = True
) -> np.ndarray:
    """Add white Gaussian noise; ``clip``: to [0, 1], as an image file does; benchmarks in the literature do not."""
    sigma = _draw(rng, sigma)
    noisy = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma / 255)
    return (np.clip(noisy, 0, 1) if clip else noisy).astype(np.float32)


def found_noise(image: np.ndarray, rng: Generator, sigma: float | tuple[float, float] = (0.0, 50.0)) -> np.ndarray:
    """Add Gaussian noise as found in image files: in half of the images as in the literature, white and not clipped.

    The others are clipped to [0, 1]; half of these have noise that the colours share in part or, as grey images, in
    whole, and half are JPEGs.
    """
    sigma = _draw(rng, sigma)
    own, common = (rng.standard_normal((*image.shape[:2], n), dtype=np.float32) for n in (3, 1))
    plain, apart, file = rng.random(3) < 0.5
    shared = 0 if plain or apart else min(1, rng.uniform(0, 2))  # of the variance; one in eight: all of it
    noise = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    noisy = (image + noise * np.float32(sigma / 255)).astype(np.float32)
    if plain:
        return noisy
    noisy = np.clip(noisy, 0, 1)
    return jpeg_compress(noisy, int(rng.integers(75, 100))) if file else noisy


def jpeg_compress(image: np.ndarray, quality: int, subsample: bool = True) -> np.ndarray:
    """An image (H, W, 3) in [0, 1] after JPEG compression of this quality; ``subsample``: the chroma, as 4:2:0."""
    import cv2

    full = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, *([] if subsample else full)]
    _, file = cv2.imencode(".jpg", to_uint8(image)[..., ::-1], options)
    return cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1] / np.float32(255)


def sensor_noise(
    image: np.ndarray,
    rng: Generator,
    shot: tuple[float, float] = (0.012, 0.022),
    read: tuple[float, float] = (0.00015, 0.00040),
) -> np.ndarray:
    """Add the signal-dependent noise of a sensor at a high ISO setting.

    In linear light z the noise is Gaussian with variance ``a * z + b``: photon (shot) noise grows with the
    signal, read noise does not. This is the model of Foi et al., "Practical Poissonian-Gaussian noise
    modeling and fitting for single-image raw-data", TIP 2008. Back in sRGB the shadows are the noisiest
    part, as in real photographs.

    shot, read: ranges of a and b, each drawn once per image, log-uniformly.
    """
    a, b = np.exp([rng.uniform(*np.log(shot)), rng.uniform(*np.log(read))]).astype(np.float32)
    light = to_linear(image)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.sqrt(a * light + b)
    return to_srgb(np.clip(light + noise, 0, 1))


def bayer_noise(
    image: np.ndarray,
    rng: Generator,
    shot: tuple[float, float] = (0.0003, 0.02),
    read: tuple[float, float] = (1e-6, 4e-4),
) -> np.ndarray:
    """Add the noise of a sensor under a colour filter array, interpolated as a camera does.

    The noise of `sensor_noise` is drawn for the Bayer mosaic, where each pixel has one of the three colours, weighed by
    the camera's white balance, and interpolated bilinearly to all pixels: its grains are larger than a pixel and
    coloured, as in photographs. The image itself is not interpolated and loses no detail. shot, read: as there.
    """
    import cv2

    a, b = np.exp([rng.uniform(*np.log(shot)), rng.uniform(*np.log(read))]).astype(np.float32)
    light = to_linear(image)
    gains = np.array([rng.uniform(1.2, 2.4), 1, rng.uniform(1.2, 2.4)], np.float32)  # of red, green and blue
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.sqrt(gains * a * light + gains**2 * b)
    row, column = np.ogrid[: image.shape[0], : image.shape[1]]
    red, blue = (row % 2 == 0) & (column % 2 == 0), (row % 2 == 1) & (column % 2 == 1)
    masks = np.dstack([red, ~(red | blue), blue]).astype(np.float32)
    corners = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 4
    cross = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], np.float32) / 4
    planes = zip(np.dsplit(noise * masks, 3), (corners, cross, corners), strict=True)
    noise = np.dstack([cv2.filter2D(plane, -1, kernel) for plane, kernel in planes])
    return to_srgb(np.clip(light + noise, 0, 1))


def grain(image: np.ndarray, rng: Generator, sigma: float | tuple[float, float] = (0.0, 30.0)) -> np.ndarray:
    """Add noise with grains larger than a pixel, as film has it and cameras that smooth their noise.

    The colours share a random part of the noise, and the result is clipped.
    """
    sigma = _draw(rng, sigma)
    own, common = (rng.standard_normal((*image.shape[:2], n), dtype=np.float32) for n in (3, 1))
    shared, size = rng.uniform(0, 1), rng.uniform(0.4, 1.2)
    import cv2

    noise = cv2.GaussianBlur(np.sqrt(1 - shared) * own + np.sqrt(shared) * common, (0, 0), size)
    return np.clip(image + noise * np.float32(sigma / 255 / noise.std()), 0, 1).astype(np.float32)


def photo_noise(image: np.ndarray, rng: Generator) -> np.ndarray:
    """The noise of everyday photographs: sensor noise, grain or white noise, then JPEG; or nothing.

    A quarter is left unchanged, so that the network learns to preserve clean images. The others get `bayer_noise`,
    `grain` or `gaussian_noise` of any strength from none, weak ones more often, and 60 % of them become a JPEG of
    quality 30 to 95; a tenth is a JPEG without noise.
    """
    clean, only_jpeg, jpeg = rng.random(3) < (0.25, 0.1 / 0.75, 0.6)
    kind, strength, quality = rng.integers(3), rng.random() ** 2, int(rng.integers(30, 96))
    if clean:
        return image.astype(np.float32)
    if only_jpeg:
        return jpeg_compress(image, quality)
    noisy = (
        bayer_noise(image, rng) if kind == 0
        else grain(image, rng, 30 * strength) if kind == 1
        else gaussian_noise(image, rng, 50 * strength)
    )  # fmt: skip
    return jpeg_compress(noisy, quality) if jpeg else noisy


@dataclass(frozen=True)
class RainLayer:
    """Streaks at one distance from the camera: the nearer, the longer, wider, sparser and brighter."""

    drops: float  # streaks per 10,000 pixels
    length: tuple[float, float]  # range, in pixels
    width: float  # standard deviation across the streak, in pixels
    brightness: tuple[float, float]  # range, of the streak's opacity


RAIN_LAYERS = (
    RainLayer(drops=60, length=(9, 15), width=0.50, brightness=(0.10, 0.30)),
    RainLayer(drops=16, length=(18, 30), width=0.70, brightness=(0.20, 0.50)),
    RainLayer(drops=3, length=(36, 60), width=1.00, brightness=(0.30, 0.65)),
)


def streak_kernel(length: float, width: float, degrees: float) -> np.ndarray:
    """One rain streak, odd-sized (k, k) float32, maximum 1: a Gaussian across, a raised cosine along.

    length: in pixels; width: standard deviation, in pixels; degrees: off the vertical, positive leans right.
    """
    radius = int(np.ceil(length / 2 + 3 * width))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    slant = np.deg2rad(degrees)
    across = x * np.cos(slant) + y * np.sin(slant)
    along = np.clip((y * np.cos(slant) - x * np.sin(slant)) / length, -0.5, 0.5)
    kernel = np.exp(-0.5 * (across / width) ** 2) * np.cos(np.pi * along) ** 2
    return (kernel / kernel.max()).astype(np.float32)


def rain_mask(shape: tuple[int, int], rng: Generator, layer: RainLayer, degrees: float, groups: int = 4) -> np.ndarray:
    """Opacity of one layer's streaks, (H, W) in [0, 1].

    The drops fall in a few groups, each with its own length and a direction some degrees off the common
    one, so that the streaks are not ruled lines.
    """
    import cv2

    mask = np.zeros(shape, np.float32)
    for _ in range(groups):
        kernel = streak_kernel(rng.uniform(*layer.length), layer.width, degrees + rng.normal(0, 2.5))
        hit = rng.random(shape, dtype=np.float32) < layer.drops / 1e4 / groups
        drops = hit * rng.uniform(*layer.brightness, shape).astype(np.float32)
        mask = np.maximum(mask, cv2.filter2D(drops, -1, kernel, borderType=cv2.BORDER_CONSTANT))
    return np.clip(mask, 0, 1)


def rain_streaks(image: np.ndarray, rng: Generator, layers: tuple[RainLayer, ...] = RAIN_LAYERS) -> np.ndarray:
    """Add rain: streaks at several depths behind a veil of haze.

    The heavy-rain model ``y = t * (x + s_1 + ... + s_n) + (1 - t) * airlight`` of Yang et al., "Deep joint
    rain detection and removal from a single image", CVPR 2017, except that each layer ``s`` is laid over
    the image as a translucent white (``1 - (1 - x)(1 - s)``), so that bright places do not burn out.
    Lengths and widths are in pixels, for images of roughly 300 to 1000 pixels.

    layers: from far to near.
    """
    degrees = rng.uniform(-25, 25)
    amount = rng.uniform(0.7, 1.1)  # drizzle to downpour
    transmission = rng.uniform(0.88, 0.96)
    airlight = rng.uniform(0.65, 0.80)
    x = image.astype(np.float32)
    for layer in layers:
        s = amount * rain_mask(image.shape[:2], rng, layer, degrees)[..., None]  # (H, W, 1), no colour
        x = 1 - (1 - x) * (1 - s)
    return np.clip(transmission * x + (1 - transmission) * airlight, 0, 1).astype(np.float32)


def added_rain(
    image: np.ndarray,
    rng: Generator,
    density: tuple[float, float] = (10.0, 100.0),
    length: tuple[float, float] = (10.0, 70.0),
    width: tuple[float, float] = (0.5, 1.2),
    brightness: tuple[float, float] = (0.15, 0.8),
) -> np.ndarray:
    """Add rain as in Rain100L and Rain100H: grey streaks of one kind are added, and clipped.

    The model ``y = x + s`` of Yang et al. (see `rain_streaks`): an image has one direction, and streaks of about one
    length, width and brightness.

    density: drops per 10,000 pixels; length, width: in pixels, the width as the standard
    deviation across; brightness: at a streak's middle. Of all ranges one value is drawn for each image, densities and
    lengths log-uniformly.
    """
    drops, typical = np.exp([rng.uniform(*np.log(density)), rng.uniform(*np.log(length))])
    brightest = rng.uniform(*brightness)
    layer = RainLayer(drops, (0.7 * typical, 1.3 * typical), rng.uniform(*width), (0.4 * brightest, brightest))
    streaks = rain_mask(image.shape[:2], rng, layer, degrees=rng.uniform(-35, 35))
    return np.clip(image + streaks[..., None], 0, 1).astype(np.float32)


def camera_path(rng: Generator, steps: int = 500) -> np.ndarray:
    """Path of a point on the sensor while a hand-held camera exposes: (steps, 2) in arbitrary units.

    A random walk of the velocity with inertia, a pull back to the start (the hand corrects itself) and a
    few sudden jerks, after Boracchi and Foi, "Modeling the performance of image restoration from motion
    blur", TIP 2012, much as Kupyn et al. do it in "DeblurGAN", CVPR 2018.
    """
    position, velocity = np.zeros(2), rng.standard_normal(2)
    pull, shiver, jerk_rate = rng.uniform(0, 2e-4), rng.uniform(0.03, 0.12), rng.uniform(0, 2) / steps
    path = np.empty((steps, 2))
    for step in range(steps):
        velocity = 0.99 * velocity + shiver * rng.standard_normal(2) - pull * position
        if rng.random() < jerk_rate:
            velocity = 1.5 * rng.standard_normal(2)
        position = position + velocity
        path[step] = position
    return path


def motion_kernel(rng: Generator, extent: tuple[float, float] = (5.0, 15.0)) -> np.ndarray:
    """A camera-shake kernel, odd-sized (k, k) float32, non-negative, sum 1.

    The path is scaled to an extent (its larger side, in pixels) drawn from the given range and each of its
    points is shared among the four nearest pixels. Its centre of mass is put in the middle of the kernel: the
    blurred image then does not move against the sharp one.
    """
    path = camera_path(rng)
    path = path * (rng.uniform(*extent) / np.ptp(path, axis=0).max())
    path = path - path.mean(axis=0)
    radius = int(np.ceil(np.abs(path).max())) + 1
    corner = np.floor(path).astype(int)
    part = path - corner  # sub-pixel position, in [0, 1)
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1])
            np.add.at(kernel, (corner[:, 0] + radius + dy, corner[:, 1] + radius + dx), weight)
    return (kernel / kernel.sum()).astype(np.float32)


def motion_blur(
    image: np.ndarray, rng: Generator, extent: tuple[float, float] = (5.0, 15.0), sharp: float = 0.0
) -> np.ndarray:
    """Blur by camera shake: ``y = k * x`` in linear light, where exposure adds up, with reflected borders.

    extent: range of the kernel's larger side, in pixels.
    sharp: probability that the image is left unchanged, so that the network learns to preserve sharp images.
    """
    import cv2

    if sharp and rng.random() < sharp:
        return image.astype(np.float32)
    kernel = motion_kernel(rng, extent)[::-1, ::-1]  # filter2D correlates; flipped, it convolves
    light = cv2.filter2D(to_linear(image), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    return to_srgb(np.clip(light, 0, 1))


Degrade = Callable[[np.ndarray, Generator], np.ndarray]

DEGRADATIONS: dict[str, Degrade] = {
    function.__name__: function
    for function in (gaussian_noise, found_noise, sensor_noise, bayer_noise, grain, photo_noise)
    + (rain_streaks, added_rain, motion_blur)
}


def degrade_image(image: np.ndarray, degrade: Degrade, seed: int, name: str) -> np.ndarray:
    """Degrade an image (H, W, 3) uint8, with random numbers of (seed, name) alone; the result is clipped to uint8."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return to_uint8(degrade(image.astype(np.float32) / 255, rng))


def find_degradation(name: str, options: dict) -> Degrade:
    """One of the degradations above, or a user's own as ``module:name``, with its own options.

    Raises:
        UserError: there is none of that name, or it has no such option.
    """
    own = is_object_name(name)
    if not own and name not in DEGRADATIONS:
        raise UserError(f"SYNTHESIS.NAME is one of {', '.join(DEGRADATIONS)} or module:name, got {name!r}")
    function = import_object(name, "SYNTHESIS.NAME") if own else DEGRADATIONS[name]
    if not callable(function):
        raise UserError(f"SYNTHESIS.NAME {name} is {function!r:.60}; name a function of an image and a generator")
    known = list(inspect.signature(function).parameters.values())[2:]
    for key in () if any(p.kind is p.VAR_KEYWORD for p in known) else options:
        if key not in (names := [p.name for p in known]):
            raise UserError(f"SYNTHESIS.OPTIONS: {name} has no {key}; it has {', '.join(names) or 'none'}")
    return partial(_degrade_as_named, name=name, options=dict(options)) if own else partial(function, **options)


def _degrade_as_named(image: np.ndarray, rng: Generator, name: str, options: dict) -> np.ndarray:
    """By a user's own function, looked up by its name: processes that load data may not find its module by themselves.

    Raises:
        UserError: the result is no image of the same shape.
    """
    found = import_object(name, "SYNTHESIS.NAME")(image, rng, **options)
    if np.shape(found) != image.shape:
        raise UserError(f"SYNTHESIS.NAME {name} must return an image {image.shape}, got {np.shape(found)}")
    return np.asarray(found, np.float32)
