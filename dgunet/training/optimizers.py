"""The optimizer that OPTIM.NAME names: Adam, AdamW, Muon, or one of a user's own; its state, cleared and resumed."""

import contextlib
import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from dgunet.checkpoints.load import check_tensors
from dgunet.runtime.errors import UserError, shorten_list
from dgunet.runtime.imports import import_object, is_object_name


def make_optimizer(optim, parameters: list[Tensor]) -> Optimizer:
    """The optimizer of a config's OPTIM section, for these parameters.

    A ``module:name`` is called with the parameters, ``lr`` (LR_INITIAL), and those of ``betas`` (BETAS) and
    ``weight_decay`` (WEIGHT_DECAY) that it has arguments for.

    Raises:
        UserError: there is no such optimizer, it has no arguments for keys that are set, or other parameters.
    """
    name, betas, decay = optim.NAME, tuple(optim.BETAS), optim.WEIGHT_DECAY
    if not is_object_name(name):
        if name == "muon":
            return Muon(parameters, optim.LR_INITIAL, betas, weight_decay=decay)
        make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        return make(parameters, lr=optim.LR_INITIAL, betas=betas, eps=1e-8, weight_decay=decay, fused=True)
    make = import_object(name, "OPTIM.NAME")
    if not callable(make):
        raise UserError(f"OPTIM.NAME {name} is {make!r:.60}; name an optimizer's class, or a function that makes one")
    takes = inspect.signature(make).parameters
    options = {}
    for option, value, unset in (("betas", betas, (0.9, 0.999)), ("weight_decay", decay, 0.0)):
        if option in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            options[option] = value
        elif value != unset:
            key, unset = f"OPTIM.{option.upper()}", list(unset) if option == "betas" else unset
            raise UserError(f"{key} is set, but {name} takes no {option}; set {key} {unset}, or give it that argument")
    optimizer = make(parameters, lr=optim.LR_INITIAL, **options)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"OPTIM.NAME {name} made a {type(optimizer).__name__}, which is no torch.optim.Optimizer")
    if sorted(map(id, parameters_of(optimizer))) != sorted(map(id, parameters)):
        raise UserError(
            f"OPTIM.NAME {name} does not train the parameters that it is given, each once; freeze what is not to be "
            "trained with requires_grad_(False) before the Trainer is made"
        )
    return optimizer


class Muon(Optimizer):
    """Muon for matrices and convolution kernels, AdamW for the rest (biases, slopes, step sizes).

    A kernel (O, I, h, w) is the matrix (O, I h w). The momentum ``M <- mu M + (1 - mu) G`` is orthogonalised after
    Nesterov's step, ``U = NS(mu M + (1 - mu) G)``, and a matrix of m x n changes by ``0.2 sqrt(max(m, n)) lr U``: as
    much as AdamW would change it, so that Adam's learning rates serve (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024; Liu et al., "Muon is scalable for LLM training", 2025). `torch.optim.Muon` with
    ``adjust_lr_fn="match_rms_adamw"`` is the same, for matrices alone. Weight decay is decoupled.

    Args:
        params: parameters of any shapes.
        lr: learning rate of both.
        betas: AdamW's.
        momentum: Muon's mu.
        weight_decay: of both.
    """

    def __init__(
        self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay))
        for p in parameters_of(self):
            moments = ("momentum",) if p.dim() >= 2 else ("exp_avg", "exp_avg_sq")
            self.state[p] = {name: torch.zeros_like(p) for name in moments}
            if p.dim() < 2:
                self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                (self._muon if p.dim() >= 2 else self._adam)(p, p.grad, group, **self.state[p])

    def _muon(self, p: Tensor, gradient: Tensor, group: dict, momentum: Tensor):
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp(momentum, group["momentum"]).flatten(1))
        p.add_(update.view(p.shape), alpha=-0.2 * math.sqrt(max(update.shape)) * group["lr"])

    def _adam(self, p: Tensor, gradient: Tensor, group: dict, step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor):
        beta1, beta2 = group["betas"]
        step += 1
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(1e-8)
        p.addcdiv_(exp_avg / (1 - beta1**step), spread, value=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """U V^T, about, of a matrix U S V^T: five steps of a Newton-Schulz iteration in bfloat16, Muon's authors'."""
    x = matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.T).to(matrix.dtype).contiguous()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """In the order of its groups, by which its state is numbered."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def use_tensor_rates(optimizer: Optimizer):
    """Keep the learning rates of Adam or AdamW on the device, where a recorded step finds those set after it."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        dtype = torch.float32 if device.type == "cuda" else torch.float64  # CUDA's fused kernels read a float
        group["lr"] = torch.full((), float(group["lr"]), dtype=dtype, device=device)  # without a wait for the device


