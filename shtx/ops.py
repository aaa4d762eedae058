"""The one switch between the fused ops and their references.

`resolve(impl, device)` gives the namespace the layers call. An op without a fused form is its
reference in both; everything else that `impl="fused"` cannot do raises.
"""

import warnings
from types import SimpleNamespace

import torch

import shtx_kernels
from shtx.internals import constant_result, transforms_active
from shtx_kernels import reference
from shtx_kernels.ahead import compile_ahead as compile_ahead
from shtx_kernels.decode_arguments import Attention as Attention
from shtx_kernels.decode_arguments import Lookup as Lookup
from shtx_kernels.decode_arguments import Norm as Norm
from shtx_kernels.decode_arguments import Part as Part
from shtx_kernels.decode_arguments import Projection as Projection
from shtx_kernels.products import matmul_precision as matmul_precision
from shtx_kernels.products import narrow_copies as narrow_copies
from shtx_kernels.products import narrow_weights as narrow_weights
from shtx_kernels.products import product_dtype as product_dtype
from shtx_kernels.reference import DISTANCES as DISTANCES
from shtx_kernels.reference import chunk_means as chunk_means
from shtx_kernels.reference import cosine_distance as cosine_distance
from shtx_kernels.reference import cross_entropy as cross_entropy
from shtx_kernels.reference import decode as reference_decode
from shtx_kernels.reference import halves as halves
from shtx_kernels.reference import hierarchical_cat as hierarchical_cat
from shtx_kernels.reference import neighbours as neighbours
from shtx_kernels.reference import rms_norm as rms_norm
from shtx_kernels.reference import rollouts as rollouts
from shtx_kernels.reference import token_shift as token_shift
from shtx_kernels.reference import windows as windows

IMPLS = ("auto", "fused", "reference")
REFERENCE_OPS = tuple(reference.__all__)
FUSED_OPS = tuple(shtx_kernels.__all__)
TOKEN_OPS = tuple(reference_decode.__all__)  # the ops of generating a token, all of them fused
MIN_CAPABILITY = (8, 0)

REFERENCE = SimpleNamespace(**{name: getattr(reference, name) for name in REFERENCE_OPS})
REFERENCE.decode = reference_decode  # ops of one token
FUSED = SimpleNamespace(
    **vars(REFERENCE) | {name: getattr(shtx_kernels, name) for name in FUSED_OPS}
)
if FUSED_OPS:
    FUSED.decode = shtx_kernels.decode


def why_not_fused(device: torch.device) -> str | None:
    """Return the reason why fused ops cannot run on tensors of `device`; None if they can."""
    if not FUSED_OPS:
        return "Triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"tensors on {device.type} need TRITON_INTERPRET=1, set before shtx is imported"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@constant_result
def _fused(impl: str, device: torch.device) -> bool:
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return False
    if impl == "auto" and transforms_active():  # fused ops refuse these
        return False
    if device.type == "meta":  # has shapes alone, which are the same
        return False
    reason = why_not_fused(device)
    if reason is None:
        return True
    if impl == "fused":
        raise ValueError(f'impl="fused" cannot run: {reason}; use impl="auto" or "reference"')
    warnings.warn(f'impl="auto" takes the reference: {reason}', stacklevel=2)
    return False


def check_impl(impl: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl


def resolve(impl: str, device: torch.device) -> SimpleNamespace:
    """The ops for tensors on `device`: fused or reference, "auto" being fused on CUDA alone, where
    nothing is transformed by torch.func.
    """
    return FUSED if _fused(impl, device) else REFERENCE
