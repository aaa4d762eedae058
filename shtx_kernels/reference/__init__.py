"""Every op in plain PyTorch, with the same name and signature: the specification, and the path that
runs anywhere. The ops that generate a token are in `decode`.

Sizes: B batch, N tokens, M tokens of a level, D width, H heads, E head width, C compression, V
vocabulary. Half precision is accumulated in fp32, fp64 in fp64. Semantics are those of
simple-hierarchical-transformer 0.2.0, and those of 0.4.0 for what it alone has.
"""

from .attention import halves as halves
from .attention import neighbours as neighbours
from .attention import rotary_attention
from .layers import (
    causal_compress,
    feed_forward,
    hierarchical_cat,
    hierarchical_merge,
    linear,
    token_embedding,
)
from .losses import cosine_distance as cosine_distance
from .losses import cross_entropy as cross_entropy
from .losses import hierarchical_ar_loss, linear_cross_entropy, reconstruction_loss
from .losses import windows as windows
from .next_latents import DISTANCES as DISTANCES
from .next_latents import chunk_means as chunk_means
from .next_latents import chunk_summary, next_latent_loss
from .next_latents import rollouts as rollouts
from .norms import norm_token_shift
from .norms import rms_norm as rms_norm
from .norms import token_shift as token_shift

__all__ = [
    "causal_compress",
    "chunk_summary",
    "feed_forward",
    "hierarchical_ar_loss",
    "hierarchical_cat",
    "hierarchical_merge",
    "linear",
    "linear_cross_entropy",
    "next_latent_loss",
    "norm_token_shift",
    "reconstruction_loss",
    "rotary_attention",
    "token_embedding",
]
