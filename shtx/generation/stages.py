"""The ops that take a token, in their order, over the state of a decoder.

Every stage of a layer is one op for all levels. A level keeps, for each of its blocks, the rows of
the residual streams that a token shift reads, and the keys and values of its window (all of them
without one); it works at every stride-th token alone.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, arange
from torch.nn import Module

from shtx.generation.state import Recent, State
from shtx.layers import exists, halves_of_qkv, norm_weights
from shtx.levels import Level
from shtx.ops import Attention, Lookup, Norm, Part, Projection

# up to so many ids, a compressing convolution is a table of their products with every tap
TABLE_IDS = 512


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


class Stages:
    """Makes the rings and copies of weights of all layers in a state, and the ops over them.

    Args:
        model: whose weights are copied.
        state: without streams yet.
        ops: of which those of one token are called.

    Attributes:
        ops_of_a_token: (op, *arguments), which follow the position.
        embedding: (V, D) copy of the token embedding.
        embeddings: ring of the last tokens' rows of it.
        to_logits: (V, D) copy of the head.
        end: ring (B, 1, D) that the head reads.
        ends: the columns of it that a level writes, by level.
    """

    def __init__(self, model: Module, state: State, ops: SimpleNamespace):
        self.state, self.levels, self.ops = state, state.levels, ops.decode
        weights = state.weights(model, lambda model: model.token_weights())
        self.embedding, self.to_logits = weights["embedding"], weights["to_logits"]
        streams = [state.stream(level) for level in self.levels]
        stages = self._embed(model, streams)
        for layer in range(len(model.layers)):
            stages += self._blocks(model, layer, streams)
            if model.need_hierarchical_merge:
                stages += self._merge(model, layer, streams)
        self.ops_of_a_token = stages + self._predict(model, streams)

    def _embed(self, model: Module, streams: list[Tensor]) -> list[tuple]:
        """Level tokens: of the ids, or of the last embeddings where tables would be large."""
        ring, (V, D) = self.state.ring, self.embedding.shape
        taps = max(level.compress for level in self.levels) if V > TABLE_IDS else 1
        self.embeddings = ring(taps, D)
        lookups, convs, outs, norms = [], [], [], []
        if taps > 1:
            lookups.append(Lookup(self.embedding[None], None, None, self.embeddings, 1))

        def read(model, i):
            embedding, norm = model.token_emb.weight, model.post_token_emb_norms[i]
            return model.compressors[i].token_weights(embedding, norm, as_table=taps == 1)

        for i, (level, stream) in enumerate(zip(self.levels, streams, strict=True)):
            w, step = self.state.weights(model, lambda model, i=i: read(model, i)), level.stride
            if level.compress == 1:
                lookups.append(Lookup(w["table"], None, None, stream, step))
                continue
            inner, tokens = ring(1, 4 * D), ring(1, level.dim)
            silu = dict(bias=w["conv_bias"], activation="silu", out=inner, stride=step)
            if taps > 1:
                rows = dict(x=self.embeddings, weight=w["rows"], taps=level.compress)
                convs.append(Projection(**rows, **silu))
            else:
                lookups.append(Lookup(table=w["table"], **silu))
            outs.append(Projection(inner, w["out"], tokens, step, bias=w["out_bias"]))
            norms.append(Norm(tokens, w["gamma"], w["beta"], stream, step))
        ops = self.ops
        stages = [(ops.embed, self.state.ids, self.state.history, lookups)]
        return stages + [(ops.project, convs), (ops.project, outs), (ops.norm, norms)]

    def _blocks(self, model: Module, layer: int, streams: list[Tensor]) -> list[tuple]:
        """The blocks of a layer. They replace the streams by those they write."""
        qkvs, attentions, attn_outs, ff_ins, ff_outs = [], [], [], [], []
        ring, weights = self.state.ring, self.state.weights
        for i, level in enumerate(self.levels):
            attn, step = model.layers[layer][i].attn, level.stride
            if exists(attn):
                w = weights(model, lambda model, i=i: model.layers[layer][i].attn.token_weights())
                inner = attn.heads * level.dim_head
                qkv, attended = ring(1, 3 * inner), ring(1, inner)
                bias = w.get("bias")
                norm = dict(norm="layer" if exists(bias) else "rms", bias=bias)
                shifted = self._shifted(streams[i], layer, i, "attn")
                qkvs.append(Projection(**shifted, **norm, weight=w["qkv"], out=qkv))
                attentions.append(self._attention(layer, i, attn.heads, qkv, attended))
                x, streams[i] = streams[i], self.state.stream(level)
                attn_outs.append(Projection(attended, w["out"], streams[i], step, residual=x))
            w = weights(model, lambda model, i=i: model.layers[layer][i].ff.token_weights())
            hidden = ring(1, len(w["in"]))
            shifted = self._shifted(streams[i], layer, i, "ff")
            ff = dict(weight=w["in"], out=hidden, norm="rms", activation="gelu")
            ff_ins.append(Projection(**shifted, **ff))
            x, streams[i] = streams[i], self.state.stream(level)
            ff_outs.append(Projection(hidden, w["out"], streams[i], step, residual=x))
        ops = self.ops
        return [
            (ops.project, qkvs),
            (ops.attend, attentions),
            (ops.project, attn_outs),
            (ops.project, ff_ins),
            (ops.project, ff_outs),
        ]

    def _shifted(self, stream: Tensor, layer: int, i: int, what: str) -> dict:
        """A norm of the shifted stream of level i, as an argument of `Projection`."""
        level = self.levels[i]

        def fill(x: Tensor, recent: Recent):
            recent.fill(stream, x, level.stride)

        self.state.fills[layer, i, what] = fill
        return dict(x=stream, stride=level.stride, dilation=level.dilation)

    def _attention(self, layer: int, i: int, heads: int, qkv: Tensor, out: Tensor) -> Attention:
        state, level = self.state, self.levels[i]
        tokens = -(-state.length // level.stride)
        keys = -(-tokens // level.dilation) if level.window is None else level.window + 1
        kv = state.ring(keys * level.dilation, 2, heads, level.dim_head)
        table = rotation(level, keys, state.device).to(state.wide)

        def fill(x: Tensor, recent: Recent):
            rows = halves_of_qkv(x, level, heads).unflatten(-1, (3, heads, level.dim_head))
            recent.fill(kv, rows[:, :, 1:], level.stride)

        state.fills[layer, i, "qkv"] = fill
        return Attention(qkv, kv, out, table, level.stride, level.dilation)

    def _merge(self, model: Module, layer: int, streams: list[Tensor]) -> list[tuple]:
        read = lambda model: model.hierarchical_merges[layer].token_weights()
        w, dims = self.state.weights(model, read), [level.dim for level in self.levels]
        hidden = self.state.ring(1, len(w["in"]))
        columns = zip(streams, w["in"].split(dims, dim=1), strict=True)
        parts = [self._part(layer, i, *of_level) for i, of_level in enumerate(columns)]
        whose = range(len(dims)) if model.hierarchy_merge_all else [model.predict_hierarchy_index]
        split = [w[name].split([dims[i] for i in whose]) for name in ("out", "out_bias")]
        outs = [
            Projection(hidden, out, streams[i], self.levels[i].stride, bias=b, residual=streams[i])
            for i, out, b in zip(whose, *split, strict=True)
        ]
        merge = self.ops.merge, parts, w["in"], w["in_bias"], hidden
        return [merge, (self.ops.project, outs)]

    def _part(self, layer: int, i: int, stream: Tensor, columns: Tensor) -> Part:
        """The part of level i in a merge, of which these (J, D) are the columns."""
        stride, wide = self.levels[i].stride, self.state.wide
        if stride == 1:
            return Part(stream, None, stride)
        kept = self.state.ring(1, len(columns) + 1, dtype=wide)[:, 0]

        def fill(x: Tensor, recent: Recent):
            x = recent.last_row(x, stride)
            square = x.to(wide).square().sum(dim=-1, keepdim=True)
            product = F.linear(x.to(columns.dtype), columns).to(wide)
            kept.copy_(torch.cat((product, square), dim=1))

        self.state.fills[layer, i, "merge"] = fill
        return Part(stream, kept, stride)

    def _predict(self, model: Module, streams: list[Tensor]) -> list[tuple]:
        """Logits of the predicting level, or of all side by side."""
        every, predicting = range(len(self.levels)), [model.predict_hierarchy_index]
        whose = every if model.predict_use_all_hierarchy else predicting
        self.end = self.state.ring(1, self.to_logits.shape[1])
        columns = self.end.split([self.levels[i].dim for i in whose], dim=-1)
        self.ends = dict(zip(whose, columns, strict=True))
        norms = []
        for i, end in self.ends.items():
            w = self.state.weights(model, lambda model, i=i: norm_weights(model.norms[i]))
            norms.append(Norm(streams[i], w["gamma"], w["beta"], end, self.levels[i].stride))
        logits = Projection(self.end, self.to_logits, self.state.logits[:, None], 1)
        return [(self.ops.norm, norms), (self.ops.project, [logits])]
