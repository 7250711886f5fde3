"""Train the classifier of `dgunet restore`, which recognises what is wrong with a photograph.

    python scripts/train_diagnosis.py --images BSDS500 --pairs "camera noise=PolyU" rain=Rain800 blur=REDS \
        --exclude rain100l/same_photographs.txt --out diagnosis

A sample is a crop of 160 pixels of a clean image, in a random scale, exposure and mirroring, degraded in one of six
ways (dgunet/data/synthesis.py), of any strength from barely visible; or a crop of a degraded image of the --pairs,
whose targets join the clean ones. A sixth of the images are drawn: text, lines and areas as on a screen. Clean crops
include defocused ones and JPEGs of quality above 90, which should stay as they are. Every tenth image is held out; on
crops of these the temperature of the probabilities is chosen, and the confusion table is printed. In --out there are
then automatic.safetensors and automatic.yaml; move them to dgunet/ to use them.
"""

import time
from datetime import date
from pathlib import Path

from common import Parser, UserError, at_least, command_imports, is_free, run_cli

with command_imports(__name__):
    import cv2
    import numpy as np
    import torch
    import yaml
    from benchmark import device_name
    from numpy.random import Generator
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Dataset

    from dgunet.automatic import CROP, DEGRADATIONS, Classifier
    from dgunet.checkpoints.safetensors import save_weights
    from dgunet.data import synthesis
    from dgunet.data.images import read_image
    from dgunet.data.pairs import find_images, has_pairs
    from dgunet.data.samples import sample_photos
    from dgunet.data.transforms import as_colour, to_uint8
    from dgunet.evaluation.sets import image_samples, paired
    from dgunet.runtime.hardware import autocast_dtype, pick_device
    from dgunet.runtime.progress import progress_bar
    from dgunet.tasks.deraining import read_halves

BATCH, LEARNING_RATE = 64, 3e-3
HELD_OUT_CROPS = 2560
DRAWN, FROM_PAIRS = 1 / 6, 0.4  # parts of the samples


