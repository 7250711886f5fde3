"""Save and load checkpoints.

Loading goes through three steps: `read_checkpoint` opens the file, `weights_of` and `_description` find the weights and
what network they are of, `load_model` builds the network and loads them. A checkpoint of ours is a dict with at least

    state_dict   the weights to use (the averaged ones where EMA was on)
    model        {"name": ..., "arguments": {...}}: the arguments of `DGUNet`, and for a known degradation
                 "degradation": {"kind": ..., its settings}, see `degradations.KINDS`; its tensors are weights;
                 for parts of the user's own "proximal" and "learned_degradation": ``module:name`` of what makes them,
                 which is never imported from here: `load_model` asks for it

may have

    noise_sigma  (lowest, highest) standard deviation of the Gaussian noise it was trained for, in 8-bit levels

and, to resume a training, the state that `trainer.Trainer` adds. Files are loaded with ``weights_only=True``: none runs
code. Weights to share are .safetensors files with the same entries, see `weights`.
"""

import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dgunet.checkpoints.original import STAGES, convert_original, is_original
from dgunet.checkpoints.registry import locate
from dgunet.checkpoints.safetensors import read_weights
from dgunet.model.degradations import KINDS, Degradation, describe_degradation, rebuild_degradation
from dgunet.model.local import check_windows
from dgunet.model.network import FACTORIES, DGUNet
from dgunet.model.variants import VARIANTS
from dgunet.runtime.errors import UserError, shorten_list
from dgunet.runtime.files import atomic_write
from dgunet.runtime.imports import is_object_name, object_name


def save_checkpoint(content: dict, path: str | Path):
    """Write ``content`` to ``path`` atomically, see `files.atomic_write`: a killed run leaves the previous file."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def describe_model(model: DGUNet) -> dict:
    """The ``model`` entry of a checkpoint: what `load_model` needs to build the network again."""
    known = describe_degradation(model.degradation)
    if known == {"kind": "own"} and model.degradation_name:
        known["name"] = model.degradation_name
    description = {"name": model.name, "arguments": dict(model.arguments)}
    own = {name: object_name(factory) for name, factory in model.factories.items()}
    return description | own | ({} if known is None else {"degradation": known})


# ---------------------------------------------------------------------------------------------------- 1. open the file


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint, on the CPU; no code in it is run.

    Args:
        path: a .safetensors or .pth file, or the name of weights that come with dgunet (see `list_pretrained`).

    Raises:
        UserError: no such file or name, not a checkpoint, damaged, or one that asks to run code.
    """
    path = locate(path)
    if os.path.isdir(path):
        likely = [*path.glob("*.safetensors"), path / "model_best.pth"][0]
        raise UserError(f"{path} is a folder; give the checkpoint file itself, such as {likely}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}; check the path (it is relative to {Path.cwd()})") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    # A .safetensors file begins with the length of a JSON text in eight bytes, and with that text.
    return read_weights(path) if start[8:] == b"{" else _read_pickle(path)


# NumPy's numbers, such as the PSNR that a training loop keeps beside its weights; before NumPy 2, and since.
_NUMPY_NUMBERS = [
    (np.dtype, "numpy.dtype"),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
]
_reading = threading.Lock()  # PyTorch allows them to all threads at once


def _read_pickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, kinds of tensors, ... of files refused anyway
            if zipfile.is_zipfile(file):  # every file since PyTorch 1.6, whose checksums PyTorch does not check
                with zipfile.ZipFile(file) as archive:
                    if (record := archive.testzip()) is not None:
                        raise zipfile.BadZipFile(record)
            file.seek(0)
            with _reading, torch.serialization.safe_globals(_NUMPY_NUMBERS):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind makes the reader fail in any way there is
        raise UserError(f"{path} {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint with named weights")
    return content


def _reason(error: Exception) -> str:
    """Why PyTorch cannot load a file, and what to do."""
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript program, not a checkpoint; save its state dict, torch.save(program.state_dict(), path)"
    if re.search("Unsupported operand 1(4[0-9]|5[0-2])", text):  # of the pickle protocols 4 and 5
        return "is a pickle of protocol 4 or 5, which cannot be read safely; save it with torch.save(content, path)"
    if found := re.search(r"(?:GLOBAL |but got <class ')([^\s']+)", text):
        return (
            f"holds {found[1]:.100}, and to rebuild that would run code when loaded, which is refused; "
            "save the plain state dict, torch.save(model.state_dict(), path), and use that (a file that you trust is "
            "read by torch.load(path, weights_only=False))"
        )
    return "is not a PyTorch checkpoint, or is damaged; download or copy it again"


