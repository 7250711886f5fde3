"""Write a network as a file that runs without this package: ONNX, or PyTorch's exported program (.pt2).

    dgunet export denoising_gaussian --out denoiser.onnx
    dgunet export model_best.pth --out denoiser.pt2 --stages     # the estimates of all stages
    dgunet export model_best.pth --out r17.onnx --ratio 0.17     # of a sensing network for a range of ratios
    dgunet export denoising_gaussian --out half.onnx --half      # weights in float16

Height, width and number of images stay free. docs/export.md shows how to run the files.
"""

import copy
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.checkpoints.load import load_model
from dgunet.checkpoints.registry import list_pretrained, locate
from dgunet.model.degradations import KINDS, for_measurements
from dgunet.model.fusion import SubspaceFusion
from dgunet.model.network import DGUNet
from dgunet.model.projection import project
from dgunet.model.proximal import MULTIPLE, StageFeatures
from dgunet.model.sampling import BlockSampling, ScalableSampling
from dgunet.model.variants import VARIANTS
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import atomic_write
from dgunet.runtime.progress import progress_bar

FORMATS = ("onnx", "pt2")
UNCLAMPED = "unclamped"  # the output of ONNX files for tiles: `restore` clamps after blending them
LARGEST_DIFFERENCE = 1e-3  # between the file's estimates and the network's own
LARGEST_DIFFERENCE_HALF = 1 / 255  # the same of weights in float16: one step of 8 bits


def add_arguments(parser):
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a checkpoint, or the name of weights that come with dgunet (dgunet list)")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write, .onnx or .pt2; must not exist")
    add("--format", choices=FORMATS, help="the format, where the file's name does not end with it")
    add("--ratio", type=float, metavar="R", help="measurements per pixel, for a sensing network for a range of ratios")
    add("--stages", action="store_true", help="output the estimates of all stages, the restored image first")
    add("--half", action="store_true", help="weights and computation in float16, of .onnx files; images stay float32")


def run(args):
    began = time.monotonic()
    format = _check_file(args.out, args.format)  # before anything that takes time
    _check_half(args.half, format)
    model = load_model(args.weights)
    print(f"{args.weights}: {model.name or 'a DGUNet'}", flush=True)
    if set(model.local) - {"tile"}:
        print("note: local statistics (docs/local.md), which these weights use, are not exported")
    # Without a terminal there is no progress bar.
    log = None if sys.stderr.isatty() else lambda step: print(step, flush=True)
    about = {**_provenance(args.weights), **_about(args.weights)}
    difference = export_model(model, args.out, args.format, args.stages, about, args.ratio, args.half, log)
    most = LARGEST_DIFFERENCE_HALF if args.half else LARGEST_DIFFERENCE
    print(
        f"wrote {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB in {time.monotonic() - began:.0f} s; "
        f"run on another size, it differs from the network by {difference:.1g} at most ({most:.1g} is allowed)"
    )


