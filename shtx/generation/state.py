"""The state of a decoder: rings of the past, which a prompt fills, and copies of weights."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, arange
from torch.nn import Module

from shtx.internals import copy_all
from shtx.levels import Level


class Recent:
    """Finds the rows of a prompt that rings keep, sequence by sequence."""

    def __init__(self, lengths: Tensor):
        self.last, self.sequence = lengths - 1, arange(len(lengths), device=lengths.device)
        self._kept = {}  # by slots of a ring and stride: which level tokens, and which are none

    def last_row(self, rows: Tensor, stride: int) -> Tensor:
        """(B, ...) of a level's (B, M, ...)."""
        return rows[self.sequence, self.last // stride]

    def fill(self, ring: Tensor, rows: Tensor, stride: int = 1) -> None:
        """A ring, from a level's rows (B, M, ...)."""
        key = slots, _ = ring.shape[1], stride
        if key not in self._kept:
            last = self.last[:, None] // stride
            token = last - (last - arange(slots, device=ring.device)) % slots
            self._kept[key] = token.clamp(min=0), token < 0
        token, unknown = self._kept[key]
        kept = rows[self.sequence[:, None], token]
        ring.copy_(kept.masked_fill(unknown.view(*unknown.shape, *[1] * (ring.ndim - 2)), 0))


Fill = Callable[[Tensor, Recent], None]
Weights = Iterator[tuple[str, Tensor]]


class State:
    """Tensors that stay where they are, whichever model of the same sizes they serve.

    Args:
        model, batch, length, dtype: as of `Decoder`.

    Attributes:
        ids, logits, position: as of `Decoder`.
        history: ring of the ids that compressors read.
        fills: take what a pass over a prompt leaves for tokens to come, (B, M, ...), and `Recent`;
            by its name, (layer, level, what).
    """

    def __init__(self, model: Module, batch: int, length: int, dtype: torch.dtype | None):
        self.levels, self.batch, self.length = model.levels, batch, length
        self.device, self.dtype = model.device, dtype or model.token_emb.weight.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self._copies, self._rings = [], []
        self.fills: dict[tuple[int, int, str], Fill] = {}
        integers = partial(self.ring, dtype=torch.long)
        self.ids, self.position = integers(1)[:, 0], integers(1)[:, 0]
        self.history = integers(max(level.compress for level in self.levels))
        self.logits = self.ring(1, model.num_tokens, dtype=self.wide)[:, 0]

    @property
    def nbytes(self) -> int:
        """The size of all rings."""
        return sum(ring.nbytes for ring in self._rings)

    def weights(self, model: Module, read: Callable[[Module], Weights]) -> dict[str, Tensor]:
        """Copy the weights that `read` yields of a model, as `refresh` will again; by their names.

        One at a time is read: it may have been gathered, or made, for this alone.
        """
        options = dict(copy=True, memory_format=torch.contiguous_format)
        copies = {name: weight.to(self.dtype, **options) for name, weight in read(model)}
        self._copies.append((copies, read))
        return copies

    def refresh(self, model: Module) -> None:
        """Take the weights that the model has now."""
        for copies, read in self._copies:
            weights = dict(read(model))  # those of one module, as a sharded model may not be whole
            copy_all([copies[name] for name in weights], list(weights.values()))

    def ring(self, slots: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Make a ring (B, slots, ...) of zeros."""
        shape, dtype = (self.batch, slots, *shape), dtype or self.dtype
        self._rings.append(torch.zeros(shape, dtype=dtype, device=self.device))
        return self._rings[-1]

    def stream(self, level: Level) -> Tensor:
        """The residual stream of a level: a shift reads `dilation` back from the row written."""
        return self.ring(2 * level.dilation, level.dim)
