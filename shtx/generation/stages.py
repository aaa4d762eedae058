"""The ops that take a token, in their order, over the state of a decoder.

Every stage of a layer is one op for all levels. A level keeps, for each of its blocks, the rows of
the residual streams that a token shift reads, and the keys and values of its window (all of them
without one); it works at every stride-th token alone.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from shtx.generation.state import State
from shtx.generation.weights import (
    conv_rows,
    conv_table,
    halves_of_qkv,
    merge_rows,
    qkv_rows,
    rotation,
    token_table,
    whole,
)
from shtx.layers import WindowAttention, exists
from shtx.levels import Level
from shtx.ops import Attention, Lookup, Norm, Part, Projection

# up to so many ids, a compressing convolution is a table of their products with every tap
TABLE_IDS = 512


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
        ends: each level's ring that the head reads, None where it reads none.
        end: ring of all ends side by side.
        to_logits: (V, D) copy of the head.
    """

    def __init__(self, model: Module, state: State, ops: SimpleNamespace):
        self.state, self.ops = state, ops.decode
        streams = [state.stream(level) for level in state.levels]
        stages = self._embed(model, streams)
        for layer in range(len(model.layers)):
            stages += self._blocks(model, layer, streams)
            if model.need_hierarchical_merge:
                stages += self._merge(model, layer, streams)
        self.ops_of_a_token = stages + self._predict(model, streams)

    def _shifted(self, stream: Tensor, level: Level) -> dict:
        """A norm of a stream, as an argument of `Projection`; a pass over a prompt fills it."""
        self.state.fills["norm_token_shift"].append(
            lambda args, outputs, recent: recent.fill(stream, outputs[0], level.stride)
        )
        return dict(x=stream, stride=level.stride, dilation=level.dilation)

    def _embed(self, model: Module, streams: list[Tensor]) -> list[tuple]:
        """Level tokens: of the ids, or of the last embeddings where tables would be large."""
        V, D = model.token_emb.weight.shape
        taps = max(level.compress for level in self.state.levels) if V > TABLE_IDS else 1
        self.embedding, self.embeddings = (
            self.state.weight(model, "token_emb.weight"),
            self.state.ring(taps, D),
        )
        lookups, convs, outs, norms = [], [], [], []
        if taps > 1:
            lookups.append(Lookup(self.embedding[None], None, None, self.embeddings, 1))
        for i, (level, stream) in enumerate(zip(self.state.levels, streams, strict=True)):
            self.state.fills["norm_token_shift"].append(None)
            copy = lambda read, i=i: self.state.copy(model, lambda model: read(model, i))
            step = level.stride
            if level.compress == 1:
                lookups.append(Lookup(copy(token_table), None, None, stream, step))
                continue
            weight = lambda name: self.state.weight(model, name)
            name, norm = f"compressors.{i}.compress_fn", f"post_token_emb_norms.{i}"
            inner, tokens = self.state.ring(1, 4 * D), self.state.ring(1, level.dim)
            silu = dict(
                bias=weight(f"{name}.1.conv.bias"), activation="silu", out=inner, stride=step
            )
            if taps > 1:
                rows = dict(x=self.embeddings, weight=copy(conv_rows), taps=level.compress)
                convs.append(Projection(**rows, **silu))
            else:
                lookups.append(Lookup(table=copy(conv_table), **silu))
            w_out = self.state.copy(
                model, lambda model, name=name: whole(model, f"{name}.3.weight")[..., 0]
            )
            bias = weight(f"{name}.3.bias")
            outs.append(Projection(inner, w_out, tokens, step, bias=bias))
            norms.append(
                Norm(tokens, weight(f"{norm}.weight"), weight(f"{norm}.bias"), stream, step)
            )
        ops = self.ops
        stages = [(ops.embed, self.state.ids, self.state.history, lookups)]
        return stages + [(ops.project, convs), (ops.project, outs), (ops.norm, norms)]

    def _blocks(self, model: Module, layer: int, streams: list[Tensor]) -> list[tuple]:
        """The blocks of a layer. They replace the streams by those they write."""
        qkvs, attentions, attn_outs, ff_ins, ff_outs = [], [], [], [], []
        for i, level in enumerate(self.state.levels):
            weight = lambda name, i=i: self.state.weight(model, f"layers.{layer}.{i}.{name}")
            attn, step = model.layers[layer][i].attn, level.stride
            if exists(attn):
                inner = attn.heads * level.dim_head
                qkv, attended = self.state.ring(1, 3 * inner), self.state.ring(1, inner)
                norm = dict(norm="rms")
                if isinstance(attn, WindowAttention):
                    norm = dict(norm="layer", beta=weight("attn.norm.bias"))
                gamma = weight("attn.norm." + ("weight" if "beta" in norm else "gamma"))
                shifted = self._shifted(streams[i], level)
                rows = self.state.copy(model, lambda model, i=i: qkv_rows(model, layer, i))
                qkvs.append(Projection(**shifted, **norm, gamma=gamma, weight=rows, out=qkv))
                attentions.append(self._attention(level, attn.heads, qkv, attended))
                x, streams[i] = streams[i], self.state.stream(level)
                w_out = weight("attn.to_out.weight")
                attn_outs.append(Projection(attended, w_out, streams[i], step, residual=x))
            w_in = weight("ff.net.1.weight")
            hidden = self.state.ring(1, len(w_in))
            ff = dict(gamma=weight("ff.net.0.gamma"), weight=w_in, out=hidden)
            shifted = self._shifted(streams[i], level)
            ff_ins.append(Projection(**shifted, **ff, norm="rms", activation="gelu"))
            x, streams[i] = streams[i], self.state.stream(level)
            ff_outs.append(
                Projection(hidden, weight("ff.net.3.weight"), streams[i], step, residual=x)
            )
        ops = self.ops
        return [
            (ops.project, qkvs),
            (ops.attend, attentions),
            (ops.project, attn_outs),
            (ops.project, ff_ins),
            (ops.project, ff_outs),
        ]

    def _attention(self, level: Level, heads: int, qkv: Tensor, out: Tensor) -> Attention:
        tokens = -(-self.state.length // level.stride)
        keys = -(-tokens // level.dilation) if level.window is None else level.window + 1
        kv = self.state.ring(keys * level.dilation, 2, heads, level.dim_head)
        table = rotation(level, keys, self.state.device).to(self.state.wide)

        def fill_kv(args, outputs, recent):
            qkv = halves_of_qkv(args[0], level, heads)
            rows = qkv.unflatten(-1, (3, heads, level.dim_head))[:, :, 1:]
            recent.fill(kv, rows, level.stride)

        self.state.fills["rotary_attention"].append(fill_kv)
        return Attention(qkv, kv, out, table, level.stride, level.dilation)

    def _merge(self, model: Module, layer: int, streams: list[Tensor]) -> list[tuple]:
        weight = lambda name: self.state.weight(model, f"hierarchical_merges.{layer}.net.{name}")
        w_in = self.state.copy(model, lambda model: merge_rows(model, layer))
        w_out, b_out = weight("3.weight"), weight("3.bias")
        hidden = self.state.ring(1, len(w_in))
        parts = []
        for x, level in zip(streams, self.state.levels, strict=True):
            kept = (
                self.state.ring(1, len(w_in) + 1, dtype=self.state.wide)[:, 0]
                if level.stride > 1
                else None
            )
            parts.append(Part(x, kept, level.stride))

        def fill_kept(args, outputs, recent):
            columns = w_in.split([level.dim for level in self.state.levels], dim=1)
            for rows, w, (_, kept, stride) in zip(outputs[0], columns, parts, strict=True):
                if exists(kept):
                    x = recent.last_row(rows, stride)
                    square = x.to(self.state.wide).square().sum(dim=-1, keepdim=True)
                    kept.copy_(
                        torch.cat((F.linear(x.to(w.dtype), w).to(self.state.wide), square), dim=1)
                    )

        self.state.fills["hierarchical_merge"].append(fill_kept)
        every, predicting = range(len(self.state.levels)), [model.predict_hierarchy_index]
        whose = every if model.hierarchy_merge_all else predicting
        dims = [self.state.levels[i].dim for i in whose]
        rows = zip(whose, w_out.split(dims), b_out.split(dims), strict=True)
        outs = [
            Projection(
                hidden, w, streams[i], self.state.levels[i].stride, bias=b, residual=streams[i]
            )
            for i, w, b in rows
        ]
        ops = self.ops
        return [(ops.merge, parts, w_in, weight("1.bias"), hidden), (ops.project, outs)]

    def _predict(self, model: Module, streams: list[Tensor]) -> list[tuple]:
        """Logits of the predicting level, or of all side by side."""
        every, predicting = range(len(self.state.levels)), [model.predict_hierarchy_index]
        whose = every if model.predict_use_all_hierarchy else predicting
        self.to_logits = self.state.weight(model, "to_logits.weight")
        self.end, self.ends = (
            self.state.ring(1, self.to_logits.shape[1]),
            [None] * len(self.state.levels),
        )
        columns = self.end.split([self.state.levels[i].dim for i in whose], dim=-1)
        norms = []
        for i, end in zip(whose, columns, strict=True):
            affine = (self.state.weight(model, f"norms.{i}.{name}") for name in ("weight", "bias"))
            norms.append(Norm(streams[i], *affine, end, self.state.levels[i].stride))
            self.ends[i] = end
        self.state.fills["norm_token_shift"] += [None] * len(self.state.levels)
        logits = Projection(self.end, self.to_logits, self.state.logits[:, None], 1)
        return [(self.ops.norm, norms), (self.ops.project, [logits])]
