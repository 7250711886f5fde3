"""Checkpoints: written atomically, recognised by themselves, and refused in one line where they do not fit."""

import fractions
import io
import os
import pickle
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dgunet import DGUNet, UserError, create_model, list_models, load_model
from dgunet.apps.compare import write_comparison
from dgunet.checkpoints import load as checkpoint_module
from dgunet.checkpoints.load import describe_model, read_checkpoint, save_checkpoint
from dgunet.checkpoints.safetensors import save_weights
from dgunet.data.images import write_image
from dgunet.data.photos import Photo, write_photo
from dgunet.evaluation.scoresheet import ScoreSheet
from dgunet.model.degradations import Blur, MotionBlur
from dgunet.model.sampling import BlockSampling, block_sampling
from dgunet.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*stages are assumed")


def assert_same_weights(a: nn.Module, b: nn.Module):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def refusal(path, **options) -> str:
    """The message with which load_model refuses a file: one line that names the file."""
    with pytest.raises(UserError) as error:
        load_model(path, **options)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- saving


def test_saved_content_comes_back(tmp_path):
    content = {"epoch": 3, "state_dict": {"a": torch.arange(3.0)}, "history": [1.5, None, "x"]}
    save_checkpoint(content, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(found.pop("state_dict")["a"], torch.arange(3.0))
    assert found == {"epoch": 3, "history": [1.5, None, "x"]}
    assert os.listdir(tmp_path) == ["a.pth"]


def half_a_save(content, file):
    whole = io.BytesIO()
    REAL_SAVE(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    raise OSError("no space left on device")


REAL_SAVE = torch.save


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.pth"
    save_checkpoint({"epoch": 1}, path)

    def fail(*args):
        raise OSError("no space left on device")

    if failing == "write":
        monkeypatch.setattr(checkpoint_module.torch, "save", half_a_save)
    else:
        monkeypatch.setattr(checkpoint_module.os, "fsync" if failing == "fsync" else "replace", fail)
    with pytest.raises(OSError):
        save_checkpoint({"epoch": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


KILLED = """
import io, sys, time, torch
from dgunet.checkpoints import load as checkpoint
real = torch.save
checkpoint.save_checkpoint({"epoch": 1, "x": torch.zeros(1000)}, sys.argv[1])

def slow(content, file):
    whole = io.BytesIO()
    real(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    print("half written", flush=True)
    time.sleep(600)

torch.save = slow
checkpoint.save_checkpoint({"epoch": 2, "x": torch.zeros(1000)}, sys.argv[1])
"""


def test_killed_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as run:
        assert run.stdout.readline() == "half written\n"
        assert len(os.listdir(tmp_path)) == 2  # the old file, and the new one under another name
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert read_checkpoint(path)["epoch"] == 1
    save_checkpoint({"epoch": 3}, path)  # and the next save removes what is left of the killed one
    assert read_checkpoint(path)["epoch"] == 3
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_save_removes_what_killed_ones_left_and_nothing_else(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, days = platform.node(), {}
    stale = [f".a.pth.{here}.{gone.pid}.tmp"]
    days[stale[0]] = 0
    for name in (".a.pth.elsewhere.1.tmp", ".a.pth.123.tmp", f".a.pth.{here}.{os.getppid()}.tmp"):  # whoever's
        stale.append(name.replace(".a.pth.", ".a.pth.old"))
        days |= {name: 0, stale[-1]: 2}
    days |= {f".b.pth.{here}.{gone.pid}.tmp": 2, ".a.pthx.elsewhere.1.tmp": 2, "a.pth.1.tmp": 2}
    for name, age in days.items():
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age * 24 * 3600,) * 2)
    save_checkpoint({"epoch": 1}, tmp_path / "a.pth")
    assert set(os.listdir(tmp_path)) == (days.keys() - {*stale}) | {"a.pth"}


def test_writers_at_once_publish_each_its_own_file(tmp_path):
    """The second begins before the first has ended, and the file is always one of the two, whole."""
    path = tmp_path / "a.png"
    with atomic_write(path) as first:
        first.write_bytes(b"first")
        with atomic_write(path) as second:
            assert second != first and second.name.startswith(".")
            second.write_bytes(b"sec")
            assert not path.exists() and first.read_bytes() == b"first"
        assert path.read_bytes() == b"sec"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.png"]


def test_writers_in_threads_and_failures_leave_nothing_behind(tmp_path):
    path, errors = tmp_path / "out" / "a.txt", []

    def write(number: int):
        for turn in range(20):
            try:
                with atomic_write(path) as temporary:
                    temporary.write_text(str(number) * 1000)
                    if turn % 2:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert path.read_text() in {str(number) * 1000 for number in range(4)}
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("name", ["a" * 250 + ".png", "図" * 80 + ".png", "a\udcff.png", "b [1]*?.png"])
def test_any_name_that_the_disk_takes_can_be_written(tmp_path, name):
    path = tmp_path / name
    with atomic_write(path) as temporary:
        label = temporary.name.partition(f".{platform.node()}.")[0]
        temporary.write_text("x")
    assert path.read_text() == "x" and len(os.listdir(tmp_path)) == 1
    (tmp_path / "below").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / "below" / f"{label}.{platform.node()}.{gone.pid}.0123abcd.tmp"
    left.write_text("half")
    with atomic_write(tmp_path / "below" / name) as temporary:
        assert not left.exists()


def test_errors_name_the_file_that_was_to_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OSError) as error, atomic_write(path) as temporary:
            temporary.write_text("x")
        assert error.value.filename in (str(path), str(path.parent)) and not str(error.value).count(".tmp")
    assert set(os.listdir(tmp_path)) == {"file", "folder.png"}


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_umask_says(tmp_path, tiny_model, umask):
    model, before = tiny_model(stages=1), os.umask(umask)
    try:
        save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "a.pth")
        save_weights(tmp_path / "a.safetensors", model.state_dict(), describe_model(model))
        write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
        write_photo(tmp_path / "a.jpg", Photo(np.zeros((4, 4, 3), np.uint8)), "")
        write_comparison(tmp_path / "a.html", [(tmp_path / "a.jpg", tmp_path / "a.png")])
        ScoreSheet(tmp_path / "scores", "psnr_rgb", {}, {})._write()
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {"a.pth", "a.safetensors", "a.png", "a.jpg", "a.html", "a.txt", "scores.csv"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}
    assert_same_weights(load_model(tmp_path / "a.safetensors"), model)


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_text("before")
    path.chmod(mode)
    with atomic_write(path) as temporary:
        assert temporary.stat().st_mode & 0o077 == mode & 0o077, "never readable for more than the file"
        temporary.write_text("after")
    assert path.read_text() == "after" and path.stat().st_mode & 0o777 == mode


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("layout", ["checkpoint", "bare", "module.", "params"])
def test_small_network_round_trip(tmp_path, tiny_model, layout):
    model = tiny_model(growth=6, final_growth=10)
    weights = model.state_dict()
    if layout == "checkpoint":
        content = {"state_dict": weights, "model": describe_model(model), "epoch": 4}
    elif layout == "module.":
        content = {"state_dict": {f"module.{name}": value for name, value in weights.items()}}
    else:
        content = {"params": weights} if layout == "params" else weights
    torch.save(content, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert loaded.arguments == model.arguments
    y = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(y)[0], model(y)[0], atol=1e-6, rtol=0)


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in weights.items()}


