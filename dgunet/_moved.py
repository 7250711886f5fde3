"""Modules and names of version 0.2, for one release: each import warns and gives what is there now."""

import importlib
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

# Old module: where its names are now, the first of them that has one.
MODULES = {
    "checkpoint": ("checkpoints.load",),
    "command": ("apps.cli",),
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
    "proximal": ("model.proximal",),
    "restoring": ("apps.batch",),
    "runlog": ("training.loggers",),
    "schedule": ("training.schedule",),
    "synthesis": ("data.synthesis",),
    "testing": ("evaluation.cli",),
    "transforms": ("data.transforms",),
    "weights": ("checkpoints.safetensors",),
}
NAMES = {  # old name: new name
    "Centres": "CenterCropDataset",
    "EpochBatches": "ResumableBatchSampler",
    "Learner": "TrainState",
    "Picture": "Photo",
    "PictureSet": "ImageSet",
    "RunLog": "RunLogger",
    "centre": "center_crop",
    "degrade_picture": "degrade_image",
    "embedded_photos": "sample_photos",
    "hold_back": "hold_out",
    "loading": "make_dataloader",
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
        now = " and ".join(f"dgunet.{home}" for home in homes)
        warnings.warn(f"{module.__name__} is now {now}", DeprecationWarning, stacklevel=2)

        def look_up(name: str):
            for home in homes:
                found = importlib.import_module(f"dgunet.{home}")
                for known in (name, NAMES.get(name, name)):
                    if hasattr(found, known):
                        return getattr(found, known)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it is now {now}")

        module.__getattr__ = look_up
