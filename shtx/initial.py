"""The initial values of a model that was made without memory, or that processes share.

They are drawn on the CPU, a module at a time and in the order in which the model was made, so that
a seed gives the same numbers everywhere, and no host needs room for more than one module.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from local_attention.rotary import SinusoidalEmbeddings
from torch import Tensor
from torch.nn import Module, Parameter

from shtx.internals import buffers_of, parameters_of, put
from shtx.plan import is_sharded


@torch.no_grad()
def draw(module: Module, write: Callable[[Tensor, Tensor], Any] | None = None) -> None:
    """Write initial values into the tensors that a module has itself.

    Args:
        write: is called with each tensor and its values; None: `fill`.

    Raises:
        TypeError: it has some, and nothing tells their initial values.
    """
    write = write or fill
    places = {**parameters_of(module), **buffers_of(module)}
    places = {name: tensor for name, tensor in places.items() if tensor is not None}
    if not places:
        return
    made = _anew(module)
    for name, place in places.items():
        write(place, getattr(made, name).detach())


@torch.no_grad()
def fill(place: Tensor, values: Tensor) -> None:
    """Copy values, which every process has as a whole, to a tensor, of which it may have a part."""
    if is_sharded(place):
        from torch.distributed.tensor import distribute_tensor  # not everywhere there is one

        mesh = place.device_mesh
        values = distribute_tensor(values, mesh, place.placements, src_data_rank=None)
    place.copy_(values)


def _anew(module: Module) -> Module:
    """A module of the same sizes on the CPU, with initial values."""
    if isinstance(module, SinusoidalEmbeddings):
        dim = 2 * len(module.inv_freq)
        with torch.device("cpu"):
            return SinusoidalEmbeddings(dim, module.scale_base, module.use_xpos)
    if not hasattr(module, "reset_parameters"):
        raise TypeError(
            "model must have modules with reset_parameters, which gives them their initial"
            f" values, got a {type(module).__name__} without"
        )
    made = copy(module)
    empty = lambda t: None if t is None else torch.empty(t.shape, device="cpu")
    parameters = {
        name: None if p is None else Parameter(empty(p))
        for name, p in parameters_of(module).items()
    }
    put(made, parameters, {name: empty(t) for name, t in buffers_of(module).items()})
    made.reset_parameters()
    return made
