"""Proximal mappings and degradations of the user's own, from a module outside the package."""

import importlib
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from processes import run_script
from torch import nn

from dgunet import DGUNet, UserError, create_model, load_model, restore
from dgunet.apps.export import export_model
from dgunet.checkpoints import hub
from dgunet.checkpoints.load import describe_model, read_checkpoint, save_checkpoint
from dgunet.introspect import trace

ROOT = Path(__file__).resolve().parents[1]
OWN = {"proximal": "my_parts:Convolutions", "learned_degradation": "my_parts:Scale"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module of docs/extending.md, in the current folder."""
    (code,) = re.findall(
        r"```python\n(# my_parts.py\n.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.DOTALL
    )
    (tmp_path / "my_parts.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_parts")
    sys.modules.pop("my_parts", None)


def factories(own) -> dict:
    return {"proximal": own.Convolutions, "learned_degradation": own.Scale}


def network(own, **overrides) -> DGUNet:
    torch.manual_seed(0)
    return create_model("deraining_dgunet", **(factories(own) | overrides)).eval()


def same(one: DGUNet, other: DGUNet, y: torch.Tensor) -> bool:
    """Whether two networks compute the same, but for the order of sums: memory formats may differ."""
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one(y), other(y), strict=True))


def save(model: DGUNet, path: Path) -> Path:
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, path)
    return path


@pytest.fixture
def y() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_forward_is_the_proximal_gradient_method(own, y):
    model, x, features, expected = network(own, stages=4), y, None, []
    for stage in (model.first, model.middle[0], model.middle[0], model.last):
        A = stage.degradation.scale
        x, features = stage.proximal(x - stage.rho * A(A(x) - y), features)
        expected.append(x)
    for estimate, own_estimate in zip(model(y), expected[::-1], strict=True):
        torch.testing.assert_close(estimate, own_estimate)
    assert torch.equal(trace(model, y).steps[-1].x, model(y)[0])


@pytest.mark.parametrize(
    "stages, shared, made", [(1, True, [1]), (2, True, [1, 2]), (5, True, [1, 2, 5]), (4, False, [1, 2, 3, 4])]
)
@pytest.mark.parametrize("part", OWN)
def test_each_stored_stage_is_made_once(own, part, stages, shared, made):
    calls = []

    def factory(**given):
        calls.append(given)
        return factories(own)[part](**given)

    model = network(own, stages=stages, shared=shared, **{part: factory})
    assert len(model(torch.rand(1, 3, 8, 8))) == stages
    assert [given["k"] for given in calls] == made
    assert all(given["stages"] == stages and given["channels"] == 3 for given in calls)
    if part == "proximal":
        assert [given["has_previous"] for given in calls] == [k > 1 for k in made]


def test_checkpointing_and_channels_last_change_nothing(own, y):
    gradients = []
    for checkpointing in (False, True):
        model = network(own, stages=3, checkpointing=checkpointing).to(memory_format=torch.channels_last)
        sum(x.mean() for x in model(y)).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("part", OWN)
def test_one_part_of_ones_own_beside_the_papers(own, tmp_path, y, part):
    torch.manual_seed(0)
    model = DGUNet(width=8, growth=4, final_growth=4, stages=3, **{part: factories(own)[part]})
    path = save(model, tmp_path / "a.pth")
    loaded = load_model(path, **{part: factories(own)[part]})
    assert same(loaded, model, y) and loaded.name is None
    assert describe_model(loaded) == describe_model(model)


def test_trained_tested_and_restored_with_from_the_command_line(own, tmp_path, image_pairs):
    image_pairs(tmp_path / "train", count=4)
    image_pairs(tmp_path / "val", count=2, size=(32, 32))
    keys = {
        "DEVICE": "cpu", "TRAINING.TRAIN_DIR": "train", "TRAINING.VAL_DIR": "val", "TRAINING.SAVE_DIR": "runs",
        "TRAINING.TRAIN_PS": 32, "TRAINING.VAL_PS": 32, "TRAINING.VAL_AFTER_EVERY": 1, "TRAINING.WORKERS": 0,
        "OPTIM.BATCH_SIZE": 2, "OPTIM.EMA_DECAY": 0.5, "MODEL.OVERRIDES.stages": 3, "SPEED.AMP": "fp32",
        **{f"MODEL.{part.upper()}": name for part, name in OWN.items()},
    }  # fmt: skip

    def run(script: str, words: list) -> str:
        done = run_script(ROOT / "Deraining" / script, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(session: str, epochs: int, resume: bool = False) -> DGUNet:
        changed = {"MODEL.SESSION": session, "OPTIM.NUM_EPOCHS": epochs, "TRAINING.RESUME": resume}
        run("train.py", [word for pair in (keys | changed).items() for word in pair])
        return load_model(tmp_path / "runs" / session / "model_latest.pth", task="deraining", **factories(own))

    first, model, straight = train("run", 1), train("run", 2, resume=True), train("straight", 2)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, first.state_dict()[name]), name
        assert torch.equal(value, straight.state_dict()[name]), name

    image = cv2.imread(str(tmp_path / "val/input/img1.png"))
    with torch.no_grad():
        expected = model(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0][0].permute(1, 2, 0)
    np.testing.assert_allclose(restore(model, image), expected.clamp(0, 1).numpy() * 255, atol=0.51)
    assert restore(model, image[:21, :30], tile=16).shape == (21, 30, 3)

    weights = "runs/run/model_latest.pth"
    options = [word for part, name in OWN.items() for word in (f"--{part}", name)]
    run("test.py", ["--weights", weights, "--dataset", "val", "--device", "cpu", *options])
    assert "deraining_dgunet" in (tmp_path / "results/deraining.csv").read_text()
    done = run_script(ROOT / "Deraining/test.py", "--weights", weights, "--dataset", "val", cwd=tmp_path)
    assert done.returncode == 2 and "my_parts:Convolutions" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", OWN)
def test_loading_asks_for_what_the_file_names_and_never_imports_it(own, tmp_path, missing):
    path = save(network(own), tmp_path / "a.pth")
    del sys.modules["my_parts"]
    given = {part: factory for part, factory in factories(own).items() if part != missing}
    with pytest.raises(UserError) as error:
        load_model(path, **given)
    name = OWN[missing]
    for text in (str(path), name, f"load_model(path, {missing}={name.split(':')[1]})"):
        assert text in str(error.value)
    assert "\n" not in str(error.value) and "my_parts" not in sys.modules


def test_loading_with_something_else_is_refused(own, tmp_path):
    path = save(network(own), tmp_path / "a.pth")
    others = {"proximal": lambda **given: own.Convolutions(**given, width=16)}
    with pytest.raises(UserError, match=r"first.proximal.last.weight \(3, 32, 3, 3\) instead of \(3, 16, 3, 3\)"):
        load_model(path, **(factories(own) | others))
    with pytest.raises(UserError, match="'my_parts:Convolutions'"):
        load_model(path, **(factories(own) | {"proximal": OWN["proximal"]}))
    save_checkpoint(network(own).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"load_state_dict"):
        load_model(tmp_path / "bare.pth", **factories(own))


def test_what_cannot_be_imported_is_saved_without_a_name(own, tmp_path, y):
    model = network(own, proximal=lambda **given: own.Convolutions(**given))
    path = save(model, tmp_path / "a.pth")
    assert (
        describe_model(model)["proximal"] == ""
        and describe_model(model)["learned_degradation"] == OWN["learned_degradation"]
    )
    with pytest.raises(UserError, match=r"load_model\(path, proximal=\.\.\.\)"):
        load_model(path, learned_degradation=own.Scale)
    assert same(load_model(path, **factories(own)), model, y)


@pytest.mark.parametrize("damaged", [None, 3, ["my_parts:Convolutions"], "my_parts", "a b:c\nd"], ids=repr)
def test_damaged_name(own, tmp_path, damaged):
    model = network(own)
    content = {"state_dict": model.state_dict(), "model": describe_model(model) | {"proximal": damaged}}
    save_checkpoint(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"proximal=\.\.\."):
        load_model(tmp_path / "a.pth")
    load_model(tmp_path / "a.pth", **factories(own))


def test_values_that_are_no_weights_survive_loading_which_leaves_random_numbers_alone(tmp_path, y):
    class Table(nn.Module):
        """With numbers that are neither learned nor saved."""

        def __init__(self, channels, **_):
            super().__init__()
            self.register_buffer("table", torch.arange(1.0, 4).view(3, 1, 1), persistent=False)
            self.weight = nn.Parameter(torch.rand(1))

        def forward(self, v, previous):
            return v * self.weight + self.table, None

    model = DGUNet(proximal=Table, stages=2)
    path, before = save(model, tmp_path / "a.pth"), torch.get_rng_state()
    loaded = load_model(path, proximal=Table)
    assert torch.equal(torch.get_rng_state(), before) and same(loaded, model, y)


def test_mapping_that_is_a_network_itself(tmp_path, y):
    class Inner(nn.Module):
        def __init__(self, **_):
            super().__init__()
            self.network = DGUNet(width=4, growth=0, stages=1)

        def forward(self, v, previous):
            return self.network(v)[0], None

    model = DGUNet(proximal=Inner, stages=3)
    assert same(load_model(save(model, tmp_path / "a.pth"), proximal=Inner), model, y)


def test_degradation_without_weights_is_no_known_one(tmp_path, y):
    class Half(nn.Module):
        def __init__(self, **_):
            super().__init__()

        def A(self, x):
            return x / 2

        A_adjoint = A

    model = DGUNet(width=8, growth=4, final_growth=4, stages=2, learned_degradation=Half)
    loaded = load_model(save(model, tmp_path / "a.pth"), learned_degradation=Half)
    assert loaded.degradation is None and same(loaded, model, y)


def test_known_degradation_with_weights_is_trained_along(own, tmp_path, y):
    torch.manual_seed(0)
    operator = own.Scale(3, 1, 1)
    model = DGUNet(width=8, growth=4, final_growth=4, stages=2, degradation=operator)
    before = operator.scale.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum((x - y).square().mean() for x in model(operator.A(y))).backward()
    optimizer.step()
    assert not torch.equal(operator.scale.weight, before)
    given = own.Scale(3, 1, 1)
    loaded = load_model(save(model, tmp_path / "a.pth"), degradation=given)
    assert loaded.degradation is given and torch.equal(given.scale.weight, operator.scale.weight)
    assert same(loaded, model, y)


def test_safetensors_and_the_hub_carry_the_name(own, tmp_path, y):
    model = network(own)
    hub.save_pretrained(model, tmp_path / "hub")
    assert same(hub.from_pretrained(tmp_path / "hub", **factories(own)), model, y)
    assert same(load_model(tmp_path / "hub/model.safetensors", **factories(own)), model, y)
    assert "proximal=my_parts.Convolutions" in (tmp_path / "hub/README.md").read_text()
    assert read_checkpoint(tmp_path / "hub/model.safetensors")["model"].items() >= OWN.items()
    with pytest.raises(UserError, match="my_parts:Convolutions"):
        hub.from_pretrained(tmp_path / "hub")


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_exported(own, tmp_path, ending):
    if ending == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert export_model(network(own, stages=2), tmp_path / f"network.{ending}") < 1e-4


def test_compiled(own, y):
    model = network(own, stages=3)
    expected = model(y)[0]
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(y)[0], expected)


def test_local_statistics_are_refused(own, y):
    with pytest.raises(UserError, match="Convolutions"):
        restore(network(own), y, local={"norm": 16})
    assert restore(network(own), y, local={"tile": 16}).shape == y.shape


class Returns(nn.Module):
    """A mapping whose result is that of a function of v."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, v, previous):
        return self.result(v)


@pytest.mark.parametrize(
    "result",
    [lambda v: v, lambda v: (v, None, None), lambda v: (v[..., :8], None), lambda v: (None, v), lambda v: [v, None]],
)
def test_results_that_are_no_estimate_and_features_are_refused(y, result):
    model = DGUNet(proximal=lambda **given: Returns(result), stages=2)
    with pytest.raises(ValueError, match=r"Returns must return \(x, features\), x of v's shape \(2, 3, 16, 24\)"):
        model(y)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"proximal": "my_parts:Convolutions"}, "proximal .*'my_parts:Convolutions'"),
        ({"proximal": nn.Identity()}, "proximal .*Identity"),
        ({"proximal": lambda **given: abs}, "proximal must return an nn.Module"),
        ({"learned_degradation": lambda **given: abs}, "learned_degradation must return an nn.Module"),
        ({"learned_degradation": nn.Identity}, "Identity has no method A and no A_adjoint"),
        ({"learned_degradation": nn.Identity, "gradient": False}, "learned_degradation .*leave it out"),
    ],
)
def test_what_makes_no_parts_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DGUNet(**arguments)


def test_own_learned_degradation_where_it_is_known():
    with pytest.raises(UserError, match="compressive_sensing_dgunet: learned_degradation"):
        create_model("compressive_sensing_dgunet", learned_degradation=nn.Identity)
