"""Time the network, training and data loading, each beside the same as the original code computes it.

    python scripts/benchmark.py                                                   # all of it, in some minutes
    python scripts/benchmark.py forward train --variants deblurring_dgunet deraining_dgunet --batch 16 --crop 256
    python scripts/benchmark.py forward --sizes 1280x720 --compile --profile
    python scripts/benchmark.py data --images Datasets/GoPro/train
    python scripts/benchmark.py parts others --minutes 5

The baseline is the same network in the original's form: float32, NCHW, eager; half instance norm by splitting and
concatenating, subspace fusion with an explicit inverse; Adam as PyTorch chooses to run it (on a CPU parameter by
parameter), the loss read after each step; images decoded, converted and augmented whole, then cropped. Both sides have
PyTorch's precision of float32 (on a GPU: TF32 in convolutions only) and, as both train.py do, cuDNN's benchmark in
training; bfloat16 where the hardware computes it. ``parts``: operations of the training step, as they are computed
here and as they might be. ``others``: NAFNet, Restormer and MPRNet, untrained, as far as spandrel and
spandrel_extra_arches have them here. ``memory``: what the tensors of a training step take, which nothing is run for.

Every case runs in a process of its own, so that its peak memory is its own, and one that fails, or is not done after
--case_seconds, ends alone. On a CPU the cases of a table take turns, so that other load on the machine affects all of
them; on a GPU each row is printed when it is measured. Times are medians; the JSON file has all of them and their
interquartile range, the .csv and the .md file beside it have the table. Weights and images are never zeros.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import json
import logging
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotDone  # Python 3.10 has one of its own
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import ROOT, Parser, UserError, at_least, command_imports, run_cli

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CUDA_HOME without a GPU

with command_imports(__name__):
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.benchmark import Measurement, Timer

    from dgunet.model.fusion import ISFF, SubspaceFusion
    from dgunet.model.instance_norm import HalfInstanceNorm
    from dgunet.model.layers import ChannelAttentionBlock, ConvBlock
    from dgunet.model.network import DGUNet
    from dgunet.model.projection import project
    from dgunet.model.proximal import MULTIPLE
    from dgunet.model.variants import VARIANTS, create_model, list_models
    from dgunet.runtime.hardware import autocast_dtype, pick_device
    from dgunet.training.config import load_config
    from dgunet.training.cost import count_operations, matrix_rate, step_memory
    from dgunet.training.step import MeasureThenRestore, TrainState

SECTIONS = ("forward", "train", "data", "parts", "others", "memory")
DEFAULT_SECTIONS = SECTIONS[:3]
# Networks of others: where spandrel has their class, and the sizes that their authors publish for deblurring.
OTHERS = {
    "NAFNet": (
        "spandrel.architectures.NAFNet.__arch.NAFNet_arch",
        dict(width=64, enc_blk_nums=[1, 1, 1, 28], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]),
    ),
    "Restormer": ("spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch", {}),
    "MPRNet": (
        "spandrel_extra_arches.architectures.MPRNet.__arch.MPRNet",
        dict(n_feat=96, scale_unetfeats=48, scale_orsnetfeats=32, num_cab=8),
    ),
}


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    section: str
    name: str
    variant: str = ""
    batch: int = 1
    height: int = 256
    width: int = 256
    baseline: bool = False
    bf16: bool = False
    compile: bool = False
    checkpointing: bool = False
    capture: bool = False
    operation: str = ""  # parts: of `PARTS`
    images: str = ""  # data: folder with input/ and target/, or packed file
    device: str = "cpu"
    profile: bool = False


# ------------------------------------------------------------------------------------------- the original's form


class _SplitNorm(HalfInstanceNorm):
    def forward(self, x):
        first, second = torch.chunk(x, 2, dim=1)
        return torch.cat([self.norm(first), second], dim=1)


class _PlainConvBlock(ConvBlock):
    def forward(self, x):
        out = F.leaky_relu(self.norm(self.conv1(x)), 0.2)
        return F.leaky_relu(self.conv2(out), 0.2) + self.identity(x)


class _PlainAttentionBlock(ChannelAttentionBlock):
    def forward(self, x):
        out = self.conv2(self.activation(self.conv1(x)))
        return out * self.attention(out) + x


class _PlainISFF(ISFF):
    def forward(self, x, encoded, decoded):
        shared = self.encoder_conv(encoded) + self.decoder_conv(decoded)
        if not self.adaptive:
            return x + shared
        shared = F.leaky_relu(shared, 0.1)
        return x * torch.sigmoid(self.scale_conv(shared)) + self.shift_conv(shared) + x


class _InverseFusion(SubspaceFusion):
    def forward(self, x, bridge):
        basis = self.basis_conv(torch.cat([x, bridge], dim=1)).flatten(2)
        basis = basis / (1e-6 + basis.abs().sum(dim=2, keepdim=True))
        transposed = basis.permute(0, 2, 1)
        projection = torch.inverse(basis @ transposed) @ basis
        projected = (transposed @ (projection @ bridge.flatten(2).permute(0, 2, 1))).permute(0, 2, 1)
        return self.merge_conv(torch.cat([x, projected.reshape(bridge.shape)], dim=1)) + x


def as_original(model: nn.Module) -> nn.Module:
    """The same weights, computed with as the original does."""
    plain = {
        HalfInstanceNorm: _SplitNorm,
        ConvBlock: _PlainConvBlock,
        ChannelAttentionBlock: _PlainAttentionBlock,
        ISFF: _PlainISFF,
        SubspaceFusion: _InverseFusion,
    }
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    return model


# ------------------------------------------------------------------------------------------- what is timed


def prepare(case: Case) -> Callable:
    """The function whose calls are timed; it returns something that must not be all zeros."""
    made = {"forward": _forward, "others": _forward, "train": _train, "data": _data, "parts": _part}
    return made[case.section](case)


def _images(case: Case, channels: int) -> torch.Tensor:
    """Smooth random images with some noise, in [0, 1]."""
    coarse = torch.rand(case.batch, channels, case.height // 8, case.width // 8)
    smooth = F.interpolate(coarse, (case.height, case.width), mode="bicubic", align_corners=False)
    return (smooth + 0.05 * torch.randn_like(smooth)).clamp(0, 1).to(case.device)


def _network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.variant in OTHERS:
        module, options = OTHERS[case.variant]
        return getattr(importlib.import_module(module), case.variant)(**options).to(case.device)
    model = create_model(case.variant, checkpointing=case.checkpointing).to(case.device)
    return as_original(model) if case.baseline else model


def _forward(case: Case) -> Callable:
    model = _network(case).eval()
    ours = isinstance(model, DGUNet)
    y = _images(case, model.channels if ours else 3)
    if not case.baseline:  # as load_model and restore do
        model.to(memory_format=torch.channels_last)
        y = y.contiguous(memory_format=torch.channels_last)
    if case.compile:
        model.compile()
    network = MeasureThenRestore(model) if ours else model

    def run():
        with torch.no_grad(), torch.autocast(y.device.type, torch.bfloat16, enabled=case.bf16):
            restored = network(y)
            return (restored[0] if isinstance(restored, list | tuple) else restored) - y

    return run


def _train_state(case: Case) -> TrainState:
    options = ["DEVICE", case.device.split(":")[0], "OPTIM.BATCH_SIZE", str(case.batch)]
    if case.device.startswith("cuda"):
        options += ["GPU", f"[{torch.cuda.current_device()}]"]
    options += ["SPEED.AMP", "bf16" if case.bf16 else "fp32", "SPEED.COMPILE", str(case.compile)]
    options += ["SPEED.CAPTURE", str(case.capture)]
    options += ["SPEED.CHANNELS_LAST", "False" if case.baseline else "auto"]
    cfg = load_config(ROOT / "configs" / VARIANTS[case.variant].task / "dgunet.yaml", options)
    return TrainState(cfg, _network(case))


def _train(case: Case) -> Callable:
    train_state = _train_state(case)
    model = train_state.model
    target = _images(case, model.channels)
    input = target if model.degradation is not None else (target + 0.1 * torch.randn_like(target)).clamp(0, 1)
    input, target = train_state.to_device(input), train_state.to_device(target)
    weight = next(model.parameters())
    if not case.baseline:

        def run():
            train_state.train_step(input, target)
            return weight.grad

        return run
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    network = train_state.network

    def run():
        optimizer.zero_grad()
        loss = train_state.loss(network(input), target)
        loss.backward()
        optimizer.step()
        loss.item()
        return weight.grad

    return run


# Operations of a training step: for each the forms that are compared, the present one first.
PARTS = {
    "convolution of images": ("as it is", "padded to 8 channels"),
    "convolution of concatenated maps": ("as it is", "sum of two convolutions"),
    "convolution, LeakyReLU": ("as it is", "without the bias"),
    "projection": ("Gram matrix in float64", "orthonormal maps in float32"),
}


def _part(case: Case) -> Callable:
    """Forward and backward of one of `PARTS`, on maps as wide as those of the variant's first level."""
    operation, first = case.operation, case.name == PARTS[case.operation][0]
    width = create_model(case.variant).last.proximal.shallow.conv.out_channels
    channels = {"convolution of images": 3, "projection": 16}.get(operation, width)
    shapes = (channels, channels if operation == "convolution of concatenated maps" else width)
    maps = [_images(case, c).contiguous(memory_format=torch.channels_last).requires_grad_() for c in shapes]
    inputs = 2 * width if operation == "convolution of concatenated maps" else channels
    weight = torch.randn(width, inputs, 3, 3, device=case.device).mul_(0.1).requires_grad_()
    bias = torch.randn(width, device=case.device).requires_grad_()

    def compute(a, b):
        if operation == "projection":
            return project(a, b, torch.float64 if first else torch.float32)
        if operation == "convolution of images":
            pad = 0 if first else 5
            return F.conv2d(F.pad(a, (0, 0, 0, 0, 0, pad)), F.pad(weight, (0, 0, 0, 0, 0, pad)), padding=1)
        if operation == "convolution, LeakyReLU":
            return F.leaky_relu(F.conv2d(a, weight, bias if first else None, padding=1), 0.2, inplace=True)
        if first:
            return F.conv2d(torch.cat([a, b], dim=1), weight, padding=1)
        return F.conv2d(a, weight[:, :width], padding=1).add_(F.conv2d(b, weight[:, width:], padding=1))

    def run():
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=case.bf16):
            out = compute(*maps)
        weight.grad = maps[0].grad = maps[1].grad = bias.grad = None
        out.backward(out.detach())
        return maps[0].grad

    return run


