"""The table of rotations, which is made once for all calls that need the same one.

Its row 0 has log2(z) / 512 in the first half of its channels, z being the base of xpos. All other
rows are cos | sin: first those of tokens 0 to LOCAL - 1, for positions in and around a tile, then
those of every STEP-th token, for distances of tiles.
"""

import torch
from torch import Tensor

from .._register import is_plain
from ..launch import next_power_of_2
from ..products import sum_dtype
from .tokens import LOCAL, STEP

MAX_TILE = 128  # tokens of a tile, at most

# Tables by all that they depend on. None is dropped, as a CUDA graph may read it. There is at most
# one for each even E, power of two, accumulator and device, of 4 MiB for a million tokens and E 16.
_tables: dict[tuple, Tensor] = {}


def _make_table(E: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table (rows, E) for distances of tiles below `reach`."""
    wide = dict(dtype=torch.float64, device=device)
    channel = torch.arange(0, E, 2, **wide)
    decay = ((channel + 0.4 * E) / (1.4 * E)).log2() / 512
    t = torch.cat((torch.arange(LOCAL.value, **wide), torch.arange(0, reach, STEP.value, **wide)))
    angle = t[:, None] * 10000 ** (-channel / E)
    top = torch.cat((decay, torch.zeros_like(decay)))[None]
    return torch.cat((top, torch.cat((angle.cos(), angle.sin()), dim=1))).to(dtype)


def make_table(qkv: Tensor, E: int, n: int) -> Tensor:
    """The table for residue classes of n tokens, anew in compiled graphs and for fake tensors."""
    dtype = sum_dtype(qkv.dtype)
    reach = n + MAX_TILE  # the farthest that two tiles can be apart
    if not is_plain(qkv):
        return _make_table(E, reach, dtype, qkv.device)
    key = E, next_power_of_2(reach), dtype, qkv.device
    table = _tables.get(key)
    if table is None:
        with torch.inference_mode(False):  # a backward may save it
            table = _make_table(*key)
        if qkv.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return table  # it belongs to the graph, whose replays fill it anew
            torch.cuda.current_stream(qkv.device).synchronize()  # other streams may use it next
        table = _tables.setdefault(key, table)
    return table
