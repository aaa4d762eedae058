"""Launches for a GPU that need not be here: what `Kernel` finds, against what Triton does.

Kernels are compiled as Triton does it, and loaded by a driver that does nothing; launchers are
Triton's own, but for what they call in C. Prints how many launches there were, and how many of them
went Triton's way.
"""

import random
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch.utils._pytree import tree_leaves, tree_map
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from shtx_kernels.launch import Kernel

LAUNCHED = []


class NoDevice:
    """A driver that gives Triton what it asks for, without a GPU."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 77)
    utils = SimpleNamespace(
        load_binary=lambda name, binary, *_: (0, hash(binary), 32, 0, 1024),
        get_device_properties=lambda device: dict(max_shared_mem=232448),
        unload_module=lambda module: None,
        fill_tma_descriptor=lambda *args: args,  # Triton 3.6
        fill_tma_descriptor_tiled=lambda *args: args,
        build_signature_metadata=tuple,
        launch=lambda *args: LAUNCHED.append(args),
    )
    launcher_cls = nvidia.CudaLauncher


@triton.jit(do_not_specialize=["free"])
def _copy_kernel(
    x_desc, x_ptr, y_ptr, size, free, factor, SHAPE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size + free)
    tl.store(y_ptr + offs, x * factor, mask=offs < size + free)


# Triton 3.6 compiles a launcher
nvidia.library_dirs = list
nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=NoDevice.utils.launch)
nvidia.PyKernelArg = SimpleNamespace  # Triton 3.9 describes its arguments


def draw(choice: random.Random):
    """A descriptor, two tensors and numbers, of many kinds."""
    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.uint8
    tensors = [
        torch.empty(256, dtype=choice.choice(dtypes))[choice.choice((0, 0, 1, 16)) :]
        for _ in range(2)
    ]
    size = choice.choice((1, 2, 16, 48, 17, 0, -1, -16, 2**31 - 1, 2**31, 2**40))
    free = choice.choice((1, 3, 16, 2**31 - 1, 2**31))
    block = choice.choice(([16, 32], [32, 32]))
    base = torch.empty(64, 64, dtype=choice.choice((torch.float16, torch.bfloat16)))
    descriptor = TensorDescriptor.from_tensor(base, block)
    return descriptor, tensors, (size, free, choice.choice((0.5, 1.0)))


def main():
    driver.set_active(NoDevice())
    knobs.runtime.launch_enter_hook = knobs.runtime.launch_exit_hook = None
    choice = random.Random(0)
    constants = dict(SHAPE=(1, 2), BLOCK=64, num_warps=2)
    kernel = Kernel(_copy_kernel, **constants)
    assert kernel.direct
    run, ways = JITFunction.run, []
    JITFunction.run = lambda *args, **options: ways.append(args) or run(*args, **options)
    kinds = [draw(choice) for _ in range(60)]
    launches = 300
    for _ in range(launches):
        descriptor, tensors, numbers = choice.choice(kinds)
        LAUNCHED.clear()
        before = len(ways)
        kernel((5,), tensors, *numbers, descriptors=(descriptor,))
        tritons = len(ways) > before
        (ours,) = LAUNCHED
        LAUNCHED.clear()
        run(_copy_kernel, descriptor, *tensors, *numbers, grid=(5,), warmup=False, **constants)
        (theirs,) = LAUNCHED
        assert ours[:4] == (5, 1, 1, 77)
        # a tensor and its pointer are the same to what is called in C
        pointer = lambda t: t.data_ptr() if isinstance(t, torch.Tensor) else t
        assert tree_map(pointer, ours) == tree_map(pointer, theirs)
        if not tritons:
            assert not any(isinstance(t, torch.Tensor) for t in tree_leaves(ours))
    print(launches, len(ways))


if __name__ == "__main__":
    main()
