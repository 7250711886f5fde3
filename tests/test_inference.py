"""restore: any size and type in, the same out; tiles, self-ensemble, and what it refuses."""

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dgunet import UserError, inference, restore
from dgunet import introspect as inside
from dgunet.model.degradations import ResidualBlock
from dgunet.runtime.hardware import available_memory

if sys.platform == "linux":
    import resource


@pytest.fixture
def model(tiny_model):
    """Three stages whose output layers are scaled up: what they change is visible in 8 bits."""
    model = tiny_model(stages=3)
    with torch.no_grad():
        model.last.proximal.image_conv.weight.mul_(5)
    return model


class Local(nn.Module):
    """A stand-in without global operations: what a pixel becomes depends on ``radius`` pixels around it alone."""

    channels, degradation, arguments, radius = 3, None, {"width": 8}, 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(self.radius)))

    def forward(self, x):
        return [0.5 * x + 0.5 * torch.sigmoid(4 * self.convs(x))]


class Pooling(Local):
    """A stand-in whose result depends on where the grid of 8x8 blocks lies, as that of the network's scales does."""

    def forward(self, x):
        return [0.5 * x + 0.5 * F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)]


def random_image(height, width, channels=3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, channels)).astype(np.float32)


def directly(model, image: np.ndarray) -> np.ndarray:
    """The network's result, not clamped, for a (H, W, C) float image with sides that are multiples of 8."""
    with torch.no_grad():
        x = torch.from_numpy(image.transpose(2, 0, 1))[None]
        return model(x)[0][0].numpy().transpose(1, 2, 0)


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as error:
        restore(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------------------------- types


def test_equals_the_network_on_multiples_of_8(model):
    image = random_image(24, 40)
    restored = restore(model, image)
    np.testing.assert_allclose(restored, directly(model, image).clip(0, 1), atol=1e-6)
    assert np.abs(restored - image).mean() > 0.01


TYPES = [
    (np.uint8, 255, 0.5),
    (np.uint16, 65535, 0.5),
    (np.float16, 1, 1e-3),
    (np.float32, 1, 0),
    (np.float64, 1, 0),
]


@pytest.mark.parametrize(("dtype", "scale", "rounding"), TYPES)
@pytest.mark.parametrize("shape", [(13, 20, 3), (2, 13, 20, 3)])
def test_arrays(model, dtype, scale, rounding, shape):
    image = (random_image(1, 1, int(np.prod(shape))).reshape(shape) * scale).astype(dtype)
    before = image.copy()
    restored = restore(model, image)
    assert (type(restored), restored.dtype, restored.shape) == (np.ndarray, np.dtype(dtype), shape)
    assert np.array_equal(image, before)
    assert not np.shares_memory(image, restored)
    exact = restore(model, (image.astype(np.float64) / scale).astype(np.float32)) * scale
    assert np.abs(restored.astype(np.float64) - exact).max() <= rounding + 1e-6 * scale
    assert np.abs(restored.astype(np.float64) - image).mean() > 0.01 * scale


TENSOR_TYPES = [
    (torch.uint8, 255, 0.5),
    (torch.uint16, 65535, 0.5),
    (torch.float16, 1, 1e-3),
    (torch.bfloat16, 1, 5e-3),
    (torch.float32, 1, 0),
    (torch.float64, 1, 0),
]


@pytest.mark.parametrize(("dtype", "scale", "rounding"), TENSOR_TYPES)
@pytest.mark.parametrize("shape", [(3, 13, 20), (2, 3, 13, 20)])
def test_tensors(model, dtype, scale, rounding, shape):
    image = torch.from_numpy(random_image(1, 1, int(np.prod(shape))).reshape(shape) * scale).to(dtype)
    before = image.clone()
    restored = restore(model, image)
    assert (type(restored), restored.dtype, restored.shape) == (torch.Tensor, dtype, torch.Size(shape))
    assert torch.equal(image, before)
    exact = restore(model, (image.double() / scale).float()) * scale
    assert (restored.double() - exact).abs().max() <= rounding + 1e-6 * scale


def test_array_and_tensor_agree(model):
    image = random_image(13, 20)
    restored = restore(model, torch.from_numpy(image.transpose(2, 0, 1).copy()))
    np.testing.assert_allclose(restore(model, image), restored.permute(1, 2, 0).numpy(), atol=1e-6)


def test_restored_tensor_is_an_ordinary_one(model):
    for height in (16, 13):
        restored = restore(model, torch.rand(3, height, 16))
        restored.mul_(2)
        (restored * torch.ones(1, requires_grad=True)).sum().backward()  # may take part in training


def test_tensor_that_requires_gradients(model):
    assert not restore(model, torch.rand(3, 16, 16, requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(13, 20), (13, 20, 1), (2, 13, 20, 1)])
def test_grey_images_of_a_grey_model(tiny_model, shape):
    grey_model = tiny_model(channels=1, stages=2)
    image = random_image(1, 1, int(np.prod(shape))).reshape(shape)
    restored = restore(grey_model, image)
    assert restored.shape == shape
    flat = restored.reshape(-1, 13, 20)[0]
    np.testing.assert_allclose(flat, restore(grey_model, image.reshape(-1, 13, 20)[0]), atol=1e-6)
    tensor = torch.from_numpy(image.reshape(-1, 13, 20)[0])
    np.testing.assert_allclose(flat, restore(grey_model, tensor).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", [list, tuple])
def test_images_of_several_sizes_and_types(model, kind):
    images = kind([random_image(13, 20), (random_image(24, 16) * 255).astype(np.uint8), torch.rand(3, 9, 9)])
    restored = restore(model, images)
    assert type(restored) is kind
    for one, image in zip(restored, images, strict=True):
        assert (type(one), one.dtype, one.shape) == (type(image), image.dtype, image.shape)
        assert bool((one == restore(model, image)).all())


def test_views_and_read_only_arrays(model):
    image = random_image(20, 26)
    image.setflags(write=False)
    np.testing.assert_array_equal(restore(model, image[::-1, ::2]), restore(model, image[::-1, ::2].copy()))


def test_result_is_within_the_range(model):
    with torch.no_grad():
        model.last.proximal.image_conv.weight.mul_(100)
    restored = restore(model, random_image(16, 16))
    assert (restored.min(), restored.max()) == (0, 1)
    restored = restore(model, (random_image(16, 16) * 255).astype(np.uint8))
    assert (restored.min(), restored.max()) == (0, 255)


def test_modes_of_its_parts_are_kept(tiny_model):
    model = tiny_model(stages=3).train()
    model.last.eval()
    modes = [module.training for module in model.modules()]
    restore(model, np.zeros((8, 8, 3)))
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_kept(model, training):
    model.train(training)
    restore(model, random_image(8, 8))
    refusal(model, np.full((8, 8, 3), np.nan))
    assert model.training == training


def overlapping(calls: list[Callable], at: nn.Module):
    """Run calls in threads of their own: each is in the part ``at`` of a network before the one before it has ended."""
    inside = [threading.Event() for _ in calls]
    errors: list[BaseException] = []

    def wait(*_):
        number = int(threading.current_thread().name)
        inside[number].set()
        if number + 1 < len(calls):
            assert inside[number + 1].wait(20)
        else:
            for thread in threads[:-1]:  # which end first
                thread.join(20)

    def run(call: Callable):
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), name=str(k)) for k, call in enumerate(calls)]
    hook = at.register_forward_pre_hook(wait)
    for thread, event in zip(threads, inside, strict=True):
        thread.start()
        assert event.wait(20)
    for thread in threads:
        thread.join(20)
    hook.remove()
    assert not errors, errors