OTHER = nn.Conv2d(3, 3, 3).state_dict()  # of some network beside it
PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "model._orig_mod."]
PREFIXES += ["model.module.", "generator.", "model.net_g.", "self.backbone.module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_and_of_modules_around(tmp_path, tiny_model, prefix):
    model = tiny_model(stages=2)
    weights = prefixed(model.state_dict(), prefix)
    if set(prefix.split(".")) - {"module", "_orig_mod", ""}:  # the module around has another network
        weights["loss.vgg.0.weight"] = torch.zeros(3)
    for content in (weights, {"state_dict": weights, "epoch": 3}):
        torch.save(content, tmp_path / "a.pth")
        assert_same_weights(load_model(tmp_path / "a.pth"), model)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_parts_that_were_wrapped(tmp_path, tiny_model, wrapper):
    model = tiny_model(stages=2)
    weights = {name.replace("first.", f"first.{wrapper}."): value for name, value in model.state_dict().items()}
    assert weights.keys() != model.state_dict().keys()
    torch.save(weights, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), model)


@pytest.mark.parametrize(
    "keys",
    [
        "model_state_dict",
        "net",
        "generator",
        "params",
        "model",
        "weights",
        "network.state_dict",
        "state.model",
        "model.module",
    ],
)
def test_keys_that_others_keep_weights_under(tmp_path, tiny_model, keys):
    model = tiny_model(stages=2)
    content = model.state_dict()
    for key in reversed(keys.split(".")):
        content = {
            key: content,
            "epoch": 3,
            "discriminator": OTHER,
            "optimizer": {"state": {0: {"exp_avg": torch.rand(3)}}},
        }
    torch.save(content, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), model)


