"""Faults of checkpoints, to use and to resume from: told in one line, unless nothing came of them.

The random ones are seeded; ``pytest tests/test_checkpoint_faults.py --fuzz 100 -s`` tries a hundred times as many and
prints what became of them.
"""

import io
import math
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dgunet import UserError, create_model, load_model
from dgunet.checkpoints.load import read_checkpoint
from dgunet.training.config import load_config
from dgunet.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")

OVERRIDES = dict(width=4, growth=2, final_growth=2, stages=2)


class Files(list):
    """In the place of a training or validation set: the files that it would read."""

    items = property(list)


def make_trainer(folder: Path, *options) -> Trainer:
    """A trainer of a tiny network, which reads no data, in ``folder``."""
    settings = {
        "DEVICE": "cpu", "MODEL.SESSION": "run", "TRAINING.SAVE_DIR": folder, "OPTIM.BATCH_SIZE": 2,
        "OPTIM.EMA_DECAY": 0.9, "TRAINING.TRAIN_PS": 8,
    }  # fmt: skip
    words = [str(word) for pair in settings.items() for word in pair]
    cfg = load_config(ROOT / "configs/denoising/dgunet.yaml", words + list(options))
    torch.manual_seed(0)
    files = sorted(ROOT.glob("dgunet/**/*.py"))
    return Trainer(cfg, create_model("denoising_dgunet", **OVERRIDES), Files(files[:8]), Files(files[8:10]))


def optimizer_step(trainer: Trainer):
    for parameter in trainer.train_state.parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    trainer.train_state.optimizer.found_inf = torch.zeros(())
    trainer.train_state.optimizer.step()
    trainer.train_state._average(trainer.train_state.optimizer.found_inf)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("runs"))
    trainer.folder.mkdir()
    return trainer


@pytest.fixture(scope="module")
def state(trainer) -> dict:
    """A whole training state, saved within the first epoch."""
    for _ in range(2):
        optimizer_step(trainer)
    trainer.step = 2
    trainer.train_state.counters.values += torch.tensor([0.5, 2, 0, 0, 3, 2])
    trainer._record(validated=False)
    trainer.save("model_latest.pth")
    return torch.load(trainer.folder / "model_latest.pth", weights_only=True)


def fresh(tree):
    """A copy of the containers in a state; the tensors are shared."""
    if isinstance(tree, dict):
        return {key: fresh(value) for key, value in tree.items()}
    return [fresh(value) for value in tree] if isinstance(tree, list) else tree


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refused(error: UserError, path: Path):
    """Check that a file is refused in one line, of a length to be read, that names it."""
    message = str(error)
    assert str(path) in message and message.isprintable() and len(message) < 2000, message


def loads(path: Path, expected: dict | None) -> bool:
    """Whether load_model loads a file. If it does, the network works, with the expected weights."""
    try:
        model = load_model(path)
    except UserError as error:
        refused(error, path)
        return False
    if expected is not None:
        assert equal(model.state_dict(), expected)
    with torch.inference_mode():
        model(torch.zeros(1, model.channels, 8, 8))
    return True


def resumes(path: Path, state: dict, trainer: Trainer) -> bool:
    """Whether a run continues from a file. If it does, then with the weights and the moments of the whole state."""
    with torch.no_grad():
        for parameter in (*trainer.train_state.model.parameters(), *trainer.train_state.ema.parameters()):
            parameter.zero_()
    try:
        trainer.load_state_dict(read_checkpoint(path), path)
    except UserError as error:
        refused(error, path)
        return False
    resumed = trainer.state_dict()
    assert equal(resumed["state_dict"], state["state_dict"]) and equal(
        resumed["raw_state_dict"], state["raw_state_dict"]
    )
    moments = resumed["optimizer"]["state"]
    assert all(equal(moments[i], entry) for i, entry in state["optimizer"]["state"].items())
    optimizer_step(trainer)
    assert all(parameter.isfinite().all() for parameter in trainer.train_state.parameters)
    trainer._record(validated=False)
    return True


# ------------------------------------------------------------------------------------------- states that do not resume


def moment(key: str, change: Callable, index: int = 1) -> Callable:
    def apply(state: dict):
        moments = state["optimizer"]["state"][index]
        moments[key] = change(moments[key])

    return apply


