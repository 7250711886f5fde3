"""Save, load and recognise checkpoints.

A checkpoint of ours is a dict with at least

    state_dict   the weights to use (the averaged ones where EMA was on)
    model        {"name": ..., "arguments": {...}}: what `DGUNet` needs to be built again, and of a known degradation
                 "degradation": {"kind": ..., its settings}, see `degradations.KINDS`; its tensors are weights

may have

    noise_sigma  (lowest, highest) standard deviation of the Gaussian noise that they are for, in 8-bit levels

and, for resuming, the training state that `engine.Trainer` adds. Every file is loaded with ``weights_only=True``: a
checkpoint never runs code. Weights to share are .safetensors files with the same entries, see `weights`. Those of other
training programs are found under other keys, see `weights_of`.
"""

import contextlib
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dgunet.degradations import KINDS, Degradation, describe_degradation, rebuild_degradation
from dgunet.errors import UserError, shorten_list
from dgunet.files import atomic_write
from dgunet.local import check_windows
from dgunet.model import VARIANTS, DGUNet
from dgunet.original_checkpoints import STAGES, convert_original, is_original
from dgunet.pretrained import locate
from dgunet.weights import read_weights


def save_checkpoint(content: dict, path: str | Path):
    """Write ``content`` to ``path`` atomically: under a temporary name first, on disk, then renamed.

    A run killed while saving leaves the previous file under ``path`` untouched, and a temporary file that the next save
    removes, see `files.replacing`.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint, given by its path or by a name (see `list_pretrained`), onto the CPU; no code in it is run.

    Raises:
        UserError: no such file or name, not a checkpoint, damaged, or one that asks to run code.
    """
    path = locate(path)
    try:
        if path.is_dir():
            likely = [*path.glob("*.safetensors"), path / "model_best.pth"][0]
            raise UserError(f"{path} is a folder; give the checkpoint file itself, such as {likely}")
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}; check the path (it is relative to {Path.cwd()})")
        file = open(path, "rb")
        start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if start[8:] == b"{":  # a .safetensors file: eight bytes tell the length of a JSON text, with which it goes on
        file.close()
        return read_weights(path)
    file.seek(0)
    try:
        with file, warnings.catch_warnings(), _allow_stand_ins():
            warnings.simplefilter("ignore")  # about pickle protocols, kinds of tensors, ... of files refused anyway
            _check_records(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind makes the reader fail in any way there is
        if (reason := _refusal(error)) is not None:
            raise UserError(f"{path} {reason}") from error
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged; download or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint with named weights")
    return content


def _refusal(error: Exception) -> str | None:
    """Why a file is refused that is no damaged one, and what to do; None for other errors of its reader."""
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript program, not a checkpoint; save its state dict, torch.save(program.state_dict(), path)"
    if re.search("Unsupported operand 1(4[0-9]|5[0-2])", text):  # of the pickle protocols 4 and 5
        return "is a pickle of protocol 4 or 5, which cannot be read safely; save it with torch.save(content, path)"
    if not (isinstance(error, pickle.UnpicklingError) and re.search("GLOBAL|must be imported|unrecognized", text)):
        return None
    name = re.search(r"GLOBAL (\S+)", text) or re.search(r"to load (.+)|unrecognized function (.+)", text)
    what = f"{name[name.lastindex]:.100}" if name else "Python objects"
    return (
        f"holds {what}, and to rebuild that would run code when loaded, which is refused; save the plain state dict, "
        "torch.save(model.state_dict(), path), and use that (a file that you trust is read by "
        "torch.load(path, weights_only=False))"
    )


class _StandIn:
    """In the place of an object that lies beside the weights; it holds nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class _StandInDict:
    """In the place of a dict of some class: a plain one, with the same entries."""

    def __new__(cls, *args):
        return OrderedDict()


class _NumPyType:
    """In the place of a ``numpy.dtype``."""

    def __init__(self, code="", *_):
        self.code = code.decode() if isinstance(code, bytes) else str(code)

    def __setstate__(self, state):
        self.order = str(state[1]).replace("|", "")

    order = ""


def _numpy_scalar(kind: _NumPyType, data=b""):
    """A NumPy number as Python's; what else a scalar may be is ignored."""
    if isinstance(kind, _NumPyType) and isinstance(data, bytes) and re.fullmatch(r"[biufc]\d+", kind.code):
        number = np.frombuffer(data, np.dtype(kind.order + kind.code), count=1)[0]
        return float(number) if kind.code[0] == "f" else complex(number) if kind.code[0] == "c" else number.item()
    return _StandIn()


# What training loops keep beside the weights, none of which is made when a checkpoint is read: NumPy's numbers come as
# Python's, the others as stand-ins. What is not here is refused.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before NumPy 2, and since
_PATHS = [f"{pure}{system}Path" for pure in ("", "Pure") for system in ("", "Posix", "Windows")]
_STAND_INS = {
    "numpy.dtype": _NumPyType,
    **{f"{module}.scalar": _numpy_scalar for module in _NUMPY},
    **dict.fromkeys(
        ("collections.defaultdict", "yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"), _StandInDict
    ),
    **dict.fromkeys(
        ["numpy.ndarray", *(f"{module}._reconstruct" for module in _NUMPY)]
        + ["argparse.Namespace", "types.SimpleNamespace", "typing.Any"]
        + [f"builtins.{name}" for name in ("dict", "list", "tuple", "frozenset", "int", "float", "str", "bool")]
        + [f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")]
        + [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS]
        + [f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.Metadata")]
        + [f"omegaconf.{name}" for name in ("base.ContainerMetadata", "nodes.AnyNode")],
        _StandIn,
    ),
}
_reading = threading.Lock()


@contextlib.contextmanager
def _allow_stand_ins() -> Iterator[None]:
    """Inside, PyTorch's reader takes the stand-ins for what they stand for; which it does for all threads at once."""
    with _reading, torch.serialization.safe_globals([(what, name) for name, what in _STAND_INS.items()]):
        yield


def _check_records(file: BinaryIO):
    """Check the zip that PyTorch writes as PyTorch does not: its checksums, and that it does not swell when read.

    The format before PyTorch 1.6 is no zip and has no checksums.
    """
    if file.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            unique = len({record.filename for record in records}) == len(records)
            swollen = sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size
            if not unique or swollen or archive.testzip() is not None:
                raise zipfile.BadZipFile("damaged records")
    file.seek(0)


def describe_model(model: DGUNet) -> dict:
    """The ``model`` entry of a checkpoint: what `load_model` needs to build the network again."""
    known = describe_degradation(model.degradation)
    description = {"name": model.name, "arguments": dict(model.arguments)}
    return description | ({} if known is None else {"degradation": known})


def load_model(
    path: str | Path,
    task: str | None = None,
    device="cpu",
    degradation: Degradation | None = None,
    content: dict | None = None,
) -> DGUNet:
    """Build the network that a checkpoint was made by and load its weights.

    The weights may be some that come with dgunet (``load_model("denoising_gaussian")``, see
    ``list_models(pretrained=True)``), or in a file, .safetensors or .pth. That may be one of ours or in the original
    authors' layout, a training checkpoint or a bare state dict, of a wrapped network or not; which weights of a file
    are meant, `weights_of` says. Where the file does not describe its network, this is found from names and shapes. (A
    bare state dict with one middle stage does not say how often that is applied: it is taken to be a shared one, of the
    paper's 7 stages, with a warning where it is none of the paper's networks.)

    Args:
        path: the checkpoint file, or the name of weights that come with dgunet.
        task: if given (``"denoising"``, ...), refuse a checkpoint that was made for another task. Deblurring's and
            denoising's DGUNet are the same network, so weights in the original layout pass for both.
        device: where to put the model.
        degradation: the known degradation of a network that was built with one of your own, or one in the place of the
            file's. One of `dgunet.degradations` in which nothing is learned, such as a `Blur`, stays as it is given;
            any other is given the file's values.
        content: what `read_checkpoint` gave for ``path``, where it has been read already.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: no such file or name, not a checkpoint, not a DGUNet, missing or unknown weights (all are listed),
            weights that are no finite numbers, another task.
    """
    content = read_checkpoint(path) if content is None else content
    description = _description(content, path)
    state_dict = weights_of(content, path)
    arguments = description.get("arguments", {})
    if arguments.keys() != DGUNet.default_arguments().keys():  # not described, or by a version that had fewer
        arguments = _infer_arguments(state_dict, path) | arguments
    fixed = isinstance(degradation, tuple(KINDS.values())) and not list(degradation.parameters())
    with torch.device("meta"):  # so that a network which does not fit the weights costs nothing, whatever its size
        if degradation is None:
            degradation = _infer_degradation(state_dict, description, path)
        try:
            model = DGUNet(**arguments, degradation=degradation)
        except ValueError as error:
            raise UserError(f"{path}: cannot build the network it describes: {error}") from error
    names = [description["name"]] if description.get("name") in VARIANTS else _matching_variants(arguments, degradation)
    fitting = [name for name in names if task in (None, VARIANTS[name].task)]
    if names and not fitting:
        raise UserError(
            f"{path} holds a {' or '.join(names)}, not a network for {task.replace('_', ' ')}; "
            f"give weights trained for {task.replace('_', ' ')}"
        )
    model.name = fitting[0] if fitting else None
    load_weights(model, state_dict, path, fixed)
    if not (description or names) and model.stages == STAGES and len(model.middle) == 1:
        warnings.warn(
            f"{path} does not say how often its middle stage is applied; {STAGES} stages are assumed, as in the paper "
            "(a file with the entry 'model', describe_model(model), says it)",
            stacklevel=2,
        )
    record = content.get("record")
    model.local = check_windows(record.get("local") if isinstance(record, dict) else None)
    return model.eval().to(device, memory_format=torch.channels_last)  # faster wherever it runs


def _description(content: dict, path) -> dict:
    """The ``model`` entry as `describe_model` writes it; empty where there is none."""
    if "model" not in content:
        return {}
    description = content["model"]
    if isinstance(description, dict) and "arguments" not in description and _networks(description):
        return {}  # others keep the weights there
    sound = isinstance(description, dict) and isinstance(description.get("arguments"), dict)
    sound = sound and isinstance(description.get("name"), str | None)
    sound = sound and isinstance(description.get("learned_matrix", True), bool)  # of files without "degradation"
    known = description.get("degradation", {"kind": ""}) if sound else None
    sound = sound and isinstance(known, dict) and isinstance(known.get("kind"), str)
    sound = sound and all(isinstance(value, int | float | str) for value in known.values())
    # Names and shapes tell the other arguments; how often a shared stage is applied they do not.
    if not sound or "stages" not in description["arguments"]:
        raise UserError(f"{path}: its 'model' entry does not describe a DGUNet as describe_model(model) does")
    unknown = [name for name in description["arguments"] if name not in DGUNet.default_arguments()]
    if unknown:
        raise UserError(f"{path}: DGUNet has no argument {shorten_list([str(name) for name in unknown])}")
    return description


def weights_of(content: dict, path="the checkpoint") -> dict[str, Tensor]:
    """The weights in a checkpoint's content, under our names, whichever layout they came in.

    They are found by their names, under whatever keys and behind whatever prefix: ``{"net": ...}``, Lightning's
    ``{"state_dict": {"model.last.rho": ...}}``; what DistributedDataParallel, `torch.compile` and the like add to names
    is taken off. Where there are several networks, averaged weights are meant: those whose keys or prefix have one of
    the words ``ema``, ``swa``, ``averaged``, as ``params_ema`` has, or with ``n_averaged`` beside them; and else those
    under ``state_dict`` or ``params``.

    Raises:
        UserError: no DGUNet, or several of which none is meant; averaged weights that cannot be read.
    """
    found = _networks(content)
    if not found:
        tensors = [str(key) for key, value in content.items() if isinstance(value, Tensor)]
        what = (
            f"weights named {shorten_list(tensors, 3)}"
            if tensors
            else f"the keys {shorten_list(list(map(str, content)))}"
        )
        raise UserError(f"{path} holds no DGUNet: none of the names that its weights have is there, but {what}")
    if averaged := [place for place in found if _is_averaged(place)]:
        choice = averaged
    else:
        parts = [content, *(part for part in content.values() if isinstance(part, dict))]
        entries = {str(key): value for part in parts for key, value in part.items() if _is_averaged(key)}
        if hidden := [key for key, value in entries.items() if _has_tensors(value) and not _networks({key: value})]:
            raise UserError(
                f"{path} holds averaged weights that are not a DGUNet's ({shorten_list(hidden)}); save those that "
                "are meant alone, torch.save(model.state_dict(), path)"
            )
        ranked = [[place for place in found if place.split(".")[0] == key] for key in ("state_dict", "params")]
        choice = next(filter(None, ranked), list(found))
    if len(choice) > 1:
        raise UserError(
            f"{path} holds several networks: {shorten_list([place or 'at the top' for place in choice])}; save the one "
            "that is meant alone, torch.save(model.state_dict(), path)"
        )
    state_dict = found[choice[0]]
    if not all(isinstance(name, str) for name in state_dict):
        raise UserError(f"{path} holds weights whose names are not text; save model.state_dict() as it is")
    sparse = [name for name, value in state_dict.items() if not _is_dense(value)]
    if sparse:
        raise UserError(
            f"{path} holds sparse, quantised or otherwise special tensors, not weights: {shorten_list(sparse)}"
        )
    return convert_original(state_dict, path) if is_original(state_dict) else state_dict


# What wrappers of a network, or of a part of it, add to names: DistributedDataParallel and AveragedModel,
# torch.compile, activation checkpointing, FullyShardedDataParallel.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# A name that every DGUNet has, ours or in the authors' layout, and what is before it.
_OF_A_NETWORK = re.compile(r"(.*\.)?(?:last\.(?:rho$|proximal\.|degradation\.)|shallow_feat1\.)", re.DOTALL)


def _networks(content: dict) -> dict[str, dict[str, Tensor]]:
    """The weights of each DGUNet in a checkpoint's content, by where they are: its keys, and the prefix of the names.

    Not those of ``raw_state_dict``, which our training states have besides the averaged ones, nor what optimizers keep.
    """
    found: dict[str, dict[str, Tensor]] = {}

    def look(part: dict, keys: tuple[str, ...]):
        tensors = {name: value for name, value in part.items() if isinstance(value, Tensor)}
        bare = {_WRAPPERS.sub("", name) if isinstance(name, str) else name: name for name in tensors}
        if len(bare) < len(tensors):  # with a wrapper's prefix and without: two networks
            bare = {name: name for name in tensors}
        matches = [_OF_A_NETWORK.match(name) for name in bare if isinstance(name, str)]
        prefixes = dict.fromkeys(match[1] or "" for match in matches if match)
        if not prefixes and is_original([name for name in bare if isinstance(name, str)]):
            prefixes = {"": None}
        for prefix in prefixes:
            weights = {
                name.removeprefix(prefix) if prefix else name: tensors[given]
                for name, given in bare.items()
                if not prefix or (isinstance(name, str) and name.startswith(prefix))
            }
            count = weights.pop("n_averaged", None)  # of an AveragedModel, which averages nothing while it is 0
            begun = isinstance(count, Tensor) and count.dtype == torch.long and _is_dense(count) and bool(count.any())
            averaged = ("averaged",) if begun and not _is_averaged(".".join((*keys, prefix))) else ()
            place = ".".join((*keys, *averaged, prefix.rstrip("."))).rstrip(".")
            if count is None or begun:
                found[place] = weights
            else:
                idle[place] = weights
        for key, value in part.items():
            if isinstance(value, dict) and len(keys) < 4 and key != "raw_state_dict" and "optim" not in str(key):
                look(value, (*keys, str(key)))

    idle: dict[str, dict[str, Tensor]] = {}
    look(content, ())
    return found or idle


def _is_averaged(place) -> bool:
    """Whether keys or a prefix say that averaged weights are there."""
    words = set(re.split("[^a-z]+", str(place).lower()))
    return not words.isdisjoint({"ema", "swa", "averaged"}) and words.isdisjoint({"non", "no", "without"})


def _has_tensors(value, depth: int = 3) -> bool:
    """Whether there are tensors of more than one number in a value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and any(_has_tensors(item, depth - 1) for item in value)
    return isinstance(value, Tensor) and not value.is_nested and value.numel() > 1


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and value.device.type == "cpu" and not (value.is_nested or value.is_quantized)


def load_weights(
    model: DGUNet, state_dict: dict[str, Tensor], path="the checkpoint", keeping_degradation: bool = False
):
    """Load weights under our names into a model; what is on the ``meta`` device is put on the CPU.

    Args:
        model, state_dict: where to, and what.
        path: the file, for messages.
        keeping_degradation: leave the known degradation as it is, whatever the file has of one.

    Raises:
        UserError: see `check_tensors`.
    """
    expected = model.state_dict()
    if keeping_degradation:
        expected, state_dict = (
            {name: value for name, value in weights.items() if not name.startswith("degradation.")}
            for weights in (expected, state_dict)
        )
    check_tensors(expected, state_dict, path, model.name or "this network")
    # Copied either way: the file's tensors may share memory.
    new = {name: state_dict[name].to(value.dtype, copy=True) for name, value in expected.items() if value.is_meta}
    model.load_state_dict(new, strict=False, assign=True)
    model.load_state_dict({name: state_dict[name] for name in expected.keys() - new.keys()}, strict=False)


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], path, what: str, exact: bool = False):
    """Check that tensors from a file have the names, the shapes and the kinds of those expected.

    Args:
        expected: tensors of any device; only their shapes and types count.
        found: those from the file, on the CPU.
        path: the file, for the message.
        what: that which they are for.
        exact: whether floating-point numbers must have the precision expected.

    Raises:
        UserError: every difference, or all that hold NaN or infinite numbers.
    """
    common = [name for name in expected if name in found]
    misfits = {name: _mismatch(found[name], expected[name], exact) for name in common}
    problems = [
        f"{label}: {shorten_list(names)}"
        for label, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unknown", sorted(found.keys() - expected.keys())),
            ("of another kind", sorted(f"{name} {misfit}" for name, misfit in misfits.items() if misfit)),
        )
        if names
    ]
    if problems:
        raise UserError(f"{path} does not fit {what}; {'; '.join(problems)}")
    broken = [name for name in common if not found[name].to(expected[name].dtype).isfinite().all()]
    if broken:
        raise UserError(f"{path} has NaN or infinite numbers in {shorten_list(broken)}; use an earlier checkpoint")


_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def _mismatch(found: Tensor, expected: Tensor, exact: bool) -> str | None:
    if not isinstance(found, Tensor) or not _is_dense(found):
        return "is no dense tensor"
    if found.shape != expected.shape:
        return f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.dtype != expected.dtype and (exact or not {found.dtype, expected.dtype} <= _FLOATS):
        return f"{found.dtype} instead of {expected.dtype}".replace("torch.", "")
    if found.nbytes > found.untyped_storage().nbytes():
        return "is expanded from fewer numbers"
    return None


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
            parts = {part for name in state_dict for part in name.split(".proximal.")[1:]}
            fused, modulated = (any(part.startswith(what) for part in parts) for what in ("fusion.", "encoder.isff."))
            adaptive = any(part.endswith("scale_conv.weight") for part in parts)
            arguments["attention"] = "attention_conv.weight" in parts
            concat = any(name.startswith("middle.") and name.endswith(".fusion.conv.weight") for name in state_dict)
            concat |= not middle and arguments["attention"]  # of two stages the names do not tell, nor does it matter
            arguments["pathways"] = fused or modulated
            arguments["fusion"] = "concat" if concat else "subspace" if fused else "none"
            if modulated or middle:  # of two stages the first has no ISFF
                arguments["isff"] = "adaptive" if adaptive else "additive" if modulated else "none"
        arguments["gradient"] = any(re.search(r"\.rho$|.\.degradation\.", name) for name in state_dict)
        if "last.proximal.fusion.conv.weight" in state_dict:
            out_width = state_dict["last.proximal.fusion.conv.weight"].shape[0]
            arguments |= dict(final_fusion="concat", final_growth=out_width - width)
        elif "last.proximal.fusion.basis_conv.weight" in state_dict:
            arguments["final_fusion"] = "subspace"
    except KeyError as error:
        raise UserError(f"{path} is an incomplete DGUNet: {error} is missing") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} holds no DGUNet: its convolutions do not have four dimensions") from error
    return arguments


def _infer_degradation(state_dict: dict[str, Tensor], description: dict, path) -> Degradation | None:
    known = description.get("degradation")
    if known is None and any(name.startswith("last.degradation.") for name in state_dict):
        return None
    own = {name: value.to("meta") for name, value in state_dict.items() if name.startswith("degradation.")}
    if known is None and not own and "last.rho" not in state_dict:  # no gradient step, so none is learned
        return None
    tensors = {name.removeprefix("degradation."): value for name, value in own.items()}
    try:
        if known is None:  # a bare state dict, or a file from before other kinds
            block = round(tensors["matrix"].shape[1] ** 0.5)
            known = {"kind": "block_sampling", "block": block, "learned": description.get("learned_matrix", True)}
        return rebuild_degradation(known, tensors)
    except Exception as error:  # what describes none fails in many ways
        raise UserError(
            f"{path} was trained with a known degradation that is not in the file; "
            "pass it as load_model(path, degradation=...)"
        ) from error


def _matching_variants(arguments: dict, degradation: Degradation | None) -> list[str]:
    """Names of the paper's networks with these arguments; none for a network of the user's own."""
    names = []
    for name, variant in VARIANTS.items():
        built = DGUNet.default_arguments() | variant.arguments
        irrelevant = {"final_growth"} if built["final_fusion"] == "subspace" else set()
        same = all(arguments.get(key, built[key]) == built[key] for key in built if key not in irrelevant)
        if same and (variant.degradation is None) == (degradation is None):
            names.append(name)
    return names
