"""The paper's networks by name."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import dgunet  # for dgunet.checkpoints, which imports this module and is imported when first used
from dgunet.model.degradations import Degradation
from dgunet.model.network import DGUNet
from dgunet.model.sampling import block_sampling
from dgunet.runtime.errors import UserError


@dataclass(frozen=True)
class Variant:
    """A row of the paper's tables."""

    task: str
    arguments: dict  # of `DGUNet`
    degradation: Callable[..., Degradation] | None = None  # builds the known one; None: it is learned


_DEBLURRING = dict(width=80, growth=48, shared=True, final_fusion="concat", final_growth=32)
_DERAINING = dict(width=40, growth=20, shared=True, final_fusion="concat", final_growth=16)
_SENSING = dict(
    channels=1, width=32, growth=16, shared=True, fusion="concat", isff="additive", attention=True,
    final_fusion="concat", final_growth=16,
)  # fmt: skip
_PLUS = dict(shared=False, final_fusion="subspace")  # of compressive sensing it stays "concat"

VARIANTS = {
    "deblurring_dgunet": Variant("deblurring", _DEBLURRING),
    "deblurring_dgunet_plus": Variant("deblurring", _DEBLURRING | _PLUS | dict(width=96, growth=48)),
    "denoising_dgunet": Variant("denoising", _DEBLURRING),
    "denoising_dgunet_plus": Variant("denoising", _DEBLURRING | _PLUS | dict(width=80, growth=40)),
    "deraining_dgunet": Variant("deraining", _DERAINING),
    "deraining_dgunet_plus": Variant("deraining", _DERAINING | _PLUS),
    "compressive_sensing_dgunet": Variant("compressive_sensing", _SENSING, block_sampling),
    "compressive_sensing_dgunet_plus": Variant("compressive_sensing", _SENSING | dict(shared=False), block_sampling),
}


def list_models(pretrained: bool = False) -> list[str]:
    """The names for `create_model`, rows of the paper's tables; or of the ``pretrained`` weights for `load_model`."""
    if pretrained:
        return [record.name for record in dgunet.checkpoints.registry.list_pretrained()]
    return list(VARIANTS)


def find_variant(name: str) -> Variant:
    """The variant of a name; an unknown one is a UserError."""
    if name not in VARIANTS:
        guess = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"known are {', '.join(VARIANTS)}"
        raise UserError(f"unknown model {name!r}; {hint}")
    return VARIANTS[name]


def create_model(name: str, degradation: Degradation | None = None, **overrides) -> DGUNet:
    """Build a DGUNet of the paper by name.

    Args:
        name: one of `list_models()`.
        degradation: a known one instead of the variant's own: learned, or in compressive sensing block sampling.
        **overrides: arguments of `DGUNet` that differ from the paper's, such as ``stages`` or ``proximal``, and in
            compressive sensing of `block_sampling`, e.g. ``ratio=0.1`` instead of 0.25, or ``ratio=(0.01, 0.5)`` for
            one network for that range.

    Returns:
        The network with random weights, in training mode.

    Raises:
        UserError: an unknown name or argument, or a value that `DGUNet` or `block_sampling` refuses.

    >>> import torch
    >>> model = create_model("compressive_sensing_dgunet", ratio=0.25)
    >>> y = model.degradation.A(torch.rand(1, 1, 64, 64))  # blocks of 32x32 pixels
    >>> tuple(y.shape), tuple(model(y)[0].shape)
    ((1, 256, 2, 2), (1, 1, 64, 64))
    """
    variant = find_variant(name)
    build = variant.degradation if degradation is None else None
    names = list(inspect.signature(DGUNet).parameters)
    sampling_names = list(inspect.signature(build).parameters) if build else []
    for key in overrides:
        if key not in names + sampling_names:
            raise UserError(f"{name} has no argument {key!r}; it takes {', '.join(names + sampling_names)}")
    try:
        if build:
            degradation = build(**{key: overrides.pop(key) for key in sampling_names if key in overrides})
        model = DGUNet(**variant.arguments | overrides, degradation=degradation)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    model.name = name
    return model
