"""What the original authors' implementation computes, stage by stage (see parity/README.md).

``python tests/test_parity.py`` prints the largest difference of every case.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # also where this file is run by itself

from parity.weights import fill, image  # noqa: E402

from dgunet import UserError, create_model, load_model  # noqa: E402
from dgunet.checkpoints.load import weights_of  # noqa: E402
from dgunet.checkpoints.original import convert_original, is_unused, our_name  # noqa: E402
from dgunet.evaluation.metrics import psnr_batch  # noqa: E402
from dgunet.training.losses import Charbonnier, Edge  # noqa: E402

SPECS = json.loads((HERE / "parity" / "specs.json").read_text())
LOSSES = json.loads((HERE / "parity" / "losses.json").read_text())
TOLERANCE = 2e-5

OURS = {  # the original's variant: our model
    "deblurring_dgunet": ("deblurring_dgunet", {}),
    "deblurring_dgunet_plus": ("deblurring_dgunet_plus", {}),
    "denoising_dgunet": ("denoising_dgunet", {}),
    "denoising_dgunet_plus": ("denoising_dgunet_plus", {}),
    "deraining_dgunet": ("deraining_dgunet", {}),
    "deraining_dgunet_plus": ("deraining_dgunet_plus", {}),
    "cs_dgunet_r10": ("compressive_sensing_dgunet", {"ratio": 0.1}),
    "cs_dgunet_plus_r10": ("compressive_sensing_dgunet_plus", {"ratio": 0.1}),
    "cs_dgunet_r25": ("compressive_sensing_dgunet", {"ratio": 0.25}),
}


def write_original(path: Path, variant: str, prefix: str):
    """A checkpoint as the authors saved theirs: bare for compressive sensing, else under ``state_dict``."""
    weights = {prefix + name: value for name, value in fill(SPECS[variant], 7).items()}
    torch.save(weights if variant.startswith("cs_") else {"epoch": 3, "state_dict": weights}, path)


@torch.inference_mode()
def differences(variant: str, path: Path) -> list[float]:
    """Largest difference of every stage, first stage first, between ours and the original's output."""
    case = np.load(HERE / "parity" / "cases" / f"{variant}.npz")
    model = load_model(path)
    assert model.name == OURS[variant][0] or {model.name, variant} == {"deblurring_dgunet", "denoising_dgunet"}
    y = torch.from_numpy(case["input"])
    if model.degradation is not None:
        y = model.degradation.A(y)
    estimates = model(y)[::-1]
    assert len(estimates) == 7
    return [(x - torch.from_numpy(case[f"stage{k}"])).abs().max().item() for k, x in enumerate(estimates, start=1)]


def ours_on_meta(variant: str) -> dict[str, torch.Tensor]:
    """Names and shapes of our model's weights, without computing any."""
    name, options = OURS[variant]
    with torch.device("meta"):
        return create_model(name, **options).state_dict()


# The large networks are read once each, with or without the prefix.
PREFIXES = {
    "deblurring_dgunet": ["module."],
    "denoising_dgunet": [""],
    "deblurring_dgunet_plus": ["module."],
    "denoising_dgunet_plus": [""],
}
CASES = [(variant, prefix) for variant in SPECS for prefix in PREFIXES.get(variant, ["", "module."])]


@pytest.mark.parametrize(("variant", "prefix"), CASES)
def test_every_stage_matches(variant, prefix, tmp_path):
    write_original(tmp_path / "original.pth", variant, prefix)
    found = differences(variant, tmp_path / "original.pth")
    assert max(found) <= TOLERANCE, found


def test_a_wrong_weight_does_not_match(tmp_path):
    path = tmp_path / "original.pth"
    write_original(path, "cs_dgunet_r10", "")
    weights = torch.load(path, weights_only=True)
    weights["r_final"] *= -1
    torch.save(weights, path)
    found = differences("cs_dgunet_r10", path)
    assert max(found[:-1]) <= TOLERANCE < found[-1]


