"""Launches of kernels, in a third of the time that Triton takes for one.

Triton binds the arguments of every launch by name, asks each what a kernel may assume of it, and
looks the kernel up by a text of all that. Here a `Kernel` has its constants from the start, and
finds what was compiled by what is left: the device, dtypes and alignments of tensors, and integers.
Everything rare goes Triton's way: the first launch of a kind, hooks of profilers, compiling ahead,
the interpreter, AMD's GPUs, and versions of Triton other than those tested.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .internals import is_watched, launcher_of, launches_are_known, parameters_of

LEAST, MOST = -(2**31), 2**31 - 1  # the integers that kernels take in 32 bits
KINDS = 512  # how many kinds of launches of a kernel are remembered

_compile_only = ContextVar("compile_only", default=False)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which kernels add up numbers of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@contextmanager
def compile_only() -> Iterator[None]:
    """Return a context in which launches of this thread compile kernels and do nothing else."""
    before = _compile_only.set(True)
    try:
        yield
    finally:
        _compile_only.reset(before)


def launch(kernel, grid: tuple, *args, **constants):
    """Triton's own launch, on the device of the first argument; returns what was compiled."""
    like = getattr(args[0], "base", args[0])  # the first argument may be a descriptor of a tensor
    with torch.cuda.device_of(like):
        if _compile_only.get() and not knobs.runtime.interpret:
            return kernel.warmup(*args, grid=grid, **constants)
        return kernel[grid](*args, **constants)


class Kernel:
    """A kernel with its constants. Its parameters are tensors, numbers and constants, in this
    order. A number must always be an int, or always a float.
    """

    def __init__(self, kernel, dtype: torch.dtype | None = None, **constants):
        """
        Args:
            kernel: what triton.jit has made.
            dtype: the dtype of what a kernel with a constant ACC adds up.
            constants: all other constants, and options of Triton's compiler.
        """
        if dtype is not None:
            constants["ACC"] = accumulator(dtype)
        self.kernel, self.constants = kernel, constants
        self.found = {}  # what was compiled, by the kind of launch
        self.direct = launches_are_known() and not knobs.runtime.interpret
        if self.direct:
            self.special, names = parameters_of(kernel)
            self.last = [constants[name] for name in names]

    def __call__(
        self, grid: tuple, tensors: Sequence[Tensor], *numbers, descriptors: Sequence = ()
    ) -> None:
        """Launch it on the device of the tensors, in its current stream.

        Args:
            grid: the programs along one to three axes.
            tensors: the tensors, all on one device; there may be none beside descriptors.
            numbers: the numbers, which come after the tensors.
            descriptors: descriptors of tensors, which come before the tensors.
        """
        if not self.direct or _compile_only.get() or is_watched(self.kernel):
            self._launch(grid, tensors, numbers, descriptors)
            return
        like = tensors[0] if tensors else descriptors[0].base
        device, active = like.get_device(), driver.active
        current = active.get_current_device()
        if device != current and device >= 0:
            with torch.cuda.device(device):
                return self(grid, tensors, *numbers, descriptors=descriptors)

        pointers = [*map(Tensor.data_ptr, tensors)]
        kind = self._kind(current, tensors, pointers, numbers, descriptors)
        found = self.found.get(kind)
        if found is None:
            compiled = self._launch(grid, tensors, numbers, descriptors)
            if len(self.found) >= KINDS:
                self.found.clear()
            if compiled is not None:  # a hook may have kept Triton from compiling it
                self.found[kind] = launcher_of(compiled)
            return
        launch, options, packed = found
        arguments = *descriptors, *pointers, *numbers, *self.last
        launch(
            *(*grid, 1, 1)[:3], active.get_current_stream(current), *options,
            *((arguments,) if packed else arguments),
        )  # fmt: skip

    def _kind(self, device: int, tensors, pointers, numbers, descriptors) -> tuple:
        """Everything that Triton compiles for, except the constants."""
        aligned = fits = True
        for pointer in pointers:
            if pointer % 16:
                aligned = tuple([pointer % 16 == 0 for pointer in pointers])
                break
        for number in numbers:
            if not LEAST <= number <= MOST:
                fits = tuple([LEAST <= number <= MOST for number in numbers])
                break
        special = compress(numbers, self.special[len(self.special) - len(numbers) :])
        kind = device, aligned, fits, *[t.dtype for t in tensors], *special
        if descriptors:
            return *kind, *[(d.base.dtype, *d.block_shape) for d in descriptors]
        return kind

    def _launch(self, grid, tensors, numbers, descriptors):
        return launch(self.kernel, grid, *descriptors, *tensors, *numbers, **self.constants)
