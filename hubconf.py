"""For torch.hub: `model = torch.hub.load(REPOSITORY, "denoising_gaussian")`, or another name of `torch.hub.list`; or
`"load_model", PATH`; or `"create_model", NAME`, without weights.
"""

from dgunet import create_model, load_model  # noqa: F401
from dgunet.checkpoints.registry import list_pretrained as _list_pretrained

dependencies = ["torch", "numpy", "safetensors"]


def _entry(record):
    def load(**options):
        return load_model(record.name, **options)

    load.__doc__ = f"{record.trained_for}\n\nNot for: {record.not_for}\n\nOptions are those of dgunet.load_model."
    return load


globals().update({_record.name: _entry(_record) for _record in _list_pretrained()})
