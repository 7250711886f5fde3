"""Losses, optimizers, schedules and syntheses of a user's own, from a module outside the package; AdamW and Muon."""

import csv
import pickle
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from processes import run_script
from test_engine import TRAIN, assert_same_weights, batch, diverging_trainer, folders, make_trainer, options  # noqa: F401

from dgunet import UserError
from dgunet.checkpoints.load import read_checkpoint, save_checkpoint
from dgunet.data.synthesis import find_degradation
from dgunet.tasks import TASKS, find_task
from dgunet.training.config import _NOT_EVERYWHERE, changed_keys, describe_keys, format_config, load_config
from dgunet.training.losses import StageLoss
from dgunet.training.optimizers import Muon
from dgunet.training.schedule import decay

OWN = """
import functools
import torch
from torch import nn

class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, restored, target):
        return self.scale * (restored - target).square().mean()

def towards_input(restored, target, y):
    return (restored - y).abs().mean()

def growing(estimates, target):
    return sum((x - target).abs().mean() / k for k, x in enumerate(estimates, start=1))

def of_each_image(x, y):
    return (x - y).abs().mean((1, 2, 3))

sgd = functools.partial(torch.optim.SGD, momentum=0.9)

class Counting(torch.optim.Optimizer):
    "Each step is shorter; how many there were is in the group, as in Prodigy."

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, steps=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                self.state[p].setdefault("last", p.clone())
                p.add_(p.grad.sign(), alpha=-group["lr"] / group["steps"])
                p.lerp_(self.state[p]["last"], 0.1)
                self.state[p]["last"] = p.clone()

def no_optimizer(parameters, lr, weight_decay):
    return parameters

def half_of_them(parameters, lr, weight_decay):
    return torch.optim.SGD(parameters[::2], lr)

def halving(epoch, optim):
    return 0.5 ** (epoch - optim.WARMUP_EPOCHS - 1)

def below_zero(epoch, optim):
    return -1.0

def fog(image, rng, thickness=0.5, colour=(1.0, 1.0, 1.0)):
    t = thickness * rng.random()
    return (1 - t) * image + t * torch.tensor(colour).numpy()

def grey(image, rng):
    return image.mean(-1)

three = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current folder, with the module ``my_parts``."""
    (tmp_path / "my_parts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    yield tmp_path
    sys.modules.pop("my_parts", None)


def refusal(*words) -> str:
    with pytest.raises(UserError) as error:
        load_config(None, list(words))
    return str(error.value)


def test_a_run_of_parts_of_ones_own_from_the_command_line(own, folders, monkeypatch):  # noqa: F811
    """That of docs/extending.md, with its module and its command."""
    text = (TRAIN.parents[1] / "docs/extending.md").read_text()
    module = re.search(r"```python\n(# my_training.py\n.*?)```", text, flags=re.DOTALL)[1]
    (own / "my_training.py").write_text(module)
    (own / "train/target").rename(own / "photographs")
    monkeypatch.delitem(sys.modules, "my_training", raising=False)
    command = re.search(r"python (Deraining/train\.py) (TRAINING.*?my_training.*?)\n```", text, flags=re.DOTALL)
    script = TRAIN.parents[1] / command[1]
    given = shlex.split(command[2].replace("\\\n", " "))
    small = options(folders, TRAINING__WORKERS=1, OPTIM__NUM_EPOCHS=3)
    at = small.index("AUGMENT.MIXUP_FROM_EPOCH")  # which deraining does not use
    done = run_script(script, *small[:at], *small[at + 2 :], *given, cwd=folders)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(folders / "runs/run/history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-3, 0.98e-3])
    assert all(0 < float(row["loss"]) < 3 for row in rows)
    cfg = load_config("runs/run/config.yaml")  # which reads back what the command line gave
    assert dict(cfg.LOSS.TERMS) == {
        "charbonnier": 1, "my_training:Gradients": 0.1, "my_training:stay_close": 0.01, "my_training:last_stages": 0.5
    }  # fmt: skip
    assert dict(cfg.SYNTHESIS.OPTIONS) == {"thickness": 0.8} and cfg.OPTIM.NAME == "my_training:sgd"
    again = run_script(script, "--config", "runs/run/config.yaml", "TRAINING.RESUME", "True", cwd=folders)
    assert again.returncode == 0 and "differ" not in again.stdout, again.stdout + again.stderr


# --------------------------------------------------------------------------------------------------------------- losses


def test_losses_of_ones_own_are_summed_as_ours(own):
    torch.manual_seed(0)
    target, y, *estimates = torch.rand(5, 2, 3, 8, 8)
    terms = {"mse": 0.5, "my_parts:Squared": 0.1, "my_parts:towards_input": 0.2, "my_parts:growing": 0.3}
    loss = StageLoss(terms)
    assert not any(p.requires_grad for p in loss.parameters())
    distances = [(x - target).abs().mean() for x in estimates]
    expected = sum(0.7 * (x - target).square().mean() + 0.2 * (x - y).abs().mean() for x in estimates)
    expected += 0.3 * (distances[0] + distances[1] / 2 + distances[2] / 3)
    assert loss(estimates, target, y).item() == pytest.approx(expected.item(), rel=1e-6)
    assert StageLoss({"torch.nn:L1Loss": 1, "torch.nn.functional:l1_loss": 1})(estimates, target).item() == (
        pytest.approx(2 * sum(distances).item(), rel=1e-6)
    )
    assert StageLoss({"my_parts:Squared": 1}).to("meta")([target.to("meta")], target.to("meta")).device.type == "meta"


def test_a_loss_is_given_the_measurement_of_a_known_degradation(own, folders):  # noqa: F811
    """Of the cropped, blurred and noisy images, not of the clean ones that training begins with."""
    trainer = diverging_trainer(folders, LOSS__TERMS="{my_parts:towards_input: 1}")
    seen = []
    trainer.train_state.loss.terms["my_parts:towards_input"] = lambda x, target, y: (
        seen.append((x, target, y)) or (x - y).abs().mean()
    )
    clean = trainer.train_set[1, 0][0][None].float() / 255
    trainer.train_state.train_step(clean, clean, (1, 0))
    x, target, y = seen[0]
    assert y.shape == x.shape == target.shape == (1, 3, 24, 24)
    assert (y - target).std() == pytest.approx(20 / 255, rel=0.5)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("{mze: 1}", "LOSS.TERMS.mze; it takes charbonnier, edge, mse, or a loss of your own as module:name"),
        ("{my_parts:Squared: -1}", "LOSS.TERMS.my_parts:Squared must be from 0"),
        ("{my_parts:Squared: much}", "LOSS.TERMS.my_parts:Squared must be a number"),
        ("3", "LOSS.TERMS is a section"),
    ],
)
def test_terms_that_are_refused(terms, message):
    assert message in refusal("LOSS.TERMS", terms)


