"""The learning rate of every epoch, and when validation is due."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_engine import folders, make_trainer  # noqa: F401  fixtures

from dgunet import UserError
from dgunet.checkpoints.load import read_checkpoint
from dgunet.training.config import load_config
from dgunet.training.schedule import EpochSchedule, RunClock, validation_steps

BASE, LOWEST = 2e-4, 1e-6
SHIPPED = sorted(Path(__file__).parents[1].glob("*/pretrained_models/*/config*.yaml"))


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


def originals(epochs: int, base: float, lowest: float = 1e-6, extra: int = 0, warmup: int = 3) -> dict[int, float]:
    """{epoch: learning rate} of the original's chained schedulers, longhand.

    Warm-up with a multiplier of 1, of which a step is made before the first epoch. One epoch late, and from then on, it
    asks CosineAnnealingLR, whose recursion goes on from the rate it finds, for its step 0, 1, 2, ...
    """
    period, rate, found = epochs - warmup + extra, 0.0, {}
    for epoch in range(1, epochs + 1):
        if epoch <= warmup:
            rate = base * epoch / warmup
        else:
            k = epoch - warmup - 1
            ratio = (1 + math.cos(math.pi * k / period)) / (1 + math.cos(math.pi * (k - 1) / period))
            rate = lowest + ratio * (rate - lowest)
        found[epoch] = rate
    return found


@pytest.mark.parametrize(
    ("task", "overshoot", "above_lowest"),
    [("deblurring", 3e-7, 3e-5), ("deraining", 4.1e-5, 0.0081), ("denoising", 1.8e-4, None)],
)
def test_the_papers_recipes_follow_the_originals_schedule(task, overshoot, above_lowest):
    """But for its overshoot, whose size and end are what is known of the original's."""
    options = load_config(Path(__file__).parents[1] / f"configs/{task}/dgunet.yaml").OPTIM
    base, lowest = options.LR_INITIAL, options.LR_MIN
    original = originals(options.NUM_EPOCHS, base, lowest, options.COSINE_EXTRA_EPOCHS)
    assert max(original.values()) / base - 1 == pytest.approx(overshoot, rel=0.1)
    found = rates(options)
    assert found[3] == found[4] == base > found[5]
    for epoch, rate in found.items():
        assert rate <= original[epoch] * (1 + 1e-12) and rate == pytest.approx(original[epoch], rel=1.01 * overshoot)
    if above_lowest is None:  # the longer cosine of denoising is far from its end
        assert found[options.NUM_EPOCHS] > 0.25 * base
    else:
        assert found[options.NUM_EPOCHS] / lowest - 1 == pytest.approx(above_lowest, rel=0.1)


@pytest.mark.parametrize("epochs", [5, 10, 80, 250])
def test_cosine_after_linear_warm_up(epochs):
    found = rates(optim(epochs))
    original = originals(epochs, BASE)
    amplitude = 2 / (1 + math.cos(math.pi / (epochs - 3)))
    for epoch, rate in found.items():
        if epoch <= 3:
            assert rate == pytest.approx(original[epoch], rel=1e-12)
        else:  # the overshoot, 5 % in 10 epochs
            assert LOWEST + (rate - LOWEST) * amplitude == pytest.approx(original[epoch], rel=1e-9)


def test_shape_of_the_curve():
    found = list(rates(optim(50)).values())
    assert found[:4] == pytest.approx([BASE / 3, 2 * BASE / 3, BASE, BASE], rel=1e-12)
    assert all(a > b for a, b in zip(found[3:], found[4:], strict=False))  # from epoch 5 on below the base rate
    assert LOWEST < found[-1] < LOWEST + 0.002 * BASE


def test_runs_as_short_as_their_warm_up():
    assert rates(optim(4))[4] == BASE
    assert list(rates(optim(2)).values()) == pytest.approx([BASE / 3, 2 * BASE / 3], rel=1e-12)


def test_lowest_rate_in_the_last_epoch():
    for warmup in (0, 1, 3):
        found = rates(optim(12, warmup, COSINE_EXTRA_EPOCHS=-1))
        assert found[warmup + 1] == pytest.approx(BASE, rel=1e-12)
        assert found[12] == pytest.approx(LOWEST, rel=1e-12) and found[11] > 1.5 * LOWEST


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configs_end_at_the_rates_of_their_histories(path):
    options = load_config(path).OPTIM
    with open(path.with_name(path.name.replace("config", "history")).with_suffix(".csv")) as file:
        *_, last = csv.DictReader(file)
    assert int(last["epoch"]) == options.NUM_EPOCHS
    if "wall time" in path.read_text():  # a run on a GPU, whose cosine followed the clock
        assert float(last["lr"]) == pytest.approx(options.LR_MIN, rel=0.05)
        return
    assert rates(options)[options.NUM_EPOCHS] == pytest.approx(float(last["lr"]), rel=1e-9)


