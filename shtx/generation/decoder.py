"""The model one token at a time, from a state that keeps of the past what later tokens read."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from shtx.generation.stages import Stages
from shtx.generation.state import Recent, State
from shtx.layers import exists


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
        self.ops = ops or model.ops_for(model.device)
        with torch.no_grad():
            self._state = State(model, batch, length, dtype)
            self._stages = Stages(model, self._state, self.ops)
        self.ids, self.position = self._state.ids, self._state.position
        self.logits = self._state.logits

    @property
    def state_bytes(self) -> int:
        """The size of the state of one sequence."""
        return self._state.nbytes // max(1, len(self.ids))

    def refresh(self, model: Module) -> None:
        """Take the weights that the model has now."""
        with torch.no_grad():
            self._state.refresh(model)

    def step(self) -> Tensor:
        """Take `ids`, one token of every sequence.

        Returns:
            `logits`, written over by the next call.
        """
        with torch.no_grad(), torch.autocast(self.ids.device.type, enabled=False):
            for op, *arguments in self._stages.ops_of_a_token:
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
        state, stages = self._state, self._stages
        lengths = prompt.new_full((len(self.ids),), prompt.shape[1]) if lengths is None else lengths
        recent, ops = Recent(lengths), SimpleNamespace(**vars(self.ops))
        for name, fills in state.fills.items():
            setattr(ops, name, filling(getattr(ops, name), iter(fills), recent))
        narrow = state.dtype != model.token_emb.weight.dtype
        with torch.no_grad(), torch.autocast(state.device.type, state.dtype, enabled=narrow):
            # upstream, too, runs forward alone; FSDP2 gathers the weights in hooks of a call
            run = model if hasattr(model, "unshard") else model.forward
            plan = model.plan(ops, checked=True)
            embeds = run(prompt, return_hierarchical_embeds=True, plan=plan)
        for end, rows, level in zip(stages.ends, embeds, state.levels, strict=True):
            if exists(end):
                recent.fill(end, rows, level.stride)
        recent.fill(state.history, prompt)
        recent.fill(stages.embeddings, F.embedding(prompt, stages.embedding))
        self.logits.copy_(F.linear(stages.end[:, 0], stages.to_logits))
        self.position.copy_(lengths)
        return self.logits


def filling(op: Callable, fills, recent: Recent) -> Callable:
    """The op, whose calls fill the state one after the other."""

    def call(*args, **kwargs):
        outputs = op(*args, **kwargs)
        if exists(fill := next(fills)):
            fill(args, outputs, recent)
        return outputs

    return call
