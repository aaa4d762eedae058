"""The tensors of a checkpoint that every process writes its part of: one safetensors file each, in
which PyTorch's distributed checkpoints note where a part belongs. Any number of processes can read
them; nothing of them is code.

    model.NAME              a weight
    optimizer.INDEX.NAME    what the optimizer keeps for the parameter of this number
    ema.NAME                the average of a weight
"""

import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

NAME = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write and sync the parts of all processes of torch.distributed, each of which calls this.

    Raises:
        OSError: on all of them, what one of them could not write.
    """
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    except CheckpointException as error:
        raise _first(error) from error


def read_into(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors, of which a process may hold parts.

    Args:
        folder: where `write` wrote.
        tensors: all or some of those that `sizes` lists.
        alone: whether this process alone calls this, and not all of torch.distributed.

    Raises:
        LookupError, RuntimeError, ValueError: there is no such tensor, or one of another size.
    """
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder), no_dist=alone)
    except CheckpointException as error:
        raise RuntimeError(str(_first(error))) from error


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the size and dtype of each tensor that `write` wrote there, by name.

    Raises:
        ValueError: a part is missing.
    """
    found = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    for name, tensor in found.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"of {name} parts are missing")
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in found.items()}


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors, whole, in the memory of this process."""
    tensors = {
        name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes(folder).items()
    }
    read_into(folder, tensors, alone=True)
    return tensors


def flat(
    weights: dict[str, Tensor],
    optimizer: dict[int, dict[str, Tensor]],
    average: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of a model's state_dict, of an optimizer's `state` and of averaged weights, by
    their names here.
    """
    tensors = {f"model.{name}": t for name, t in weights.items()}
    tensors |= {f"ema.{name}": t for name, t in average.items()}
    for index, values in optimizer.items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in values.items()}
    return tensors


def nested(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Undo `flat`: return weights, states of the optimizer by index, and averages."""
    weights, optimizer, average = {}, {}, {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name] = tensor
        elif kind == "ema":
            average[name] = tensor
        else:
            index, _, name = name.partition(".")
            optimizer.setdefault(int(index), {})[name] = tensor
    return weights, optimizer, average


def _first(error: CheckpointException) -> BaseException:
    """Return the error of the first process that failed."""
    _, (cause, _) = min(error.failures.items())
    return cause