def export_model(
    model: DGUNet,
    path: str | Path,
    format: str | None = None,
    stages: bool = False,
    about: Mapping[str, str] | None = None,
    ratio: float | None = None,
    half: bool = False,
    log: Callable[[str], object] | None = None,
) -> float:
    """Write a network to a file that runs without this package, in float32, whatever device and type it has here.

    The input ``y`` is (B, C, H, W), in [0, 1], sides multiples of 8 and at least 16; in compressive sensing it is the
    measurements (B, M, h, w) of at least 2x2 blocks. The output ``restored`` is the restored image, clamped to [0, 1]
    as `restore` does; of an ONNX file ``unclamped`` is the same before clamping, the last output. The file's metadata
    describe the network (.pt2: as ``metadata.json``).

    Args:
        model: a DGUNet whose degradation is learned or one of `dgunet.degradations`.
        path: the file to write, must not exist; written atomically, and only if its output was right.
        format: ``"onnx"`` or ``"pt2"``; None for the ending of the file's name.
        stages: output the estimates of all stages, ``x_K`` (the restored image), ..., ``x_1``.
        about: further metadata, such as ``{"licence": "MIT"}``.
        ratio: measurements per pixel, of a compressive-sensing network for a range of ratios.
        half: of an ONNX file, weights and computation in float16; ``y`` and the outputs stay float32, and so do the
            sums over the whole image and the subspace projection.
        log: is given a line before each step. A terminal shows a progress bar as well.

    Returns:
        The largest difference between the file's output and the network's, on random images of another size.

    Raises:
        UserError: a file that exists, a network that cannot be exported, or an output that differs by more than 0.001
            (with ``half`` by more than 1/255).
    """
    path = Path(path)
    format = _check_file(path, format)
    _check_half(half, format)
    _check_network(model, format)
    model = _at_ratio(model, ratio)
    network = _Estimates(copy.deepcopy(model).to("cpu", torch.float32).eval(), stages)
    metadata = {**describe(model), "precision": "float16" if half else "float32", **(about or {})}
    y = example(model, rows=3, columns=5)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        atomic_write(path) as temporary,
        _Progress(log) as progress,
    ):
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        expected = network(y) if stages else [network(y)]
        _make_exportable(network.model)
        if format == "onnx":
            _write_onnx(network, temporary, metadata, half, progress)
        else:
            _write_pt2(network, temporary, metadata, progress)
        progress.step("running the file")
        read = _read_onnx if format == "onnx" else _read_pt2
        difference = max((a - b).abs().max().item() for a, b in zip(read(temporary)(y), expected, strict=True))
        if not difference <= (LARGEST_DIFFERENCE_HALF if half else LARGEST_DIFFERENCE):
            raise UserError(f"{path}: its output differs from the network's by {difference:.1g}, so it is not written")
    return difference


class _Progress:
    """Says which step has begun: to ``log``, and on a terminal by a bar that moves with every step."""

    def __init__(self, log: Callable[[str], object] | None):
        self.log, self.count, self.done = log or (lambda step: None), 0, 0

    def __enter__(self) -> "_Progress":
        self.bar = progress_bar(total=1, leave=False)
        return self

    def __exit__(self, *error):
        self.bar.close()

    def expect(self, count: int):
        """So many steps will follow."""
        self.count = self.bar.total = count

    def step(self, what: str):
        self.done += 1
        self.log(f"{self.done} of {self.count}: {what}")
        self.bar.set_description(what, refresh=False)
        self.bar.n = self.done - 1
        self.bar.refresh()


def describe(model: DGUNet) -> dict[str, str]:
    """The file's metadata."""
    from dgunet import __version__

    known = model.degradation
    shape, unit = f"(B, {model.channels}, H, W)", f"multiples of {_size_multiple(model)}"
    inputs = f"degraded images {shape} in [0, 1], H and W {unit}"
    if isinstance(known, BlockSampling):
        rows, b = known.matrix.shape[0], known.block
        inputs = f"measurements (B, {rows}, H/{b}, W/{b}) of images in [0, 1], H and W {unit}"
    return {
        "name": model.name or "DGUNet",
        "task": VARIANTS[model.name].task if model.name in VARIANTS else "unknown",
        "licence": "unknown",
        **({"tile": str(model.local["tile"])} if "tile" in model.local else {}),
        "multiple": str(_size_multiple(model)),
        "value_range": "0 1",
        "input": inputs,
        "output": f"restored images {shape} in [0, 1]",
        "made_by": f"dgunet {__version__}",
        "paper": "Deep Generalized Unfolding Networks for Image Restoration (Mou, Wang, Zhang; CVPR 2022)",
    }


def example(model: DGUNet, rows: int, columns: int, batch: int = 1) -> Tensor:
    """An input of the network for random images, whose sides are so many times the smallest possible side."""
    generator = torch.Generator().manual_seed(0)
    size = (batch, model.channels, rows * _size_multiple(model), columns * _size_multiple(model))
    x, known = torch.rand(size, generator=generator), model.degradation
    return x if known is None else copy.deepcopy(known).to("cpu", torch.float32).A(x).detach()


def _size_multiple(model: DGUNet) -> int:
    """The number that the sides of an image must be multiples of."""
    return math.lcm(MULTIPLE, getattr(model.degradation, "block", 1))


class _Estimates(nn.Module):
    """The exported module: from ``y`` to the restored image, or to the estimates of all stages, clamped."""

    def __init__(self, model: DGUNet, stages: bool):
        super().__init__()
        self.model, self.stages = model, stages
        self.names = ["restored", *(f"stage{k}" for k in range(model.stages - 1, 0, -1) if stages)]

    def forward(self, y: Tensor):
        estimates = [x.clamp(0, 1) for x in self.model(y)]
        return tuple(estimates) if self.stages else estimates[0]


