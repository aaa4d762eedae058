"""Who is measured."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch.nn import Module

from benchmarks.shapes import Config
from benchmarks.timing import DEVICE
from shtx import HierarchicalTransformer
from shtx.ops import why_not_fused

UPSTREAM = "simple-hierarchical-transformer"
FLOORS = ("floor", "floor-folded")
# The model in TrainStep, in the plain loop under model.graphs and without, and compiled.
LOOPS = (
    *("fused", "fused-graphs", "fused-eager"),
    *("fused-compiled", "fused-reduce-overhead-compiled"),
)
FUSED = (*LOOPS, "fused-without", "products")
OURS = ("fused", "reference-compiled", "reference")
PROVIDERS = {
    "causal_compress": (*OURS, "products", "cublas"),
    "chunk_summary": OURS,
    "feed_forward": (*OURS, "cublas"),
    "hierarchical_ar_loss": (*OURS, "copy"),
    "hierarchical_merge": (*OURS, "cublas"),
    "linear": (*OURS, "cublas"),
    "linear_cross_entropy": (*OURS, "liger", "cut-cross-entropy", "cublas"),
    "next_latent_loss": (*OURS, "cublas"),
    "norm_token_shift": (*OURS, "liger", "copy"),
    "reconstruction_loss": (*OURS, "cublas"),
    "rotary_attention": (
        *OURS,
        *("flex", "flash-window", "sdpa-flash", "sdpa-cudnn", "local-mha"),
    ),
    "token_embedding": OURS,
    "model": (
        *(*FLOORS, *LOOPS, "reference-compiled", "reference"),
        *("repaired-compiled", "upstream-compiled", "upstream"),
    ),
    "next_latent": (
        *("fused", "fused-without", "reference-compiled", "reference"),
        *("upstream-compiled", "upstream"),
    ),
    "scaling": ("fused", "reference"),
    "gpus": ("fused",),
    "generate": ("fused", "reference", "upstream"),
}
WHOLE = ("model", "next_latent", "scaling", "gpus", "generate")
OPS = [bench for bench in PROVIDERS if bench not in WHOLE]
PACKAGES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
GPU_ALONE = (
    *(*PACKAGES, "flex", "flash-window", "sdpa-flash", "sdpa-cudnn"),
    "repaired-compiled",  # FlexAttention has no backward on a CPU
)


def why_not(provider: str, bench: str) -> str | None:
    """Why a provider of a benchmark cannot be measured here; None if it can."""
    if provider in FUSED:
        return why_not_fused(torch.device(DEVICE))
    if provider in GPU_ALONE and DEVICE == "cpu":
        return "needs a CUDA device"
    if provider in PACKAGES and not find_spec(PACKAGES[provider]):
        return f"{PACKAGES[provider].replace('_', '-')} is not installed"
    if provider.startswith("upstream"):
        peer = "0.4.0" if bench == "next_latent" else "0.2.0"
        try:
            found = version(UPSTREAM)
        except PackageNotFoundError:
            return f"{UPSTREAM}=={peer} is not installed"
        return None if found == peer else f"{UPSTREAM} is {found}, the peer is {peer}"
    return None


def by_default(bench: str) -> list[str]:
    """A CPU leaves out what takes minutes there (compiling) or means nothing (interpreting)."""
    unfit = lambda p: p in (*FUSED, *GPU_ALONE) or p.endswith("-compiled")
    return [p for p in PROVIDERS[bench] if DEVICE == "cuda" or not unfit(p)]


def build_reference(config: Config) -> Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return HierarchicalTransformer(**config.model, impl="reference")


def load(provider: str, reference: Module, config: Config) -> Module:
    """The provider's model, with the weights of `reference`."""
    model = reference
    if provider in FUSED:
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
