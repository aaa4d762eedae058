"""Weights of a model in the forms in which ops of one token read them."""

import torch
import torch.nn.functional as F
from torch import Tensor, arange
from torch.nn import Module

from shtx.levels import Level
from shtx.ops import halves


def whole(model: Module, name: str) -> Tensor:
    """A weight, which FSDP2 may have sharded, or a parametrization compute."""
    path, _, name = name.rpartition(".")
    weight = getattr(model.get_submodule(path), name).detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def token_table(model: Module, level: int) -> Tensor:
    """(1, V, D): the first token of a level without compression, for every id."""
    rows = whole(model, "token_emb.weight")
    if hasattr(model.compressors[level].compress_fn, "weight"):
        rows = F.linear(rows, whole(model, f"compressors.{level}.compress_fn.weight"))
    norm = (whole(model, f"post_token_emb_norms.{level}.{name}") for name in ("weight", "bias"))
    return F.layer_norm(rows, rows.shape[-1:], *norm)[None]


def conv_table(model: Module, level: int) -> Tensor:
    """(C, V, 4 D): every tap of a compressing convolution, for every id."""
    weight = whole(model, f"compressors.{level}.compress_fn.1.conv.weight")
    return torch.einsum("vd,odc->cvo", whole(model, "token_emb.weight"), weight)


def conv_rows(model: Module, level: int) -> Tensor:
    """(4 D, C D): a compressing convolution as a product with C embeddings side by side."""
    return whole(model, f"compressors.{level}.compress_fn.1.conv.weight").mT.flatten(1)


def qkv_rows(model: Module, layer: int, level: int) -> Tensor:
    """(3 H E, D): the product for q, k and v, whose rotary pairs channels half a head apart."""
    rows = whole(model, f"layers.{layer}.{level}.attn.to_qkv.weight")
    heads = model.layers[layer][level].attn.heads
    return halves_of_qkv(rows.mT, model.levels[level], heads).mT


def halves_of_qkv(qkv: Tensor, level: Level, heads: int) -> Tensor:
    """qkv (..., 3 H E) as ops of one token take it, which know one pairing alone."""
    if level.window is not None or not level.interleaved:
        return qkv
    q, k, v = qkv.unflatten(-1, (3, heads, level.dim_head)).unbind(-3)
    return torch.stack((halves(q), halves(k), v), dim=-3).flatten(-3)


def merge_rows(model: Module, layer: int) -> Tensor:
    """(J, D): the first product of a merge, with the weight of its norm."""
    name = f"hierarchical_merges.{layer}.net"
    return whole(model, f"{name}.1.weight") * whole(model, f"{name}.0.gamma")


def rotation(level: Level, distances: int, device: torch.device) -> Tensor:
    """(distances, 2, E / 2): cosine and sine of the rotation between q and k so far apart, with
    the decay of xpos in full attention.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no fp64
    channel = arange(0, level.dim_head, 2, device=device, dtype=wide)
    distance = arange(distances, device=device, dtype=wide)[:, None]
    angle = distance * 10000 ** (-channel / level.dim_head)
    both = torch.stack((angle.cos(), angle.sin()), dim=1)
    if level.window is None:
        z = (channel + 0.4 * level.dim_head) / (1.4 * level.dim_head)
        both *= (z ** (distance / 512))[:, None]
    return both
