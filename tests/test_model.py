"""The model: every variant and option, the subspace projection, and the sampling operator."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgunet import DGUNet, UserError, create_model, list_models
from dgunet.checkpoints.original import is_unused
from dgunet.data.synthesis import motion_kernel
from dgunet.model.degradations import Blur, MotionBlur
from dgunet.model.fusion import SubspaceFusion
from dgunet.model.instance_norm import HalfInstanceNorm
from dgunet.model.layers import ChannelAttention
from dgunet.model.projection import project
from dgunet.model.sampling import (
    RATIOS,
    BlockSampling,
    ScalableSampling,
    block_sampling,
    init_sampling_matrix,
    num_rows,
    percentage,
    sampling_operator,
)
from dgunet.training.cli import degradation_from_config
from dgunet.training.config import load_config
from dgunet.training.step import MeasureThenRestore

SPECS = json.loads((Path(__file__).parent / "parity" / "specs.json").read_text())
SMALL = dict(width=16, growth=8, final_growth=8)


class HalfBrightness:
    """A user's own degradation, a plain Python object."""

    def A(self, x):
        return 0.5 * x

    def A_adjoint(self, y):
        return 0.5 * y


class Gain(nn.Module):
    """A user's own degradation with a weight that is trained along."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5]))

    def A(self, x):
        return self.gain * x

    def A_adjoint(self, y):
        return self.gain * y


def measured(model: DGUNet, size: int = 16) -> torch.Tensor:
    """What the model takes for a random image."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(model.degradation, BlockSampling):
        with torch.no_grad():
            return model.degradation.A(torch.rand(2, model.channels, 32, 32, generator=generator))
    return torch.rand(2, model.channels, size, size, generator=generator)


def gradients(model: DGUNet, y: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum((x - 0.3).square().mean() for x in model(y)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_all_receive_gradients(model: DGUNet):
    for module in model.modules():
        if isinstance(module, ChannelAttention):  # of two opposite units one is active: none is dead by chance
            with torch.no_grad():
                module.squeeze.weight[1] = -module.squeeze.weight[0]
    for name, gradient in gradients(model, measured(model)).items():
        assert gradient is not None, f"{name} receives no gradient"
        assert torch.isfinite(gradient).all(), f"{name} has a gradient that is not finite"
        assert gradient.abs().max() > 0, f"{name} has a gradient of zero"


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    sensing = name.startswith("compressive_sensing")
    assert_all_receive_gradients(create_model(name, **({} if sensing else SMALL)))


@pytest.mark.parametrize(
    "overrides",
    [dict(stages=k, shared=shared) for k in (1, 2, 3, 7) for shared in (True, False)]
    + [dict(stages=k, pathways=False, shared=shared) for k in (2, 3) for shared in (True, False)]
    + [dict(stages=k, fusion=fusion) for k in (1, 2, 3) for fusion in ("concat", "none")]
    + [dict(stages=k, isff=isff) for k in (2, 3) for isff in ("additive", "none")]
    + [dict(stages=3, fusion="none", isff="none"), dict(stages=3, fusion="none", shared=False)]
    + [dict(stages=k, attention=True) for k in (2, 3)]
    + [dict(stages=k, gradient=False) for k in (1, 3)]
    + [dict(stages=3, gradient=False, degradation=HalfBrightness())]
    + [dict(stages=k, final_fusion="subspace") for k in (1, 2, 3)]
    + [dict(stages=3, fusion="concat", final_fusion="subspace")]
    + [dict(stages=k, degradation=HalfBrightness()) for k in (1, 3)]
    + [dict(stages=3, degradation=Gain(), shared=False)]
    + [dict(stages=3, channels=c) for c in (1, 4)],
    ids=lambda overrides: "-".join(
        f"{k}={type(v).__name__ if k == 'degradation' else v}" for k, v in overrides.items()
    ),
)
def test_every_option_trains_every_parameter(overrides):
    torch.manual_seed(0)
    model = DGUNet(**(SMALL | overrides))
    estimates = model(measured(model))
    assert len(estimates) == overrides["stages"]
    assert all(x.shape == (2, model.channels, 16, 16) for x in estimates)
    assert_all_receive_gradients(model)


@pytest.mark.parametrize(
    ("variant", "name", "options"),
    [(v, v, {}) for v in SPECS if not v.startswith("cs_")]
    + [
        ("cs_dgunet_r10", "compressive_sensing_dgunet", {"ratio": 0.1}),
        ("cs_dgunet_plus_r10", "compressive_sensing_dgunet_plus", {"ratio": 0.1}),
        ("cs_dgunet_r25", "compressive_sensing_dgunet", {}),
    ],
)
def test_number_of_parameters_is_that_of_the_original(variant, name, options):
    with torch.device("meta"):
        model = create_model(name, **options)
    used = sum(math.prod(shape) for key, shape in SPECS[variant].items() if not is_unused(key))
    assert sum(p.numel() for p in model.parameters()) == used


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("deblurring_dgunet", 17_331_512),
        ("deblurring_dgunet_plus", 69_572_915),
        ("denoising_dgunet_plus", 48_361_987),
        ("deraining_dgunet", 3_661_912),
        ("deraining_dgunet_plus", 12_176_107),
    ],
)
def test_number_of_parameters_as_published(name, published):
    # The original counts one PReLU of those it shares: the gradient steps' is one, the attention blocks' are one for
    # the shared middle stage and one for the others.
    unused = sum(math.prod(shape) for key, shape in SPECS[name].items() if is_unused(key))
    with torch.device("meta"):
        model = create_model(name)
    slopes = [key for key, _ in model.named_parameters() if key.endswith("activation.weight")]
    groups = len({"degradation" if ".degradation." in key else is_middle(key, model) for key in slopes})
    ours = sum(p.numel() for p in model.parameters())
    assert ours - len(slopes) + groups == published - unused