@pytest.mark.parametrize(
    "key",
    [
        "params_ema",
        "ema",
        "state_dict_ema",
        "model_ema",
        "ema_state_dict",
        "ema_model_state_dict",
        "averaged",
        "swa_model",
    ]
    + ["g_ema", "EMA", "net_g-ema", "ema.module", "ema.state_dict", "state_dict:model_ema.", "state_dict:ema_model."]
    + ["AveragedModel", "ema:module."],
)
@pytest.mark.parametrize("other", ["params", "state_dict", "model", "net"])
def test_averaged_weights_are_meant_where_there_are_some(tmp_path, tiny_model, key, other):
    last, averaged = tiny_model(stages=2, seed=1), tiny_model(stages=2, seed=2)
    weights, (key, _, prefix) = averaged.state_dict(), key.partition(":")
    if key == "AveragedModel":
        swa = torch.optim.swa_utils.AveragedModel(last)
        swa.update_parameters(averaged)
        key, weights = "swa_net", swa.state_dict()
        assert weights["n_averaged"] == 1
    if key == "state_dict":
        content = {"state_dict": prefixed(last.state_dict(), "model.") | prefixed(weights, prefix)}
    else:
        content = prefixed(weights, prefix)
        for part in reversed(key.split(".")):
            content = {part: content}
        content = {other: last.state_dict(), **content, "ema_decay": 0.999, "swa": None}
    torch.save(content, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), averaged)
    torch.save({name: value for name, value in content.items() if name != other or key == other}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), averaged)


def test_averaged_model_that_has_not_begun_is_not_taken(tmp_path, tiny_model):
    last, first = tiny_model(stages=2, seed=1), tiny_model(stages=2, seed=2)
    swa = torch.optim.swa_utils.AveragedModel(first)
    torch.save({"model": last.state_dict(), "swa_model": swa.state_dict()}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), last)
    swa.update_parameters(first)
    torch.save(swa.state_dict(), tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), first)