class Mode(nn.Module):
    """A degradation of the user's own that is another in training mode, as one with dropout is."""

    image_to_image = True

    def A(self, x):
        assert not self.training
        return x

    A_adjoint = A


@pytest.mark.parametrize("count", [2, 3])
def test_threads_leave_the_mode_as_it_was(tiny_model, count):
    model = tiny_model(stages=2).train()
    model.degradation = Mode().train()
    expected, found = restore(model, random_image(16, 16), tile=None), []
    overlapping([lambda: found.append(restore(model, random_image(16, 16), tile=None))] * count, model.last)
    assert len(found) == count and all(np.array_equal(one, expected) for one in found)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("put_in", [nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(0.5))], ids=repr)
def test_parts_that_mind_the_mode_are_in_evaluation_mode(tiny_model, put_in):
    model = tiny_model(stages=1)
    model.last.degradation.A = put_in
    expected = restore(model.eval(), random_image(16, 16))
    assert np.array_equal(restore(model.train(), random_image(16, 16)), expected)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_traces_in_threads_do_not_mix(tiny_model, compiled):
    model = tiny_model(stages=3)
    inputs = [torch.rand(1, 3, 8, 8) for _ in range(2)]
    with torch.no_grad():
        expected = [model(y)[0] for y in inputs]
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        own, found = [stage._compiled_call_impl for stage in model.iter_stages()], {}

        def run(k: int):
            with torch.no_grad():
                found[k] = inside.trace(model, inputs[k])

        overlapping([lambda: run(0), lambda: run(1)], model.last.proximal)
    for k in range(2):
        assert [step.k for step in found[k].steps] == [1, 2, 3]
        assert torch.allclose(found[k].steps[-1].x, expected[k], atol=1e-6)
    assert [stage._compiled_call_impl for stage in model.iter_stages()] == own and (own[0] is not None) == compiled


