import importlib
import math

import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_gradients_alone,
    assert_replays,
    forward_backward,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import causal_compress, reference
from shtx_kernels.causal_compress import uses_table

op_page = importlib.import_module("shtx_kernels.causal_compress")

PATHS = {"table": True, "products": False}
CASES = [  # B, N, V, D, J, D_out, C, stride
    (2, 21, 5, 6, 10, 4, 2, 1),
    (2, 21, 5, 6, 10, 4, 4, 2),
    (3, 17, 2, 7, 9, 5, 8, 1),
    (1, 40, 40, 16, 300, 8, 16, 8),  # past a tile of columns
    (2, 19, 7, 5, 12, 3, 4, 3),  # windows that overlap, of a stride that does not divide them
    (2, 9, 7, 5, 12, 3, 2, 4),  # tokens that no window reads
    (2, 3, 7, 5, 12, 3, 8, 8),  # a window longer than the sequence
    (2, 1, 1, 1, 1, 1, 2, 1),
]


def draw(B, N, V, D, J, D_out, C, stride=None):
    """ids, and embedding, w_conv, b_conv, w_out, b_out."""
    torch.manual_seed(0)
    weights = [
        torch.randn(V, D),
        torch.randn(J, D, C) * (D * C) ** -0.5,
        torch.randn(J),
        torch.randn(D_out, J, 1) * J**-0.5,
        torch.randn(D_out),
    ]
    return torch.randint(0, V, (B, N)).to(DEVICE), [t.to(DEVICE) for t in weights]


