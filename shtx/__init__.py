"""Hierarchical transformers, fast: the drop-in successor of simple-hierarchical-transformer."""

from shtx.levels import Level
from shtx.model import HierarchicalTransformer
from shtx.train_step import TrainStep

__all__ = ["HierarchicalTransformer", "Level", "TrainStep"]
__version__ = "0.1.0"
