"""Fused ops of one token of every sequence of a batch, which a model's step of generation is made
of. Each does its part of a layer for all levels in one launch, and writes into the state. Their
specification is `shtx_kernels.reference.decode`.
"""

from .attend import attend
from .embed import embed
from .merge import merge
from .norm import norm
from .project import project
from .sample import sample

__all__ = ["attend", "embed", "merge", "norm", "project", "sample"]
