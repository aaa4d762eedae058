"""Sampling text from a model."""

import torch
from torch import Tensor, cat

from shtx.levels import integer


def top_k(logits: Tensor, thres: float) -> Tensor:
    """Logits (B, V): the best (1 - thres) V, at least one, are kept, the rest set to the least."""
    k = max(1, int((1 - thres) * logits.shape[-1]))
    values, indices = logits.topk(k)
    lowest = torch.full_like(logits, -torch.finfo(logits.dtype).max)
    return lowest.scatter(1, indices, values)


def gumbel_sample(logits: Tensor, temperature: float) -> Tensor:
    """One id a row of logits (B, V), drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    log = lambda t: t.clamp(min=1e-20).log()
    noise = -log(-log(torch.zeros_like(logits).uniform_(0, 1)))
    return (logits / max(temperature, 1e-10) + noise).argmax(dim=-1)


@torch.no_grad()
def generate(
    model,
    prompt: Tensor,
    seq_len: int,
    temperature: float = 1.0,
    filter_thres: float = 0.9,
    **kwargs,
) -> Tensor:
    """Sample `seq_len` tokens after the prompt, each from the last model.seq_len tokens before it.

    Args:
        prompt: (B, T) integers in [0, num_tokens), T >= 1.
        seq_len: how many tokens to sample.
        temperature: of the softmax; 0 takes the most likely token.
        filter_thres: share of the vocabulary, the least likely part, that is never taken; in [0,
            1).
        **kwargs: for model.forward.

    Returns:
        (B, seq_len) int64, without the prompt.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """
    seq_len = integer("seq_len", seq_len, at_least=0)
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 <= filter_thres < 1:
        raise ValueError(f"filter_thres must be in [0, 1), got {filter_thres}")
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or prompt.shape[1] == 0:
        got = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise ValueError(f"prompt must be (batch, tokens) with at least one token, got {got}")

    was_training = model.training
    model.eval()
    try:
        out = prompt
        for _ in range(seq_len):
            # called, not .forward(): FSDP gathers the weights in a hook
            logits = model(out[:, -model.seq_len :], **kwargs)[:, -1].float()
            sample = gumbel_sample(top_k(logits, filter_thres), temperature)
            out = cat((out, sample[:, None]), dim=-1)
    finally:
        model.train(was_training)
    return out[:, prompt.shape[1] :].long()
