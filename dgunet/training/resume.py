"""Resuming a run: the file to resume it from, whether that holds a state of this run, and what has changed since."""

import contextlib
import math
import operator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dgunet.checkpoints.load import read_checkpoint
from dgunet.data.pairs import changed_items
from dgunet.runtime import distributed
from dgunet.runtime.errors import UserError, shorten_list
from dgunet.training.config import changed_keys

if TYPE_CHECKING:
    from dgunet.training.trainer import Trainer

# The files of a run's folder that it can be resumed from, the one to prefer first.
STATES = ("model_latest.pth", "model_best.pth")

# Keys that may differ between a run and its continuation without notice.
_FREE_TO_CHANGE = (
    "GPU", "DEVICE", "PROCESSES", "TRAINING.RESUME", "TRAINING.WORKERS", "TRAINING.SAVE_MINUTES", "TRAINING.LOGGERS",
)  # fmt: skip

# Keys, or how they begin, that a validation's score depends on.
_VALIDATION = ("SEED", "TRAINING.VAL_PS", "SYNTHESIS", "MODEL.KERNEL", "MODEL.NOISE", "MODEL.GREY", "MODEL.RATIO")


def changed_settings(cfg, then) -> list[str]:
    """The keys in which a run's config differs from an earlier one, except those that are free to change."""
    return [key for key in changed_keys(cfg, then) if key not in _FREE_TO_CHANGE]


def run_dir(cfg) -> Path:
    return Path(cfg.TRAINING.SAVE_DIR) / cfg.MODEL.SESSION


def checkpoint_to_resume(cfg) -> Path | None:
    """The file that a run is to be resumed from, if there is one."""
    states = [run_dir(cfg) / name for name in STATES]
    return next((path for path in states if cfg.TRAINING.RESUME and path.exists()), None)


@contextlib.contextmanager
def lock_run_dir(folder: Path, main: bool):
    """Make a run's folder and lock it, in the main process; the others wait for that."""
    with contextlib.ExitStack() as lock:
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            advice = "wait for its end, or give this one its own name with MODEL.SESSION NAME"
            lock.enter_context(distributed.lock_dir(folder, "training", advice))
        distributed.barrier()
        yield


def resume(trainer: "Trainer"):
    """Resume the run in a trainer's folder, if TRAINING.RESUME says so; otherwise check that there is none.

    Raises:
        UserError: there is another run, or none to resume; a state that is damaged, or of another network or other
            data; a folder that not all processes see.
    """
    path = checkpoint_to_resume(trainer.cfg)
    found = torch.tensor(float(path is not None), device=trainer.device)
    everywhere = distributed.sum_over_processes(found).item()
    if everywhere not in (0, trainer.world):
        raise UserError(
            f"only {everywhere:.0f} of {trainer.world} processes see {trainer.folder / STATES[0]}; "
            "TRAINING.SAVE_DIR must be on a disk that all machines share"
        )
    trainer.notes = []
    if path is not None:
        _resume_from(trainer, path)
        # A best score of another validation would never be beaten; without its file it was never saved.
        if trainer.validation_changed or not (trainer.folder / STATES[1]).exists():
            trainer.best = {"psnr": float("-inf"), "epoch": 0}
    elif trainer.main:
        _check_run_dir_is_free(trainer)


def _resume_from(trainer: "Trainer", path: Path):
    latest, best = (trainer.folder / name for name in STATES)
    try:
        load_state(trainer, read_checkpoint(path), path)
    except UserError as error:
        if path == best:
            raise UserError(f"{latest} is missing, and the run's other state cannot be used: {error}") from error
        try:
            load_state(trainer, read_checkpoint(best), best)
        except UserError:
            raise error from None
        raise UserError(
            f"{error}. {best} can be resumed (epoch {trainer.epoch}, step {trainer.step}): move {latest} away for that"
        ) from error
    if path == best:
        trainer.notes.append(f"{latest} is missing: the run is resumed from {best}, which may be older")


def _check_run_dir_is_free(trainer: "Trainer"):
    resume, folder = trainer.cfg.TRAINING.RESUME, trainer.folder
    if weights := [*folder.glob("model_*.pth")]:
        if resume:
            newest = max(weights, key=lambda path: path.stat().st_mtime)
            raise UserError(
                f"{folder} holds a run, but neither {' nor '.join(STATES)} to resume it from; put one back, or "
                f"start another run from its weights with MODEL.SESSION NAME MODEL.WEIGHTS {newest}"
            )
        resumable = any(path.name in STATES for path in weights)
        advice = "continue it with TRAINING.RESUME True, or " if resumable else ""
        raise UserError(f"{folder} holds another run; {advice}give this one its own name with MODEL.SESSION NAME")
    if resume is True:
        others = sorted(path.parent.name for path in folder.parent.glob(f"*/{STATES[0]}"))
        there = f" (runs there: {shorten_list(others)})" if others else ""
        raise UserError(
            f"there is no run to resume in {folder}; check MODEL.SESSION and TRAINING.SAVE_DIR{there}, or "
            "begin one with TRAINING.RESUME auto, which resumes it later"
        )
    if resume:
        trainer.notes.append(f"nothing to resume in {folder}: starting from scratch")


# ------------------------------------------------------------------------------------------------ a state from a file


def _is_count(x) -> bool:
    return type(x) is int and 0 <= x < 2**31