# --------------------------------------------------------------------------------------- 2. its weights and description


def weights_of(content: dict, path="the checkpoint") -> dict[str, Tensor]:
    """The weights in a checkpoint's content, under our names, whichever layout they came in.

    They are recognised by their names, under whatever keys (``state_dict``, BasicSR's ``params``, ``net``, ...). What
    wrappers add to names is taken off: ``module.`` (DistributedDataParallel), ``_orig_mod.`` (torch.compile), and the
    name that a module around the network has for it (Lightning's ``model.``). Of several networks the averaged one is
    taken, which has the word ``ema``, ``swa`` or ``averaged`` in its keys or prefix, as ``params_ema`` has; else the
    one under ``state_dict`` or ``params``.

    Raises:
        UserError: no DGUNet, or several and none of these.
    """
    found = _networks(content)
    if not found:
        tensors = [str(name) for name, value in content.items() if isinstance(value, Tensor)]
        what = f"weights named {shorten_list(tensors, 3)}" if tensors else f"keys {shorten_list([*map(str, content)])}"
        raise UserError(f"{path} holds no DGUNet: none of the names that its weights have is there, but {what}")
    ranked = [[place for place in found if _AVERAGED.search(place.lower())]]
    ranked += [[place for place in found if place.split(".")[0] == key] for key in ("state_dict", "params")]
    choice = next(filter(None, ranked), list(found))
    if len(choice) > 1:
        raise UserError(
            f"{path} holds several networks: {shorten_list([place or 'at the top' for place in choice])}; save the "
            "one to use alone, torch.save(model.state_dict(), path)"
        )
    state_dict = found[choice[0]]
    return convert_original(state_dict, path) if is_original(state_dict) else state_dict


# What wrappers of a network, or of a part of it, add to names: DistributedDataParallel and AveragedModel,
# torch.compile, activation checkpointing, FullyShardedDataParallel.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# A name that every DGUNet has, ours or in the authors' layout, and what is before it.
_OF_A_NETWORK = re.compile(r"(.*\.)?(?:last\.(?:rho$|proximal\.|degradation\.)|shallow_feat1\.)", re.DOTALL)
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged)(?![a-z])")


def _networks(content, key: str = "") -> dict[str, dict[str, Tensor]]:
    """The weights of each DGUNet in a checkpoint's content, by where they are: keys, and the prefix of the names.

    Not those under ``raw_state_dict``, which our training states have besides the averaged ones.
    """
    found, entries = {}, content.items() if isinstance(content, dict) else ()
    bare = {_WRAPPERS.sub("", k): v for k, v in entries if isinstance(k, str) and isinstance(v, Tensor)}
    averaged = bare.pop("n_averaged", None)  # by AveragedModel, so many times
    prefixes = {match[1] or "" for match in map(_OF_A_NETWORK.match, bare) if match}
    stages = tuple(f"{prefix}{stage}." for prefix in prefixes for stage in ("first", "middle", "last"))
    for prefix in prefixes:
        if (averaged is None or averaged.any()) and not prefix.startswith(
            stages
        ):  # a network within a stage is its part
            weights = {name.removeprefix(prefix): v for name, v in bare.items() if name.startswith(prefix)}
            found[f"{key}{prefix}".strip(".")] = weights
    for name, value in entries:
        if name != "raw_state_dict":
            found |= _networks(value, f"{key}{name}.")
    return found


def _description(content: dict, path) -> dict:
    """The ``model`` entry as `describe_model` writes it; empty where there is none, or one that holds weights."""
    if "model" not in content or _networks(content["model"]):
        return {}
    match content["model"]:
        # The other arguments follow from names and shapes; how often a shared stage is applied does not.
        case {"name": str() | None, "arguments": {"stages": _, **other}} as description:
            unknown = [str(name) for name in other if name not in DGUNet.default_arguments()]
            if unknown:
                raise UserError(f"{path}: DGUNet has no argument {shorten_list(unknown)}")
            return description
    raise UserError(f"{path}: its 'model' entry does not describe a DGUNet as describe_model(model) does")


