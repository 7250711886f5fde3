"""The command `dgunet`, also `python -m dgunet`: restore photographs, train and test networks.

    dgunet restore photo.jpg holiday/
    dgunet denoise photo.jpg --strength 0.7 --compare
    dgunet derain street.png --out restored --stages
    dgunet list
    dgunet train deraining --config cpu TRAINING.TRAIN_DIR path/to/pairs
    dgunet test deraining --dataset path/to/pairs

`dgunet COMMAND --help` lists the options of each.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from dgunet import __version__
from dgunet.runtime.errors import UserError, run_cli  # PyTorch is imported where needed, so that --help is quick

# Command: (task, default network or None to choose one for each image, summary).
RESTORING = {
    "restore": (None, None, "recognise noise, JPEG blocks, rain or blur in photographs, and remove it"),
    "denoise": ("denoising", None, "remove noise and JPEG blocks from photographs"),
    "derain": ("deraining", "deraining_mixture", "remove rain streaks from photographs"),
    "deblur": ("deblurring", "deblurring_motion", "remove motion blur from photographs"),
}

# Commands that are followed by the name of a task, whose record (dgunet/tasks) has the rest of the command line.
OF_TASKS = {"train": "train a network for a task", "test": "test a network on data sets: restored images, scores"}

# Commands in modules of their own name, with add_arguments(parser) and run(args).
MODULES = {
    "export": "write a network as ONNX or as a PyTorch program, for use without this package",
    "demo": "try the networks in a browser",
}

KINDS = (
    "PHOTOS are files and folders (with their subfolders): JPEG, PNG, TIFF, WebP and more; grey, 16 bits, transparent, "
    "with a palette, CMYK, turned by EXIF. Names are kept. A JPEG is written as JPEG of quality 95 with its EXIF data, "
    "everything else as PNG, with 16 bits if a PNG or TIFF has them. What looks clean is copied by `restore`, and "
    "restored by the other commands. Finished images are skipped, so that the same command resumes an interrupted one; "
    "the photographs themselves are never written to. The exit status is 2 if some could not be restored."
)


def main(argv: list[str] | None = None):
    """Run the command of these arguments, by default the process's own, and exit."""
    run_cli(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int | None:
    args = _parser(argv).parse_args(argv)
    return args.run(args)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dgunet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dgunet {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command, (task, default, summary) in RESTORING.items():
        sub = commands.add_parser(command, help=summary, description=f"{summary.capitalize()}. {KINDS}")
        _add_restoring(sub, default)
        sub.set_defaults(run=_restore, task=task)
    listing = commands.add_parser("list", help="the networks that come with dgunet", description="List the networks.")
    listing.add_argument("--json", action="store_true", help="their whole records, as JSON")
    listing.set_defaults(run=_list)
    for command, summary in OF_TASKS.items():
        own = "`--help` after the task lists its options. A task of your own: module:name, see docs/extending.md."
        sub = commands.add_parser(command, help=summary, description=f"{summary.capitalize()}. {own}")
        names = "deblurring, deraining, denoising, compressive_sensing, or module:name"
        sub.add_argument("task", metavar="TASK", help=names)
        sub.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="the task's options")
        sub.set_defaults(run=lambda args: run_task(args.command, args.task, args.words))
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for command, summary in MODULES.items():
        sub = commands.add_parser(command, help=summary, description=f"{summary.capitalize()}.")
        if command == chosen:
            module = importlib.import_module(f"dgunet.apps.{command}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def run_task(command: str, name: str, argv: list[str], prog: str | None = None):
    """``dgunet train NAME`` or ``dgunet test NAME``; ``prog`` is what the command is called by otherwise."""
    from dgunet.tasks import find_task

    task = find_task(name)
    (task.train if command == "train" else task.test)(argv, prog or f"dgunet {command} {name}")


def _add_restoring(parser: argparse.ArgumentParser, default: str | None):
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTOS", help="images, and folders of images")
    add(
        "--out",
        type=Path,
        default=Path("restored"),
        metavar="FOLDER",
        help="where they are written (default: restored)",
    )
    usual = default or "the one that suits each photograph"
    add("--weights", metavar="W", help=f"network: a name that `dgunet list` shows, or a file (default: {usual})")
    add("--strength", type=float, default=1.0, metavar="S", help="0 leaves a photograph as it is, 1 restores it wholly")
    add("--overwrite", action="store_true", help="restore again what is already in --out")
    add("--compare", action="store_true", help="also write compare.html: before and after, with a slider")
    figures = parser.add_mutually_exclusive_group()
    draw = dict(action="store_true", default=False)
    figures.add_argument("--stages", **draw, help="also draw the centre of each after each stage (needs matplotlib)")
    if default is None:
        figures.add_argument("--explain", **draw, help="also draw what each network that may suit makes of the centre")
    add(
        "--tile",
        default="auto",
        help="side of tiles in pixels; whole; or auto (as the record or memory requires)",
    )
    windows = "windows or tiles as the weights' record says (docs/local.md), or whole images"
    add("--local", action=argparse.BooleanOptionalAction, default=True, help=windows)
    add("--device", default="auto", help="auto (a CUDA GPU where there is one), cpu, cuda, cuda:1, mps, ...")
    bf16 = "compute in bfloat16: nearly the same (default: where that is faster, but for images of 16 bits)"
    add("--bf16", action=argparse.BooleanOptionalAction, default=None, help=bf16)


def _restore(args: argparse.Namespace):
    from dgunet.apps.batch import restore_photographs
    from dgunet.inference import check_tiles, parse_tile

    try:
        tile = parse_tile(args.tile)
        check_tiles(tile, None)
    except ValueError:
        raise UserError(f"--tile is whole, auto, or a side of at least 16 pixels, not {args.tile!r}") from None
    if args.weights and getattr(args, "explain", False):
        raise UserError("--explain shows between which networks is chosen; leave out --weights")
    if not 0 <= args.strength <= 1:
        raise UserError(f"--strength is from 0 to 1, not {args.strength:g}")
    refused = restore_photographs(
        args.photos,
        args.out,
        args.weights or RESTORING[args.command][1],
        args.task,
        overwrite=args.overwrite,
        stages=args.stages,
        explain=getattr(args, "explain", False),
        tile=tile,
        local=args.local,
        device=args.device,
        bf16=args.bf16,
        strength=args.strength,
        compare=args.compare,
    )
    return 2 if refused else 0


def _list(args: argparse.Namespace):
    from dgunet.checkpoints.registry import list_pretrained

    records = list_pretrained()
    sizes = {record.name: record.path.stat().st_size for record in records}
    if args.json:
        listed = [dataclasses.asdict(record) | {"bytes": sizes[record.name]} for record in records]
        print(json.dumps(listed, indent=2, default=str))
        return
    rows = [("name", "task", "size", "PSNR / SSIM")]
    for record in records:
        scores = ", ".join(f"{name} {psnr:.2f} / {ssim:.4f}" for name, (psnr, ssim) in record.scores.items())
        rows.append((record.name, record.task.replace("_", " "), f"{sizes[record.name] / 2**20:.1f} MiB", scores))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row, record in zip(rows, [None, *records], strict=True):
        print(*(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)), sep="  ")
        if record is not None:
            print(f"    for: {record.trained_for}\n    not for: {record.not_for}")
    for command, (_, default, _) in RESTORING.items():
        print(f"dgunet {command} uses {default or 'what suits each photograph'}")
