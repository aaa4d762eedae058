"""FLOPs of the fused ops, as torch.utils.flop_counter counts those of the references."""

import pytest
import torch
from helpers import DEVICE
from test_autograd import CALLS, NAMES
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import shtx_kernels
from shtx import HierarchicalTransformer
from shtx_kernels import reference

ATEN = torch.ops.aten
# PyTorch counts its attention on a GPU alone
ON_CPU = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dout, q, k, v, *_, **__: sdpa_backward_flop_count(dout, q, k, v)
    ),
}


def count(fn) -> int:
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        fn()
    return counter.get_total_flops()


def forward_backward(call, ops):
    outputs = [t for t in tree_leaves(call(ops)) if t.requires_grad]
    sum(t.sum() for t in outputs).backward()


def assert_equal_counts(call):
    with torch.no_grad():
        forward = [count(lambda ops=ops: call(ops)) for ops in (shtx_kernels, reference)]
    assert forward[0] == forward[1]
    total = [
        count(lambda ops=ops: forward_backward(call, ops)) for ops in (shtx_kernels, reference)
    ]
    assert total[0] == total[1]
    return total[0]


@pytest.mark.parametrize("name, call, _", CALLS, ids=NAMES)
def test_every_op(name, call, _):
    assert (assert_equal_counts(call) > 0) == (name != "norm_token_shift")


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dilation=3, xpos=True),
        dict(dilation=50),
        dict(window=4),
        dict(window=5, dilation=3),
        dict(window=36),
    ],
    ids=str,
)
def test_attention(options):
    qkv = torch.randn(2, 37, 48, device=DEVICE, requires_grad=True)
    assert assert_equal_counts(lambda ops: ops.rotary_attention(qkv, 2, **options)) > 0


@pytest.mark.parametrize("V", [5, 600])  # by a table, or by products of all tokens
@pytest.mark.parametrize("C, stride", [(1, 1), (4, 1), (4, 2), (3, 5)])
def test_compressor(V, C, stride):
    draw = lambda *shape: torch.randn(shape, device=DEVICE, requires_grad=True)
    ids = torch.randint(0, V, (2, 101), device=DEVICE)
    weights = draw(V, 8), draw(16, 8, C), draw(16), draw(6, 16, 1), draw(6)
    assert_equal_counts(lambda ops: ops.causal_compress(ids, *weights, stride=stride))


@pytest.mark.parametrize("V", [5, 600])
@pytest.mark.parametrize("has_weight", [False, True])
def test_embedding(V, has_weight):
    embedding = torch.randn(V, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, 8, device=DEVICE, requires_grad=True) if has_weight else None
    ids = torch.randint(0, V, (2, 101), device=DEVICE)
    assert_equal_counts(lambda ops: ops.token_embedding(ids, embedding, weight))


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 4)])
def test_merge(strides):
    draw = lambda *shape: torch.randn(shape, device=DEVICE, requires_grad=True)
    levels = [draw(2, -(-17 // stride), 8) for stride in strides]
    weights = draw(16), draw(12, 16), draw(12), draw(6, 12), draw(6)
    branches = [draw(*levels[0].shape), None]
    assert_equal_counts(lambda ops: ops.hierarchical_merge(levels, strides, *weights, branches))


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_successors(tokens):
    draw = lambda *shape: torch.randn(shape, device=DEVICE, requires_grad=True)
    h, weight, bias = draw(2, tokens, 8), draw(8, 8), draw(8)
    assert_equal_counts(lambda ops: ops.hierarchical_ar_loss(h, weight, bias))


@pytest.mark.parametrize("V", [5, 600])
@pytest.mark.parametrize("needs_embedding", [False, True])
def test_summaries(V, needs_embedding):
    draw = lambda *shape: torch.randn(shape, device=DEVICE, requires_grad=True)
    embedding = torch.randn(V, 8, device=DEVICE, requires_grad=needs_embedding)
    ids, weights = torch.randint(0, V, (2, 101), device=DEVICE), (draw(6, 8), draw(6))
    sizes = dict(compress=4, stride=2)
    assert assert_equal_counts(lambda ops: ops.chunk_summary(ids, embedding, *weights, **sizes))


@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("tokens", [3, 9])
def test_next_latents(tokens, R):
    draw = lambda *shape: torch.randn(shape, device=DEVICE, requires_grad=True)
    layers = [(draw(6, 16), draw(6)), (draw(5, 6), draw(5)), (draw(8, 5), draw(8))]
    valid, steps = torch.ones(2, tokens, device=DEVICE).bool(), torch.ones(R, device=DEVICE)
    args = draw(2, tokens, 8), draw(2, tokens, 8), valid, (draw(16), draw(16)), layers, steps
    assert (assert_equal_counts(lambda ops: ops.next_latent_loss(*args)[0]) > 0) == (tokens > R)


@pytest.mark.parametrize("wanted", range(2))
def test_what_needs_no_gradient_is_not_counted(wanted):
    x, weight = torch.randn(2, 9, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    (x, weight)[wanted].requires_grad_()
    assert assert_equal_counts(lambda ops: ops.linear(x, weight)) == 2 * (2 * 2 * 9 * 8 * 5)


def test_a_model():
    shape = dict(dim=(16, 8, 24), hierarchies=(1, 2, 8), hierarchical_stride=(1, 1, 4))
    shape |= dict(num_tokens=17, depth=2, heads=2, dim_head=4, seq_len=64)
    model = HierarchicalTransformer(window_sizes=(4, None, 0), **shape).to(DEVICE)
    ids = torch.randint(0, 17, (2, 65), device=DEVICE)
    counts = []
    for impl in ("fused", "reference"):
        model.impl = impl
        counts.append(count(lambda: model(ids, return_loss=True)[0].backward()))
    assert counts[0] == counts[1] > 0
