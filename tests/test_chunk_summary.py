import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_replays,
    assert_zero_gradients,
    forward_backward,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import chunk_summary, reference
from shtx_kernels._one_hot import ONE_HOT

CASES = [  # B, N, V, D, D_out (None: no linear layer), C, stride
    (1, 1, 1, 1, None, 1, 1),
    (2, 70, 5, 9, None, 4, 1),
    (2, 37, 7, 9, None, 3, 2),  # the last level token is not the last token
    (3, 43, 17, 8, 6, 4, 1),  # the vocabulary's rows first
    (3, 43, 17, 8, 6, 1, 1),
    (2, 45, 17, 12, 20, 8, 4),
    (2, 9, 300, 8, 11, 5, 3),  # fewer tokens than ids
    (2, 40, ONE_HOT + 1, 4, 3, 4, 2),  # too many ids for a product
    (2, 40, ONE_HOT + 1, 4, None, 4, 4),
    (1, 5, 3, 4, 2, 16, 8),  # no chunk is whole
    (1, 9, 3, 1000, None, 2, 1),  # rounds of a row
]


def draw(B, N, V, D, D_out, C, stride):
    torch.manual_seed(0)
    ids = torch.randint(0, V, (B, N), device=DEVICE)
    weights = [torch.randn(V, D, device=DEVICE)]
    if D_out:
        weights.append(torch.randn(D_out, D, device=DEVICE) * D**-0.5)
        weights.append(torch.randn(D_out, device=DEVICE))
    return ids, weights, dict(compress=C, stride=stride)


def both(ids, sizes):
    return [
        lambda *weights, op=op: op(ids, *weights, **sizes)
        for op in (chunk_summary, reference.chunk_summary)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    ids, weights, sizes = draw(*case)
    assert_as_accurate(*both(ids, sizes), weights, dtype, gradient_slack=3.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference_in_fp64(case):
    ids, weights, sizes = draw(*case)
    pairs = [forward_backward(op, weights, torch.float64) for op in both(ids, sizes)]
    for ours, twin in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 6, 7)], ids=str)
def test_without_a_bias(case):
    ids, weights, sizes = draw(*case)
    pairs = [forward_backward(op, weights[:2], torch.float64) for op in both(ids, sizes)]
    for ours, twin in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("low", [t for t in DTYPES if t != torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[1:9], ids=str)
def test_autocast(case, low):
    ids, weights, sizes = draw(*case)
    results, fused = [], both(ids, sizes)[0]
    with torch.autocast(DEVICE, low):
        assert fused(*weights).dtype == low
    for op in both(ids, sizes):
        inputs = [t.clone().requires_grad_() for t in weights]
        with torch.autocast(DEVICE, low):
            y = op(*inputs)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        results.append([y.float(), *torch.autograd.grad(y, inputs, dy)])
    for ours, twin in zip(*results, strict=True):
        assert ours.dtype == twin.dtype == torch.float32
        assert (ours - twin).norm() <= 1e-2 * twin.norm()


@pytest.mark.parametrize("case", [CASES[3], CASES[7]], ids=str)
@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(case, wanted):
    """The embedding is detached by default, so that its linear layer alone is trained."""
    ids, weights, sizes = draw(*case)
    fused, twin = both(ids, sizes)
    _, *gradients = forward_backward(twin, weights, torch.float32)
    weights[wanted].requires_grad_()
    y = fused(*weights)
    torch.manual_seed(1)
    dy = torch.randn_like(y, dtype=torch.float64).to(y.dtype)
    (ours,) = torch.autograd.grad(y, weights[wanted], dy)
    torch.testing.assert_close(ours.double(), gradients[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[3], CASES[6], CASES[8]], ids=str)
@pytest.mark.parametrize("B, N", [(0, 4), (2, 0)])
def test_no_tokens(case, B, N):
    _, weights, sizes = draw(*case)
    ids = torch.zeros(B, N, dtype=torch.long, device=DEVICE)
    width = weights[1].shape[0] if len(weights) > 1 else weights[0].shape[1]
    shape = B, -(-N // sizes["stride"]), width
    assert_zero_gradients(both(ids, sizes)[0], weights, shape)


def test_any_layout():
    ids, (embedding, weight, bias), sizes = draw(*CASES[3])
    expected = chunk_summary(ids, embedding, weight, bias, **sizes)
    wide = torch.zeros(*ids.shape, 2, dtype=torch.long, device=DEVICE)
    wide[..., 1] = ids
    strided = chunk_summary(
        wide[..., 1], embedding.T.contiguous().T, weight, bias.repeat(2, 1).T[:, 0], **sizes
    )
    assert torch.equal(strided, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ids=torch.zeros(3, dtype=torch.long)), r"ids must be \(B, N\) int64, got \(3,\)"),
        (dict(ids=torch.zeros(2, 3)), r"ids must be .*, got \(2, 3\), torch.float32"),
        (dict(embedding=torch.zeros(0, 4)), r"embedding must be \(V, D\), not empty"),
        (dict(embedding=torch.zeros(2, 8193)), "embedding must have a width D of 1 to 8192"),
        (dict(weight=torch.zeros(3, 5)), r"weight must be \(D_out, 4\), .* got \(3, 5\)"),
        (dict(weight=torch.zeros(3, 4).half()), "weight must be .* got .*, torch.float16"),
        (dict(weight=None), "bias must be None without a weight"),
        (dict(bias=torch.zeros(4)), r"bias must be \(3,\), .* got \(4,\)"),
        (dict(compress=0), "compress must be at least 1, got 0"),
        (dict(stride=0), r"stride must be 1 to 4 \(compress\), got 0"),
        (dict(stride=5), r"stride must be 1 to 4 \(compress\), got 5"),
    ],
)
def test_bad_input(change, message):
    good = dict(
        ids=torch.zeros(2, 6, dtype=torch.long),
        embedding=torch.zeros(5, 4),
        weight=torch.zeros(3, 4),
        bias=torch.zeros(3),
        compress=4,
        stride=2,
    )
    tensors = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        chunk_summary(**tensors)


def test_compiles_whole():
    ids, weights, sizes = draw(*CASES[3])
    fn = lambda *weights: chunk_summary(ids, *weights, **sizes)
    assert_compiles_whole(fn, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7]], ids=str)
def test_opcheck(case):
    ids, weights, sizes = draw(*case)
    embedding, weight, bias = (*weights, None, None)[:3]
    forward, backward = torch.ops.shtx.chunk_summary, torch.ops.shtx.chunk_summary_bwd
    args = embedding, weight, bias, *sizes.values(), torch.float32
    torch.library.opcheck(forward.default, (ids, *args))
    y = forward(ids, *args)
    has = weight is not None
    for needs in ((True, has), (not has, has)):
        args = y, ids, embedding, weight, *sizes.values(), has, *needs
        torch.library.opcheck(backward.default, args)


@pytest.mark.gpu  # a graph is the GPU's; other bits would come of the order that programs end in
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_to_the_bit_in_a_cuda_graph(case):
    ids, weights, sizes = draw(*case)
    weights = [t.requires_grad_() for t in weights]

    def run():
        y = chunk_summary(ids, *weights, **sizes)
        return [y, *torch.autograd.grad(y.square().sum(), weights)]

    assert_replays(run, lambda: weights[0].mul_(2))
