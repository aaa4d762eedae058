"""What PyTorch differentiates as a whole: fused ops, whose gradients have none."""

from collections.abc import Callable
from functools import wraps

import torch


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args), without what it does for transforms of torch.func: it refuses them."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused ops have no transforms of torch.func (vmap, grad, jvp, ...): use"
            ' impl="reference" where they are needed'
        )
    return super(torch.autograd.Function, function).apply(*args)


def first_order(op: str) -> Callable[[Callable], Callable]:
    """Makes the backward of `op` refuse to run where a graph of it is asked for.

    PyTorch's own decorator for this refuses only if an incoming gradient requires grad. That of
    a loss does not, so that a penalty of gradients would lose its share in silence.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def checked(ctx, *gradients):
            # compiled graphs have a check of their own, when they run
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"the fused {op} has no gradients of gradients (create_graph=True): use"
                    ' impl="reference" where they are needed'
                )
            return backward(ctx, *gradients)

        return checked

    return decorate
