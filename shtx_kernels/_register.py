"""Ops as PyTorch knows them: by name, with fake tensors, in compiled graphs, in counts of FLOPs.

A fused op counts the FLOPs of its reference, as torch.utils.flop_counter does: two operations for
each term of a number of a matrix product. So sums over a table count as the convolution that they
replace. Attention counts what PyTorch counts for its own kernels on a GPU: two products of every
query with all keys in forward (with two buckets of keys for a window), and five in backward. On a
CPU, PyTorch does not count its attention. Losses make their gradients in forward, and count there.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .internals import count_dispatch_modes, is_recorded, tell_inductor

PLAIN = {Tensor, torch.nn.Parameter, int, float, bool, torch.dtype, type(None)}
LISTS = {list, tuple}


def register(
    name: str, schema: str, implementation: Callable, fake: Callable, flops: Callable | None = None
) -> Callable:
    """Define the op shtx::name, of tensors on a CPU or on CUDA, and return what calls it.

    Args:
        name: the op's name.
        schema: its arguments and results.
        implementation: takes and returns what the schema says.
        fake: takes the same, and returns uninitialised tensors of the same shapes and dtypes. It
            serves meta tensors, too.
        flops: takes shapes in place of tensors, and returns the number of floating point
            operations; None if there are none.
    """
    qualified = f"shtx::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("CPU", "CUDA"), implementation)

    @torch.library.register_fake(qualified)
    def _(*args):
        # compiling an op begins with fake tensors, so Inductor is told in time
        tell_inductor(qualified)
        return fake(*args)

    packet = getattr(torch.ops.shtx, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    through_dispatcher = packet.default

    def call(*args):
        if not is_plain(*args) or is_recorded():
            return through_dispatcher(*args)
        return implementation(*args)

    return call


def is_plain(*args) -> bool:
    """Return whether the dispatcher would pass these on to the implementation as they are: all
    tensors are in memory, and no mode acts on calls.
    """
    if torch.compiler.is_compiling() or count_dispatch_modes():
        return False
    if not PLAIN.issuperset(map(type, args)):
        lists = [arg for arg in args if type(arg) in LISTS]
        items = chain(*lists, [arg for arg in args if type(arg) not in LISTS])
        if not PLAIN.issuperset(map(type, items)):
            return False
        args = lists[0]
    return args[0].is_cuda or args[0].is_cpu