@contextlib.contextmanager
def capturable(optimizer: Optimizer):
    """Within it Adam and AdamW may be recorded; outside PyTorch warns of the flag."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


def clear_state(optimizer: Optimizer, optim):
    """Make an optimizer as new, but for its learning rates."""
    if not is_object_name(optim.NAME):
        torch._foreach_zero_([moment for moments in optimizer.state.values() for moment in moments.values()])
        return
    new = make_optimizer(optim, parameters_of(optimizer))
    optimizer.state = new.state
    for group, values in zip(optimizer.param_groups, new.param_groups, strict=True):
        group.update({key: value for key, value in values.items() if key not in ("params", "lr")})


def saved_state(optimizer: Optimizer, optim) -> dict:
    """For `load_state`."""
    state = optimizer.state_dict()
    if any(isinstance(group["lr"], Tensor) for group in state["param_groups"]):  # `use_tensor_rates`
        groups = [group | {"lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
        state = state | {"param_groups": groups}
    return state | {"name": optim.NAME}


def load_state(optimizer: Optimizer, optim, saved: dict, path):
    """Load the state of a file, in the parameters' memory format. Learning rates, decay and betas stay the config's.

    All else that the groups of a user's own optimizer hold comes from the file, as in PyTorch.

    Raises:
        UserError: it is of another optimizer, does not fit, or is damaged.
    """
    name, then = optim.NAME, saved.get("name", "adam")  # earlier versions had only that
    if then != name and {then, name} != {"adam", "adamw"}:
        raise UserError(
            f"{path} holds the state of {then:.100}, not of {name}; resume it with OPTIM.NAME {then:.100}, or "
            f"start another run (MODEL.SESSION) from its weights (MODEL.WEIGHTS {path})"
        )
    if is_object_name(name):
        _load_own(optimizer, saved, path)
    else:
        _load_known(optimizer, saved["state"], path)


def _load_known(optimizer: Optimizer, saved: dict[int, dict[str, Tensor]], path):
    own = optimizer.state_dict()
    if not isinstance(optimizer, Muon):  # which has its state from the beginning
        own["state"] = {
            i: {"step": torch.zeros(()), "exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
            for i, p in enumerate(parameters_of(optimizer))
        }
    expected, found = (
        {f"{i}.{key}": value for i, moments in states.items() for key, value in moments.items()}
        for states in (own["state"], saved)
    )
    check_tensors(expected, found, path, "the optimizer of this run", exact=True)
    signed = (".exp_avg", ".momentum")
    negative = [name for name, value in found.items() if not name.endswith(signed) and (value < 0).any()]
    if negative:
        raise UserError(f"{path} holds negative squares in its optimizer state: {shorten_list(negative)}")
    for name, value in expected.items():
        value.copy_(found[name])
    optimizer.load_state_dict(own)


def _load_own(optimizer: Optimizer, saved: dict, path):
    own = optimizer.state_dict()["param_groups"]
    try:
        broken = [
            f"{i}.{name}" for i, entry in saved["state"].items() for name, x in _tensors(entry) if not _is_good(x)
        ]
        if broken:
            raise UserError(f"{path} has broken tensors in its optimizer state: {shorten_list(broken)}")
        groups = [
            then | {key: now[key] for key in ("params", "lr", "initial_lr", "betas", "weight_decay") if key in now}
            for then, now in zip(saved["param_groups"], own, strict=True)
        ]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except UserError:
        raise
    except Exception as error:  # of any kind: the optimizer is not ours
        raise UserError(f"{path} does not fit the optimizer of this run: {error!r:.200}") from error
    for p in parameters_of(optimizer):
        entry = optimizer.state.get(p, {})
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                entry[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _tensors(entry, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dicts, lists and tuples, with their names."""
    if isinstance(entry, Tensor):
        yield name, entry
    elif isinstance(entry, dict | list | tuple):
        for key, part in entry.items() if isinstance(entry, dict) else enumerate(entry):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _is_good(x: Tensor) -> bool:
    return x.layout == torch.strided and (not x.is_floating_point() or bool(x.isfinite().all()))