def _check_file(path: Path, format: str | None) -> str:
    """The format of the file to write."""
    ending = path.suffix.lower().removeprefix(".")
    format = format or ending
    if format not in FORMATS:
        raise UserError(f"{path}: unknown format; use a name that ends with .onnx or .pt2, or --format")
    if ending in FORMATS and ending != format:
        raise UserError(f"{path} does not end with .{format}; change the name or --format")
    if path.exists():
        raise UserError(f"{path} exists; remove it, or choose another name")
    return format


def _check_half(half: bool, format: str):
    if half and format != "onnx":
        raise UserError("--half is for .onnx files; load a .pt2 file's network in PyTorch and run it under autocast")


def _check_network(model: DGUNet, format: str):
    known = model.degradation
    if hasattr(model, "windows"):
        raise UserError("local statistics are not exported; export the network itself, whose statistics are global")
    if known is not None and type(known) not in KINDS.values():
        raise UserError(
            f"the network's known degradation is a {type(known).__name__}, not one of dgunet's; the sizes of its "
            "measurements are unknown. Use torch.export.export(model, (y,), dynamic_shapes=...)"
        )
    if format == "onnx":
        import onnx  # noqa: F401  now and not after the network was traced
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

        if 4 * sum(tensor.numel() for tensor in model.state_dict().values()) > 1.9 * 2**30:
            raise UserError("the network is larger than the 2 GiB of an ONNX file; export it as .pt2")


def _at_ratio(model: DGUNet, ratio: float | None) -> DGUNet:
    """The network for one ratio."""
    known = model.degradation
    if ratio is not None and not isinstance(known, BlockSampling):
        raise UserError("--ratio is for compressive-sensing networks; leave it out")
    if ratio is None and isinstance(known, ScalableSampling):
        raise UserError("the network is for a range of ratios, but a file is for one; choose it with --ratio 0.25")
    if ratio is None or known.at(ratio) is known:
        return model
    model = copy.deepcopy(model)
    model.degradation = BlockSampling(block=known.block, learned=known.learned, matrix=known.at(ratio).matrix)
    return model


def eliminate(gram: Tensor, eye: Tensor, ridge: float) -> Tensor:
    """`projection.inverse_cholesky` in the operations that ONNX has: unrolled elimination of ``[gram, eye]``.

    That leaves ``[D L^T, D L^-1]``, D the roots of the pivots, none of which is smaller than the ridge but by rounding.
    """
    rest, rows, pivots = torch.cat([gram, eye], dim=2), [], []
    for k in range(gram.shape[1]):
        row = rest[:, k : k + 1]
        pivots.append(row[:, :, k : k + 1].clamp_min(ridge))
        rows.append(row)
        rest = rest - rest[:, :, k : k + 1] * (row / pivots[-1])  # symmetric: the column is the row
    return torch.cat(rows, dim=1)[:, :, gram.shape[1] :] * torch.cat(pivots, dim=1).rsqrt()