def draw_screen(rng: Generator, side: int = 2 * CROP) -> np.ndarray:
    """A drawn image (side, side, 3) uint8: text, lines and areas of a few colours, some with a gradient."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    paper = tuple(int(v) for v in (rng.integers(200, 256, 3) if rng.random() < 0.6 else rng.integers(0, 256, 3)))
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    colour = lambda: tuple(int(v) for v in rng.integers(0, 256, 3))  # noqa: E731
    for _ in range(rng.integers(0, 9)):
        left, top, width, height = (int(v) for v in rng.integers(0, side, 4))
        box, fill = (left, top, left + width // 2, top + height // 2), colour()
        shape = rng.integers(4)
        if shape == 0:
            draw.rectangle(box, fill, colour())
        elif shape == 1:
            draw.ellipse(box, fill)
        elif shape == 2:
            draw.line(box, fill, int(rng.integers(1, 6)))
        else:
            ramp = np.linspace(*rng.uniform(0, 255, (2, 3)), max(height // 2, 2))[:, None].astype(np.uint8)
            image.paste(Image.fromarray(np.repeat(ramp, max(width // 2, 1), axis=1)), box[:2])
    fonts = sorted(Path(get_data_path(), "fonts/ttf").glob("DejaVu*.ttf"))
    top = int(rng.integers(0, 20))
    while top < side and rng.random() < 0.95:
        size = int(rng.integers(9, 30))
        words = "".join(chr(int(c)) if rng.random() > 0.16 else " " for c in rng.integers(48, 123, rng.integers(5, 60)))
        font = ImageFont.truetype(fonts[rng.integers(len(fonts))], size)
        ink = colour() if rng.random() < 0.4 else tuple(255 * (sum(paper) < 384) for _ in range(3))
        draw.text((int(rng.integers(0, 40)), top), words, ink, font)
        top += int(size * rng.uniform(1.1, 2.5))
    return np.asarray(image)


def soften(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Blur that stays: of a lens or an enlargement, or out of focus, often in a part of the image."""
    if rng.random() < 0.5:
        return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    radius = rng.uniform(1.5, 8)
    y, x = np.mgrid[-10:11, -10:11]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    defocused = cv2.filter2D(image, -1, (disc / disc.sum()).astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.5:
        return defocused
    centre = rng.uniform(0, image.shape[0], 2)
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    mask = (np.hypot(y - centre[0], x - centre[1]) / image.shape[0] > rng.uniform(0.2, 0.7)).astype(np.float32)
    mask = cv2.GaussianBlur(mask, (0, 0), 6)[..., None]
    return mask * defocused + (1 - mask) * image


def degrade(x: np.ndarray, kind: str, rng: Generator) -> np.ndarray:
    """A clean image (H, W, 3) in [0, 1] with a degradation of this kind, or changed in a way that is none."""
    if kind in ("clean", "JPEG blocks", "rain") and rng.random() < 0.3:
        x = soften(x, rng)
    if kind == "gaussian noise":
        sigma = np.exp(rng.uniform(np.log(4), np.log(60)))
        return to_file(synthesis.found_noise(x, rng, sigma), rng, 0.1, 80)
    if kind == "camera noise":
        way = rng.integers(3)
        if way == 0:
            y = synthesis.bayer_noise(x, rng, shot=(0.001, 0.03), read=(1e-5, 6e-4))
        elif way == 1:
            y = synthesis.grain(x, rng, (4, 35))
        else:
            y = synthesis.sensor_noise(x, rng, shot=(0.002, 0.03), read=(2e-5, 6e-4))
        return to_file(y, rng, 0.5, 70)
    if kind == "JPEG blocks":
        if rng.random() < 0.2:
            x = to_file(x, rng, 1, 80)
        return jpeg(x, rng, 8, 72)
    if kind == "rain":
        if rng.random() < 0.5:
            y = synthesis.rain_streaks(x, rng)
        else:
            y = synthesis.added_rain(x, rng)
        return to_file(y, rng, 0.4, 75)
    if kind == "blur":
        return to_file(synthesis.motion_blur(x, rng, (4, 22)), rng, 0.4, 75)
    if rng.random() < 0.2:
        x = x + rng.normal(0, rng.uniform(0, 1.2) / 255, x.shape).astype(np.float32)
    return to_file(x, rng, 0.5, 88)


def jpeg(x: np.ndarray, rng: Generator, least: int, most: int) -> np.ndarray:
    subsample = rng.random() >= 0.3
    return synthesis.jpeg_compress(x, int(rng.integers(least, most + 1)), subsample)


def to_file(x: np.ndarray, rng: Generator, share: float, least: int) -> np.ndarray:
    """A share of the images as JPEGs that are good enough not to be one."""
    return jpeg(x, rng, least, 99) if rng.random() < share else np.clip(x, 0, 1)


class Crops(Dataset):
    """Crops (3, 160, 160) float32 in [0, 1], and the number of their degradation."""

    def __init__(self, photos: list[np.ndarray], pairs: dict[str, list[np.ndarray]], length: int, seed: int):
        self.photos, self.pairs, self.length, self.seed = photos, pairs, length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index: int):
        rng = np.random.default_rng([self.seed, index])
        # As many clean ones as of two degradations.
        kind = (*DEGRADATIONS, "clean")[rng.integers(len(DEGRADATIONS) + 1)]
        if kind in self.pairs and rng.random() < FROM_PAIRS:
            y = random_crop(self.pairs[kind][rng.integers(len(self.pairs[kind]))], rng) / np.float32(255)
        else:
            drawn = rng.random() < DRAWN
            image = draw_screen(rng) if drawn else self.photos[rng.integers(len(self.photos))]
            scale = 1 if drawn or rng.random() < 0.4 else rng.uniform(0.5, 1.5)
            side = max(CROP, min(int(CROP / min(scale, 1)), *image.shape[:2]))
            x = random_crop(image, rng, side) / np.float32(255)
            if scale != 1:
                size = (max(CROP, int(x.shape[0] * scale)),) * 2
                x = cv2.resize(x, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
            if not drawn and rng.random() < 0.4:  # exposure, and dark scenes
                x = np.clip(x, 0, 1) ** rng.uniform(0.6, 2.0) * rng.uniform(0.3, 1.0)
            if rng.random() < 0.15:
                x = np.repeat(x.mean(axis=2, keepdims=True), 3, axis=2)
                y = degrade(np.clip(x, 0, 1), kind, rng)
                y = np.repeat(y[..., 1:2], 3, axis=2) if rng.random() < 0.8 else y
            else:
                y = degrade(np.clip(x, 0, 1).astype(np.float32), kind, rng)
            top, left = (rng.integers(0, side - CROP + 1) for side in y.shape[:2])
            y = y[top : top + CROP, left : left + CROP]
        if rng.random() < 0.5:
            y = y[:, ::-1]
        y = to_uint8(np.asarray(y)).astype(np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy(np.ascontiguousarray(y)), DEGRADATIONS.index(kind)


def random_crop(image: np.ndarray, rng: Generator, side: int = CROP) -> np.ndarray:
    """A square of an image, which is scaled up if it is smaller."""
    if min(image.shape[:2]) < side:
        scale = side / min(image.shape[:2])
        image = cv2.resize(image, None, fx=scale + 1e-3, fy=scale + 1e-3, interpolation=cv2.INTER_CUBIC)
    top, left = (rng.integers(0, whole - side + 1) for whole in image.shape[:2])
    return image[top : top + side, left : left + side]


def split(items: list, tenth: bool) -> list:
    return [item for k, item in enumerate(items) if (k % 10 == 0) == tenth]


def read_all(args) -> dict[bool, tuple[list, dict]]:
    """Clean images and degraded ones by degradation, (H, W, 3) uint8: held out or not."""
    names = set().union(*(Path(file).read_text().split() for file in args.exclude))
    files = [path for folder in args.images for path in find_images(folder) if path.name not in names]
    clean = [as_colour(read_image(path, grey=True)) for path in files]
    embedded = [photo.load() for photo in sample_photos("train")]
    pairs: dict[str, list] = {}
    targets = []
    for text in args.pairs:
        kind, _, folder = text.rpartition("=")
        if kind not in DEGRADATIONS[1:]:
            raise UserError(f"--pairs takes DEGRADATION=FOLDER, one of {', '.join(DEGRADATIONS[1:])}; got {text!r}")
        source = Path(folder)
        found = paired(source) if has_pairs(source) else image_samples(source, read_halves)
        read = [sample.read() for sample in found.samples]
        pairs[kind] = pairs.get(kind, []) + [degraded for degraded, _ in read]
        targets += [target for _, target in read]
    return {
        held: (
            split(clean, held) + split(targets, held) + ([] if held else embedded),
            {kind: split(images, held) for kind, images in pairs.items()},
        )
        for held in (False, True)
    }


def confusion(logits: torch.Tensor, labels: torch.Tensor) -> str:
    """The table of shares, a row for each true degradation."""
    width = max(map(len, DEGRADATIONS))
    lines = [" ".join(["true \\ found".ljust(width), *(name.rjust(width) for name in DEGRADATIONS)])]
    for k, name in enumerate(DEGRADATIONS):
        found = torch.bincount(logits[labels == k].argmax(dim=1), minlength=len(DEGRADATIONS)).float()
        shares = found / found.sum().clamp_min(1)
        lines.append(" ".join([name.ljust(width), *(f"{share:.3f}".rjust(width) for share in shares.tolist())]))
    return "\n".join(lines)


def fit(crops: Crops, args, device: torch.device) -> Classifier:
    """A classifier after one pass through the crops: AdamW, one cycle of the learning rate, cross entropy."""
    began = time.monotonic()
    torch.manual_seed(args.seed)
    model = Classifier().to(device, memory_format=torch.channels_last)
    dtype = autocast_dtype("auto", device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.steps, pct_start=0.1)
    with progress_bar(total=args.steps, unit="step") as bar:
        for step, (y, label) in enumerate(DataLoader(crops, BATCH, num_workers=args.workers)):
            y = y.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(y)
            loss = F.cross_entropy(logits.float(), label.to(device), label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 50 == 0:
                bar.write(f"step {step}/{args.steps}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s")
    return model


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--images", nargs="+", required=True, metavar="FOLDER", help="clean photographs")
    add(
        "--pairs",
        nargs="*",
        default=[],
        metavar="DEGRADATION=FOLDER",
        help="degraded photographs and targets: pairs, or halves of images",
    )
    add("--exclude", nargs="*", default=[], metavar="FILE", help="lists of names that --images shall not have")
    add("--steps", type=at_least(1), default=1500, help=f"of {BATCH} crops (default: 1500)")
    add("--workers", type=at_least(0), default=1, help="processes that make crops (default: 1)")
    add("--device", default="auto")
    add("--seed", type=int, default=0)
    add("--out", required=True, type=Path, metavar="FOLDER", help="a new folder")
    args = parser.parse_args(argv)
    if not is_free(args.out):
        raise UserError(f"--out: {args.out} is not empty; choose another")
    began, device = time.monotonic(), pick_device(args.device)
    data = read_all(args)
    model = fit(Crops(*data[False], args.steps * BATCH, args.seed), args, device).cpu().eval()
    held = DataLoader(Crops(*data[True], HELD_OUT_CROPS, args.seed + 1), BATCH, num_workers=args.workers)
    with torch.inference_mode():
        outputs = [(model(y), label) for y, label in held]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    temperature = min((0.5 + 0.05 * k for k in range(60)), key=lambda t: F.cross_entropy(logits / t, labels).item())
    clean, pairs = data[False]
    with_pairs = [f"{len(images)} with {kind} and their targets" for kind, images in pairs.items()]
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    print(confusion(logits, labels))
    record = {
        "trained_on": ", ".join([f"{len(clean)} clean photographs", *with_pairs, "drawn screens"]),
        "steps": args.steps,
        "crops": f"{BATCH} a step, of {CROP}x{CROP} pixels",
        "held_out": f"{100 * accuracy:.1f} % of {len(labels)} crops are recognised",
        "temperature": round(temperature, 2),
        "hours": round((time.monotonic() - began) / 3600, 2),
        "hardware": device_name(str(device)),
        "date": str(date.today()),
        "licence": "MIT",
    }
    state = {name: value.half() for name, value in model.state_dict().items() if value.is_floating_point()}
    state["temperature"] = torch.tensor(temperature)
    save_weights(args.out / "automatic.safetensors", state, {"classifier": list(DEGRADATIONS)}, record)
    (args.out / "automatic.yaml").write_text(yaml.safe_dump(record, sort_keys=False, width=120))
    print(f"held out: {record['held_out']}; temperature {temperature:.2f}; wrote {args.out}/automatic.safetensors")


if __name__ == "__main__":
    run_cli(main)
