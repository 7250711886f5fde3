"""Networks on the Hugging Face Hub, or in folders of its layout: `DGUNet.from_pretrained` and the like.

A folder has ``model.safetensors``, whose metadata describe the network and its known degradation (see `weights`), so
that `load_model` reads it, too; ``config.json``, the same description; and a model card.
"""

import contextlib
import json
import math
from pathlib import Path

import huggingface_hub as huggingface

from dgunet.checkpoints.load import describe_model, load_model, read_checkpoint
from dgunet.checkpoints.safetensors import save_weights
from dgunet.model.degradations import Blur, MotionBlur
from dgunet.model.network import DGUNet
from dgunet.model.sampling import ScalableSampling
from dgunet.model.variants import find_variant
from dgunet.runtime.errors import UserError

WEIGHTS = "model.safetensors"
HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}  # not of `load_model`
CARD = """---
{{ card_data }}
---

# {{ network }}

{{ about }}

A deep generalized unfolding network for image restoration ([paper]({{ paper_url }})), by dgunet.

```python
# from a clone of dgunet: pip install ".[hub]"
{{ imports }}

model = DGUNet.from_pretrained("{{ repo_id }}"{{ own_parts }})
{{ example }}
```
"""


class _HubModel(
    huggingface.ModelHubMixin,
    model_card_template=CARD,
    paper_url="https://arxiv.org/abs/2204.13348",
    library_name="dgunet",
    license="mit",
    pipeline_tag="image-to-image",
    tags=["image-restoration", "deep-unfolding", "pytorch"],
):
    """A network for the mixin. (PyTorchModelHubMixin would write weights without our metadata.)"""

    def __init__(self, model: DGUNet):
        self.model = model

    def _save_pretrained(self, save_directory: Path):
        save_weights(save_directory / WEIGHTS, self.model.state_dict(), describe_model(self.model))

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **options
    ) -> DGUNet:
        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            path = huggingface.hf_hub_download(
                model_id, WEIGHTS, revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
            )  # fmt: skip
        content, config = read_checkpoint(path), Path(path).with_name("config.json")
        if "model" not in content and config.is_file():  # rewritten by a program that drops the metadata
            with contextlib.suppress(ValueError):
                described = json.loads(config.read_text(encoding="utf-8"))
                content |= {"model": described} if isinstance(described, dict) and "arguments" in described else {}
        return load_model(path, content=content, **options)

    def generate_model_card(self, **words):
        card = super().generate_model_card(**words)
        if self.model.name is not None:
            card.data.tags = [*card.data.tags, find_variant(self.model.name).task.replace("_", "-")]
        return card


def from_pretrained(name: str | Path, **options) -> DGUNet:
    """A network from a repository on the Hub, a folder of `save_pretrained`, or weights that come with dgunet.

    Options are those of `load_model` (device, task, degradation, ...), and of huggingface_hub's ``ModelHubMixin``
    (revision, token, cache_dir, local_files_only, force_download).
    """
    if not Path(name).is_dir() and "/" not in str(name):  # the Hub's names are user/name
        return load_model(name, **{key: value for key, value in options.items() if key not in HUB_OPTIONS})
    try:
        return _HubModel.from_pretrained(name, **options)
    except UserError:
        raise
    except (huggingface.errors.HfHubHTTPError, huggingface.errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is neither a folder nor a readable repository on the Hub: {reason:.300}") from error


def save_pretrained(model: DGUNet, folder: str | Path, about: str = "", **options):
    """Write a network to a folder in the Hub's layout. Options are those of ``ModelHubMixin.save_pretrained``.

    ``about`` is for the model card: what the weights are for and how they were trained.
    """
    return _HubModel(model).save_pretrained(folder, **_options(model, str(folder), about), **options)


def push_to_hub(model: DGUNet, repo_id: str, about: str = "", **options) -> str:
    """Upload a network to ``user/name`` on the Hub; returns the commit's URL.

    ``about``: see `save_pretrained`. Options are those of ``ModelHubMixin.push_to_hub`` (private, token, ...).
    """
    return _HubModel(model).push_to_hub(repo_id, **_options(model, repo_id, about), **options)


def _options(model: DGUNet, repo_id: str, about: str) -> dict:
    card = {"network": model.name or "DGUNet", "repo_id": repo_id, "about": about or "What it was trained for: ..."}
    description = describe_model(model)
    made_by = {name: description[name].replace(":", ".") or "..." for name in model.factories}
    card["own_parts"] = "".join(f", {name}={text}" for name, text in made_by.items())
    imports, card["example"] = _example(model)
    if description.get("degradation", {}).get("kind") == "own":
        made = (model.degradation_name or "...").replace(":", ".")
        card["own_parts"] += f", degradation={made}()"
        made_by["degradation"] = made
    modules = {text.partition(".")[0] for text in made_by.values()} - {""}
    card["imports"] = "\n".join(
        [*(f"import {name}" for name in sorted({"torch", *modules})), "from dgunet import DGUNet, restore", *imports]
    )
    return {"config": description, "model_card_kwargs": card}


def _example(model: DGUNet) -> tuple[list[str], str]:
    """Further imports, and lines that restore with ``model``."""
    known, c = model.degradation, model.channels
    if known is None:
        return [], (
            f"image = torch.rand({c}, 97, 131)  # yours, in [0, 1]; or a NumPy array (H, W, {c})\n"
            "restored = restore(model, image)  # any size; same type out as in"
        )
    measure = f"model.degradation.A(torch.rand(1, {c}, 96, 128))"
    if isinstance(known, MotionBlur):
        return ["from dgunet.degradations import Blur"], (
            "model.degradation = Blur(torch.ones(9, 9) / 81)  # of your kernel (h, w), both odd, which sums to 1\n"
            f"y = {measure}  # or your blurred image, in [0, 1]\n"
            "restored = restore(model, y)  # any size; same type out as in"
        )
    if isinstance(known, Blur):
        return [], (
            f"y = {measure}  # blurred by the network's own kernel; or your image, in [0, 1]\n"
            "restored = restore(model, y)  # any size; same type out as in"
        )
    if isinstance(known, ScalableSampling):
        ratio = math.floor(1e4 * len(known.matrix) / known.block**2) / 1e4  # the highest
        measure = measure.replace(".A(", f".at({ratio:g}).A(")
    return [], f"y = {measure}  # the measurement of an image in [0, 1]\nrestored = restore(model, y)"
