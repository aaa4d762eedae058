"""A model that no device has room for: every process keeps its part of each weight, and of what the
optimizer knows of it.

FSDP2 gathers a block before it runs, forward and backward, and gives it up after. Blocks and merges
are sharded one by one; embedding, compressors, norms and heads together, as they are read from the
beginning of a forward to its end.
"""

from itertools import zip_longest

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Module

from shtx.levels import integer
from shtx.model import Trunk
from shtx.plan import is_sharded


def fully_shard_model(
    model: Trunk,
    mesh: DeviceMesh | None = None,
    *,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    prefetch: int = 1,
) -> Trunk:
    """Shard a model by block over processes, for TrainStep or another loop.

    A model that was made on meta gets memory for the parts of this process alone, and the initial
    weights that the CPU's generator gives on one process: every process has to have the same seed,
    and draws all of them, which takes ten seconds or more for a billion.

        torch.manual_seed(0)
        with torch.device("meta"):
            model = HierarchicalTransformer(...)
        model.checkpointing = True  # by block, if memory is short
        model = fully_shard_model(model)
        step = TrainStep(model, torch.optim.AdamW(model.parameters(), fused=True))

    Args:
        model: a HierarchicalTransformer, in memory with the same weights in all processes, or on
            meta as a whole.
        mesh: the processes, as fully_shard takes them; None: all of torch.distributed, on GPUs if
            their process group has NCCL.
        param_dtype: what weights are cast to before they are gathered: torch.bfloat16 halves the
            bytes. Gradients come in it, too, and are summed in fp32. None: as they are.
        reshard_after_forward: whether a block is given up after its forward, and gathered again for
            its backward. False takes the memory of all blocks.
        prefetch: how many blocks are gathered ahead of the one that runs.

    Returns:
        the model itself.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """
    if not isinstance(model, Trunk):
        raise TypeError(f"model must be a HierarchicalTransformer, got {type(model).__name__}")
    prefetch = integer("prefetch", prefetch, at_least=0)
    if param_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"param_dtype must be torch.bfloat16, torch.float32 or None, got {param_dtype}"
        )
    parameters = dict(model.named_parameters())
    if sharded := [name for name, p in parameters.items() if is_sharded(p)]:
        raise ValueError(f"model must not be sharded yet, got {sharded[0]} that is")
    on_meta = [name for name, p in parameters.items() if p.is_meta]
    if on_meta and len(on_meta) < len(parameters):
        raise ValueError(f"model must be on meta as a whole or not at all, got {on_meta[0]} there")
    mesh = mesh or _all_processes()
    options = dict(
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(
            param_dtype, reduce_dtype=None if param_dtype is None else torch.float32
        ),
    )
    units = _units(model)
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + prefetch])
        unit.set_modules_to_backward_prefetch(units[max(0, i - prefetch) : i][::-1])
    model.set_modules_to_forward_prefetch(units[:prefetch])
    if on_meta:
        model.to_empty(device=mesh.device_type)
        model.init_weights()
    return model


def _units(model: Trunk) -> list[Module]:
    """List what is gathered at once, in the order of a forward."""
    units = []
    for blocks, merge in zip_longest(model.layers, model.hierarchical_merges):
        units += [*blocks, *([] if merge is None else [merge])]
    return units


def _all_processes() -> DeviceMesh:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "mesh is None, which means all processes of torch.distributed: call"
            " torch.distributed.init_process_group() first (torchrun starts the processes), or pass"
            " a DeviceMesh"
        )
    on_gpus = "cuda:nccl" in dist.get_backend_config()
    return init_device_mesh("cuda" if on_gpus else "cpu", (dist.get_world_size(),))