def test_terms_are_the_whole_loss(tmp_path):
    """A key that they replace is refused where the command line sets it, and not where a complete config lists it."""
    file = tmp_path / "a.yaml"
    file.write_text("LOSS:\n  EDGE: 0.05\n  TERMS:\n    charbonnier: 1\n    pack.losses:Focal: 1e-1\n")
    cfg = load_config(file)
    assert dict(cfg.LOSS.TERMS) == {"charbonnier": 1.0, "pack.losses:Focal": 0.1}
    marked = [line for line in format_config(cfg).splitlines() if line.endswith("# *")]
    assert [line.strip() for line in marked] == [
        "EDGE: 0.05  # *",
        "charbonnier: 1.0  # *",
        "pack.losses:Focal: 0.1  # *",
    ]
    file.write_text(format_config(cfg))
    assert load_config(file) == cfg and changed_keys(cfg, type(cfg).load_cfg(cfg.dump())) == []
    assert dict(load_config(file, ["LOSS.TERMS", "{mse: 2}"]).LOSS.TERMS) == {"mse": 2.0}
    more = load_config(file, ["LOSS.TERMS.pack.losses:Focal", "3"])
    assert dict(more.LOSS.TERMS) == {"charbonnier": 1.0, "pack.losses:Focal": 3.0}
    file.write_text("LOSS.TERMS.pack.losses:Focal: 2\n")
    assert dict(load_config(file).LOSS.TERMS) == {"pack.losses:Focal": 2.0}
    assert "set LOSS.TERMS.edge" in refusal("LOSS.TERMS", "{mse: 1}", "LOSS.EDGE", "0.1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_parts:of_each_image", r"my_parts:of_each_image must return a scalar tensor, got shape \(1,\)"),
        ("my_parts:nothing", "LOSS.TERMS my_parts:nothing: my_parts has no nothing"),
        ("my_parts:three", "LOSS.TERMS my_parts:three is 3; name a function"),
    ],
)
def test_losses_that_do_not_work(own, name, message):
    with pytest.raises(UserError, match=message):
        StageLoss({name: 1})([torch.rand(1, 3, 8, 8)], torch.rand(1, 3, 8, 8))


