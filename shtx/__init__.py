"""Hierarchical transformers, fast: the drop-in successor of simple-hierarchical-transformer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shtx.levels import Level
    from shtx.loading import load
    from shtx.model import HierarchicalTransformer
    from shtx.train_step import TrainStep
    from shtx.upstream import from_upstream

__all__ = ["HierarchicalTransformer", "Level", "TrainStep", "from_upstream", "load"]
__version__ = "0.1.0"

MODULES = {
    "HierarchicalTransformer": "model",
    "Level": "levels",
    "TrainStep": "train_step",
    "from_upstream": "upstream",
    "load": "loading",
}


def __getattr__(name: str):
    """Import a name at its first use, so that the command can answer before PyTorch is loaded."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    return value
