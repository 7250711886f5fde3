"""The learning rate of every epoch, and when validation is due."""

import math

import pytest
import torch

from dgunet import UserError
from dgunet.config import load_config
from dgunet.schedule import EpochSchedule, validation_steps

BASE, LOWEST = 2e-4, 1e-6


def config(**options):
    words = [str(word) for key, value in options.items() for word in (key.replace("__", "."), value)]
    return load_config(None, words)


def optim(epochs=20, warmup=3, **options):
    options = {f"OPTIM.{key}": value for key, value in options.items()}
    return config(
        **{"OPTIM.NUM_EPOCHS": epochs, "OPTIM.WARMUP_EPOCHS": warmup, "OPTIM.LR_INITIAL": BASE}
        | {"OPTIM.LR_MIN": LOWEST}
        | options
    ).OPTIM


def rates(options, jumps=None) -> dict[int, float]:
    """{epoch: learning rate}, going to every epoch, or only to some."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=options.LR_INITIAL)
    schedule = EpochSchedule(optimizer, options)
    found = {}
    for epoch in jumps or range(1, options.NUM_EPOCHS + 1):
        schedule.go_to(epoch)
        found[epoch] = optimizer.param_groups[0]["lr"]
    return found


@pytest.mark.parametrize("epochs", [4, 5, 80, 250])
def test_cosine_after_linear_warm_up(epochs):
    found = rates(optim(epochs))
    for epoch, rate in found.items():
        if epoch <= 3:
            expected = BASE * epoch / 3
        else:
            expected = LOWEST + (BASE - LOWEST) * (1 + math.cos(math.pi * (epoch - 3) / (epochs - 3))) / 2
        assert rate == pytest.approx(expected, rel=1e-12)


def test_shape_of_the_curve():
    found = list(rates(optim(50)).values())
    assert found[:3] == pytest.approx([BASE / 3, 2 * BASE / 3, BASE], rel=1e-12)
    assert all(a > b for a, b in zip(found[2:], found[3:], strict=False))  # from epoch 4 on below the base rate
    assert found[-1] == pytest.approx(LOWEST, rel=1e-12)


def test_longer_cosine_of_denoising():
    found = rates(optim(80, COSINE_EXTRA_EPOCHS=40))
    for epoch in range(4, 81):
        expected = LOWEST + (BASE - LOWEST) * (1 + math.cos(math.pi * (epoch - 3) / 117)) / 2
        assert found[epoch] == pytest.approx(expected, rel=1e-12)
    assert found[80] > 0.2 * BASE


def test_step():
    found = rates(optim(250, warmup=0, SCHEDULE="step", LR_MILESTONES="[60, 120, 180, 240]"))
    expected = {1: 1, 60: 1, 61: 1 / 2, 120: 1 / 2, 121: 1 / 4, 180: 1 / 4, 181: 1 / 8, 240: 1 / 8, 241: 1 / 16}
    assert {epoch: found[epoch] / BASE for epoch in expected} == pytest.approx(expected, rel=1e-12)


def test_constant():
    assert set(rates(optim(10, warmup=0, SCHEDULE="constant")).values()) == {BASE}
    found = rates(optim(10, warmup=2, SCHEDULE="constant"))
    assert list(found.values()) == pytest.approx([BASE / 2] + [BASE] * 9, rel=1e-12)


def test_cosine_without_warm_up():
    found = rates(optim(10, warmup=0))
    assert found[1] < BASE
    assert found[5] == pytest.approx((BASE + LOWEST) / 2, rel=1e-12)
    assert found[10] == pytest.approx(LOWEST, rel=1e-12)


@pytest.mark.parametrize("options", [dict(), dict(warmup=0), dict(warmup=1), dict(COSINE_EXTRA_EPOCHS=40)], ids=str)
def test_a_jump_is_the_sum_of_the_steps(options):
    stepwise = rates(optim(**options))
    for epoch in (1, 2, 3, 4, 5, 12, 20):
        assert rates(optim(**options), [epoch])[epoch] == stepwise[epoch]
    assert rates(optim(**options), [2, 9, 9]) == {2: stepwise[2], 9: stepwise[9]}


def test_every_parameter_group_keeps_its_own_rate():
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:], "lr": BASE / 10}], lr=BASE)
    schedule = EpochSchedule(optimizer, optim(20))
    for epoch in (1, 3, 4, 20):
        schedule.go_to(epoch)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 10, rel=1e-12)


def test_unknown_schedule():
    with pytest.raises(UserError, match="cosine, constant or step, got 'linear'"):
        rates(optim(SCHEDULE="linear"))


def test_no_warnings(recwarn):
    rates(optim())
    assert not recwarn.list


# ---------------------------------------------------------------------------------------------------------- validation


def due(steps=10, **options) -> dict[int, set[int]]:
    cfg = config(OPTIM__NUM_EPOCHS=80, **{f"TRAINING.{key}": value for key, value in options.items()})
    found = {epoch: validation_steps(epoch, steps, cfg) for epoch in range(1, 81)}
    return {epoch: steps for epoch, steps in found.items() if steps}


def test_validation_every_few_epochs():
    assert due() == {epoch: {10} for epoch in range(1, 81)}
    assert due(VAL_AFTER_EVERY=5) == {epoch: {10} for epoch in range(5, 81, 5)}
    assert due(VAL_AFTER_EVERY=30) == {30: {10}, 60: {10}, 80: {10}}  # and at the end


def test_validation_of_denoising():
    found = due(steps=600, VAL_TIMES=3, VAL_EPOCHS="[1, 25, 45]", VAL_FROM_EPOCH=61)
    assert list(found) == [1, 25, 45, *range(61, 81)]
    assert set(map(frozenset, found.values())) == {frozenset({200, 400, 600})}


@pytest.mark.parametrize(
    ("steps", "times", "expected"), [(10, 3, {3, 7, 10}), (2, 3, {1, 2}), (1, 3, {1}), (7, 1, {7})]
)
def test_validations_within_an_epoch(steps, times, expected):
    assert due(steps, VAL_TIMES=times)[1] == expected


def test_only_the_epochs_given():
    assert due(VAL_EPOCHS="[7]") == {7: {10}, 80: {10}}
