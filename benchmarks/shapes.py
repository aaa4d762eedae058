"""The benchmark configurations, and what a train step of each has to multiply."""

from typing import NamedTuple

import torch

from shtx import HierarchicalTransformer
from shtx.generation.stages import TABLE_IDS


class Config(NamedTuple):
    batch: int
    model: dict  # keyword arguments of HierarchicalTransformer


CONFIGS = {
    "A": Config(  # words
        batch=4,
        model=dict(
            num_tokens=20000,
            dim=512,
            depth=6,
            seq_len=2048,
            hierarchies=(1, 2, 8),
            window_sizes=(32, 64, None),
        ),
    ),
    "B": Config(  # bytes, levels of unequal width, one of them strided
        batch=32,
        model=dict(
            num_tokens=256,
            dim=(128, 256, 512, 1024),
            depth=8,
            seq_len=1024,
            dim_head=(16, 32, 64, 64),
            heads=(2, 4, 8, 8),
            ff_mult=(2, 2, 4, 4),
            hierarchies=(1, 2, 4, 16),
            hierarchical_stride=(1, 1, 1, 8),
            window_sizes=(16, 32, 64, None),
        ),
    ),
    "C": Config(  # bytes, two wide levels
        batch=8,
        model=dict(
            num_tokens=256,
            dim=1024,
            depth=8,
            seq_len=2048,
            hierarchies=(1, 2),
            window_sizes=(32, 64),
        ),
    ),
    "D": Config(  # bytes, long
        batch=1,
        model=dict(
            num_tokens=256,
            dim=512,
            depth=6,
            seq_len=16384,
            hierarchies=(1, 4, 16),
            window_sizes=(128, 128, None),
        ),
    ),
    "E": Config(  # bytes, wide: two billion parameters, six where several GPUs have parts of them
        batch=2,
        model=dict(
            num_tokens=256,
            dim=(2048, 4096),
            depth=6,
            seq_len=8192,
            dim_head=128,
            heads=(16, 32),
            hierarchies=(1, 4),
            hierarchical_stride=(1, 4),
            window_sizes=(256, None),
        ),
    ),
}

SHARDED = {"E": 20}  # layers of what several GPUs have parts of, with checkpointing by block

# The same levels, narrow and short, for a CPU.
SMALL = {
    "A": Config(2, CONFIGS["A"].model | dict(num_tokens=2000, dim=32, depth=2, seq_len=128)),
    "B": Config(2, CONFIGS["B"].model | dict(dim=(16, 32, 32, 64), depth=2, seq_len=128)),
    "C": Config(2, CONFIGS["C"].model | dict(dim=64, depth=2, seq_len=128)),
    "D": Config(1, CONFIGS["D"].model | dict(dim=32, depth=2, seq_len=1024)),
    "E": Config(
        2, CONFIGS["E"].model | dict(dim=(32, 64), depth=2, heads=2, dim_head=16, seq_len=512)
    ),
}


def configs(device: str) -> dict[str, Config]:
    return CONFIGS if device == "cuda" else SMALL


def on_meta(config: Config) -> HierarchicalTransformer:
    """The model without memory, for its levels and its parameters' sizes."""
    with torch.device("meta"):
        return HierarchicalTransformer(**config.model, impl="reference")


def tokens(name: str, device: str) -> tuple[HierarchicalTransformer, int, int, int, int]:
    """The model of a configuration, without memory, and the sizes B, N, V and D of its tokens."""
    config = configs(device)[name]
    model = on_meta(config)
    return model, config.batch, config.model["seq_len"], *model.token_emb.weight.shape


class Product(NamedTuple):
    """(rows, inner) @ (inner, columns), `times` times a forward."""

    part: str
    rows: int
    inner: int
    columns: int
    times: int = 1


