"""The arguments of `generate`: their checks, and how they choose a token from logits."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, cat

from shtx.levels import integer

OVERFLOWS = ("rebuild", "error", "stream")
# Parameters of generate and of model.forward that are no keywords of a call of generate.
NO_KEYWORDS = {
    *("self", "ids", "plan", "return_loss", "labels", "loss_reduction", "model", "kwargs"),
}


class Sampling(NamedTuple):
    """The numbers that `ops.decode.sample` takes: temperature, how many are kept, the nucleus."""

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


def check_names(generate: Callable, model, kwargs: dict):
    """Raise a TypeError for a keyword that neither generate nor model.forward takes."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    forward = parameters.keys() - NO_KEYWORDS
    for name in kwargs.keys() - forward:
        own = inspect.signature(generate).parameters.keys() - NO_KEYWORDS
        nearest = get_close_matches(name, sorted(own | forward), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"generate() got an unexpected keyword argument {name!r}{hint}")


def prompt_rows(model, prompt: Tensor | list[Tensor]) -> list[Tensor]:
    """The prompts as int64 tensors (T,), or an error that says what is wrong with them."""
    shape = lambda p: str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__
    is_list = isinstance(prompt, (list, tuple))
    rows = list(prompt) if is_list or isinstance(prompt, Tensor) and prompt.ndim == 2 else [None]
    if not all(isinstance(row, Tensor) and row.ndim == 1 and len(row) for row in rows):
        raise ValueError(
            "prompt must be (batch, tokens) with at least one token, or a list of (tokens,),"
            f" got {', '.join(map(shape, rows)) if is_list else shape(prompt)}"
        )
    for row in rows:
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"prompt must have integers, got {row.dtype}")
        if row.device != model.device:
            raise ValueError(f"prompt must be on the model's {model.device}, got {row.device}")
    rows = [row.long() for row in rows]
    if rows:
        low, high = torch.stack(cat(rows).aminmax()).tolist()
        if low < 0 or high >= model.num_tokens:
            raise ValueError(
                f"prompt: ids must be in [0, num_tokens) = [0, {model.num_tokens}),"
                f" got {low if low < 0 else high}"
            )
    return rows


def check_overflow(model, overflow: str, total: int, use_cache: bool):
    """Raise a ValueError for an overflow that is unknown, or that `total` tokens, prompts included,
    or the model's levels do not allow.
    """
    if overflow not in OVERFLOWS:
        raise ValueError(
            f"overflow must be one of {', '.join(map(repr, OVERFLOWS))}, got {overflow!r}"
        )
    if overflow == "error" and total > model.seq_len:
        raise ValueError(
            'prompt and seq_len must be at most model.seq_len tokens for overflow="error",'
            f" {model.seq_len}, got {total}"
        )
    if overflow == "stream":
        full = [level.compress for level in model.levels if level.window is None]
        if full:
            raise ValueError(
                'overflow="stream" takes a window for every hierarchy, got full attention for'
                f" {', '.join(map(str, full))}"
            )
        if not use_cache:
            raise ValueError('overflow="stream" takes use_cache=True and no arguments of forward')


def seed_of(seed: int | torch.Generator | None) -> int:
    """The seed itself, or one that a generator, PyTorch's global one for None, has drawn."""
    if seed is None or isinstance(seed, torch.Generator):
        device = "cpu" if seed is None else seed.device
        return int(torch.randint(2**63 - 1, (), generator=seed, device=device))
    seed = integer("seed", seed, at_least=0)
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {seed}")
    return seed