def _data(case: Case) -> Callable:
    import cv2

    from dgunet.data.datasets import SaturationPatches
    from dgunet.data.pairs import find_pairs

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if case.baseline:
        pairs, rng = find_pairs(case.images), np.random.default_rng(0)
        return lambda: _whole_images(pairs[rng.integers(len(pairs))], case.height, rng)
    patches = SaturationPatches(case.images, case.height, saturation=0.2)
    index = iter(range(10**9))
    return lambda: patches[1, next(index)][0].float()


def _whole_images(pair, patch: int, rng: np.random.Generator) -> torch.Tensor:
    """A sample of the original's deblurring loader."""
    import torchvision.transforms.functional as TF
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in (pair.input, pair.target)]
    if rng.integers(3) == 1:
        factor = rng.uniform(0.8, 1.2)
        images = [TF.adjust_saturation(image, factor) for image in images]
    images = [TF.to_tensor(image) for image in images]
    height, width = images[0].shape[1:]
    top, left = int(rng.integers(height - patch + 1)), int(rng.integers(width - patch + 1))
    images = [image[:, top : top + patch, left : left + patch] for image in images]
    turns = int(rng.integers(9))
    return [torch.rot90(image, turns % 4, dims=(1, 2)).contiguous() for image in images][0]


# ------------------------------------------------------------------------------------------- timing


