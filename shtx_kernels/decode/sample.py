"""An id for each row of logits.

    out = argmax_v p_v / e_v over the kept v,   p = softmax(logits / temperature), e exponential

The kept ids are those whose logits reach a threshold. Floats are ordered as the integers of their
bits are, so bisection finds the k-th best logit, or the one where probabilities reach top_p,
without sorting. A program has one row, whose first tiles stay in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from ._device import rings_of, row_of

# Logits of a tile, and tiles in registers. More of them, and what they weigh, need local memory.
BLOCK_V, HELD = 4096, 5
NONE = tl.constexpr(-(2**31))  # in place of a logit, below all others


@triton.jit
def ordered(x):
    """Integers that are ordered as the fp32 numbers x are."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number(key):
    """The fp32 number of an integer that `ordered` gives."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keys_at(logits_ptr, first, V: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of logits as ordered integers."""
    offs = first + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + offs, mask=offs < V, other=0.0).to(tl.float32)
    return tl.where(offs < V, ordered(x + 0.0), NONE)  # -0 is as good as 0


@triton.jit
def weigh(key, least, top, scale):
    """Numbers in proportion to the probabilities of logits; 0 below `least`."""
    return tl.where(key >= least, tl.exp((number(key) - top) * scale), 0.0)


@triton.jit
def between(low, high, step):
    """A key between two; `low` if there is none. Every other time it is in the middle of the
    numbers, which logits are spread over more evenly than over their bits; that of the integers
    always ends.
    """
    middle = (low & high) + ((low ^ high) >> 1)
    key = ordered(0.5 * number(low) + 0.5 * number(high))
    return tl.where((step % 2 == 0) & (key > low) & (key < high), key, middle)


@triton.jit
def reach(
    held, weights, logits_ptr, key, least, top, scale,
    V: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the logits that reach a key, and sum what each counts: with MASS its weight, else 1."""
    count, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(held)):
        count += (held[i] >= key).to(tl.int32)
        if MASS:
            mass += tl.where(held[i] >= key, weights[i], 0.0)
    for v in range(len(held) * BLOCK, V, BLOCK):
        more = keys_at(logits_ptr, v, V, BLOCK)
        count += (more >= key).to(tl.int32)
        if MASS:
            mass += tl.where(more >= key, weigh(more, least, top, scale), 0.0)
    if MASS:
        return tl.split(tl.sum(tl.join(count.to(tl.float32), mass), axis=0))
    else:
        total = tl.sum(count, axis=0).to(tl.float32)
        return total, total


@triton.jit
def threshold(
    held, weights, logits_ptr, low, high, share, scale,
    V: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key for which the logits from it on count as much as is wanted, or more: the greatest such
    key, or one from which on no other logits are.

    Logits are from `low` up to `high`. Wanted are `share` of them; with MASS, this part of what
    they weigh.
    """
    least, top, end = low, number(high), high + 1
    count, mass = reach(held, weights, logits_ptr, low, least, top, scale, V, MASS, BLOCK)
    wanted = share * mass if MASS else share.to(tl.float32)
    beyond, step = tl.zeros([], tl.float32), 0
    middle = between(low, end, step)
    while (middle != low) & (count - beyond > 1) & (mass > wanted):
        number_of, weight = reach(
            held, weights, logits_ptr, middle, least, top, scale, V, MASS, BLOCK
        )
        enough = weight >= wanted
        low, end = tl.where(enough, middle, low), tl.where(enough, end, middle)
        mass = tl.where(enough, weight, mass)
        count, beyond = tl.where(enough, number_of, count), tl.where(enough, beyond, number_of)
        step += 1
        middle = between(low, end, step)
    return low


@triton.jit
def score_of(key, offs, noise_ptr, least, top, scale, V: tl.constexpr, GREEDY: tl.constexpr):
    """Return the score of which the highest is chosen, 0 for an id that is not kept."""
    if GREEDY:
        score = (key >= least).to(tl.float32)
    else:
        e = tl.load(noise_ptr + offs, mask=offs < V, other=1.0)
        score = weigh(key, least, top, scale) / tl.maximum(e, 1e-20)
    return score


@triton.jit(do_not_specialize=["top_k"])
def _sample_kernel(
    position_ptr, logits_ptr, noise_ptr, out_ptr, stride_l, scale, top_k, top_p,
    RING: tl.constexpr, V: tl.constexpr, BEST: tl.constexpr, NUCLEUS: tl.constexpr,
    GREEDY: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The id of one sequence. The first TILES tiles are held."""
    b = tl.program_id(0).to(tl.int64)
    logits_ptr += b * stride_l
    noise_ptr = row_of(noise_ptr, b, tl.load(position_ptr + b), RING, 0)
    held, weights = (), ()
    for i in tl.static_range(TILES):
        held = held + (keys_at(logits_ptr, i * BLOCK, V, BLOCK),)
    highest = held[0]
    lowest = tl.where(held[0] == NONE, ~NONE, held[0])
    for i in tl.static_range(1, TILES):
        highest = tl.maximum(highest, held[i])
        lowest = tl.minimum(lowest, tl.where(held[i] == NONE, ~NONE, held[i]))
    for v in range(TILES * BLOCK, V, BLOCK):
        more = keys_at(logits_ptr, v, V, BLOCK)
        highest = tl.maximum(highest, more)
        lowest = tl.minimum(lowest, tl.where(more == NONE, ~NONE, more))
    high, least = tl.max(highest, axis=0), tl.min(lowest, axis=0)
    top = number(high)
    if BEST:
        least = threshold(held, weights, logits_ptr, least, high, top_k, scale, V, False, BLOCK)
    if NUCLEUS:
        for i in tl.static_range(TILES):
            weights = weights + (weigh(held[i], least, top, scale),)
        least = threshold(held, weights, logits_ptr, least, high, top_p, scale, V, True, BLOCK)
    if GREEDY:
        least = high
    best, ids = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    offs = tl.arange(0, BLOCK)
    for i in tl.static_range(TILES):
        at = i * BLOCK + offs
        score = score_of(held[i], at, noise_ptr, least, top, scale, V, GREEDY)
        ids, best = tl.where(score > best, at, ids), tl.maximum(best, score)
    for v in range(TILES * BLOCK, V, BLOCK):
        more = keys_at(logits_ptr, v, V, BLOCK)
        score = score_of(more, v + offs, noise_ptr, least, top, scale, V, GREEDY)
        ids, best = tl.where(score > best, v + offs, ids), tl.maximum(best, score)
    ids = tl.where(best == tl.max(best, axis=0), ids, V - 1)
    tl.store(out_ptr + b, tl.min(ids, axis=0))


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
    greedy, BLOCK = temperature == 0, min(BLOCK_V, next_power_of_2(V))
    launch(
        _sample_kernel, (B,),
        position, logits, noise, out, logits.stride(0), 1 / max(temperature, 1e-10), top_k,
        float(top_p), RING=rings_of([noise]), V=V, BEST=top_k < V and not greedy,
        NUCLEUS=top_p < 1 and not greedy, GREEDY=greedy,
        TILES=min(HELD, cdiv(V, BLOCK)), BLOCK=BLOCK, num_warps=4 if V <= 1024 else 16,
    )  # fmt: skip
