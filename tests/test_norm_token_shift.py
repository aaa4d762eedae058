import pytest
import torch
from accuracy import assert_as_accurate, assert_compiles_whole, forward_backward, layouts
from helpers import DEVICE, DTYPES

from shtx_kernels import norm_token_shift, reference

SHAPES = [
    (1, 1, 1),  # one number
    (2, 3, 4),  # fewer than any tile (at 2, rows with nothing shifted in are exact in eager)
    (1, 64, 64),  # whole tiles
    (3, 17, 131),  # ragged and odd
    (2, 130, 96),
    (1, 5, 1100),  # wider than a quarter tile
]
CASES = [  # norm, branch, dilation
    ("rms", True, 1),
    ("rms", False, 4),
    ("rms", True, 0),
    ("layer", True, 3),
    ("layer", False, 1),
    ("layer", False, 0),
    ("rms", False, 200),  # looks back further than any sequence here
]


def draw(shape, norm, branch, dtype=torch.float32):
    """x, gamma and, where the case has them, beta and branch."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape), *torch.randn(1 + (norm == "layer"), shape[-1])]
    tensors += [torch.randn(shape)] * branch
    return [t.to(DEVICE, dtype) for t in tensors]


def call(op, norm, dilation, dtype=None):
    """The op as a function of the tensors that `draw` makes."""

    def fn(x, gamma, *rest):
        beta, rest = (rest[0], rest[1:]) if norm == "layer" else (None, rest)
        branch = rest[0] if rest else None
        return op(x, gamma, beta, branch, norm=norm, dilation=dilation, dtype=dtype)

    return fn


@pytest.mark.parametrize("norm, branch, dilation", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, norm, branch, dilation):
    inputs = draw(shape, norm, branch)
    fused, twin = (
        call(op, norm, dilation) for op in (norm_token_shift, reference.norm_token_shift)
    )
    assert_as_accurate(fused, twin, inputs, dtype)


@pytest.mark.parametrize("low", [t for t in DTYPES if t != torch.float32], ids=str)
def test_fp32_stream_with_low_precision_branch_and_output(low):
    """Autocast makes a block so: the stream stays fp32, the factors of products do not."""

    def mixed(op):
        def fn(x, gamma, branch):
            dtype = x.dtype if x.dtype == torch.float64 else low
            r, y = op(x, gamma, None, branch.to(low), dilation=2, dtype=dtype)
            assert r.dtype == x.dtype and y.dtype == dtype
            return r, y

        return fn

    inputs = draw((2, 19, 48), "rms", True)
    inputs[2] = inputs[2].to(low).float()
    assert_as_accurate(
        mixed(norm_token_shift), mixed(reference.norm_token_shift), inputs, torch.float32
    )


@pytest.mark.parametrize("norm, branch, dilation", CASES)
def test_gradcheck(norm, branch, dilation):
    inputs = [t.requires_grad_() for t in draw((2, 3, 3), norm, branch, torch.float64)]
    assert torch.autograd.gradcheck(call(norm_token_shift, norm, dilation), inputs)


def test_rows_at_and_below_the_clamp():
    """Zero rows, rows shorter than 1e-12 (whose norm is a constant) and huge ones."""
    scale = torch.tensor([0.0, 1e-14, 1e-12, 1.0, 1e4])[:, None]
    inputs = [(scale * torch.randn(2, 5, 8)).to(DEVICE), torch.randn(8, device=DEVICE)]
    ours, twin = (
        forward_backward(lambda x, g, op=op: op(x, g)[1], inputs, torch.float64)
        for op in (norm_token_shift, reference.norm_token_shift)
    )
    for o, t in zip(ours, twin, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_spreads_as_in_the_reference(bad):
    inputs = draw((2, 9, 12), "rms", True)
    inputs[0][1, 4, 7] = bad
    ours, twin = (
        call(op, "rms", 2)(*inputs) for op in (norm_token_shift, reference.norm_token_shift)
    )
    for o, t in zip(ours, twin, strict=True):
        assert torch.equal(o.isfinite(), t.isfinite()) and not t.isfinite().all()


@pytest.mark.parametrize("layout", range(6))
def test_layouts_of_inputs_and_gradients(layout):
    """Strided inputs and gradients give bitwise what contiguous ones do, and are not written to."""
    name, t = list(layouts(torch.randn(3, 11, 14, device=DEVICE)))[layout]
    gamma = torch.randn(14, device=DEVICE, requires_grad=True)

    def run(t):
        x, branch = t.detach().requires_grad_(), t.detach().requires_grad_()
        before = x.detach().clone(), x._version, branch._version
        r, y = norm_token_shift(x, gamma, None, branch, dilation=2)
        grads = torch.autograd.grad((r, y), (x, branch, gamma), (t, t))
        assert torch.equal(x, before[0]) and (x._version, branch._version) == before[1:]
        assert r.is_contiguous() and y.is_contiguous()
        return r, y, *grads

    for strided, contiguous in zip(run(t), run(t.contiguous().clone()), strict=True):
        assert strided.isfinite().all(), name
        assert torch.equal(strided, contiguous), name


def test_gradient_of_a_sum():
    """It is expanded from one number, and r and y may be used one at a time."""
    x, gamma = draw((2, 6, 8), "rms", False)
    for used in (slice(0, 1), slice(1, 2), slice(0, 2)):
        grads = []
        for op in (norm_token_shift, reference.norm_token_shift):
            t, g = x.clone().requires_grad_(), gamma.clone().requires_grad_()
            outs = op(t, g, None, t * 2, dilation=1)
            sum(o.sum() for o in outs[used]).backward()
            grads.append((t.grad, torch.zeros_like(g) if g.grad is None else g.grad))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_is_of_the_r_that_is_kept(dtype):
    """y is not of x + branch before it was rounded: backward has r alone."""
    x, gamma, branch = draw((2, 23, 40), "rms", True, dtype)
    r, y = norm_token_shift(x, gamma, None, branch, dilation=3)
    assert torch.equal(norm_token_shift(r, gamma, dilation=3)[1], y)


def test_sequences_do_not_mix():
    x, gamma, branch = draw((4, 23, 40), "rms", True)
    r, y = norm_token_shift(x, gamma, None, branch, dilation=3)
    for b in range(4):
        alone = norm_token_shift(x[b : b + 1], gamma, None, branch[b : b + 1], dilation=3)
        assert torch.equal(alone[0][0], r[b]) and torch.equal(alone[1][0], y[b])


@pytest.mark.parametrize("norm, branch, dilation", CASES[:5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(norm, branch, dilation, dtype):
    shape, repeats = ((8, 515, 512), 50) if DEVICE == "cuda" else ((2, 65, 64), 3)
    inputs = draw(shape, norm, branch)
    fn = call(norm_token_shift, norm, dilation)
    first = forward_backward(fn, inputs, dtype)
    for _ in range(repeats):
        again = forward_backward(fn, inputs, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty(shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    gamma = torch.randn(8, device=DEVICE, requires_grad=True)
    r, y = norm_token_shift(x, gamma, None, x, dilation=1)
    (r.sum() + y.sum()).backward()
    assert r.shape == y.shape == x.grad.shape == shape and not gamma.grad.any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 17, 64), (0, 3, 4)], ids=str)
def test_registration(shape, transposed):
    x = torch.randn(shape, device=DEVICE)
    x = x.transpose(0, 1) if transposed else x
    gamma = torch.randn(shape[-1], device=DEVICE)
    half = torch.float16
    torch.library.opcheck(torch.ops.shtx.norm_token_shift, (x, gamma, None, x, 1, half))
    torch.library.opcheck(torch.ops.shtx.norm_token_shift, (x, gamma, gamma, None, 0, x.dtype))
    backward = torch.ops.shtx.norm_token_shift_bwd
    torch.library.opcheck(backward, (x, gamma, x, x, True, 1, half))
    torch.library.opcheck(backward, (x, gamma, None, x, False, 0, x.dtype))


@pytest.mark.parametrize("branch", [False, True])
def test_compiles_without_graph_break(branch):
    inputs = draw((2, 17, 64), "rms", branch)
    fn = call(norm_token_shift, "rms", 2)
    assert_compiles_whole(fn, inputs)


@pytest.mark.gpu  # a graph is the GPU's
def test_captured_in_a_cuda_graph():
    inputs = draw((4, 129, 256), "rms", True, torch.bfloat16)
    fn = call(norm_token_shift, "rms", 1)
    eager = forward_backward(fn, inputs, torch.bfloat16)
    args = [t.clone().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    douts = [torch.randn(4, 129, 256, dtype=torch.float64, device=DEVICE).bfloat16() for _ in "ry"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = fn(*args)
        grads = torch.autograd.grad(outs, args, douts)
    graph.replay()
    for captured, t in zip([*outs, *grads], eager, strict=True):
        assert torch.equal(captured.double(), t)


@pytest.mark.gpu  # 20 GiB
def test_more_than_2_31_elements():
    """The last sequence, past 2^31 elements from the start, gives what it gives alone."""
    x = torch.randn(3, 700_001, 1024, device=DEVICE, dtype=torch.bfloat16)
    gamma = torch.randn(1024, device=DEVICE, dtype=torch.bfloat16)
    outs = []
    for t in (x, x[-1:].clone()):
        t = t.requires_grad_()
        r, y = norm_token_shift(t, gamma, None, t.detach(), dilation=2)
        (dx,) = torch.autograd.grad((r, y), t, (t.detach(), t.detach()))
        outs.append([o[-1].clone() for o in (r, y, dx)])
        del r, y, dx
    for many, alone in zip(*outs, strict=True):
        assert torch.equal(many, alone) and alone.isfinite().all()


X, G = torch.randn(2, 4, 6), torch.randn(6)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((torch.randn(4, 6), G), {}, "x must be (B, M, D)"),
        ((torch.randn(2, 6, 4).transpose(1, 2), G), {}, "contiguous D, got (2, 4, 6)"),
        ((torch.randn(1, 2, 0), torch.randn(0)), {}, "D of 1 to 8192, got 0"),
        ((torch.randn(1, 1, 20000), G), {}, "D of 1 to 8192, got 20000"),
        ((X, torch.randn(5)), {}, "gamma must be (6,)"),
        ((X, G, torch.randn(7)), {"norm": "layer"}, "beta must be (6,)"),
        ((X, G, None, torch.randn(2, 5, 6)), {}, "branch must be (2, 4, 6)"),
        ((X, G), {"norm": "layer"}, 'beta must be given for norm="layer"'),
        ((X, G, G), {}, 'beta must be given for norm="layer" and only there'),
        ((X, G), {"norm": "batch"}, 'norm must be "rms" or "layer", got \'batch\''),
        ((X, G), {"dilation": -1}, "dilation must be at least 0, got -1"),
        ((X, G.to("meta")), {}, "got (6,) on meta"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError) as error:
        norm_token_shift(*args, **options)
    assert message in str(error.value) and str(error.value).count("\n") < 2
