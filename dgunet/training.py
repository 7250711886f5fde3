"""The command line of the tasks' train.py: the data, the network, and a run of the `engine` in every process."""

from collections.abc import Callable

import torch

from dgunet.checkpoint import load_weights, read_checkpoint, weights_of
from dgunet.config import parse_args
from dgunet.data import Pair, exclude, find_images, find_pairs, hold_out, images_by_name
from dgunet.degradations import MotionBlur, degradation_from_config
from dgunet.distributed import launch
from dgunet.engine import Trainer, checkpoint_to_resume
from dgunet.errors import UserError
from dgunet.hardware import keep_freed_memory
from dgunet.model import VARIANTS, DGUNet, create_model, find_variant
from dgunet.patches import CenterCropDataset, SyntheticPatches, TrainingSet, ValidationSet
from dgunet.pretrained import locate
from dgunet.runlog import describe
from dgunet.synthesis import find_degradation, motion_kernel


def train_command(
    task: str,
    description: str,
    uses: tuple[str, ...],
    make_train_set: Callable,
    make_val_set: Callable = lambda cfg, pairs: CenterCropDataset(pairs, cfg.TRAINING.VAL_PS, luma=cfg.MODEL.GREY),
    find: Callable = find_pairs,
    make_degradation: Callable = degradation_from_config,
):
    """A task's ``train.py``: read the command line, open the data, train in every process.

    Args:
        task: that of its networks in `model.VARIANTS`, and the folder of its configs.
        description: for ``--help``.
        uses: of the config's keys that not every task uses, those that this one does, see `config.parse_args`.
        make_train_set: from the config and what ``find`` found to a data set indexed with (epoch, index).
        make_val_set: likewise to one for validation.
        find: lists the pairs, or the images, of a folder or of a packed file.
        make_degradation: from the config and the training set to the network's known degradation, or None where it is
            learned. A function that other processes can import.
    """
    cfg, args = parse_args(task, description, uses)
    if find_variant(cfg.MODEL.NAME).task != task:
        names = [name for name, variant in VARIANTS.items() if variant.task == task]
        raise UserError(f"{cfg.MODEL.NAME} is not a network for this task; MODEL.NAME is {' or '.join(names)}")
    training, missing = cfg.TRAINING, []

    def look(find: Callable, folder: str) -> list:
        try:
            return find(folder)
        except UserError as error:
            if not args.dry_run:
                raise
            missing.append(str(error))
            return []

    if cfg.MODEL.DEGRADATION:
        if cfg.SYNTHESIS.NAME:
            raise UserError("SYNTHESIS.NAME and MODEL.DEGRADATION both degrade the images; set one of the two")
        find = find_clean_images
    elif cfg.MODEL.GREY or cfg.MODEL.NOISE:
        raise UserError("MODEL.GREY and MODEL.NOISE are of a known blur; set MODEL.DEGRADATION blur, or leave them out")
    if cfg.SYNTHESIS.NAME and (cfg.AUGMENT.MIXUP or cfg.AUGMENT.SATURATION):
        raise UserError("AUGMENT.MIXUP and AUGMENT.SATURATION are of pairs; set them to 0 with SYNTHESIS.NAME")
    if cfg.SYNTHESIS.OPTIONS and not cfg.SYNTHESIS.NAME:
        raise UserError("SYNTHESIS.OPTIONS are of SYNTHESIS.NAME; set it, or leave them out")
    degrade = find_degradation(cfg.SYNTHESIS.NAME, cfg.SYNTHESIS.OPTIONS) if cfg.SYNTHESIS.NAME else None
    items = look(find_images if degrade else find, training.TRAIN_DIR)
    if training.EXCLUDE and items:
        items = exclude(items, training.EXCLUDE)
    if training.VAL_DIR:
        val_items = look(find, training.VAL_DIR)
    elif items:
        items, val_items = hold_out(items, training.VAL_HOLD_BACK, training.TRAIN_DIR)
    else:
        val_items = []
    if degrade:
        train_set = SyntheticPatches(items, degrade, **crop_options(cfg))
        if not training.VAL_DIR:
            make_val_set = lambda cfg, items: CenterCropDataset(items, training.VAL_PS, degrade=degrade, seed=cfg.SEED)  # noqa: E731
    else:
        train_set = make_train_set(cfg, items)
    launch(train, cfg, train_set, make_val_set(cfg, val_items), make_degradation, args.dry_run, missing)


def crop_options(cfg) -> dict:
    """What all training sets take from a config, see `patches.RandomPatches`."""
    return dict(patch=cfg.TRAINING.TRAIN_PS, repeat=cfg.TRAINING.REPEAT, flip=cfg.AUGMENT.FLIP, seed=cfg.SEED)


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
    if trainer.device.type == "cpu":
        keep_freed_memory()
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
        train_set, make_degradation: see `train_command`.
        missing: for a dry run, what is not there yet; weights that are not are added to it.

    Raises:
        UserError: no such network, or weights that do not fit it.
    """
    torch.manual_seed(cfg.SEED)
    degradation = make_degradation(cfg, train_set)
    if isinstance(degradation, MotionBlur):
        degradation.sample_kernel = motion_kernel
    arguments = {**cfg.MODEL.OVERRIDES, **({"channels": 1} if cfg.MODEL.GREY else {})}
    model = create_model(cfg.MODEL.NAME, degradation, checkpointing=cfg.SPEED.CHECKPOINTING, **arguments)
    path = cfg.MODEL.WEIGHTS
    if not path or checkpoint_to_resume(cfg):
        return model
    if missing is not None and not locate(path).exists():
        missing.append(f"no checkpoint at {path}")
        return model
    weights = weights_of(read_checkpoint(path), path)
    if degradation is not None and degradation.keep_on_load(weights):
        weights |= {name: own for name, own in model.state_dict().items() if name.startswith("degradation.")}
    load_weights(model, weights, path)
    return model