def is_middle(key: str, model: DGUNet) -> str:
    """The group of the original's shared PReLUs that an attention block's belongs to."""
    return "middle" if key.startswith("middle.") and len(model.middle) == 1 else "network"


def test_all_eight_names():
    tasks = ["deblurring", "denoising", "deraining", "compressive_sensing"]
    assert set(list_models()) == {f"{task}_dgunet{plus}" for task in tasks for plus in ("", "_plus")}


def test_final_estimate_comes_first(tiny_model):
    model = tiny_model(stages=4)
    y = torch.rand(1, 3, 16, 16)
    before = model(y)
    with torch.no_grad():
        model.last.proximal.image_conv.weight.add_(0.1)
    changed = [not torch.equal(a, b) for a, b in zip(before, model(y), strict=True)]
    assert changed == [True, False, False, False]


def test_shared_middle_stages_are_one(tiny_model):
    shared, own = tiny_model(stages=6), tiny_model(stages=6, shared=False)
    assert (len(shared.middle), len(own.middle)) == (1, 4)
    assert list(shared.iter_stages())[1:5] == [shared.middle[0]] * 4
    assert len({id(stage) for stage in own.iter_stages()}) == 6


def test_first_stage_is_the_proximal_gradient_step(tiny_model):
    model = tiny_model(stages=2)
    y = torch.rand(1, 3, 16, 16)
    first = model.first
    v = y - 0.5 * first.degradation.A_adjoint(first.degradation.A(y) - y)
    torch.testing.assert_close(model(y)[-1], first.proximal(v, None)[0])
    assert [stage.rho.item() for stage in model.iter_stages()] == [0.5, 0.5]


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("shape", [(1, 3, 37, 53), (1, 3, 16, 20), (1, 3, 4, 8)])
def test_sides_that_are_no_multiples_of_8(tiny_model, shape):
    with pytest.raises(ValueError, match=f"8, got {shape[2]}x{shape[3]}.*restore"):
        tiny_model()(torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16)])
def test_wrong_channels(tiny_model, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        tiny_model()(torch.rand(shape))


def test_smallest_image(tiny_model):
    assert all(torch.isfinite(x).all() for x in tiny_model()(torch.rand(2, 3, 8, 8)))


def test_images_of_a_batch_do_not_meet(tiny_model):
    model, y = tiny_model(stages=3), torch.rand(3, 3, 16, 24)
    alone = torch.cat([model(one[None])[0] for one in y])
    torch.testing.assert_close(model(y)[0], alone, atol=1e-5, rtol=1e-5)


def test_channels_last_gives_the_same(tiny_model):
    model, y = tiny_model(), torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = model(y)
        found = model.to(memory_format=torch.channels_last)(y.to(memory_format=torch.channels_last))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("denoising_dgunt", {}, "denoising_dgunt.*denoising_dgunet"),
        ("xyz", {}, "xyz.*deblurring_dgunet"),
        ("denoising_dgunet", {"widht": 8}, "'widht'.*width"),
        ("denoising_dgunet", {"ratio": 0.25}, "denoising_dgunet .*'ratio'.*width"),
        ("denoising_dgunet", {"stages": 0}, "stages .*1.*got 0"),
        ("denoising_dgunet", {"width": 7}, "width .*even.*got 7"),
        ("denoising_dgunet", {"growth": 5}, "growth .*even.*got 5"),
        ("denoising_dgunet", {"growth": -2}, "growth .*0.*got -2"),
        ("denoising_dgunet", {"stages": 10**9}, "stages .*1.*100.*got 1000000000"),
        ("denoising_dgunet", {"width": 10**9}, "width .*4.*1024.*got 1000000000"),
        ("denoising_dgunet", {"width": 8.0}, "width .*got 8.0"),
        ("denoising_dgunet", {"stages": "7"}, "stages .*got '7'"),
        ("denoising_dgunet", {"stages": True}, "stages .*got True"),
        ("denoising_dgunet", {"channels": 0}, "channels .*1.*got 0"),
        ("denoising_dgunet", {"final_growth": 1025}, "final_growth .*0.*1024.*got 1025"),
        ("denoising_dgunet", {"shared": "no"}, "shared .*True.*False.*got 'no'"),
        ("denoising_dgunet", {"pathways": 1}, "pathways .*True.*False.*got 1"),
        ("denoising_dgunet", {"final_fusion": ["concat"]}, "final_fusion .*'subspace'.*'concat'"),
        ("denoising_dgunet", {"rho": "half"}, "rho .*got 'half'"),
        ("denoising_dgunet", {"rho": float("nan")}, "rho .*got nan"),
        ("denoising_dgunet", {"fusion": "sum"}, "fusion .*'subspace'.*'concat'.*got 'sum'"),
        ("compressive_sensing_dgunet", {"ratio": 0}, "ratio .*got 0"),
        ("compressive_sensing_dgunet", {"ratio": 25}, "ratio .*got 25"),
    ],
)
def test_mistakes_in_construction(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(name, **options)
    assert "\n" not in str(error.value)
    if name not in list_models() or not {"ratio"} & options.keys():
        assert isinstance(error.value, UserError)


@pytest.mark.parametrize(
    ("overrides", "absent", "present"),
    [
        (dict(pathways=False), ("fusion", "isff", "features_conv"), ("rho",)),
        (dict(fusion="none"), ("fusion", "features_conv"), ("isff",)),
        (dict(fusion="none", attention=True), ("attention_conv",), ("isff",)),
        (dict(isff="none"), ("isff",), ("fusion", "features_conv")),
        (dict(isff="additive"), ("scale_conv", "shift_conv"), ("isff", "basis_conv")),
        (dict(fusion="concat"), ("basis_conv", "attention_conv"), ("scale_conv", "fusion.conv")),
        (dict(gradient=False), ("rho", "degradation"), ("fusion", "isff")),
    ],
    ids=str,
)
def test_each_part_can_be_left_out_alone(tiny_model, overrides, absent, present):
    """A part that is out has no weights, and nothing reaches the next stage by it; all others have theirs."""
    model = tiny_model(**overrides)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names for part in absent if part in name]
    assert all(any(part in name for name in names) for part in present)