def _is_total(x, place: int) -> bool:
    """Whether it can be one of `StepCounters`; the gradient's norms, the last two, may be unknown, NaN."""
    return type(x) is float and (0 <= x < math.inf or (place > 3 and math.isnan(x)))


def _is_row(row) -> bool:
    """Whether it can be a row of the history; one of another version may have other columns, or lack some."""
    numbers = (row.get(key) for key in ("lr", "loss", "psnr", "best_psnr"))
    return (
        _is_count(row["epoch"])
        and _is_count(row["step"])
        and all(isinstance(x, float | None) for x in numbers)
        and all(isinstance(x, str | int | float | None) for x in row.values())
    )


# What a state must hold to be resumed; `Trainer.state_dict` and `TrainState.state_dict` write it.
_CHECKS = {
    "state_dict": lambda x: isinstance(x, dict),
    "raw_state_dict": lambda x: isinstance(x, dict),
    "averaged": _is_count,
    "optimizer": lambda x: all(isinstance(y, dict) for y in x["state"].values()) and type(x.get("name", "")) is str,
    "epoch": lambda x: _is_count(x) and x > 0,
    "step": _is_count,
    "best": lambda x: type(x["psnr"]) is float and not math.isnan(x["psnr"]) and _is_count(x["epoch"]),
    "last_psnr": lambda x: type(x) is float,
    "validation_due": lambda x: type(x) is bool,
    "rollbacks": _is_count,
    "seconds": lambda x: type(x) is float and 0 <= x < math.inf,
    "lr_factor": lambda x: type(x) is float and 0 <= x <= 1,
    "totals": lambda x: type(x) is list and len(x) in (4, 6) and all(map(_is_total, x, range(len(x)))),
    "good_weights": lambda x: isinstance(x, dict),
    "history": lambda x: type(x) is list and all(map(_is_row, x)),
    "config": lambda x: isinstance(x, str),
}
_AVERAGED = {"raw_state_dict", "averaged"}  # only where OPTIM.EMA_DECAY was set
_OPTIONAL = {
    "validation_due",
    "rollbacks",
    "lr_factor",
    "seconds",
    "good_weights",
}  # which states of earlier versions lack


def check_state(state: dict, path):
    """Check that a checkpoint's content is a training state.

    Raises:
        UserError: it is not; the keys that are missing or damaged are listed.
    """

    optional = _OPTIONAL | (_AVERAGED if _AVERAGED.isdisjoint(state) else set())

    def holds(key: str) -> bool:
        if key not in state:
            return key in optional
        try:
            return _CHECKS[key](state[key])
        except Exception:  # a value of any other type
            return False

    damaged = [key for key in _CHECKS if not holds(key)]
    if damaged:
        raise _cannot_be_resumed(path, *damaged)


def _cannot_be_resumed(path, *keys: str) -> UserError:
    return UserError(
        f"{path} cannot be resumed: {', '.join(keys)} missing, or not as train.py writes it; start another run "
        f"(MODEL.SESSION) from its weights (MODEL.WEIGHTS {path})"
    )


def load_state(trainer: "Trainer", state: dict, path: Path):
    """Resume from a state; ``path`` is the file that it comes from.

    Raises:
        UserError: it is no training state, or of another network or other data.
    """
    check_state(state, path)
    trainer.train_state.load_state_dict(state, path)
    trainer.epoch, trainer.step = state["epoch"], state["step"]
    trainer.best, trainer.last_psnr = state["best"], state["last_psnr"]
    trainer.validation_due = state.get("validation_due", False)
    trainer.rollbacks, trainer.schedule.factor = state.get("rollbacks", 0), state.get("lr_factor", 1.0)
    trainer.clock.used_before = trainer.clock.used = state.get("seconds", 0.0)
    trainer.log.rows = state["history"]
    for key, compare in {"config": _compare_config, "data": _compare_data, "val_data": _compare_val_data}.items():
        try:
            if key in state:  # the oldest states have no data
                compare(trainer, state[key], path)
        except UserError:
            raise
        except Exception as error:  # a damaged value may fail in any way
            raise _cannot_be_resumed(path, key) from error
    trainer.resumed = path


def _compare_config(trainer: "Trainer", text: str, _):
    """Note what has changed; with another batch size, go on at the same fraction of the epoch."""
    then = type(trainer.cfg).load_cfg(text)
    trainer.changed = changed_settings(trainer.cfg, then)
    trainer.validation_changed = any(key.startswith(_VALIDATION) for key in trainer.changed)
    done = trainer.step * then.OPTIM.BATCH_SIZE // trainer.cfg.OPTIM.BATCH_SIZE
    trainer.step = operator.index(min(done, trainer.batches.steps))
    if trainer.step < 0:
        raise ValueError("no step of an epoch")


def _compare_data(trainer: "Trainer", then: dict, path: Path):
    if changes := changed_items(trainer.train_set.items, then):
        source = trainer.cfg.TRAINING.INPUT_DIR or trainer.cfg.TRAINING.TRAIN_DIR or "the data set"
        raise UserError(
            f"{source} is not what {path} was trained on: {changes}. Put that back, "
            f"or start a run of its own from its weights: MODEL.SESSION NAME MODEL.WEIGHTS {path}"
        )


def _compare_val_data(trainer: "Trainer", then: dict, _):
    trainer.validation_changed |= bool(changed_items(trainer.val_set.items, then))
