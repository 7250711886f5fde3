"""Networks as ONNX and .pt2 files: they give what `restore` and the network give."""

import argparse
import json

import numpy as np
import pytest
import torch

from dgunet import UserError, create_model, load_model, restore
from dgunet.apps import export
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.model.degradations import Blur
from dgunet.model.projection import inverse_cholesky, project
from dgunet.model.sampling import BlockSampling
from dgunet.runtime.errors import ROOT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def tiny(name: str, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, **(dict(width=8, growth=4, final_growth=4, stages=3) | overrides)).eval()


NETWORKS = {
    "sensing": lambda stages: tiny("compressive_sensing_dgunet", stages=stages, ratio=0.04, fusion="subspace"),
    "blur": lambda stages: tiny("deblurring_dgunet", stages=stages, degradation=Blur(torch.rand(3, 5) / 8)),
}
# A shared middle stage is applied twice in four stages: in the joined graph of ONNX once is not enough. It has the
# subspace projection, which the first and the last do not.
CASES = [("sensing", "onnx", 4), ("sensing", "pt2", 3), ("blur", "onnx", 1), ("blur", "pt2", 1)]


def expected(model, y: torch.Tensor) -> torch.Tensor:
    if model.degradation is None:
        return restore(model, y)
    with torch.no_grad():
        return model(y)[0].clamp(0, 1)


@pytest.mark.parametrize(("name", "format", "stages"), CASES)
def test_file_gives_what_the_network_gives_and_says_what_it_holds(tmp_path, name, format, stages):
    """Of all stages, for other sizes; weights that stages share are stored once."""
    model, path = NETWORKS[name](stages), tmp_path / f"network.{format}"
    assert export.export_model(model, path, stages=True, about={"licence": "MIT"}) < 1e-4
    check_estimates(model, path)
    check_metadata(model, path)
    if format == "onnx":
        stored = sum(np.prod(weight.dims) for weight in onnx.load(path).graph.initializer)
        parameters = sum(tensor.numel() for tensor in model.state_dict().values())
        known = sum(tensor.numel() for tensor in model.degradation.state_dict().values())  # stored transposed, too
        assert parameters * 0.9 < stored < parameters * 1.1 + 2 * known


def check_estimates(model, path):
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        assert names == ["restored", *(f"stage{k}" for k in range(model.stages - 1, 0, -1)), "unclamped"]
    else:
        module = torch.export.load(path).module()
    for size in ((2, 7, 1), (6, 3, 2)):
        y = export.example(model, *size)
        if path.suffix == ".onnx":
            *estimates, unclamped = map(torch.from_numpy, session.run(None, {"y": y.numpy()}))
            assert torch.equal(unclamped.clip(0, 1), estimates[0])
        else:
            estimates = module(y)
        assert estimates[0].std() > 0.01
        torch.testing.assert_close(estimates[0], expected(model, y), atol=1e-4, rtol=0)
        with torch.no_grad():
            for found, own in zip(estimates, model(y), strict=True):
                torch.testing.assert_close(found, own.clamp(0, 1), atol=1e-4, rtol=0)


def check_metadata(model, path):
    sensing = isinstance(model.degradation, BlockSampling)
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        about = session.get_modelmeta().custom_metadata_map
        assert int(about.pop("opset")) == onnx.load(path).opset_import[0].version
        taken, given = session.get_inputs()[0], session.get_outputs()[0]
        assert given.shape == ["batch", model.channels, "height", "width"]
        assert taken.shape[1] == (41 if sensing else 3)
    else:
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        about = json.loads(files["metadata.json"])
    assert about == export.describe(model) | {"precision": "float32", "licence": "MIT"}
    assert about["name"] == model.name and about["value_range"] == "0 1"
    assert about["multiple"] == ("32" if sensing else "8")
    assert str(ROOT).encode() not in path.read_bytes()


def test_half(tmp_path):
    model, steps = tiny("denoising_dgunet", stages=1), []
    difference = export.export_model(model, tmp_path / "network.onnx", half=True, log=steps.append)
    assert 0 < difference < 1e-3
    weights = onnx.load(tmp_path / "network.onnx").graph.initializer
    stored = sum(np.prod(weight.dims) for weight in weights if weight.data_type == onnx.TensorProto.FLOAT16)
    assert stored > 0.99 * sum(tensor.numel() for tensor in model.state_dict().values())
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    assert session.get_modelmeta().custom_metadata_map["precision"] == "float16"
    y = torch.rand(1, 3, 24, 40)
    np.testing.assert_allclose(session.run(None, {"y": y.numpy()})[0], expected(model, y), atol=1e-3, rtol=0)
    assert steps[0] == "1 of 4: tracing stage 1" and steps[-1] == "4 of 4: running the file"
    with pytest.raises(UserError, match="--half is for .onnx"):
        export.export_model(model, tmp_path / "network.pt2", half=True)


def test_weights_that_come_with_dgunet_are_described():
    about = export._about("denoising_gaussian")
    assert about["licence"] == "MIT" and "BSDS500" in about["trained_on"]
    assert "CBSD68_25 31.32 / 0.8838" in about["scores"]
    source = export._provenance("denoising_gaussian")
    assert source["weights_sha256"] in (ROOT / "docs" / "models.md").read_text()
    assert export.describe(load_model("denoising_gaussian"))["tile"] == "192"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return parser.parse_args(words)


