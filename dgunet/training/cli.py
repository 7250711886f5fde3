"""Training from the command line: how a task trains, its options, and a run of the `Trainer` in every process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dgunet.checkpoints.load import load_weights, read_checkpoint, weights_of
from dgunet.checkpoints.registry import locate
from dgunet.data.datasets import CenterCropDataset, PairedPatches, SyntheticPatches, TrainingSet, ValidationSet
from dgunet.data.pairs import Pair, exclude, find_images, find_pairs, hold_out, images_by_name
from dgunet.data.synthesis import find_degradation, motion_kernel
from dgunet.model.degradations import Blur, Degradation, MotionBlur, keeps_config_values, make_operator
from dgunet.model.network import DGUNet
from dgunet.model.variants import VARIANTS, create_model, find_variant
from dgunet.runtime.distributed import launch
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import read_array
from dgunet.runtime.imports import import_object, is_object_name
from dgunet.training.config import PAIRS, parse_args
from dgunet.training.loggers import describe
from dgunet.training.resume import checkpoint_to_resume
from dgunet.training.trainer import Trainer


def crop_options(cfg) -> dict:
    """What all training sets take from a config, see `datasets.RandomPatches`."""
    return dict(patch=cfg.TRAINING.TRAIN_PS, repeat=cfg.TRAINING.REPEAT, flip=cfg.AUGMENT.FLIP, seed=cfg.SEED)


KNOWN_DEGRADATION = ("MODEL.DEGRADATION", "MODEL.KERNEL", "MODEL.NOISE", "MODEL.GREY", "MODEL.COMPLEX")


def measured_channels(cfg) -> dict:
    """Which channels of images a known degradation measures."""
    return dict(luma=cfg.MODEL.GREY, complex=cfg.MODEL.COMPLEX)


def _centers(cfg, items) -> CenterCropDataset:
    return CenterCropDataset(items, cfg.TRAINING.VAL_PS, **measured_channels(cfg))


def paired_patches(cfg, pairs: list[Pair]) -> PairedPatches:
    """Random crops of pairs."""
    return PairedPatches(pairs, **crop_options(cfg))


def degradation_from_config(cfg, train_set=None) -> Degradation | None:
    """The known degradation that a config's MODEL.DEGRADATION names; None where it is learned."""
    name, kernel = cfg.MODEL.DEGRADATION, cfg.MODEL.KERNEL
    if is_object_name(name):
        if kernel or cfg.MODEL.NOISE:
            raise UserError(
                f"MODEL.KERNEL and MODEL.NOISE are of MODEL.DEGRADATION blur; leave them out with {name}, which may "
                "have a method measure(x) that adds noise"
            )
        return make_operator(name, "MODEL.DEGRADATION", cfg)
    if name not in ("", "blur"):
        raise UserError(
            f"MODEL.DEGRADATION must be blur, an operator of your own as module:name, or empty for a learned one, "
            f"got {name!r}"
        )
    if bool(name) != bool(kernel):
        raise UserError("a known blur needs both MODEL.DEGRADATION blur and MODEL.KERNEL, a .npy file or motion")
    if not name:
        return None
    noise = cfg.MODEL.NOISE / 255
    if kernel == "motion":
        return MotionBlur(min(cfg.MODEL.KERNEL_EXTENT), max(cfg.MODEL.KERNEL_EXTENT), noise)
    try:
        return Blur(torch.from_numpy(read_array(Path(kernel))), noise)
    except ValueError as error:
        raise UserError(f"MODEL.KERNEL {kernel}: {error}") from error