# --------------------------------------------------------------------------------------------------------------- sizes


def extended(image: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        missing = -image.shape[axis] % 8
        widths = [(0, missing if a == axis else 0) for a in range(3)]
        image = np.pad(image, widths, mode="reflect" if missing < image.shape[axis] else "edge")
    return image


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (37, 53), (1, 400), (400, 1), (4, 9), (8, 8), (16, 20)])
def test_any_size(model, size):
    image = random_image(*size)
    expected = directly(model, extended(image))[: size[0], : size[1]].clip(0, 1)
    np.testing.assert_allclose(restore(model, image), expected, atol=1e-6)
    as_bytes = restore(model, (image * 255).astype(np.uint8))
    assert (as_bytes.shape, as_bytes.dtype) == (image.shape, np.uint8)


def test_large_photograph(tiny_model):
    model = tiny_model(width=4, growth=2, final_growth=2, stages=2)
    for stage in model.iter_stages():  # as many pixels with less to compute for each
        stage.degradation.A, stage.degradation.A_adjoint = ResidualBlock(3, hidden=2), ResidualBlock(3, hidden=2)
    image = np.random.default_rng(0).integers(0, 256, (1200, 2000, 3), dtype=np.uint8)
    restored = restore(model, image, tile=512, tile_overlap=64)
    assert (restored.shape, restored.dtype) == (image.shape, np.uint8)
    # the corners belong to one tile each
    corners = {(0, 0): (slice(0, 360), slice(0, 400)), (688, 1488): (slice(-360, None), slice(-400, None))}
    for (top, left), area in corners.items():
        alone = restore(model, image[top : top + 512, left : left + 512], tile=None)
        difference = np.abs(restored[area].astype(int) - alone[area])
        assert difference.max() <= 1


# ------------------------------------------------------------------------------------------------------- self-ensemble


TURNS = [lambda x, k=k, flip=flip: np.rot90(x[:, ::-1] if flip else x, k) for flip in (0, 1) for k in range(4)]
UNDO = [
    lambda x, k=k, flip=flip: np.rot90(x, -k)[:, ::-1] if flip else np.rot90(x, -k) for flip in (0, 1) for k in range(4)
]


def test_self_ensemble_is_the_mean_over_eight(model):
    image = random_image(16, 24)
    parts = [undo(directly(model, turn(image).copy())) for turn, undo in zip(TURNS, UNDO, strict=True)]
    restored = restore(model, image, self_ensemble=True)
    np.testing.assert_allclose(restored, np.mean(parts, axis=0).clip(0, 1), atol=1e-5)
    assert max(np.abs(a - b).max() for a in parts for b in parts) > 0.01


def test_self_ensemble_commutes_with_turns(model):
    image = random_image(16, 24)
    restored = restore(model, image, self_ensemble=True)
    for turn in TURNS:
        again = restore(model, turn(image), self_ensemble=True)
        np.testing.assert_allclose(again, turn(restored), atol=1e-5)


