"""The tiles of products of many rows.

Every program reads its rows of x again, so the fewer programs there are, the less is read; too few
leave multiprocessors idle. Where an op has no more rows of weights, it can divide the channels that
are multiplied, and add the parts in another launch.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from .._target import capability
from ..launch import cdiv, next_power_of_2

MAX_ROWS = 64
# Tiles of 16-bit numbers, and of fp32, which no tensor core multiplies exactly.
NARROW = dict(BLOCK_K=64, num_warps=4, num_stages=4)
WIDE = dict(BLOCK_K=128, num_warps=4, num_stages=3)
# The choices of rows of a weight for 16-bit numbers, and of a program's share of the channels.
WIDTHS, SHARES = (16, 32, 64, 128), (512, 1024, 2048, 2**31)
PROCESSORS = 132
LAUNCH = 48 * 1024  # numbers that a multiprocessor reads in the time of another launch


def tiles_of(
    shapes: list[tuple[int, int]], whole: list[bool], widths: tuple[int, ...]
) -> tuple[int, list[int]]:
    """Return BLOCK_O, and how many parts the channels of each level are divided into, so that the
    busiest multiprocessor reads least. They depend on no batch: a row's sums are the same in all.

    Args:
        shapes: (O, K) of the weights.
        whole: which of them cannot be divided.
        widths: the choices of BLOCK_O.
    """

    def parts_of(share: int) -> list[int]:
        return [1 if w else cdiv(k, share) for (_, k), w in zip(shapes, whole, strict=True)]

    def cost(choice: tuple[int, int]) -> float:
        width, parts = choice[0], parts_of(choice[1])
        each = [(width + MAX_ROWS) * cdiv(k, n) for (_, k), n in zip(shapes, parts, strict=True)]
        programs = [cdiv(o, width) * n for (o, _), n in zip(shapes, parts, strict=True)]
        total = sum(n * reads for n, reads in zip(programs, each, strict=True))
        # a multiprocessor alone reads twice as fast as it does when all of them read
        return max(total / PROCESSORS, max(each) / 2) + LAUNCH * (max(parts) > 1)

    width, share = min(product(widths, SHARES), key=cost)
    return width, parts_of(share)


def rows_and_tiles(
    B: int, weights: Sequence[Tensor], whole: list[bool]
) -> tuple[int, int, list[int], dict]:
    """Return BLOCK_B, what `tiles_of` returns, and the other constants of the product of B rows and
    each of the weights; `whole` says which of them cannot be divided.
    """
    wide = weights[0].dtype == torch.float32
    tile = WIDE if wide else NARROW
    if capability(weights[0].device) == 0:  # less shared memory, and no copies that wait in it
        tile = tile | dict(num_stages=2)
    shapes = [tuple(w.shape) for w in weights]
    choice = tiles_of(shapes, whole, WIDTHS[:1] if wide else WIDTHS)
    return min(MAX_ROWS, max(16, next_power_of_2(B))), *choice, tile