def make_timer(run: Callable) -> Timer:
    """A timer that waits for the GPU before and after each block of calls."""
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def measure(cases: list[Case], args) -> Iterator[tuple[Case, dict]]:
    """Each case with its median seconds, their interquartile range and its peak memory in bytes; NaN where it fails.

    Cases that are not begun before ``args.deadline`` (of `time.monotonic`) are left out.
    """
    groups = [[case] for case in cases] if cases[0].device.startswith("cuda") else [cases]
    for group in groups:
        if time.monotonic() < args.deadline:
            yield from zip(group, _measure_in_turn(group, args), strict=True)
        else:
            print(f"left out, for the time is over: {'; '.join(case.name for case in group)}", file=sys.stderr)


def _measure_in_turn(cases: list[Case], args) -> list[dict]:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    found: dict[Case, list[Measurement]] = {case: [] for case in cases}
    with contextlib.ExitStack() as stack:
        pools = {case: stack.enter_context(ProcessPoolExecutor(1, context)) for case in cases}

        def call(function: Callable, case: Case):
            """``function(case)`` in the case's process; where it fails, the others are still measured."""
            try:
                process = pools[case].submit(os.getpid).result()
                return pools[case].submit(_call, function, case).result(args.case_seconds)
            except NotDone:
                reason = f"not done after {args.case_seconds:g} s"
                os.kill(process, signal.SIGKILL)
            except Exception as error:
                hint = "; perhaps the memory is full" if isinstance(error, BrokenProcessPool) else ""
                reason = " ".join(str(error).split())[:300] + hint
            print(f"{case.name}: {reason}", file=sys.stderr)
            del pools[case]

        peaks = {case: call(_start, case) for case in cases}
        started = time.monotonic()
        for turn in range(args.runs):
            if turn and time.monotonic() - started > args.seconds:
                break
            for case in list(pools):
                found[case].append(call(_measure_again, case))
    failed = {"times": [], "seconds": math.nan, "iqr": math.nan, "peak_memory": math.nan}
    rows = dict.fromkeys(cases, failed)
    for case in pools:
        (whole,) = Measurement.merge(found[case])
        rows[case] = {"times": whole.times, "seconds": whole.median, "iqr": whole.iqr, "peak_memory": peaks[case]}
    return [rows[case] for case in cases]


