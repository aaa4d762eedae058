"""bf16 in Triton's interpreter, which multiplies bits as integers: ops widen what they multiply.

It also cuts where a GPU rounds, so errors are held to units in the last place, by norms. On a GPU
these tests hold as well.
"""

import pytest
import torch
from accuracy import forward_backward
from helpers import DEVICE
from test_decode_ops import COUNT, FLOATS, cases, run
from torch.utils._pytree import tree_map_only

import shtx_kernels
from shtx.ops import FUSED, REFERENCE
from shtx_kernels import reference

EPS = torch.finfo(torch.bfloat16).eps
IDS = torch.randint(0, 20, (2, 40), device=DEVICE)
STEPS = torch.full((2,), 0.5, device=DEVICE)

# an op's call, and the shapes of its inputs
CALLS = {
    "linear": (lambda ops: ops.linear, [(2, 40, 32), (48, 32)]),
    "feed_forward": (lambda ops: ops.feed_forward, [(2, 40, 32), (64, 32), (32, 64)]),
    "norm_token_shift": (
        lambda ops: lambda x, g, b: ops.norm_token_shift(x, g, branch=b, dilation=2),
        [(2, 40, 32), (32,), (2, 40, 32)],
    ),
    "causal_compress": (
        lambda ops: lambda *weights: ops.causal_compress(IDS, *weights, stride=2),
        [(20, 16), (64, 16, 4), (64,), (24, 64, 1), (24,)],
    ),
    "token_embedding": (
        lambda ops: lambda *weights: ops.token_embedding(IDS, *weights),
        [(20, 16), (24, 16)],
    ),
    "chunk_summary": (
        lambda ops: lambda *weights: ops.chunk_summary(IDS, *weights, compress=4, stride=2),
        [(20, 16), (24, 16), (24,)],
    ),
    "next_latent_loss": (
        lambda ops: (
            lambda h, summaries, gamma, beta, *weights: ops.next_latent_loss(
                h, summaries, IDS > 2, (gamma, beta), [weights[:2], weights[2:]], STEPS
            )[0]
        ),
        [(2, 40, 16), (2, 40, 16), (32,), (32,), (24, 32), (24,), (16, 24), (16,)],
    ),
    "hierarchical_merge": (
        lambda ops: lambda x, y, *weights: ops.hierarchical_merge([x, y], [1, 2], *weights),
        [(2, 40, 16), (2, 20, 8), (24,), (48, 24), (48,), (16, 48), (16,)],
    ),
    "hierarchical_ar_loss": (lambda ops: ops.hierarchical_ar_loss, [(2, 40, 16), (16, 16), (16,)]),
    "linear_cross_entropy": (
        lambda ops: lambda x, w: ops.linear_cross_entropy(x, w, IDS),
        [(2, 40, 16), (20, 16)],
    ),
    "reconstruction_loss": (
        lambda ops: lambda x, w: ops.reconstruction_loss(x, w, IDS, compress=4, stride=2),
        [(2, 20, 16), (80, 16)],
    ),
}
ATTENTIONS = [
    dict(window=4),
    dict(window=16, dilation=2),
    dict(window=70),
    dict(xpos=True),
    dict(window=100, xpos=True),
]


def assert_close(fused, twin, shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=DEVICE) * (shape[-1] ** -0.5) for shape in shapes[1:]]
    inputs = [torch.randn(shapes[0], device=DEVICE), *inputs]
    inputs = [t.bfloat16() for t in inputs]
    truth = forward_backward(twin, inputs, torch.float64)
    for ours, t in zip(forward_backward(fused, inputs, torch.bfloat16), truth, strict=True):
        assert (ours - t).norm() <= 4 * EPS * t.norm()


def test_every_op_is_here():
    assert sorted([*CALLS, "rotary_attention"]) == sorted(shtx_kernels.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_op(name):
    bind, shapes = CALLS[name]
    assert_close(bind(shtx_kernels), bind(reference), shapes)


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_attention(options):
    bind = lambda ops: lambda qkv: ops.rotary_attention(qkv, 2, **options)
    assert_close(bind(shtx_kernels), bind(reference), [(2, 200, 96)])


@pytest.mark.parametrize("case", range(COUNT))
@pytest.mark.parametrize("positions", [[8], [0, 7, 8]], ids=str)
def test_op_of_a_token(case, positions):
    torch.manual_seed(case)
    name, arguments = list(cases(len(positions)))[case]
    narrow = lambda t: t.copy_(t.bfloat16()) if FLOATS(t) else t
    arguments = tree_map_only(torch.Tensor, narrow, arguments)
    fused, twin = (getattr(impl.decode, name) for impl in (FUSED, REFERENCE))
    truth = run(twin, name, positions, arguments, torch.float64)
    for ours, t in zip(run(fused, name, positions, arguments, torch.bfloat16), truth, strict=True):
        assert (ours - t).double().norm() <= 4 * EPS * t.double().norm()
