"""Modules and names of version 0.2, for one release: their use warns and gives what is there now."""

import importlib
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Old module: where its names are now, the first of them that has one.
MODULES = {
    "checkpoint": ("checkpoints.load",),
    "config": ("training.config",),
    "demo": ("apps.demo",),
    "distributed": ("runtime.distributed",),
    "engine": ("training.trainer",),
    "errors": ("runtime.errors",),
    "export": ("apps.export",),
    "figures": ("apps.figures",),
    "files": ("runtime.files",),
    "hardware": ("runtime.hardware",),
    "hub": ("checkpoints.hub",),
    "instance_norm": ("model.instance_norm",),
    "layers": ("model.layers",),
    "learner": ("training.step",),
    "local": ("model.local",),
    "losses": ("training.losses",),
    "metrics": ("evaluation.metrics",),
    "original_checkpoints": ("checkpoints.original",),
    "patches": ("data.datasets", "data.loader"),
    "pathways": ("model.fusion", "model.projection"),
    "photographs": ("data.samples",),
    "pictures": ("data.photos",),
    "pretrained": ("checkpoints.registry",),
    "progress": ("runtime.progress",),
    "proximal": ("model.proximal",),
    "restoring": ("apps.batch",),
    "runlog": ("training.loggers",),
    "schedule": ("training.schedule",),
    "state": ("training.resume",),
    "synthesis": ("data.synthesis",),
    "testing": ("evaluation.cli",),
    "tiff": ("data.tiff",),
    "transforms": ("data.transforms",),
    "weights": ("checkpoints.safetensors",),
}
# The same of modules that have become rooms, for names that the room's own __init__ does not have.
ROOMS = {
    "data": ("data.packed", "data.images", "data.pairs"),
    "evaluation": ("evaluation.sets", "evaluation.scoresheet", "evaluation.runner"),
    "model": ("model.network", "model.variants", "training.step"),
    "training": ("training.cli",),
}
NAMES = {  # old name: new name
    "Centres": "CenterCropDataset",
    "EpochBatches": "ResumableBatchSampler",
    "FromImages": "MeasureThenRestore",
    "Learner": "TrainState",
    "Picture": "Photo",
    "PictureSet": "ImageSet",
    "RunLog": "RunLogger",
    "centre": "center_crop",
    "degrade_picture": "degrade_image",
    "embedded_photos": "sample_photos",
    "hold_back": "hold_out",
    "loading": "make_dataloader",
    "pairs_or_pictures": "pairs_or_images",
    "picture_samples": "image_samples",
    "read_picture": "read_photo",
    "replacing": "atomic_write",
    "restore_pictures": "restore_images",
    "rows_of": "num_rows",
    "start_matrix": "init_sampling_matrix",
    "write_picture": "write_photo",
}


class MovedFinder(MetaPathFinder, Loader):
    """Finds ``dgunet.OLD`` for each of `MODULES`: a module whose names are looked up where they are now."""

    def find_spec(self, fullname, path=None, target=None):
        parent, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if parent == "dgunet" and name in MODULES else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        homes = MODULES[module.__name__.rpartition(".")[2]]
        _warn(f"{module.__name__} is now {' and '.join(f'dgunet.{home}' for home in homes)}")
        module.__getattr__ = lambda name: getattr(*_find(module.__name__, name, homes))


def former_names(room: str):
    """The ``__getattr__`` of a room: what it had when it was a module is looked up where it is now."""

    def look_up(name: str):
        if find_spec(f"{room}.{name}"):  # `from room import module`, which Python tries after this
            raise AttributeError(name)
        found, known = _find(room, name, ROOMS[room.rpartition(".")[2]])
        _warn(f"{room}.{name} is now {found.__name__}.{known}")
        return getattr(found, known)

    return look_up


def _find(module: str, name: str, homes: tuple[str, ...]) -> tuple[ModuleType, str]:
    """The module that has a name of ``module`` now, and what it is called there."""
    for home in homes if not name.startswith("__") else ():
        found = importlib.import_module(f"dgunet.{home}")
        for known in (name, NAMES.get(name, name)):
            if hasattr(found, known):
                return found, known
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _warn(text: str):
    warnings.warn(text, DeprecationWarning, stacklevel=3)