def test_without_pathways_a_stage_sees_only_the_estimate_of_the_one_before(tiny_model):
    model = tiny_model(pathways=False)
    x = torch.rand(1, 3, 16, 16)
    v = model.middle[0].gradient_step(x, x, None)
    estimate, handed_on = model.middle[0].proximal(v, None)
    assert handed_on.features is handed_on.encoded is handed_on.decoded is None
    torch.testing.assert_close(model.middle[0](x, x, handed_on, None)[0], estimate)


def test_without_gradient_steps_the_mapping_is_given_the_estimate(tiny_model):
    """``v_k = x_{k-1}``: what is measured does not matter beyond x_0, but for the residual of the last stage."""
    model = tiny_model(gradient=False)
    x, y = torch.rand(2, 1, 3, 16, 16)
    assert model.last.gradient_step(x, y, None) is x
    known = tiny_model("compressive_sensing_dgunet", gradient=False)
    y = measured(known)
    with torch.inference_mode():
        x = known.degradation.A_adjoint(y)
        torch.testing.assert_close(known.first(x, y, None, known.degradation)[0], known.first.proximal(x, None)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["denoising_dgunet", "compressive_sensing_dgunet"])
def test_copies_are_independent_and_equal(tiny_model, copied, name):
    model = tiny_model(name)
    y = measured(model)
    twin = copied(model)
    with torch.no_grad():
        expected = model(y)[0]
        assert torch.equal(twin(y)[0], expected)
        twin.last.rho.add_(1)
        assert torch.equal(model(y)[0], expected)
        assert not torch.equal(twin(y)[0], expected)
    assert (twin.name, twin.arguments) == (model.name, model.arguments)


@pytest.mark.parametrize("overrides", [{}, dict(shared=False, final_fusion="subspace"), dict(fusion="concat")])
def test_checkpointing_gives_the_same_gradients(tiny_model, overrides):
    model = tiny_model(stages=4, **overrides)
    y = measured(model)
    expected = {name: g.clone() for name, g in gradients(model, y).items()}
    model.checkpointing = True
    for name, gradient in gradients(model, y).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5)


def test_import_is_light(run_command):
    heavy = ["cv2", "skimage", "h5py", "torchvision", "matplotlib", "scipy", "PIL"]
    code = f"import dgunet, sys; print([name for name in {heavy} if name in sys.modules])"
    done = run_command(["-c", code])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_model_imports_nothing_above_it(run_command):
    code = "import dgunet.model, sys; print(*(name for name in sys.modules if name.startswith('dgunet.')))"
    done = run_command(["-c", code])
    rooms = {name.split(".")[1] for name in done.stdout.split()}
    assert rooms == {"_moved", "model", "runtime"}, done.stderr


# ------------------------------------------------------------------------------------------------- known degradations


@pytest.mark.parametrize("degradation", [HalfBrightness(), Gain()], ids=["object", "module"])
def test_own_degradation_takes_the_place_of_the_learned_one(degradation):
    torch.manual_seed(0)
    model = DGUNet(**SMALL, stages=3, degradation=degradation).eval()
    assert not [name for name, _ in model.named_modules() if "degradation." in name]
    y = torch.rand(1, 3, 16, 16)
    x = 0.5 * y  # the start is A_adjoint(y)
    v = x - 0.5 * 0.5 * (0.5 * x - y)
    torch.testing.assert_close(model(y)[-1], model.first.proximal(v, None)[0])


@pytest.mark.parametrize("methods", [(), ("A",), ("A_adjoint",)], ids=str)
def test_own_degradation_without_its_methods_is_refused(methods):
    half = type("HalfDone", (), {name: lambda self, x: x for name in methods})()
    missing = ".*".join(name for name in ("A", "A_adjoint") if name not in methods)
    with pytest.raises(ValueError, match=rf"HalfDone.*{missing}$"):
        DGUNet(**SMALL, degradation=half)
    with pytest.raises(UserError, match="compressive_sensing_dgunet: .*HalfDone"):
        create_model("compressive_sensing_dgunet", degradation=half)


def test_last_stage_of_a_known_degradation_is_a_residual_to_v():
    model = DGUNet(**SMALL, stages=1, degradation=HalfBrightness())
    nn.init.zeros_(model.last.proximal.image_conv.weight)
    y = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(model(y)[0], 0.5 * y - 0.25 * (0.25 * y - y))
    unknown = DGUNet(**SMALL, stages=1)
    nn.init.zeros_(unknown.last.proximal.image_conv.weight)
    torch.testing.assert_close(unknown(y)[0], y)


@pytest.mark.parametrize(("ratio", "rows"), [(0.01, 11), (0.04, 41), (0.10, 103), (0.25, 256), (0.50, 512)])
def test_block_sampling_is_adjoint(ratio, rows):
    torch.manual_seed(0)
    sampling = BlockSampling(ratio).double()
    assert sampling.matrix.shape == (rows, 1024)
    x = torch.randn(2, 1, 64, 96, dtype=torch.float64)
    y = torch.randn(2, rows, 2, 3, dtype=torch.float64)
    measured = sampling.A(x)
    assert measured.shape == y.shape
    torch.testing.assert_close((measured * y).sum(), (x * sampling.A_adjoint(y)).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("kernel", "size"), [((1, 1), (8, 8)), ((5, 3), (9, 12)), ((3, 7), (2, 5)), ((9, 9), (1, 4))])