def _call(function: Callable, case: Case):
    try:
        return function(case)
    except Exception as error:  # not every exception can be sent to another process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _start(case: Case) -> int:
    """Prepare a case in a process of its own; its peak memory in bytes."""
    global _timer
    cuda = select(case.device)
    before = resident_memory(start=True)
    run = prepare(case)
    for _ in range(3 if cuda or case.compile else 1):
        out = run()
    if not torch.isfinite(out).all() or not out.any():
        raise ValueError(f"{case.name} computes zeros or NaN, which may be faster or slower than other values")
    del out
    if case.profile:
        _profile(case, run)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
    _timer = make_timer(run)
    return torch.cuda.max_memory_allocated() if cuda else resident_memory() - before


def _measure_again(case: Case) -> Measurement:
    if case.section == "data":  # crops differ, and so does the work for them
        return _timer.timeit(20)
    if case.section == "train" and case.device.startswith("cuda"):  # training does not wait for the GPU at each step
        return _timer.timeit(5)
    return _timer.blocked_autorange()


def select(device: str) -> bool:
    """Make a GPU the current device; whether ``device`` is a GPU."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(torch.device(device).index or 0)
    return cuda


def resident_memory(start: bool = False) -> int:
    """Peak resident memory of this process in bytes since the last call with ``start``; 0 except on Linux."""
    try:
        if start:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _profile(case: Case, run: Callable):
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * case.device.startswith("cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        run()
    key = "self_cuda_time_total" if case.device.startswith("cuda") else "self_cpu_time_total"
    print(f"\n{case.name}\n{profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50)}")


def operations(case: Case) -> float:
    """Floating-point operations of a case's matrix products and convolutions; NaN of a network of others."""
    if case.variant in OTHERS:
        return math.nan
    return _operations(case.variant, case.batch, case.height, case.width, case.section == "train")


