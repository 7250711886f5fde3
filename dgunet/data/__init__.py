"""Images on disk and what is made of them: pairs, packed files, training crops, simulated degradations."""

from dgunet._moved import former_names
from dgunet.data.images import image_size, open_image, open_luma, read_image, read_luma, to_tensor, write_image
from dgunet.data.packed import Packed, list_packed
from dgunet.data.pairs import Pair, find_images, find_pairs, hold_out, images_by_name, list_images

__all__ = [
    "Packed", "Pair", "find_images", "find_pairs", "hold_out", "image_size", "images_by_name", "list_images",
    "list_packed", "open_image", "open_luma", "read_image", "read_luma", "to_tensor", "write_image",
]  # fmt: skip

__getattr__ = former_names(__name__)