# ----------------------------------------------------------------------------------------------------------- optimizers

# The recipe's weight decay is left out: the user's `Counting` takes none.
OPTIMIZERS = ["adamw", "muon", "my_parts:sgd", "my_parts:Counting", "torch.optim:NAdam", "torch.optim:Adagrad"]


def stepped(folders, steps, **changed):  # noqa: F811
    """A trainer after so many steps."""
    trainer = make_trainer(folders, **changed)
    for _ in range(steps):
        trainer.train_state.train_step(*batch(trainer, 4), (trainer.epoch, trainer.step))
        trainer.step += 1
    return trainer


def save(trainer):
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.save("model_latest.pth")
    return trainer.folder / "model_latest.pth"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_resumes_to_the_same_bits(own, folders, name):  # noqa: F811
    """With averaged weights, clipping and accumulation; in the middle there is a step without a finite loss."""
    settings = dict(
        OPTIM__NAME=name, OPTIM__EMA_DECAY=0.9, OPTIM__CLIP_NORM=0.5, OPTIM__ACCUMULATE=2, OPTIM__WEIGHT_DECAY=0
    )  # fmt: skip
    whole = stepped(folders, 2, **settings)
    save(whole)
    first = {key: value.clone() for key, value in whole.train_state.model.state_dict().items()}
    whole.train_state.train_step(*[torch.full((2, 3, 32, 32), torch.nan)] * 2)
    assert_same_weights(whole.train_state.model.state_dict(), first)
    assert whole.train_state.counters.read().skipped == 1
    resumed = make_trainer(folders, TRAINING__RESUME=True, **settings)
    for trainer in (whole, resumed):
        for step in (2, 3):
            trainer.train_state.train_step(*batch(trainer, 4), (1, step))
    assert_same_weights(resumed.train_state.model.state_dict(), whole.train_state.model.state_dict())
    assert_same_weights(resumed.train_state.ema.state_dict(), whole.train_state.ema.state_dict())
    assert any(not torch.equal(first[key], value) for key, value in whole.train_state.model.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rollback_makes_the_optimizer_as_new(own, folders, name):  # noqa: F811
    new, used = (make_trainer(folders, OPTIM__NAME=name, OPTIM__WEIGHT_DECAY=0) for _ in range(2))
    used.train_state.save_rollback_weights()
    used.train_state.train_step(*batch(used), (1, 0))
    used.train_state.counters.values[3] = 10
    used.train_state.optimizer.param_groups[0]["lr"] = 1e-4
    assert used.train_state.roll_back()
    assert used.train_state.lr == 1e-4
    new.train_state.optimizer.param_groups[0]["lr"] = 1e-4
    for trainer in (new, used):
        trainer.train_state.train_step(*batch(trainer), (1, 1))
    assert_same_weights(used.train_state.model.state_dict(), new.train_state.model.state_dict())
    save(used)
    make_trainer(folders, OPTIM__NAME=name, OPTIM__WEIGHT_DECAY=0, TRAINING__RESUME=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it since 2.9")
def test_muon_is_pytorchs_for_matrices_and_adamw_for_vectors():
    torch.manual_seed(0)
    tall, wide, vector, scalar = torch.rand(9, 4), torch.rand(3, 8), torch.rand(5), torch.rand(())
    own = [torch.nn.Parameter(x.clone()) for x in (tall.view(9, 2, 2, 1), wide, vector, scalar)]
    theirs = [torch.nn.Parameter(x.clone()) for x in (tall, wide, vector, scalar)]
    options = dict(lr=1e-2, weight_decay=0.1)
    muon = Muon(own, betas=(0.8, 0.9), **options)
    others = [
        torch.optim.Muon(theirs[:2], adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(theirs[2:], betas=(0.8, 0.9), **options),
    ]
    for _ in range(3):
        for a, b in zip(own, theirs, strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.view(a.shape)
        for optimizer in (muon, *others):
            optimizer.step()
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a.view(b.shape), b, rtol=1e-5, atol=1e-6)


def test_muon_learns(folders):  # noqa: F811
    trainer = make_trainer(folders, OPTIM__NAME="muon", OPTIM__LR_INITIAL=3e-3)
    losses = []
    for _ in range(8):
        trainer.train_state.counters.next_epoch()
        trainer.train_state.train_step(*batch(trainer), (1, 0))
        losses.append(trainer.train_state.counters.read().mean_loss)
    assert losses[-1] < 0.8 * losses[0]


def test_adamw_decouples_the_weight_decay_and_takes_betas(folders):  # noqa: F811
    changed = dict(OPTIM__WEIGHT_DECAY=0.3, OPTIM__BETAS="[0.8, 0.95]")
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("muon", Muon)):
        optimizer = make_trainer(folders, OPTIM__NAME=name, **changed).train_state.optimizer
        (group,) = optimizer.param_groups
        assert type(optimizer) is kind and group["betas"] == (0.8, 0.95) and group["weight_decay"] == 0.3
    assert make_trainer(folders).train_state.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    for wrong in ("[0.9]", "[0.9, x]", "[0.9, True]", "[1, 1, 1]", "text"):
        assert "OPTIM.BETAS must be two numbers" in refusal("OPTIM.BETAS", wrong)
    assert "OPTIM.BETAS must be from 0" in refusal("OPTIM.BETAS", "[0.9, 1]")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(OPTIM__NAME="my_parts:sgd", OPTIM__BETAS="[0.5, 0.9]"),
            r"OPTIM.BETAS .* my_parts:sgd takes no betas; set OPTIM.BETAS \[0.9, 0.999\]",
        ),
        (
            dict(OPTIM__NAME="my_parts:Counting", OPTIM__WEIGHT_DECAY=0.1),
            "OPTIM.WEIGHT_DECAY .* no weight_decay; set OPTIM.WEIGHT_DECAY 0",
        ),
        (dict(OPTIM__NAME="my_parts:half_of_them"), "does not train the parameters that it is given"),
        (dict(OPTIM__NAME="my_parts:three"), "OPTIM.NAME my_parts:three is 3"),
        (dict(OPTIM__NAME="my_parts:no_optimizer"), "made a list, which is no torch.optim.Optimizer"),
        (dict(OPTIM__NAME="lion"), "OPTIM.NAME is adam, adamw, muon or module:name, got 'lion'"),
    ],
)
def test_optimizers_that_are_refused(own, folders, changed, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        make_trainer(folders, **changed)


def test_the_state_of_another_optimizer_is_refused(own, folders):  # noqa: F811
    path = save(stepped(folders, 1))
    for name in ("muon", "my_parts:sgd"):
        with pytest.raises(UserError, match=f"the state of adam, not of {name}; .*OPTIM.NAME adam"):
            make_trainer(folders, OPTIM__NAME=name, TRAINING__RESUME=True)
    state = read_checkpoint(path)
    del state["optimizer"]["name"]  # as in a state of version 0.2
    save_checkpoint(state, path)
    assert make_trainer(folders, TRAINING__RESUME=True).changed == []
    assert make_trainer(folders, TRAINING__RESUME=True, OPTIM__NAME="adamw").changed == ["OPTIM.NAME"]


def entry(i: int, key: str, value):
    return lambda optimizer: optimizer["state"][i].update({key: value})


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("adamw", entry(1, "exp_avg", torch.zeros(1, 2, 3)), "1.exp_avg"),
        ("muon", entry(1, "momentum", torch.zeros(1, 2, 3)), "1.momentum"),
        ("muon", lambda optimizer: optimizer["state"].pop(1), "1.momentum"),
        ("muon", lambda optimizer: optimizer.update(name=3), "optimizer"),
        ("my_parts:sgd", entry(1, "momentum_buffer", torch.tensor([torch.nan])), "1.momentum_buffer"),
        ("my_parts:sgd", entry(1, "momentum_buffer", torch.zeros(3).to_sparse()), "1.momentum_buffer"),
        ("my_parts:sgd", lambda optimizer: optimizer.pop("param_groups"), "does not fit"),
        ("my_parts:sgd", lambda optimizer: optimizer["param_groups"].append({}), "does not fit"),
    ],
)
def test_damaged_states_are_refused(own, folders, name, damage, named):  # noqa: F811
    path = save(stepped(folders, 1, OPTIM__NAME=name))
    state = read_checkpoint(path)
    damage(state["optimizer"])
    save_checkpoint(state, path)
    with pytest.raises(UserError, match=rf"model_latest\.pth .*{named}"):
        make_trainer(folders, OPTIM__NAME=name, TRAINING__RESUME=True)


