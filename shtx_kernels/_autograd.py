"""Fused ops as functions that PyTorch differentiates as a whole, and once only."""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from .internals import apply_untransformed, transforms_active
from .products import cast


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args), which refuses to be transformed by torch.func.

    Raises:
        RuntimeError: a transform of torch.func is under way.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if transforms_active():
        raise RuntimeError(
            "fused ops have no transforms of torch.func (vmap, grad, jvp, ...): use"
            ' impl="reference" where they are needed'
        )
    return apply_untransformed(function, *args)


def first_order(op: str) -> Callable[[Callable], Callable]:
    """Make the backward of `op` refuse to run where a graph of it is asked for.

    PyTorch's own decorator for this refuses only if an incoming gradient requires grad. That of
    a loss does not, so a penalty on gradients would be dropped in silence.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def checked(ctx, *gradients):
            # compiled graphs have a check of their own when they run
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"the fused {op} has no gradients of gradients (create_graph=True): use"
                    ' impl="reference" where they are needed'
                )
            return backward(ctx, *gradients)

        return checked

    return decorate


def as_needed(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that are needed, each in the dtype of its input, and None for the others."""
    triples = zip(gradients, dtypes, needs, strict=True)
    return [cast(g, dtype) if needed else None for g, dtype, needed in triples]
