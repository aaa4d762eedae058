"""The model of a run, for what comes after training."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from shtx.model import Trunk

NEEDED = ("tyro", "safetensors", "numpy")  # what the extra shtx[train] brings


def load(
    path: str | Path,
    step: int | str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
) -> "Trunk":
    """Load a model that `shtx train` has trained.

    Args:
        path: the directory of a run, or of one of its checkpoints, which one process wrote or many.
        step: which checkpoint of a run; "best": that of its best validation; None: the newest.
        device: where the model will be; None: on a GPU if there is one.
        dtype: of its weights, of floating point; None: as they are, fp32.
        ema: take the averaged weights, of a run with --ema.

    Returns:
        the model, in eval mode, with impl="auto".

    Raises:
        shtx.train.TrainError: in one line why there is none: no such checkpoint, or a damaged one.
        TypeError: for a dtype that is not of floating point.
        ImportError: what shtx[train] brings is not installed.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ImportError(f'{", ".join(missing)} not installed: pip install "shtx[train]"')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be of floating point or None, got {dtype!r}")
    from shtx.train.trainer import load_model

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_model(Path(path).absolute(), torch.device(device), step, ema)
    return model.to(dtype=dtype).eval()
