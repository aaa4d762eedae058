"""The references against their formulas, written out in loops or in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from shtx_kernels import reference


def attention_by_definition(qkv, heads, window, dilation, xpos):
    """Scores pair by pair: only tokens of one residue class, at most `window` of them back."""
    B, M, width = qkv.shape
    E = width // (3 * heads)
    q, k, v = qkv.view(B, M, 3, heads, E).unbind(2)
    channel = torch.arange(0, E, 2, dtype=torch.float64)
    frequency = 10000 ** (-channel / E)
    z = (channel + 0.4 * E) / (1.4 * E) if xpos else torch.ones_like(channel)
    out = torch.zeros(B, M, heads, E, dtype=torch.float64)
    for i in range(M):
        keys = range(i % dilation, i + 1, dilation)
        keys = [j for j in keys if window is None or (i - j) // dilation <= window]
        scores = []
        for j in keys:
            steps = (i - j) // dilation
            turn = torch.polar(z ** (steps / 512), steps * frequency)
            a, b = (torch.complex(*t.chunk(2, -1)) for t in (q[:, i], k[:, j]))
            scores.append((a * b.conj() * turn).real.sum(-1) / math.sqrt(E))
        weights = torch.stack(scores, -1).softmax(-1)  # (B, heads, keys)
        out[:, i] = torch.einsum("bhj,bjhe->bhe", weights, v[:, keys])
    return out.flatten(2)


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("dilation", [1, 3, 40])
@pytest.mark.parametrize("window", [None, 1, 4, 12, 100])
def test_rotary_attention(window, dilation, xpos):
    torch.manual_seed(0)
    qkv = torch.randn(2, 31, 3 * 2 * 6, dtype=torch.float64)
    out = reference.rotary_attention(qkv, 2, window=window, dilation=dilation, xpos=xpos)
    expected = attention_by_definition(qkv, 2, window, dilation, xpos)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_interleaved_rotary_attention():
    """Channels 2 c and 2 c + 1 are what c and c + E / 2 are otherwise."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 31, 3, 2, 6, dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    order = [0, 2, 4, 1, 3, 5]
    apart = torch.stack((q[..., order], k[..., order], v), dim=2)
    options = dict(window=12, dilation=3, xpos=True)
    out = reference.rotary_attention(qkv.flatten(2), 2, **options, interleaved=True)
    assert torch.equal(out, reference.rotary_attention(apart.flatten(2), 2, **options))
    assert torch.equal(reference.neighbours(reference.halves(q)), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rotary_keeps_its_angles(dtype):
    """Far out, where angles in the dtype itself would be off by whole turns."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 4096, 3 * 16, device=DEVICE, dtype=dtype)
    exact = reference.rotary_attention(qkv.double(), 1, window=16)
    error = (reference.rotary_attention(qkv, 1, window=16) - exact).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_angles_of_far_tokens():
    cos, sin, _ = reference.attention._rotation(65536, 64, False, torch.zeros(1))
    for channel in (0, 1, 31):
        angle = 65535 * 10000 ** (-2 * channel / 64)
        assert cos[-1, channel].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[-1, channel].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_fp16_with_xpos_stays_finite():
    """Its factors reach 0.2857 ** -20, past what fp16 holds."""
    qkv = torch.randn(1, 20_000, 3 * 16, dtype=torch.float16)
    assert reference.rotary_attention(qkv, 1, window=4, xpos=True).isfinite().all()


@pytest.mark.parametrize("compress, stride", [(2, 1), (4, 2), (8, 8)])
def test_causal_compress(compress, stride):
    """Token i of the level is made of the `compress` ids that end at i * stride."""
    torch.manual_seed(0)
    ids, table = torch.randint(0, 9, (2, 21)), torch.randn(9, 3, dtype=torch.float64)
    w_conv, b_conv, w_out, b_out = (
        torch.randn(size, dtype=torch.float64) for size in ((12, 3, compress), 12, (5, 12, 1), 5)
    )
    out = reference.causal_compress(ids, table, w_conv, b_conv, w_out, b_out, stride=stride)
    assert out.shape == (2, math.ceil(21 / stride), 5)
    for i in range(out.shape[1]):
        inner = b_conv.expand(2, 12)
        for tap in range(compress):
            position = i * stride - (compress - 1) + tap
            if position >= 0:
                inner = inner + table[ids[:, position]] @ w_conv[:, :, tap].T
        torch.testing.assert_close(out[:, i], F.silu(inner) @ w_out[..., 0].T + b_out)


@pytest.mark.parametrize("compress, stride", [(2, 1), (4, 2), (8, 8)])
def test_reconstruction_loss(compress, stride):
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (2, 21))
    x = torch.randn(2, math.ceil(21 / stride), 5, dtype=torch.float64)
    weight = torch.randn(compress * 9, 5, dtype=torch.float64)
    losses = []
    for b in range(2):
        for i in range(x.shape[1]):
            for tap, logits in enumerate((weight @ x[b, i]).view(compress, 9)):
                position = i * stride - (compress - 1) + tap
                if position >= 0 and ids[b, position]:
                    losses.append(F.cross_entropy(logits, ids[b, position]))
    loss = reference.reconstruction_loss(x, weight, ids, compress=compress, stride=stride)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
