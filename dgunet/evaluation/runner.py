"""Scores of a network on a data set: `evaluate` restores its images and scores them, `ScoreSheet` keeps the scores.

An interrupted test resumes: the scores of a data set are written as they arrive, each with a fingerprint of its image's
files, beside a file with the weights and settings that they belong to.
"""

import contextlib
import hashlib
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from natsort import natsorted

from dgunet.data.images import write_image
from dgunet.data.transforms import to_uint8, unit_range
from dgunet.evaluation.metrics import Metric, find_protocol
from dgunet.evaluation.scoresheet import Result, ScoreSheet
from dgunet.evaluation.sets import Images, ImageSet, Sample, pairs_or_images
from dgunet.inference import automatic_tile, check_tiles, restore, temporarily_set
from dgunet.model.degradations import KINDS, apply_adjoint, for_measurements
from dgunet.model.local import check_windows
from dgunet.runtime.errors import UserError, is_out_of_memory
from dgunet.runtime.progress import progress_bar

BATCH = 8  # images of one size that are restored at once


def restore_images(
    model: torch.nn.Module, degraded: Images, tile: int | str | None = None, **options
) -> tuple[Images, Images]:
    """Restore a sample's images by `dgunet.restore`, which takes the options: unrounded, and the input."""
    options["tile"] = tile
    if isinstance(degraded, list):
        return restore(model, [unit_range(image) for image in degraded], **options), degraded
    batches = [degraded] if degraded.ndim < 4 else np.split(degraded, range(BATCH, len(degraded), BATCH))
    return np.concatenate([restore(model, unit_range(batch), **options) for batch in batches]), degraded


def restore_measurement(model: torch.nn.Module, y: torch.Tensor, **options) -> tuple[np.ndarray, np.ndarray]:
    """Restore a measurement y (1, ...) by `dgunet.restore`, which takes the options: the image, and x_0 as the input.

    Both are (H, W, 3) or (H, W), of complex images the magnitude.
    """
    restored = restore(model, y, **options)
    with torch.no_grad():
        initial = apply_adjoint(for_measurements(model.degradation, y), y)
    return tuple(_as_image(x[0].float()) for x in (restored, initial))


def _as_image(x: torch.Tensor) -> np.ndarray:
    """(C, H, W) as an image to score and to write: (H, W, 3), or (H, W) for one channel or the two of complex ones."""
    x = x.permute(1, 2, 0) if len(x) == 3 else x.norm(dim=0) if len(x) == 2 else x[0]
    return x.clamp(0, 1).cpu().numpy()


