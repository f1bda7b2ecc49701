"""The op of a layer's product, whatever becomes of the weight's gradient."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.linear import linear_op
from tests.ops.samples import BF16, F32, F64, opchecks
from tests.samples import randn


class Exact:
    """The gradient itself, times a factor."""

    def __init__(self, weight, factor) -> None:
        self.sum, self.factor = torch.zeros_like(weight), factor

    def add(self, a, b, a_scale=None) -> None:
        a = a if a_scale is None else a.to(b.dtype) * a_scale[:, None].to(b.dtype)
        self.sum += self.factor * (b.mT @ a).to(self.sum.dtype)

    def finish(self):
        return (self.sum,)


def check_factor(name, weight, factor) -> None:
    if factor <= 0:
        raise RuntimeError(f"molegrad::{name}: factor must be positive, got {factor}")


LINEAR = linear_op("linear_of_tests", "float factor", check_factor, Exact)


def arguments(dtype=F32, requires_grad=False):
    shapes = (2, 5, 6), (4, 6), (4,)
    return [randn(*shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize("float8", [False, True])
def test_opcheck(float8):
    x, weight, bias = arguments(requires_grad=True)
    saved = ops.quantize_rows(x.detach()) if float8 else (None, None)
    for args in ((x, weight, bias, *saved, 1.0), (x, weight, None, *saved, 1.0)):
        torch.library.opcheck(LINEAR, args, test_utils=opchecks(args))


def test_gradients_are_those_of_linear():
    def linear(x, weight, bias):
        return LINEAR(x, weight, bias, None, None, 1.0)

    assert torch.autograd.gradcheck(linear, arguments(F64, True))
    x, weight, bias = arguments(F64, True)
    y = linear(x, weight, bias)
    y += 1  # torch's own layer allows it too
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias) + 1)


def test_the_weight_learns_from_what_float8_left_of_the_input():
    x, weight, bias = arguments(requires_grad=True)
    data, scale = ops.quantize_rows(x.detach())
    LINEAR(x, weight, bias, data, scale, 2.0).sum().backward()
    kept = (data.float() * scale.unsqueeze(-1)).view(-1, 6)
    torch.testing.assert_close(weight.grad, 2.0 * torch.ones(10, 4).mT @ kept)
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(2, 5, 6))


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = arguments()
    bias.requires_grad_()
    LINEAR(x, weight, bias, None, None, 1.0).sum().backward()
    assert x.grad is None and weight.grad is None and bias.grad.tolist() == [10.0] * 4


def test_autocast_has_x_weight_and_bias_in_its_dtype():
    x, weight, bias = arguments(requires_grad=True)
    with torch.autocast("cpu", BF16):
        y = LINEAR(x, weight, bias, None, None, 1.0)
        assert LINEAR(x.double(), weight.double(), None, None, None, 1.0).dtype == F64
        y.float().sum().backward()
    assert y.dtype == BF16 and x.grad.dtype == weight.grad.dtype == F32


X, WEIGHT, BIAS = arguments()
DATA, SCALE = ops.quantize_rows(X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: randn(2, 5)}, r"expected x with 6 features in its last dimension, got x \(2, 5\)"),
        ({0: X.double()}, "x and weight of the same dtype.*convert one or use torch.autocast"),
        ({0: X.int()}, "x must be floating point"),
        ({1: randn(6)}, "weight must be a matrix"),
        ({2: randn(5)}, r"expected bias \(4,\) of torch.float32, got \(5\)"),
        ({3: DATA}, "expected both data and scale of float8, or none"),
        ({3: DATA, 4: SCALE[:, :3]}, r"expected data \(2, 5, 6\) and scale without the last"),
        ({5: 0.0}, "factor must be positive, got 0.0"),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_wrong(change, message):
    args = [X, WEIGHT, BIAS, None, None, 1.0]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=f"molegrad::linear_of_tests: .*{message}"):
        LINEAR(*args)