def test_blur_is_adjoint(kernel, size):
    """Also where the kernel is larger than the image."""
    torch.manual_seed(0)
    blur = Blur(torch.randn(kernel)).double()
    x, y = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    assert blur.A(x).shape == blur.A_adjoint(y).shape == x.shape
    torch.testing.assert_close((blur.A(x) * y).sum(), (x * blur.A_adjoint(y)).sum(), rtol=1e-10, atol=1e-12)
    gradient = torch.autograd.functional.vjp(blur.A, x, y)[1]
    torch.testing.assert_close(blur.A_adjoint(y), gradient, rtol=1e-10, atol=1e-12)


def test_blur_is_the_convolution_with_its_kernel():
    kernel, image = torch.rand(3, 5), torch.rand(10, 11)
    expected = scipy.ndimage.convolve(image.numpy(), kernel.numpy(), mode="mirror")
    np.testing.assert_allclose(Blur(kernel).A(image[None, None])[0, 0], expected, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert Blur(kernel).A(image[None, None].bfloat16()).dtype == torch.float32


def test_blur_measures_with_its_noise():
    torch.manual_seed(0)
    blur, x = Blur(torch.ones(3, 3) / 9, noise=0.1), torch.rand(1, 1, 64, 64)
    assert (blur.measure(x) - blur.A(x)).std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(Blur(blur.kernel).measure(x), blur.A(x))


@pytest.mark.parametrize("blur", [Blur(torch.ones(3, 3) / 9, noise=0.1), MotionBlur(3, 9, 0.1, motion_kernel)])
def test_measurement_does_not_depend_on_how_a_batch_is_divided(blur):
    """The kernel is of the batch's generator, noise of each image's own, whichever others are beside it."""

    def measure(images: range) -> torch.Tensor:
        shared, *own = (torch.Generator().manual_seed(seed) for seed in (7, *images))
        return blur.measure(x[images], shared, own)

    x = torch.rand(4, 1, 40, 48)
    whole, parts = measure(range(4)), torch.cat([measure(range(3)), measure(range(3, 4))])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    x = x[:1].expand(4, -1, -1, -1)
    assert (measure(range(4)).std(dim=0) > 0.01).float().mean() > 0.9, "two images do not have the same noise"


def test_simulated_blur_is_another_at_each_step_and_comes_in_from_beyond_the_borders():
    blur, x, kernels = MotionBlur(5, 25, sample_kernel=motion_kernel), torch.rand(2, 1, 72, 80), []
    torch.manual_seed(0)
    for _ in range(3):
        y = blur.measure(x)
        assert y.shape == (2, 1, 40, 48)
        torch.testing.assert_close(y, Blur(blur.kernel).A(x)[..., 16:-16, 16:-16])
        assert blur.kernel.sum().item() == pytest.approx(1, abs=1e-5)
        kernels.append(blur.kernel)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(kernels, kernels[1:], strict=False))
    torch.manual_seed(0)
    blur.measure(x)
    assert torch.equal(blur.kernel, kernels[0]), "as PyTorch's generator says"
    assert "kernel" not in blur.state_dict()
    with pytest.raises(UserError, match="40"):
        blur.measure(x[..., :39])
    with pytest.raises(UserError, match="sample_kernel"):
        MotionBlur(5, 25).measure(x)


def test_network_for_any_blur_is_given_one():
    torch.manual_seed(0)
    kernel = torch.rand(3, 5) / 7
    any_blur = DGUNet(1, 8, 4, 2, final_growth=4, degradation=MotionBlur())
    this_blur = DGUNet(1, 8, 4, 2, final_growth=4, degradation=Blur(kernel))
    this_blur.load_state_dict(any_blur.state_dict() | {"degradation.kernel": kernel})
    y = torch.rand(1, 1, 16, 24)
    for given, expected in zip(any_blur(y, Blur(kernel)), this_blur(y), strict=True):
        assert torch.equal(given, expected)
    with pytest.raises(UserError, match=r"Blur\(kernel\)"):
        any_blur(y)
    with pytest.raises(ValueError, match="learned degradation"):
        DGUNet(1, 8, 4, 2, final_growth=4)(y, Blur(kernel))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 4), (0, 3)])
def test_kernel_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"kernel.*got \("):
        Blur(torch.ones(shape))


@pytest.mark.parametrize(
    "name, kernel, message",
    [
        ("fog", None, "MODEL.DEGRADATION .*'fog'"),
        ("blur", None, "MODEL.DEGRADATION .*MODEL.KERNEL"),
        ("", np.ones((3, 3)), "MODEL.DEGRADATION .*MODEL.KERNEL"),
        ("blur", np.ones((2, 3)), r"MODEL.KERNEL .*kernel.npy: .*\(2, 3\)"),
        ("blur", np.full((3, 3), np.nan), "MODEL.KERNEL .*kernel.npy: .*not finite"),
        ("blur", "text", "MODEL.KERNEL .*kernel.npy: .*.npy file"),
    ],
)
def test_impossible_known_degradations_are_refused(tmp_path, name, kernel, message):
    path = tmp_path / "kernel.npy"
    path.write_text(kernel) if isinstance(kernel, str) else np.save(path, kernel if kernel is not None else 0)
    options = ["MODEL.DEGRADATION", name] + (["MODEL.KERNEL", str(path)] if kernel is not None else [])
    with pytest.raises(UserError, match=message):
        degradation_from_config(load_config(None, options))