@functools.lru_cache
def _operations(variant: str, *size_and_direction) -> int:
    return count_operations(create_model(variant), *size_and_direction)


def has_bf16(device: str) -> bool:
    """Whether the hardware computes bfloat16; emulating it is a hundred times slower."""
    return autocast_dtype("auto", torch.device(device)) is not None


def matrix_peak(device: str, size: int = 0) -> dict[bool, float | None]:
    """Floating-point operations per second of large matrix products: in float32 (False), in bfloat16 (True) or None."""
    select(device)
    types = {False: torch.float32, True: torch.bfloat16} if has_bf16(device) else {False: torch.float32}
    return {True: None} | {bf16: matrix_rate(torch.device(device), dtype, size) for bf16, dtype in types.items()}


# ------------------------------------------------------------------------------------------- the tables


def network_cases(args, section: str, variant: str, height: int, width: int, batch: int) -> list[Case]:
    bf16 = has_bf16(args.device)
    plain = Case(section, "baseline", variant, batch, height, width, device=args.device)
    here = replace(plain, name="float32", profile=args.profile)
    cases = [replace(plain, baseline=True), here]
    if bf16:
        here = replace(here, name="bfloat16", bf16=True)
        cases.append(here)
    if section == "train":
        cases.append(replace(here, name=f"{here.name}, checkpointing", checkpointing=True, profile=False))
    forms = [here] + [replace(here, name=f"{here.name}, compiled", compile=True)] * args.compile
    cases += forms[1:]
    if section == "train" and args.device.startswith("cuda"):
        cases += [replace(form, name=f"{form.name}, captured", capture=True) for form in forms]
    return cases


def part_cases(args, variant: str, operation: str) -> list[Case]:
    side = args.crop
    plain = Case("parts", "", variant, args.batch, side, side, bf16=has_bf16(args.device), device=args.device)
    return [replace(plain, name=form, operation=operation) for form in PARTS[operation]]


def other_cases(args, height: int, width: int) -> list[Case]:
    there = [name for name, (module, _) in OTHERS.items() if importlib.util.find_spec(module.partition(".")[0])]
    plain = Case("others", "", height=height, width=width, device=args.device)
    return [
        replace(plain, name=f"{name}, {'bfloat16' if bf16 else 'float32'}", variant=name, bf16=bf16)
        for name in (*args.variants, *there)
        for bf16 in ((False, True) if has_bf16(args.device) else (False,))
    ]


@contextlib.contextmanager
def data_cases(args) -> Iterator[list[Case]]:
    """The cases of the section ``data``, while their images are there."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(args.images or make_images(Path(folder) / "images"))
        packed = Path(folder) / "packed.h5"
        pack = [sys.executable, ROOT / "scripts/pack_dataset.py", source, "--out", packed]
        done = subprocess.run(pack, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"--images: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
        yield [
            Case("data", "baseline: PNG", baseline=True, images=str(source)),
            Case("data", "PNG", images=str(source)),
            Case("data", "packed", images=str(packed)),
        ]


def make_images(folder: Path) -> Path:
    """Pairs of 1280x720 PNGs: scikit-image's photographs, enlarged, with sensor noise; the inputs blurred before it."""
    import cv2
    import skimage.data

    from dgunet.data.images import write_image

    rng = np.random.default_rng(0)
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        sharp = cv2.resize(getattr(skimage.data, name)(), (1280, 720), interpolation=cv2.INTER_CUBIC)
        for side, image in (("input", cv2.blur(sharp, (15, 3))), ("target", sharp)):
            noisy = np.clip(image + rng.normal(0, 1.5, image.shape), 0, 255).round().astype(np.uint8)
            write_image(folder / side / f"{name}.png", noisy)
    return folder


