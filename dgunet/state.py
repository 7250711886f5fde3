"""The training state in a file: whether it is one that a run can continue from, before the run does."""

import math

import torch
from torch.optim import Optimizer

from dgunet.checkpoint import check_tensors
from dgunet.errors import UserError, shorten_list


def _is_a(kind, value) -> bool:
    """Whether a value is of a type; of a list, all values; of a dict, exactly its keys with values of its types."""
    if isinstance(kind, dict):
        same = isinstance(value, dict) and value.keys() == kind.keys()
        return same and all(_is_a(kind[key], value[key]) for key in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_a(kind[0], item) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < 2**31
    return isinstance(value, kind)


# Columns of the history; one of another version may have others, or lack some.
_COLUMNS = {
    "epoch": int, "step": int, "lr": float, "loss": float, "psnr": float | None, "best_psnr": float | None,
    "images_per_second": float, "skipped_steps": int, "rollbacks": int,
}  # fmt: skip


def _is_row(row) -> bool:
    """Whether it can be a row of the history: one that says when, with values of their types."""
    if not isinstance(row, dict) or not row.keys() >= {"epoch", "step"}:
        return False
    return all(_is_a(_COLUMNS.get(key, str | int | float | None), value) for key, value in row.items())


# What a state must hold to be continued, besides the random states and the config proving themselves in use.
_STATE = {
    "state_dict": lambda x: _is_a(dict, x),
    "optimizer": lambda x: (
        _is_a({"state": dict, "param_groups": list}, x) and all(_is_a(dict, y) for y in x["state"].values())
    ),
    "epoch": lambda x: _is_a(int, x) and x > 0,
    "step": lambda x: _is_a(int, x),
    "best": lambda x: _is_a({"psnr": float, "epoch": int}, x) and not math.isnan(x["psnr"]),
    "last_psnr": lambda x: _is_a(float, x),
    "totals": lambda x: _is_a([float], x) and len(x) == 4 and all(0 <= total < math.inf for total in x),
    "history": lambda x: _is_a(list, x) and all(map(_is_row, x)),
    "random": lambda x: _is_a({"cpu": torch.Tensor, "cuda": torch.Tensor | None}, x),
    "config": lambda x: _is_a(str, x),
}
# What states of earlier versions lack; `engine.Trainer` says what these are.
_LATER = {
    "validation_due": lambda x: _is_a(bool, x),
    "rollbacks": lambda x: _is_a(int, x),
    "lr_factor": lambda x: _is_a(float, x) and 0 <= x <= 1,
    "good_weights": lambda x: _is_a(dict, x),
}
_AVERAGED = {"raw_state_dict": lambda x: _is_a(dict, x), "averaged": lambda x: _is_a(int, x)}


def check_state(state: dict, path):
    """Check that a checkpoint's content is a training state.

    Raises:
        UserError: it is not; what is missing or of another kind is listed.
    """
    needed = _STATE | (_AVERAGED if is_averaged(state) else {})
    damaged = [key for key, holds in needed.items() if key not in state or not holds(state[key])]
    damaged += [key for key, holds in _LATER.items() if key in state and not holds(state[key])]
    if damaged:
        raise cannot_be_resumed(path, *damaged)


def is_averaged(state: dict) -> bool:
    """Whether ``state_dict`` holds averaged weights, so that the run's own are in ``raw_state_dict``."""
    return not _AVERAGED.keys().isdisjoint(state)


def cannot_be_resumed(path, *keys: str) -> UserError:
    return UserError(
        f"{path} cannot be resumed: {', '.join(keys)} missing, or not as train.py writes it; start another run "
        f"(MODEL.SESSION) from its weights (MODEL.WEIGHTS {path})"
    )


def load_optimizer_state_dict(optimizer: Optimizer, saved: dict, path):
    """Load Adam's moments in their parameters' layout; its rate, decay, ... stay.

    Raises:
        UserError: they are not those of the optimizer's parameters.
    """
    (group,) = optimizer.param_groups
    expected = {}
    for i, parameter in enumerate(group["params"]):
        expected |= {f"{i}.step": torch.zeros(()), f"{i}.exp_avg": parameter, f"{i}.exp_avg_sq": parameter}
    found = {f"{i}.{key}": value for i, moments in saved.items() for key, value in moments.items()}
    check_tensors(expected, found, path, "the optimizer of this run", exact=True)
    negative = [name for name, value in found.items() if not name.endswith(".exp_avg") and (value < 0).any()]
    if negative:
        raise UserError(f"{path} holds negative squares in its optimizer state: {shorten_list(negative)}")
    state = optimizer.state_dict()
    for i in range(len(group["params"])):
        names = {key: f"{i}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
        state["state"][i] = {k: torch.empty_like(expected[name]).copy_(found[name]) for k, name in names.items()}
    optimizer.load_state_dict(state)
