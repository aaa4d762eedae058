"""Private interfaces of PyTorch. No other page of this package uses one.

They were tested in PyTorch 2.11 and 2.13; those that the ops use as well are on their page,
`shtx_kernels.internals`. In a version that lacks one, the import or the call that needs it raises.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as _modules
from torch.optim import Optimizer

from shtx_kernels.internals import copy_all as copy_all
from shtx_kernels.internals import count_dispatch_modes as count_dispatch_modes
from shtx_kernels.internals import find
from shtx_kernels.internals import packs_saved_tensors as packs_saved_tensors
from shtx_kernels.internals import transforms_active as transforms_active

try:
    from torch.utils._pytree import TreeSpec as TreeSpec
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_unflatten as tree_unflatten
except ImportError as error:
    raise ImportError(
        "shtx needs torch.utils._pytree as PyTorch 2.11 to 2.13 have it, got PyTorch"
        f" {torch.__version__}"
    ) from error

# attributes in which a module keeps its parts, its hooks and its compiled call;
# and in which a parameter keeps its hooks
KEPT = MODULES, PARAMETERS, BUFFERS = "_modules", "_parameters", "_buffers"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
COMPILED = "_compiled_call_impl"
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def constant_result(function: Callable) -> Callable:
    """Have torch.compile call a function while it traces, and take the result for a constant.

    This is torch.compiler.assume_constant_result without its import of torch._dynamo, which takes
    longer than that of torch. A version that does not know the mark traces the function.
    """
    function._dynamo_marked_constant = True
    return function


def parameters_of(module: Module) -> dict:
    """The parameters that a module has itself, by name, as they are before a parametrization."""
    return module._parameters


def buffers_of(module: Module) -> dict:
    """The buffers that a module has itself, by name."""
    return module._buffers


def modules_of(module: Module) -> dict:
    """The modules that a module has itself, by name."""
    return module._modules


def put(module: Module, parameters: dict, buffers: dict) -> None:
    """Give a module other parameters and buffers than it has."""
    module._parameters, module._buffers = parameters, buffers


def is_exporting() -> bool:
    """Return whether torch.export traces. In PyTorch 2.11 the function of that name says so of
    torch.compile, too. A version without the flag is asked by that function.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def scales_its_gradients(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler leaves it to an optimizer's step to find what overflowed."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def is_compiled(module: Module) -> bool:
    """Return whether module.compile() has changed what its calls do."""
    return getattr(module, COMPILED) is not None


def changes_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place. For inference tensors PyTorch raises."""
    return tensor._version


def mark_as_initialized(module: Module) -> None:
    """Tell transformers that a module has its weights, and not to draw others."""
    module._is_hf_initialized = True


def any_global_hooks() -> bool:
    """Return whether there are hooks for all modules."""
    return any(getattr(_modules, f"_global{name}") for name in HOOKS)


def unknown_holders(storage: int) -> int:
    raise NotImplementedError(
        "shtx cannot tell who holds the memory of a gradient: PyTorch must have"
        f" torch._C._storage_Use_Count, as versions 2.11 to 2.13 do, got {torch.__version__}"
    )


# Counts the tensors and other holders of a storage, which is given by its address.
count_holders = find("_C._storage_Use_Count", unknown_holders)


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage, for `count_holders`."""
    return tensor.untyped_storage()._cdata


def lerp_each(targets: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    for target, end in zip(targets, ends, strict=True):
        target.lerp_(end, weight)


def scale_each(targets: Sequence[Tensor], factor: float | Tensor) -> None:
    for target in targets:
        target.mul_(factor)


def add_each(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for target, other in zip(targets, others, strict=True):
        target.add_(other)


def norm_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


# Each does with a list of tensors in a few launches what the function beside it does one by one.
lerp_all = find("_foreach_lerp_", lerp_each)
scale_all = find("_foreach_mul_", scale_each)
add_all = find("_foreach_add_", add_each)
norms_of = find("_foreach_norm", norm_each)

# Ends a capture's allocations in its memory pool. Otherwise: after an error of CUDA they go on.
end_allocations = find("_C._cuda_endAllocateToPool", lambda device, pool: None)


def is_managed_by_fsdp(module: Module) -> bool:
    """Return whether FullyShardedDataParallel has a module's parameters in its hands."""
    return "_is_fsdp_managed_module" in vars(module)


def communication_hooks(model: Module) -> list:
    """The hooks that sum gradients in the place of a DistributedDataParallel."""
    return model._comm_hooks