def test_training_states_of_ours_give_the_averaged_weights_or_none(tmp_path, tiny_model):
    raw, averaged = tiny_model(stages=2, seed=1), tiny_model(stages=2, seed=2)
    content = {"state_dict": averaged.state_dict(), "raw_state_dict": raw.state_dict(), "averaged": 3}
    torch.save(content, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth"), averaged)
    torch.save(content | {"state_dict": {}}, tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["keys", "prefixes", "two averaged"])
def test_ambiguous_files_are_refused_with_what_is_there(tmp_path, tiny_model, kind):
    one, two = tiny_model(stages=2, seed=1).state_dict(), tiny_model(stages=2, seed=2).state_dict()
    content, told = {
        "keys": ({"net_a": one, "net_b": two}, ["net_a", "net_b"]),
        "prefixes": ({"state_dict": prefixed(one, "student.") | prefixed(two, "teacher.")}, ["student", "teacher"]),
        "two averaged": ({"ema": one, "swa": two}, ["ema", "swa"]),
    }[kind]  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert all(word in message for word in told)


def test_what_lies_in_a_file_without_a_network_is_told(tmp_path):
    torch.save({"unet": OTHER, "step": 3}, tmp_path / "a.pth")
    assert "unet" in refusal(tmp_path / "a.pth")
    torch.save(OTHER, tmp_path / "a.pth")
    assert "bias" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "overrides",
    [dict(stages=k) for k in (1, 2, 3, 5)]
    + [dict(shared=False, stages=4), dict(pathways=False, stages=3), dict(channels=1)]
    + [dict(fusion="concat", stages=3), dict(final_fusion="subspace", stages=5)]
    + [dict(isff="additive", stages=2), dict(isff="none"), dict(fusion="none"), dict(fusion="none", attention=True)]
    + [dict(fusion="none", isff="none"), dict(attention=True, stages=3), dict(gradient=False, stages=2)],
    ids=str,
)
def test_options_are_stored_with_the_weights(tmp_path, tiny_model, overrides):
    model = tiny_model(**overrides)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", task="denoising")
    assert (loaded.name, loaded.arguments) == (model.name, model.arguments)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("isff", ["adaptive", "additive", "none"])
@pytest.mark.parametrize("fusion", ["subspace", "concat", "none"])
@pytest.mark.parametrize("gradient", [True, False])
def test_bare_weights_tell_which_parts_there_are(tmp_path, tiny_model, isff, fusion, gradient):
    model = tiny_model(isff=isff, fusion=fusion, gradient=gradient)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert_same_weights(loaded, model)
    y = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(y)[0], model(y)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gone", ["last.proximal.shallow.conv.weight", "first.proximal.encoder.blocks.0.conv1.weight"])