class _ExportedSampling(BlockSampling):
    """`BlockSampling` in operations that take any size (and round gradients otherwise)."""

    def A(self, x: Tensor) -> Tensor:
        return (F.pixel_unshuffle(x, self.block).permute(0, 2, 3, 1) @ self.matrix.mT).permute(0, 3, 1, 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle((y.permute(0, 2, 3, 1) @ self.matrix).permute(0, 3, 1, 2), self.block)


def _make_exportable(model: DGUNet):
    """Replace what cannot be exported, in the model itself."""
    known = model.degradation
    if isinstance(known, BlockSampling):
        model.degradation = _ExportedSampling(block=known.block, learned=known.learned, matrix=known.matrix)
    for module in model.modules():
        if isinstance(module, SubspaceFusion):
            module.project = partial(project, precision=torch.float32, inverse_factor=eliminate)


class _StageOfTensors(nn.Module):
    """Stage k as a function of tensors alone: ``y, x_{k-1}, *features`` to ``x_k, *features``; stage 1 of ``y``.

    ``previous`` are the features of a stage before, which show what there is of them.
    """

    def __init__(self, stage: nn.Module, known: nn.Module | None, previous: StageFeatures | None):
        super().__init__()
        self.stage, self.known, self.like = stage, known, previous

    def forward(self, *tensors: Tensor):
        x, features = self.run(*tensors)
        return (x, *_flatten(features))

    def run(self, y: Tensor, *tensors: Tensor) -> tuple[Tensor, StageFeatures | None]:
        known = None if self.known is None else for_measurements(self.known, y)
        if not tensors:
            return self.stage(y if known is None else known.A_adjoint(y), y, None, known)
        rest = iter(tensors)
        x, like = next(rest), self.like
        parts = (like.encoded, like.decoded)
        alone = None if like.features is None else next(rest)
        return self.stage(x, y, StageFeatures(alone, *(part and [next(rest) for _ in part] for part in parts)), known)


def _flatten(features: StageFeatures | None) -> list[Tensor]:
    if features is None:
        return []
    alone = [] if features.features is None else [features.features]
    return [*alone, *(features.encoded or ()), *(features.decoded or ())]


def _trace(module: nn.Module, tensors: tuple[Tensor, ...], rows: int) -> torch.export.ExportedProgram:
    """Trace a function of tensors (B, C, H, W), whose sides are multiples of a free number, which is ``rows`` here."""
    # At least 2: PyTorch specialises sides of length 1.
    batch, (height, width) = torch.export.Dim("batch"), (torch.export.Dim(name, min=2) for name in ("rows", "columns"))

    def sides(tensor: Tensor) -> dict:
        factor = tensor.shape[2] // rows
        return {0: batch} | ({2: height, 3: width} if factor == 1 else {2: factor * height, 3: factor * width})

    shapes = tuple(map(sides, tensors))
    if isinstance(module, _StageOfTensors):
        shapes = (shapes,)  # of *tensors
    program = torch.export.export(module, tensors, dynamic_shapes=shapes)
    for part in program.graph_module.modules():  # autocast regions are graphs of their own
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # has paths of this machine
    return program


def _write_pt2(network: _Estimates, path: Path, metadata: dict[str, str], progress: _Progress):
    progress.expect(3)
    progress.step("tracing the network")
    program = _trace(network, (example(network.model, rows=4, columns=6, batch=2),), rows=4)
    progress.step("writing the file")
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata, indent=1)})
    path.write_bytes(buffer.getbuffer())


