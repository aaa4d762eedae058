"""The reference model without what makes it slow under torch.compile: the best of plain PyTorch.

The reference is compiled well but for its attention: a window there is buckets under a dense mask,
and Inductor computes angles in fp64 anew wherever they are read. Here windows are FlexAttention,
full attention is SDPA's causal kernel, and tables of angles and block masks are made once. All else
is the reference, whose cross entropy is of the logits as the product leaves them.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.timing import DEVICE
from shtx import HierarchicalTransformer, ops
from shtx_kernels.reference.attention import split_heads

# dictionaries, as torch.compile would trace through a lru_cache, and repeat the work
ANGLES: dict[tuple, list[Tensor]] = {}
MASKS: dict[tuple, BlockMask] = {}


def angles(n: int, E: int, xpos: bool) -> list[Tensor]:
    """fp32 cos and sin (n, E / 2) for q, then for k, with their xpos factors, as fp64 has them."""
    key = n, E, xpos
    if key not in ANGLES:
        t = torch.arange(n, device=DEVICE, dtype=torch.float64)[:, None]
        channel = torch.arange(0, E, 2, device=DEVICE, dtype=torch.float64)
        angle = t * 10000 ** (-channel / E)
        scale = ((channel + 0.4 * E) / (1.4 * E)) ** ((t - n // 2) / 512 * xpos)
        tables = [f(angle) * s for s in (scale, 1 / scale) for f in (torch.cos, torch.sin)]
        ANGLES[key] = [table.float() for table in tables]
    return ANGLES[key]


def block_mask(n: int, window: int | None) -> BlockMask:
    """Return the mask of queries i and keys j with i - window <= j <= i."""
    key = n, window
    if key not in MASKS:
        reach = n if window is None else window
        sees = lambda b, h, i, j: (j <= i) & (i - j <= reach)
        MASKS[key] = create_block_mask(sees, None, None, n, n, device=DEVICE)
    return MASKS[key]


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, y = t.float().chunk(2, dim=-1)
    return torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1).to(t.dtype)


def is_full(window: int | None, n: int) -> bool:
    return window is None or window >= n - 1


def rotary_attention(
    qkv, heads, *, window=None, dilation=1, xpos=False, interleaved=False, scale=None
):
    M = qkv.shape[1]
    q, k, v = split_heads(qkv, heads, dilation)
    if interleaved:
        q, k = ops.halves(q), ops.halves(k)
    n, E = q.shape[-2:]
    tables = angles(n, E, xpos)
    q, k = rotate(q, *tables[:2]), rotate(k, *tables[2:])
    if is_full(window, n):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = flex_attention(q, k, v, block_mask=block_mask(n, window), scale=scale)
    return rearrange(out, "(b a) h n e -> b (n a) (h e)", a=dilation)[:, :M]


OPS = SimpleNamespace(**vars(ops.REFERENCE) | {"rotary_attention": rotary_attention})


class Repaired(HierarchicalTransformer):
    """A model of seq_len tokens that makes its tables and masks ahead of torch.compile."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for level in self.levels:
            M = -(-self.seq_len // level.stride)
            n = -(-M // level.dilation)
            if level.window != 0:
                angles(n, level.dim_head, xpos=level.window is None)
                if not is_full(level.window, n):
                    block_mask(n, level.window)

    def ops_for(self, device: torch.device) -> SimpleNamespace:
        return OPS