class Clock:
    """Time that passes by a second each time it is asked for."""

    def __init__(self):
        self.now = 0

    def monotonic(self) -> float:
        self.now += 1
        return float(self.now)


def by_the_clock(folders, monkeypatch, seconds: float, **changed):  # noqa: F811
    """A trainer whose run ends by a clock that every look at it moves by a second."""
    for module in ("schedule", "trainer"):
        monkeypatch.setattr(f"dgunet.training.{module}.time", SimpleNamespace(monotonic=Clock().monotonic))
    settings = dict(OPTIM__NUM_EPOCHS=1000, OPTIM__WARMUP_EPOCHS=0, TRAINING__VAL_AFTER_EVERY=1000)
    settings |= dict(MODEL__OVERRIDES__stages=1)
    return make_trainer(folders, TRAINING__SECONDS=seconds, **settings | changed)


def test_the_run_ends_by_the_clock(folders, monkeypatch):  # noqa: F811
    """In the middle of an epoch, validated and saved; the rate has gone down the cosine meanwhile."""
    trainer = by_the_clock(folders, monkeypatch, 100)
    used, state = [], trainer.train_state
    compute = state.train_step
    monkeypatch.setattr(state, "train_step", lambda *a: used.append((trainer.clock.used, state.lr)) or compute(*a))
    trainer.fit()
    assert 95 <= trainer.clock.used <= 100 and len(used) > 20
    for seconds, lr in used:
        expected = LOWEST + (1e-3 - LOWEST) * (1 + math.cos(math.pi * seconds / 95)) / 2
        assert lr == pytest.approx(expected, rel=1e-6)
    last = trainer.log.rows[-1]
    assert last["psnr"] == trainer.best["psnr"] and last["step"] == trainer.step
    assert used[0][1] > 0.95 * 1e-3 and used[-1][1] < 0.05 * 1e-3
    assert read_checkpoint(folders / "runs/run/model_best.pth")["step"] == trainer.step


def test_the_clock_goes_on_when_a_run_is_resumed(folders, monkeypatch):  # noqa: F811
    first = by_the_clock(folders, monkeypatch, 100, OPTIM__NUM_EPOCHS=3)
    first.fit()  # its epochs come to an end before the clock does
    used = read_checkpoint(folders / "runs/run/model_latest.pth")["seconds"]
    assert 10 < used < 60
    second = by_the_clock(folders, monkeypatch, 100, TRAINING__RESUME=True)
    second.fit()
    assert 95 <= second.clock.used <= 110 and second.epoch > 3
    steps = second.log.rows[-1]
    third = by_the_clock(folders, monkeypatch, 100, TRAINING__RESUME=True)
    third.fit()
    assert third.log.rows[-1] == steps, "it was over"
    more = by_the_clock(folders, monkeypatch, 200, TRAINING__RESUME=True)
    more.fit()
    assert 190 <= more.clock.used <= 210 and len(more.log.rows) > len(third.log.rows)


def test_what_ends_a_run_has_its_time(monkeypatch):
    monkeypatch.setattr("dgunet.training.schedule.time", SimpleNamespace(monotonic=lambda: 0.0))
    clock = RunClock(1000)
    assert clock.for_training == 950 and not clock.is_over
    clock.ending, clock.used = 200, 700
    assert clock.for_training == 700 and clock.is_over
    without = RunClock(0)
    without.used = 1e12
    assert not without.is_over


def test_warm_up_and_other_schedules_stay_those_of_the_epochs():
    for schedule, warmup, expected in (("cosine", 2, BASE / 2), ("constant", 0, BASE)):
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=BASE)
        rates = EpochSchedule(optimizer, optim(10, warmup, SCHEDULE=schedule))
        rates.go_to(1)
        rates.follow(0.7)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_step():
    found = rates(optim(250, warmup=0, SCHEDULE="step", LR_MILESTONES="[60, 120, 180, 240]"))
    expected = {1: 1, 60: 1, 61: 1 / 2, 120: 1 / 2, 121: 1 / 4, 180: 1 / 4, 181: 1 / 8, 240: 1 / 8, 241: 1 / 16}
    assert {epoch: found[epoch] / BASE for epoch in expected} == pytest.approx(expected, rel=1e-12)


def test_constant():
    assert set(rates(optim(10, warmup=0, SCHEDULE="constant")).values()) == {BASE}
    found = rates(optim(10, warmup=2, SCHEDULE="constant"))
    assert list(found.values()) == pytest.approx([BASE / 2] + [BASE] * 9, rel=1e-12)


def test_cosine_without_warm_up():
    """PyTorch's CosineAnnealingLR."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=BASE)
    pytorchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=LOWEST)
    for rate in rates(optim(10, warmup=0)).values():
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        pytorchs.step()


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
    with pytest.raises(UserError, match="OPTIM.SCHEDULE .*'linear'"):
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
