"""Tokens that are sampled, one (B,) at a time: of a session, or of whole forwards."""

import threading
from collections import deque
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, cat
from torch.nn.utils.rnn import pad_sequence

from shtx.generation.arguments import Sampling
from shtx.generation.session import Session
from shtx.internals import parameters_below

MAX_SESSIONS = 2  # kept for a model
SHORTEST = 128  # tokens that a decoder has room for; the next longer ones have twice as many

_sessions = WeakKeyDictionary()  # model: {key: session}, oldest first; not on the model: copies
_sessions_lock = threading.Lock()


def from_session(
    model, rows: list[Tensor], count: int, sampling: Sampling, seed: int, overflow: str, dtype
) -> Iterator[Tensor]:
    """Tokens of a session, whose decoder takes every one in once."""
    taken = max(map(len, rows))
    room = SHORTEST
    while room < taken + count - 1:  # the last token is not taken in
        room *= 2
    room = min(room, model.seq_len)  # enough for any number without full attention
    window = float("inf") if overflow == "stream" else model.seq_len
    shapes = tuple(p.shape for p in parameters_below(model))
    key = (len(rows), room, dtype, model.impl, model.device, model.way, shapes)
    with _sessions_lock:  # out of sight of other calls while this one is at work
        session = _sessions.setdefault(model, {}).pop(key, None)
    if session is None:
        session = Session(model, len(rows), room, dtype)
    session.start(model, rows, sampling, seed)
    try:
        recent = deque(maxlen=max(1, model.seq_len // 2))
        for i in range(count):
            if i and taken < window:
                session.step()
                taken += 1
            elif i:
                new = torch.stack(tuple(recent), dim=1)
                if len(recent) < recent.maxlen:
                    pairs = zip(rows, new, strict=True)
                    new = [cat((row, more))[-recent.maxlen :] for row, more in pairs]
                rows = list(new)
                recent.clear()
                session.prefill(model, rows)
                taken = max(map(len, rows))
            recent.append(session.ids.clone())
            yield recent[-1]
    finally:
        with _sessions_lock:
            kept = _sessions.setdefault(model, {})
            kept[key] = session
            while len(kept) > MAX_SESSIONS:
                del kept[next(iter(kept))]


@torch.no_grad()
def from_model(
    model,
    rows: list[Tensor],
    count: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    kwargs: dict,
) -> Iterator[Tensor]:
    """Tokens of whole forwards, each of the last model.seq_len tokens."""
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


def until_stopped(tokens: Iterator[Tensor], stop_token: int, check_every: int):
    """The tokens, those after a row's stop_token being stop_token, until all rows have had it."""
    stopped = None
    for i, ids in enumerate(tokens, start=1):
        if stopped is not None:
            ids = ids.masked_fill(stopped, stop_token)
        stopped = ids == stop_token
        yield ids
        if i % check_every == 0 and bool(stopped.all()):
            return
