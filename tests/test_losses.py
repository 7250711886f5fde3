"""The losses as a sum over stages; test_parity.py has their values beside the original's."""

import pytest
import torch
from torch import nn

from dgunet import UserError
from dgunet.training.config import load_config
from dgunet.training.losses import LOSSES, StageLoss


class Own(nn.Module):
    """A user's loss, with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, restored, target):
        return self.scale * (restored - target).abs().mean()


@pytest.mark.parametrize("name", [*LOSSES, "own"])
def test_buffers_of_every_loss_move_with_it(name, monkeypatch):
    monkeypatch.setitem(LOSSES, "own", Own)
    loss = StageLoss({name: 1.0}).to("meta")
    assert loss([torch.rand(1, 3, 8, 8, device="meta")], torch.rand(1, 3, 8, 8, device="meta")).device.type == "meta"


def test_sum_over_losses_and_stages(monkeypatch):
    monkeypatch.setitem(LOSSES, "own", Own)
    torch.manual_seed(0)
    target, *estimates = 3 * torch.rand(3, 1, 3, 8, 8) - 1
    found = StageLoss({"mse": 0.5, "edge": 0.0, "own": 0.25})(estimates, target)
    expected = sum(0.5 * (x - target).square().mean() + 0.5 * (x - target).abs().mean() for x in estimates)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert StageLoss({"mse": 1.0}, clamp=True)([estimates[0]], estimates[0].clamp(0, 1)).item() == 0


def test_every_loss_has_a_weight_in_the_config():
    assert load_config().LOSS.keys() >= {name.upper() for name in LOSSES}


def test_impossible_losses_are_refused():
    with pytest.raises(UserError, match="'mze'.*charbonnier, edge, mse"):
        StageLoss({"mze": 1.0})
    with pytest.raises(UserError, match="LOSS.CHARBONNIER, LOSS.EDGE, LOSS.MSE"):
        StageLoss({"charbonnier": 0.0})
