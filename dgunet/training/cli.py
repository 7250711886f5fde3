"""The tasks' ``train.py``: what each trains on, its command line, and a run of the `engine` in every process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dgunet.checkpoints.load import load_weights, read_checkpoint, weights_of
from dgunet.checkpoints.registry import locate
from dgunet.data.datasets import (  # fmt: skip
    CenterCropDataset,
    MixupPatches,
    PairedPatches,
    SaturationPatches,
    SyntheticPatches,
    TrainingSet,
    ValidationSet,
)
from dgunet.data.luma import LumaPatches
from dgunet.data.pairs import Pair, exclude, find_images, find_pairs, hold_out, images_by_name
from dgunet.data.synthesis import find_degradation, motion_kernel
from dgunet.model.degradations import MotionBlur, degradation_from_config, keeps_its_values
from dgunet.model.network import DGUNet
from dgunet.model.sampling import BlockSampling, sampling_operator
from dgunet.model.variants import VARIANTS, create_model, find_variant
from dgunet.runtime.distributed import launch
from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object, is_object_name
from dgunet.training.config import parse_args
from dgunet.training.loggers import describe
from dgunet.training.resume import checkpoint_to_resume
from dgunet.training.trainer import Trainer


def crop_options(cfg) -> dict:
    """What all training sets take from a config, see `datasets.RandomPatches`."""
    return dict(patch=cfg.TRAINING.TRAIN_PS, repeat=cfg.TRAINING.REPEAT, flip=cfg.AUGMENT.FLIP, seed=cfg.SEED)


_KNOWN_DEGRADATION = ("MODEL.DEGRADATION", "MODEL.KERNEL", "MODEL.NOISE", "MODEL.GREY", "MODEL.COMPLEX")


def _channels(cfg) -> dict:
    """Which channels of images a known degradation measures."""
    return dict(luma=cfg.MODEL.GREY, complex=cfg.MODEL.COMPLEX)


def _centers(cfg, items) -> CenterCropDataset:
    return CenterCropDataset(items, cfg.TRAINING.VAL_PS, **_channels(cfg))


@dataclass(frozen=True)
class Task:
    """What a task trains on.

    Args:
        name: that of its networks in `variants.VARIANTS`, and the folder of its configs.
        uses: the config keys, or how they begin, that not every task uses and this one does.
        make_train_set: from the config and what ``find`` found to a data set indexed with (epoch, index).
        make_val_set: likewise to one for validation.
        find: lists the pairs, or the images, of a folder or of a packed file.
        make_degradation: from the config and the training set to the network's known degradation, or None where it is
            learned. A function that other processes can import.
    """

    name: str
    uses: tuple[str, ...]
    make_train_set: Callable[..., TrainingSet]
    make_val_set: Callable[..., ValidationSet] = _centers
    find: Callable[[str], list] = find_pairs
    make_degradation: Callable = degradation_from_config


def block_sampling(cfg, train_set: LumaPatches) -> BlockSampling:
    """The measurement of compressive sensing; its matrix may start from components of the training images' blocks."""
    start = cfg.MODEL.MATRIX_START
    if start == "pca" and not len(train_set):
        start = "orthonormal"  # a dry run before there are images
    return sampling_operator(cfg.MODEL.RATIO, cfg.MODEL.MATRIX, start, lambda: train_set.blocks(), cfg.MODEL.BLOCK)


TASKS = {
    task.name: task
    for task in (
        Task(
            "deblurring",
            ("SYNTHESIS", "AUGMENT.SATURATION", *_KNOWN_DEGRADATION),
            lambda cfg, pairs: SaturationPatches(
                pairs, saturation=cfg.AUGMENT.SATURATION, **_channels(cfg), **crop_options(cfg)
            ),
        ),
        Task("deraining", ("SYNTHESIS",), lambda cfg, pairs: PairedPatches(pairs, **crop_options(cfg))),
        Task(
            "denoising",
            ("SYNTHESIS", "AUGMENT.MIXUP"),
            lambda cfg, pairs: MixupPatches(
                pairs, mixup=cfg.AUGMENT.MIXUP, mixup_from=cfg.AUGMENT.MIXUP_FROM_EPOCH, **crop_options(cfg)
            ),
        ),
        Task(
            "compressive_sensing",
            ("MODEL.RATIO", "MODEL.BLOCK", "MODEL.MATRIX"),
            lambda cfg, paths: LumaPatches(paths, block=cfg.MODEL.BLOCK, **crop_options(cfg)),
            # As the original does, in blocks as large as those trained on, each restored by itself.
            lambda cfg, paths: CenterCropDataset(
                paths, cfg.TRAINING.VAL_PS, luma=True, multiple=cfg.MODEL.BLOCK, area=256
            ),
            find_images,
            block_sampling,
        ),
    )
}


def train_command(task: Task, description: str):
    """A task's ``train.py``: read the command line (``description`` is for ``--help``), open the data, train."""
    cfg, args = parse_args(task.name, description, task.uses)
    _check_keys(cfg, task)
    missing: list[str] = []
    train_set, val_set = _open_data(cfg, task, missing if args.dry_run else None)
    launch(train, cfg, train_set, val_set, task.make_degradation, args.dry_run, missing)


