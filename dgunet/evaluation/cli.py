"""Testing from the command line: how a task is tested, its options, its test sets one after the other, its table."""

import argparse
import csv
import datetime
import functools
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from dgunet.checkpoints.load import load_model, read_checkpoint
from dgunet.checkpoints.registry import locate
from dgunet.data.pairs import images_by_name
from dgunet.data.photos import trained_sigma_range
from dgunet.evaluation.metrics import find_metrics
from dgunet.evaluation.runner import digest_of, evaluate, restore_images, restore_measurement
from dgunet.evaluation.scoresheet import TEXT, Result
from dgunet.evaluation.sets import Images, ImageSet, Sample, measured, paired, pairs_or_images
from dgunet.inference import check_tiles, parse_tile
from dgunet.model.degradations import make_operator
from dgunet.model.network import FACTORIES
from dgunet.runtime.distributed import lock_dir
from dgunet.runtime.errors import UserError, one_line
from dgunet.runtime.files import atomic_write, match_unicode_form, nfc
from dgunet.runtime.hardware import pick_device
from dgunet.runtime.imports import import_object, is_object_name


@dataclass(frozen=True)
class Benchmark:
    """A published test set, or how a folder of the user's own is tested."""

    place: str  # a folder, or a file, under the data root; empty for the user's own
    protocol: str | None  # see `metrics.PROTOCOLS`; None where a server scores
    paper: dict[str, tuple[float, float]] = field(default_factory=dict)  # PSNR, SSIM by network, without its task
    open: Callable[[Path], ImageSet] = paired
    self_ensemble: bool = False  # whether the original uses it here
    sigma: float | None = None  # of the Gaussian noise that is added, in 8-bit levels
    usual: bool = True  # whether it is tested where no --dataset is given


def custom_folder(protocol: str, open: Callable[[Path], ImageSet] = pairs_or_images) -> Callable:
    """How folders of the user's own are tested: by default pairs, scored by the protocol, or images, restored only."""
    return lambda args: {"": Benchmark("", protocol, open=open)}


def add_tiling(add: Callable):
    """Add the options of `restore`, and how pairs are found."""
    patterns = "patterns of the names of inputs and of targets in folders of your own, such as '*_input' '*_gt'"
    add("--pairs", nargs=2, metavar=("INPUT", "TARGET"), help=f"{patterns} (default: input/ and target/, or as known)")
    ensemble = "mean over 8 flips and rotations (default: for SIDD and DND, as in the original)"
    add("--self_ensemble", action=argparse.BooleanOptionalAction, help=ensemble)
    tiles = "tile side in pixels, whole, or auto: whole where memory allows it (default: as the weights' record says, "
    tiles += "else whole for scores, which tiles change, and auto where there are no targets)"
    add("--tile", type=parse_tile, default=argparse.SUPPRESS, help=tiles)
    add("--tile_overlap", type=int, help="pixels that tiles share (default: a quarter of the tile, at most 64)")
    windows = "windows or tiles as the weights' record says (docs/local.md); --no-local: whole images, as in the paper"
    add("--local", action=argparse.BooleanOptionalAction, default=True, help=windows)