class Results:
    """Prints the rows of the tables as they come, with ratios to the first one, and writes them to files."""

    columns = ("table", "name", "seconds", "iqr", "images_per_second", "speed_ratio", "peak_memory", "share_of_peak")

    def __init__(self, out: Path, note: dict):
        self.out, self.note, self.rows = out, note, []

    def measure(self, title: str, cases: list[Case], args, peaks: dict):
        heads = f"{'time':>13} {'images/s':>9} {'speed':>8} {'memory':>10} {'of peak':>7}"
        print(f"\n{title}\n{'':48} {heads}")
        baseline = None
        for case, row in measure(cases, args):
            baseline = baseline or row
            row = {"table": title, **asdict(case), **row}
            row["images_per_second"] = case.batch / row["seconds"]
            row["speed_ratio"] = baseline["seconds"] / row["seconds"]
            row["memory_ratio"] = row["peak_memory"] / (baseline["peak_memory"] or math.nan)
            row["share_of_peak"] = math.nan
            if row["times"] and case.section in ("forward", "train", "others"):
                row["share_of_peak"] = operations(case) / row["seconds"] / peaks[case.bf16]
            cells = _cells(row)
            print(f"{case.name:48} {' '.join(map(str.rjust, cells, (13, 9, 8, 10, 7)))}", flush=True)
            self.rows.append(row)
            self.write()

    def write(self):
        """All that is known so far: the next case may be the last that there is time for."""
        self.out.write_text(json.dumps(self.note | {"rows": self.rows}, indent=1) + "\n")
        with open(self.out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, ["date", "machine", "torch", *self.columns], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.note | row for row in self.rows)
        lines, table = ["{date}, {machine}, PyTorch {torch}".format(**self.note)], None
        for row in self.rows:
            if row["table"] != table:
                table = row["table"]
                lines += ["", f"| {table} | time | images/s | speed | memory | of peak |", "|" + " --- |" * 6]
            lines.append(f"| {' | '.join([row['name'], *_cells(row)])} |")
        self.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cells(row: dict) -> list[str]:
    """Time, images per second, speed, memory, share of the peak: empty where they are not known."""
    peak = row["peak_memory"]
    memory = f"{peak / 2**30:.1f} GiB" if peak >= 10 * 2**30 else f"{peak / 2**20:.0f} MiB"
    cells = f"{row['seconds'] * 1000:.1f} ms", f"{row['images_per_second']:.2f}", f"{row['speed_ratio']:.2f}x", memory
    return ["" if "nan" in cell else cell for cell in (*cells, f"{row['share_of_peak']:.1%}")]


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.lower().split("x"))
    if min(width, height) < MULTIPLE or width % MULTIPLE or height % MULTIPLE:
        raise argparse.ArgumentTypeError(f"sides are multiples of {MULTIPLE}, got {text}")
    return width, height


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", choices=SECTIONS, help=f"of {', '.join(SECTIONS)}; default: three")
    add("--variants", nargs="+", default=["deraining_dgunet"], help=f"of {', '.join(list_models())}")
    add(
        "--sizes",
        nargs="+",
        type=size,
        metavar="WxH",
        default=[(256, 256), (1280, 720)],
        help="forward: width x height",
    )
    add("--batch", type=at_least(1), default=2, help="training: images in a step (default: 2; the paper's is 16)")
    add("--crop", type=at_least(MULTIPLE), default=128, help="training: side of crops (default: 128; the paper's: 256)")
    add("--compile", action="store_true", help="also torch.compile")
    add("--images", help="data: folder of 1280x720 pairs (default: enlarged photographs of scikit-image)")
    add("--device", default="auto", help="auto (a CUDA GPU where there is one), cpu, cuda, cuda:1, ...")
    add("--runs", type=at_least(1), default=7, help="rounds of measurements (default: %(default)s)")
    add("--seconds", type=float, default=60, help="no new round after so long (default: %(default)s)")
    add("--minutes", type=float, default=math.inf, help="no new case after so long (default: all are measured)")
    add("--case_seconds", type=float, default=600, help="a case that takes longer is ended (default: %(default)s)")
    add("--profile", action="store_true", help="also print a profile of this repository's networks")
    add("--out", type=Path, default=Path("benchmark.json"), help="JSON file to write (default: benchmark.json)")
    args = parser.parse_args()
    args.device = str(pick_device(args.device))
    args.deadline = time.monotonic() + 60 * args.minutes
    sections = args.sections or DEFAULT_SECTIONS

    threads, machine = torch.get_num_threads(), device_name(args.device)
    note = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "threads": threads, "torch": torch.__version__}
    print("{date}, {machine}, {threads} CPU threads, PyTorch {torch}".format(**note))
    peaks = {}
    if {"forward", "train", "others"} & set(sections):
        peaks = matrix_peak(args.device)
        bf16 = f", {peaks[True] / 1e12:.2f} in bfloat16" if peaks[True] else "; no bfloat16 in this hardware"
        print(f"matrix products: {peaks[False] / 1e12:.2f} Tflop/s in float32{bf16}")
    results = Results(args.out, note | {"matrix_peak": {"bfloat16": peaks.get(True), "float32": peaks.get(False)}})
    if "memory" in sections:
        print_memory(args)
    for section in sections:
        for title, cases in tables(args, section):
            results.measure(f"{section}: {title}", cases, args, peaks)
    if results.rows:
        print(f"\nwrote {args.out} and, beside it, .csv and .md")


