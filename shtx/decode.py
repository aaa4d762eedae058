"""TEMPORARY stand-in for the decoder: it keeps the ids and runs the whole model."""

import weakref

import torch
from torch import Tensor


class Decoder:
    def __init__(self, model, batch: int, length: int, dtype: torch.dtype | None = None):
        self.length, self.dtype, self.device = length, dtype, model.device
        new = lambda *shape, **kw: torch.zeros(*shape, device=model.device, **kw)
        self.ids, self.position = (new(batch, dtype=torch.long) for _ in range(2))
        self.logits = new(batch, model.num_tokens, dtype=dtype)
        self.taken = new(batch, length, dtype=torch.long)
        self.refresh(model)

    def refresh(self, model):
        self.model = weakref.ref(model)

    def prefill(self, prompt: Tensor, lengths: Tensor | None = None) -> Tensor:
        B, T = prompt.shape
        self.taken[:, :T] = prompt
        self.position.copy_(torch.full((B,), T) if lengths is None else lengths)
        return self.run()

    def step(self) -> Tensor:
        assert int(self.position.max()) < self.length
        self.taken[torch.arange(len(self.ids)), self.position] = self.ids
        self.position += 1
        return self.run()

    def run(self) -> Tensor:
        model = self.model()
        seq_len, model.seq_len = model.seq_len, max(model.seq_len, self.length)
        narrow = self.dtype not in (None, model.token_emb.weight.dtype)
        try:
            with torch.autocast(self.device.type, self.dtype if narrow else None, enabled=narrow):
                logits = model(self.taken[:, : int(self.position.max())])
        finally:
            model.seq_len = seq_len
        self.logits.copy_(logits[torch.arange(len(self.ids)), self.position - 1])
        return self.logits
