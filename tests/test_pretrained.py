"""Weights that come with dgunet, found by name; .safetensors files; the package without its optional requirements."""

import json
import os
import random
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from natsort import natsorted
from processes import driver
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint_faults import DISK_FAULTS

import dgunet
from dgunet import DGUNet, UserError, create_model, list_models, load_model
from dgunet.checkpoints.load import describe_model, read_checkpoint
from dgunet.checkpoints.registry import find_pretrained, list_pretrained
from dgunet.checkpoints.safetensors import save_weights
from dgunet.model.degradations import Blur, MotionBlur

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = find_pretrained("denoising_gaussian").path
TINY = dict(width=4, growth=2, final_growth=2, stages=2)


def save(model, path: Path, **options) -> Path:
    save_weights(path, model.state_dict(), describe_model(model), **options)
    return path


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------------------- names


def test_names():
    names = list_models(pretrained=True)
    assert names == [record.name for record in list_pretrained()] == natsorted(names)
    assert {"denoising_gaussian", "deraining_mixture", "compressive_sensing_25"} <= set(names)
    record = find_pretrained("denoising_gaussian")
    assert record.task == "denoising" and len(record.noise_sigma) == 2
    assert all(len(score) == 2 for score in record.scores.values())
    assert same(load_model("denoising_gaussian", task="denoising"), load_model(record.path))


def test_former_names_give_what_has_replaced_them_and_warn():
    with pytest.warns(FutureWarning, match="denoising_real.*denoising_photo"):
        model = load_model("denoising_real")
    assert same(model, load_model("denoising_photo")) and "denoising_real" not in list_models(pretrained=True)


@pytest.mark.parametrize(
    "given, told",
    [
        ("denoising_gausian", "did you mean denoising_gaussian?"),
        ("x", "known are compressive_sensing_1, compressive_sensing_4, compressive_sensing_10, "),
        ("denoising_gaussian.pth", "no checkpoint at"),
        (Path("folder/denoising_gaussian"), "no checkpoint at"),
        ("..", "is a folder"),
        (SHIPPED.parent, f"itself, such as {SHIPPED}"),
    ],
)
def test_neither_name_nor_file(given, told):
    with pytest.raises(UserError) as error:
        load_model(given)
    assert told in str(error.value) and str(given) in str(error.value)


def test_files_come_before_names_and_these_before_folders(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "denoising_gaussian").mkdir()
    assert load_model("denoising_gaussian").arguments["width"] > 8
    (tmp_path / "denoising_gaussian").rmdir()
    save(tiny_model(), tmp_path / "denoising_gaussian")
    assert load_model("denoising_gaussian").arguments["width"] == 8


def test_names_are_weights_to_train_from(tmp_path, monkeypatch):
    from dgunet.training.cli import build_model
    from dgunet.training.config import load_config

    monkeypatch.chdir(tmp_path)
    words = ["MODEL.NAME", "denoising_dgunet", "MODEL.WEIGHTS", "denoising_gaussian"]
    words += ["MODEL.OVERRIDES", "{width: 32, growth: 16, final_growth: 16}"]
    cfg = load_config(ROOT / "configs/denoising/dgunet.yaml", words)
    missing = []
    assert same(build_model(cfg, None, missing=missing), load_model("denoising_gaussian")) and not missing


def test_a_shipped_file_that_is_damaged(tmp_path, monkeypatch):
    """As where Git has left a pointer in its place."""
    package = tmp_path / "dgunet"
    weights = package / "pretrained_models/Denoising/a/weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr(dgunet.checkpoints.registry, "__file__", str(package / "checkpoints/registry.py"))
    with pytest.raises(UserError, match="weights.safetensors is not a safetensors file, or is damaged; download"):
        dgunet.checkpoints.registry._records.__wrapped__()


# ------------------------------------------------------------------------------------------------------------- records


def test_models_table_is_up_to_date():
    table = runpy.run_path(str(ROOT / "scripts/export_weights.py"))["models_table"]()
    assert (ROOT / "docs/models.md").read_text() == table, "python scripts/export_weights.py --renew"


