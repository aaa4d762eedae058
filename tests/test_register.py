"""All ops work in PyTorch's tools: in Inductor, under modes and profilers, on meta tensors."""

import sys
from unittest.mock import patch

import pytest
import torch
from helpers import DEVICE
from test_autograd import CALLS, NAMES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import shtx_kernels
from shtx_kernels import linear, rotary_attention
from shtx_kernels._register import is_plain


class Names(TorchDispatchMode):
    """The shtx ops that the dispatcher is called for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "shtx":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, call, x", CALLS, ids=NAMES)
def test_modes_see_every_op_and_change_nothing(name, call, x):
    backward = lambda outs: torch.autograd.grad([t for t in outs if t.requires_grad][0].sum(), x)
    outs = tree_leaves(call(shtx_kernels))
    direct = [*outs, *backward(outs)]
    with Names() as names:
        outs = tree_leaves(call(shtx_kernels))
        through = [*outs, *backward(outs)]
    assert all(map(torch.equal, direct, through))
    registered = {"reconstruction_loss": "linear_cross_entropy"}.get(name, name)
    assert f"shtx::{registered}" in names.seen
    losses_make_gradients_in_forward = registered == "linear_cross_entropy"
    assert (f"shtx::{registered}_bwd" in names.seen) != losses_make_gradients_in_forward


def test_a_profiler_sees_the_op():
    x, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    with torch.profiler.profile() as profile:
        linear(x, weight)
    assert "shtx::linear" in {event.name for event in profile.events()}


def test_what_is_plain():
    x = torch.randn(3)
    assert is_plain(x, None, 1, torch.float32, [x, None], torch.nn.Parameter(x))
    assert is_plain([x], (1, 2))
    assert not is_plain(x.to("meta")) and not is_plain([x.to("meta")])

    class Sub(torch.Tensor):
        pass

    assert not is_plain(x, x.as_subclass(Sub)) and not is_plain(x, [x.as_subclass(Sub)])
    with Names():
        assert not is_plain(x)
    assert torch.compile(lambda x: x + is_plain(x), backend="eager")(x).equal(x)


@pytest.mark.parametrize("name, call, x", CALLS, ids=NAMES)
def test_meta_tensors_have_the_shapes_and_dtypes(name, call, x):
    """Every tensor that a call closes over, on the meta device."""

    def to_meta(value):
        if isinstance(value, torch.Tensor):
            return value.detach().to("meta").requires_grad_(value.requires_grad)
        return value

    cells = [cell.cell_contents for cell in call.__closure__]
    for cell, value in zip(call.__closure__, cells, strict=True):
        cell.cell_contents = tree_map(to_meta, value)
    try:
        with patch.dict(call.__globals__, IDS=call.__globals__["IDS"].to("meta")):
            outs = tree_leaves(call(shtx_kernels))
            inputs = [cell.cell_contents for cell in call.__closure__]
            inputs = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
            inputs = [t for t in inputs if t.requires_grad]
            gradients = torch.autograd.grad(sum(t.sum() for t in outs), inputs)
    finally:
        for cell, value in zip(call.__closure__, cells, strict=True):
            cell.cell_contents = value
    for meta, real in zip(outs, tree_leaves(call(shtx_kernels)), strict=True):
        assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)
    for gradient, t in zip(gradients, inputs, strict=True):
        assert gradient.is_meta and (gradient.shape, gradient.dtype) == (t.shape, t.dtype)


def test_inductor_takes_the_ops_as_they_are():
    """It does so without the line of its log whose text doubles with every op."""
    from torch._inductor import exc

    def chain(x, w, w_out):
        for _ in range(3):
            x = linear(rotary_attention(linear(x, w), 1), w_out)
        return x.sum()

    torch.compiler.reset()
    x = torch.randn(2, 5, 4, device=DEVICE, requires_grad=True)
    w = torch.randn(12, 4, device=DEVICE, requires_grad=True)
    w_out = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    inputs = x, w, w_out
    text = AssertionError("an op became an implicit fallback")
    with (
        patch.object(exc.MissingOperatorWithoutDecomp, "operator_str", side_effect=text),
        patch.object(exc.MissingOperatorWithDecomp, "operator_str", side_effect=text),
        patch("torch._inductor.graph.LazyString", lambda function, *args: function(*args)),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        compiled = torch.compile(chain, fullgraph=True)(*inputs)
        gradients = torch.autograd.grad(compiled, inputs)
    known = sys.modules["torch._inductor.lowering"].FALLBACK_ALLOW_LIST
    assert {f"shtx::{op}" for op in ("linear", "linear_bwd", "rotary_attention")} <= set(known)
    eager = chain(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients, torch.autograd.grad(eager, inputs))
