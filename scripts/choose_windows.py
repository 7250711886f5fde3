"""Choose the windows of local statistics for a network, on the images held out from its training.

    python scripts/choose_windows.py --weights denoising_gaussian TRAINING.TRAIN_DIR Datasets/train/DIV2K_BSD400
    python scripts/choose_windows.py --weights deraining_mixture --config my_run/config.yaml --bf16 --images 8

Instance norm, channel attention and subspace projection are computed over a whole image in testing and over crops in
training; windows give them the size of then (dgunet/model/local.py). Which windows gain differs between networks. The
images are those that the last config beside the weights holds out for validation, whole instead of cropped, degraded
as the config says. For one operation after the other the window with the highest mean PSNR is taken, the others
unchanged: the largest within 0.01 dB of it, or the whole image if no window gains as much. Tiles of these sides,
which take longer, are chosen if they gain as much over the windows. The last line is the entry for the weights'
record.yaml.
"""

from pathlib import Path

from common import Parser, UserError, command_imports, run_cli

with command_imports(__name__):
    import torch
    from natsort import natsorted
    from torch import Tensor

    from dgunet.checkpoints.load import load_model
    from dgunet.checkpoints.registry import locate
    from dgunet.data.datasets import CenterCropDataset
    from dgunet.data.pairs import exclude, find_images, find_pairs, hold_out
    from dgunet.data.synthesis import find_degradation
    from dgunet.data.transforms import unit_range
    from dgunet.evaluation.metrics import psnr_batch
    from dgunet.inference import estimate, restore
    from dgunet.model.local import KEYS, with_local_statistics
    from dgunet.model.network import DGUNet
    from dgunet.model.proximal import MULTIPLE
    from dgunet.runtime.hardware import pick_device
    from dgunet.runtime.imports import is_object_name
    from dgunet.training.config import load_config

LEAST_GAIN = 0.01  # dB


def held_out(cfg, model: DGUNet) -> CenterCropDataset:
    """The validation images of a config, uncropped: ``(input, target)``; for compressive sensing the image twice."""
    degrade = find_degradation(cfg.SYNTHESIS.NAME, cfg.SYNTHESIS.OPTIONS) if cfg.SYNTHESIS.NAME else None
    sensing = model.degradation is not None
    find = find_images if degrade or sensing else find_pairs
    training = cfg.TRAINING
    if training.VAL_DIR:
        items = find(training.VAL_DIR)
    else:
        items = find(training.TRAIN_DIR)
        items = exclude(items, training.EXCLUDE) if training.EXCLUDE else items
        items = hold_out(items, training.VAL_HOLD_BACK, training.TRAIN_DIR)[1]
    multiple = getattr(model.degradation, "block", MULTIPLE)
    return CenterCropDataset(items, 0, degrade=degrade, seed=cfg.SEED, luma=sensing, multiple=multiple)


def score(model: DGUNet, windows: dict[str, int], samples: list[tuple[Tensor, Tensor]], bf16: bool) -> float:
    """Mean PSNR in dB over ``samples``, (C, H, W) each, and over several ratios if the network is for a range."""
    device, known, scores = next(model.parameters()).device, model.degradation, []
    for input, target in samples:
        x, target = (unit_range(image.to(device))[None] for image in (input, target))
        if known is None:
            restored = [restore(model, x, tile="auto" if "tile" in windows else None, bf16=bf16, local=windows)]
        else:
            local = with_local_statistics(model, windows)
            operators = getattr(known, "validation_operators", [known])
            restored = [estimate(local, A.A(x), bf16).clamp(0, 1) for A in operators]
        scores += [psnr_batch(image, target) for image in restored]
    return torch.cat(scores).mean().item()


def sides(text: str) -> list[int]:
    return [int(side) for side in text.split(",")]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", required=True, help="name or file")
    parser.add_argument("--config", type=Path, help="of the run that held out the images (default: beside the weights)")
    parser.add_argument("--windows", type=sides, default="64,96,128,192,256", help="in pixels (default: %(default)s)")
    parser.add_argument("--images", type=int, help="use only so many of the images, evenly spread")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys, such as TRAINING.TRAIN_DIR")
    args = parser.parse_intermixed_args()
    path = locate(args.weights)
    configs = [args.config] if args.config else natsorted(path.parent.glob("config*.yaml"))
    if not configs:
        raise UserError(f"no config beside {path}; give that of the run with --config")
    model = load_model(args.weights, device=pick_device(args.device))
    cfg = load_config(configs[-1], args.options)
    if is_object_name(cfg.SYNTHESIS.NAME) and not args.config:
        raise UserError(
            f"{configs[-1]} names code to run, {cfg.SYNTHESIS.NAME}; give that file with --config to run it"
        )
    images = held_out(cfg, model)
    step = max(len(images) // (args.images or len(images)), 1)
    samples = [images[i] for i in range(0, len(images), step)][: args.images]
    print(f"{args.weights}: mean PSNR in dB of {len(samples)} images that {configs[-1]} holds out")

    measured: dict[tuple, float] = {}

    def measure(windows: dict[str, int]) -> float:
        key = tuple(windows.get(name, 0) for name in KEYS)
        if key not in measured:
            measured[key] = score(model, windows, samples, args.bf16)
            cells = (f"{name} {windows.get(name, windows.get('tile', 'whole'))}" for name in KEYS)
            print("  ".join(f"{cell:16s}" for cell in cells), f"{measured[key]:.3f}", flush=True)
        return measured[key]

    def better(former: dict[str, int], trials: list[dict[str, int]]) -> dict[str, int]:
        """The trial with the largest windows among those as good as the best; ``former`` if none gains."""
        best = max(map(measure, trials))
        alike = [trial for trial in trials if measure(trial) > best - LEAST_GAIN]
        return max(alike, key=lambda trial: sum(trial.values())) if best >= measure(former) + LEAST_GAIN else former

    windows: dict[str, int] = {}
    whole = measure(windows)
    for name in ("projection", "norm", "attention"):
        others = {other: window for other, window in windows.items() if other != name}
        windows = better(windows, [{**others, name: side} for side in args.windows])
    if model.degradation is None:  # measurements have tiles of their own: blocks
        windows = better(windows, [{"tile": side} for side in args.windows])
    print(f"whole {whole:.3f}, chosen {measure(windows):.3f} dB\nlocal: {windows or False}")


if __name__ == "__main__":
    run_cli(main)
