import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_gradients_alone,
    assert_replays,
    assert_zero_gradients,
    forward_backward,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import reference, token_embedding
from shtx_kernels._one_hot import ONE_HOT

CASES = [  # B, N, V, D, D_out (None: no linear layer)
    (1, 1, 1, 1, None),
    (2, 70, 5, 9, None),
    (3, 43, 17, 8, 6),  # the vocabulary's rows first
    (2, 9, 300, 8, 11),  # fewer tokens than ids
    (2, 40, ONE_HOT + 1, 4, 3),  # too many ids for a product
    (2, 40, ONE_HOT + 1, 4, None),
]


def draw(B, N, V, D, D_out):
    torch.manual_seed(0)
    ids = torch.randint(0, V, (B, N), device=DEVICE)
    weights = [torch.randn(V, D, device=DEVICE)]
    if D_out:
        weights.append(torch.randn(D_out, D, device=DEVICE) * D**-0.5)
    return ids, weights


def call(op, ids):
    return lambda *weights: op(ids, *weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    ids, weights = draw(*case)
    fused, twin = (call(op, ids) for op in (token_embedding, reference.token_embedding))
    assert_as_accurate(fused, twin, weights, dtype, gradient_slack=3.0)


@pytest.mark.parametrize("low", [t for t in DTYPES if t != torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[1:5], ids=str)
def test_autocast_keeps_the_gradients_wide(case, low):
    ids, weights = draw(*case)

    def mixed(op):
        def fn(*tensors):
            wide = tensors[0].dtype == torch.float64
            with torch.autocast(DEVICE, low, enabled=not wide):
                y = op(ids, *tensors)
            if op is token_embedding:
                assert y.dtype == (torch.float64 if wide else low)
            return y if wide else y.to(low)

        return fn

    fused, twin = mixed(token_embedding), mixed(reference.token_embedding)
    assert_as_accurate(fused, twin, weights, torch.float32, gradient_slack=3.0)


@pytest.mark.parametrize("case", [(2, 9, 4, 3, 2), (1, 3, 5, 2, 3), (2, 9, 4, 3, None)], ids=str)
def test_gradcheck(case):
    ids, weights = draw(*case)
    weights = [t.double().requires_grad_() for t in weights]
    assert torch.autograd.gradcheck(call(token_embedding, ids), weights)


@pytest.mark.parametrize("D_out", [None, 3])
@pytest.mark.parametrize("ids", [[[0] * 12], [[4] * 12], [[4, 0] * 6]], ids=str)
def test_one_id_alone_and_ids_that_never_occur(ids, D_out):
    """One or two of five ids occur: gradients of the others are zero, to the bit."""
    _, weights = draw(1, 1, 5, 4, D_out)
    ids = torch.tensor(ids, device=DEVICE)
    ours, twin = (
        forward_backward(call(op, ids), weights, torch.float64)
        for op in (token_embedding, reference.token_embedding)
    )
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)
    others = [v for v in range(5) if v not in ids]
    assert not ours[1][others].any() and ours[1][ids[0, 0]].any()


@pytest.mark.parametrize("D_out", [None, 3])
@pytest.mark.parametrize("V", [5, ONE_HOT + 1])
@pytest.mark.parametrize("B, N", [(0, 4), (2, 0)])
def test_no_tokens(B, N, V, D_out):
    ids, weights = draw(2, 4, V, 8, D_out)
    assert_zero_gradients(call(token_embedding, ids[:B, :N]), weights, (B, N, D_out or 8))


@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_one_gradient_at_a_time(case):
    ids, weights = draw(*case)
    assert_gradients_alone(call(token_embedding, ids), weights)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_registration(case):
    ids, (embedding, *weight) = draw(*case)
    weight = weight[0] if weight else None
    torch.library.opcheck(torch.ops.shtx.token_embedding.default, (ids, embedding, weight))
    dy = torch.randn_like(token_embedding(ids, embedding, weight))
    args = dy, ids, embedding, weight
    torch.library.opcheck(torch.ops.shtx.token_embedding_bwd.default, (*args, weight is not None))


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_compiles_without_graph_break(case):
    ids, weights = draw(*case)
    fn = call(token_embedding, ids)
    assert_compiles_whole(fn, weights)


@pytest.mark.gpu  # atomics would give other bits
@pytest.mark.parametrize("V, D_out", [(256, None), (256, 128), (20_000, None), (20_000, 128)])
def test_repeats_to_the_bit_in_a_cuda_graph(V, D_out):
    ids, weights = draw(8, 2048, V, 256, D_out)
    ids[:, ::3] = 7  # a frequent one
    weights = [t.requires_grad_() for t in weights]

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            y = token_embedding(ids, *weights)
        return [y, *torch.autograd.grad(y, weights, y.detach())]

    assert_replays(run, lambda: weights[0].mul_(2))


def test_bad_input():
    ids, (embedding, weight) = draw(*CASES[2])
    good = dict(ids=ids, embedding=embedding, weight=weight)
    bad = dict(
        ids=(ids[0], ids.int()),
        embedding=(embedding[0], embedding[:0]),
        weight=(weight[:, :3], weight[0], weight.double()),
    )
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                token_embedding(**good | {name: value})
