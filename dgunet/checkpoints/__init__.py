"""Files of weights: reading, recognising and writing them; the pretrained ones by name; the Hub."""

from importlib import import_module


def __getattr__(name: str):
    """Modules when first used: the network's methods that save it come here, and `hub` needs a package of its own."""
    if name in ("hub", "load", "original", "registry", "safetensors"):
        return import_module(f"dgunet.checkpoints.{name}")
    raise AttributeError(f"module 'dgunet.checkpoints' has no attribute {name!r}")
