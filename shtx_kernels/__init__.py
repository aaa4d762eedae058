"""Fused Triton ops, and their specification in plain PyTorch: `shtx_kernels.reference`.

Sizes: B batch, N tokens, M tokens of a level, D width, H heads, E head width, C compression, V
vocabulary. Every op takes fp32, fp16, bf16 (and fp64, for checking gradients), accumulates in fp32
(fp64), and is deterministic. The last dimension of an input must be contiguous, the others may be
strided; weights have any layout.

The other pages without an underscore are for whoever calls ops: `launch` and `ahead` have launches
and compilation ahead of them, `products` the dtype and precision of products, `decode_arguments`
the arguments of ops that generate a token, and `internals` private interfaces of PyTorch and
Triton.
"""

from importlib.util import find_spec

__all__ = []

if find_spec("triton"):  # without it the reference is all there is
    from . import decode as decode
    from .causal_compress import causal_compress
    from .chunk_summary import chunk_summary
    from .feed_forward import feed_forward
    from .hierarchical_ar_loss import hierarchical_ar_loss
    from .hierarchical_merge import hierarchical_merge
    from .linear import linear
    from .linear_cross_entropy import linear_cross_entropy
    from .next_latent_loss import next_latent_loss
    from .norm_token_shift import norm_token_shift
    from .reconstruction_loss import reconstruction_loss
    from .rotary_attention import rotary_attention
    from .token_embedding import token_embedding

    __all__ += [
        "causal_compress",
        "chunk_summary",
        "feed_forward",
        "hierarchical_ar_loss",
        "hierarchical_merge",
        "linear",
        "linear_cross_entropy",
        "next_latent_loss",
        "norm_token_shift",
        "reconstruction_loss",
        "rotary_attention",
        "token_embedding",
    ]
