"""The model one token at a time, from a state that keeps of the past what later tokens read."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from shtx.generation.stages import Stages
from shtx.generation.state import Recent, State
from shtx.layers import exists
from shtx.plan import unfused


class Decoder:
    """Weights and state of a model for generating: of `batch` sequences, each of up to `length`
    tokens, or of any number where no level has full attention.

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
        """Start over with a prompt: the model's own forward, which leaves what the state needs.

        Args:
            model: whose weights these are.
            prompt: (B, T) int64.
            lengths: (B,), how many of the T tokens a sequence has; all by default.

        Returns:
            `logits`.

        Raises:
            ValueError: for a model with a module that has to be called, see plan.py.
        """
        state, stages = self._state, self._stages
        lengths = prompt.new_full((len(self.ids),), prompt.shape[1]) if lengths is None else lengths
        recent = Recent(lengths)

        def take(name: tuple[int, int, str], x: Tensor):
            if exists(fill := state.fills.get(name)):
                fill(x, recent)

        narrow = state.dtype != model.token_emb.weight.dtype
        with torch.no_grad(), torch.autocast(state.device.type, state.dtype, enabled=narrow):
            # upstream, too, runs forward alone; FSDP2 gathers the weights in hooks of a call
            run = model if hasattr(model, "unshard") else model.forward
            plan = model.plan(self.ops, checked=True, take=take)
            if plan.called:  # these leave nothing, and their weights are not all that they do
                name, reason = next(iter(unfused(model).items()))
                raise ValueError(
                    f"model must run by its own weights alone, got {name}, which {reason}"
                )
            embeds = run(prompt, return_hierarchical_embeds=True, plan=plan)
        for i, end in stages.ends.items():
            recent.fill(end, embeds[i], state.levels[i].stride)
        recent.fill(state.history, prompt)
        recent.fill(stages.embeddings, F.embedding(prompt, stages.embedding))
        self.logits.copy_(F.linear(stages.end[:, 0], stages.to_logits))
        self.position.copy_(lengths)
        return self.logits
