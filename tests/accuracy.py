"""Checks of an op against its reference, which tests of ops share."""

import torch
from helpers import DEVICE
from torch.utils._pytree import tree_leaves


def forward_backward(fn, inputs, dtype):
    """Outputs and input gradients of fn on fresh copies of the inputs, as fp64."""
    args = [t.to(dtype).detach().requires_grad_() for t in inputs]
    outs = [o for o in tree_leaves(fn(*args)) if o.requires_grad]
    torch.manual_seed(1)
    douts = [torch.randn_like(o, dtype=torch.float64).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, args, douts)
    return [t.double() for t in [*outs, *grads]]


def assert_compiles_whole(fn, inputs, **tolerances):
    """Without a graph break, fn has the outputs and gradients that it has eagerly."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    results = (forward_backward(f, inputs, torch.float32) for f in (compiled, fn))
    torch.testing.assert_close(*results, **tolerances)


def assert_zero_gradients(fn, inputs, shape):
    """The output of fn has this shape, which has no elements, and all gradients are zero."""
    y, *gradients = forward_backward(fn, inputs, torch.float32)
    assert y.shape == shape and not y.numel()
    for gradient, t in zip(gradients, inputs, strict=True):
        assert gradient.shape == t.shape and not gradient.any()


def assert_gradients_alone(fn, inputs):
    """The gradient of each input is the same to the bit where no other input has one."""
    every = [t.clone().requires_grad_() for t in inputs]
    y = fn(*every)
    dy = torch.randn_like(y)
    for i, expected in enumerate(torch.autograd.grad(y, every, dy)):
        alone = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(fn(*alone), alone[i], dy)
        assert torch.equal(gradient, expected)


def assert_near_gradients(y, twin, inputs, dy=None):
    """Gradients of y are in the dtypes of the inputs, and near those of its twin, as in 16 bits."""
    gradients = (torch.autograd.grad(out, inputs, dy) for out in (y, twin))
    for ours, theirs, t in zip(*gradients, inputs, strict=True):
        assert ours.dtype == t.dtype
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def layouts(x):
    """The values of x (B, M, D), laid out in the ways an op may be handed them, with names."""
    B, M, D = x.shape
    arena = lambda *size: torch.full(size, float("nan"), device=DEVICE)
    yield "batch second", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "columns of a wider tensor", arena(B, M, D + 5)[..., 3 : D + 3].copy_(x)
    yield "rows of a longer tensor", arena(B, 2 * M, D)[:, ::2].copy_(x)
    yield "in the middle of NaN", arena(B + 2, M + 2, D)[1:-1, 1:-1].copy_(x)
    yield "off by one element", arena(B * M * D + 1)[1:].view(B, M, D).copy_(x)
    yield "expanded over batch", x[:1].expand(B, M, D)


def graphed(run):
    """A CUDA graph of run, and the outputs that a replay overwrites."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def assert_replays(run, change):
    """Replays of a graph of run, after `change` has written over inputs, give what run gives."""
    graph, captured = graphed(run)
    with torch.no_grad():
        change()
    for _ in range(20):
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


def assert_as_accurate(fused, reference, inputs, dtype, slack=2.0, gradient_slack=None):
    """The fused op may be off the fp64 truth by at most `slack` times what eager PyTorch is off.

    gradient_slack: for gradients; that of outputs by default.
    """
    eps = torch.finfo(dtype).eps
    inputs = [t.to(dtype) for t in inputs]
    truth = forward_backward(reference, inputs, torch.float64)
    eager = forward_backward(reference, inputs, dtype)
    ours = forward_backward(fused, inputs, dtype)
    outputs = len(truth) - len(inputs)
    for i, (t, e, o) in enumerate(zip(truth, eager, ours, strict=True)):
        assert o.shape == t.shape and o.isfinite().all()
        times = slack if i < outputs else gradient_slack or slack
        budget = times * (e - t).abs().max() + eps * t.abs().max()
        assert (o - t).abs().max() <= budget, f"{i}: {(o - t).abs().max():.3e} > {budget:.3e}"
