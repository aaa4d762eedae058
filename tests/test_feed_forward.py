import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_gradients_alone,
    assert_near_gradients,
    assert_replays,
    assert_zero_gradients,
    forward_backward,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import feed_forward, reference
from shtx_kernels._target import capability

CASES = [  # B, M, D, F, D_out
    (1, 1, 1, 1, 1),
    (2, 9, 16, 64, 16),
    (3, 7, 37, 75, 11),  # odd widths, more than a program's tile
    (2, 100, 24, 96, 24),
    (3, 50, 72, 392, 40),  # several tiles of a product each way, the last ones cut off
    (1, 1100, 8, 136, 8),  # more rows of tiles than a group has
]

ON_HOPPER = pytest.mark.skipif(
    capability(torch.device(DEVICE)) != 90, reason="elsewhere u is kept, whatever is asked for"
)


def draw(B, M, D, F, D_out):
    """x, w_in and w_out; pre-activations reach into both tails of GELU."""
    torch.manual_seed(0)
    sizes = (B, M, D), (F, D), (D_out, F)
    x, w_in, w_out = (torch.randn(size, device=DEVICE) for size in sizes)
    return x, w_in * 2 * D**-0.5, w_out * F**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_matches_reference(case, dtype):
    assert_as_accurate(feed_forward, reference.feed_forward, draw(*case), dtype)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_gradcheck(case):
    inputs = [t.double().requires_grad_() for t in draw(*case)]
    assert torch.autograd.gradcheck(feed_forward, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_of_gelu(dtype):
    """Far out it is 0 or the identity, with the gradient of that; NaN stays."""
    eye = torch.ones(1, 1, device=DEVICE)
    u = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([-6e4, -1e-7, 0, 6e4]))).to(DEVICE)
    ours, theirs = (
        forward_backward(op, (u[None, :, None], eye, eye), dtype)[:2]
        for op in (feed_forward, reference.feed_forward)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert feed_forward(u[:1, None, None] * torch.nan, eye, eye).isnan().all()


@pytest.mark.parametrize("B, M", [(0, 4), (2, 0)])
def test_no_tokens(B, M):
    assert_zero_gradients(feed_forward, draw(B, M, 8, 32, 8), (B, M, 8))


def test_one_gradient_at_a_time():
    assert_gradients_alone(feed_forward, draw(2, 9, 16, 64, 16))


WIDE = 2, 9, 520, 72, 520  # B, M, D, F, D_out: of which GELU's slope is kept, if that is allowed


def keeping(op):
    return lambda *inputs: op(*inputs, keep_slope=True)


@pytest.mark.parametrize(
    "case, dtype, keep_slope, numbers",
    [
        (WIDE, torch.bfloat16, False, 1),
        (WIDE, torch.bfloat16, True, 2),
        (WIDE, torch.float32, True, 1),
        (CASES[1], torch.bfloat16, True, 1),  # narrow
        ((2, 9, 520, 72, 515), torch.bfloat16, True, 1),  # no product of backward with GELU
        ((2, 0, 520, 72, 520), torch.bfloat16, True, 2),
    ],
)
@ON_HOPPER
def test_keeps_of_each_row(case, dtype, keep_slope, numbers):
    """F numbers: the pre-activation; or twice as many: GELU and its slope."""
    inputs = [t.to(dtype).requires_grad_() for t in draw(*case)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = feed_forward(*inputs, keep_slope=keep_slope)
    rows, F = case[0] * case[1], case[3]
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in inputs) + numbers * rows * F
    assert all(map(torch.isfinite, (g.sum() for g in torch.autograd.grad(y.sum(), inputs))))


@ON_HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_a_kept_slope(dtype):
    """Near the reference, and near the bits of what keeps the pre-activation."""
    assert_as_accurate(keeping(feed_forward), reference.feed_forward, draw(*WIDE), dtype)
    ours, theirs = (
        forward_backward(op, draw(*WIDE), dtype) for op in (keeping(feed_forward), feed_forward)
    )
    assert torch.equal(ours[0], theirs[0])
    assert not all(map(torch.equal, ours, theirs))


def test_the_graph_can_be_walked_twice():
    inputs = [t.requires_grad_() for t in draw(2, 9, 16, 64, 16)]
    y = feed_forward(*inputs).square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, inputs), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs():
    x, w_in, w_out = draw(2, 9, 16, 64, 16)
    wide = torch.randn(2, 19, 32, device=DEVICE)
    wide[:, 1::2, 8:24] = x
    y = feed_forward(x, w_in, w_out)
    for same in (wide[:, 1::2, 8:24], x.mT.contiguous().mT):
        assert torch.equal(feed_forward(same, w_in, w_out), y)
    assert torch.equal(feed_forward(x, w_in.T.contiguous().T, w_out), y)