# ------------------------------------------------------------------------------------------------ schedules, syntheses


def test_schedules_that_are_refused(own):
    for name, message in (
        ("my_parts:below_zero", "OPTIM.SCHEDULE my_parts:below_zero returns -1.0 in epoch 4"),
        ("my_parts:nothing", "OPTIM.SCHEDULE my_parts:nothing: my_parts has no nothing"),
    ):
        with pytest.raises(UserError, match=message):
            decay(4, load_config(None, ["OPTIM.SCHEDULE", name]).OPTIM)
    assert "cosine, constant, step or module:name" in refusal("OPTIM.SCHEDULE", "linear")


def test_synthesis_of_ones_own_goes_to_other_processes(own):
    """By its name: a process that is started afresh has no such module until it looks in the current folder."""
    image = np.full((8, 6, 3), 0.25, np.float32)
    degrade = find_degradation("my_parts:fog", {"thickness": 0.8})
    expected = degrade(image, np.random.default_rng(0))
    assert expected.dtype == np.float32 and 0.25 < expected.mean() < 0.85
    sent = pickle.dumps(degrade)
    del sys.modules["my_parts"]
    assert np.array_equal(pickle.loads(sent)(image, np.random.default_rng(0)), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("my_parts:fog", {"density": 1}, "my_parts:fog has no density; it has thickness, colour"),
        ("my_parts:grey", {"density": 1}, "it has none"),
        ("my_parts:grey", {}, r"must return an image \(8, 8, 3\), got \(8, 8\)"),
        ("my_parts:three", {}, "SYNTHESIS.NAME my_parts:three is 3"),
    ],
)
def test_syntheses_that_are_refused(own, name, options, message):
    with pytest.raises(UserError, match=message):
        find_degradation(name, options)(np.zeros((8, 8, 3), np.float32), np.random.default_rng(0))


