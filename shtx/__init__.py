"""Hierarchical transformers, fast: the drop-in successor of simple-hierarchical-transformer."""

from shtx.levels import Level
from shtx.model import HierarchicalTransformer

__all__ = ["HierarchicalTransformer", "Level"]
__version__ = "0.1.0"