@pytest.fixture
def exporting(tmp_path, monkeypatch, tiny_model, capsys):
    """``exporting(*words)``: the command in a repository of its own, whose one network is ``Denoising/.../a``."""
    module = runpy.run_path(str(ROOT / "scripts/export_weights.py"))
    folder = tmp_path / "Denoising/pretrained_models/a"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(find_pretrained("denoising_gaussian").path.with_name("record.yaml"), folder)
    save(tiny_model(), folder / "weights.safetensors")
    monkeypatch.setitem(module["main"].__globals__, "ROOT", tmp_path)
    monkeypatch.setitem(module["main"].__globals__, "TABLE", tmp_path / "docs/models.md")

    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["export_weights.py", *map(str, words)])
        module["main"]()
        return capsys.readouterr().out

    run.folder = folder
    return run


def change_record(folder: Path, **fields):
    path = folder / "record.yaml"
    record = yaml.safe_load(path.read_text()) | fields
    path.write_text(yaml.safe_dump({name: value for name, value in record.items() if value is not None}))


def test_a_record_that_has_changed(exporting):
    weights = exporting.folder / "weights.safetensors"
    before = read_checkpoint(weights)
    assert f"renewed {weights}" in exporting("--renew")
    change_record(exporting.folder, scores={"CBSD68_25": [99.5, 0.99]})
    assert f"renewed {weights}" in exporting("--renew")
    after = read_checkpoint(weights)
    assert after["record"]["scores"] == {"CBSD68_25": [99.5, 0.99]} and after["model"] == before["model"]
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())
    table = (exporting.folder.parents[2] / "docs/models.md").read_text()
    assert "CBSD68_25 99.50 / 0.9900" in table and "2026-11-27" in table
    time = weights.stat().st_mtime_ns
    assert "renewed" not in exporting("--renew") and weights.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    "fields, told",
    [
        (
            {"licence": None, "license": "MIT"},
            "licence is missing, license is unknown; its fields are",
        ),
        ({"name": "my weights"}, "name is 'my weights'"),
        ({"scores": {"Set11": 31}}, "scores is"),
        ({"noise_sigma": 25}, "noise_sigma is 25"),
        ({"hours": "two"}, "hours is 'two'"),
        ({"trained_on": "a\nb"}, "trained_on is"),
    ],
)
def test_a_record_that_is_none(exporting, fields, told):
    change_record(exporting.folder, **fields)
    with pytest.raises(UserError) as error:
        exporting("--renew")
    assert told in str(error.value) and "record.yaml" in str(error.value)


def test_export_asks_for_what_it_needs(exporting, tmp_path):
    for words in ([], ["run"], ["--renew", "--out", "x"], ["run", "--out", "x"]):
        with pytest.raises(UserError, match="give RUNS, --record and --out, or --renew alone"):
            exporting(*words)
    (tmp_path / "r.yaml").write_text("a: [")
    for record in (tmp_path / "none.yaml", tmp_path / "r.yaml"):
        with pytest.raises(UserError, match="cannot read the record"):
            runpy.run_path(str(ROOT / "scripts/export_weights.py"))["read_record"](record)


# --------------------------------------------------------------------------------------------------- .safetensors files


@pytest.mark.parametrize(
    "name, degradation, overrides",
    [
        ("denoising_dgunet", None, dict(shared=False)),
        ("compressive_sensing_dgunet", None, dict(ratio=0.01)),
        ("deblurring_dgunet", Blur(torch.rand(3, 5)), {}),
    ],
)
def test_every_kind_of_network(tmp_path, name, degradation, overrides):
    torch.manual_seed(0)
    model = create_model(name, degradation, **TINY | overrides)
    loaded = load_model(save(model, tmp_path / "new folder/a.safetensors"))
    assert same(model, loaded) and loaded.arguments == model.arguments and loaded.name == name
    assert type(loaded.degradation) is type(model.degradation)


def test_weights_without_a_description(tmp_path, tiny_model):
    """Bare, as other tools write them, whatever the file is called; and of no DGUNet."""
    model = tiny_model()
    save_file(model.state_dict(), tmp_path / "a.pth")
    save_file({f"module.{n}": v for n, v in model.state_dict().items()}, tmp_path / "b.safetensors", {"dataset": "x"})
    torch.save(model.state_dict(), tmp_path / "c.safetensors")
    for name in ("a.pth", "b.safetensors", "c.safetensors"):
        assert same(load_model(tmp_path / name), model)
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="d.safetensors holds no DGUNet"):
        load_model(tmp_path / "d.safetensors")


