"""Hierarchical transformers, fast: the drop-in successor of simple-hierarchical-transformer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shtx.levels import Level
    from shtx.loading import load
    from shtx.model import HierarchicalTransformer
    from shtx.train_step import TrainStep

__all__ = ["HierarchicalTransformer", "Level", "TrainStep", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """On first use: the command answers, and takes signals, before PyTorch is loaded."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in ("levels", "loading", "model", "train_step"):
        module = import_module(f"{__name__}.{module}")
        globals().update({k: v for k, v in vars(module).items() if k in __all__})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