def test_self_ensemble_of_any_size(model):
    assert restore(model, random_image(7, 13), self_ensemble=True).shape == (7, 13, 3)


# --------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("size", [(104, 136), (48, 136), (104, 40), (48, 48), (40, 200)])
@pytest.mark.parametrize("overlap", [16, 24])
def test_tiles_of_a_local_network_leave_no_seams(size, overlap):
    image = random_image(*size)
    assert overlap >= 2 * Local.radius + 1  # the receptive field
    whole = restore(Local(), image, tile=None)
    np.testing.assert_allclose(restore(Local(), image, tile=48, tile_overlap=overlap), whole, atol=1e-5)


def test_seams_are_seen_without_overlap():
    image = random_image(104, 136)
    whole = restore(Local(), image, tile=None)
    assert np.abs(restore(Local(), image, tile=48, tile_overlap=0) - whole).max() > 1e-3


@pytest.mark.parametrize("tile", [48, 50])
@pytest.mark.parametrize("overlap", [0, 5, 16, 24])
def test_tiles_lie_on_the_grid_of_the_whole(tile, overlap):
    image = random_image(104, 136)
    whole = restore(Pooling(), image, tile=None)
    np.testing.assert_allclose(restore(Pooling(), image, tile=tile, tile_overlap=overlap), whole, atol=1e-5)


@pytest.mark.parametrize("tile", [16, 17, 31, 64])
@pytest.mark.parametrize("overlap", [0, 3, 8])
def test_tiles_cover_every_pixel(tile, overlap):
    class Identity(Local):
        def forward(self, x):
            return [x]

    for size in ((1, 1), (17, 16), (65, 33), (37, 130)):
        image = random_image(*size)
        restored = restore(Identity(), image, tile=tile, tile_overlap=overlap)
        np.testing.assert_allclose(restored, image, atol=1e-6)


def test_tiles_are_not_larger_than_asked():
    seen = []

    class Watching(Local):
        def forward(self, x):
            seen.append(tuple(x.shape[2:]))
            return [x]

    restore(Watching(), random_image(200, 150), tile=64, tile_overlap=16)
    assert len(seen) >= 12
    assert max(max(size) for size in seen) <= 64


def test_tiles_of_a_small_image_are_the_whole(model):
    image = random_image(40, 48)
    np.testing.assert_array_equal(restore(model, image, tile=64, tile_overlap=16), restore(model, image))


def test_tiles_of_the_network_are_close(model):
    image = np.tile(random_image(16, 16), (6, 8, 1))
    tiled = restore(model, image, tile=64, tile_overlap=32)
    assert np.abs(tiled - restore(model, image, tile=None)).mean() < 0.1 * np.abs(tiled - image).mean()


