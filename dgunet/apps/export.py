"""Write a network as a file that runs without this package: ONNX, or PyTorch's exported program (.pt2).

    dgunet export denoising_gaussian --out denoiser.onnx
    dgunet export model_best.pth --out denoiser.pt2 --stages     # the estimates of all stages
    dgunet export model_best.pth --out r17.onnx --ratio 0.17     # of a sensing network for a range of ratios

Height, width and number of images stay free. docs/export.md shows how to run the files.
"""

import copy
import json
import math
import time
import warnings
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.checkpoints.load import load_model
from dgunet.checkpoints.registry import list_pretrained
from dgunet.model.degradations import KINDS
from dgunet.model.fusion import SubspaceFusion
from dgunet.model.network import DGUNet
from dgunet.model.projection import project
from dgunet.model.proximal import MULTIPLE
from dgunet.model.sampling import BlockSampling, ScalableSampling
from dgunet.model.variants import VARIANTS
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import atomic_write
from dgunet.runtime.progress import progress_bar

FORMATS = ("onnx", "pt2")
LARGEST_DIFFERENCE = 1e-3  # between the file's estimates and the network's own


def add_arguments(parser):
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a checkpoint, or the name of weights that come with dgunet (dgunet list)")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write, .onnx or .pt2; must not exist")
    add("--format", choices=FORMATS, help="the format, where the file's name does not end with it")
    add("--ratio", type=float, metavar="R", help="measurements per pixel, for a sensing network for a range of ratios")
    add("--stages", action="store_true", help="output the estimates of all stages, the restored image first")


def run(args):
    began = time.monotonic()
    _check_file(args.out, args.format)  # before anything that takes time
    model = load_model(args.weights)
    print(f"{args.weights}: {model.name or 'a DGUNet'}; exporting takes minutes", flush=True)
    if model.local:
        print("note: local statistics (docs/local.md), which these weights use, are not exported")
    difference = export_model(model, args.out, args.format, args.stages, _about(args.weights), args.ratio)
    print(
        f"wrote {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB in {time.monotonic() - began:.0f} s; "
        f"run on another size, it differs from the network by {difference:.1g} at most"
    )


