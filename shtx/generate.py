"""Sampling tokens from a model.

A decoder takes a token at a time and keeps what later ones need of it. Decoders outlive the call,
with their CUDA graphs: the next call of the same size copies the weights it finds into them.
"""

import inspect
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from difflib import get_close_matches
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, cat
from torch.nn.utils.rnn import pad_sequence

from shtx.levels import integer
from shtx.ops import product_dtype
from shtx.plan import check_in_memory, unfused
from shtx.sampler import Sampler
from shtx.sampling import Sampling, make_sampling

MAX_DECODERS = 2  # kept for a model
SHORTEST = 128  # tokens that a decoder has room for; the next longer ones have twice as many
CHECK_EVERY = 32  # tokens between two waits for the device, to see whether all rows have stopped
OVERFLOWS = ("rebuild", "error", "stream")
# Parameters of generate and of model.forward that are no keywords of a call of generate.
NO_KEYWORDS = {
    *("self", "ids", "plan", "return_loss", "labels", "loss_reduction", "model", "kwargs"),
}

_decoders = WeakKeyDictionary()  # model: {key: sampler}, oldest first; not on the model: copies
_decoders_lock = threading.Lock()


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
    _check_names(model, kwargs)
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
    rows = _rows(model, prompt)
    longest = max(map(len, rows), default=0)
    _check_overflow(model, overflow, longest + count, use_cache)
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
        tokens = _from_decoder(model, rows, count, sampling, _seed(seed), overflow, dtype)
    else:
        generator = None if seed is None else torch.Generator(model.device)
        if generator is not None:
            generator.manual_seed(_seed(seed))
        tokens = _from_model(model, rows, count, sampling, generator, kwargs)
    if stop_token is not None:
        tokens = _until_stopped(tokens, stop_token, 1 if stream else CHECK_EVERY)
    if stream:
        return tokens
    tokens = list(tokens)
    if not tokens:
        return torch.empty(len(rows), 0 if rows else count, dtype=torch.long, device=model.device)
    out = torch.stack(tokens, dim=1)
    if stop_token is None:
        return out
    return out[:, : 1 + int((out != stop_token).any(0).sum())]


# arguments