# ------------------------------------------------------------------------------------------------- 3. the network


def load_model(
    path: str | Path,
    task: str | None = None,
    device="cpu",
    degradation: Degradation | None = None,
    content: dict | None = None,
    proximal: Callable[..., nn.Module] | None = None,
    learned_degradation: Callable[..., nn.Module] | None = None,
) -> DGUNet:
    """Build the network that a checkpoint was made by and load its weights.

    The file may be ours or in the original authors' layout, a training checkpoint or a bare state dict, of a wrapped
    network or not, see `weights_of`. Where it does not describe its network, this is inferred from names and shapes. (A
    bare state dict with one middle stage does not say how often that is applied: the paper's 7 stages are assumed, with
    a warning where it is none of the paper's networks.)

    Args:
        path: a .safetensors or .pth file, or the name of weights that come with dgunet (``"denoising_gaussian"``, see
            ``list_models(pretrained=True)``).
        task: if given (``"denoising"``, ...), refuse a checkpoint that was made for another task. Deblurring's and
            denoising's DGUNet are the same network, so weights in the original layout pass for both.
        device: where to put the model.
        degradation: the known degradation of a network that was built with one of your own, or one to replace the
            file's. One of `dgunet.degradations` in which nothing is learned, such as a `Blur`, stays as it is, and so
            does one of yours with nothing to learn whose tensors differ in shape from the file's, such as a mask for
            images of another size; any other gets the file's values.
        content: what `read_checkpoint` returned for ``path``, if it has been read already.
        proximal, learned_degradation: what makes the parts of your own that the network was built with, see `DGUNet`.
            The file has their ``module:name``, but that is not imported: a file never decides what code runs.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: no such file or name, not a checkpoint, not a DGUNet, missing or unknown weights (all are listed),
            weights that are no finite numbers, another task, a part of the user's own that is not given.

    >>> model = load_model("compressive_sensing_10")
    >>> tuple(model.degradation.A(torch.rand(1, 1, 64, 64)).shape)
    (1, 103, 2, 2)
    """
    content = read_checkpoint(path) if content is None else content
    description, state_dict = _description(content, path), weights_of(content, path)
    fixed = degradation is not None and _stays_as_it_is(degradation, state_dict)
    own = {"proximal": proximal, "learned_degradation": learned_degradation}
    own = {name: factory for name, factory in own.items() if factory is not None}
    model = _build(description, state_dict, degradation, own, path)
    names = [model.name] if model.name in VARIANTS else _matching_variants(model)
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


def _stays_as_it_is(degradation: Degradation, state_dict: dict[str, Tensor]) -> bool:
    """Whether an operator that is given to `load_model` keeps its values."""
    if not isinstance(degradation, torch.nn.Module) or list(degradation.parameters()):
        return False
    if isinstance(degradation, tuple(KINDS.values())):
        return True
    shapes = {f"degradation.{name}": value.shape for name, value in degradation.state_dict().items()}
    found = {name: value.shape for name, value in state_dict.items() if name.startswith("degradation.")}
    return shapes.keys() == found.keys() and shapes != found


def _build(
    description: dict, state_dict: dict[str, Tensor], degradation: Degradation | None, own: dict[str, Callable], path
) -> DGUNet:
    """The network, without values (on the ``meta`` device): one that does not fit its weights costs nothing.

    ``own`` has the factories that the user gave; only what they make has values.
    """
    for name in FACTORIES:
        if name in description and name not in own:
            raise UserError(f"{path} {_of_own(description[name], name)}")
    if "proximal" in own and not description:
        raise UserError(
            f"{path} does not describe its network, and weights of a proximal mapping of your own do not show how to "
            "build it; build it yourself, model = DGUNet(proximal=..., ...), and model.load_state_dict(...)"
        )
    arguments = description.get("arguments", {})
    if arguments.keys() != DGUNet.default_arguments().keys():  # not described, or by a version with fewer arguments
        others = DGUNet.default_arguments() if "proximal" in own else _infer_arguments(state_dict, path)
        arguments = others | arguments
    with torch.device("meta"):
        if degradation is None and "learned_degradation" not in own:
            degradation = _infer_degradation(state_dict, description, path)
        try:
            model = DGUNet(**arguments, degradation=degradation, **{name: _on_cpu(own[name]) for name in own})
        except ValueError as error:
            raise UserError(f"{path}: cannot build the network it describes: {error}") from error
    model.name, model.factories = description.get("name"), own
    model.degradation_name = _operator_name(description) or None
    return model


