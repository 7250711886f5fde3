"""DGUNet in other libraries, each against the real one, where it is installed."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from dgunet import DGUNet, UserError, load_model, restore
from dgunet.checkpoints.registry import find_pretrained
from dgunet.model.degradations import Blur
from dgunet.model.sampling import BlockSampling, block_sampling
from dgunet.runtime.errors import ROOT

DENOISERS = ("denoising_gaussian", "denoising_photo")
SMALL = dict(width=8, growth=4, final_growth=4, stages=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------- deepinv


@pytest.fixture
def plugs():
    pytest.importorskip("deepinv")
    import dgunet.integrations.deepinv

    return dgunet.integrations.deepinv


KNOWN = {
    "block sampling": (lambda: BlockSampling(0.1, block=8), (1, 16, 24)),
    "first rows": (lambda: block_sampling((0.1, 0.5), block=8).at(0.2), (1, 16, 24)),
    "blur": (lambda: Blur(torch.rand(3, 5)), (2, 9, 12)),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_degradations_pass_deepinvs_adjointness_test(plugs, kind):
    make, size = KNOWN[kind]
    physics, x = plugs.Physics(make()), torch.rand(2, *size)
    assert physics.adjointness_test(x, num_samples=8) < 1e-4
    broken = plugs.Physics(physics.degradation)
    broken.A_adjoint = lambda y, **kwargs: 2 * physics.A_adjoint(y)
    assert broken.adjointness_test(x, num_samples=8) > 0.5
    assert torch.equal(physics(x), physics.degradation.A(x)), "without a noise model there is none"


def test_orthonormal_sampling_has_its_adjoint_as_pseudoinverse(plugs):
    physics = plugs.Physics(BlockSampling(0.25, block=8, learned=False))
    y = physics(torch.rand(1, 1, 16, 16))
    torch.testing.assert_close(physics.A_dagger(y), physics.A_adjoint(y), rtol=0, atol=1e-4)


def test_reconstructor_of_a_learned_degradation_ignores_the_physics(plugs):
    model, y = DGUNet(**SMALL).eval(), torch.rand(2, 3, 19, 30)
    restored = plugs.Reconstructor(model)(y, physics=object())
    torch.testing.assert_close(restored.clamp(0, 1), restore(model, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding, measured", [("valid", (17, 23)), ("reflect", (19, 27))])
def test_reconstructor_of_a_known_degradation_runs_with_the_physics_handed_in(plugs, padding, measured):
    import deepinv

    kernel = torch.rand(1, 1, 3, 5) / 15
    physics = deepinv.physics.Blur(kernel, padding=padding)
    trained_for = deepinv.physics.Blur(kernel.flip(-1), padding=padding)
    reconstructor = plugs.Reconstructor(DGUNet(1, **SMALL, degradation=trained_for))
    x = torch.rand(2, 1, 19, 27)
    y = physics(x)
    assert y.shape[-2:] == measured
    restored = reconstructor(y, physics)
    assert restored.shape == x.shape
    assert not torch.allclose(restored, reconstructor(y), atol=1e-4), "its own degradation"
    whole = DGUNet(1, **SMALL, degradation=plugs.PaddedDegradation(physics))
    whole.load_state_dict(reconstructor.model.state_dict(), strict=False)
    torch.testing.assert_close(restored, whole(y)[0][..., :19, :27])


def test_sides_that_are_no_multiples_of_8_keep_the_operator_adjoint(plugs):
    whole = plugs.PaddedDegradation(Blur(torch.rand(5, 3)))
    y, x = torch.randn(1, 1, 10, 13), torch.randn(1, 1, 16, 16)
    assert whole.A_adjoint(y).shape == x.shape
    torch.testing.assert_close((whole.A(x) * y).sum(), (x * whole.A_adjoint(y)).sum(), rtol=1e-4, atol=1e-4)


def test_deepinv_tests_and_trains_the_reconstructor(plugs, tmp_path):
    import deepinv

    operator = BlockSampling(0.25, block=8)
    physics = plugs.Physics(operator, noise_model=deepinv.physics.GaussianNoise(0.01))
    reconstructor = plugs.Reconstructor(DGUNet(1, **SMALL, degradation=operator))
    loader = torch.utils.data.DataLoader([*torch.rand(2, 1, 16, 16)], batch_size=2)
    quiet = dict(verbose=False, show_progress_bar=False)
    common = dict(physics=physics, online_measurements=True, device="cpu", **quiet)
    before = {name: value.clone() for name, value in reconstructor.named_parameters()}
    optimizer = torch.optim.Adam(reconstructor.parameters(), lr=1e-3)
    deepinv.Trainer(
        reconstructor, optimizer=optimizer, train_dataloader=loader, epochs=1, losses=deepinv.loss.SupLoss(),
        save_path=str(tmp_path), **common,
    ).train()  # fmt: skip
    assert not any(torch.equal(value, before[name]) for name, value in reconstructor.named_parameters())
    result = deepinv.test(reconstructor, loader, metrics=deepinv.loss.metric.PSNR(), **common)
    assert np.isfinite(result["PSNR"]) and result["PSNR"] != result["PSNR no learning"]


@pytest.mark.parametrize("channels", [1, 3])
def test_denoiser_is_a_plug_and_play_prior(plugs, channels):
    import deepinv
    from deepinv.optim import L2, PGD
    from deepinv.optim.prior import PnP

    model = DGUNet(3, **SMALL).eval()
    denoiser = plugs.Denoiser(model)
    x = torch.rand(1, channels, 13, 16)
    expected = restore(model, x.expand(-1, 3, -1, -1))
    found = denoiser(x, 0.1).clamp(0, 1)
    assert found.shape == x.shape
    if channels == 3:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    physics = deepinv.physics.Blur(torch.ones(1, 1, 3, 3) / 9, padding="circular")
    algorithm = PGD(data_fidelity=L2(), prior=PnP(denoiser), stepsize=1.0, sigma_denoiser=0.1, max_iter=2)
    with torch.no_grad():
        y = physics(x)
        first = denoiser(y - physics.A_adjoint(physics.A(y) - y))
        second = denoiser(first - physics.A_adjoint(physics.A(first) - y))
        torch.testing.assert_close(algorithm(y, physics, init=y), second, rtol=0, atol=1e-4)


def test_reconstructor_reads_the_ratio_from_the_measurements(plugs):
    model = DGUNet(1, **SMALL, degradation=block_sampling((0.1, 0.5), block=8)).eval()
    for ratio in (0.1, 0.3, 0.5):
        y = plugs.Physics(model.degradation.at(ratio))(torch.rand(1, 1, 16, 24))
        assert torch.equal(plugs.Reconstructor(model)(y), model(y)[0])


@pytest.mark.parametrize("name", ["Blur", "Downsampling", "Inpainting"])
def test_deepinvs_operators_are_known_degradations(name):
    physics = pytest.importorskip("deepinv").physics
    operator = {
        "Blur": lambda: physics.Blur(torch.rand(1, 1, 3, 3) / 9, padding="circular"),
        "Downsampling": lambda: physics.Downsampling(img_size=(1, 16, 24), factor=2, filter="bicubic"),
        "Inpainting": lambda: physics.Inpainting((1, 16, 24), mask=0.5),
    }[name]()
    model = DGUNet(1, **SMALL, degradation=operator)
    x = torch.rand(2, 1, 16, 24)
    estimates = model(operator(x))
    assert [estimate.shape for estimate in estimates] == [x.shape] * 2
    sum(estimate.mean() for estimate in estimates).backward()
    assert model.last.rho.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------- spandrel


@pytest.fixture
def loader():
    spandrel = pytest.importorskip("spandrel")
    from dgunet.integrations.spandrel import install

    install()
    install()
    return spandrel.ModelLoader()


@pytest.mark.parametrize("folder", ["Denoising", "Deraining", "Deblurring"])
def test_spandrel_restores_with_the_shipped_weights_as_restore_does(loader, folder):
    (path,) = sorted((Path(__file__).parents[1] / folder / "pretrained_models").glob("*/weights.*"))[:1]
    descriptor = loader.load_from_file(path)
    assert (descriptor.architecture.id, descriptor.scale, descriptor.input_channels) == ("DGUNet", 1, 3)
    assert descriptor.model.stages == load_model(path).stages
    assert descriptor.size_requirements.multiple_of == 8
    assert descriptor.tiling.name == ("SUPPORTED" if load_model(path).local else "DISCOURAGED")
    y = torch.rand(1, 3, 13, 16)
    torch.testing.assert_close(descriptor(y), restore(load_model(path), y), rtol=0, atol=1e-5)


def test_spandrel_supports_tiles_where_the_record_recommends_them(loader):
    tiling = {name: loader.load_from_file(find_pretrained(name).path).tiling.name for name in DENOISERS}
    assert tiling == {"denoising_gaussian": "SUPPORTED", "denoising_photo": "DISCOURAGED"}


def test_comfyui_folder(monkeypatch):
    spandrel = pytest.importorskip("spandrel")
    monkeypatch.setattr(spandrel, "MAIN_REGISTRY", spandrel.ArchRegistry())
    found = runpy.run_path(str(ROOT / "integrations" / "comfyui" / "__init__.py"))
    assert found["NODE_CLASS_MAPPINGS"] == {}
    (support,) = spandrel.MAIN_REGISTRY.architectures("detection")
    assert support.architecture.id == "DGUNet"


def test_spandrel_takes_other_weights_for_those_of_the_papers_stages(loader):
    weights = load_model("deblurring_motion").state_dict()
    assert loader.load_from_state_dict(dict(weights)).model.stages == 3
    weights["last.rho"] = weights["last.rho"] + 0.1
    assert loader.load_from_state_dict(dict(weights)).model.stages == 7


def test_spandrel_keeps_knowing_other_networks_and_refuses_those_for_measurements(loader):
    import spandrel

    with pytest.raises(spandrel.UnsupportedModelError):
        loader.load_from_state_dict({"of.none": torch.zeros(1)})
    sensing, blur = (DGUNet(1, **SMALL, degradation=known) for known in (BlockSampling(0.1), Blur(torch.ones(3, 3))))
    with pytest.raises(spandrel.UnsupportedModelError, match="measurements"):
        loader.load_from_state_dict(sensing.state_dict())
    with pytest.raises(UserError, match="the state dict .*known degradation"):
        loader.load_from_state_dict(blur.state_dict())