def products(config: Config, folded: bool = False) -> list[Product]:
    """Every matrix product of a forward with its losses; not those inside attention, about 1%.

    Folded, the compressing convolutions, which read embeddings, become a table with a row for each
    of num_tokens.
    """
    model = on_meta(config)
    V, N, depth = (config.model[name] for name in ("num_tokens", "seq_len", "depth"))
    D = max(model.dims)
    tokens = config.batch * N
    predicting = model.levels[model.predict_hierarchy_index]

    out = [Product("logits", tokens, predicting.dim, V)]
    for level in model.levels:
        rows = config.batch * -(-N // level.stride)
        d, c, heads = level.dim, level.compress, level.heads * level.dim_head
        inner = int(d * level.ff_mult)
        if c > 1:
            conv = (V, D, c * 4 * D) if folded else (rows, c * D, 4 * D)
            out += [Product("compress", *conv), Product("compress", rows, 4 * D, d)]
            out += [Product("ar", rows, d, d), Product("recon", rows, d, c * V)]
        elif d != D:
            out.append(Product("compress", rows, D, d))
        if level.window != 0:
            out += [Product("block", rows, d, 3 * heads, depth)]
            out += [Product("block", rows, heads, d, depth)]
        out += [Product("block", rows, d, inner, depth), Product("block", rows, inner, d, depth)]
    if len(model.levels) > 1:
        merged = predicting.dim
        out.append(Product("merge", tokens, sum(model.dims), 2 * merged, depth))
        out.append(Product("merge", tokens, 2 * merged, merged, depth))
    return out


def foldable(config: Config) -> bool:
    """Return whether the table of `products` has far fewer rows than the product it replaces."""
    return config.model["num_tokens"] <= 256


def flops(products: list[Product]) -> int:
    """Count those of one forward; a train step has three times as many."""
    return sum(2 * p.rows * p.inner * p.columns * p.times for p in products)


def pairs(tokens: int, window: int | None) -> int:
    """Count the queries and keys i - window <= j <= i that see each other among so many tokens."""
    reach = tokens - 1 if window is None else min(window, tokens - 1)
    return tokens * (reach + 1) - reach * (reach + 1) // 2


def bound(config: Config, tflop_per_s: float, gb_per_s: float) -> dict[str, float]:
    """Milliseconds that an exact train step in bf16 must take at least, by part.

    Products run at `tflop_per_s` and no slower for their epilogues, in which all else hides but the
    tensors that must pass memory, each once, at `gb_per_s`. What stays in the L2 cache is free.
    """
    model, folded = on_meta(config), foldable(config)
    V, N, depth = (config.model[name] for name in ("num_tokens", "seq_len", "depth"))
    parameters = sum(p.numel() for p in model.parameters())
    of_flops = lambda count: count / tflop_per_s / 1e9
    of_bytes = lambda count: count / gb_per_s / 1e6

    parts = {
        "products": of_flops(3 * flops(products(config, folded))),
        # reads a weight, its gradient and two moments, and writes all but the gradient, in fp32
        "AdamW": of_bytes(28 * parameters),
        "narrow weights": of_bytes(2 * parameters),
    }
    parts |= dict.fromkeys(("attention", "norms", "GELU", "merge", "compress"), 0.0)
    parts["losses"] = of_bytes(2 * config.batch * N * V)  # logits are read once
    for level in model.levels:
        M = -(-N // level.stride)
        rows, d, inner = config.batch * M, level.dim, int(level.dim * level.ff_mult)
        if level.window != 0:
            width, a = level.heads * level.dim_head, level.dilation
            # q, k, v, out; then those again, dout, dq, dk, dv
            moved = of_bytes(2 * 12 * rows * width)
            # two products forward, five backward
            seen = config.batch * a * pairs(-(-M // a), level.window)
            parts["attention"] += depth * max(moved, of_flops(7 * 2 * seen * width))
        # a norm passes the stream that a branch is added to, and its gradient before and after
        norms = 1 + (level.window != 0)
        parts["norms"] += depth * norms * of_bytes(2 * 3 * rows * d)
        # x, gelu and its slope out; dy, slope in, du out and gelu in: what no product hides
        pair = 2 * (of_bytes(2 * rows * (d + 2 * inner)) - of_flops(2 * rows * d * inner))
        parts["GELU"] += depth * max(0.0, pair)
        if len(model.levels) > 1:  # a level and its branch are read, their sum is written
            parts["merge"] += depth * of_bytes(2 * 3 * rows * d)
        if level.compress > 1:
            # gelu of the table's sums is written and its gradient read, as no product makes it
            parts["compress"] += of_bytes(2 * 2 * rows * 4 * max(model.dims)) * folded
            # logits, read once; two tensors read forward, read again and their gradients written
            parts["losses"] += of_bytes(2 * rows * (level.compress * V + 6 * d))
    return parts


def weight_bytes(config: Config, batch: int) -> float:
    """bf16 weights that generating a token of each of `batch` sequences has to read.

    Matrices once for all of them, a level's in every stride-th token; of tables a row for each.
    Tables are the levels of single tokens and, as in the decoder, a convolution of few ids.
    """
    model = on_meta(config)
    V, D = model.token_emb.weight.shape
    matrices = lambda module: sum(p.numel() for p in module.parameters() if p.ndim > 1)

    total = matrices(model.to_logits) + (batch * D if V > TABLE_IDS else 0)
    for i, (level, compressor) in enumerate(zip(model.levels, model.compressors, strict=True)):
        weights = sum(matrices(layer[i]) for layer in model.layers)
        if level.compress == 1:
            weights += batch * level.dim
        else:
            conv = compressor.compress_fn[1].conv.weight.numel()
            weights += conv if V > TABLE_IDS else batch * level.compress * 4 * D
            weights += matrices(compressor.compress_fn[3])
        total += weights / level.stride
    for merge in model.hierarchical_merges:
        _, w_in, _, w_out = merge.net
        total += w_in.out_features * sum(level.dim / level.stride for level in model.levels)
        total += matrices(w_out)
    return 2 * total


class LevelShape(NamedTuple):
    """(B, M, D) of a level, and the dilation of its token shift."""

    config: str
    B: int
    M: int
    D: int
    dilation: int

    def labels(self) -> dict:
        """Return what a row of results says of it."""
        return {"config": self.config, "shape": f"{self.B} x {self.M} x {self.D}"}


def level_shapes(names: list[str], device: str) -> list[LevelShape]:
    """The largest level of every width in the configurations."""
    largest = {}
    for name in names:
        config = configs(device)[name]
        for level in on_meta(config).levels:
            M = -(-config.model["seq_len"] // level.stride)
            shape = LevelShape(name, config.batch, M, level.dim, level.dilation)
            kept = largest.setdefault(level.dim, shape)
            if kept.B * kept.M <= shape.B * shape.M:
                largest[level.dim] = shape
    return [largest[D] for D in sorted(largest)]