def test_automatic_tiles_where_memory_is_short(model, monkeypatch):
    image = random_image(160, 256)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * 2**20))
    with pytest.warns(UserWarning, match="tile=128.*tile=None forces") as caught:
        restored = restore(model, image)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(restored, restore(model, image, tile=128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = restore(model, image, tile=None)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
        np.testing.assert_array_equal(restore(model, image), whole)
    assert not np.array_equal(restored, whole)


GIB = 2**30


def control_groups(folder: Path, version: int, groups: dict[str, tuple], path: str = "/", root: str = "/") -> Path:
    """What Linux tells of a process in the group ``path``, where ``root`` is mounted; of groups: limit, usage, cached.

    Returns:
        the process's folder, as `available_memory` takes it.
    """
    point = folder / "cgroup"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
    for group, (limit, usage, cached) in groups.items():
        place = point / group.strip("/")
        place.mkdir(parents=True, exist_ok=True)
        (place / names[0]).write_text(f"{limit}\n")
        (place / names[1]).write_text(f"{usage}\n")
        (place / "memory.stat").write_text(f"anon 7\n{names[2]} {cached}\nactive_file 5\n")
    process = folder / "self"
    process.mkdir()
    lines = ["5:cpuset:/", f"4:memory,hugetlb:{path}", "0::/"] if version == 1 else ["1:name=systemd:/", f"0::{path}"]
    kind, options = ("cgroup", "rw,memory,hugetlb") if version == 1 else ("cgroup2", "rw,nsdelegate")
    (process / "cgroup").write_text("\n".join(lines) + "\n")
    (process / "mountinfo").write_text(
        "23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"30 23 0:30 / {folder}/elsewhere rw - cgroup cgroup rw,cpuset\n"
        f"31 23 0:31 {root} {point} rw,nosuid shared:9 master:3 - {kind} {kind} {options}\n"
    )
    return process


NO_LIMIT = {1: 9223372036854771712, 2: "max"}


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "groups, places, expected",
    [
        ({"/": (None, 0, 0)}, {}, 64),
        ({"/": (8, 3, 0)}, {}, 5),
        ({"/": (8, 7, 4)}, {}, 5),  # what only caches files is free
        ({"/": (8, 9, 0)}, {}, 0),
        ({"/": (100, 3, 0)}, {}, 64),  # the machine has less than the limit
        ({"/": (None, 0, 0), "/job": (None, 9, 0), "/job/step": (4, 1, 0)}, {"path": "/job/step"}, 3),
        ({"/": (None, 0, 0), "/job": (16, 15, 1), "/job/step": (8, 1, 0)}, {"path": "/job/step"}, 2),  # of the parent
        ({"/": (8, 2, 0), "/job": (None, 1, 0)}, {"path": "/job"}, 6),
        ({"/": (4, 1, 0)}, {"path": "/docker/abc", "root": "/docker/abc"}, 3),  # the container's own is seen as root
        ({"/": (8, 1, 0), "/sub": (4, 1, 0)}, {"path": "/docker/abc/sub", "root": "/docker/abc"}, 3),
        ({"/": (4, 1, 0)}, {"path": "/../other"}, 3),
        ({"/": (4, 1, 0)}, {"path": "/gone/deeper"}, 3),
    ],
)
def test_memory_that_control_groups_leave(tmp_path, monkeypatch, version, groups, places, expected):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.delenv(name, raising=False)
    groups = {
        name: (NO_LIMIT[version] if limit is None else limit * GIB, usage * GIB, cached * GIB)
        for name, (limit, usage, cached) in groups.items()
    }
    assert available_memory(control_groups(tmp_path, version, groups, **places)) == expected * GIB


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_memory_limits_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert available_memory(tmp_path / "nothing") == 64 * GIB  # no control groups
    (tmp_path / "high").mkdir()
    process = control_groups(tmp_path / "high", 2, {"/": ("max", GIB, 0)})
    (tmp_path / "high" / "cgroup" / "memory.high").write_text(f"{3 * GIB}\n")
    assert available_memory(process) == 2 * GIB
    (tmp_path / "hidden").mkdir()
    process = control_groups(tmp_path / "hidden", 1, {"/": (NO_LIMIT[1], GIB, 0)})
    with open(tmp_path / "hidden" / "cgroup" / "memory.stat", "a") as file:
        file.write(f"hierarchical_memory_limit {6 * GIB}\n")  # of a group above, which is not seen
    assert available_memory(process) == 5 * GIB
    used = psutil.Process().memory_info().rss
    for settings, megabytes in [
        ({"SLURM_MEM_PER_NODE": "5000"}, 5000),
        ({"SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_ON_NODE": "4"}, 4000),
        ({"SLURM_MEM_PER_NODE": "0"}, 64 * 1024),  # all there is
    ]:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            left = available_memory(tmp_path / "nothing")
            assert left == 64 * GIB or abs(left + used - megabytes * 2**20) < 2**28
            assert (left == 64 * GIB) == (megabytes == 64 * 1024)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + GIB, before[1]))
    try:
        assert 0.5 * GIB < available_memory(tmp_path / "nothing") <= GIB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_automatic_tiles_where_the_container_has_less_than_the_machine(model, monkeypatch, tmp_path):
    process = control_groups(tmp_path, 2, {"/": (12 * 2**20, 2 * 2**20, 0)})
    monkeypatch.setattr(inference, "available_memory", lambda: available_memory(process))
    with pytest.warns(UserWarning, match="tile=128"):
        assert inference.automatic_tile(model, (1, 3, 160, 256), torch.device("cpu")) == 128