def noise_sigma(text: str) -> float:
    """The value of an option: standard deviation of Gaussian noise, in 8-bit levels."""
    if not 0 < float(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a standard deviation in 8-bit levels, such as 25")
    return float(text)


def tiling(args: argparse.Namespace, benchmark: Benchmark) -> dict:
    chosen = {"tile": args.tile} if "tile" in args else {}
    check_tiles(chosen.get("tile"), args.tile_overlap)
    if not args.local:
        chosen["local"] = False
    ensemble = benchmark.self_ensemble if args.self_ensemble is None else args.self_ensemble
    return dict(self_ensemble=ensemble, tile_overlap=args.tile_overlap) | chosen


@dataclass(frozen=True)
class Evaluation:
    """How a task is tested: by default pairs, scored in RGB, restored by `restore`.

    Args:
        benchmarks: the published test sets, by name.
        own: how a folder of the user's own is tested, by what is added to its name, given the parsed options.
        default_weights: the name of the weights that are tested without --weights; empty: there are none.
        method: see `evaluate`.
        add_options: adds the options of the task, given a parser's ``add_argument``; ``options`` are those of the
            method, given the parsed ones and the test set.
        variants: further options of the method that each data set is tested with, by what is added to its name, given
            the network and the parsed options.
        paper_key: the key of the paper's values in a `Benchmark`, given the network's name without its task, the
            network, the parsed options, and those of a variant by name.
        paper_average: the paper's mean over all benchmarks, by network, where the table is to have one.
        operators: whether there is ``--degradation``, for networks with an operator of the user's own. Folders then
            hold clean images, which it measures, or measurements, see `sets.measured`.
    """

    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    own: Callable[[argparse.Namespace], dict[str, Benchmark]] = custom_folder("rgb_matlab")
    default_weights: str = ""
    method: Callable = restore_images
    add_options: Callable[[Callable], None] = add_tiling
    options: Callable[[argparse.Namespace, Benchmark], dict] = tiling
    variants: Callable[[torch.nn.Module, argparse.Namespace], dict[str, dict]] = lambda model, args: {"": {}}
    paper_key: Callable[..., str] = lambda name, model, args: name
    paper_average: dict[str, tuple[float, float]] | None = None
    operators: bool = False


def test_command(task: str, how: Evaluation, description: str, argv: list[str] | None = None, prog: str | None = None):
    """A task's test from the command line: read that, `evaluate` each data set, print and append the table.

    Args:
        task: e.g. ``"denoising"``; weights of another task are refused.
        how: it is tested.
        description: for ``--help``.
        argv: the words of the command line; default: the process's own.
        prog: the command, for ``--help``.

    Raises:
        UserError: at the end, listing the images that could not be tested.
    """
    args = _parse(description, how, argv, prog)
    imported = _import_benchmarks(args.dataset or [])
    args.dataset = [imported[word][0] if word in imported else word for word in args.dataset or []]
    benchmarks, method = how.benchmarks | dict(imported.values()), how.method
    operator = getattr(args, "degradation", None)
    if operator:
        if args.score_only or not args.dataset:
            raise UserError("--degradation measures the images of a folder; give it with --dataset FOLDER")
        if args.pairs:
            raise UserError("--pairs are of an unknown degradation; leave them out with --degradation")
        benchmarks = {}  # they are pairs, of an unknown degradation
    network, noise, passes = None, None, {"": {}}
    if args.score_only is None:
        network = _load(task, args, how.default_weights)
        folder = args.results / task / _folder_of(network)
        passes = how.variants(network.model, args)
        noise = network.noise_sigma if any(benchmark.sigma for benchmark in benchmarks.values()) else None
    elif args.score_only.is_dir():
        folder = args.results / task / f"scores_of_{args.score_only.absolute().name}"
    else:
        raise UserError(f"no folder {args.score_only.absolute()} with restored images")
    metrics = find_metrics(list(dict.fromkeys(args.metrics)), pick_device(args.device))
    own_folders = how.own(args)
    if operator:
        method, open_folder = restore_measurement, functools.partial(measured, model=network.model)
        own_folders = {end: replace(benchmark, open=open_folder) for end, benchmark in own_folders.items()}
    tests = _tests(args.dataset or _default(how.benchmarks, noise), benchmarks, own_folders)

    def test(name: str, word: str, benchmark: Benchmark, further: dict) -> Result:
        source = _find(word, args.data_root, benchmarks)
        own = word not in benchmarks and getattr(args, "pairs", None)
        if own and benchmark.sigma:
            raise UserError("--pairs are of inputs and targets, --sigma makes inputs of targets; leave one out")
        data = paired(source, tuple(args.pairs)) if own else benchmark.open(source)
        common = dict(protocol=benchmark.protocol, folder=folder / name, name=name, metrics=metrics, say=print)
        if network is None:
            if not data.targets:
                raise UserError(f"{source} has no input/ and target/, so there is nothing to score against")
            restored = _read_restored(args.score_only, (name, Path(word).name), data)
            result = evaluate(restored, data, save_images=False, **common)
            result.seconds_per_image = math.nan
            return result
        settings = dict(compile=args.compile) | ({"degradation": operator} if operator else {})
        common |= dict(settings=settings, save_images=args.save_images or None, bf16=args.bf16)
        result = evaluate(network.model, data, method=method, **common, **how.options(args, benchmark), **further)
        if not result.missing:
            variant = network.name.removeprefix(f"{task}_")
            result.paper = benchmark.paper.get(how.paper_key(variant, network.model, args, **further))
        return result

    results, failures = [], []
    for name, (word, benchmark) in tests.items():
        for end, further in passes.items():
            try:
                result = test(name + end, word, benchmark, further)
            except UserError as error:
                if len(tests) == 1:
                    raise
                if (failure := f"{word}: {error}") not in failures:  # of another variant
                    failures.append(failure)
                continue
            failures += result.failures
            _report(result)
            if result.images:
                results.append(result)
    published = [result for result in results if result.dataset in how.benchmarks and not result.missing]
    if how.paper_average is not None and len(published) == len(how.benchmarks):
        results.append(average(published))
        results[-1].paper = network and how.paper_average.get(network.name.removeprefix(f"{task}_"))
    if results:
        print(format_table(results))
        table = args.results / f"{task}.csv"
        source = args.score_only or network.source
        append_results(table, results, str(source), "score_only" if network is None else network.name)
        print(f"appended to {table}")
    if network is not None:
        print(f"images and scores of each image are in {folder}")
    if failures:
        for failure in failures:
            print(f"not tested: {one_line(failure)}", file=sys.stderr)
        raise UserError(f"{len(failures)} not tested, all others were")


def _parse(description: str, how: Evaluation, argv: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, benchmarks = parser.add_argument, how.benchmarks
    noisy = any(benchmark.sigma for benchmark in benchmarks.values())
    usual = "those whose noise the weights are for" if noisy else "all of these"
    add("--weights", help="checkpoint, yours or the original authors', or a name (default: our own)")
    add("--proximal", metavar="MODULE:NAME", help="what makes their proximal mappings, if these are your own")
    add("--learned_degradation", metavar="MODULE:NAME", help="what makes their learned degradations, if your own")
    add(
        "--dataset",
        nargs="+",
        help=f"{', '.join(benchmarks)}; folders or images; module:name of a Benchmark (default: {usual})",
    )
    add("--data_root", type=Path, default=Path("Datasets"), help="holds the test sets (default: Datasets)")
    where = "where everything is written (default: results): TASK.csv, and for each weights TASK/NAME_DIGEST/DATASET/"
    add("--results", type=Path, default=Path("results"), help=where)
    add("--score_only", type=Path, metavar="FOLDER", help="score the images in FOLDER/DATASET, restore nothing")
    add("--save_images", action="store_true", help="write restored images also where the scores do not need it")
    further = (
        "further scores: of the pyiqa library (lpips, dists, niqe, ...), or module:name of a function of two arrays"
    )
    add("--metrics", nargs="+", default=[], metavar="NAME", help=further)
    add("--device", default="auto", help="auto (a CUDA GPU where there is one), cpu, cuda, cuda:1, mps, ...")
    add("--bf16", action="store_true", help="bfloat16 autocast: faster, up to some hundredths of a dB off")
    add("--compile", action="store_true", help="torch.compile: faster after a minute or more of compiling")
    if how.operators:
        known = "module:name of what makes the known degradation of the weights; --dataset then names folders of clean "
        known += "images, which it measures, or of measurements in .npy files, which are restored only"
        add("--degradation", metavar="MODULE:NAME", help=known)
    how.add_options(add)
    return parser.parse_args(argv)


class _Network(NamedTuple):
    model: torch.nn.Module
    name: str
    source: str  # as it was given
    path: Path
    noise_sigma: tuple[float, float] | None  # weakest and strongest noise that it was trained for


def _load(task: str, args: argparse.Namespace, default_weights: str) -> _Network:
    source = args.weights or default_weights
    if not source:
        raise UserError(f"no network for {task.replace('_', ' ')} comes with dgunet; give one with --weights FILE")
    path = locate(source)
    content = read_checkpoint(path)  # once: training may replace the file a moment later
    if not args.weights:
        print(f"no --weights given: this repository's own {default_weights} ({content['record']['trained_for']})")
    own = {name: import_object(text, f"--{name}") for name in FACTORIES if (text := getattr(args, name))}
    known = None
    if name := getattr(args, "degradation", None):
        known = make_operator(name, "--degradation", _config_of(content))
    model = load_model(path, task=task, device=pick_device(args.device), degradation=known, content=content, **own)
    if args.compile:
        model.compile()  # once for the first size, and once more for all other sizes
    name, noise = model.name or "DGUNet", trained_sigma_range(content)
    print(f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters, from {path}")
    return _Network(model, name, source, path, noise)


def _config_of(content: dict):
    """The training's config that a checkpoint holds, for an operator that is made from it; None where it has none."""
    import yaml
    from yacs.config import CfgNode

    text = content.get("config")
    try:
        return CfgNode(yaml.safe_load(text)) if isinstance(text, str) else None
    except Exception as error:  # a damaged one fails in many ways
        raise UserError("the config in the checkpoint is damaged") from error


def _folder_of(network: _Network) -> str:
    """The name of the folder of a network's results: that of weights that come along, else with a digest of them.

    Many files are called model_best.pth, in folders of one name, and replaced as training goes on.
    """
    if network.path != Path(network.source):
        return network.source
    return f"{network.path.absolute().parent.name}_{network.path.stem}_{digest_of(network.model)[:8]}"


def _import_benchmarks(words: list[str]) -> dict[str, tuple[str, Benchmark]]:
    """The names and the records of test sets of the user's own, by the ``module:name`` that they are given as."""
    found = {}
    for word in words:
        if is_object_name(word) and not Path(word).exists():
            if not isinstance(benchmark := import_object(word, "--dataset"), Benchmark):
                raise UserError(f"--dataset {word} is no dgunet.evaluation.cli.Benchmark, but {benchmark!r:.100}")
            found[word] = word.rpartition(":")[2], benchmark
    return found


def _default(benchmarks: dict[str, Benchmark], noise: tuple[float, float] | None) -> list[str]:
    """The test sets with the Gaussian noise that a network is for, if any, else those without added noise."""
    sigmas = {name: benchmark.sigma for name, benchmark in benchmarks.items() if benchmark.usual}
    fitting = [name for name, sigma in sigmas.items() if sigma and noise and noise[0] <= sigma <= noise[1]]
    return fitting or [name for name, sigma in sigmas.items() if sigma is None]


def _tests(
    words: list[str], benchmarks: dict[str, Benchmark], own: dict[str, Benchmark]
) -> dict[str, tuple[str, Benchmark]]:
    """The words of --dataset and how each is tested, by the data set's name in tables."""
    known = {name.lower(): name for name in benchmarks}
    tests = {}
    words = [word if Path(word).exists() else known.get(word.lower(), str(match_unicode_form(word))) for word in words]
    for word in dict.fromkeys(words):
        alike = {word: benchmarks[word]} if word in benchmarks else {label(word) + end: how for end, how in own.items()}
        for name, benchmark in alike.items():
            if name in tests:
                raise UserError(f"{word} and another --dataset would both be written to {name}; test one at a time")
            tests[name] = word, benchmark
    return tests


def label(word: str) -> str:
    """The name of a folder or image of the user's own in tables; with its parent's, for many are called ``test``."""
    path = Path(os.path.abspath(word))
    if path.is_file():
        path = path.with_suffix("")
    return nfc("_".join(path.parts[1:][-2:])) or "root"  # relative, wherever the folder is


def _find(word: str, data_root: Path, benchmarks: dict[str, Benchmark]) -> Path:
    """The folder or file of a word of --dataset."""
    if word in benchmarks:
        place = benchmarks[word].place
        if not (source := match_unicode_form(data_root / place, ignore_case=True)).exists():
            raise UserError(
                f"no {source.absolute()}; --data_root names the folder that holds {place}, see the task's README for "
                "the data layout"
            )
        return source
    if not Path(word).exists():
        named = f", or name a test set: {', '.join(benchmarks)}" if benchmarks else ""
        raise UserError(f"no folder or image {Path(word).absolute()}; check the path{named}")
    return Path(word)


def _read_restored(root: Path, names: tuple[str, ...], data: ImageSet) -> Callable:
    """For `evaluate`: the images in one of the folders of these names in ``root``, or in ``root`` itself."""
    folders = (match_unicode_form(root / name, ignore_case=True) for name in names)
    folder = next((folder for folder in folders if folder.is_dir()), root)
    there = images_by_name(folder, report=False)  # missing ones are reported

    def read(sample: Sample, degraded: Images) -> tuple[Images, Images]:
        for name in sample.names:
            if name not in there:
                raise UserError(f"no restored {name} in {folder}")
        restored = [data.read_image(there[name]) for name in sample.names]
        return restored if sample.parts else restored[0], degraded

    return read


def _report(result: Result):
    """Print what a data set's mean scores do not say."""
    name, rows, count = result.dataset, result.rows, result.images
    if notes := [f"{row.name}: {row.note}" for row in rows if row.note]:
        print(f"note: {len(notes)} of {len(rows)} in {name}:", *notes, sep="\n  ")
    for number, what in ((result.identical, "restored images"), (result.identical_inputs, "inputs")):
        if number:  # their PSNR is infinite
            left_out = "which has no finite PSNR" if number == count else "left out of the mean PSNR"
            print(f"note: in {name}, {number} of {count} {what} identical to the target, {left_out}")
    tiled = [row.tile for row in rows if row.tile not in ("", "whole")]
    if tiled and str(result.settings["tile"]).startswith("auto"):
        sides = " and ".join(sorted(set(tiled), key=int))
        print(
            f"note: in {name}, {len(tiled)} of {len(rows)} restored in tiles of {sides} pixels, as --tile auto does "
            "where memory is short; that changes the result"
        )


def average(results: list[Result]) -> Result:
    """The mean of the sets' means, each with equal weight whatever its size."""
    means = [statistics.fmean(getattr(r, key) for r in results) for key in ("psnr", "ssim", "input_psnr", "input_ssim")]
    metrics = {name: statistics.fmean(r.metrics[name] for r in results) for name in results[0].metrics}
    images, settings = sum(r.images for r in results), results[0].settings
    identical, inputs = (sum(getattr(r, key) for r in results) for key in ("identical", "identical_inputs"))
    return Result(
        "average", results[0].protocol, images, *means, metrics=metrics, settings=settings, identical=identical,
        identical_inputs=inputs, version=results[0].version,
    )  # fmt: skip


def format_table(results: list[Result]) -> str:
    """A table of the measured values beside the paper's, a line for each data set."""
    header = ["dataset", "images", "input PSNR/SSIM", "PSNR/SSIM", "paper", "difference", *results[0].metrics]
    rows = [header]
    for r in results:
        paper = difference = "-"
        if r.paper is not None:
            digits = 3 if round(r.paper[1], 3) == r.paper[1] else 4  # as many as the paper has
            paper = f"{r.paper[0]:.2f}/{r.paper[1]:.{digits}f}"
            difference = f"{r.psnr - r.paper[0]:+.2f}/{r.ssim - r.paper[1]:+.{digits}f}"
        degraded, restored = f"{r.input_psnr:.2f}/{r.input_ssim:.4f}", f"{r.psnr:.2f}/{r.ssim:.4f}"
        further = [f"{value:.4f}" for value in r.metrics.values()]
        rows.append([r.label, str(r.images), degraded, restored, paper, difference, *further])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def append_results(path: Path, results: list[Result], weights: str, model: str):
    """Add a row for each result to a CSV file of all results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "date": datetime.datetime.now().isoformat(timespec="seconds"), "weights": weights, "model": model,
            "dataset": r.label, "protocol": r.protocol, "images": r.images, "psnr": f"{r.psnr:.4f}",
            "ssim": f"{r.ssim:.6f}", "input_psnr": f"{r.input_psnr:.4f}", "input_ssim": f"{r.input_ssim:.6f}",
            "seconds_per_image": f"{r.seconds_per_image:.3f}",
            "settings": " ".join(f"{key}={_setting_text(value)}" for key, value in r.settings.items()),
            # New columns come after these: scripts/reproduce.sh counts them.
            "command": " ".join(sys.argv), "identical": r.identical, "identical_inputs": r.identical_inputs,
            "protocol_version": r.version, **{name: f"{value:.6f}" for name, value in r.metrics.items()},
        }
        for r in results
    ]  # fmt: skip
    with lock_dir(path.parent, "test", wait=True):  # tests that end together must not mix their rows
        before, columns = [], []
        if path.exists():
            with open(path, **TEXT) as file:
                reader = csv.DictReader(file)
                columns = reader.fieldnames or []
                if columns and "psnr" not in columns:
                    advice = "move it away, and start again"
                    raise UserError(f"{path} is no table of results as test.py writes it; {advice}")
                before = list(reader)
        with atomic_write(path) as temporary, open(temporary, "w", **TEXT) as file:
            writer = csv.DictWriter(file, dict.fromkeys([*columns, *rows[0]]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(before + rows)


def _setting_text(value) -> str:
    """A setting without spaces: windows as ``norm64+projection128``."""
    return "+".join(f"{name}{size}" for name, size in value.items()) if isinstance(value, dict) else str(value)
