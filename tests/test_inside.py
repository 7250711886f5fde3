"""What `inside` says of a forward pass and of degradations."""

import pytest
import torch

from dgunet import DGUNet
from dgunet.degradations import BlockSampling, Blur, LearnedDegradation
from dgunet.inside import adjoint_mismatch, data_term, impulse_response, trace

SMALL = dict(width=8, growth=4, final_growth=4)


@pytest.mark.parametrize(
    "options",
    [dict(stages=k) for k in (1, 2, 5)]
    + [dict(stages=4, shared=False), dict(stages=3, pathways=False), dict(stages=3, gradient=False)]
    + [dict(stages=3, channels=1, degradation=BlockSampling(0.25)), dict(stages=3, checkpointing=True)],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False])
def test_trace_is_the_forward_pass(options, grad):
    torch.manual_seed(0)
    model = DGUNet(**SMALL | options)
    y = torch.rand(1, model.channels, 32, 32)
    known = model.degradation
    y = y if known is None else known.A(y)
    with torch.set_grad_enabled(grad):
        estimates = model(y)
        record = trace(model, y)
    assert [step.k for step in record.steps] == list(range(1, model.stages + 1))
    assert len(record.estimates) == model.stages + 1
    for x, expected in zip(record.estimates[1:], estimates[::-1], strict=True):
        assert torch.equal(x, expected)
    x = y if known is None else known.A_adjoint(y)
    assert torch.equal(record.initial, x)
    for step, stage in zip(record.steps, model.unrolled(), strict=True):
        assert torch.equal(step.before, x)
        assert torch.equal(step.v, stage.gradient_step(x, y, known))
        torch.testing.assert_close(x + step.gradient_step + step.proximal_step, step.x)
        assert step.rho == (None if stage.rho is None else stage.rho.item())
        assert step.degradation is (stage.degradation if known is None else known)
        x = step.x
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_trace_of_a_compiled_network_and_after_a_mistake():
    model = DGUNet(**SMALL, stages=3)
    y = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        expected = model(y)[0]
        model.compile(backend="eager")
        with pytest.raises(ValueError, match="multiples of 8"):
            trace(model, y[..., :-1])
        assert torch.equal(trace(model, y).estimates[-1], expected)
    assert all(stage._compiled_call_impl is not None for stage in model.unrolled())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_adjoint_mismatch_of_known_and_of_learned_operators():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 32, 32)
    for known in (Blur(torch.rand(3, 5)), BlockSampling(0.1)):
        assert adjoint_mismatch(known, x, known.A(torch.rand_like(x))) < 1e-5

    class Wrong:
        def A(self, x):
            return 2 * x

        def A_adjoint(self, y):
            return -y

    assert adjoint_mismatch(Wrong(), x, x) == pytest.approx(1.5, abs=1e-5)

    class Nothing(Wrong):
        def A_adjoint(self, y):
            return 0 * y

    assert adjoint_mismatch(Nothing(), x, x) == pytest.approx(1, abs=1e-5)
    learned = LearnedDegradation(3)
    assert 0 < adjoint_mismatch(learned, torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)) < 2
    # as the inner products say that it stands for
    x, y = torch.rand(2, 1, 3, 8, 8)
    d, e = torch.randn(2, 400, 1, 3, 8, 8)
    A = torch.stack([torch.func.jvp(learned.A, (x,), (v,))[1] for v in d])
    adjoint = torch.stack([torch.func.jvp(learned.A_adjoint, (learned.A(x) - y,), (v,))[1] for v in e])
    products = (A * e).sum(dim=(1, 2, 3, 4))
    wrong = products - (d * adjoint).sum(dim=(1, 2, 3, 4))
    expected = (wrong.square().mean() / products.square().mean()).sqrt().item()
    assert adjoint_mismatch(learned, x, y, probes=200) == pytest.approx(expected, rel=0.2)


def test_impulse_response_of_a_blur_is_its_kernel():
    kernel = torch.rand(3, 5)
    response = impulse_response(Blur(kernel).A, torch.rand(1, 3, 16, 16), 7, 8)
    torch.testing.assert_close(response[6:9, 6:11], kernel)
    assert response.sum() == pytest.approx(kernel.sum().item(), rel=1e-5)


def test_data_term():
    blur = Blur(torch.full((1, 1), 0.5))
    x = torch.ones(1, 1, 8, 8)
    assert data_term(blur, x, torch.zeros_like(x)) == pytest.approx(0.5)