def _check_names(model, kwargs: dict):
    """Raise a TypeError for a keyword that neither generate nor model.forward takes."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    forward = parameters.keys() - NO_KEYWORDS
    for name in kwargs.keys() - forward:
        own = inspect.signature(generate).parameters.keys() - NO_KEYWORDS
        nearest = get_close_matches(name, sorted(own | forward), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"generate() got an unexpected keyword argument {name!r}{hint}")


def _rows(model, prompt: Tensor | list[Tensor]) -> list[Tensor]:
    """The prompts as int64 tensors (T,), or an error that says what is wrong with them."""
    shape = lambda p: str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__
    is_list = isinstance(prompt, (list, tuple))
    rows = list(prompt) if is_list or isinstance(prompt, Tensor) and prompt.ndim == 2 else [None]
    if not all(isinstance(row, Tensor) and row.ndim == 1 and len(row) for row in rows):
        raise ValueError(
            "prompt must be (batch, tokens) with at least one token, or a list of (tokens,),"
            f" got {', '.join(map(shape, rows)) if is_list else shape(prompt)}"
        )
    for row in rows:
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"prompt must have integers, got {row.dtype}")
        if row.device != model.device:
            raise ValueError(f"prompt must be on the model's {model.device}, got {row.device}")
    rows = [row.long() for row in rows]
    if rows:
        low, high = torch.stack(cat(rows).aminmax()).tolist()
        if low < 0 or high >= model.num_tokens:
            raise ValueError(
                f"prompt: ids must be in [0, num_tokens) = [0, {model.num_tokens}),"
                f" got {low if low < 0 else high}"
            )
    return rows


def _check_overflow(model, overflow: str, total: int, use_cache: bool):
    if overflow not in OVERFLOWS:
        raise ValueError(
            f"overflow must be one of {', '.join(map(repr, OVERFLOWS))}, got {overflow!r}"
        )
    if overflow == "error" and total > model.seq_len:
        raise ValueError(
            'prompt and seq_len must be at most model.seq_len tokens for overflow="error",'
            f" {model.seq_len}, got {total}"
        )
    if overflow == "stream":
        full = [level.compress for level in model.levels if level.window is None]
        if full:
            raise ValueError(
                'overflow="stream" takes a window for every hierarchy, got full attention for'
                f" {', '.join(map(str, full))}"
            )
        if not use_cache:
            raise ValueError('overflow="stream" takes use_cache=True and no arguments of forward')


def _seed(seed: int | torch.Generator | None) -> int:
    if seed is None or isinstance(seed, torch.Generator):
        device = "cpu" if seed is None else seed.device
        return int(torch.randint(2**63 - 1, (), generator=seed, device=device))
    seed = integer("seed", seed, at_least=0)
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {seed}")
    return seed


# tokens, one (B,) at a time


def _from_decoder(
    model, rows: list[Tensor], count: int, sampling: Sampling, seed: int, overflow: str, dtype
) -> Iterator[Tensor]:
    taken = max(map(len, rows))
    room = SHORTEST
    while room < taken + count - 1:  # the last token is not taken in
        room *= 2
    room = min(room, model.seq_len)  # enough for any number without full attention
    window = float("inf") if overflow == "stream" else model.seq_len
    shapes = tuple(p.shape for p in model.parameters())
    key = (len(rows), room, dtype, model.impl, model.device, model.way, shapes)
    with _decoders_lock:  # out of sight of other calls while this one is at work
        sampler = _decoders.setdefault(model, {}).pop(key, None)
    if sampler is None:
        sampler = Sampler(model, len(rows), room, dtype)
    sampler.start(model, rows, sampling, seed)
    try:
        recent = deque(maxlen=max(1, model.seq_len // 2))
        for i in range(count):
            if i and taken < window:
                sampler.step()
                taken += 1
            elif i:
                new = torch.stack(tuple(recent), dim=1)
                if len(recent) < recent.maxlen:
                    pairs = zip(rows, new, strict=True)
                    new = [cat((row, more))[-recent.maxlen :] for row, more in pairs]
                rows = list(new)
                recent.clear()
                sampler.prefill(model, rows)
                taken = max(map(len, rows))
            recent.append(sampler.ids.clone())
            yield recent[-1]
    finally:
        with _decoders_lock:
            kept = _decoders.setdefault(model, {})
            kept[key] = sampler
            while len(kept) > MAX_DECODERS:
                del kept[next(iter(kept))]


@torch.no_grad()
def _from_model(
    model,
    rows: list[Tensor],
    count: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    kwargs: dict,
) -> Iterator[Tensor]:
    stride = model.h_strides[model.predict_hierarchy_index]
    stride = 1 if model.predict_use_all_hierarchy else stride
    for _ in range(count):
        rows = [row[-model.seq_len :] for row in rows]
        last = torch.tensor([(len(row) - 1) // stride for row in rows], device=model.device)
        was_training = model.training
        model.eval()
        try:
            # called, not .forward(): FSDP gathers the weights in a hook
            logits = model(pad_sequence(rows, batch_first=True), **kwargs)
        finally:
            model.train(was_training)
        logits = logits[torch.arange(len(rows), device=model.device), last].float()
        noise = torch.zeros_like(logits).uniform_(0, 1, generator=generator)
        ids, noise = torch.empty_like(last), -noise.clamp(min=1e-20).log()
        model.ops_for(model.device).decode.sample(last, logits, noise[:, None], *sampling, ids)
        rows = [cat((row, ids[b : b + 1])) for b, row in enumerate(rows)]
        yield ids


def _until_stopped(tokens: Iterator[Tensor], stop_token: int, check_every: int):
    """The tokens, those after a row's stop_token being stop_token, until all rows have had it."""
    stopped = None
    for i, ids in enumerate(tokens, start=1):
        if stopped is not None:
            ids = ids.masked_fill(stopped, stop_token)
        stopped = ids == stop_token
        yield ids
        if i % check_every == 0 and bool(stopped.all()):
            return
