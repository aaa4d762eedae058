"""Sampling tokens from a model.

`generate` is the public function. A decoder (decoder.py) takes a token at a time and keeps what
later ones need of it; a session (session.py) samples what its decoder takes next, by CUDA graphs.
Sessions outlive the call: the next call of the same size copies the weights it finds into them.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from shtx.generation.arguments import (
    check_names,
    check_overflow,
    make_sampling,
    prompt_rows,
    seed_of,
)
from shtx.generation.tokens import from_model, from_session, until_stopped
from shtx.levels import integer
from shtx.ops import product_dtype
from shtx.plan import check_in_memory, unfused

CHECK_EVERY = 32  # tokens between two waits for the device, to see whether all rows have stopped


def generate(
    model,
    prompt: Tensor | list[Tensor],
    seq_len: int,
    temperature: float = 1.0,
    filter_thres: float = 0.9,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Generator | None = None,
    stop_token: int | None = None,
    stream: bool = False,
    use_cache: bool = True,
    overflow: str = "rebuild",
    dtype: torch.dtype | None = None,
    **kwargs,
) -> Tensor | Iterator[Tensor]:
    """Sample `seq_len` tokens after the prompt, each from the last model.seq_len tokens at most.

    A model with a module that has to be called (an adaptor, a hook: see plan.py) runs as with
    use_cache=False, with a warning. Several threads may generate from one model.

    On a GPU, what takes its second turn in a call or in later ones of the same size is captured in
    a CUDA graph: the step, the copy of the weights, and the pass over prompts of equal length, for
    their latest two lengths. Graphs keep the memory of the largest of these passes, in each of two
    sizes, until the model is gone. With hooks, compiled modules or FSDP the step alone has one.

    Args:
        model: whose method this is.
        prompt: (B, T) integers in [0, num_tokens), T >= 1, or a list of B tensors (T,) whose
            lengths may differ. Of a prompt longer than model.seq_len the last tokens count.
        seq_len: how many tokens to sample.
        temperature: of the softmax; 0 takes the most likely token.
        filter_thres: share of the vocabulary, the least likely part, that is never taken; in [0,
            1).
        top_k: how many tokens may be taken, the most likely ones, in place of filter_thres.
        top_p: of what filter_thres or top_k leaves, only the most likely tokens are taken, the
            fewest whose probabilities, after temperature, add up to top_p; in (0, 1].
        seed: the same one gives the same tokens. A generator of any device gives the seed, and
            moves on. None: PyTorch's global generator, which torch.manual_seed seeds.
        stop_token: what follows it in a row is filled with it. If all rows stop early, the result
            ends where the last of them does.
        stream: return an iterator of (B,) tokens, each there as soon as it is sampled.
        use_cache: False runs the whole model for every token, and draws as upstream does.
        overflow: what happens at model.seq_len tokens, prompt included. "rebuild": the last half of
            them becomes the prompt, for all rows when the longest is full, once in seq_len / 2
            tokens. "error": none is sampled if there would be more. "stream": goes on, in constant
            memory, if every level has a window.
        dtype: of the decoder's weights and state; None: that of the model's weights, or autocast's.
        **kwargs: for model.forward; they imply use_cache=False, which never rebuilds: each token
            is sampled from exactly the last model.seq_len.

    Returns:
        (B, seq_len) int64, without the prompt; or fewer columns, see stop_token.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """
    check_names(generate, model, kwargs)
    check_in_memory(model)
    use_cache = use_cache and not kwargs
    if use_cache and (called := unfused(model)):
        first, reason = next(iter(called.items()))
        warnings.warn(
            f"generate runs without a cache, as {first} {reason}; use_cache=False says that this is"
            " meant",
            stacklevel=2,
        )
        use_cache = False
    count = integer("seq_len", seq_len, at_least=0)
    sampling = make_sampling(model.num_tokens, temperature, filter_thres, top_k, top_p)
    if stop_token is not None and not 0 <= integer("stop_token", stop_token) < model.num_tokens:
        raise ValueError(
            f"stop_token must be in [0, num_tokens) = [0, {model.num_tokens}), got {stop_token}"
        )
    rows = prompt_rows(model, prompt)
    longest = max(map(len, rows), default=0)
    check_overflow(model, overflow, longest + count, use_cache)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype}")
    if dtype is not None and not use_cache:
        raise ValueError(f"dtype takes use_cache=True and no arguments of forward, got {dtype}")
    if longest > model.seq_len:
        warnings.warn(
            f"prompt has {longest} tokens, its last {model.seq_len} (seq_len) count", stacklevel=2
        )
        rows = [row[-model.seq_len :] for row in rows]

    if not (rows and count):
        tokens = iter(())
    elif use_cache:
        dtype = dtype or product_dtype(model.token_emb.weight)
        tokens = from_session(model, rows, count, sampling, seed_of(seed), overflow, dtype)
    else:
        generator = None if seed is None else torch.Generator(model.device)
        if generator is not None:
            generator.manual_seed(seed_of(seed))
        tokens = from_model(model, rows, count, sampling, generator, kwargs)
    if stop_token is not None:
        tokens = until_stopped(tokens, stop_token, 1 if stream else CHECK_EVERY)
    if stream:
        return tokens
    tokens = list(tokens)
    if not tokens:
        return torch.empty(len(rows), 0 if rows else count, dtype=torch.long, device=model.device)
    out = torch.stack(tokens, dim=1)
    if stop_token is None:
        return out
    return out[:, : 1 + int((out != stop_token).any(0).sum())]
