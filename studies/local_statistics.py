"""Whole images, windows and tiles at test time, on test sets, with time and peak memory: the table of docs/local.md.

    python studies/local_statistics.py --data_root Datasets --images 12
    python studies/local_statistics.py --only denoising_photo --bf16

A line for each case as it is measured, in a process of its own, whose peak memory is that of the case; at the end the
table. Test sets that are not below --data_root are left out and named.
"""

import multiprocessing
import resource
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from shared import Parser, UserError, command_imports, markdown_table, matching, run_cli

with command_imports(__name__):
    from dgunet.checkpoints.load import load_model
    from dgunet.evaluation.cli import Benchmark
    from dgunet.evaluation.runner import evaluate
    from dgunet.evaluation.sets import pairs_or_images
    from dgunet.model.local import OPERATIONS, with_local_statistics
    from dgunet.runtime.files import match_unicode_form
    from dgunet.runtime.hardware import pick_device
    from dgunet.tasks import find_task

# The networks, their tasks and test sets of these, or folders of pairs.
NETWORKS = {
    "denoising_gaussian": ("denoising", ("CBSD68_25", "Kodak24_25", "Set12_25")),
    "denoising_photo": ("denoising", ("CC15", "Nam25")),
    "deraining_mixture": ("deraining", ("Rain100L", "Test100")),
    "deblurring_motion": ("deblurring", ("GoPro", "reds_small/test")),
    "compressive_sensing_25": ("compressive_sensing", ("Set11", "BSD68")),
}
WINDOWS = dict.fromkeys(OPERATIONS, 128)
FORMS = {"whole": {}, "windows of 128": WINDOWS, "tiles of 128": {"tile": 128}, "tiles of 192": {"tile": 192}}


def find_benchmark(task: str, name: str) -> Benchmark:
    benchmarks = find_task(task).evaluation.benchmarks
    return benchmarks.get(name) or Benchmark(name, "rgb_matlab", open=pairs_or_images)


def find_source(root: Path, benchmark: Benchmark) -> Path:
    return match_unicode_form(root / benchmark.place, ignore_case=True)


def measure(weights: str, name: str, form: str, args: Namespace) -> tuple[int, float, float, float]:
    """A case: how many images, mean PSNR in dB, seconds per image, peak memory of this process in MiB."""
    task = NETWORKS[weights][0]
    benchmark, method, local = find_benchmark(task, name), find_task(task).evaluation.method, FORMS[form]
    model = load_model(weights, device=pick_device(args.device))
    data = benchmark.open(find_source(args.data_root, benchmark))
    step = max(len(data.samples) // (args.images or len(data.samples)), 1)
    data = replace(data, samples=data.samples[::step][: args.images])
    if model.degradation is None:
        options = dict(local=local or False)
    else:  # compressive sensing: tiles are measured one by one
        model, options = with_local_statistics(model, local), dict(whole="tile" not in local)
    result = evaluate(model, data, benchmark.protocol, method=method, bf16=args.bf16, save_images=False, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result.images, result.psnr, result.seconds_per_image, peak


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--data_root", type=Path, default=Path("Datasets"), help="holds the test sets (%(default)s)")
    parser.add_argument("--images", type=int, help="at most so many of each set, evenly spread (default: all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only networks whose names contain one of these")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    rows, missing = [], []
    for weights in matching(list(NETWORKS), args.only):
        task, names = NETWORKS[weights]
        for name in names:
            if not find_source(args.data_root, find_benchmark(task, name)).exists():
                missing.append(name)
                continue
            cells = []
            for form in FORMS:
                if task == "compressive_sensing" and form == "tiles of 192":  # the original's are of 128
                    cells.append("")
                    continue
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    images, psnr, seconds, peak = fresh.submit(measure, weights, name, form, args).result()
                cells.append(f"{psnr:.2f} dB, {seconds:.1f} s, {peak:.0f} MiB")
                print(f"{weights}, {images} of {name}, {form}: {cells[-1]}", flush=True)
            rows.append([f"`{weights}`", f"{images} of {name}", *cells])
    if not rows:
        raise UserError(f"none of the test sets is in {args.data_root.absolute()}: {', '.join(missing)}")
    print("\n" + markdown_table(["network", "test set", *FORMS], rows))
    if missing:
        print(f"left out, for they are not in {args.data_root.absolute()}: {', '.join(missing)}")


if __name__ == "__main__":
    run_cli(main)
