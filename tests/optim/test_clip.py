import pytest
import torch

from molegrad import clip_grad_norm_
from tests.models import perceptron
from tests.optim.common import config
from tests.optim.common import estimate as layer_estimate


def model_with_gradients(mode, method="tangent"):
    model = perceptron(config(mode, method, probes=2))
    model(torch.randn(30, 24)).square().sum().backward()
    return model


@pytest.mark.parametrize("method", ["tangent", "power"])
def test_the_norm_is_that_of_the_estimates(method):
    model = model_with_gradients("factors", method)
    estimates = [layer_estimate(model[i]) for i in (0, 2)]
    biases = [model[i].bias.grad.clone() for i in (0, 2)]
    expected = torch.cat([x.flatten() for x in (*estimates, *biases)]).norm()
    total = clip_grad_norm_(model, 0.5 * expected.item())
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(model[0].bias.grad, 0.5 * biases[0])
    torch.testing.assert_close(clip_grad_norm_(model, 1e9), 0.5 * expected) if (
        method == "tangent"
    ) else None


def test_dense_mode_is_torch():
    ours, theirs = model_with_gradients("grad"), model_with_gradients("grad")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad.copy_(p.grad)
    total = clip_grad_norm_(ours, 1.0)
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_small_gradients_stay_and_bad_ones_are_named():
    model = model_with_gradients("factors")
    before = model[0].basis_v.grad.clone()
    clip_grad_norm_(model, 1e9)
    assert torch.equal(model[0].basis_v.grad, before)
    model[0].bias.grad[0] = float("inf")
    assert clip_grad_norm_(model, 1e9).isinf()
    with pytest.raises(RuntimeError, match="the gradient norm is inf|nan"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="max_norm must not be negative, got -1"):
        clip_grad_norm_(model, -1.0)
    assert clip_grad_norm_(torch.nn.Linear(2, 2), 1.0) == 0