def put(key: str, value) -> Callable:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    "change, named",
    [
        (moment("exp_avg", lambda t: t[:1]), "1.exp_avg"),
        (moment("exp_avg_sq", lambda t: t.flatten()), "1.exp_avg_sq"),
        (moment("exp_avg", lambda t: t.double()), "1.exp_avg"),
        (moment("exp_avg", lambda t: t.to_sparse()), "1.exp_avg"),
        (moment("exp_avg", lambda t: 0.5), "1.exp_avg"),
        (moment("exp_avg", lambda t: t * torch.nan), "1.exp_avg"),
        (moment("exp_avg_sq", lambda t: -t - 1), "1.exp_avg_sq"),
        (moment("step", lambda t: t - 3), "1.step"),
        (lambda state: state["optimizer"]["state"].pop(1), "1.exp_avg"),
        (lambda state: state["optimizer"]["state"][1].pop("step"), "1.step"),
        (lambda state: state["optimizer"]["state"].update({10**3: {"step": torch.zeros(())}}), "1000.step"),
        (lambda state: state["optimizer"]["state"].update({1: None}), "optimizer"),
        (lambda state: state["state_dict"].update({"last.rho": torch.full((1,), torch.nan)}), "last.rho"),
        (lambda state: state["best"].update({"psnr": torch.nan}), "best"),
        (lambda state: state["history"].append({"epoch": 1}), "history"),
        (lambda state: state.pop("raw_state_dict"), "raw_state_dict"),
        (lambda state: state.pop("averaged"), "averaged"),
        (lambda state: state["optimizer"].pop("state"), "optimizer"),
        (lambda state: state.pop("best") and state.pop("totals"), "best, totals"),
    ]
    + [(lambda state, key=key: state.pop(key), key) for key in ("last_psnr", "history", "config")]
    + [(put("epoch", value), "epoch") for value in (0, -1, True, 1.0, "1", None, 2**40)]
    + [(put("step", value), "step") for value in (-1, [1], torch.tensor(1))]
    + [(put("totals", value), "totals") for value in ([0.0] * 3, [0.0, 1.0, -1.0, 0.0], [torch.inf] * 4, "0")]
    + [(put("config", text), "config") for text in ("", "[", "OPTIM: 3", "&a [*a]", "OPTIM: {BATCH_SIZE: x}")],
)  # fmt: skip
def test_state_that_cannot_be_resumed_is_told_in_one_line(tmp_path, state, trainer, change, named):
    content = fresh(state)
    change(content)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth .*\b{named}\b") as error:
        trainer.load_state_dict(read_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth")
    refused(error.value, tmp_path / "a.pth")


# -------------------------------------------------------------------------------------------------- faults of the disk


def flip(rng: random.Random, data: bytearray):
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_near_the_end(rng: random.Random, data: bytearray):
    """In the zip's table of contents."""
    data[-rng.randrange(1, min(len(data), 4000))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray):
    del data[rng.randrange(len(data)) :]


def lose_a_part(rng: random.Random, data: bytearray):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 64, 512, 4096))]


def blank_a_part(rng: random.Random, data: bytearray):
    start, size = rng.randrange(len(data)), rng.choice((1, 64, 512, 4096))
    data[start : start + size] = bytes(len(data[start : start + size]))


def garble_a_part(rng: random.Random, data: bytearray):
    start, size = rng.randrange(len(data)), rng.choice((1, 64, 512, 4096))
    data[start : start + size] = rng.randbytes(len(data[start : start + size]))


def repeat_a_part(rng: random.Random, data: bytearray):
    start, size = rng.randrange(len(data)), rng.choice((1, 64, 512, 4096))
    data[start:start] = data[start : start + size]


def swap_two_parts(rng: random.Random, data: bytearray):
    size = rng.choice((4, 64, 512))
    a, b = rng.randrange(len(data) - size), rng.randrange(len(data) - size)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


DISK_FAULTS = [flip, flip, flip_near_the_end, truncate, lose_a_part, blank_a_part, garble_a_part, repeat_a_part]
DISK_FAULTS += [swap_two_parts]


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def for_use(state: dict) -> dict:
    return {key: state[key] for key in ("state_dict", "model", "config")}


def test_faults_of_the_disk(tmp_path, state, trainer, fuzz):
    rng, counts = random.Random(1), Counter()
    weights, whole = tmp_path / "weights.pth", tmp_path / "model_latest.pth"
    contents = {weights: saved(for_use(state)), whole: saved(state)}
    for _ in range(30 * fuzz):
        path = rng.choice([weights, weights, whole])
        data = bytearray(contents[path])
        rng.choice(DISK_FAULTS)(rng, data)
        path.write_bytes(data)
        loaded = loads(path, state["state_dict"]) if path == weights else resumes(path, state, trainer)
        counts[path.name, "loaded unharmed" if loaded else "refused"] += 1
    print(dict(counts))


@pytest.mark.parametrize("kind", ["legacy", "pickle"])
def test_faults_that_no_checksum_shows(tmp_path, state, fuzz, kind):
    """In the format before PyTorch 1.6, or in a zip with new checksums: other numbers may load, but nothing crashes."""
    rng, counts = random.Random(2), Counter()
    whole = saved(for_use(state), _use_new_zipfile_serialization=kind != "legacy")
    path = tmp_path / "a.pth"
    for _ in range(10 * fuzz):
        if kind == "legacy":
            data = bytearray(whole)
            rng.choice(DISK_FAULTS)(rng, data)
            path.write_bytes(data)
        else:
            with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(path, "w") as damaged:
                for record in archive.infolist():
                    data = bytearray(archive.read(record))
                    if record.filename.endswith("/data.pkl"):
                        rng.choice(DISK_FAULTS)(rng, data)
                    damaged.writestr(record.filename, bytes(data))
        counts["loaded" if loads(path, None) else "refused"] += 1
    print(dict(counts))