def test_what_other_programs_may_put_into_the_metadata(tmp_path, tiny_model):
    path, weights = tmp_path / "a.safetensors", tiny_model().state_dict()
    for about in ("", "{", "3", "[]", '"text"', '{"record": 3}', '{"model": 3}', "[" * 10**5, '{"model": {"name": 1}}'):
        save_file(weights, path, {"dgunet": about})
        with pytest.raises(UserError, match="a.safetensors is not a safetensors file, or is damaged"):
            load_model(path)
    save_weights(path, weights, {"name": None, "arguments": {"stages": 2, "depth": 5}})
    with pytest.raises(UserError, match="a.safetensors: DGUNet has no argument depth"):
        load_model(path)
    save_weights(path, weights, 3)
    with pytest.raises(UserError, match="a.safetensors: its 'model' entry does not describe"):
        load_model(path)


def test_faults_of_the_disk(tmp_path, tiny_model, fuzz):
    """As those of other checkpoints in test_checkpoint_faults.py."""
    model, path = tiny_model(**TINY), tmp_path / "a.safetensors"
    whole = save(model, path, record={"noise_sigma": [5, 50]}).read_bytes()
    rng, counts = random.Random(4), Counter()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(30 * fuzz):
        data = bytearray(whole)
        if rng.random() < 0.5:  # in the header, where most of what can go wrong does
            data = bytearray(whole[:size])
            rng.choice(DISK_FAULTS)(rng, data)
            data += whole[size:]
        else:
            rng.choice(DISK_FAULTS)(rng, data)
        path.write_bytes(data)
        try:
            loaded = load_model(path)
        except UserError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            counts["refused"] += 1
            continue
        assert same(loaded, model) and read_checkpoint(path).get("noise_sigma") == [5, 50]
        counts["loaded unharmed"] += 1
    print(dict(counts))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, tiny_model, monkeypatch):
    path = save(tiny_model(), tmp_path / "a.safetensors")

    def half_a_save(file, encoded):
        with open(file, "wb") as half:
            half.write(encoded[: len(encoded) // 2])
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(Path, "write_bytes", half_a_save)
    with pytest.raises(OSError, match="No space left"):
        save(tiny_model(seed=1), path)
    monkeypatch.undo()
    assert same(load_model(path), tiny_model()) and os.listdir(tmp_path) == ["a.safetensors"]


def test_the_metadata_can_be_read_by_anyone():
    with safe_open(find_pretrained("deraining_mixture").path, framework="numpy") as file:
        about = json.loads(file.metadata()["dgunet"])
    assert about["model"]["name"] == "deraining_dgunet" and about["record"]["licence"] == "MIT"


# ------------------------------------------------------------------------------------------------------------- packages


def test_import_needs_torch_and_numpy_only(run_command):
    """Networks can be built and run."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (%s):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import numpy, dgunet
model = dgunet.create_model("deraining_dgunet", width=4, growth=2, final_growth=2, stages=2)
print(dgunet.restore(model, numpy.zeros((9, 9, 3)), tile=None).shape)
for use in (lambda: dgunet.load_model("denoising_gaussian"), lambda: model.save_pretrained("folder")):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
"""
    from dgunet.runtime.errors import EXTRAS

    done = run_command(["-c", code % ", ".join(map(repr, EXTRAS))])
    told = [
        "(9, 9, 3)",
        "No module named 'safetensors'",  # commands say what to install, see errors.describe_error
        "No module named 'huggingface_hub'",
    ]
    assert (done.stderr, done.stdout.splitlines()) == ("", told)


def test_modules_are_attributes(run_command):
    """Imported when first asked for; what one of them needs and is not there is told."""
    code = """
import sys, dgunet
print(hasattr(dgunet, "nothing"), hasattr(dgunet, "__wrapped__"), "torch" in sys.modules)
print(dgunet.checkpoints.load.load_model.__name__, dgunet.introspect.trace.__name__, dgunet.integrations.__name__)
sys.modules["huggingface_hub"] = None
try:
    dgunet.checkpoints.hub
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = run_command(["-c", code])
    told = ["False False False", "load_model trace dgunet.integrations", "huggingface_hub"]
    assert (done.stderr, done.stdout.splitlines()) == ("", told)


def test_every_folder_of_modules_is_packed():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("dgunet/**/*.py")}
    packages = set(tool["packages"])
    assert modules <= packages
    weights = {f"dgunet.pretrained_models.{record.path.parents[2].name}" for record in list_pretrained()}
    assert packages - modules == weights | {"dgunet.configs"}
    assert all(tool["package-dir"][name] == f"{name.rsplit('.')[-1]}/pretrained_models" for name in weights)


def test_wheel(tmp_path, run_command, image_pairs, monkeypatch):
    """It has the modules, weights and configs, and finds, trains and tests without the repository."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    folders = {record.path.parents[2].name for record in list_pretrained()}
    for name in ("dgunet", "configs", *folders, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    built = run_command(["-c", "from setuptools import build_meta; build_meta.build_wheel('..')"], cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    weights = {name for name in names if name.endswith("weights.safetensors")}
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("dgunet/**/*.py")}
    configs = {f"dgunet/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/*/*.*")}
    classifier = {"dgunet/automatic.safetensors", "dgunet/automatic.yaml"}
    assert names == weights | modules | configs | classifier
    monkeypatch.setattr(
        dgunet.checkpoints.registry, "__file__", str(tmp_path / "installed/dgunet/checkpoints/registry.py")
    )
    found = dgunet.checkpoints.registry._records.__wrapped__()
    assert {record.path.relative_to(tmp_path / "installed").as_posix() for record in found.values()} == weights
    assert list(found) == list_models(pretrained=True)

    # it trains by a config of its own, and tests, where there is no clone
    image_pairs(tmp_path / "pairs", count=3, size=(24, 24))
    shutil.copytree(tmp_path / "pairs/target", tmp_path / "photos")
    shutil.copy(tmp_path / "photos/img1.png", tmp_path / "photos/100075.png")  # which is in Rain100L
    plan = ["train", "deraining", "--config", "cpu", "--dry_run", "TRAINING.TRAIN_DIR", "photos"]
    words = ["TRAINING.TRAIN_DIR", "pairs", "TRAINING.VAL_DIR", "pairs", "TRAINING.TRAIN_PS", 16, "TRAINING.VAL_PS", 16]
    words += ["OPTIM.NUM_EPOCHS", 1, "TRAINING.REPEAT", 1, "TRAINING.WORKERS", 0, "DEVICE", "cpu"]
    words += ["MODEL.OVERRIDES", "{width: 8, growth: 4, final_growth: 4, stages: 2}"]
    best = "checkpoints/denoising/quickstart/model_best.pth"
    test = ["test", "denoising", "--weights", best, "--dataset", "pairs", "--device", "cpu"]
    train = ["train", "denoising", "--config", "quickstart", *words]
    commands = driver([(["dgunet", *command], 0) for command in (plan, train, test)])
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(commands, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    told = done.stdout
    assert told.count("[exit status 0]") == 3, told + done.stderr
    assert "training    2 images of photos" in told and "validation  1 images" in told
    assert "done: best PSNR" in told and str(ROOT) not in told
    assert "appended to results/denoising.csv" in told


# ------------------------------------------------------------------------------------------------------------ two hubs


def test_torch_hub():
    repository, content = str(ROOT), runpy.run_path(str(ROOT / "hubconf.py"))
    entries = {name for name, entry in content.items() if callable(entry) and not name.startswith("_")}
    assert entries == {*list_models(pretrained=True), "load_model", "create_model"}
    assert "sigma" in content["denoising_gaussian"].__doc__
    model = torch.hub.load(repository, "denoising_gaussian", source="local", task="denoising")
    assert same(model, load_model("denoising_gaussian"))
    assert torch.hub.load(repository, "create_model", "deraining_dgunet", source="local", **TINY).stages == 2


class Darken:
    def A(self, x):
        return 0.5 * x

    A_adjoint = A


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "name, degradation, overrides",
    [
        ("denoising_dgunet", None, {}),
        ("compressive_sensing_dgunet", None, dict(ratio=0.01)),
        ("deblurring_dgunet", Blur(torch.rand(3, 5)), dict(shared=False, stages=4)),
        ("deraining_dgunet", Darken(), {}),
    ],
)
def test_hugging_face_folder(tmp_path, offline, name, degradation, overrides):
    from huggingface_hub import ModelCard

    torch.manual_seed(0)
    model = create_model(name, degradation, **TINY | overrides)
    model.save_pretrained(tmp_path / "a", about="For a test.")
    own = {"degradation": degradation} if isinstance(degradation, Darken) else {}
    for loaded in DGUNet.from_pretrained(tmp_path / "a", **own), load_model(tmp_path / "a/model.safetensors", **own):
        assert same(model, loaded) and loaded.arguments == model.arguments and not loaded.training
        assert type(loaded.degradation) is type(model.degradation)
    with pytest.raises(UserError, match="not a network for"):
        other = "denoising" if name.startswith("compressive") else "compressive_sensing"
        DGUNet.from_pretrained(tmp_path / "a", task=other, **own)
    assert json.loads((tmp_path / "a/config.json").read_text()) == describe_model(model)
    card = ModelCard.load(tmp_path / "a/README.md")
    about = card.data.to_dict()
    assert (about["license"], about["library_name"], about["pipeline_tag"]) == ("mit", "dgunet", "image-to-image")
    assert {"image-restoration", name.removesuffix("_dgunet").replace("_", "-")} <= set(about["tags"])
    for part in (name, "For a test.", "arxiv.org/abs/2204.13348", 'pip install ".[hub]"'):
        assert part in card.text


@pytest.mark.parametrize(
    "name, degradation, overrides",
    [
        ("denoising_dgunet", None, {}),
        ("denoising_dgunet", None, dict(channels=1)),
        ("compressive_sensing_dgunet", None, dict(ratio=0.01)),
        ("compressive_sensing_dgunet", None, dict(ratio=(0.01, 0.1))),
        ("deblurring_dgunet", Blur(torch.rand(3, 5) / 8), {}),
        ("deblurring_dgunet", MotionBlur(), {}),
        ("deraining_dgunet", Darken(), {}),
    ],
)
def test_the_code_of_a_card_runs(tmp_path, offline, monkeypatch, name, degradation, overrides):
    model = create_model(name, degradation, **TINY | overrides)
    if isinstance(degradation, Darken):
        (tmp_path / "card_operator.py").write_text(
            "class Darken:\n    def A(self, x):\n        return x / 2\n\n    A_adjoint = A\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        model.degradation_name = "card_operator:Darken"
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("a", about="For a test.")
    code = (tmp_path / "a" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    values = {}
    exec(code, values)
    assert values["restored"].shape[-3] == model.channels


def test_hugging_face_folder_whose_weights_lost_their_description(tmp_path, offline, tiny_model):
    """Of three stages with one middle stage, as nothing but config.json says."""
    model = tiny_model(stages=3)
    model.save_pretrained(tmp_path / "a")
    save_file(model.state_dict(), tmp_path / "a" / "model.safetensors")
    loaded = DGUNet.from_pretrained(tmp_path / "a")
    assert same(model, loaded) and loaded.arguments == model.arguments


def test_pushed_to_hugging_face(offline, monkeypatch, tiny_model):
    pushed = {}

    class Api:
        def __init__(self, token):
            assert token == "mine"

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **options):
            pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert tiny_model().push_to_hub("me/rain", token="mine") == "https://huggingface.co/me/rain/commit/1"
    assert sorted(pushed) == ["README.md", "config.json", "model.safetensors"]
    assert b'DGUNet.from_pretrained("me/rain")' in pushed["README.md"]


def test_from_pretrained_of_what_is_not_there(offline, tmp_path, monkeypatch):
    where = dict(revision="main", token=None, cache_dir=None, local_files_only=True, force_download=False)
    for options in {}, where:
        assert same(DGUNet.from_pretrained("denoising_gaussian", **options), load_model("denoising_gaussian"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "me/nothing", "no/such/folder", tmp_path / "none"):
        with pytest.raises(UserError) as error:
            DGUNet.from_pretrained(name, cache_dir=tmp_path / "cache")
        assert str(name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean denoising_gaussian"):
        DGUNet.from_pretrained("denoising_gausian")
