"""Weights to share: .safetensors files that describe their network and training.

The metadata has ``dgunet``, as JSON

    model    what `load.describe_model` gives, by which the network is built again
    record   optional: what the weights are for and how they were trained, see `registry.Record`

and ``sha256``, of that text and the weights: the format has no checksum of its own.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from dgunet.runtime.errors import UserError
from dgunet.runtime.files import atomic_write


def save_weights(path: str | Path, state_dict: dict[str, Tensor], model: dict, record: dict | None = None):
    """Write weights to a .safetensors file atomically, in the precision they have.

    Args:
        path: of the file; its folder is made if needed.
        state_dict: the weights.
        model: see `load.describe_model`.
        record: the fields of a `registry.Record` but its ``task`` and ``path``, or None.
    """
    from safetensors.torch import save

    weights = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    about = json.dumps({"model": model} | ({} if record is None else {"record": record}))
    encoded = save(weights, {"format": "pt", "dgunet": about, "sha256": _digest(weights, about)})
    with atomic_write(path) as temporary:  # safetensors' own writer makes files that nobody else may read
        temporary.write_bytes(encoded)


def read_weights(path: str | Path) -> dict:
    """The content of a .safetensors file, as a checkpoint has it.

    Returns:
        ``state_dict``; of a file of ours also ``model``, ``record`` and ``noise_sigma``, where it has them.

    Raises:
        UserError: not such a file, or a damaged one.
    """
    with _open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        metadata = file.metadata() or {}
        about = json.loads(metadata.get("dgunet", "{}"))
        if "dgunet" in metadata and metadata.get("sha256") != _digest(weights, metadata["dgunet"]):
            raise ValueError("its checksum differs")
        content = {"state_dict": weights} | {key: about[key] for key in ("model", "record") if key in about}
        noise = content.get("record", {}).get("noise_sigma")
    return content | ({} if noise is None else {"noise_sigma": noise})


def read_about(path: str | Path) -> dict:
    """The ``model`` and ``record`` of a file of ours, without reading its weights; raises as `read_weights`."""
    with _open(path, "numpy") as file:
        return json.loads(file.metadata()["dgunet"])


@contextlib.contextmanager
def _open(path: str | Path, framework: str):
    from safetensors import safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except Exception as error:  # a file of another kind makes the reader fail in any way there is
        raise UserError(f"{path} is not a safetensors file, or is damaged; download or copy it again") from error


def _digest(weights: dict[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