# ------------------------------------------------------------------------------------------------- faults of the writer

ENDLESS = []
ENDLESS.append(ENDLESS)
FOREIGN = [
    None, True, False, 0, 1, -1, 3, 10**9, 10**30, 0.0, 1.5, -1e300, math.nan, math.inf, 1j, "", "7", "two\nlines",
    "\ud800", "x" * 10**4, b"\0bytes", [], [1, 2], [[]], (), (1, "a"), {}, {"a": {}}, {1: 2}, {"psnr": "high"}, set(),
    ENDLESS, torch.float32, torch.Size([3]), torch.device("cuda"),
]  # fmt: skip


def with_one(value: torch.Tensor, number) -> torch.Tensor:
    changed = value.float().clone()
    changed[(-1,) * changed.dim()] = number
    return changed


SAME_TENSORS = {  # other ways to hold the same numbers
    "parameter": lambda t: nn.Parameter(t),
    "double": lambda t: t.double(),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "part of a larger one": lambda t: torch.stack([t, t])[1],
}
OTHER_TENSORS = {
    "empty": lambda t: t.new_empty(0),
    "seven numbers": lambda t: torch.full((7,), 0.5),
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t[None],
    "transposed": lambda t: t.transpose(0, 1).contiguous() if t.dim() > 1 and t.shape[0] != t.shape[1] else t[None],
    "flat": lambda t: t.flatten()[:, None],
    "expanded": lambda t: torch.ones(()).expand(*t.shape, 10**9),
    "sparse": lambda t: t.to_sparse(),
    "rows of a sparse one": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "of no device": lambda t: t.to("meta"),
    "whole numbers": lambda t: t.int(),
    "true and false": lambda t: t > 0,
    "complex": lambda t: t + 0j,
    "of 8 bits": lambda t: t.to(torch.float8_e5m2),
    "NaN": lambda t: with_one(t, math.nan),
    "infinite": lambda t: with_one(t, -math.inf),
    "too large": lambda t: with_one(t, 0).double() - 1e300,
}


def nodes(tree: dict) -> list[tuple]:
    """All places in a tree of dicts and lists: (container, key)."""
    found = []
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += nodes(value)
    return found


def change(rng: random.Random, content: dict) -> str:
    """Put a random fault of its writer into a checkpoint's content; says which."""
    places = nodes(content)
    if rng.random() < 0.5:  # most places are weights or moments
        places = [(tree, key) for tree, key in places if not isinstance(tree[key], torch.Tensor)]
    tree, key = rng.choice(places)
    value, kind = tree[key], rng.choice(("replace", "replace", "remove", "add", "rename"))
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        name, make = rng.choice([*SAME_TENSORS.items(), *OTHER_TENSORS.items()])
        tree[key] = make(value)
        return f"{key}: {name}"
    foreign = rng.choice(FOREIGN)
    if kind == "replace":
        tree[key] = foreign
    elif kind == "remove" or isinstance(tree, list):
        del tree[key]
    else:
        name = foreign if foreign.__hash__ and foreign == foreign else "last.other"
        tree[name] = tree.pop(key) if kind == "rename" else value
    return f"{key}: {kind} {foreign!r:.40}"


@pytest.mark.parametrize("action", ["load", "resume"])
def test_faults_of_the_writer(tmp_path, state, trainer, fuzz, action):
    rng, counts = random.Random(3), Counter()
    path = tmp_path / "a.pth"
    for _ in range(30 * fuzz):
        content = fresh(for_use(state) if action == "load" else state)
        fault = change(rng, content)
        path.write_bytes(saved(content))
        try:
            loaded = loads(path, state["state_dict"]) if action == "load" else resumes(path, state, trainer)
        except Exception as error:
            raise AssertionError(fault) from error
        counts["loaded unharmed" if loaded else "refused"] += 1
    print(dict(counts))


@pytest.mark.parametrize("kind", [*SAME_TENSORS, *OTHER_TENSORS])
def test_kinds_of_tensors(tmp_path, state, trainer, kind):
    """The same numbers are weights whatever holds them (moments, of their precision alone); others are refused."""
    path, make = tmp_path / "a.pth", (SAME_TENSORS | OTHER_TENSORS)[kind]
    name, content = "first.proximal.encoder.blocks.0.conv1.weight", fresh(state)
    content["state_dict"][name] = make(content["state_dict"][name])
    torch.save(content, path)
    assert loads(path, state["state_dict"]) == (kind in SAME_TENSORS)
    content = fresh(state)
    number = [name for name, _ in trainer.train_state.model.named_parameters()].index(name)
    content["optimizer"]["state"][number]["exp_avg"] = make(content["optimizer"]["state"][number]["exp_avg"])
    torch.save(content, path)
    assert resumes(path, state, trainer) == (kind in SAME_TENSORS and kind != "double")
