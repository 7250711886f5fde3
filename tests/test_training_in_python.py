"""train() in Python, on data sets of others; docs/training_in_python.md."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dgunet import UserError, load_model
from dgunet.checkpoints.load import read_checkpoint
from dgunet.data.datasets import CenterCropDataset, PairedPatches
from dgunet.data.tensors import SeededPairs
from dgunet.training import train

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"DEVICE": "cpu", "TRAINING.WORKERS": 0, "OPTIM.WARMUP_EPOCHS": 0, "LOSS.EDGE": 0.05}


class Noisy(torch.utils.data.Dataset):
    """Random in all three ways; ``stop_at``: the sample that interrupts the training."""

    def __init__(self, count: int, shape=(3, 16, 24), stop_at: int | None = None):
        self.images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))
        self.stop_at, self.seen = stop_at, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.seen += 1
        if self.seen == self.stop_at:
            raise KeyboardInterrupt
        noise = torch.randn(self.images[index].shape) * np.random.rand() * random.random()
        return self.images[index] + 0.2 * noise, self.images[index]


def model_of(tiny_model):
    return tiny_model(stages=2, seed=1).train()


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training_in_python.md").read_text(), flags=re.DOTALL)
    names: dict = {"__name__": "page"}
    for block in blocks[:-1]:  # the last is of GoPro
        exec(compile(block, "training_in_python.md", "exec"), names)
    assert "Datasets/GoPro" in blocks[-1]
    assert names["restored"].shape == (1, 32, 32) and names["trained"].best == tmp_path / "runs/shapes/model_best.pth"
    assert names["trained"].history[-1]["psnr"] > names["trained"].history[0]["psnr"]


def test_a_run_that_is_interrupted_ends_as_one_that_is_not(tmp_path, tiny_model):
    settings = dict(epochs=3, batch_size=2, lr=1e-3, options=OPTIONS | {"TRAINING.SAVE_MINUTES": 0.0})
    whole = train(model_of(tiny_model), Noisy(6), Noisy(2), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):  # one read is for its size
        train(model_of(tiny_model), Noisy(6, stop_at=13), Noisy(2), tmp_path / "parts", **settings)
    assert read_checkpoint(tmp_path / "parts/model_latest.pth")["epoch"] == 2
    with pytest.raises(UserError, match="holds another run"):
        train(model_of(tiny_model), Noisy(6), Noisy(2), tmp_path / "parts", **settings)
    parts = train(model_of(tiny_model), Noisy(6), Noisy(2), tmp_path / "parts", resume=True, **settings)
    for name in ("model_best.pth", "model_latest.pth"):
        one, other = (read_checkpoint(tmp_path / run / name)["state_dict"] for run in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [row["loss"] for row in parts.history] == [row["loss"] for row in whole.history]
    assert (parts.epoch, parts.psnr) == (whole.epoch, whole.psnr) and load_model(parts.best).stages == 2
    with pytest.raises(UserError, match="the data set is not what .* was trained on: 2 new"):
        train(model_of(tiny_model), Noisy(8), Noisy(2), tmp_path / "parts", resume=True, **settings)


def test_samples_are_those_of_their_epoch_and_index_whatever_was_drawn_before():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    data = SeededPairs(Noisy(3))
    before, first = state(), [data[1, 2][0], data[2, 2][0], data[1, 5][0]]  # 5 is sample 2 again, in another way
    assert state() == before
    assert not any(torch.equal(one, other) for one, other in zip(first, first[1:] + first[:1], strict=True))
    torch.rand(1), np.random.rand(), random.random()
    assert torch.equal(data[1, 2][0], first[0]) and torch.equal(data[1, 2][1], Noisy(3)[2][1])


def test_data_sets_of_ours(tmp_path, tiny_model, image_pairs):
    image_pairs(tmp_path / "pairs", count=3)
    trained = train(
        model_of(tiny_model), PairedPatches(tmp_path / "pairs", 16), CenterCropDataset(tmp_path / "pairs", 0),
        tmp_path / "run", config=ROOT / "configs/denoising/quickstart.yaml", epochs=1, options=OPTIONS,
    )  # fmt: skip
    assert len(trained.history) == 1 and "EMA_DECAY: 0.98" in (trained.folder / "config.yaml").read_text()


class Changed(Noisy):
    def __init__(self, change):
        super().__init__(4)
        self.change = change

    def __getitem__(self, index):
        return self.change(index, *super().__getitem__(index))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda i, y, x: y, "sample 0 of the training set is not .input, target."),
        (lambda i, y, x: (y.numpy(), x.numpy()), "two tensors"),
        (lambda i, y, x: (y, x[:, :8]), "differ in shape"),
        (lambda i, y, x: (y, 255 * x), "values from .* give uint8"),
        (lambda i, y, x: (y.int(), x.int()), "torch.int32"),
        (lambda i, y, x: (y[:, 1:], x[:, 1:]), "multiples of 8, got 3 x 15 x 24"),
        (lambda i, y, x: (y[:, : 8 + 8 * (i < 1)], x[:, : 8 + 8 * (i < 1)]), "sample [123] .* crop to one size"),
        (lambda i, y, x: (y[:1], x[:1]), "3 channels, but the training images have 1"),
    ],
)
def test_other_data_are_refused(tmp_path, tiny_model, change, told):
    with pytest.raises(UserError, match=told):
        train(
            model_of(tiny_model), Changed(change), Noisy(2), tmp_path / "run", epochs=1, batch_size=4, options=OPTIONS
        )


def test_settings_that_are_none(tmp_path, tiny_model):
    for options, told in (
        ({"OPTIM.X": 1}, "unknown config key OPTIM.X"),
        ({"SEED": "much"}, "SEED must be"),
    ):
        with pytest.raises(UserError, match=told):
            train(model_of(tiny_model), Noisy(2), Noisy(2), tmp_path / "run", epochs=1, options=options)
    with pytest.raises(UserError, match="the validation set is empty"):
        train(model_of(tiny_model), Noisy(2), Noisy(0), tmp_path / "run", epochs=1, options=OPTIONS)
