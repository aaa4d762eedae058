import math

import pytest
import torch
from accuracy import assert_as_accurate
from helpers import DEVICE, DTYPES

from shtx_kernels import _cross_entropy, reconstruction_loss, reference

WORKSPACES = [2**20, 2**18, 1]  # bytes, for all taps of a row at once, some of them, one
TAPS = [(1, 1), (2, 1), (4, 2), (8, 8), (6, 4)]  # compress, stride


def draw(B, N, D, V, compress, stride):
    torch.manual_seed(0)
    x = torch.randn(B, math.ceil(N / stride), D, device=DEVICE)
    weight = torch.randn(compress * V, D, device=DEVICE)
    return x, weight, torch.randint(0, V, (B, N), device=DEVICE)


def shrink(monkeypatch, workspace):
    """Chunks, for losses small enough to be computed in fp64 besides."""
    monkeypatch.setattr(_cross_entropy, "ROUND", 16)
    monkeypatch.setattr(_cross_entropy, "ENOUGH", 512)
    monkeypatch.setattr(_cross_entropy, "WORKSPACE", (workspace, workspace))


def call(op, ids, compress, stride):
    return lambda x, weight: op(x, weight, ids, compress=compress, stride=stride)


@pytest.mark.parametrize("compress, stride", TAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("V", [2, 33])
def test_matches_reference(compress, stride, dtype, workspace, V, monkeypatch):
    shrink(monkeypatch, workspace)
    *inputs, ids = draw(2, 41, 8, V, compress, stride)
    fused, twin = (
        call(op, ids, compress, stride)
        for op in (reconstruction_loss, reference.reconstruction_loss)
    )
    assert_as_accurate(fused, twin, inputs, dtype)


@pytest.mark.parametrize("compress, stride", TAPS)
def test_gradcheck(compress, stride):
    x, weight, ids = draw(2, 9, 3, 5, compress, stride)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradcheck(call(reconstruction_loss, ids, compress, stride), inputs)


def test_every_way_to_group_taps_is_met(monkeypatch):
    """The cases of test_matches_reference and the sizes of models meet all of them."""
    assert _cross_entropy._sizes(256 * 2, 8 * 256 * 512 * 4, 16384, 8) == (8192, 8)
    assert _cross_entropy._sizes(20000 * 2, 20000 * 512 * 4, 8192, 1) == (1024, 1)
    assert _cross_entropy._sizes(20000 * 2, 8 * 20000 * 512 * 4, 8192, 8) == (4096, 1)
    rows, taps = _cross_entropy._sizes(50257 * 2, 2**40, 2**20, 4)
    assert rows * taps * 50257 * 2 <= 160 * 2**20  # whatever the gradient takes
    taps = []
    for workspace in WORKSPACES:
        shrink(monkeypatch, workspace)
        taps.append(_cross_entropy._sizes(33 * 4, 0, 82, 8)[1])
    assert taps == [8, 2, 1]


def test_sum_and_count():
    x, weight, ids = draw(2, 41, 8, 33, 4, 2)
    keywords = dict(compress=4, stride=2, reduction="sum")
    total, count = reconstruction_loss(x, weight, ids, **keywords)
    twin, twin_count = reference.reconstruction_loss(x, weight, ids, **keywords)
    assert count == twin_count
    torch.testing.assert_close(total, twin, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(compress=0), "compress and stride must be at least 1, got 0 and 2"),
        (dict(x=torch.randn(2, 4, 8)), r"x must be \(B, ceil\(N / 2\), D\) for ids \(B, N\), got"),
        (dict(weight=torch.randn(6, 8)), r"weight must be \(4 V, 8\) with V at least 1, got"),
    ],
)
def test_bad_input(change, message):
    good = dict(x=torch.randn(2, 3, 8), weight=torch.randn(20, 8), ids=torch.ones(2, 6).long())
    arguments = good | dict(compress=4, stride=2) | change
    tensors = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(**tensors)
