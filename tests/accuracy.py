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
