"""An id for each row of logits.

    out = argmax_v p_v / e_v over the kept v,   p = softmax(logits / temperature), e exponential

The kept ids are those whose logits reach a threshold. Floats are ordered as the integers of their
bits are, so bisection finds the k-th best logit, or the one where probabilities reach top_p,
without sorting. A program has one row, whose first BLOCK logits stay in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, next_power_of_2
from ._device import rings_of, row_of

BLOCK_V = 32768  # 8192, of which 20000 are three, takes 90 us on an H200


@triton.jit
def ordered(x):
    """Integers that are ordered as the fp32 numbers x are."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weigh(logits_ptr, offs, V: tl.constexpr, top, temperature, least, MASS: tl.constexpr):
    """Logits as ordered integers, and how much each counts: with MASS in proportion to its
    probability, else one; nothing below `least`.
    """
    x = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
    key = ordered(x)
    weight = tl.exp((x - top) / temperature) if MASS else tl.full(x.shape, 1.0, tl.float32)
    return key, tl.where((offs < V) & (key >= least), weight, 0.0)


@triton.jit
def threshold(
    logits_ptr, top, bottom, temperature, least, wanted,
    V: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key for which the logits from it on count as `wanted` or more: the greatest such key, or
    one for which they count exactly as much.
    """
    low, high = tl.maximum(ordered(bottom), least).to(tl.int64), ordered(top).to(tl.int64) + 1
    key, weight = weigh(logits_ptr, tl.arange(0, BLOCK), V, top, temperature, least, MASS)
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.sum(tl.where(key >= middle, weight, 0.0), axis=0)
        for v in range(BLOCK, V, BLOCK):
            offs = v + tl.arange(0, BLOCK)
            more, counts = weigh(logits_ptr, offs, V, top, temperature, least, MASS)
            reached += tl.sum(tl.where(more >= middle, counts, 0.0), axis=0)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached > wanted, high, middle)  # the end, where they are equal
    return low.to(tl.int32)


@triton.jit(do_not_specialize=["top_k"])
def _sample_kernel(
    position_ptr, logits_ptr, noise_ptr, out_ptr, stride_l, temperature, top_k, top_p,
    RING: tl.constexpr, V: tl.constexpr, BEST: tl.constexpr, NUCLEUS: tl.constexpr,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    logits_ptr += b * stride_l
    noise_ptr = row_of(noise_ptr, b, tl.load(position_ptr + b), RING, 0)
    top, bottom = tl.full([], float("-inf"), tl.float32), tl.full([], float("inf"), tl.float32)
    for v in range(0, V, BLOCK):
        offs = v + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x, axis=0))
        bottom = tl.minimum(bottom, tl.min(tl.where(offs < V, x, float("inf")), axis=0))
    least = ordered(bottom)
    if BEST:
        least = threshold(logits_ptr, top, bottom, temperature, least, top_k, V, False, BLOCK)
    if NUCLEUS:
        mass = tl.zeros([], tl.float32)
        for v in range(0, V, BLOCK):
            offs = v + tl.arange(0, BLOCK)
            _, weight = weigh(logits_ptr, offs, V, top, temperature, least, True)
            mass += tl.sum(weight, axis=0)
        wanted = top_p * mass
        least = threshold(logits_ptr, top, bottom, temperature, least, wanted, V, True, BLOCK)
    best, choice = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int64)
    for v in range(0, V, BLOCK):
        offs = v + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
        score = x
        if not GREEDY:
            e = tl.load(noise_ptr + offs, mask=offs < V, other=1.0)
            score = (x - top) / temperature - tl.log(tl.maximum(e, 1e-20))
        score = tl.where((offs < V) & (ordered(x) >= least), score, float("-inf"))
        highest, where = tl.max(score, axis=0, return_indices=True)
        choice = tl.where(highest > best, v + where, choice)
        best = tl.maximum(best, highest)
    tl.store(out_ptr + b, choice)


def sample(
    position: Tensor,
    logits: Tensor,
    noise: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    out: Tensor,
) -> None:
    """out = argmax of softmax(logits / temperature) / noise: an id as likely as the softmax says.

    Ids are drawn from the top_k best, and of these from the fewest whose probabilities add up to
    top_p; ids as likely as the last of them count as well. At temperature 0, out is the best id.

    Args:
        position: (B,) int64.
        logits: (B, V).
        noise: ring (B, S, V) fp32, exponentially distributed; not read at temperature 0.
        temperature: the temperature of the softmax.
        top_k: how many ids to draw from, in [1, V].
        top_p: how likely the drawn ids are together, in (0, 1].
        out: (B,) int64.

    Source: top-k sampling; nucleus sampling (Holtzman et al.).
    """
    B, V = logits.shape
    if not B:
        return
    greedy = temperature == 0
    launch(
        _sample_kernel, (B,),
        position, logits, noise, out, logits.stride(0), max(float(temperature), 1e-10), top_k,
        float(top_p), RING=rings_of([noise]), V=V, BEST=top_k < V and not greedy,
        NUCLEUS=top_p < 1 and not greedy, GREEDY=greedy,
        BLOCK=min(BLOCK_V, next_power_of_2(V)), num_warps=4 if V <= 1024 else 16,
    )  # fmt: skip
