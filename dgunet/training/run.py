"""A training in Python, in one call: `train`."""

import os
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from dgunet.data.datasets import TrainingSet, ValidationSet
from dgunet.data.tensors import SeededPairs, ValidationPairs
from dgunet.model.network import DGUNet
from dgunet.runtime.distributed import launch
from dgunet.runtime.errors import UserError
from dgunet.training.config import load_config
from dgunet.training.loggers import Logger
from dgunet.training.resume import run_dir
from dgunet.training.trainer import Trainer


class Trained(NamedTuple):
    """What `train` returns."""

    best: Path | None  # the weights of the best validation, for `load_model`; None where there was no validation
    psnr: float  # of it, dB
    epoch: int  # of it
    history: list[dict]  # a row for each validation, and for each epoch without one: epoch, step, lr, loss, psnr, ...
    folder: Path  # of the run: the weights, history.csv, curves.png, config.yaml, train.log


def train(
    model: DGUNet,
    train_set: Dataset | TrainingSet,
    val_set: Dataset | ValidationSet,
    folder: str | Path = "checkpoints/DGUNet",
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    resume: bool | str = False,
    config: str | Path | None = None,
    options: dict | None = None,
    loggers: list[str | Logger] | None = None,
) -> Trained:
    """Train a network on pairs of images, and save everything in a folder.

        trained = train(DGUNet(channels=1), pairs, other_pairs, "runs/first", epochs=20, batch_size=8, lr=2e-4)
        model = load_model(trained.best)

    It is the training of ``dgunet train``, of the same config. Interrupted, it saves; called again with ``resume=True``
    it continues and ends with the same weights as if nothing had happened. In a script that torchrun starts it trains
    on several GPUs.

    Args:
        model: what is trained, from the weights that it has.
        train_set: a data set of (input, target), each a tensor (C, H, W), uint8 or floats in [0, 1], of one size, which
            is a multiple of 8; or one of ours, such as `PairedPatches`, see `datasets.TrainingSet`. With a known
            degradation the network measures the input, which is then the clean image.
        val_set: the same for validation; sizes may differ, and are cut to multiples of 8.
        folder: of the run.
        epochs, batch_size, lr: OPTIM.NUM_EPOCHS, BATCH_SIZE and LR_INITIAL; None: as ``config`` and ``options`` say.
        resume: True: continue the run in the folder; ``"auto"``: where there is none, begin it.
        config: a YAML file; default: the defaults of `training.config`, the paper's.
        options: further config keys, e.g. ``{"OPTIM.EMA_DECAY": 0.999, "LOSS.EDGE": 0.05, "DEVICE": "cpu"}``.
        loggers: instead of TRAINING.LOGGERS, names as there or a `loggers.Logger` each.

    Raises:
        UserError: data of another form, another run in the folder, an impossible setting.
        KeyboardInterrupt: by Ctrl-C, after the state is saved.
    """
    folder = Path(os.path.abspath(folder))
    given = {"OPTIM.NUM_EPOCHS": epochs, "OPTIM.BATCH_SIZE": batch_size, "OPTIM.LR_INITIAL": lr}
    keys = (options or {}) | {key: value for key, value in given.items() if value is not None}
    keys |= {"TRAINING.SAVE_DIR": str(folder.parent), "MODEL.SESSION": folder.name, "TRAINING.RESUME": resume}
    keys.setdefault("MODEL.NAME", model.name or "DGUNet")
    cfg = load_config(config, keys)
    if not isinstance(train_set, TrainingSet):
        train_set = SeededPairs(train_set, cfg.SEED)
    if not isinstance(val_set, ValidationSet):
        val_set = ValidationPairs(val_set, cfg.SEED)
    channels, *sides = train_set[1, 0][0].shape
    if channels != model.channels:
        raise UserError(f"the network has {model.channels} channels, but the training images have {channels}")
    cfg.defrost()
    cfg.TRAINING.TRAIN_PS = round((sides[0] * sides[1]) ** 0.5)  # for messages and the size of validation batches
    cfg.freeze()
    trainers = []

    def fit(cfg):
        trainers.append(Trainer(cfg, model, train_set, val_set, loggers))
        trainers[0].fit()

    try:
        launch(fit, cfg, spawn=False)
    except SystemExit as stop:
        if stop.code != 130:
            raise
        raise KeyboardInterrupt(f"stopped; resume=True continues the run in {folder}") from None
    best, history = trainers[0].best, trainers[0].log.rows
    path = run_dir(cfg) / "model_best.pth" if best["epoch"] else None
    return Trained(path, best["psnr"], best["epoch"], history, folder)
