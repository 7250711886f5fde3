"""Save, load and recognise checkpoints.

A checkpoint of ours is a dict with at least

    state_dict   the weights to use (the averaged ones where EMA was on)
    model        {"name": ..., "arguments": {...}}: what `DGUNet` needs to be built again

may have, where it is shared (scripts/export_weights.py),

    about        how the weights came about
    noise_sigma  (lowest, highest) standard deviation of the Gaussian noise that they are for, in 8-bit levels

and, for resuming, the training state that `engine.Trainer` adds. Every file is loaded with ``weights_only=True``: a
checkpoint never runs code.
"""

import os
import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dgunet.degradations import BlockSampling
from dgunet.errors import UserError
from dgunet.model import VARIANTS, DGUNet
from dgunet.original import STAGES, convert_original, is_original


def save_checkpoint(content: dict, path: str | Path):
    """Write ``content`` to ``path`` atomically: under a temporary name first, on disk, then renamed.

    A run killed while saving leaves the previous file under ``path`` untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location="cpu") -> dict:
    """Read a checkpoint file without running any code in it.

    Raises:
        UserError: no such file, not a checkpoint, damaged, or one that asks to run code.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the checkpoint file itself, such as {path / 'model_best.pth'}")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check the path (it is relative to {Path.cwd()})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, of files refused anyway
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a file of another kind makes the reader fail in any way there is
        refused = "GLOBAL|not an allowed|Unsupported (?!operand)"  # an unknown operand is what a text file has
        if isinstance(error, pickle.UnpicklingError) and re.search(refused, str(error)):
            raise UserError(
                f"{path} holds Python objects that would run code when loaded, which is refused; "
                "save the plain state dict, torch.save(model.state_dict(), path), and use that"
            ) from error
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged; download or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint with named weights")
    return content


def describe_model(model: DGUNet) -> dict:
    """The ``model`` entry of a checkpoint: what `load_model` needs to build the network again."""
    description = {"name": model.name, "arguments": dict(model.arguments)}
    if isinstance(model.degradation, BlockSampling):
        description["learned_matrix"] = isinstance(model.degradation.matrix, torch.nn.Parameter)
    return description


def load_model(
    path: str | Path, task: str | None = None, device="cpu", degradation=None, content: dict | None = None
) -> DGUNet:
    """Build the network that a checkpoint was made by and load its weights.

    The file may be one of ours or in the original authors' layout, a training checkpoint or a bare state dict, with
    or without ``module.`` before its names: the variant is found from names and shapes. (A bare state dict with one
    middle stage does not say how often that is applied: it is taken to be a shared one, of the paper's 7 stages.)

    Args:
        path: the checkpoint file.
        task: if given (``"denoising"``, ...), refuse a checkpoint that was made for another task. Deblurring's and
            denoising's DGUNet are the same network, so weights in the original layout pass for both.
        device: where to put the model.
        degradation: the known degradation of a network that was built with one of your own.
        content: what `read_checkpoint` gave for ``path``, where it has been read already.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: not a checkpoint, not a DGUNet, missing or unknown weights (all are listed), another task.
    """
    content = read_checkpoint(path, map_location="cpu") if content is None else content
    description = content.get("model") if isinstance(content.get("model"), dict) else {}
    state_dict = weights_of(content, path)
    arguments = _infer_arguments(state_dict, path)
    try:
        arguments |= description.get("arguments", {})
        if degradation is None:
            degradation = _infer_degradation(state_dict, description, path)
        model = DGUNet(**arguments, degradation=degradation)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot build the network it describes: {error}") from error
    names = [description["name"]] if description.get("name") in VARIANTS else _matching_variants(arguments, degradation)
    if task is not None and names and not any(name.startswith(task) for name in names):
        raise UserError(
            f"{path} holds a {' or '.join(names)}, not a network for {task.replace('_', ' ')}; "
            f"give weights trained for {task.replace('_', ' ')}"
        )
    model.name = names[0] if names else None
    if len(names) > 1 and task is not None:
        model.name = next(name for name in names if name.startswith(task))
    load_weights(model, state_dict, path)
    return model.eval().to(device, memory_format=torch.channels_last)  # faster wherever it runs