@dataclass(frozen=True)
class Training:
    """How a task trains: by default on random crops of pairs.

    Args:
        uses: the config keys, or how they begin, that not every task uses and this one does.
        syntheses: the values of SYNTHESIS.NAME that are meant for this task, where it uses that.
        make_train_set: from the config and what ``find`` found to a data set indexed with (epoch, index).
        make_val_set: likewise to one for validation.
        find: lists the pairs, or the images, of a folder or of a packed file.
        make_degradation: from the config and the training set to the network's known degradation, or None where it is
            learned. A function that other processes can import.
    """

    uses: tuple[str, ...] = ()
    syntheses: tuple[str, ...] = ()
    make_train_set: Callable[..., TrainingSet] = paired_patches
    make_val_set: Callable[..., ValidationSet] = _centers
    find: Callable[[str], list] = find_pairs
    make_degradation: Callable = degradation_from_config

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the config keys that not every task uses, those that this one does, or how they begin."""
        return self.uses + (("SYNTHESIS",) if self.syntheses else ()) + (PAIRS if self.find is find_pairs else ())


def train_command(
    task: str, how: Training, configs: Path, description: str, argv: list[str] | None = None, prog: str | None = None
):
    """A task's training from the command line: read that, open the data, train.

    Args:
        task: that of the networks in `variants.VARIANTS`.
        how: it trains.
        configs: the folder of its configs, of which ``dgunet.yaml`` is the default.
        description: for ``--help``.
        argv: the words of the command line; default: the process's own.
        prog: the command, for ``--help``.
    """
    if how.syntheses:
        description += f"\nTo degrade clean images while training: SYNTHESIS.NAME {', '.join(how.syntheses)}."
    cfg, args = parse_args(task, description, how.keys, configs, argv, prog)
    _check_keys(cfg, task)
    missing: list[str] = []
    train_set, val_set = _open_data(cfg, how, configs, missing if args.dry_run else None)
    launch(run, cfg, train_set, val_set, how.make_degradation, args.dry_run, missing)


def _check_keys(cfg, task: str):
    """Refuse keys that do not go together."""
    if find_variant(cfg.MODEL.NAME).task != task:
        names = [name for name, variant in VARIANTS.items() if variant.task == task]
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
    training = cfg.TRAINING
    for input, target in (("INPUT_DIR", "TARGET_DIR"), ("VAL_INPUT_DIR", "VAL_TARGET_DIR")):
        if bool(training[input]) != bool(training[target]):
            raise UserError(f"TRAINING.{input} and TRAINING.{target} belong together; set both, or neither")
        if training[input] and cfg.MODEL.DEGRADATION:
            raise UserError(f"TRAINING.{input} is of pairs, but a known degradation is trained on clean images")
    if training.INPUT_DIR and cfg.SYNTHESIS.NAME:
        raise UserError("TRAINING.INPUT_DIR is of pairs, but SYNTHESIS.NAME degrades clean images; leave out one")
    if training.PAIRS and not all(training.PAIRS.get(side) for side in ("input", "target")):
        raise UserError("TRAINING.PAIRS needs both patterns, {input: '*_input', target: '*_gt'}, say")
    if cfg.SYNTHESIS.OPTIONS and not cfg.SYNTHESIS.NAME:
        raise UserError("SYNTHESIS.OPTIONS are of SYNTHESIS.NAME; set it, or leave them out")


def _open_data(cfg, how: Training, configs: Path, missing: list[str] | None) -> tuple[TrainingSet, ValidationSet]:
    """The training and the validation set; where ``missing`` is given, what is not there is added to it instead."""

    def look(find: Callable, folder: str, inputs: str = "", targets: str = "") -> list:
        try:
            if find is not find_pairs:
                return find(folder)
            names = (training.PAIRS.input, training.PAIRS.target) if training.PAIRS else None
            return find_pairs(inputs or folder, target=targets or None, names=names)
        except UserError as error:
            if missing is None:
                raise
            missing.append(str(error))
            return []

    training = cfg.TRAINING
    find = find_clean_images if cfg.MODEL.DEGRADATION else how.find
    degrade = find_degradation(cfg.SYNTHESIS.NAME, cfg.SYNTHESIS.OPTIONS) if cfg.SYNTHESIS.NAME else None
    where = training.TRAIN_DIR, training.INPUT_DIR, training.TARGET_DIR
    where_val = training.VAL_DIR, training.VAL_INPUT_DIR, training.VAL_TARGET_DIR
    items, val_items = look(find_images if degrade else find, *where), []
    if training.EXCLUDE and items:
        listing = Path(training.EXCLUDE)
        beside = configs / listing.name  # a recipe's own, where there is no clone around it
        items = exclude(items, beside if beside.is_file() and not listing.exists() else listing)
    if any(where_val):
        val_items = look(find, *where_val)
    elif items:
        items, val_items = hold_out(items, training.VAL_HOLD_BACK, training.INPUT_DIR or training.TRAIN_DIR)
    if not degrade:
        return how.make_train_set(cfg, items), how.make_val_set(cfg, val_items)
    train_set = SyntheticPatches(items, degrade, **crop_options(cfg))
    if any(where_val):
        return train_set, how.make_val_set(cfg, val_items)
    return train_set, CenterCropDataset(val_items, training.VAL_PS, degrade=degrade, seed=cfg.SEED)


def find_clean_images(folder: str) -> list[Pair]:
    """The images of a folder as pairs of themselves: the network of a known degradation is given them measured."""
    return [Pair(name, path, path) for name, path in images_by_name(folder).items()]


def run(
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
        train_set, make_degradation: see `Training`.
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
    load_weights(model, weights, path, degradation is not None and keeps_config_values(degradation, weights))
    return model