def test_bf16_is_close(model):
    image = random_image(24, 24)
    restored = restore(model, image, bf16=True)
    assert restored.dtype == np.float32
    difference = np.abs(restored - restore(model, image))
    assert 0 < difference.max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, dict(tile=16, tile_overlap=8), dict(bf16=True)], ids=str)
def test_network_of_another_precision(model, dtype, options):
    image = random_image(24, 24)
    expected = restore(model, image, **options)
    restored = restore(model.to(dtype), image, **options)
    assert restored.dtype == np.float32 and np.abs(restored - expected).max() < 0.05


def test_compiled_network(tiny_model):
    """Compiled in place or wrapped, with a backend that needs no compiler."""
    model = tiny_model(stages=1)
    image = random_image(24, 24)
    expected = restore(model, image)
    torch._dynamo.reset()
    wrapped = torch.compile(model, backend="eager").train()
    np.testing.assert_allclose(restore(wrapped, image), expected, atol=1e-6)
    assert wrapped.training and model.training
    torch._dynamo.reset()
    model.compile(backend="eager")
    np.testing.assert_allclose(restore(model, image), expected, atol=1e-6)


@pytest.mark.parametrize("tile", ["auto", 64])
def test_overlap_that_is_asked_for_is_taken(monkeypatch, tile):
    model = Local()
    image = random_image(160, 256)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * 2**20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some, none = (restore(model, image, tile=tile, tile_overlap=overlap) for overlap in (32, 0))
        side = 128 if tile == "auto" else tile
        np.testing.assert_array_equal(some, restore(model, image, tile=side, tile_overlap=32))
        assert np.abs(some - none).max() > 1e-3
        # of an automatic tile, whose side nobody knows, half at most
        most = restore(model, image, tile="auto", tile_overlap=10**6)
        np.testing.assert_array_equal(most, restore(model, image, tile=128, tile_overlap=64))


@pytest.mark.parametrize("kind", [np.int64, np.int16, np.uint8])
def test_tiles_of_numpy_integers(model, kind):
    image = random_image(300, 40)
    expected = restore(model, image, tile=120, tile_overlap=24)
    np.testing.assert_array_equal(restore(model, image, tile=kind(120), tile_overlap=kind(24)), expected)


def test_bytes_in_the_other_order(model):
    image = (random_image(13, 20) * 65535).astype(np.uint16)
    for kind in (np.dtype("<u2"), np.dtype(">u2")):
        restored = restore(model, image.astype(kind))
        assert restored.dtype == kind
        np.testing.assert_array_equal(restored.astype(np.uint16), restore(model, image))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("part", "stage"), [("first", 1), ("middle", 2), ("last", 3)])
def test_network_that_gives_no_numbers(model, value, part, stage):
    """The stage is named; an infinite value must not pass as white."""
    stages = model.middle[0] if part == "middle" else getattr(model, part)
    with torch.no_grad():
        stages.rho.fill_(value)
    for options in ({}, dict(tile=16, tile_overlap=0), dict(self_ensemble=True), dict(bf16=True)):
        message = refusal(model, random_image(24, 24), **options)
        assert f"stage {stage} " in message and "NaN or infinite" in message
        assert ("half precision" in message) == ("bf16" in options)


def with_value(value) -> np.ndarray:
    image = random_image(8, 8)
    image[3, 4, 1] = value
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (with_value(np.nan), "NaN or infinite"),
        (with_value(np.inf), "NaN or infinite"),
        (torch.full((3, 8, 8), torch.nan), "NaN or infinite"),
        (random_image(8, 8) * 255, r"\[0, 1\].*divide by 255"),
        (random_image(8, 8) * 2 - 5, r"\[0, 1\]"),
        (random_image(8, 8, 4), r"RGB .*RGBA.*rgba\[..., :3\]"),
        (random_image(8, 8, 1), "RGB .*grey.*np.stack"),
        (random_image(8, 8)[..., 0], "RGB .*grey"),
        (torch.rand(8, 8, 3), r"RGB .*8 channels .*\(8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "uint8, uint16.*got int64"),
        (np.zeros((8, 8, 3), bool), "uint8, uint16.*got bool"),
        (np.zeros((8, 8, 3), complex), "uint8, uint16.*got complex"),
        (np.array([["a"]]), "uint8, uint16.*got <U1"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "uint8, uint16.*got torch.int32"),
        (np.zeros((0, 8, 3), np.uint8), "got shape"),
        (np.zeros((8, 3), np.uint8)[:0], "got shape"),
        (np.zeros(8, np.uint8), "got shape"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), "got shape"),
        ("photo.png", "not str"),
        (None, "not NoneType"),
    ],
)
def test_unsuitable_image(model, image, message):
    with pytest.raises(UserError, match=message):
        restore(model, image)
    assert "\n" not in refusal(model, image)


