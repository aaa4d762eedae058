"""The levels of a model, and the checks of what describes them."""

import operator
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """One copy of the sequence: a token for every `stride` input tokens, made of `compress`."""

    compress: int
    stride: int
    dim: int
    dim_head: int
    heads: int
    window: int | None  # None: full attention; 0: no attention
    ff_mult: float
    interleaved: bool = False  # whether rotary of full attention pairs neighbouring channels

    @property
    def dilation(self) -> int:
        """Tokens of the level this far apart are made of different input tokens."""
        return self.compress // self.stride


def integer(name: str, value, at_least: int | None = None) -> int:
    """`value` as an int, or a TypeError or ValueError that names it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return number


def number(name: str, value) -> float:
    """`value`, a number of at least 0, or a TypeError or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return value


def power_of_two(name: str, value) -> int:
    value = integer(name, value, at_least=1)
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")
    return value


def per_level(name: str, value, count: int) -> tuple:
    """One value for all levels, or a tuple or list with one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) != count:
        raise ValueError(
            f"{name} must be one value or {count} (one for each of hierarchies), got {len(values)}"
        )
    return values


def effective_window(compress: int, window, seq_len: int) -> int | None:
    if window is None:
        return None
    window = integer("window_sizes", window, at_least=0)
    if window <= seq_len // compress:
        return window
    warnings.warn(
        f"window_sizes: {window} is more than the {seq_len // compress} tokens of hierarchy"
        f" {compress} (seq_len {seq_len}); it gets full attention",
        stacklevel=7,
    )
    return None


def make_level(
    compress: int,
    seq_len: int,
    interleaved: bool,
    *,
    hierarchical_stride,
    dim,
    dim_head,
    heads,
    window_sizes,
    ff_mult,
) -> Level:
    """The level of one value of each argument."""
    stride = power_of_two("hierarchical_stride", hierarchical_stride)
    if stride > compress:
        raise ValueError(
            "hierarchical_stride must be at most the hierarchy it belongs to,"
            f" {compress}, got {stride}"
        )
    level = Level(
        compress=compress,
        stride=stride,
        dim=integer("dim", dim, at_least=1),
        dim_head=integer("dim_head", dim_head, at_least=1),
        heads=integer("heads", heads, at_least=1),
        window=effective_window(compress, window_sizes, seq_len),
        ff_mult=number("ff_mult", ff_mult),
        interleaved=interleaved,
    )
    if level.window != 0 and level.dim_head % 2:
        raise ValueError(f"dim_head must be even, as rotary pairs its channels, got {dim_head}")
    if int(level.dim * level.ff_mult) < 1:
        raise ValueError(f"ff_mult must leave dim {dim} at least one channel, got {ff_mult}")
    return level


def make_levels(
    *, hierarchies, seq_len: int, interleaved: bool = False, **columns
) -> tuple[Level, ...]:
    """The levels that the arguments of simple-hierarchical-transformer describe.

    Args:
        columns: the other arguments of `make_level`, each of them one value, or one for each of
            `hierarchies`.
        interleaved: whether rotary of full attention pairs neighbouring channels (0.4.0) or those
            half a head apart (0.2.0).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """
    compressions = hierarchies if isinstance(hierarchies, (tuple, list)) else (hierarchies,)
    compressions = [power_of_two("hierarchies", c) for c in compressions]
    if not compressions or len(set(compressions)) < len(compressions):
        raise ValueError(
            f"hierarchies must be one or more different powers of two, got {hierarchies}"
        )
    values = [per_level(name, value, len(compressions)) for name, value in columns.items()]
    rows = zip(compressions, *values, strict=True)
    return tuple(
        make_level(compress, seq_len, interleaved, **dict(zip(columns, row, strict=True)))
        for compress, *row in rows
    )