def export_model(
    model: DGUNet,
    path: str | Path,
    format: str | None = None,
    stages: bool = False,
    about: Mapping[str, str] | None = None,
    ratio: float | None = None,
) -> float:
    """Write a network to a file that runs without this package, in float32, whatever device and type it has here.

    The input ``y`` is (B, C, H, W), in [0, 1], sides multiples of 8 and at least 16; in compressive sensing it is the
    measurements (B, M, h, w) of at least 2x2 blocks. The output ``restored`` is the restored image, clamped to [0, 1]
    as `restore` does. The file's metadata describe the network (.pt2: as ``metadata.json``).

    Args:
        model: a DGUNet whose degradation is learned or one of `dgunet.degradations`.
        path: the file to write, must not exist; written atomically, and only if its output was right.
        format: ``"onnx"`` or ``"pt2"``; None for the ending of the file's name.
        stages: output the estimates of all stages, ``x_K`` (the restored image), ..., ``x_1``.
        about: further metadata, such as ``{"licence": "MIT"}``.
        ratio: measurements per pixel, of a compressive-sensing network for a range of ratios.

    Returns:
        The largest difference between the file's output and the network's, on random images of another size.
    """
    path = Path(path)
    format = _check_file(path, format)
    _check_network(model, format)
    model = _at_ratio(model, ratio)
    network = _Estimates(copy.deepcopy(model).to("cpu", torch.float32).eval(), stages)
    metadata = {**describe(model), **(about or {})}
    y = example(model, rows=3, columns=5)
    write, read = (_write_onnx, _read_onnx) if format == "onnx" else (_write_pt2, _read_pt2)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        atomic_write(path) as temporary,
        progress_bar(total=3, leave=False, desc="tracing the network") as bar,
    ):
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        expected = network(y) if stages else [network(y)]
        program = _trace(network)
        bar.update()
        bar.set_description("writing the file")
        write(program, temporary, network, metadata)
        bar.update()
        bar.set_description("running the file")
        difference = max((a - b).abs().max().item() for a, b in zip(read(temporary)(y), expected, strict=True))
        if not difference <= LARGEST_DIFFERENCE:
            raise UserError(f"{path}: its output differs from the network's by {difference:.1g}, so it is not written")
    return difference


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

    That leaves ``[L^T, L^-1]``. No pivot is smaller than the ridge but by rounding.
    """
    rest, rows = torch.cat([gram, eye], dim=2), []
    for k in range(gram.shape[1]):
        row = rest[:, k : k + 1]
        row = row * row[:, :, k : k + 1].clamp_min(ridge).rsqrt()
        rest = rest - row[:, :, : gram.shape[1]].mT * row
        rows.append(row)
    return torch.cat(rows, dim=1)[:, :, gram.shape[1] :]


class _ExportedSampling(BlockSampling):
    """`BlockSampling` in operations that take any size (and round gradients otherwise)."""

    def A(self, x: Tensor) -> Tensor:
        return (F.pixel_unshuffle(x, self.block).permute(0, 2, 3, 1) @ self.matrix.mT).permute(0, 3, 1, 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle((y.permute(0, 2, 3, 1) @ self.matrix).permute(0, 3, 1, 2), self.block)


def _trace(network: _Estimates) -> torch.export.ExportedProgram:
    """Trace the network, after replacing what cannot be exported."""
    model, known = network.model, network.model.degradation
    if isinstance(known, BlockSampling):
        model.degradation = _ExportedSampling(block=known.block, learned=known.learned, matrix=known.matrix)
    for module in model.modules():
        if isinstance(module, SubspaceFusion):
            module.project = partial(project, precision=torch.float32, inverse_factor=eliminate)
    y = example(model, rows=4, columns=6, batch=2)
    step = _size_multiple(model) // getattr(model.degradation, "block", 1)  # of y's own sides
    # At least 2: PyTorch specialises sides of length 1.
    height, width = (torch.export.Dim(name, min=2) for name in ("rows", "columns"))
    sides = {2: height, 3: width} if step == 1 else {2: step * height, 3: step * width}
    program = torch.export.export(network, (y,), dynamic_shapes=({0: torch.export.Dim("batch")} | sides,))
    for part in program.graph_module.modules():  # autocast regions are graphs of their own
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # has paths of this machine
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path, network: _Estimates, metadata: dict[str, str]):
    import onnx

    file = torch.onnx.export(
        program, input_names=["y"], output_names=network.names, dynamo=True, verbose=False
    ).model_proto
    graph = file.graph
    del graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # the exporter's notes, larger than the node itself
    sensing = isinstance(network.model.degradation, BlockSampling)
    for value in (graph.input[0], *graph.output):
        sides = ("rows", "columns") if sensing and value is graph.input[0] else ("height", "width")
        for axis, name in zip((0, 2, 3), ("batch", *sides), strict=True):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.helper.set_model_props(file, metadata)
    path.write_bytes(file.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def _read_onnx(path: Path):
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda y: [torch.from_numpy(x) for x in session.run(None, {"y": y.numpy()})]


def _write_pt2(program: torch.export.ExportedProgram, path: Path, network: _Estimates, metadata: dict[str, str]):
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata, indent=1)})
    path.write_bytes(buffer.getbuffer())


def _read_pt2(path: Path):
    module = torch.export.load(BytesIO(path.read_bytes())).module()
    return lambda y: [restored] if isinstance(restored := module(y), Tensor) else list(restored)


def _about(weights: str) -> dict[str, str]:
    """Licence and purpose of weights that come with dgunet; empty for others."""
    records = [record for record in list_pretrained() if weights == record.name]
    return {key: str(getattr(record, key)) for record in records for key in ("licence", "trained_for", "not_for")}