def _write_onnx(network: _Estimates, path: Path, metadata: dict[str, str], half: bool, progress: _Progress):
    """Convert each stored stage once, and join them: seven stages that share their middle take the time of three."""
    import onnx

    model, joined = network.model, _JoinedGraph(half)
    y = example(model, rows=4, columns=6, batch=2)
    channels = y.shape[1]
    if half:
        model, y = model.half(), y.half()
    if model.factories:  # parts of the user's own: what a stage hands to the next may be anything
        progress.expect(4)
        progress.step("tracing the network")
        program = _trace(_Estimates(model, True), (y,), rows=4)
        progress.step("converting the network")
        estimates = joined.add(_to_onnx(program), "network", [])
    else:
        progress.expect(2 * len(dict.fromkeys(model.iter_stages())) + 2)
        parts, tensors, names, features, estimates = {}, [], [], None, []
        for k, stage in enumerate(model.iter_stages(), 1):
            part = _StageOfTensors(stage, model.degradation, features)
            if stage not in parts:
                progress.step(f"tracing stage {k}")
                program = _trace(part, (y, *tensors), rows=4)
                progress.step(f"converting stage {k}")
                _replace_in_place(program)
                parts[stage] = f"stage{k}", _to_onnx(program)
            name, converted = parts[stage]
            names = joined.add(converted, name, names, f"{k}/")
            estimates.insert(0, names[0])
            x, features = part.run(y, *tensors)
            tensors = [x, *_flatten(features)]
    progress.step("writing the file")
    sensing = isinstance(model.degradation, BlockSampling)
    sides = ["rows", "columns"] if sensing else ["height", "width"]
    outputs = dict(zip(network.names, estimates, strict=False)) | {UNCLAMPED: estimates[0]}
    file = joined.finish(["batch", channels, *sides], outputs, ["batch", model.channels, "height", "width"])
    onnx.helper.set_model_props(file, metadata | {"opset": str(joined.opset)})
    path.write_bytes(file.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def _to_onnx(program: torch.export.ExportedProgram):
    return torch.onnx.export(program, dynamo=True, verbose=False).model_proto


def _replace_in_place(program: torch.export.ExportedProgram):
    """Replace in-place operations, which take longest to convert, by those that return a new tensor.

    That is right for a network that uses their results alone, and no longer their inputs, as dgunet's own do.
    """
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.endswith("_"):
                namespace, name = node.target._schema.name.removesuffix("_").split("::")
                node.target = getattr(getattr(getattr(torch.ops, namespace), name), node.target._overloadname)


class _JoinedGraph:
    """An ONNX graph of converted stages, one after the other; those of the same weights share them.

    With ``half`` the stages are in float16, the image and the estimates in float32.
    """

    def __init__(self, half: bool):
        self.half, self.nodes, self.weights, self.opset = half, [], {}, 0
        self.y = "y_half" if half else "y"

    def add(self, part, name: str, inputs: list[str], prefix: str = "") -> list[str]:
        """Append a stage with the weights ``name``; returns the names of its outputs. ``inputs`` are those after y."""
        graph = part.graph
        self.opset, self.ir_version = part.opset_import[0].version, part.ir_version
        renamed = dict(zip((value.name for value in graph.input), (self.y, *inputs), strict=True)) | {"": ""}
        for weight in graph.initializer:
            renamed[weight.name] = f"{name}/{weight.name}"
            if renamed[weight.name] not in self.weights:
                self.weights[renamed[weight.name]] = copied = type(weight)()
                copied.CopyFrom(weight)
                copied.name = renamed[weight.name]
        for node in graph.node:
            copied = type(node)()
            copied.CopyFrom(node)
            copied.name = prefix + node.name
            copied.input[:] = [renamed[value] for value in node.input]
            renamed |= {value: prefix + value for value in node.output if value}
            copied.output[:] = [renamed[value] for value in node.output]
            self.nodes.append(copied)
        return [renamed[value.name] for value in graph.output]

    def finish(self, given: list, outputs: dict[str, str], taken: list):
        """The model: inputs of the shape ``given``, ``outputs`` (by name, of values in the graph) of ``taken``."""
        from onnx import TensorProto, helper, numpy_helper

        nodes = self.nodes
        if self.half:
            nodes = [helper.make_node("Cast", ["y"], [self.y], to=TensorProto.FLOAT16), *nodes]
        for name, value in outputs.items():
            unclamped = name if name == UNCLAMPED else f"{name}/unclamped"
            nodes.append(helper.make_node("Cast", [value], [unclamped], to=TensorProto.FLOAT))
            if name != UNCLAMPED:
                nodes.append(helper.make_node("Clip", [unclamped, "zero", "one"], [name]))
        bounds = [numpy_helper.from_array(np.float32(value), name) for name, value in (("zero", 0), ("one", 1))]
        for part in (*nodes, *self.weights.values()):
            del part.metadata_props[:]  # the exporter's notes, larger than the node itself
        graph = helper.make_graph(
            nodes,
            "dgunet",
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, given)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, taken) for name in outputs],
            [*self.weights.values(), *bounds],
        )
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=self.ir_version, producer_name="dgunet")


def _read_onnx(path: Path):
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs() if output.name != UNCLAMPED]
    return lambda y: [torch.from_numpy(x) for x in session.run(names, {"y": y.numpy()})]


def _read_pt2(path: Path):
    module = torch.export.load(BytesIO(path.read_bytes())).module()
    return lambda y: [restored] if isinstance(restored := module(y), Tensor) else list(restored)


def _about(weights: str) -> dict[str, str]:
    """What the record of weights that come with dgunet says; empty for others."""
    record = next((record for record in list_pretrained() if weights == record.name), None)
    if record is None:
        return {}
    said = ("licence", "trained_for", "not_for", "trained_on", "hardware", "date")
    scores = {name: f"{psnr:.2f} / {ssim:.4f}" for name, (psnr, ssim) in record.scores.items()}
    return {name: str(getattr(record, name)) for name in said} | {
        "weights": record.name,
        "scores": ", ".join(f"{name} {score}" for name, score in scores.items()),
    }


def _provenance(weights: str) -> dict[str, str]:
    path = locate(weights)
    return {"weights": path.name, "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
