import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_gradients_alone,
    assert_replays,
    assert_zero_gradients,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import linear, reference

CASES = [(1, 1, 1, 1), (2, 9, 16, 48), (3, 7, 37, 11)]  # B, M, D, D_out


def draw(B, M, D, D_out):
    torch.manual_seed(0)
    return torch.randn(B, M, D, device=DEVICE), torch.randn(D_out, D, device=DEVICE) * D**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    assert_as_accurate(linear, reference.linear, draw(*case), dtype)


def test_gradcheck():
    inputs = [t.double().requires_grad_() for t in draw(2, 3, 4, 5)]
    assert torch.autograd.gradcheck(linear, inputs)


@pytest.mark.parametrize("B, M", [(0, 4), (2, 0)])
def test_no_tokens(B, M):
    assert_zero_gradients(linear, draw(B, M, 8, 6), (B, M, 6))


def test_one_gradient_at_a_time():
    assert_gradients_alone(linear, draw(2, 9, 16, 24))


def test_strided_inputs():
    x, weight = draw(2, 9, 16, 24)
    wide = torch.randn(2, 19, 32, device=DEVICE)
    wide[:, 1::2, 8:24] = x
    y = linear(x, weight)
    for same in (wide[:, 1::2, 8:24], x.mT.contiguous().mT):
        assert torch.equal(linear(same, weight), y)
    assert torch.equal(linear(x, weight.T.contiguous().T), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_the_products_and_not_the_gradient_of_the_weight(dtype, x_dtype):
    x, weight = draw(2, 300, 32, 24)
    inputs = [t.requires_grad_() for t in (x.to(x_dtype), weight)]
    with torch.autocast(DEVICE, dtype):
        y, twin = linear(*inputs), reference.linear(*inputs)
    assert y.dtype == twin.dtype == dtype
    assert (y - twin).norm() < 1e-2 * twin.norm()
    dy = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, inputs, dy)
    assert dx.dtype == x_dtype and dweight.dtype == torch.float32
    exact = dy.flatten(0, 1).double().T @ inputs[0].detach().to(dtype).flatten(0, 1).double()
    assert (dweight - exact).norm() < 1e-5 * exact.norm()  # a rounded one is 1e-4 off at least


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(2, 8)), r"x must be \(B, M, D\), got \(2, 8\)"),
        (dict(weight=torch.randn(32, 4)), r"weight must be \(D_out, 8\) on .*, got \(32, 4\) on"),
        (dict(weight=torch.randn(8)), r"weight must be \(D_out, 8\) on .*, got \(8,\) on"),
    ],
)
def test_bad_input(change, message):
    good = dict(x=torch.randn(2, 3, 8), weight=torch.randn(32, 8))
    with pytest.raises(ValueError, match=message):
        linear(**{name: t.to(DEVICE) for name, t in (good | change).items()})


def test_compiles_whole():
    assert_compiles_whole(linear, draw(2, 20, 16, 24), rtol=1e-5, atol=1e-6)


def test_opcheck():
    x, weight = draw(2, 5, 8, 6)
    torch.library.opcheck(torch.ops.shtx.linear.default, (x, weight))
    dy = torch.randn(2, 5, 6, device=DEVICE)
    for needs in ((True, True), (False, True)):
        torch.library.opcheck(torch.ops.shtx.linear_bwd.default, (dy, x, weight, *needs))


@pytest.mark.gpu  # other bits would come of the order that programs end in
def test_repeats_to_the_bit_in_a_cuda_graph():
    x, weight = draw(4, 700, 256, 768)
    inputs = [x.bfloat16().requires_grad_(), weight.requires_grad_()]

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            y = linear(*inputs)
        return [y, *torch.autograd.grad(y, inputs, y.detach())]

    assert_replays(run, lambda: inputs[0].mul_(2))