def evaluate(
    model: torch.nn.Module | Callable,
    data: str | Path | ImageSet,
    protocol: str | None,
    folder: str | Path | None = None,
    *,
    name: str = "",
    method: Callable = restore_images,
    settings: dict | None = None,
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    save_images: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options,
) -> Result:
    """Restore a data set and score it.

        result = evaluate(load_model("model_best.pth"), "Datasets/GoPro/test", "rgb_matlab", self_ensemble=True)
        print(result.psnr, result.ssim, [(row.name, row.psnr) for row in result.rows])

    Args:
        model: a network; or a function of a `Sample` and its degraded image(s), as read, that returns the restored
            one(s), uint8 or floats in [0, 1], and those to score as the input. For another method:
            ``evaluate(lambda sample, y: (my_method(y), y), ...)``.
        data: a folder with pairs in ``input/`` and ``target/``; a folder of images or an image, to be restored only;
            or any `ImageSet`.
        protocol: one of `metrics.PROTOCOLS`; None where nothing has a target.
        folder: where scores and images are written; None to write nothing. Called again with the same model, settings
            and files, the test resumes. (It starts again where it cannot know what is computed: for a function, or a
            degradation of the user's own. A method is known by its name.)
        name: of the data set, in the result and in messages; by default the folder's.
        method: how the network restores: a function of it, a sample's degraded image(s) and the options, that returns
            what a function given as ``model`` does.
        settings: what else the scores depend on; stored with them, as are the protocol's version and the tiles.
        metrics: further scores of the restored images by name, see `metrics.find_metrics`. Images that were scored
            without one are scored again.
        save_images: whether restored images are written; by default those that are scored in 8 bits, or not at all.
        say: called with a line of text now and then, e.g. ``print``.
        **options: of the method; by default those of `restore`: ``tile``, ``self_ensemble``, ``bf16``, ... But without
            a ``tile``, here or in ``local``, what is scored is restored whole (what would not fit on a CPU is refused;
            ``tile=None`` tries it), and only images without targets with "auto". The result says which tiles it chose.

    Returns:
        The means, each image's scores, and what could not be tested: one image's failure costs no other.

    Raises:
        UserError: no such data, an unsuitable network, or another process that writes to the folder.
        ValueError: unknown protocol.
    """
    if not isinstance(data, ImageSet):
        name, data = name or Path(data).name, pairs_or_images(Path(data))
    if metrics and not data.targets:
        raise UserError(f"{name}: --metrics are of images with targets, in input/ and target/; leave it out")
    folder = Path(folder) if folder is not None else None
    predict = _Predictor(model, method, options, data)
    settings = predict.settings | (settings or {})
    version = find_protocol(protocol).version if protocol else 1
    known = predict.fingerprint() | {"protocol_version": version}
    rounded = data.targets and find_protocol(protocol).rounded
    keep = folder is not None and save_images is not False
    save = keep and (save_images or data.save or rounded)
    stamps = {name: _file_fingerprint(sample.files) for sample in data.samples for name in sample.names}

    def done(sample: Sample) -> bool:
        written = not save or all((folder / f"{name}.png").exists() for name in sample.names)
        return all(map(sheet.done, sample.names)) and written and (not keep or data.kept(folder, sample))

    exact = temporarily_set([torch.backends.cudnn], "allow_tf32", False)  # for speed there is bfloat16
    with contextlib.closing(ScoreSheet(folder, protocol or "none", settings | known, stamps, metrics)) as sheet, exact:
        if sheet.continued:
            say(f"{name}: {sheet.continued} of {len(stamps)} images are done already")
        todo = [sample for sample in data.samples if not done(sample)]
        if sheet.found and predict.network:
            _remove_old_results(folder, todo)
        for sample in progress_bar(todo, desc=name, unit="image"):
            with _attempt(sample.title or str(sample.files[0]), sheet.failures, predict.advice):
                degraded, target = sample.read()
                restored, before, tile = predict(sample, degraded)
                if keep:
                    data.keep(folder, sample, restored)
                _score(sheet, sample, restored, target, before, tile, rounded, folder if save else None)
        result = sheet.finish(name)
    if keep and (line := data.finish(folder, complete=not result.missing)):
        say(line)
    if settings.get("tile") == "auto":
        settings["tile"] = f"auto({'+'.join(natsorted({row.tile for row in result.rows}))})"
    result.settings, result.version = settings, version
    result.seconds_per_image = predict.seconds / predict.count if predict.count else math.nan
    return result