def test_colour_image_for_a_grey_model(tiny_model):
    assert "RGB" in refusal(tiny_model(channels=1, stages=2), random_image(8, 8))


def odd_tensors() -> dict[str, torch.Tensor]:
    x = torch.rand(3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "meta": x.to("meta"),
            "sparse": x.to_sparse(),
            "sparse rows": x[0].to_sparse_csr(),
            "nested": torch.nested.nested_tensor([x, x[:, :8]]),
            "jagged": torch.nested.nested_tensor([x[0], x[0, :8]], layout=torch.jagged),
            "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        }


@pytest.mark.parametrize("kind", odd_tensors())
def test_unsuitable_tensor(model, kind):
    assert "nested, sparse, quantised or meta" in refusal(model, odd_tensors()[kind])


def test_masked_array(model):
    image = random_image(8, 8)
    assert "masked" in refusal(model, np.ma.masked_array(image, image > 0.5))


def test_unsuitable_network(model, tiny_model):
    image = random_image(16, 16)
    assert "not NoneType" in refusal(None, image)
    assert "not Conv2d" in refusal(nn.Conv2d(3, 3, 3), image)
    assert ".module" in refusal(nn.DataParallel(model), image)
    assert "meta device" in refusal(tiny_model(stages=2).to("meta"), image)
    model.last.half()
    assert "model.to(device, dtype)" in refusal(model, image)


ODD_TILES = [
    dict(tile=8), dict(tile="large"), dict(tile=64.5), dict(tile=64, tile_overlap=40), dict(tile=True), dict(tile=64.0),
    dict(tile=float("nan")), dict(tile=np.array([64, 64])), dict(tile=[64]), dict(tile=b"auto"), dict(tile=-64),
    dict(tile=64, tile_overlap=8.5), dict(tile=64, tile_overlap=True), dict(tile=64, tile_overlap="8"),
    dict(tile=64, tile_overlap=float("nan")), dict(tile=64, tile_overlap=np.array([8])), dict(tile_overlap=-1),
    dict(tile=None, tile_overlap=-1), dict(tile=None, tile_overlap="x"), dict(tile_overlap=1j), dict(tile=1j),
]  # fmt: skip


@pytest.mark.parametrize("options", ODD_TILES, ids=str)
def test_unsuitable_tiles(model, options):
    for given in (options, dict(tile=64, tile_overlap=-1)):
        message = refusal(model, random_image(8, 8), **given)
        assert all(f"{name}={value!r}" in message for name, value in given.items())


def test_network_of_a_known_degradation(tiny_model):
    model = tiny_model("compressive_sensing_dgunet")
    assert "measurements (32, 32, 1)" in refusal(model, random_image(32, 32, 1)), "an image is no measurement"


def random_argument(rng: np.random.Generator):
    """An image, a batch or a list of them, of any type and shape; often not a suitable one."""
    kind = int(rng.integers(8))
    if kind == 0:
        return [random_argument(rng) for _ in range(int(rng.integers(3)))]
    shape = [3, *rng.integers(0 if rng.random() < 0.1 else 1, 40, 2)]
    shape = [int(rng.integers(0, 5)), *shape[1:]] if rng.random() < 0.2 else shape
    shape = [int(rng.integers(0, 3)), *shape] if rng.random() < 0.3 else shape
    shape = shape[1:] if rng.random() < 0.1 else shape
    x = rng.random(shape)
    if rng.random() < 0.2 and x.size:
        x.flat[int(rng.integers(x.size))] = rng.choice([np.nan, np.inf, -np.inf, 300.0, -7.0, 1e300])
    if kind <= 4:
        x = np.moveaxis(x, -3, -1) if x.ndim >= 3 else x
        dtype = str(
            rng.choice(["u1", "<u2", ">u2", "f2", "<f4", ">f4", "f8", "g", "i4", "?", "c8", "O", "S3", "M8[s]"])
        )
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = (x if "f" in dtype or dtype == "g" else np.nan_to_num(x * 200).astype(np.int64)).astype(dtype)
        view = [array, array[::-1], array[..., ::-1], np.asfortranarray(array), np.ma.masked_array(array)]
        return view[int(rng.integers(len(view)))] if array.ndim else array
    if kind == 7:
        return [None, 1.5, "photo.png", b"", {}, object(), {1, 2}, range(3)][int(rng.integers(8))]
    dtypes = [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64,
              torch.bool, torch.complex64, torch.float8_e4m3fn]  # fmt: skip
    tensor = torch.from_numpy(np.clip(x, -(10**6), 10**6))
    dtype = dtypes[int(rng.integers(len(dtypes)))]
    tensor = (tensor.nan_to_num() * 200 if not dtype.is_floating_point else tensor).to(dtype)
    changes = [lambda t: t, lambda t: t.requires_grad_(t.is_floating_point()), lambda t: t.mT if t.dim() > 1 else t,
               lambda t: t.expand(2, *t.shape), lambda t: t.to("meta"), lambda t: t.to_sparse(),
               lambda t: nn.Parameter(t, requires_grad=False), lambda t: t[..., ::2]]  # fmt: skip
    try:
        return changes[int(rng.integers(len(changes)))](tensor)
    except RuntimeError:  # PyTorch has no such tensor
        return tensor


def test_random_arguments_are_restored_or_refused_in_one_line(tiny_model, fuzz):
    """Whatever is restored has the type, shape and range of what came in, and is what the float network makes of it."""
    networks = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        networks[dtype] = tiny_model(width=4, growth=2, final_growth=2, stages=2).to(dtype)
    odd = [
        None,
        "auto",
        16,
        17,
        18,
        23,
        24,
        31,
        64,
        10**30,
        0,
        -1,
        15,
        16.0,
        True,
        "x",
        float("nan"),
        np.int8(24),
        (16,),
    ]
    restored = refused = 0
    for trial in range(100 * fuzz):
        rng = np.random.default_rng([11, trial])
        image = random_argument(rng)
        options = {}
        if rng.random() < 0.6:
            options["tile"] = odd[int(rng.integers(len(odd)))]
        if rng.random() < 0.4:
            overlaps = [0, 1, 7, 8, 9, 11, 15, 32, -1, 2.5, True, None, "8", np.uint8(8)]
            options["tile_overlap"] = overlaps[int(rng.integers(len(overlaps)))]
        options |= dict(self_ensemble=rng.random() < 0.2, bf16=rng.random() < 0.2)
        network = list(networks.values())[int(rng.choice(4, p=[0.7, 0.1, 0.1, 0.1]))]
        where = f"trial {trial}: {type(image)} {getattr(image, 'dtype', '')} {getattr(image, 'shape', '')} {options}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about 1e300 in float32
                out = restore(network, image, **options)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error), where
            continue
        except BaseException as error:
            raise AssertionError(where) from error
        restored += 1
        for one, result in zip(image, out, strict=True) if isinstance(image, list) else [(image, out)]:
            if isinstance(one, list):
                continue
            assert isinstance(result, torch.Tensor if isinstance(one, torch.Tensor) else np.ndarray), where
            assert result.shape == one.shape and result.dtype == one.dtype, where
            values = np.asarray(result.float() if isinstance(result, torch.Tensor) else result, dtype=np.float64)
            whole = str(one.dtype).startswith(("torch.uint", "uint", ">u"))
            assert np.isfinite(values).all() and values.min() >= 0 and (whole or values.max() <= 1), where
    print(f"{restored + refused} trials: {restored} restored, {refused} refused")
    assert restored > 10 and refused > 10