def _of_own(made_by, name: str) -> str:
    """What is missing of a network with a part of the user's own, and what to do."""
    words = name.replace("_", " ").replace("proximal", "proximal mapping")
    if isinstance(made_by, str) and is_object_name(made_by):
        return (
            f"has a {words} made by {made_by:.200}, which loading does not import; import it yourself and call "
            f"load_model(path, {name}={made_by.rpartition(':')[2]:.200}), or test.py --{name} {made_by:.200}"
        )
    return f"has a {words} of its own that it cannot name; call load_model(path, {name}=...) with what made it"


def _on_cpu(factory: Callable) -> Callable:
    """A factory whose modules have values also where the rest of the network has none; PyTorch's generator stays."""

    def make(**given) -> nn.Module:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return factory(**given)

    return make if callable(factory) else factory


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
            concat |= not middle and arguments["attention"]  # two stages have no name for it, and do not differ
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
    own = {name: value.to("meta") for name, value in state_dict.items() if name.startswith("degradation.")}
    if "degradation" not in description:
        learned = any(name.startswith("last.degradation.") for name in state_dict)
        if learned or not (own or "last.rho" in state_dict):  # without gradient steps none is learned
            return None
    tensors = {name.removeprefix("degradation."): value for name, value in own.items()}
    try:
        if "degradation" in description:
            known = description["degradation"]
        else:  # a bare state dict, or a file from before other kinds
            block = round(tensors["matrix"].shape[1] ** 0.5)
            known = {"kind": "block_sampling", "block": block, "learned": description.get("learned_matrix", True)}
        return rebuild_degradation(known, tensors)
    except Exception as error:  # a description of something else fails in many ways
        name = _operator_name(description)
        option = f"; on the command line: --degradation {name}" if name else ""
        raise UserError(
            f"{path} was trained with a known degradation{name and f', {name},'} that is not in the file; "
            f"pass it as load_model(path, degradation=...){option}"
        ) from error


def _operator_name(description: dict) -> str:
    """The ``module:name`` that made a network's operator, as its file says: for messages, never to be imported."""
    match description.get("degradation"):
        case {"kind": "own", "name": str(name)} if is_object_name(name) and len(name) < 200:
            return name
    return ""


def _matching_variants(model: DGUNet) -> list[str]:
    """Names of the paper's networks with a network's arguments; none for a network of the user's own."""
    names, arguments, degradation = [], model.arguments, model.degradation
    if model.factories:
        return names
    for name, variant in VARIANTS.items():
        built = DGUNet.default_arguments() | variant.arguments
        irrelevant = {"final_growth"} if built["final_fusion"] == "subspace" else set()
        same = all(arguments.get(key, built[key]) == built[key] for key in built if key not in irrelevant)
        if same and (variant.degradation is None) == (degradation is None):
            names.append(name)
    return names


def load_weights(
    model: DGUNet, state_dict: dict[str, Tensor], path="the checkpoint", keeping_degradation: bool = False
):
    """Load weights under our names, from the file ``path``, into a model; parts on ``meta`` are put on the CPU.

    With ``keeping_degradation`` the known degradation stays as it is, whatever the file has of one. Raises as
    `check_tensors`.
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
        expected: tensors on any device; only their shapes and types count.
        found: those from the file ``path``, on the CPU.
        what: what they are for, in messages.
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
    dense = isinstance(found, Tensor) and found.layout == torch.strided and found.device.type == "cpu"
    if not dense or found.is_nested or found.is_quantized:
        return "is no dense tensor"
    if found.shape != expected.shape:
        return f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.dtype != expected.dtype and (exact or not {found.dtype, expected.dtype} <= _FLOATS):
        return f"{found.dtype} instead of {expected.dtype}".replace("torch.", "")
    return None
