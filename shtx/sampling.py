"""How a token is chosen from logits: temperature, the k best, the nucleus."""

from typing import NamedTuple

from shtx.levels import integer


class Sampling(NamedTuple):
    """What `ops.decode.sample` takes besides tensors."""

    temperature: float
    top_k: int
    top_p: float


def real(name: str, value) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def make_sampling(
    num_tokens: int, temperature: float, filter_thres: float, top_k: int | None, top_p: float | None
) -> Sampling:
    """Make a Sampling of the arguments of `generate`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """
    if not real("temperature", temperature) >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 <= real("filter_thres", filter_thres) < 1:
        raise ValueError(f"filter_thres must be in [0, 1), got {filter_thres}")
    if top_p is not None and not 0 < real("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k is None:
        top_k = max(1, int((1 - filter_thres) * num_tokens))
    top_k = min(integer("top_k", top_k, at_least=1), num_tokens)
    return Sampling(temperature, top_k, 1.0 if top_p is None else top_p)
