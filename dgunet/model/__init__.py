"""The network: gradient steps, proximal mappings, the paper's variants."""

from dgunet._moved import former_names
from dgunet.model.network import ARGUMENTS, DGUNet, FinalStage, MeasureThenRestore, Stage
from dgunet.model.variants import VARIANTS, Variant, create_model, find_variant, list_models

__all__ = [
    "ARGUMENTS", "VARIANTS", "DGUNet", "FinalStage", "MeasureThenRestore", "Stage", "Variant", "create_model",
    "find_variant", "list_models",
]  # fmt: skip

__getattr__ = former_names(__name__)
