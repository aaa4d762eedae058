"""Launches of kernels, in a third of the time that Triton takes for one.

Triton binds the arguments of every launch by name, asks each what a kernel may assume of it, and
looks the kernel up by a text of all that. Here a `Kernel` has its constants from the start, and
finds what was compiled by what is left: the device, dtypes and alignments of tensors, and integers.
What is rare goes Triton's way: the first launch of a kind, hooks of profilers, compiling ahead, the
interpreter, GPUs of AMD, and versions of Triton other than those tested.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime._async_compile import active_mode

# versions whose JITFunction.run is known to end as `Kernel` does
TESTED = triton.__version__.startswith(("3.6.", "3.9.")) and torch.version.hip is None
LEAST, MOST = -(2**31), 2**31 - 1  # integers that kernels take in 32 bits
KINDS = 512  # of launches of a kernel, that are remembered

_compile_only = ContextVar("compile_only", default=False)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """In which kernels add up numbers of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@contextmanager
def compile_only() -> Iterator[None]:
    """Within, launches of this thread compile their kernels and do nothing else."""
    before = _compile_only.set(True)
    try:
        yield
    finally:
        _compile_only.reset(before)


def launch(kernel, grid: tuple, *args, **constants):
    """Triton's own launch, on the device of the first argument; returns what was compiled."""
    like = getattr(args[0], "base", args[0])  # of a descriptor
    with torch.cuda.device_of(like):
        if knobs.runtime.interpret:
            return kernel[grid](*args, **constants)
        return kernel.run(*args, grid=grid, warmup=_compile_only.get(), **constants)


def _is_watched() -> bool:
    """Whether others are to see launches, or they are to compile alone."""
    if _compile_only.get() or active_mode.get() is not None:
        return True
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a function, or a chain of some
            return True
    return False


def _launcher_of(compiled) -> tuple:
    """What launches a compiled kernel, what it takes between the stream and the kernel's arguments,
    and whether it takes those as one tuple: what Triton's launcher calls once it has allocated what
    a kernel asks for, or that launcher itself.
    """
    run, metadata, hooks = compiled.run, compiled.packed_metadata, (None, None, None)
    allocates = lambda: run.global_scratch_size or run.profile_scratch_size
    if type(run).__name__ != "CudaLauncher" or allocates() or getattr(run, "gsan_enabled", False):
        return run, (compiled.function, metadata, *hooks), False
    options = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    scratch = None, None
    if hasattr(run, "kernel_signature"):  # Triton 3.9
        types = run.arg_annotations, run.kernel_signature
        return run.launch, (*options, metadata, *hooks, *scratch, *types), True
    return run.launch, (*options, *scratch, metadata, *hooks), False


class Kernel:
    """A kernel with its constants, whose parameters are tensors, numbers and constants, in this
    order. A number must be an int always, or a float.
    """

    def __init__(self, kernel, **constants):
        self.kernel, self.constants = kernel, constants
        self.found = {}  # what was compiled, by the kind of launch
        self.direct = TESTED and not knobs.runtime.interpret
        if self.direct:
            self.special = [not p.do_not_specialize for p in kernel.params if not p.is_constexpr]
            self.last = [constants[p.name] for p in kernel.params if p.is_constexpr]

    def __call__(
        self, grid: tuple, tensors: Sequence[Tensor], *numbers, descriptors: Sequence = ()
    ) -> None:
        """Launch it on the device of the tensors, in its current stream.

        Args:
            grid: programs along one to three axes.
            tensors: all on one device.
            numbers: that follow.
            descriptors: of tensors, which stand before the tensors.
        """
        if not self.direct or _is_watched() or self.kernel.pre_run_hooks:
            self._launch(grid, tensors, numbers, descriptors)
            return
        device, active = tensors[0].get_device(), driver.active
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
                self.found[kind] = _launcher_of(compiled)
            return
        launch, options, packed = found
        arguments = *descriptors, *pointers, *numbers, *self.last
        launch(
            *(*grid, 1, 1)[:3], active.get_current_stream(current), *options,
            *((arguments,) if packed else arguments),
        )  # fmt: skip

    def _kind(self, device: int, tensors, pointers, numbers, descriptors) -> tuple:
        """All that Triton compiles for, beyond the constants."""
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
