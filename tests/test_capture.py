"""SPEED.CAPTURE without a GPU: a stand-in for the CUDA graph, which records and replays as that does."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_engine import assert_same_weights, batch, folders, make_trainer, train, weights  # noqa: F401  fixtures

from dgunet import DGUNet, UserError
from dgunet.checkpoints.load import read_checkpoint
from dgunet.training import capture


class StandIn:
    """Records a step without computing it, and replays it without what is no tensor: what Python does happens once."""

    def __init__(self):
        self.state, self.step, self.replays = None, None, 0

    def warm_up(self, step):
        step()

    def watch(self, step) -> str:
        step()
        return ""

    def share_of_memory(self) -> float:
        return 0.5

    def _tensors(self) -> list[torch.Tensor]:
        state = self.state
        moments = [moment for moments in state.optimizer.state.values() for moment in moments.values()]
        averaged = list(state.ema.parameters()) if state.ema is not None else []
        return [*state.model.parameters(), *averaged, *moments, state.counters.values]

    def _numbers(self) -> dict:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.state.optimizer.param_groups]
        return copy.deepcopy({"averaged": self.state.averaged, "good": self.state.good_is_current, "groups": groups})

    @torch.no_grad()
    def record(self, step):
        self.step, before = step, [x.clone() for x in self._tensors()]
        with torch.enable_grad():
            step()
        torch._foreach_copy_(self._tensors(), before)

    def replay(self):
        self.replays += 1
        before = self._numbers()
        self.step()
        assert self._numbers() == before


@pytest.fixture
def graphs(monkeypatch) -> list[StandIn]:
    """The stand-ins of the trainings of this test, which are captured on the CPU."""
    made, make = [], capture.make_captured_step

    def make_captured_step(train_state):
        captured = make(train_state)
        if captured is not None:
            captured.graph.state = train_state
            made.append(captured.graph)
        return captured

    monkeypatch.setattr("dgunet.training.step.make_captured_step", make_captured_step)
    monkeypatch.setattr(capture, "CudaGraph", StandIn)
    monkeypatch.setattr(capture, "_is_gpu", lambda device: True)
    return made


def run(folders, session: str, choice, **changed):  # noqa: F811
    """The trainer of 3 epochs of 4 steps, when they are done."""
    settings = dict(OPTIM__NUM_EPOCHS=3, SPEED__CAPTURE=choice) | changed
    trainer = make_trainer(folders, session=session, **settings)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"OPTIM__EMA_DECAY": 0.9, "OPTIM__WARMUP_EPOCHS": 0},
        {"OPTIM__ACCUMULATE": 2, "OPTIM__CLIP_NORM": 0.01},
        {"OPTIM__NAME": "adamw", "OPTIM__WEIGHT_DECAY": 0.1, "SPEED__CHECKPOINTING": True},
        {"SPEED__AMP": "bf16"},
        {"LOSS__TERMS": "{edge: 0.1, mse: 1}"},
    ],
    ids=str,
)
def test_captured_training_is_the_same(folders, graphs, changed):  # noqa: F811
    """To the last bit, across validations and epochs with other rates."""
    eager = run(folders, "eager", False, **changed)
    captured = run(folders, "captured", "auto", **changed)
    assert [graph.replays for graph in graphs] == [12 - capture.WARM_UP_STEPS]
    for one, other in zip(eager.log.rows, captured.log.rows, strict=True):
        assert [other[key] for key in ("loss", "lr", "psnr")] == [one[key] for key in ("loss", "lr", "psnr")]
    assert_same_weights(weights(folders, "captured"), weights(folders, "eager"))
    assert captured.train_state.averaged == eager.train_state.averaged


def test_a_captured_run_is_resumed_eagerly_and_the_other_way_round(folders, graphs):  # noqa: F811
    """Its file is that of any run: rates are numbers."""
    whole = run(folders, "whole", False)
    for first, then in (("auto", False), (False, "auto")):
        session = f"{first} then {then}"
        run(folders, session, first, OPTIM__NUM_EPOCHS=1)
        groups = read_checkpoint(folders / "runs" / session / "model_latest.pth")["optimizer"]["param_groups"]
        assert [(type(group["lr"]), group["capturable"]) for group in groups] == [(float, False)]
        resumed = run(folders, session, then, TRAINING__RESUME=True)
        assert [row["loss"] for row in resumed.log.rows][1:] == [row["loss"] for row in whole.log.rows][1:]
    assert [graph.replays for graph in graphs] == [1, 8 - capture.WARM_UP_STEPS]


def test_skipped_steps_and_the_way_back(folders, graphs):  # noqa: F811
    """Batches that are not finite change nothing, also when replayed, and returning to good weights is seen by it."""
    trainer = make_trainer(folders, OPTIM__EMA_DECAY=0.9, OPTIM__WARMUP_EPOCHS=0)
    state = trainer.train_state
    input, target = batch(trainer, 4)
    for _ in range(6):
        state.train_step(input, target)
    (graph,) = graphs
    assert graph.replays == 3
    before = [p.clone() for p in state.parameters]
    for _ in range(2):
        state.train_step(input * np.nan, target)
    assert all(map(torch.equal, state.parameters, before)) and state.counters.read().skipped_in_a_row == 2
    assert state.roll_back()
    trainer.schedule.lower(0.5)
    assert state.lr == pytest.approx(5e-4)
    averaged = dict(state.ema.named_parameters())
    assert all(torch.equal(p, averaged[name]) for name, p in state.trained.items())
    state.train_step(input, target)
    assert graph.replays == 6 and state.counters.read().counted == 7
    moved = max((p - averaged[name]).abs().max().item() for name, p in state.trained.items())
    assert 0 < moved < 1e-3  # Adam's first step is the lr at most, and the average has followed by a tenth


def test_the_first_good_step_comes_before_recording(folders, graphs):  # noqa: F811
    """Averaging begins with it, which asks the device."""
    trainer = make_trainer(folders, OPTIM__EMA_DECAY=0.9)
    input, target = batch(trainer, 4)
    for _ in range(5):
        trainer.train_state.train_step(input * np.nan, target)
    assert graphs[0].replays == 0
    for _ in range(3):  # averaging begins; it is looked whether the step can be recorded; it is
        trainer.train_state.train_step(input, target)
    assert graphs[0].replays == 1 and trainer.train_state.averaged == 3


def test_another_size_is_computed_as_it_is(folders, graphs):  # noqa: F811
    trainer = make_trainer(folders)
    input, target = batch(trainer, 4)
    for _ in range(5):
        trainer.train_state.train_step(input, target)
    trainer.train_state.train_step(input[:2], target[:2])
    trainer.train_state.train_step(input, target)
    assert graphs[0].replays == 3 and trainer.train_state.counters.read().counted == 7


def test_a_batch_of_another_size_begins_anew(folders, graphs):  # noqa: F811
    """cuDNN has chosen nothing for it yet."""
    trainer = make_trainer(folders)
    input, target = batch(trainer, 4)
    for _ in range(3):
        trainer.train_state.train_step(input, target)
    for _ in range(4):
        trainer.train_state.train_step(input[:2], target[:2])
    assert graphs[0].replays == 1 and trainer.train_state.captured_step.batch[0].shape[0] == 2


def test_a_state_that_is_loaded_is_recorded_again(folders, graphs):  # noqa: F811
    """The recorded step would change the moments that were there before."""
    run(folders, "run", "auto")
    trainer = make_trainer(folders, session="run", OPTIM__NUM_EPOCHS=3, TRAINING__RESUME=True)
    input, target = batch(trainer, 4)
    for _ in range(4):
        trainer.train_state.train_step(input, target)
    state, before = trainer.train_state.state_dict(), trainer.train_state.captured_step
    weights = trainer.weights()["state_dict"]
    trainer.train_state.load_state_dict(state | {"state_dict": weights, "optimizer": state["optimizer"]}, "somewhere")
    assert trainer.train_state.captured_step is not before and trainer.train_state.captured_step.batch is None
    for _ in range(4):
        trainer.train_state.train_step(input, target)
    assert [graph.replays for graph in graphs] == [9, 1, 1]


def cannot_record(self, step):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    "method, does, reason",
    [
        ("record", cannot_record, "operation not permitted"),
        ("watch", lambda self, step: step() or "loss.py:7 waits for the GPU", "loss.py:7"),
        ("share_of_memory", lambda self: 0.7, "70%"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_computed(folders, graphs, monkeypatch, caplog, method, does, reason):  # noqa: F811
    """Told once, and the training is the same."""
    eager = run(folders, "eager", False)
    monkeypatch.setattr(StandIn, method, does)
    captured = run(folders, "captured", "auto")
    assert graphs[0].replays == 0
    told = [line.message for line in caplog.records if "SPEED.CAPTURE" in line.message]
    assert len(told) == 1 and reason in told[0] and "\n" not in told[0]
    assert_same_weights(weights(folders, "eager"), weights(folders, "captured"))
    assert [row["loss"] for row in eager.log.rows] == [row["loss"] for row in captured.log.rows]


@pytest.mark.parametrize(
    "changed, named",
    [
        ({}, "CUDA"),
        ({"OPTIM__NAME": "muon"}, "CUDA"),
        ({"OPTIM__NAME": "muon"}, "OPTIM.NAME muon"),
        ({"SPEED__COMPILE": True, "SPEED__COMPILE_MODE": "reduce-overhead"}, "SPEED.COMPILE_MODE reduce-overhead"),
    ],
)
def test_reasons(folders, request, changed, named):  # noqa: F811
    """True is refused where the step cannot be recorded; auto computes it as it is."""
    made = [] if named == "CUDA" else request.getfixturevalue("graphs")
    with pytest.raises(UserError, match=f"SPEED.CAPTURE.*{named}"):
        make_trainer(folders, SPEED__CAPTURE=True, **changed)
    assert make_trainer(folders, **changed).train_state.captured_step is None and not made


@pytest.mark.parametrize("epochs, device, compiled", [(2000, "cuda", True), (2, "cuda", False), (2000, "cpu", False)])
def test_compiling_where_it_repays(folders, monkeypatch, epochs, device, compiled):  # noqa: F811
    """SPEED.COMPILE auto: 4 steps an epoch, on a device that says it is a GPU."""
    asked = []
    monkeypatch.setattr(DGUNet, "compile", lambda self, mode: asked.append(mode))
    monkeypatch.setattr("dgunet.training.step.training_device", lambda cfg: SimpleNamespace(type=device))
    monkeypatch.setattr(DGUNet, "to", lambda self, *_, **__: self)
    monkeypatch.setattr("dgunet.training.step.StepCounters", lambda device: None)
    monkeypatch.setattr("dgunet.training.losses.StageLoss.to", lambda self, device: self)
    monkeypatch.setattr("dgunet.training.step.autocast_dtype", lambda choice, device: None)
    make_trainer(folders, SPEED__COMPILE="auto", SPEED__CAPTURE=False, OPTIM__NUM_EPOCHS=epochs)
    assert asked == ["default"] * compiled


def test_command_says_what_is_not_possible_here(folders):  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = train(folders, check=2, SPEED__CAPTURE=True).stderr
    assert "SPEED.CAPTURE" in told and len(told.strip().splitlines()) == 1