def test_block_sampling_measures_blocks_by_the_matrix():
    sampling = BlockSampling(0.04)
    x = torch.rand(1, 1, 64, 96)
    block = x[0, 0, 32:64, 64:96].flatten()  # second row, third column
    torch.testing.assert_close(sampling.A(x)[0, :, 1, 2], sampling.matrix @ block)


def test_fixed_matrix_is_orthonormal_and_not_trained():
    sampling = BlockSampling(0.1, learned=False)
    assert not list(sampling.parameters())
    torch.testing.assert_close(sampling.matrix @ sampling.matrix.T, torch.eye(103), atol=1e-5, rtol=0)


def test_matrix_of_another_block_is_refused():
    with pytest.raises(ValueError, match=r"16x16.*\(M, 256\).*\(9, 1024\)"):
        BlockSampling(block=16, matrix=torch.rand(9, 1024))


@pytest.mark.parametrize("start", ["orthonormal", "dct", "pca"])
def test_matrices_that_start_orthonormal(start):
    blocks = torch.rand(200, 1024)
    matrix = init_sampling_matrix(start, 0.1, blocks=lambda: blocks)
    assert matrix.shape == (103, 1024)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(103), atol=1e-5, rtol=0)


def test_dct_matrix_is_scipys_in_zigzag_order():
    scipy_fft = pytest.importorskip("scipy.fft")
    block = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    coefficients = torch.from_numpy(scipy_fft.dctn(block.double().numpy(), norm="ortho")).float()
    zigzag = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]  # as in JPEG
    measured = init_sampling_matrix("dct", 1) @ block.flatten()
    torch.testing.assert_close(measured[:10], torch.stack([coefficients[uv] for uv in zigzag]))
    torch.testing.assert_close(measured.sort()[0], coefficients.flatten().sort()[0])  # every frequency once


def test_pca_matrix_spans_what_the_blocks_are_made_of():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(11, 1024, generator=generator)
    blocks = torch.rand(50, 11, generator=generator) @ parts
    sampling = BlockSampling(matrix=init_sampling_matrix("pca", 0.01, blocks=lambda: blocks)).double()
    image = blocks[7].double().view(1, 1, 32, 32)
    torch.testing.assert_close(sampling.A_adjoint(sampling.A(image)), image, atol=1e-5, rtol=0)


def test_initial_rho():
    model = create_model("compressive_sensing_dgunet", width=8, growth=4, final_growth=4, rho=1)
    assert {stage.rho.item() for stage in model.iter_stages()} == {1.0}
    assert DGUNet(width=8, growth=4, final_growth=4).first.rho.item() == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ratio=0.1, matrix="matrix.npy"), "MODEL.MATRIX .*'matrix.npy'.*MODEL.MATRIX_START"),
        (dict(ratio=0.1, start="missing.npy"), "MODEL.MATRIX_START missing.npy: .*No such file"),
        (dict(ratio=0, start="dct"), "MODEL.RATIO 0,.*ratio"),
        (dict(ratio=0.5, start="pca", blocks=lambda: torch.rand(9, 1024)), "MODEL.MATRIX_START pca: 512 .*got 9"),
    ],
)
def test_impossible_sampling_operators_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        sampling_operator(**settings)


def test_block_sampling_stays_in_float32_under_autocast():
    sampling, x = BlockSampling(0.1), torch.rand(1, 1, 64, 64)
    expected = sampling.A(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampling.A(x), expected)
        assert torch.equal(sampling.A_adjoint(expected), sampling.A_adjoint(expected.clone()))
        assert sampling.A_adjoint(expected).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 40, 64), (1, 3, 64, 64), (64, 64)])
def test_block_sampling_refuses_other_images(shape):
    with pytest.raises(ValueError, match="multiples of 32"):
        BlockSampling(0.25).A(torch.rand(shape))


def test_measurements_of_another_ratio_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 256, h, w\)"):
        create_model("compressive_sensing_dgunet")(torch.rand(1, 103, 2, 2))