def _check_keys(cfg, task: Task):
    """Refuse keys that do not go together."""
    if find_variant(cfg.MODEL.NAME).task != task.name:
        names = [name for name, variant in VARIANTS.items() if variant.task == task.name]
        raise UserError(f"{cfg.MODEL.NAME} is not a network for this task; MODEL.NAME is {' or '.join(names)}")
    if cfg.MODEL.DEGRADATION and cfg.SYNTHESIS.NAME:
        raise UserError("SYNTHESIS.NAME and MODEL.DEGRADATION both degrade the images; set one of the two")
    if (cfg.MODEL.GREY or cfg.MODEL.COMPLEX or cfg.MODEL.NOISE) and not cfg.MODEL.DEGRADATION:
        raise UserError(
            "MODEL.GREY and MODEL.NOISE are of a known blur (GREY and COMPLEX of an operator of your own); set "
            "MODEL.DEGRADATION, or leave them out"
        )
    if cfg.SYNTHESIS.NAME and (cfg.AUGMENT.MIXUP or cfg.AUGMENT.SATURATION):
        raise UserError("AUGMENT.MIXUP and AUGMENT.SATURATION are of pairs; set them to 0 with SYNTHESIS.NAME")
    if cfg.SYNTHESIS.OPTIONS and not cfg.SYNTHESIS.NAME:
        raise UserError("SYNTHESIS.OPTIONS are of SYNTHESIS.NAME; set it, or leave them out")


def _open_data(cfg, task: Task, missing: list[str] | None) -> tuple[TrainingSet, ValidationSet]:
    """The training and the validation set; where ``missing`` is given, what is not there is added to it instead."""

    def look(find: Callable, folder: str) -> list:
        try:
            return find(folder)
        except UserError as error:
            if missing is None:
                raise
            missing.append(str(error))
            return []

    training = cfg.TRAINING
    find = find_clean_images if cfg.MODEL.DEGRADATION else task.find
    degrade = find_degradation(cfg.SYNTHESIS.NAME, cfg.SYNTHESIS.OPTIONS) if cfg.SYNTHESIS.NAME else None
    items, val_items = look(find_images if degrade else find, training.TRAIN_DIR), []
    if training.EXCLUDE and items:
        items = exclude(items, training.EXCLUDE)
    if training.VAL_DIR:
        val_items = look(find, training.VAL_DIR)
    elif items:
        items, val_items = hold_out(items, training.VAL_HOLD_BACK, training.TRAIN_DIR)
    if not degrade:
        return task.make_train_set(cfg, items), task.make_val_set(cfg, val_items)
    train_set = SyntheticPatches(items, degrade, **crop_options(cfg))
    if training.VAL_DIR:
        return train_set, task.make_val_set(cfg, val_items)
    return train_set, CenterCropDataset(val_items, training.VAL_PS, degrade=degrade, seed=cfg.SEED)


def find_clean_images(folder: str) -> list[Pair]:
    """The images of a folder as pairs of themselves: the network of a known degradation is given them measured."""
    return [Pair(name, path, path) for name, path in images_by_name(folder).items()]


def train(
    cfg, train_set: TrainingSet, val_set: ValidationSet, make_degradation: Callable, dry_run: bool = False,
    missing: list[str] = (),
):  # fmt: skip
    """Build the config's model and train it; what is launched in every process.

    A dry run only describes what would be done, and the data that are ``missing`` for it.
    """
    missing = list(missing) if dry_run else None
    trainer = Trainer(cfg, build_model(cfg, train_set, make_degradation, missing), train_set, val_set)
    if dry_run:
        trainer.resume()
        describe(trainer, config=True, missing=missing)
        return
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory; try OPTIM.ACCUMULATE 2 (4, 8), SPEED.CHECKPOINTING True, or a smaller OPTIM.BATCH_SIZE"
        ) from error


def build_model(
    cfg, train_set, make_degradation: Callable = degradation_from_config, missing: list[str] | None = None
) -> DGUNet:
    """The config's network, with the weights to start from.

    Args:
        cfg: see `config.py`.
        train_set, make_degradation: see `Task`.
        missing: for a dry run, what is not there yet; weights that are not are added to it.

    Raises:
        UserError: no such network, or weights that do not fit it.
    """
    torch.manual_seed(cfg.SEED)
    degradation = make_degradation(cfg, train_set)
    if isinstance(degradation, MotionBlur):
        degradation.sample_kernel = motion_kernel
    channels = 2 if cfg.MODEL.COMPLEX else 1 if cfg.MODEL.GREY else None
    arguments = {**cfg.MODEL.OVERRIDES, **({"channels": channels} if channels else {})}
    own = {"proximal": cfg.MODEL.PROXIMAL, "learned_degradation": cfg.MODEL.LEARNED_DEGRADATION}
    arguments |= {name: import_object(text, f"MODEL.{name.upper()}") for name, text in own.items() if text}
    model = create_model(cfg.MODEL.NAME, degradation, checkpointing=cfg.SPEED.CHECKPOINTING, **arguments)
    model.degradation_name = cfg.MODEL.DEGRADATION if is_object_name(cfg.MODEL.DEGRADATION) else None
    path = cfg.MODEL.WEIGHTS
    if not path or checkpoint_to_resume(cfg):
        return model
    if missing is not None and not locate(path).exists():
        missing.append(f"no checkpoint at {path}")
        return model
    weights = weights_of(read_checkpoint(path), path)
    load_weights(model, weights, path, degradation is not None and keeps_its_values(degradation, weights))
    return model
