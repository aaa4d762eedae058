"""Choosing a token from logits: temperature, the k best, the nucleus.

token = argmax_v softmax(l / temperature)_v / e_v over the ids v that are kept, with e exponential:
as likely as the softmax says. The noise e is handed in, so that `sample` is a pure function that
never waits for the device, and a CUDA graph can hold it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from shtx.levels import integer


class Sampling(NamedTuple):
    """What `sample` takes besides tensors."""

    temperature: float
    top_k: int
    top_p: float


def make_sampling(
    num_tokens: int, temperature: float, filter_thres: float, top_k: int | None, top_p: float | None
) -> Sampling:
    """Of the arguments of `generate`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 <= filter_thres < 1:
        raise ValueError(f"filter_thres must be in [0, 1), got {filter_thres}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k is None:
        top_k = max(1, int((1 - filter_thres) * num_tokens))
    top_k = min(integer("top_k", top_k, at_least=1), num_tokens)
    return Sampling(temperature, top_k, 1.0 if top_p is None else top_p)


def sample(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One id for each row of logits.

    Args:
        logits: (B, V).
        noise: (B, V) exponential, in fp32; not read at temperature 0.
        temperature: of the softmax; 0: the most likely id.
        top_k: how many ids are kept, the most likely ones; in [1, V].
        top_p: of those, the fewest whose probabilities add up to this are kept; in (0, 1].

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float()
    filtered = top_k < logits.shape[-1] or top_p < 1
    if filtered:
        scores, ids = scores.topk(top_k)  # in falling order
        noise = noise.gather(-1, ids)
    scores = scores / max(temperature, 1e-10)
    if top_p < 1:
        before = pad(scores.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        scores = scores.masked_fill(before >= top_p, -torch.inf)
    choice = (scores - noise.clamp(min=1e-20).log()).argmax(-1, keepdim=True)
    return (ids.gather(-1, choice) if filtered else choice).squeeze(-1)