def weights_of(content: dict, path="the checkpoint") -> dict[str, Tensor]:
    """The weights in a checkpoint's content, under our names, whichever layout they came in."""
    state_dict = content
    for key in ("state_dict", "params"):
        if isinstance(content.get(key), dict):
            state_dict = content[key]
            break
    state_dict = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if is_original(state_dict):
        return convert_original(state_dict)
    if not any(name.startswith("last.") for name in state_dict):
        raise UserError(f"{path} holds no DGUNet: none of the names that its weights have is there")
    return state_dict


def load_weights(model: DGUNet, state_dict: dict[str, Tensor], path="the checkpoint"):
    """Load weights under our names into a model; every difference in names or shapes is an error that lists them."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - expected.keys())
    reshaped = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & state_dict.keys()
        if state_dict[name].shape != expected[name].shape
    ]
    problems = [
        f"{label}: {_shorten(names)}"
        for label, names in (("missing", missing), ("unknown", unknown), ("of another shape", sorted(reshaped)))
        if names
    ]
    if problems:
        raise UserError(f"{path} does not fit {model.name or 'this network'}; {'; '.join(problems)}")
    model.load_state_dict(state_dict)


def _shorten(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _infer_arguments(state_dict: dict[str, Tensor], path) -> dict:
    """Arguments of `DGUNet` from the names and shapes of its weights."""
    try:
        width, channels = state_dict["last.proximal.shallow.conv.weight"].shape[:2]
        arguments = dict(channels=channels, width=width)
        middle = {name.split(".")[1] for name in state_dict if name.startswith("middle.")}
        arguments["shared"] = len(middle) < 2
        has_first = any(name.startswith("first.") for name in state_dict)
        arguments["stages"] = STAGES if len(middle) == 1 else len(middle) + 1 + has_first
        if has_first:
            wider = state_dict["first.proximal.encoder.blocks.0.conv1.weight"].shape[0]
            arguments["growth"] = wider - width
            arguments["pathways"] = any(".proximal.fusion." in name for name in state_dict)
            concat = "first.proximal.attention_conv.weight" in state_dict
            arguments["fusion"] = "concat" if concat else "subspace"
        if "last.proximal.fusion.conv.weight" in state_dict:
            out_width = state_dict["last.proximal.fusion.conv.weight"].shape[0]
            arguments |= dict(final_fusion="concat", final_growth=out_width - width)
        elif "last.proximal.fusion.basis_conv.weight" in state_dict:
            arguments["final_fusion"] = "subspace"
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is an incomplete DGUNet: {error} is missing") from error
    return arguments


def _infer_degradation(state_dict: dict[str, Tensor], description: dict, path) -> BlockSampling | None:
    if any(name.startswith("last.degradation.") for name in state_dict):
        return None
    matrix = state_dict.get("degradation.matrix")
    if matrix is None or matrix.dim() != 2:
        raise UserError(
            f"{path} was trained with a known degradation that is not in the file; "
            "pass it as load_model(path, degradation=...)"
        )
    learned = bool(description.get("learned_matrix", True))
    return BlockSampling(block=round(matrix.shape[1] ** 0.5), matrix=matrix, learned=learned)


def _matching_variants(arguments: dict, degradation) -> list[str]:
    """Names of the paper's networks with these arguments; none for a network of the user's own."""
    names = []
    for name, variant in VARIANTS.items():
        built = DGUNet.default_arguments() | variant
        irrelevant = {"final_growth"} if built["final_fusion"] == "subspace" else set()
        same = all(arguments.get(key, built[key]) == built[key] for key in built if key not in irrelevant)
        if same and name.startswith("compressive_sensing") == (degradation is not None):
            names.append(name)
    return names
