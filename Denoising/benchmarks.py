"""The MATLAB files of the SIDD and DND benchmarks."""

from pathlib import Path

import numpy as np

from dgunet.runtime.errors import UserError


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
