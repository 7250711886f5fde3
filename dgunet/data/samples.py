"""Clean photographs for demonstrations, from the scikit-image package, in three splits."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgunet.data.images import read_image
from dgunet.data.transforms import as_colour
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import open_file

MIN_SIDE = 32  # pixels; smaller images are thumbnails or icons


@dataclass(frozen=True)
class SamplePhoto:
    """A clean image. name: stem of the file to be written; crop: (top, left, height, width) in pixels or None for all;
    short_side: size the shorter side is reduced to, or None.
    """

    name: str
    path: Path
    crop: tuple[int, int, int, int] | None = None
    short_side: int | None = None

    def load(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB; a grey image gets three equal channels.

        Raises:
            UserError: it cannot be read, see `images.read_image`, or is too small.
        """
        image = as_colour(read_image(self.path, grey=True))
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise UserError(f"{self.path} has {width}x{height} pixels, less than {MIN_SIDE}x{MIN_SIDE}; remove it")
        if self.crop:
            top, left, height, width = self.crop
            image = image[top : top + height, left : left + width]
        if self.short_side:
            scale = self.short_side / min(image.shape[:2])
            import cv2

            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        return image

    def digest(self) -> str:
        """Hexadecimal digest of the file, the same for two crops of it."""
        with open_file(self.path) as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]


# The sharp photographs inside the scikit-image package: (file, crop, short side). The two motorcycles are a stereo pair
# and stay together. The retina's crop excludes the black frame; reducing the two large ones removes JPEG blocks.
EMBEDDED: dict[str, dict[str, tuple]] = {
    "train": {
        "brick": ("brick.png", None, None),
        "coins": ("coins.png", None, None),
        "grass": ("grass.png", None, None),
        "gravel": ("gravel.png", None, None),
        "hubble": ("hubble_deep_field.jpg", None, 512),
        "moon": ("moon.png", None, None),
        "motorcycle_left": ("motorcycle_left.png", None, None),
        "motorcycle_right": ("motorcycle_right.png", None, None),
        "retina": ("retina.jpg", (206, 206, 1000, 1000), 512),
        "rocket": ("rocket.jpg", None, None),
        "tissue": ("ihc.png", None, None),
    },
    "val": {
        "camera_coat": ("camera.png", (256, 0, 256, 256), None),
        "camera_face": ("camera.png", (0, 128, 256, 256), None),
        "camera_tripod": ("camera.png", (256, 256, 256, 256), None),
    },
    "test": {
        "astronaut": ("astronaut.png", None, None),
        "cat": ("chelsea.png", None, None),
        "coffee": ("coffee.png", None, None),
    },
}
SPLITS = tuple(EMBEDDED)


def sample_photos(split: str) -> list[SamplePhoto]:
    """The photographs of one split of `EMBEDDED`.

    Raises:
        UserError: scikit-image is not installed, or lacks one.
    """
    spec = importlib.util.find_spec("skimage")  # its files only; skimage.data itself may try to download
    if spec is None:
        raise UserError(
            "the built-in photographs come with scikit-image: pip install scikit-image, or give --source and "
            "--test_source"
        )
    folder = Path(spec.origin).parent / "data"
    photos = [SamplePhoto(name, folder / file, crop, side) for name, (file, crop, side) in EMBEDDED[split].items()]
    for photo in photos:
        if not photo.path.is_file():
            raise UserError(
                f"this scikit-image has no {photo.path.name} in {folder}: pip install -U scikit-image, or "
                "give --source and --test_source"
            )
    return photos
