"""Ops as PyTorch knows them: by name, with fake tensors, in compiled graphs, in counts of FLOPs.

FLOPs of a fused op are those of its reference, as torch.utils.flop_counter counts them: products
of matrices, each number of which is two operations per term. So sums over a table stand for the
convolution that they replace, and attention for what PyTorch counts of its own kernels on a GPU:
forward both products of every query with all keys (of a window, with two buckets of keys), backward
five. On a CPU PyTorch leaves its attention out. Losses make gradients in forward, and count there.
"""

import sys
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

PLAIN = {Tensor, torch.nn.Parameter, int, float, bool, torch.dtype, type(None)}
LISTS = {list, tuple}


def register(
    name: str, schema: str, implementation: Callable, fake: Callable, flops: Callable | None = None
) -> Callable:
    """Define the op shtx::name, of tensors on a CPU or on CUDA, and return what calls it.

    Args:
        name: of the op.
        schema: its arguments and results.
        implementation: takes and returns what the schema says.
        fake: takes the same, returns tensors of the same shapes and dtypes. It serves meta tensors,
            too.
        flops: takes shapes in place of tensors, returns floating point operations. None: none.
    """
    qualified = f"shtx::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("CPU", "CUDA"), implementation)

    @torch.library.register_fake(qualified)
    def _(*args):
        _tell_inductor(qualified)
        return fake(*args)

    packet = getattr(torch.ops.shtx, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    through_dispatcher = packet.default

    def call(*args):
        if not is_plain(*args) or _is_recorded():
            return through_dispatcher(*args)
        return implementation(*args)

    return call


def _is_recorded() -> bool:
    """Whether a profiler or a tracer writes down what the dispatcher is called for."""
    return torch._C._autograd._profiler_enabled() or torch._C._get_tracing_state() is not None


def is_plain(*args) -> bool:
    """Whether the dispatcher would hand these to the implementation as they are: tensors in memory,
    and no mode that acts on calls.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if not PLAIN.issuperset(map(type, args)):
        lists = [arg for arg in args if type(arg) in LISTS]
        items = chain(*lists, [arg for arg in args if type(arg) not in LISTS])
        if not PLAIN.issuperset(map(type, items)):
            return False
        args = lists[0]
    return args[0].is_cuda or args[0].is_cpu


def _tell_inductor(qualified: str) -> None:
    """Name the op among those that Inductor calls as they are.

    Of others it writes a line to its log for each call, whose text doubles with every op that
    stands on another. It takes fake tensors to compile an op, so it is told in time.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    getattr(lowering, "FALLBACK_ALLOW_LIST", set()).add(qualified)