@pytest.mark.gpu  # a program goes from tile to tile
@pytest.mark.parametrize("D", [64, 512, 1032])  # by u, by a slope, by products in Gluon alone
def test_more_tiles_than_programs(D):
    inputs = draw(4, 4100, D, 520, D)
    assert_as_accurate(keeping(feed_forward), reference.feed_forward, inputs, torch.bfloat16)


@pytest.mark.parametrize("case", [CASES[1], WIDE], ids=str)
def test_rows_that_the_copy_engine_does_not_take(case):
    x, w_in, w_out = (t.half() for t in draw(*case))

    def off(t):
        flat = t.new_zeros(t.numel() + 1)
        moved = flat[1:].view_as(t).copy_(t)
        assert moved.data_ptr() % 16
        return moved

    def run(x, w_in, w_out, move):
        x = x.detach().requires_grad_()
        y = feed_forward(x, w_in, w_out, keep_slope=True)
        return y.detach(), torch.autograd.grad(y, x, move(torch.ones_like(y)))[0]

    moved = run(*map(off, (x, w_in, w_out)), off)
    for ours, theirs in zip(moved, run(x, w_in, w_out, lambda t: t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_the_products(dtype, x_dtype):
    x, w_in, w_out = draw(2, 30, 32, 128, 32)
    inputs = [t.requires_grad_() for t in (x.to(x_dtype), w_in, w_out)]
    with torch.autocast(DEVICE, dtype):
        y, twin = feed_forward(*inputs), reference.feed_forward(*inputs)
    assert y.dtype == twin.dtype == dtype
    assert (y - twin).norm() < 2e-2 * twin.norm()
    assert_near_gradients(y, twin, inputs, torch.randn_like(y))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(2, 8)), r"x must be \(B, M, D\), got \(2, 8\)"),
        (dict(w_in=torch.randn(32, 4)), r"w_in must be \(F, 8\) on .*, got \(32, 4\) on"),
        (dict(w_in=torch.randn(8)), r"w_in must be \(F, 8\) on .*, got \(8,\) on"),
        (dict(w_out=torch.randn(8, 4)), r"w_out must be \(D_out, 32\) on .*, got \(8, 4\) on"),
    ],
)
def test_bad_input(change, message):
    good = dict(x=torch.randn(2, 3, 8), w_in=torch.randn(32, 8), w_out=torch.randn(8, 32))
    with pytest.raises(ValueError, match=message):
        feed_forward(**{name: t.to(DEVICE) for name, t in (good | change).items()})


def test_compiles_whole():
    assert_compiles_whole(feed_forward, draw(2, 20, 16, 64, 16), rtol=1e-5, atol=1e-6)


def test_opcheck():
    x, w_in, w_out = draw(2, 5, 8, 32, 8)
    forward, backward = torch.ops.shtx.feed_forward, torch.ops.shtx.feed_forward_bwd
    torch.library.opcheck(forward.default, (x, w_in, w_out, False))
    torch.library.opcheck(forward.default, (*(t.bfloat16() for t in draw(*WIDE)), True))
    y, u = forward(x, w_in, w_out, False)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward.default, (y, x, u, w_in, w_out, *needs))


@pytest.mark.gpu  # 6 GiB
def test_more_than_2_31_elements():
    M = 2**31 // 4096 + 3
    x = torch.randn(1, M, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w_in = torch.randn(4096, 8, device=DEVICE, dtype=torch.bfloat16)
    w_out = torch.randn(8, 4096, device=DEVICE, dtype=torch.bfloat16) / 64
    y = feed_forward(x, w_in, w_out)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x.detach()[:, -5:].requires_grad_()
    twin = feed_forward(last, w_in, w_out)
    torch.testing.assert_close(y[:, -5:], twin, rtol=2e-2, atol=2e-2)
    (dlast,) = torch.autograd.grad(twin, last, torch.ones_like(twin))
    torch.testing.assert_close(dx[:, -5:], dlast, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu  # other bits would come of the order that programs end in
def test_repeats_to_the_bit():
    x, w_in, w_out = draw(4, 700, 256, 1024, 256)
    inputs = [t.requires_grad_() for t in (x.bfloat16(), w_in, w_out)]

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            y = feed_forward(*inputs)
        return [y, *torch.autograd.grad(y, inputs, y.detach())]

    first = run()
    for _ in range(20):
        assert all(map(torch.equal, first, run()))


@pytest.mark.gpu  # a graph is the GPU's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_in_a_cuda_graph(dtype):
    inputs = [t.to(dtype).requires_grad_() for t in draw(2, 300, 32, 128, 32)]

    def run():
        return torch.autograd.grad(feed_forward(*inputs).square().sum(), inputs)

    assert_replays(run, lambda: inputs[0].mul_(2))