def test_described_network_is_not_guessed(tmp_path, tiny_model, gone):
    """Of what is described, every fault of the weights is listed, also where they would not do to tell the network."""
    model = tiny_model(stages=3)
    weights = {name: value for name, value in model.state_dict().items() if name not in (gone, "last.rho")}
    torch.save({"state_dict": weights, "model": describe_model(model)}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert gone in message and "last.rho" in message


def test_known_degradation_that_is_described_is_not_guessed(tmp_path):
    """Without gradient steps nothing in the weights tells of it, but x_0 is A_adjoint(y)."""
    for known in (MotionBlur(3, 9), HalfBrightness()):
        model = DGUNet(1, 8, 4, 2, final_growth=4, gradient=False, degradation=known)
        torch.save({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "a.pth")
        if isinstance(known, MotionBlur):
            assert load_model(tmp_path / "a.pth").degradation.settings() == known.settings()
        else:
            assert "degradation=" in refusal(tmp_path / "a.pth")
            assert load_model(tmp_path / "a.pth", degradation=known).degradation is known


def test_number_of_stages_that_is_assumed_is_told(tmp_path, tiny_model):
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    torch.save({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "told.pth")
    with pytest.warns(UserWarning, match="bare.pth.* 7 stages") as caught:
        assert load_model(tmp_path / "bare.pth").stages == 7
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / "told.pth")


def test_files_from_before_the_parts_were_told_apart(tmp_path, tiny_model):
    """``fusion="concat"`` once meant additive ISFF and the attention as well."""
    model = tiny_model(fusion="concat", isff="additive", attention=True, stages=3)
    description = describe_model(model)
    for name in ("isff", "attention", "gradient"):
        del description["arguments"][name]
    save_checkpoint({"state_dict": model.state_dict(), "model": description}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert loaded.arguments == model.arguments
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("name", list_models())
def test_bare_weights_of_every_variant_are_recognised(tmp_path, name, monkeypatch):
    with torch.device("meta"):
        model = create_model(name)
    # Names and shapes alone decide: one number stands for all of a weight.
    weights = {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 1e6
    monkeypatch.setattr(checkpoint_module, "load_weights", lambda *args: None)
    with torch.device("meta"):
        loaded = load_model(tmp_path / "a.pth", device="meta")
    assert {loaded.name, name} in ({name}, {"denoising_dgunet", "deblurring_dgunet"})
    shapes = {key: value.shape for key, value in loaded.state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("task", ["denoising", "deblurring"])
def test_bare_weights_get_the_name_of_the_task(tmp_path, task, monkeypatch):
    with torch.device("meta"):
        weights = create_model("denoising_dgunet").state_dict()
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in weights.items()}, tmp_path / "a.pth")
    monkeypatch.setattr(checkpoint_module, "load_weights", lambda *args: None)
    with torch.device("meta"):
        assert load_model(tmp_path / "a.pth", task=task, device="meta").name == f"{task}_dgunet"


@pytest.mark.parametrize("ratio", [0.01, 0.25])
def test_sampling_matrix_comes_with_the_weights(tmp_path, tiny_model, ratio):
    model = tiny_model("compressive_sensing_dgunet", ratio=ratio)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert_same_weights(loaded, model)
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(loaded.degradation.A(x), model.degradation.A(x))


class HalfBrightness:
    def A(self, x):
        return 0.5 * x

    def A_adjoint(self, y):
        return 0.5 * y


@pytest.mark.parametrize("learned", [True, False])
def test_known_degradations_come_with_their_kind(tmp_path, tiny_model, learned):
    sampling = tiny_model("compressive_sensing_dgunet", ratio=0.1, learned=learned)
    blur = create_model("deblurring_dgunet", Blur(torch.rand(3, 5)), width=8, growth=4, final_growth=4)
    for model, task in ((sampling, "compressive_sensing"), (blur, "deblurring")):
        torch.save({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "a.pth")
        loaded = load_model(tmp_path / "a.pth", task=task)
        assert_same_weights(loaded, model)
        assert type(loaded.degradation) is type(model.degradation) and loaded.name == model.name
        assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    scalable = block_sampling((0.1, 0.4), 8, learned)
    for known in (Blur(torch.rand(3, 5), noise=0.01), MotionBlur(3, 9, 0.01), scalable):
        model = DGUNet(1, 8, 4, 2, final_growth=4, degradation=known)
        torch.save({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "a.pth")
        assert load_model(tmp_path / "a.pth").degradation.settings() == known.settings()
    # as files said it before there were other kinds
    old = {"name": sampling.name, "arguments": sampling.arguments, "learned_matrix": learned}
    torch.save({"state_dict": sampling.state_dict(), "model": old}, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth").degradation.learned == learned


@pytest.mark.parametrize(
    "known",
    [3, None, [], {}, {"kind": 3}, {"kind": "fog"}, {"kind": "blur"}, {"kind": "block_sampling"}]
    + [{"kind": "block_sampling", "block": 32, "learned": value} for value in ("no", 3, None)]
    + [{"kind": "block_sampling", "block": value, "learned": True} for value in (16, -32, "32", 10**30, 32.5)]
    + [{"kind": "block_sampling", "block": 32, "learned": True, "ratio": 0.1}]
    + [{"kind": "scalable_sampling", "block": 32, "learned": True}]
    + [{"kind": "scalable_sampling", "lowest": n, "block": 32, "learned": True} for n in (0, 104, 1.0, True, "1")],
    ids=str,
)
def test_damaged_description_of_a_degradation(tmp_path, tiny_model, known):
    model = tiny_model("compressive_sensing_dgunet", ratio=0.1)
    description = describe_model(model) | {"degradation": known}
    torch.save({"state_dict": model.state_dict(), "model": description}, tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


def test_own_degradation_has_to_be_given(tmp_path):
    model = DGUNet(width=8, growth=4, final_growth=4, degradation=HalfBrightness())
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert "degradation=" in refusal(tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", degradation=HalfBrightness()), model)


def test_own_degradation_with_weights_has_to_be_given(tmp_path):
    class Operator(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.rand(5, 7))  # like a sampling matrix, but of no square block

        A = A_adjoint = lambda self, x: x

    model = DGUNet(width=8, growth=4, final_growth=4, degradation=Operator())
    torch.save(model.state_dict(), tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", degradation=Operator()), model)


@pytest.mark.parametrize("saved", [Blur(torch.ones(3, 3)), MotionBlur(3, 9), BlockSampling(0.5, 8, learned=False)])
@pytest.mark.parametrize("given", [Blur(torch.ones(3, 3) / 9), Blur(torch.ones(5, 5) / 25), MotionBlur(3, 5)])
def test_fixed_degradation_that_is_given_stays_as_it_is(tmp_path, saved, given):
    model = DGUNet(1, 8, 4, 2, final_growth=4, degradation=saved)
    torch.save({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "a.pth")
    before = {name: value.clone() for name, value in given.state_dict().items()}
    loaded = load_model(tmp_path / "a.pth", degradation=given)
    assert loaded.degradation is given and all(torch.equal(given.state_dict()[name], before[name]) for name in before)
    assert_same_weights(loaded.last, model.last)
    assert type(load_model(tmp_path / "a.pth").degradation) is type(saved)


def test_fixed_matrix_that_is_given_stays_and_a_learned_one_does_not(tmp_path, tiny_model):
    whole = tiny_model("compressive_sensing_dgunet", ratio=0.1)
    torch.save(whole.state_dict(), tmp_path / "a.pth")
    matrix = torch.rand(51, 32**2)
    fixed = load_model(tmp_path / "a.pth", degradation=BlockSampling(learned=False, matrix=matrix))
    assert torch.equal(fixed.degradation.matrix, matrix)
    assert "degradation.matrix (103, 1024) instead of (51, 1024)" in refusal(
        tmp_path / "a.pth", degradation=BlockSampling(matrix=matrix)
    )


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_used_in_float32(tmp_path, tiny_model, precision):
    weights = {name: value.to(precision) for name, value in tiny_model().state_dict().items()}
    torch.save(weights, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth").state_dict()
    for name, value in weights.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], value.float())


def test_loading_leaves_random_numbers_and_the_own_degradation_alone(tmp_path, tiny_model):
    """The network is built without values, which would only be replaced; an operator that was given keeps its parts."""
    operator = BlockSampling(0.1)
    matrix, whole = operator.matrix, tiny_model("compressive_sensing_dgunet", ratio=0.1)
    torch.save(whole.state_dict(), tmp_path / "a.pth")
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "a.pth", degradation=operator)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(loaded, whole)
    assert loaded.degradation.matrix is matrix and all(p.requires_grad for p in loaded.parameters())


# --------------------------------------------------------------------------------------------------------------- files


def test_no_file(tmp_path):
    refusal(tmp_path / "a.pth")


def test_folder(tmp_path):
    assert "folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n", b"# notes\n", b'{"a": 1}\n', b"<html>404</html>", b"version https://git-lfs.github.com\n"]
    + [b"weights", bytes(range(256)) * 5, b"PK\x03\x04 and so on"],
    ids=lambda content: repr(content[:12]),
)
def test_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, tiny_model, share):
    torch.save(tiny_model().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(share * len(content))])
    refusal(tmp_path / "a.pth")


def test_flipped_bit_in_any_record_is_refused(tmp_path, tiny_model):
    torch.save(tiny_model(width=4, growth=2, stages=1).state_dict(), tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        records = archive.infolist()
    assert len(records) > 10
    for record in records:
        # The data begin after the local header: 30 bytes, the name, and an extra field that aligns them.
        header = content[record.header_offset :][:30]
        start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        damaged = bytearray(content)
        damaged[start + record.file_size // 2] ^= 4
        (tmp_path / "a.pth").write_bytes(damaged)
        refusal(tmp_path / "a.pth")


def test_format_before_pytorch_1_6(tmp_path, tiny_model):
    model = tiny_model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same_weights(load_model(tmp_path / "a.pth"), model)


def test_name_that_no_disk_takes(tmp_path):
    refusal(tmp_path / ("a" * 300))


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def write_malicious(path: Path, trace: Path, layout: str):
    content = {"state_dict": {"last.rho": torch.zeros(1)}, "model": Malicious(trace)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_malicious_file_is_refused_and_does_nothing(tmp_path, layout):
    trace = tmp_path / "trace"
    write_malicious(tmp_path / "a.pth", trace, layout)
    message = refusal(tmp_path / "a.pth")
    assert not trace.exists()
    if layout != "pickle":  # PyTorch cannot read a plain pickle at all
        assert "getattr" in message
    # and the file would have done it
    if layout == "pickle":
        pickle.loads((tmp_path / "a.pth").read_bytes())
    else:
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert trace.exists()


def test_whole_pickled_model_says_what_to_save_instead(tmp_path, tiny_model):
    torch.save(tiny_model(), tmp_path / "a.pth")
    assert "model.state_dict()" in refusal(tmp_path / "a.pth")


NUMBERS = [np.float64(31.25), np.float32(1.5), np.array([3.5], ">f8")[0], np.int64(-3), np.uint8(200), np.bool_(True)]


@pytest.mark.parametrize("number", [*NUMBERS, np.complex128(1 + 2j)], ids=repr)
@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_beside_the_weights(tmp_path, tiny_model, number, legacy):
    model, before = tiny_model(stages=1), set(torch.serialization.get_safe_globals())
    content = {"state_dict": model.state_dict(), "model": describe_model(model), "beside": number}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert_same_weights(load_model(tmp_path / "a.pth"), model)
    assert read_checkpoint(tmp_path / "a.pth")["beside"] == number
    assert set(torch.serialization.get_safe_globals()) == before  # nothing is allowed to other readers


def test_numpy_numbers_as_older_versions_wrote_them(tmp_path, tiny_model):
    model = tiny_model(stages=1)
    torch.save({"state_dict": model.state_dict(), "psnr": np.float64(2.5)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "a.pth", "w") as old:
        for record in new.infolist():
            data = new.read(record)
            if record.filename.endswith("/data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(record.filename, data)
    assert read_checkpoint(tmp_path / "a.pth")["psnr"] == 2.5


@pytest.mark.parametrize(
    "value, name",
    [(nn.Conv2d(1, 1, 1), "Conv2d"), (os.system, "system"), (print, "print"), (fractions.Fraction(1, 2), "Fraction")]
    + [(np.random.default_rng(0), "numpy.random"), (np.arange(3), "numpy"), (np.str_("abc"), "numpy")]
    + [(Path("x"), "Path")],
)  # fmt: skip
def test_objects_that_are_refused_are_named(tmp_path, tiny_model, value, name):
    torch.save({"state_dict": tiny_model(stages=1).state_dict(), "beside": value}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert name in message and "damaged" not in message


@pytest.mark.parametrize("kind", ["protocol 4", "pickle of protocol 4", "TorchScript"])
def test_files_of_other_kinds_are_not_called_damaged(tmp_path, tiny_model, kind):
    path, content = tmp_path / "a.pth", {"state_dict": tiny_model(stages=1).state_dict()}
    if kind == "protocol 4":
        torch.save(content, path, pickle_protocol=4)
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 1)), path)
    else:
        path.write_bytes(pickle.dumps(content, 4))
    message = refusal(path)
    assert kind.removeprefix("pickle of ") in message and "damaged" not in message


# --------------------------------------------------------------------------------------------- contents that do not fit


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], "text"], ids=["tensor", "list", "text"])
def test_content_without_names(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert type(content).__name__ in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, {"state_dict": {}}, nn.Conv2d(3, 3, 3).state_dict()])
def test_weights_of_another_network(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert "DGUNet" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "description",
    [{"arguments": {"widht": 8}}, {"arguments": {"width": "wide"}}, {"arguments": 3}, {"arguments": {"stages": 0}}]
    + [{}, {"arguments": {}}, {"name": "denoising_dgunet"}, {"name": ["x"], "arguments": {"stages": 7}}]
    + [{"arguments": [("stages", 7)]}, {"arguments": {"stages": 7, 3: 4}}, {"arguments": {"stages": 7, "rho": 1.0}}]
    + [{"arguments": {"stages": 7, "degradation": 1}}, {"arguments": {"stages": 7, "checkpointing": True}}]
    + [{"arguments": {"stages": value}} for value in (10**9, -1, True, 7.0, "7", None, torch.tensor(7))]
    + [{"arguments": {"stages": 7, name: 1000}} for name in ("width", "growth", "channels", "final_growth")]
    + ["denoising_dgunet", None, 3, [], torch.zeros(2)],
    ids=str,
)
def test_damaged_description(tmp_path, tiny_model, description):
    if isinstance(description, dict):
        description = {"name": None} | description
    torch.save({"state_dict": tiny_model().state_dict(), "model": description}, tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e300], ids=str)
def test_weights_that_are_no_finite_numbers(tmp_path, tiny_model, number):
    weights = tiny_model().state_dict()
    name = "middle.0.proximal.features_conv.weight"
    weights[name] = weights[name].double()
    weights[name][1, 2] = number
    torch.save(weights, tmp_path / "a.pth")
    assert name in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["last.two\nlines", "last.\ud800", "last.\x1b[31mred", "last." + "x" * 10**5])
def test_odd_names_are_told_in_one_short_line(tmp_path, tiny_model, name):
    torch.save(tiny_model().state_dict() | {name: torch.zeros(1)}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert "last." in message and message.isprintable() and len(message) < 1000


def test_convolution_of_another_number_of_dimensions(tmp_path, tiny_model):
    weights = tiny_model().state_dict()
    weights["last.proximal.shallow.conv.weight"] = torch.zeros(8)
    torch.save(weights, tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


def test_checkpoint_of_another_task(tmp_path, tiny_model):
    model = tiny_model("deraining_dgunet")
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", task="denoising")
    assert "deraining_dgunet" in message and "denoising" in message
    assert load_model(tmp_path / "a.pth", task="deraining").name == "deraining_dgunet"


@pytest.mark.parametrize(
    "name",
    ["first.rho", "last.rho", "middle.0.rho", "last.degradation.A.conv1.weight", "first.proximal.features_conv.weight"]
    + ["middle.0.proximal.fusion.basis_conv.bias", "last.proximal.fusion.conv.weight"]
    + ["first.proximal.encoder.blocks.0.conv1.weight", "last.proximal.shallow.conv.weight"],
)
def test_missing_weight_is_listed(tmp_path, tiny_model, name):
    weights = tiny_model().state_dict()
    del weights[name]
    torch.save(weights, tmp_path / "a.pth")
    assert name in refusal(tmp_path / "a.pth")


def test_unknown_and_reshaped_weights_are_listed(tmp_path, tiny_model):
    weights = tiny_model().state_dict()
    weights |= {"first.fancy": torch.zeros(1), "last.rho": torch.zeros(2)}
    torch.save(weights, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert "first.fancy" in message and "last.rho (2,)" in message and "last.degradation" not in message


def test_many_missing_weights_are_counted(tmp_path, tiny_model):
    weights = {name: value for name, value in tiny_model().state_dict().items() if "decoder" not in name}
    gone = len(tiny_model().state_dict()) - len(weights)
    torch.save(weights, tmp_path / "a.pth")
    assert str(gone - 6) in refusal(tmp_path / "a.pth")


def test_matrix_of_another_ratio_does_not_fit(tmp_path, tiny_model):
    torch.save(tiny_model("compressive_sensing_dgunet", ratio=0.1).state_dict(), tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", degradation=BlockSampling(0.25))
    assert "degradation.matrix (103, 1024)" in message