def test_options_are_as_they_are_for_a_synthesis_of_ones_own(tmp_path):
    (tmp_path / "a.yaml").write_text("SYNTHESIS:\n  OPTIONS: {sigma: 25, mode: wet}\n  NAME: weather:snow\n")
    assert dict(load_config(tmp_path / "a.yaml").SYNTHESIS.OPTIONS) == {"sigma": 25, "mode": "wet"}
    words = ["SYNTHESIS.OPTIONS", "{flakes: [1e-3, 5], clip: True}", "SYNTHESIS.NAME", "weather:snow"]
    assert dict(load_config(None, words).SYNTHESIS.OPTIONS) == {"flakes": [0.001, 5], "clip": True}
    ours = ["SYNTHESIS", "{OPTIONS: {sigma: 25}, NAME: gaussian_noise}"]
    assert dict(load_config(None, ours).SYNTHESIS.OPTIONS) == {"sigma": [25.0, 25.0]}
    assert "unknown config key SYNTHESIS.OPTIONS.mode" in refusal("SYNTHESIS.OPTIONS.mode", "wet")
    assert "must be a number, text" in refusal("SYNTHESIS.NAME", "a:b", "SYNTHESIS.OPTIONS", "{when: 2026-01-05}")


# ------------------------------------------------------------------------------------------------------------- the keys


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_the_keys_that_a_task_uses(folders, task):  # noqa: F811
    script = TRAIN.parents[1] / {"compressive_sensing": "CompressiveSensing"}.get(task, task.title()) / "train.py"
    done = run_script(script, "--help_config", cwd=folders)
    assert done.returncode == 0 and not (folders / "runs").exists()
    listed = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    defaults, expected = load_config(), []
    for section, values in defaults.items():
        expected += [f"{section}.{key}" for key in values] if isinstance(values, dict) else [section]
    uses = find_task(task).training.keys
    assert listed == [key for key in expected if not key.startswith(_NOT_EVERYWHERE) or key.startswith(uses)]
    assert "OPTIM.LR_DECAY 0.5  (1e-06 to 1)\n" in done.stdout
    assert "COSINE_EXTRA_EPOCHS 0  (-1 to 1000000)\n    cosine: longer by so many" in done.stdout


def test_help_of_all_keys_is_that_of_every_task():
    listed = {line.split()[0] for line in describe_keys().splitlines() if not line.startswith(" ")}
    assert {"MODEL.RATIO", "AUGMENT.MIXUP", "AUGMENT.SATURATION", "MODEL.KERNEL"} <= listed