def print_memory(args):
    """The most that the tensors of a training step take, by variant and precision, see `cost.step_memory`."""
    forms = {"float32": {}, "bfloat16": {"bf16": True}, "checkpointing": {"bf16": True, "checkpointing": True}}
    print(f"\nmemory of a training step, {args.batch} x {args.crop}x{args.crop}, GiB")
    print(f"{'':32}" + "".join(f"{name:>16}" for name in forms))
    for variant in args.variants:
        plain = Case("train", "", variant, args.batch)
        found = [step_memory(_train_state(replace(plain, **form)), args.crop) / 2**30 for form in forms.values()]
        print(f"{variant:32}" + "".join(f"{size:16.1f}" for size in found), flush=True)


def tables(args, section: str) -> Iterator[tuple[str, list[Case]]]:
    """The title and the cases of each table of a section."""
    batch, crop = args.batch, args.crop
    if section == "data":
        with data_cases(args) as cases:
            yield "deblurring samples of 256x256 from pairs of 1280x720, one core", cases
    elif section == "others":
        for width, height in args.sizes:
            yield f"1 x {height}x{width}", other_cases(args, height, width)
    for variant in args.variants if section in ("forward", "train", "parts") else ():
        if section == "forward":
            for width, height in args.sizes:
                yield f"{variant}, 1 x {height}x{width}", network_cases(args, section, variant, height, width, 1)
        elif section == "train":
            cases = network_cases(args, section, variant, crop, crop, batch)
            yield f"{variant}, {batch} x {crop}x{crop}", cases
        else:
            for operation in PARTS:
                cases = part_cases(args, variant, operation)
                yield f"{operation}, {variant}, {batch} x {crop}x{crop}", cases


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


if __name__ == "__main__":
    run_cli(main)
