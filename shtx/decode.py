"""The model one token at a time, from a state that keeps of the past what later tokens read."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, arange
from torch.nn import Module

from shtx.layers import WindowAttention, exists
from shtx.levels import Level
from shtx.ops import Attention, Lookup, Norm, Part, Projection, halves

# up to so many ids, a compressing convolution is a table of their products with every tap
TABLE_IDS = 512


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


class Recent:
    """What rings keep of the tokens of a prompt, sequence by sequence."""

    def __init__(self, lengths: Tensor):
        self.last, self.sequence = lengths - 1, arange(len(lengths), device=lengths.device)
        self._kept = {}  # by slots of a ring and stride: which level tokens, and which are none

    def last_row(self, rows: Tensor, stride: int) -> Tensor:
        """(B, ...) of a level's (B, M, ...)."""
        return rows[self.sequence, self.last // stride]

    def fill(self, ring: Tensor, rows: Tensor, stride: int = 1) -> None:
        """A ring, from a level's rows (B, M, ...)."""
        key = slots, _ = ring.shape[1], stride
        if key not in self._kept:
            last = self.last[:, None] // stride
            token = last - (last - arange(slots, device=ring.device)) % slots
            self._kept[key] = token.clamp(min=0), token < 0
        token, unknown = self._kept[key]
        kept = rows[self.sequence[:, None], token]
        ring.copy_(kept.masked_fill(unknown.view(*unknown.shape, *[1] * (ring.ndim - 2)), 0))


class Decoder:
    """Weights and state of a model for generating: of `batch` sequences, each of up to `length`
    tokens, or of any number where no level has full attention.

    Every stage of a layer is one op for all levels. A level keeps, for each of its blocks, the rows
    of the residual streams that a token shift reads, and the keys and values of its window (all of
    them without one); it works at every stride-th token alone.

    Args:
        model: HierarchicalTransformer, which FSDP2 may have sharded.
        batch: B.
        length: tokens of a prompt and what follows it.
        dtype: of weights, streams, keys and values; by default that of the model's parameters.
        ops: in place of those of the model's `impl`.

    Attributes:
        ids: (B,) int64, what `step` takes.
        logits: (B, V), of what comes after the last token taken; fp32 or wider.
        position: (B,) int64, how many tokens have been taken.
    """

    def __init__(
        self,
        model: Module,
        batch: int,
        length: int,
        dtype: torch.dtype | None = None,
        ops: SimpleNamespace | None = None,
    ):
        self.levels, self.batch, self.length = model.levels, batch, length
        self.device, self.dtype = model.device, dtype or model.token_emb.weight.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.ops = ops or model.ops_for(self.device)
        self._copies, self._rings = [], []
        # what the calls of an op in a pass over a prompt leave in the state, in their order
        self._fills = dict(norm_token_shift=[], rotary_attention=[], hierarchical_merge=[])

        integers = partial(self._ring, dtype=torch.long)
        self.ids, self.position = integers(1)[:, 0], integers(1)[:, 0]
        self.history = integers(max(level.compress for level in self.levels))
        self.logits = self._ring(1, model.num_tokens, dtype=self.wide)[:, 0]
        with torch.no_grad():
            streams = [self._stream(level) for level in self.levels]
            self._stages = self._embed(model, streams)
            for layer in range(len(model.layers)):
                self._stages += self._blocks(model, layer, streams)
                if model.need_hierarchical_merge:
                    self._stages += self._merge(model, layer, streams)
            self._stages += self._predict(model, streams)

    @property
    def state_bytes(self) -> int:
        """The size of the state of one sequence."""
        return sum(ring.nbytes for ring in self._rings) // max(1, self.batch)

    def refresh(self, model: Module) -> None:
        """Take the weights that the model has now."""
        with torch.no_grad():
            for copy, read in self._copies:
                copy.copy_(read(model))

    def step(self) -> Tensor:
        """Take `ids`, one token of every sequence.

        Returns:
            `logits`, written over by the next call.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for op, *arguments in self._stages:
                op(self.position, *arguments)
            self.position += 1
        return self.logits

    def prefill(self, model: Module, prompt: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Start over with a prompt: the model's own forward, whose ops leave what the state needs.

        Args:
            model: whose weights these are.
            prompt: (B, T) int64.
            lengths: (B,), how many of the T tokens a sequence has; all by default.

        Returns:
            `logits`.
        """
        lengths = prompt.new_full((self.batch,), prompt.shape[1]) if lengths is None else lengths
        recent, ops = Recent(lengths), SimpleNamespace(**vars(self.ops))
        for name, fills in self._fills.items():
            setattr(ops, name, filling(getattr(ops, name), iter(fills), recent))
        narrow = self.dtype != model.token_emb.weight.dtype
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=narrow):
            # upstream, too, runs forward alone; FSDP2 gathers the weights in hooks of a call
            run = model if hasattr(model, "unshard") else model.forward
            plan = model.plan(ops, checked=True)
            embeds = run(prompt, return_hierarchical_embeds=True, plan=plan)
        for end, rows, level in zip(self._ends, embeds, self.levels, strict=True):
            if exists(end):
                recent.fill(end, rows, level.stride)
        recent.fill(self.history, prompt)
        recent.fill(self._embeddings, F.embedding(prompt, self._embedding))
        self.logits.copy_(F.linear(self._end[:, 0], self._to_logits))
        self.position.copy_(lengths)
        return self.logits

    # building

    def _copy(self, model: Module, read: Callable[[Module], Tensor]) -> Tensor:
        """What `read` makes of a model, as `refresh` will again."""
        copy = read(model).to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._copies.append((copy, read))
        return copy

    def _weight(self, model: Module, name: str) -> Tensor:
        return self._copy(model, lambda model: whole(model, name))

    def _ring(self, slots: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        shape, dtype = (self.batch, slots, *shape), dtype or self.dtype
        self._rings.append(torch.zeros(shape, dtype=dtype, device=self.device))
        return self._rings[-1]

    def _stream(self, level: Level) -> Tensor:
        """The residual stream of a level: a shift reads `dilation` back from the row written."""
        return self._ring(2 * level.dilation, level.dim)

    def _shifted(self, stream: Tensor, level: Level) -> dict:
        """A norm of a stream, as an argument of `Projection`; a pass over a prompt fills it."""
        self._fills["norm_token_shift"].append(
            lambda args, outputs, recent: recent.fill(stream, outputs[0], level.stride)
        )
        return dict(x=stream, stride=level.stride, dilation=level.dilation)

    def _embed(self, model: Module, streams: list[Tensor]) -> list[tuple]:
        """Level tokens: of the ids, or of the last embeddings where tables would be large."""
        V, D = model.token_emb.weight.shape
        taps = max(level.compress for level in self.levels) if V > TABLE_IDS else 1
        self._embedding, self._embeddings = (
            self._weight(model, "token_emb.weight"),
            self._ring(taps, D),
        )
        lookups, convs, outs, norms = [], [], [], []
        if taps > 1:
            lookups.append(Lookup(self._embedding[None], None, None, self._embeddings, 1))
        for i, (level, stream) in enumerate(zip(self.levels, streams, strict=True)):
            self._fills["norm_token_shift"].append(None)
            copy = lambda read, i=i: self._copy(model, lambda model: read(model, i))
            step = level.stride
            if level.compress == 1:
                lookups.append(Lookup(copy(token_table), None, None, stream, step))
                continue
            weight = lambda name: self._weight(model, name)
            name, norm = f"compressors.{i}.compress_fn", f"post_token_emb_norms.{i}"
            inner, tokens = self._ring(1, 4 * D), self._ring(1, level.dim)
            silu = dict(
                bias=weight(f"{name}.1.conv.bias"), activation="silu", out=inner, stride=step
            )
            if taps > 1:
                rows = dict(x=self._embeddings, weight=copy(conv_rows), taps=level.compress)
                convs.append(Projection(**rows, **silu))
            else:
                lookups.append(Lookup(table=copy(conv_table), **silu))
            w_out = self._copy(
                model, lambda model, name=name: whole(model, f"{name}.3.weight")[..., 0]
            )
            bias = weight(f"{name}.3.bias")
            outs.append(Projection(inner, w_out, tokens, step, bias=bias))
            norms.append(
                Norm(tokens, weight(f"{norm}.weight"), weight(f"{norm}.bias"), stream, step)
            )
        decode = self.ops.decode
        stages = [(decode.embed, self.ids, self.history, lookups)]
        return stages + [(decode.project, convs), (decode.project, outs), (decode.norm, norms)]

    def _blocks(self, model: Module, layer: int, streams: list[Tensor]) -> list[tuple]:
        """The blocks of a layer. They replace the streams by those they write."""
        qkvs, attentions, attn_outs, ff_ins, ff_outs = [], [], [], [], []
        for i, level in enumerate(self.levels):
            weight = lambda name, i=i: self._weight(model, f"layers.{layer}.{i}.{name}")
            attn, step = model.layers[layer][i].attn, level.stride
            if exists(attn):
                inner = attn.heads * level.dim_head
                qkv, attended = self._ring(1, 3 * inner), self._ring(1, inner)
                norm = dict(norm="rms")
                if isinstance(attn, WindowAttention):
                    norm = dict(norm="layer", beta=weight("attn.norm.bias"))
                gamma = weight("attn.norm." + ("weight" if "beta" in norm else "gamma"))
                shifted = self._shifted(streams[i], level)
                rows = self._copy(model, lambda model, i=i: qkv_rows(model, layer, i))
                qkvs.append(Projection(**shifted, **norm, gamma=gamma, weight=rows, out=qkv))
                attentions.append(self._attention(level, attn.heads, qkv, attended))
                x, streams[i] = streams[i], self._stream(level)
                w_out = weight("attn.to_out.weight")
                attn_outs.append(Projection(attended, w_out, streams[i], step, residual=x))
            w_in = weight("ff.net.1.weight")
            hidden = self._ring(1, len(w_in))
            ff = dict(gamma=weight("ff.net.0.gamma"), weight=w_in, out=hidden)
            shifted = self._shifted(streams[i], level)
            ff_ins.append(Projection(**shifted, **ff, norm="rms", activation="gelu"))
            x, streams[i] = streams[i], self._stream(level)
            ff_outs.append(
                Projection(hidden, weight("ff.net.3.weight"), streams[i], step, residual=x)
            )
        decode = self.ops.decode
        return [
            (decode.project, qkvs),
            (decode.attend, attentions),
            (decode.project, attn_outs),
            (decode.project, ff_ins),
            (decode.project, ff_outs),
        ]

    def _attention(self, level: Level, heads: int, qkv: Tensor, out: Tensor) -> Attention:
        tokens = -(-self.length // level.stride)
        keys = -(-tokens // level.dilation) if level.window is None else level.window + 1
        kv = self._ring(keys * level.dilation, 2, heads, level.dim_head)
        table = rotation(level, keys, self.device).to(self.wide)

        def fill_kv(args, outputs, recent):
            qkv = halves_of_qkv(args[0], level, heads)
            rows = qkv.unflatten(-1, (3, heads, level.dim_head))[:, :, 1:]
            recent.fill(kv, rows, level.stride)

        self._fills["rotary_attention"].append(fill_kv)
        return Attention(qkv, kv, out, table, level.stride, level.dilation)

    def _merge(self, model: Module, layer: int, streams: list[Tensor]) -> list[tuple]:
        weight = lambda name: self._weight(model, f"hierarchical_merges.{layer}.net.{name}")
        w_in = self._copy(model, lambda model: merge_rows(model, layer))
        w_out, b_out = weight("3.weight"), weight("3.bias")
        hidden = self._ring(1, len(w_in))
        parts = []
        for x, level in zip(streams, self.levels, strict=True):
            kept = self._ring(1, len(w_in) + 1, dtype=self.wide)[:, 0] if level.stride > 1 else None
            parts.append(Part(x, kept, level.stride))

        def fill_kept(args, outputs, recent):
            columns = w_in.split([level.dim for level in self.levels], dim=1)
            for rows, w, (_, kept, stride) in zip(outputs[0], columns, parts, strict=True):
                if exists(kept):
                    x = recent.last_row(rows, stride)
                    square = x.to(self.wide).square().sum(dim=-1, keepdim=True)
                    kept.copy_(torch.cat((F.linear(x.to(w.dtype), w).to(self.wide), square), dim=1))

        self._fills["hierarchical_merge"].append(fill_kept)
        every, predicting = range(len(self.levels)), [model.predict_hierarchy_index]
        whose = every if model.hierarchy_merge_all else predicting
        dims = [self.levels[i].dim for i in whose]
        rows = zip(whose, w_out.split(dims), b_out.split(dims), strict=True)
        outs = [
            Projection(hidden, w, streams[i], self.levels[i].stride, bias=b, residual=streams[i])
            for i, w, b in rows
        ]
        decode = self.ops.decode
        return [(decode.merge, parts, w_in, weight("1.bias"), hidden), (decode.project, outs)]

    def _predict(self, model: Module, streams: list[Tensor]) -> list[tuple]:
        """Logits of the predicting level, or of all side by side."""
        every, predicting = range(len(self.levels)), [model.predict_hierarchy_index]
        whose = every if model.predict_use_all_hierarchy else predicting
        self._to_logits = self._weight(model, "to_logits.weight")
        self._end, self._ends = self._ring(1, self._to_logits.shape[1]), [None] * len(self.levels)
        columns = self._end.split([self.levels[i].dim for i in whose], dim=-1)
        norms = []
        for i, end in zip(whose, columns, strict=True):
            affine = (self._weight(model, f"norms.{i}.{name}") for name in ("weight", "bias"))
            norms.append(Norm(streams[i], *affine, end, self.levels[i].stride))
            self._ends[i] = end
        self._fills["norm_token_shift"] += [None] * len(self.levels)
        logits = Projection(self._end, self._to_logits, self.logits[:, None], 1)
        return [(self.ops.decode.norm, norms), (self.ops.decode.project, [logits])]


def filling(op: Callable, fills, recent: Recent) -> Callable:
    """The op, whose calls fill the state one after the other."""

    def call(*args, **kwargs):
        outputs = op(*args, **kwargs)
        if exists(fill := next(fills)):
            fill(args, outputs, recent)
        return outputs

    return call
