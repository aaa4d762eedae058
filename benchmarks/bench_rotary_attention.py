"""rotary_attention: its bytes against those of a copy.

forward    reads q, k, v               writes out, and the log-sum-exp in fp32
backward   reads q, k, v, out, dout    writes dq, dk, dv, and reads two numbers a query and head
"""

from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.benchmark import Benchmark
from benchmarks.passes import table, time_op
from benchmarks.providers import ours
from benchmarks.repaired import angles, block_mask, rotate
from benchmarks.timing import DEVICE, DTYPE, autocast
from shtx_kernels import reference


class Case(NamedTuple):
    """Full attention, of which the model's has xpos, or a window."""

    B: int
    M: int
    H: int
    E: int
    window: int | None = None
    dilation: int = 1

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        variant = "full, xpos" if self.window is None else f"w {self.window}"
        variant += f", dilation {self.dilation}" * (self.dilation > 1)
        return {"shape": " x ".join(map(str, self[:4])), "variant": variant}


CASES = {
    "cuda": [
        *(Case(16, 2048, 8, 64, window) for window in (16, 32, 64, 128, 512)),
        *(Case(16, 2048, 8, 64, window, dilation=4) for window in (64, 128)),
        *(Case(1, 16384, 8, 64, 128, dilation) for dilation in (1, 4)),
        Case(16, 2048, 16, 32, 32),
        Case(16, 2048, 32, 16, 16),
        Case(16, 2048, 4, 128, 64),
        Case(32, 1024, 2, 16, 16),  # configuration B's narrow levels
        Case(32, 1024, 4, 32, 32),
        *(Case(B, M, 8, 64) for B, M in ((16, 2048), (32, 1024), (128, 256))),
        Case(4, 2048, 8, 64, dilation=8),
        Case(1, 16384, 8, 64, dilation=16),
        Case(2, 8192, 16, 128, 256),  # configuration E
        Case(2, 2048, 32, 128),
    ],
    "cpu": [
        Case(2, 128, 2, 16, 16),
        Case(2, 128, 2, 16, 16, dilation=4),
        Case(2, 128, 2, 16, dilation=2),
    ],
}[DEVICE]


# peers: rotary, attention and layout in one torch.compile


def around(attend, mask=lambda n, window: window):
    """The op by a peer's `attend(q, k, v, mask, scale)` on tensors (B, M, H, E)."""

    @torch.compile
    def run(qkv, heads, dilation, scale, tables, seen):
        q, k, v = rearrange(qkv, "b (n a) (qkv h e) -> qkv (b a) n h e", qkv=3, a=dilation, h=heads)
        out = attend(rotate(q, *tables[:2]), rotate(k, *tables[2:]), v, seen, scale)
        return rearrange(out, "(b a) n h e -> b (n a) (h e)", a=dilation)

    def op(qkv, heads, *, window=None, dilation=1, xpos=False, scale=None):
        n, E = qkv.shape[1] // dilation, qkv.shape[2] // (3 * heads)
        tables = [table[:, None].to(qkv.device) for table in angles(n, E, xpos)]
        return run(qkv, heads, dilation, scale, tables, mask(n, window))

    return op


def flex(q, k, v, mask, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


def sdpa(q, k, v, _, scale, backend):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2)


def flash_window(q, k, v, window, scale):
    """FlashAttention 2 with a window, which aten has and scaled_dot_product_attention lacks."""
    n = q.shape[1]
    offsets, lengths, dropout, causal, debug = (None, None), (n, n), 0.0, False, False
    return torch.ops.aten._flash_attention_forward.default(
        *(q, k, v, *offsets, *lengths, dropout, causal, debug),
        scale=scale,
        window_size_left=window,
        window_size_right=0,
    )[0]


# local-attention, as its LocalMHA builds and calls it


@lru_cache
def local_attention(E: int, window: int, scale: float | None, device: torch.device):
    from local_attention import LocalAttention  # a peer, not a dependency

    return LocalAttention(
        dim=E, window_size=window, causal=True, autopad=True, scale=scale, exact_windowsize=True
    ).to(device)


def local_mha(qkv, heads, *, window, dilation=1, xpos=False, scale=None):
    q, k, v = rearrange(qkv, "b (n a) (qkv h e) -> qkv (b a) h n e", qkv=3, a=dilation, h=heads)
    attend = local_attention(q.shape[-1], window, scale, q.device)
    with autocast():  # without it half precision fails
        out = attend(q, k, v)
    return rearrange(out, "(b a) h n e -> b (n a) (h e)", a=dilation)


OPS = ours("rotary_attention") | {"flex": around(flex, block_mask)}
WINDOWED = OPS | {"flash-window": around(flash_window), "local-mha": local_mha}
FULL = OPS | {
    "sdpa-flash": around(partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    "sdpa-cudnn": around(partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
}
ON_GPU = ("flex", "flash-window", "sdpa-flash", "sdpa-cudnn")
BENCHMARK = Benchmark(
    (*(WINDOWED | FULL),),
    (table("rotary_attention", "B x M x H x E"),),
    peers=dict.fromkeys(ON_GPU),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rotary_attention(benchmark, case, provider):
    B, M, H, E, window, dilation = case
    ops = FULL if window is None else WINDOWED
    if provider not in ops:
        pytest.skip(f"{provider} has no such attention")
    keywords = dict(window=window, dilation=dilation, xpos=window is None)

    def make():
        size = (B, M, 3 * H * E)
        return (torch.randn(size, dtype=DTYPE, device=DEVICE, requires_grad=True),)

    forward_ms, backward_ms = time_op(
        benchmark,
        lambda qkv: [ops[provider](qkv, H, **keywords)],
        lambda qkv: [reference.rotary_attention(qkv, H, **keywords)],
        make,
    )
    tensor, row_numbers = B * M * H * E * DTYPE.itemsize, B * M * H * 4
    benchmark.extra_info |= {
        "forward_ms": forward_ms,
        "forward_bytes": 4 * tensor + row_numbers,
        "backward_ms": backward_ms,
        "backward_bytes": 8 * tensor + 2 * row_numbers,
    }