def call(op, ids, stride):
    return lambda *weights: op(ids, *weights, stride=stride)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Both ways, whatever the shape asks for."""
    monkeypatch.setattr(op_page, "uses_table", lambda *shape: PATHS[request.param])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype, path):
    ids, weights = draw(*case)
    fused, twin = (call(op, ids, case[-1]) for op in (causal_compress, reference.causal_compress))
    assert_as_accurate(fused, twin, weights, dtype, gradient_slack=3.0)


@pytest.mark.parametrize("low", [t for t in DTYPES if t != torch.float32], ids=str)
def test_autocast_keeps_the_weights_wide(low, path):
    ids, weights = draw(*CASES[1])

    def mixed(op):
        def fn(*tensors):
            wide = tensors[0].dtype == torch.float64
            with torch.autocast(DEVICE, low, enabled=not wide):
                y = op(ids, *tensors, stride=2)
            assert y.dtype == (torch.float64 if wide else low)
            return y

        return fn

    fused, twin = mixed(causal_compress), mixed(reference.causal_compress)
    assert_as_accurate(fused, twin, weights, torch.float32, gradient_slack=3.0)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_gradcheck(case, path):
    B, N, _, _, _, _, C, stride = case
    ids, weights = draw(B, min(N, 9), 3, 2, 3, 2, C)
    weights = [t.double().requires_grad_() for t in weights]
    assert torch.autograd.gradcheck(call(causal_compress, ids, stride), weights)


@pytest.mark.parametrize("ids", [[[0] * 12], [[4] * 12], [[0, 4] * 6]], ids=str)
def test_one_id_alone_and_ids_that_never_occur(ids, path):
    """One or two of five ids occur: gradients of the others are zero, to the bit."""
    _, weights = draw(*CASES[0])
    weights = [t.double() for t in weights]
    ids = torch.tensor(ids, device=DEVICE)
    ours, twin = (
        forward_backward(call(op, ids, 1), weights, torch.float64)
        for op in (causal_compress, reference.causal_compress)
    )
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)
    others = [v for v in range(5) if v not in ids]
    assert not ours[1][others].any() and ours[1][ids[0, 0]].any()


def test_empty_batch(path):
    ids, weights = draw(*CASES[1])
    out, *grads = forward_backward(call(causal_compress, ids[:0], 2), weights, torch.float32)
    assert out.shape == (0, 11, 4) and not any(g.any() for g in grads)


def test_one_gradient_at_a_time(path):
    ids, weights = draw(*CASES[1])
    assert_gradients_alone(call(causal_compress, ids, 2), weights)


def test_the_graph_can_be_walked_twice(path):
    ids, weights = draw(*CASES[1])
    weights = [t.requires_grad_() for t in weights]
    y = causal_compress(ids, *weights, stride=2)
    twice = [torch.autograd.grad(y.sum(), weights, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


@pytest.mark.parametrize("name", ["causal_compress_table", "causal_compress"])
def test_registration(name):
    ids, (embedding, w_conv, b_conv, w_out, b_out) = draw(*CASES[4])
    forward, backward = getattr(torch.ops.shtx, name), getattr(torch.ops.shtx, f"{name}_bwd")
    args = ids, embedding, w_conv, b_conv, w_out[..., 0], b_out, 3
    torch.library.opcheck(forward, args)
    y, source, taps = forward(*args)
    torch.library.opcheck(backward, (ids, embedding, taps, b_conv, w_out[..., 0], source, y, 3))


def test_compiles_without_graph_break(path):
    ids, weights = draw(*CASES[1])
    fn = call(causal_compress, ids, 2)
    assert_compiles_whole(fn, weights)


@pytest.mark.gpu  # a graph is the GPU's
def test_captured_in_a_cuda_graph(path):
    ids, weights = draw(*CASES[3])
    weights = [t.bfloat16().requires_grad_() for t in weights]

    def run():
        y = causal_compress(ids, *weights, stride=8)
        return y, *torch.autograd.grad(y.square().sum(), weights)

    assert_replays(run, lambda: ids.copy_(ids.flip(1)))


@pytest.mark.gpu  # the interpreter runs programs in one order
@pytest.mark.parametrize("table", PATHS.values(), ids=PATHS)
def test_repeats_to_the_bit(table, monkeypatch):
    monkeypatch.setattr(op_page, "uses_table", lambda *shape: table)
    V = 256 if table else 20_000
    ids, weights = draw(8, 1024, V, 128, 512, 256, 4)
    runs = [
        forward_backward(call(causal_compress, ids, 1), weights, torch.bfloat16) for _ in range(20)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.gpu  # 25 GiB
@pytest.mark.parametrize("table", PATHS.values(), ids=PATHS)
def test_more_than_2_31_elements(table, monkeypatch):
    """The last sequence, past 2^31 elements from the start, gives what it gives alone."""
    monkeypatch.setattr(op_page, "uses_table", lambda *shape: table)
    ids, weights = draw(3, 200_001, 9, 8, 4096, 8, 2)
    weights = [t.bfloat16() for t in weights]
    outs = []
    for some in (ids, ids[2:]):
        args = [t.clone().requires_grad_() for t in weights]
        y = causal_compress(some, *args, stride=1)[-1]
        outs.append([y, *torch.autograd.grad(y.sum(), args)])
    for many, alone in zip(*outs, strict=True):
        assert many.isfinite().all() and (many - alone).norm() <= 1e-2 * alone.norm()


def test_the_way_is_of_the_shape():
    """Bytes take the table in the benchmarks' configurations, and words do not."""
    for level_tokens, D in [(32 * 1024, 1024), (32 * 128, 1024), (8 * 2048, 1024), (16384, 512)]:
        assert uses_table(256, D, level_tokens)
    assert not uses_table(20_000, 512, 4 * 2048)
    assert not uses_table(256, 512, 64)  # one short sequence


def test_out_of_range_is_said():
    ids, weights = draw(*CASES[0])
    good = dict(zip(("embedding", "w_conv", "b_conv", "w_out", "b_out"), weights, strict=True))
    good |= dict(ids=ids, stride=1)
    bad = dict(
        ids=(ids[0], ids.int(), ids[:, :0]),
        embedding=(weights[0][0], weights[0][:0]),
        w_conv=(weights[1][:, :3], weights[1][0], weights[1].double(), weights[1][..., :0]),
        b_conv=(weights[2][:3],),
        w_out=(weights[3][..., 0], weights[3][:, :3], weights[3][:0]),
        b_out=(weights[4][:3], weights[4].double()),
        stride=(0, -1),
    )
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                causal_compress(**good | {name: value})


def test_upstreams_convolution():
    """Token i of the level is made of the C ids that end at i * stride."""
    ids, weights = draw(*CASES[4])
    embedding, w_conv, b_conv, w_out, b_out = (t.double() for t in weights)
    out = causal_compress(ids, embedding, w_conv, b_conv, w_out, b_out, stride=3)
    assert out.shape == (2, math.ceil(19 / 3), 3)
    m = 4
    inner = b_conv + sum(embedding[ids[:, m * 3 - 3 + k]] @ w_conv[:, :, k].T for k in range(4))
    expected = torch.nn.functional.silu(inner) @ w_out[..., 0].T + b_out
    torch.testing.assert_close(out[:, m], expected)