@pytest.mark.parametrize("variant", SPECS)
def test_used_names_map_one_to_one(variant):
    used = [name for name in SPECS[variant] if not is_unused(name)]
    names = {name: our_name(name) for name in used}
    assert len(set(names.values())) == len(used)
    expected = {name: tuple(value.shape) for name, value in ours_on_meta(variant).items()}
    assert {names[name]: tuple(SPECS[variant][name]) for name in used} == expected


@pytest.mark.parametrize("variant", SPECS)
def test_unused_names_are_the_documented_ones(variant):
    unused = {name for name in SPECS[variant] if is_unused(name)}
    if variant.startswith("cs_"):
        assert unused
        assert all(".phi." in n or ".phit." in n or n.startswith("stage1_encoder") for n in unused)
    else:
        assert unused == {"basic.concat12.weight"} & SPECS[variant].keys()
        assert bool(unused) == (not variant.endswith("plus"))


def empty(variant: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SPECS[variant].items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.module.", "net_g."])
def test_weights_of_a_wrapped_original_are_found(prefix):
    weights = empty("deraining_dgunet")
    content = {"model_state_dict": {prefix + name: value for name, value in weights.items()}, "epoch": 3}
    assert weights_of(content).keys() == convert_original(weights).keys()


def test_unknown_names_are_listed(tmp_path):
    torch.save(empty("deraining_dgunet") | {"fancy.weight": torch.zeros(1), "r9x": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="fancy.weight, r9x"):
        load_model(tmp_path / "a.pth")


def test_unknown_name_inside_a_known_module_is_listed(tmp_path):
    weights = empty("deraining_dgunet") | {"stage1_encoder.body.0.fancy": torch.zeros(1)}
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match="unknown.*fancy"):
        load_model(tmp_path / "a.pth")


def test_two_spellings_of_one_name(tmp_path):
    torch.save(empty("deraining_dgunet") | {"r_0": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth .*first.rho.*r_0"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "name",
    ["r0", "r6", "basic.r1", "tail.weight", "shallow_feat1.0.weight", "shallow_feat7.0.weight", "sam12.conv1.weight"]
    + ["concat67.weight", "basic.merge12.subnet.bias", "stage1_decoder.body.2.up.bias", "phi_6.body.0.weight"],
)
def test_missing_name_is_listed(name, tmp_path):
    weights = empty("deraining_dgunet")
    del weights[name]
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "a.pth")
    assert our_name(name) in str(error.value)
    assert "missing" in str(error.value)


def test_unused_names_may_be_absent(tmp_path):
    weights = {name: value for name, value in empty("deraining_dgunet").items() if not is_unused(name)}
    assert len(convert_original(weights)) == len(weights)
    torch.save(weights, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth").name == "deraining_dgunet"


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: str(tuple(case["shape"])))
def test_losses_match(case):
    restored = image(case["shape"], case["restored_seed"]).double().requires_grad_()
    target = image(case["shape"], case["target_seed"]).double()
    charbonnier_loss, edge_loss = Charbonnier()(restored, target), Edge()(restored, target)
    total = charbonnier_loss + 0.05 * edge_loss
    total.backward()
    assert charbonnier_loss.item() == pytest.approx(case["charbonnier"], abs=1e-9)
    assert edge_loss.item() == pytest.approx(case["edge"], abs=1e-9)
    assert total.item() == pytest.approx(case["total"], abs=1e-9)
    assert restored.grad.norm().item() == pytest.approx(case["grad_norm"], abs=1e-9)
    as_one = [x.detach().flatten(0, 1)[None] for x in (restored, target)]  # their value is that of the whole tensor
    assert psnr_batch(*as_one).item() == pytest.approx(case["train_psnr"], abs=1e-4)


def main() -> int:
    print(f"largest difference to the original over all 7 stages (allowed: {TOLERANCE:.0e})")
    failed = False
    for variant in SPECS:
        with tempfile.TemporaryDirectory() as folder:
            write_original(Path(folder) / "original.pth", variant, "module.")
            found = differences(variant, Path(folder) / "original.pth")
        failed |= not max(found) <= TOLERANCE
        print(f"{variant:24} {max(found):.2e}   stages {'  '.join(f'{d:.1e}' for d in found)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
