"""What `dgunet restore` recognises, and what that is worth: the tables of docs/restore.md.

    python studies/measure_restore.py --data DATA --images 6

DATA has CBSD68 (clean photographs, which are degraded here) and, where they are there, CC15, nam25, Rain100L and
reds_small in folders input/ and target/; the names may be in lower case. None was trained on. To these come the test
photographs of scikit-image and drawn screens.

For each set: how many images are recognised as what; the mean PSNR in dB of the images as they are, of what `dgunet
restore` makes of them, and of what the right network always makes; of clean images the lowest PSNR to what they were.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared import Parser, at_least, command_imports, markdown_table, run_cli

with command_imports(__name__):
    import numpy as np
    import torch
    from natsort import natsorted
    from train_diagnosis import draw_screen

    from dgunet.automatic import DEGRADATIONS, NETWORKS, choose, diagnose
    from dgunet.checkpoints.load import load_model
    from dgunet.data import synthesis
    from dgunet.data.images import read_image
    from dgunet.data.pairs import find_images
    from dgunet.data.samples import sample_photos
    from dgunet.data.synthesis import degrade_image
    from dgunet.evaluation.metrics import evaluate_pair
    from dgunet.evaluation.sets import paired
    from dgunet.inference import restore
    from dgunet.runtime.hardware import autocast_dtype, pick_device


def with_jpeg(quality: int):
    return lambda image, rng: synthesis.jpeg_compress(image, quality)


def sensor(shot: float):
    return partial(synthesis.bayer_noise, shot=(shot, shot), read=(shot / 50, shot / 50))


# Name of the set, what it has, and how it is made of clean images.
LEVELS = (
    ("clean", "clean", None),
    ("clean, JPEG 95", "clean", with_jpeg(95)),
    *((f"Gaussian, sigma {s}", "gaussian noise", partial(synthesis.gaussian_noise, sigma=s)) for s in (5, 15, 25, 50)),
    *((f"sensor, shot noise {shot:g}", "camera noise", sensor(shot)) for shot in (0.002, 0.008, 0.02)),
    *((f"grain, sigma {s}", "camera noise", partial(synthesis.grain, sigma=s)) for s in (10, 20)),
    *((f"JPEG {quality}", "JPEG blocks", with_jpeg(quality)) for quality in (10, 20, 40, 60)),
    *((f"rain, {d} drops", "rain", partial(synthesis.added_rain, density=(d, d))) for d in (20, 60)),
    ("rain and haze", "rain", synthesis.rain_streaks),
    *((f"blur, {n} pixels", "blur", partial(synthesis.motion_blur, extent=(n, n))) for n in (6, 10, 15)),
)
# Name of the set, what it has, and its folder; its targets are a set of clean images.
PUBLISHED = (
    ("CC15", "camera noise", "cc15"),
    ("Nam25", "camera noise", "nam25"),
    ("Rain100L", "rain", "rain100l"),
    ("reds_small", "blur", "reds_small/test"),
)


def sets(data: Path, images: int) -> Iterator[tuple[str, str, list]]:
    """(name, degradation, [(degraded, clean), ...]) of each set, uint8."""
    clean = [read_image(path) for path in _spread(find_images(_find(data, "cbsd68")), images)]
    clean += [photo.load() for photo in sample_photos("test")]
    for name, degradation, degrade in LEVELS:
        yield (
            name,
            degradation,
            [
                (image if degrade is None else degrade_image(image, degrade, k, name), image)
                for k, image in enumerate(clean)
            ],
        )
    screens = [draw_screen(np.random.default_rng([7, k]), 400) for k in range(images)]
    yield "screens", "clean", [(screen, screen) for screen in screens]
    yield "screens, JPEG 30", "JPEG blocks", [(degrade_image(s, with_jpeg(30), 0, ""), s) for s in screens]
    for name, degradation, folder in PUBLISHED:
        if (source := _find(data, folder)) is None:
            print(f"{name} is not there")
            continue
        pairs = [sample.read() for sample in _spread(paired(source).samples, 3 * images)]
        yield name, degradation, pairs
        yield f"{name}, targets", "clean", [(target, target) for _, target in pairs]


def _find(data: Path, folder: str) -> Path | None:
    """A folder below ``data``, whatever the case of its name."""
    first, *rest = Path(folder).parts
    there = [path for path in data.iterdir() if path.name.lower() == first]
    return there[0].joinpath(*rest) if there else None


def _spread(items: list, count: int) -> list:
    """So many of the items, evenly spread."""
    items = natsorted(items, key=str) if items and isinstance(items[0], Path) else items
    return [items[k] for k in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DATA", help="folder of the test sets")
    add("--images", type=at_least(1), default=6, help="of CBSD68; of published sets three times as many (default: 6)")
    add("--only", nargs="+", metavar="WORD", help="only sets with one of these in their names")
    add("--recognise", action="store_true", help="only what is recognised, without restoring")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    bf16 = autocast_dtype("auto", device) is not None
    models = {name: load_model(name, device=device) for name in set(NETWORKS.values()) if name}
    psnr = lambda x, truth: evaluate_pair(x, truth, "train_rgb")[0]  # noqa: E731

    def run(image: np.ndarray, network: str | None, strength: float = 1.0) -> np.ndarray:
        return image if network is None else restore(models[network], image, bf16=bf16, strength=strength)

    print(f"| set | is | {' | '.join(DEGRADATIONS)} | as it is | `dgunet restore` | right network |")
    print("| --- " * (len(DEGRADATIONS) + 5) + "|")
    total = Counter()
    means, harmed = [], []
    for name, degradation, pairs in sets(args.data, args.images):
        if args.only and not any(word in name for word in args.only):
            continue
        found, scores = Counter(), []
        for image, clean in pairs:
            diagnosis = diagnose(image)
            found[diagnosis.degradation] += 1
            total[degradation, diagnosis.degradation] += 1
            if args.recognise:
                continue
            best = choose(diagnosis, 1)[0]
            automatic = run(image, best.network, best.strength)
            right = NETWORKS[degradation]
            always = automatic if best.network == right and best.strength == 1 else run(image, right)
            scores.append([psnr(x, clean) for x in (image, automatic, always)])
        cells = [str(found[kind]) if found[kind] else "" for kind in DEGRADATIONS]
        if args.recognise:
            values = [""] * 3
        elif degradation == "clean" and name != "clean, JPEG 95":
            kept = [automatic for _, automatic, _ in scores]
            harmed += [score for score in kept if score < 42]
            changed = sum(math.isfinite(score) for score in kept)
            values = ["", f"{changed} changed, lowest {min(kept):.1f}" if changed else "none changed", ""]
        else:
            mean = np.mean(scores, axis=0)
            means.append(mean)
            values = [f"{score:.2f}" for score in mean]
        print(f"| {name} | {degradation} | {' | '.join(cells)} | {' | '.join(values)} |", flush=True)
    rows = [[true, *(str(total[true, kind]) for kind in DEGRADATIONS)] for true in DEGRADATIONS]
    print("\n" + markdown_table(["is \\ recognised as", *DEGRADATIONS], rows))
    if means:
        before, automatic, always = np.mean(means, axis=0)
        print(f"\nmean of the degraded sets: {before:.2f}, restored {automatic:.2f}, by the right network {always:.2f}")
        print(f"clean images below 42 dB: {len(harmed)}")


if __name__ == "__main__":
    with torch.inference_mode():
        run_cli(main)