def test_command(tmp_path, capsys):
    model = tiny("denoising_dgunet", stages=1)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "weights.pth")
    out = tmp_path / "new" / "network.pt2"
    export.run(parse(str(tmp_path / "weights.pth"), "--out", str(out)))
    printed = capsys.readouterr().out
    assert str(out) in printed and "3 of 3: running the file" in printed
    files = {"metadata.json": ""}
    torch.export.load(out, extra_files=files)
    about = json.loads(files["metadata.json"])
    assert about["weights"] == "weights.pth" and len(about["weights_sha256"]) == 64
    assert [path.name for path in out.parent.iterdir()] == ["network.pt2"]
    with pytest.raises(UserError, match="network.pt2 exists"):
        export.run(parse(str(tmp_path / "weights.pth"), "--out", str(out)))


@pytest.mark.parametrize(
    "name, format, message",
    [
        ("network", None, "network: .*.onnx.*.pt2.*--format"),
        ("network.pth", None, "network.pth: .*.onnx.*.pt2.*--format"),
        ("network.pt2", "onnx", "network.pt2 .*.onnx"),
        ("", "onnx", "exists"),
    ],
)
def test_impossible_files_are_refused_before_anything_else(tmp_path, name, format, message):
    with pytest.raises(UserError, match=message):
        export.run(parse("missing.pth", "--out", str(tmp_path / name), *(["--format", format] if format else [])))


class Darken:
    def A(self, x):
        return 0.5 * x

    A_adjoint = A


def test_a_degradation_of_the_users_own_is_refused(tmp_path):
    with pytest.raises(UserError, match="Darken"):
        export.export_model(tiny("deraining_dgunet", degradation=Darken()), tmp_path / "network.onnx")


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_read_pt2", lambda path: lambda y: [y])
    with pytest.raises(UserError, match="network.pt2: .*differs.*not written"):
        export.export_model(tiny("denoising_dgunet", stages=1), tmp_path / "network.pt2")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- the projection that is exported


def spanned(basis: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The projection, in float64 by the pseudo-inverse."""
    V, maps = basis.double().flatten(2).mT, features.double().flatten(2).mT
    V = V / V.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return (V @ (torch.linalg.pinv(V, rtol=1e-6) @ maps)).mT.reshape(features.shape)


def ill_conditioned(kind: str) -> torch.Tensor:
    maps = torch.randn(2, 16, 24, 20, generator=torch.Generator().manual_seed(0))
    if kind == "a pair 1e-3 apart":
        maps[:, 1] = maps[:, 0] + 1e-3 * maps[:, 1]
    elif kind == "all 1e-2 apart":
        maps = maps[:, :1] + 1e-2 * maps
    elif kind == "constant but for 1e-3":
        maps = 1 + 1e-3 * maps
    elif kind == "monomials":
        across, down = torch.linspace(0, 1, 20), torch.linspace(0, 1, 24)[:, None]
        maps = torch.stack([across**i * down**j for i in range(4) for j in range(4)]).expand_as(maps)
    elif kind == "two zero":
        maps[:, 3:5] = 0
    elif kind == "all zero":
        maps[:] = 0
    elif kind == "all the same":
        maps[:] = maps[:, :1].clone()
    elif kind == "1e-25 to 1e25":
        maps = maps * torch.logspace(-25, 25, 16).view(1, -1, 1, 1)
    return maps


KINDS = ["a pair 1e-3 apart", "all 1e-2 apart", "constant but for 1e-3", "monomials", "two zero", "all zero"]
KINDS += ["all the same", "1e-25 to 1e25"]


@pytest.mark.parametrize("inverse_factor", [export.eliminate, inverse_cholesky])
@pytest.mark.parametrize("kind", KINDS)
def test_projection_in_float32_is_least_squares(kind, inverse_factor):
    """Up to a condition number of 1e7: unrolled for exporting, and as on devices without float64."""
    basis = ill_conditioned(kind)
    scale = basis.abs().amax(dim=(2, 3), keepdim=True).clamp_min(1e-30)
    features = (basis / scale)[:, :6] + torch.randn(2, 6, 24, 20, generator=torch.Generator().manual_seed(1))
    projected = project(basis, features, torch.float32, inverse_factor)
    torch.testing.assert_close(projected.double(), spanned(basis, features), atol=1e-3, rtol=0)


def test_network_for_all_ratios_is_exported_for_one_of_them(tmp_path):
    model = tiny("compressive_sensing_dgunet", stages=1, ratio=(0.01, 0.5))
    with pytest.raises(UserError, match="--ratio"):
        export.export_model(model, tmp_path / "a.pt2")
    with pytest.raises(UserError, match="0.6"):
        export.export_model(model, tmp_path / "a.pt2", ratio=0.6)
    with pytest.raises(UserError, match="--ratio"):
        export.export_model(tiny("denoising_dgunet", stages=1), tmp_path / "a.pt2", ratio=0.1)
    assert not list(tmp_path.iterdir())
    export.export_model(model, tmp_path / "a.pt2", ratio=0.04)
    y = model.degradation.at(0.04).A(torch.rand(1, 1, 64, 96))
    program = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(program(y), expected(model, y), atol=1e-4, rtol=0)