@pytest.mark.parametrize("block", [8, 32, 56])
@pytest.mark.parametrize("ratio", [0.05, 0.17, 0.5])
def test_scalable_sampling_measures_with_its_first_rows(ratio, block):
    torch.manual_seed(0)
    sampling = block_sampling((0.05, 0.5), block).double()
    nn.init.normal_(sampling.matrix)
    rows, x = num_rows(ratio, block), torch.randn(2, 1, 2 * block, 3 * block, dtype=torch.float64)
    y = torch.randn(2, rows, 2, 3, dtype=torch.float64)
    for operator in (sampling.at(ratio), sampling.for_measurements(y)):
        measured = operator.A(x)
        torch.testing.assert_close(measured, sampling.A(x)[:, :rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((measured * y).sum(), (x * operator.A_adjoint(y)).sum(), rtol=1e-10, atol=1e-10)
        assert operator.matrix.untyped_storage().data_ptr() == sampling.matrix.untyped_storage().data_ptr()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_network_for_all_ratios_is_at_each_the_one_for_it_alone(checkpointing):
    """Whose matrix are the first rows: the estimates are the same to the last bit, and so are the gradients."""
    torch.manual_seed(0)
    small = dict(width=8, growth=4, final_growth=4, stages=2, checkpointing=checkpointing)
    model = create_model("compressive_sensing_dgunet", ratio=(0.01, 0.5), **small)
    for ratio in (0.01, 0.17, 0.5):
        dedicated = create_model("compressive_sensing_dgunet", ratio=ratio, **small)
        rows = num_rows(ratio, 32)
        weights = model.state_dict()
        dedicated.load_state_dict(weights | {"degradation.matrix": weights["degradation.matrix"][:rows]})
        y = model.degradation.at(ratio).A(torch.rand(2, 1, 32, 32)).detach()
        for network in (model, dedicated):
            network.zero_grad()
            estimates = network(y)
            sum(x.square().mean() for x in estimates).backward()
            assert torch.equal(estimates[0], dedicated(y)[0])
        torch.testing.assert_close(model.degradation.matrix.grad[:rows], dedicated.degradation.matrix.grad)
        assert not model.degradation.matrix.grad[rows:].any()
        assert torch.equal(model.last.rho.grad, dedicated.last.rho.grad)


def test_scalable_sampling_draws_rows_of_the_whole_range():
    sampling, x = block_sampling((0.05, 0.5), 8), torch.rand(3, 1, 16, 16)
    drawn = [sampling.measure(x, torch.Generator().manual_seed(k)).shape[1] for k in range(2000)]
    assert set(drawn) == set(range(4, 33))
    low = sum(rows < 12 for rows in drawn) / len(drawn)  # a quarter of the rows, two fifths of their logarithms
    assert 0.35 < low < 0.45
    assert drawn[:5] == [sampling.measure(x, torch.Generator().manual_seed(k)).shape[1] for k in range(5)]
    rows = sampling.measure(x).shape[1]
    torch.testing.assert_close(sampling.measure(x, torch.Generator().manual_seed(7)), sampling.A(x)[:, : drawn[7]])
    assert 4 <= rows <= 32


def test_scalable_sampling_validates_at_the_ratios_of_the_paper_within_it():
    counts = lambda sampling: [len(A.matrix) for A in sampling.validation_operators]  # noqa: E731
    assert counts(block_sampling((0.01, 0.5))) == [11, 41, 103, 256, 512] == [num_rows(r, 32) for r in RATIOS]
    assert counts(block_sampling((0.04, 0.3))) == [41, 103, 256] and counts(block_sampling((0.6, 0.8))) == [615, 820]


def test_ratios_that_a_sampling_is_not_for():
    sampling = block_sampling((0.04, 0.25))
    for ratio in (0.03, 0.26, 0, 2, float("nan")):
        with pytest.raises(UserError, match=f"{ratio:g}"):
            sampling.at(ratio)
        with pytest.raises(UserError, match=f"{ratio:g}"):
            BlockSampling(0.1).at(ratio)
    assert len(sampling.at(0.04).matrix) == 41 and BlockSampling(0.1).at(0.1).matrix.shape == (103, 1024)
    for channels in (40, 257):
        with pytest.raises(ValueError, match="from 41 to 256"):
            create_model("compressive_sensing_dgunet", ratio=(0.04, 0.25))(torch.rand(1, channels, 2, 2))
    for ratio in ((0.5, 0.01), (0.1,), (0, 0.5), (0.1, 1.5)):
        with pytest.raises(ValueError, match="ratio"):
            create_model("compressive_sensing_dgunet", ratio=ratio)
        with pytest.raises(UserError, match="MODEL.RATIO"):
            sampling_operator(ratio)
    for lowest in (0, 33, 1.5, True, "1"):
        with pytest.raises(ValueError, match="lowest"):
            ScalableSampling(lowest, 8, True, torch.rand(32, 64))


def test_ratios_in_percent():
    assert block_sampling((0.01, 0.5)).percent == "1 to 50 %" and BlockSampling(0.25).percent == "25 %"
    for percent in (0.5, 1, 4, 10, 12.5, 17, 25, 50, 100):
        assert percentage(num_rows(percent / 100, 32), 32) == f"{percent:g}"
    for block in (8, 128):
        for rows in range(1, block**2 + 1, max(block**2 // 100, 1)):
            assert num_rows(float(percentage(rows, block)) / 100, block) == rows


@pytest.mark.parametrize("block", [8, 24, 64, 128])
def test_blocks_of_other_sides(block):
    ratio = 0.02 if block == 128 else 0.1
    sampling = sampling_operator((ratio / 2, ratio), block=block)
    rows = len(sampling.matrix)
    torch.testing.assert_close(sampling.matrix @ sampling.matrix.mT, torch.eye(rows), atol=1e-5, rtol=0)
    model = create_model("compressive_sensing_dgunet", sampling, width=8, growth=4, final_growth=4, stages=1)
    x = torch.rand(1, 1, block, 2 * block)
    assert model(sampling.A(x))[0].shape == x.shape


# -------------------------------------------------------------------------------------------------- subspace projection


def random_maps(seed: int = 0, rank: int = 16, channels: int = 6, size: tuple = (12, 10)):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rank + channels, *size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).split([rank, channels], dim=1)


def least_squares(basis: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    V, target = basis.flatten(2).mT, features.flatten(2).mT
    return (V @ torch.linalg.lstsq(V, target).solution).mT.reshape(features.shape)


PRECISIONS = [torch.float64, torch.float32]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_projection_is_least_squares(precision, memory_format):
    basis, features = random_maps()
    maps = [x.float().contiguous(memory_format=memory_format) for x in (basis, features)]
    projected = project(*maps, precision)
    assert projected.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(projected.double(), least_squares(basis, features), atol=1e-5, rtol=0)
    mixed = project(maps[0], features.float().contiguous(memory_format=torch.channels_last), precision)
    torch.testing.assert_close(mixed, projected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_projection_onto_nearly_dependent_maps_is_least_squares(precision):
    basis, features = random_maps()
    basis[:, 1] = basis[:, 0] + 1e-2 * basis[:, 1]  # condition number of the Gram matrix: 1e5
    projected = project(basis.float(), features.float(), precision)
    torch.testing.assert_close(projected.double(), least_squares(basis, features), atol=1e-3, rtol=0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_the_projection(precision, memory_format):
    """Against those of a projection written out in float64, at a condition number of 1e3."""
    basis, features = random_maps()
    basis[:, 1] = basis[:, 0] + 1e-1 * basis[:, 1]
    weights = torch.randn_like(features)
    basis.requires_grad_(), features.requires_grad_()
    V = basis.flatten(2).mT
    exact = (V @ torch.linalg.solve(V.mT @ V, V.mT @ features.flatten(2).mT)).mT.reshape(features.shape)
    expected = torch.autograd.grad((weights * exact).sum(), (basis, features))
    maps = [x.detach().float().contiguous(memory_format=memory_format).requires_grad_() for x in (basis, features)]
    found = torch.autograd.grad((weights.float() * project(*maps, precision)).sum(), maps)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


class Operations(TorchDispatchMode):
    """Records the names of the operations that run, and the types of what they return."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        self.dtypes |= {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_projection_does_nothing_that_waits_for_a_gpu(precision):
    basis, features = (x.float().requires_grad_() for x in random_maps())
    with Operations() as operations:
        project(basis, features, precision).sum().backward()
    assert "linalg_cholesky_ex" in operations.names
    assert not {"cholesky_solve", "_cholesky_solve_helper", "_local_scalar_dense", "nonzero"} & operations.names
    assert (torch.float64 in operations.dtypes) == (precision == torch.float64)


def test_projection_is_idempotent():
    basis, features = (x.float() for x in random_maps())
    once = project(basis, features)
    torch.testing.assert_close(project(basis, once), once, atol=1e-5, rtol=0)
    assert (once - features).abs().max() > 0.1


def test_projection_does_not_see_the_scale_of_a_map():
    basis, features = (x.float() for x in random_maps())
    scales = torch.logspace(-12, 12, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    rescaled = project(basis * scales.view(1, -1, 1, 1), features)
    torch.testing.assert_close(rescaled, project(basis, features), atol=1e-5, rtol=0)


def degenerate(kind: str) -> torch.Tensor:
    basis = random_maps()[0].float()
    if kind == "constant":
        basis[:] = 0.7
    elif kind == "coinciding":
        basis[:, 1:] = basis[:, :1]
    elif kind == "opposite":
        basis[:, 1] = -basis[:, 0]
    elif kind == "one zero":
        basis[:, 3] = 0
    elif kind == "zero":
        basis[:] = 0
    elif kind == "more maps than pixels":
        basis = basis[:, :, :2, :3].contiguous()
    return basis


DEGENERATE = ["constant", "coinciding", "opposite", "one zero", "zero", "more maps than pixels"]


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_projection_survives_degenerate_maps(kind, dtype, precision):
    basis = degenerate(kind)
    features = torch.randn(2, 6, *basis.shape[2:], generator=torch.Generator().manual_seed(1)).to(dtype)
    basis.requires_grad_()
    features.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        projected = project(basis.to(dtype), features, precision)
    projected.float().square().sum().backward()
    assert projected.dtype == dtype
    for x in (projected, basis.grad, features.grad):
        assert torch.isfinite(x).all()
        assert x.abs().max() < 1e3
    # still a projection onto what span there is
    expected = least_squares_of_any_rank(basis.detach().to(dtype), features.detach())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(projected.detach().double(), expected, atol=tolerance, rtol=0)


def least_squares_of_any_rank(basis: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    V, target = basis.double().flatten(2).mT, features.double().flatten(2).mT
    return (V @ (torch.linalg.pinv(V, rtol=1e-6) @ target)).mT.reshape(features.shape)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["constant", "coinciding", "zero"])
def test_fusion_survives_degenerate_maps(kind, bf16):
    assert_fusion_survives(kind, bf16, "cpu")


def assert_fusion_survives(kind: str, bf16: bool, device: str):
    torch.manual_seed(0)
    fusion = SubspaceFusion(32).to(device)
    with torch.no_grad():
        if kind == "coinciding":
            fusion.basis_conv.weight[:] = fusion.basis_conv.weight[:1].clone()
            fusion.basis_conv.bias[:] = 0.1
        else:
            fusion.basis_conv.weight.zero_()
            fusion.basis_conv.bias.fill_(0.5 if kind == "constant" else 0)
    x, bridge = (torch.randn(2, 32, 64, 64, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        out = fusion(x, bridge)
    out.float().square().mean().backward()
    for tensor in (out, x.grad, bridge.grad, *(p.grad for p in fusion.parameters())):
        assert torch.isfinite(tensor).all()


def test_model_under_bf16_autocast_is_close_and_trains(tiny_model):
    model = tiny_model()
    y = measured(model)
    with torch.no_grad():
        expected = model(y)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, y)
        with torch.no_grad():
            assert (model(y)[0] - expected).abs().max() < 0.05
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


# --------------------------------------------------------------------------------------------------- half instance norm


def test_half_instance_norm_normalises_the_first_half():
    norm, x = HalfInstanceNorm(6), 3 + 2 * torch.randn(2, 6, 8, 8)
    out = norm(x)
    torch.testing.assert_close(out[:, :3].mean((2, 3)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :3].std((2, 3), unbiased=False), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert torch.equal(out[:, 3:], x[:, 3:])


def split_and_concatenated(x, norm):
    """As papers write it: split, normalise, concatenate."""
    first, second = x.chunk(2, dim=1)
    normalised = F.instance_norm(first, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return torch.cat([normalised, second], dim=1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_instance_norm_and_its_gradients(memory_format):
    norm = HalfInstanceNorm(6).double()
    nn.init.normal_(norm.norm.weight), nn.init.normal_(norm.norm.bias)
    x = (3 + 2 * torch.randn(2, 6, 8, 10, dtype=torch.float64)).to(memory_format=memory_format).requires_grad_()
    torch.testing.assert_close(norm(x), split_and_concatenated(x, norm.norm))
    assert norm(x).is_contiguous(memory_format=memory_format)
    weights = torch.randn_like(x)
    inputs = (x, norm.norm.weight, norm.norm.bias)
    found = torch.autograd.grad((weights * norm(x).square()).sum(), inputs)
    expected = torch.autograd.grad((weights * split_and_concatenated(x, norm.norm).square()).sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offset", [3, 50])
def test_half_instance_norm_of_bf16_keeps_the_mean(offset):
    """Channels that lie many standard deviations from zero: nothing is lost beyond the rounding of the result."""
    x = (offset + torch.randn(2, 6, 64, 64)).bfloat16().requires_grad_()
    norm = HalfInstanceNorm(6)
    out, expected = norm(x), split_and_concatenated(x.float(), norm.norm)
    error = (out.float() - expected)[:, :3].detach()
    assert error.mean((2, 3)).abs().max() < 1e-3 and error.std() < 4e-3
    weights = torch.randn(2, 6, 64, 64).bfloat16()
    (found,) = torch.autograd.grad((weights * out.square()).sum(), x)
    (expected,) = torch.autograd.grad((weights * expected.square()).sum(), x)
    assert (found.float() - expected.float())[:, :3].norm() < 0.01 * expected.float()[:, :3].norm()


def test_network_under_study_can_be_differentiated_at_will(tiny_model):
    """torch.func and second derivatives, which the norm of training does not offer."""
    model, y = tiny_model().double(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    direction = torch.randn_like(y)
    _, along = torch.func.jvp(lambda y: model(y)[0], (y,), (direction,))
    with torch.no_grad():
        difference = (model(y + 1e-4 * direction)[0] - model(y - 1e-4 * direction)[0]) / 2e-4
    assert (difference - along).norm() < 0.01 * along.norm()
    _, adjoint = torch.func.vjp(lambda y: model(y)[0], y)
    other = torch.randn_like(y)
    torch.testing.assert_close((adjoint(other)[0] * direction).sum(), (other * along).sum())
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(model(y)[0].square().sum(), y, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), y)[0].isfinite().all()


def test_half_instance_norm_of_one_pixel_is_its_bias():
    norm, x = HalfInstanceNorm(6), torch.randn(2, 6, 1, 1)
    nn.init.constant_(norm.norm.bias, 0.25)
    out = norm(x)
    torch.testing.assert_close(norm.eval()(x), out)
    torch.testing.assert_close(out[:, :3], torch.full((2, 3, 1, 1), 0.25), atol=1e-4, rtol=0)
    assert torch.equal(out[:, 3:], x[:, 3:])
    # the same limit that two equal pixels have
    torch.testing.assert_close(norm(x.expand(2, 6, 1, 2))[..., :1], out, atol=1e-3, rtol=0)


# ----------------------------------------------------------------------------------------------------------- compiling


class Graphs(list):
    """A backend of ``torch.compile`` that keeps the graphs, and computes them as they are."""

    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward


@pytest.mark.parametrize("name", ["deraining_dgunet", "compressive_sensing_dgunet"])
def test_compiles_whole_and_for_all_sizes_at_once(name):
    """No graph break (fullgraph), and no recompilation for each image: the second size makes the graph dynamic.

    (Feature maps of less than 20480 values, which PyTorch convolves differently on a CPU, have graphs of their own.)
    """
    graphs = Graphs()
    torch._dynamo.reset()
    model = create_model(name, width=8, growth=4, final_growth=4, stages=2).eval()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for height, width in ((256, 256), (288, 320), (320, 256)):
            x = torch.rand(1, model.channels, height, width)
            y = x if model.degradation is None else model.degradation.A(x)
            torch.testing.assert_close(compiled(y), model(y), atol=1e-5, rtol=0)
    assert len(graphs) == 2


def test_compiles_stage_by_stage():
    """Three graphs, however many stages and whoever owns their weights; other sizes share three more."""
    graphs = Graphs()
    torch._dynamo.reset()
    model = create_model("deraining_dgunet_plus", width=8, growth=4, final_growth=4, stages=4).eval()
    plain = copy.deepcopy(model)
    model.compile(backend=graphs)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for (height, width), total in (((256, 256), 3), ((288, 320), 6), ((320, 256), 6)):
        x = torch.rand(1, model.channels, height, width)
        y = x if model.degradation is None else model.degradation.A(x)
        with torch.no_grad():
            torch.testing.assert_close(model(y), plain(y), atol=1e-5, rtol=0)
        assert len(graphs) == total


def test_training_and_validation_keep_their_graphs():
    """Three for training and three for all sizes of validation; no graph is broken."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = Graphs()
    model = create_model("deraining_dgunet", width=8, growth=4, final_growth=4, stages=3)
    model.to(memory_format=torch.channels_last).compile(backend=graphs)
    network, counts = MeasureThenRestore(model), []

    def run(side: int, train: bool):
        model.train(train)
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
            estimates = network(torch.rand(2, model.channels, side, side))
        if train:
            sum(x.float().mean() for x in estimates).backward()
        counts.append(len(graphs))

    for side, train in ((32, True), (64, False), (32, True), (96, False), (128, False), (64, False), (32, True)):
        run(side, train)
    assert counts == [3, 6, 6, 6, 6, 6, 6]
    assert not torch._dynamo.utils.counters["graph_break"]