class _Predictor:
    """Restores samples by a network or a function, and keeps the time; see `evaluate`.

    Where the network restores by `restore`, it chooses the tiles, so that they are stored with each score.
    """

    def __init__(self, model, method: Callable, options: dict, data: ImageSet):
        self.model, self.method, self.options, self.settings = model, method, options, options
        self.network = isinstance(model, torch.nn.Module)
        self.tiled = self.network and inspect.unwrap(method) is restore_images
        self.seconds, self.count = 0.0, 0  # of restoring, and images restored
        self.advice = "use smaller images"  # where memory is short
        if self.tiled:
            self.advice = "restore it in tiles, --tile 512, which changes its score"
            if options.get("local") is None:  # stored with the scores: a record may change
                options["local"] = getattr(model, "local", None) or False
            local = check_windows(options["local"]).get("tile")
            self.asked = "tile" in options or local is not None
            tile = options.get("tile", "auto" if local is not None or (data.save and not data.targets) else None)
            self.tile = local if local is not None and tile == "auto" else tile
            check_tiles(self.tile, options.get("tile_overlap"))
            self.settings = options | {"tile": "whole" if self.tile is None else self.tile}

    def fingerprint(self) -> dict:
        """What identifies the computation besides its settings: the weights, or where they do not, the time."""
        degradation = getattr(self.model, "degradation", None)
        known = degradation is None or type(degradation) in KINDS.values()
        known &= getattr(self.method, "__name__", "<lambda>") != "<lambda>"  # partials have no name either
        if not (self.network and known):
            return {"scored": time.time()}
        name = {} if self.tiled else {"method": f"{self.method.__module__}.{self.method.__qualname__}"}
        return {"weights": digest_of(self.model)} | name

    def __call__(self, sample: Sample, degraded: Images) -> tuple[Images, Images, str]:
        """The restored image(s), those to score as the input, and the tiles in words."""
        options, tile = self.options, ""
        if self.tiled:
            options = options | {"tile": self._choose_tile(degraded)}
            tile = "whole" if options["tile"] is None else str(options["tile"])
        start = time.monotonic()
        if self.network:
            restored, before = self.method(self.model, degraded, **options)
        else:
            restored, before = self.model(sample, degraded)
        self.seconds += time.monotonic() - start
        self.count += len(sample.names)
        return restored, before, tile

    def _choose_tile(self, degraded: Images) -> int | None:
        """The side of the tiles; None for whole images.

        Raises:
            UserError: whole images that nobody asked for do not fit into the memory of a CPU, which would end the
                process without a message. (A GPU's gives an error.)
        """
        device = next((value.device for value in self.model.parameters()), torch.device("cpu"))
        checked = self.tile is None and not self.asked and device.type == "cpu"
        if not (self.tile == "auto" or checked) or not hasattr(self.model, "arguments"):  # which `restore` refuses
            return self.tile
        stack = isinstance(degraded, np.ndarray) and degraded.ndim == 4
        images = degraded if stack or isinstance(degraded, list) else [degraded]
        height, width = max((image.shape[:2] for image in images), key=math.prod)
        shape = (min(len(images), BATCH) if stack else 1, self.model.channels, height, width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tiles are stored with the scores
            tile = automatic_tile(self.model, shape, device)
        if checked and tile is not None:
            raise UserError(
                "it may need more memory than is free to be restored whole, as scores are by default; --tile 512 "
                "restores it in tiles, which changes its score, --tile whole tries nevertheless"
            )
        return tile


def _score(
    sheet: "ScoreSheet", sample: Sample, restored: Images, target: Images | None, before: Images, tile: str,
    rounded: bool, folder: Path | None,
):  # fmt: skip
    """Score a sample's images, as 8-bit ones where ``rounded``, and write them into the folder, if any."""
    before = None if before is target else before  # nothing was degraded that could be scored as the input
    given = (restored, target, before)
    if sample.parts is None:
        given = ([images] for images in given)
    else:
        given = ([None] * len(sample.names) if images is None else images for images in given)
    for name, x, x_true, y in zip(sample.names, *given, strict=True):
        if rounded:
            x, y = to_uint8(x), None if y is None else to_uint8(y)
        if folder is not None:
            write_image(folder / f"{name}.png", to_uint8(x))
        if x_true is None:
            sheet.mark_done(name, tile)
        else:
            sheet.add(name, x, x_true, y, tile)


def _remove_old_results(folder: Path, samples: list[Sample]):
    """Remove the images that another network, or other settings, made of samples: they would be taken for new ones."""
    read = {file.absolute() for sample in samples for file in sample.files}
    for path in (folder.absolute() / f"{name}.png" for sample in samples for name in sample.names):
        if path not in read:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _attempt(title: str, failures: list[str], advice: str) -> Iterator[None]:
    """Around the work on a sample: what it cannot do is added to the failures, and the test goes on.

    ``advice`` is what to do where memory is short.
    """
    try:
        yield
    except UserError as error:
        failures.append(str(error) if title in str(error) else f"{title}: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # of every image
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise UserError(f"--compile does not work here ({reason}); test without it") from error
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        failures.append(f"{title}: out of memory; {advice}")


def digest_of(model: torch.nn.Module) -> str:
    """A fingerprint of a network's arguments and weights."""
    digest = hashlib.sha256(json.dumps(getattr(model, "arguments", None), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_fingerprint(paths: tuple[Path, ...]) -> str:
    """A fingerprint of files as they are now."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
