"""The providers of a benchmark: models that do the same work in different ways."""

from collections.abc import Callable

import torch
from torch.nn import Module

import shtx_kernels
from benchmarks.shapes import Config
from benchmarks.timing import DEVICE
from shtx import HierarchicalTransformer
from shtx_kernels import reference


def ours(op: str) -> dict[str, Callable | None]:
    """The op by our own providers; None where fused ops are not, for want of Triton."""
    plain = getattr(reference, op)
    return {
        "fused": getattr(shtx_kernels, op, None),
        "reference-compiled": torch.compile(plain),
        "reference": plain,
    }


def build_reference(config: Config) -> Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return HierarchicalTransformer(**config.model, impl="reference")


def load(provider: str, reference: Module, config: Config) -> Module:
    """The provider's model, with the weights of `reference`."""
    model = reference
    if provider.startswith("fused"):
        model.impl, model.graphs = "fused", provider == "fused-graphs"
    if provider.startswith(("upstream", "repaired")):
        if provider.startswith("upstream"):
            from simple_hierarchical_transformer import HierarchicalTransformer as Peer
        else:
            from benchmarks.repaired import Repaired as Peer

        with torch.device(DEVICE):
            model = Peer(**config.model)
        model.load_state_dict(reference.state_dict())
    if not provider.endswith("-compiled"):
        return model
    return compiled(model, "reduce-overhead" if "reduce-overhead" in provider else None)


def compiled(model: Module, mode: str | None = None) -> Module:
    torch._dynamo.config.cache_size_limit = 256  # upstream breaks into many graphs
    return torch.compile(model, mode=mode)
