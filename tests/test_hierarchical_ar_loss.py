import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_near_gradients,
    assert_replays,
    forward_backward,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import hierarchical_ar_loss, reference

CASES = [  # B, M, D
    (1, 2, 1),
    (2, 70, 16),
    (3, 9, 37),  # several rows a program, an odd width
    (2, 5, 1000),  # rounds of a row
    (1, 3, 5000),  # warps share a row
]


def draw(B, M, D):
    """h, weight and bias."""
    torch.manual_seed(0)
    sizes = (B, M, D), (D, D), (D,)
    h, weight, bias = (torch.randn(size, device=DEVICE) for size in sizes)
    return h, weight * D**-0.5, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    assert_as_accurate(hierarchical_ar_loss, reference.hierarchical_ar_loss, draw(*case), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction):
    inputs = [t.double().requires_grad_() for t in draw(2, 5, 7)]
    fn = lambda *t: hierarchical_ar_loss(*t, reduction=reduction)
    assert torch.autograd.gradcheck(lambda *t: fn(*t)[0] if reduction == "sum" else fn(*t), inputs)


def test_sum_and_count():
    inputs = draw(3, 8, 16)
    total, count = hierarchical_ar_loss(*inputs, reduction="sum")
    twin = reference.hierarchical_ar_loss(*inputs, reduction="sum")
    assert count == twin[1] == 3 * 7 and count.dtype == twin[1].dtype == torch.int64
    torch.testing.assert_close(total, twin[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("B, M", [(2, 1), (0, 4), (2, 0)])
def test_no_token_with_a_successor(B, M):
    inputs = draw(B, M, 8)
    loss, *grads = forward_backward(hierarchical_ar_loss, inputs, torch.float32)
    assert loss == 0
    for grad, t in zip(grads, inputs, strict=True):
        assert grad.shape == t.shape and not grad.any()


def test_rows_shorter_than_the_clamp():
    """Their gradient is that of a division by 1e-12, as F.normalize has it."""
    h, weight, bias = draw(2, 6, 8)
    h[0, 2] = 0
    h[1, 3] *= 1e-14
    for w, b in ((weight, bias), (weight, bias * 0), (weight * 0, bias * 0)):
        ours, twin = (
            forward_backward(op, (h, w, b), torch.float64)
            for op in (hierarchical_ar_loss, reference.hierarchical_ar_loss)
        )
        for o, t in zip(ours, twin, strict=True):
            assert (o - t).norm() <= 1e-10 * t.norm()  # sums cancel numbers divided by 1e-12


@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted):
    inputs = draw(2, 9, 16)
    _, *gradients = forward_backward(reference.hierarchical_ar_loss, inputs, torch.float32)
    inputs[wanted].requires_grad_()
    (ours,) = torch.autograd.grad(hierarchical_ar_loss(*inputs), inputs[wanted])
    torch.manual_seed(1)
    scale = torch.randn((), device=DEVICE, dtype=torch.float64)
    torch.testing.assert_close(ours.double() * scale, gradients[wanted], rtol=1e-4, atol=1e-6)


def test_the_graph_can_be_walked_twice():
    inputs = [t.requires_grad_() for t in draw(2, 9, 16)]
    loss = hierarchical_ar_loss(*inputs) * 3
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs():
    h, weight, bias = draw(2, 9, 16)
    wide = torch.randn(2, 19, 32, device=DEVICE)
    wide[:, 1::2, 8:24] = h
    plain = hierarchical_ar_loss(h, weight, bias)
    for same in (wide[:, 1::2, 8:24], h.mT.contiguous().mT):
        assert torch.equal(hierarchical_ar_loss(same, weight, bias), plain)
    other = hierarchical_ar_loss(h, weight.T.contiguous().T, bias)  # by another product of cuBLAS
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_the_product_alone(dtype, h_dtype):
    h, weight, bias = draw(2, 30, 32)
    inputs = [t.requires_grad_() for t in (h.to(h_dtype), weight, bias)]
    with torch.autocast(DEVICE, dtype):
        loss = hierarchical_ar_loss(*inputs)
        twin = reference.hierarchical_ar_loss(*inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, twin, rtol=1e-2, atol=0)
    assert_near_gradients(loss, twin, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(h=torch.randn(2, 8)), r"h must be \(B, M, D\), got \(2, 8\)"),
        (dict(h=torch.randn(1, 2, 8193)), "h must have a width D of 1 to 8192, got 8193"),
        (dict(weight=torch.randn(8, 4)), r"weight must be \(8, 8\) on .*, got \(8, 4\) on"),
        (dict(bias=torch.randn(4)), r"bias must be \(8,\) on .*, got \(4,\) on"),
        (dict(reduction="none"), 'reduction must be "mean" or "sum", got \'none\''),
    ],
)
def test_bad_input(change, message):
    good = dict(h=torch.randn(2, 3, 8), weight=torch.randn(8, 8), bias=torch.randn(8))
    tensors = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        hierarchical_ar_loss(**tensors)


def test_compiles_whole():
    assert_compiles_whole(hierarchical_ar_loss, draw(2, 20, 16), rtol=1e-5, atol=1e-7)


def test_opcheck():
    h, weight, bias = draw(2, 5, 8)
    forward, backward = torch.ops.shtx.hierarchical_ar_loss, torch.ops.shtx.hierarchical_ar_loss_bwd
    torch.library.opcheck(forward.default, (h, weight, bias))
    total, p = forward(h, weight, bias)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward.default, (total, p, h, weight, *needs))


@pytest.mark.gpu  # other bits would come of the order that programs end in
def test_repeats_to_the_bit():
    h, weight, bias = draw(4, 700, 512)
    inputs = [t.requires_grad_() for t in (h.bfloat16(), weight, bias)]

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = hierarchical_ar_loss(*inputs)
        return [loss, *torch.autograd.grad(loss, inputs)]

    first = run()
    for _ in range(50):
        assert all(map(torch.equal, first, run()))


@pytest.mark.gpu  # a graph is the GPU's
def test_runs_in_a_cuda_graph():
    inputs = [t.requires_grad_() for t in draw(2, 300, 32)]

    def run():
        return torch.autograd.grad(hierarchical_ar_loss(*inputs), inputs)

    assert_replays(run, lambda: inputs[0].mul_(2))
