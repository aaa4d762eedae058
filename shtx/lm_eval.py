"""A byte-level model in EleutherAI's lm-evaluation-harness, as the model "shtx".

    python -m shtx.lm_eval run --model shtx --model_args checkpoint=runs/enwik8 --tasks wikitext

is the harness's own command after an import of this page, which registers the model. It comes with
the extra `lm-eval`.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shtx.levels import integer
from shtx.model import Trunk

BATCH_SIZE = 16
MAX_BYTES = 256  # that generate_until makes at most, if a task does not say
START = b"\n"  # what generate_until begins an empty text with
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
SAMPLING = ("temperature", "top_k", "top_p")
IGNORED = ("do_sample", "until", "max_gen_toks")


class Piece(NamedTuple):
    """Some bytes, of which those from `start` on are scored, given the ones before them."""

    ids: bytes
    start: int


class Scored(NamedTuple):
    log_probability: float  # in nats
    is_greedy: bool  # whether each byte was the most likely one


@register_model("shtx")
class ByteLM(LM):
    """A model of 256 tokens, which are bytes of UTF-8.

    The first byte of a text that has nothing before it counts 8 bits, as in `shtx eval`.

    Args:
        checkpoint: a run of `shtx train`, for its newest checkpoint, or one of its checkpoints.
        model: in place of a checkpoint, a model that predicts every byte.
        device: of a checkpoint's model; None: a GPU, if there is one.
        batch_size: texts at a time; "auto" is 16.
        stride: by how many bytes windows over a text longer than the model's seq_len go on; None:
            seq_len, as other models of the harness. A smaller one takes longer, and tells more of
            what the model knows.
        dtype: of autocast: "bf16", "fp16" or "fp32", which has none; None: bf16 on a GPU.
        max_batch_size: is handed over by the harness, and not needed.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
        shtx.train.TrainError: in one line why there is no checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        model: Trunk | None = None,
        device: str | None = None,
        batch_size: int | str = BATCH_SIZE,
        stride: int | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if (checkpoint is None) == (model is None):
            raise ValueError(f"checkpoint or model must be given, got {checkpoint} and {model}")
        if model is None:
            from shtx.train.trainer import load_model

            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model, _ = load_model(Path(os.path.abspath(checkpoint)), torch.device(device))
        if model.num_tokens != 256:
            raise ValueError(f"model must have the 256 tokens of bytes, got {model.num_tokens}")
        self.model, self._device = model.eval(), model.device
        batch_size = BATCH_SIZE if batch_size == "auto" else int(batch_size)
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        self.stride = integer("stride", model.seq_len if stride is None else stride, at_least=1)
        if self.stride > model.seq_len:
            raise ValueError(f"stride must be at most seq_len, {model.seq_len}, got {stride}")
        if dtype is None:
            dtype = "bf16" if self.device.type == "cuda" else "fp32"
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        self.dtype = DTYPES[dtype]

    @property
    def tokenizer_name(self) -> str:
        return "bytes"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether it is the greedy one."""
        texts = [tuple(text.encode() for text in request.args) for request in requests]
        return self._kept(
            "loglikelihood", requests, self._score([(c + new, len(c)) for c, new in texts])
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability (nats) of each text, every byte of it once."""
        scored = self._score([(request.args[0].encode(), 0) for request in requests])
        numbers = [text.log_probability for text in scored]
        return self._kept("loglikelihood_rolling", requests, numbers)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continue each context, up to the first of the strings in `until`."""
        made = [None] * len(requests)
        alike = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for indices in alike.values():
            for at in range(0, len(indices), self.batch_size):
                some = indices[at : at + self.batch_size]
                contexts = [requests[i].args[0].encode() or START for i in some]
                texts = self._generate(contexts, requests[some[0]].args[1])
                for i, text in zip(some, texts, strict=True):
                    made[i] = text
        return self._kept("generate_until", requests, made)

    def _kept(self, name: str, requests: list[Instance], results: list) -> list:
        """The results, of which the harness's cache is told."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(name, request.args, result)
        return [tuple(r) if isinstance(r, Scored) else r for r in results]

    # scores

    def _score(self, texts: list[tuple[bytes, int]]) -> list[Scored]:
        """Score the bytes of each text from an index on."""
        pieces = [(i, piece) for i, text in enumerate(texts) for piece in self._pieces(*text)]
        pieces.sort(key=lambda pair: len(pair[1].ids))  # so that there is little padding
        firsts = [bool(text) and start == 0 for text, start in texts]
        totals = [-math.log(256) * first for first in firsts]
        greedy = [not first for first in firsts]
        for at in range(0, len(pieces), self.batch_size):
            indices, batch = zip(*pieces[at : at + self.batch_size], strict=True)
            for i, scored in zip(indices, self._score_batch(batch), strict=True):
                totals[i] += scored.log_probability
                greedy[i] &= scored.is_greedy
        return [Scored(*pair) for pair in zip(totals, greedy, strict=True)]

    def _pieces(self, text: bytes, start: int) -> Iterator[Piece]:
        """The bytes of a text from `start` on, as windows that the model can see."""
        window, start = self.model.seq_len + 1, max(1, start)
        while start < len(text):
            stop = min(len(text), max(window, start + self.stride))
            begin = max(0, stop - window)
            yield Piece(text[begin:stop], start - begin)
            start = stop

    @torch.no_grad()
    def _score_batch(self, pieces: tuple[Piece, ...]) -> list[Scored]:
        rows = [self._ids(piece.ids) for piece in pieces]
        ids = pad_sequence(rows, batch_first=True)  # at the end, which nothing before it sees
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.model(ids[:, :-1])
        targets = ids[:, 1:, None]
        each = logits.float().log_softmax(dim=-1).gather(-1, targets)[..., 0].double()
        is_best = logits.argmax(dim=-1) == targets[..., 0]
        scored = []
        for b, piece in enumerate(pieces):
            own = slice(piece.start - 1, len(piece.ids) - 1)
            scored.append(Scored(float(each[b, own].sum()), bool(is_best[b, own].all())))
        return scored

    def _ids(self, text: bytes) -> Tensor:
        return torch.tensor(list(text), device=self.device)

    # texts

    def _generate(self, contexts: list[bytes], options: dict) -> list[str]:
        for name in options.keys() - {*SAMPLING, *IGNORED}:
            allowed = ", ".join((*IGNORED, *SAMPLING))
            raise ValueError(f"{name} must be left out, as generate_until takes {allowed}")
        until = options.get("until") or []
        until = [stop.encode() for stop in ([until] if isinstance(until, str) else until)]
        sampling = dict(temperature=0.0)
        if options.get("do_sample"):
            sampling = dict(temperature=1.0, top_k=256)
            sampling |= {k: options[k] for k in SAMPLING if options.get(k)}
        made, stopped = [bytearray() for _ in contexts], [False] * len(contexts)
        count = options.get("max_gen_toks", MAX_BYTES)
        prompts = [self._ids(context[-self.model.seq_len :]) for context in contexts]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            for ids in self.model.generate(prompts, count, stream=True, **sampling):
                for b, byte in enumerate(ids.tolist()):
                    if not stopped[b]:
                        made[b].append(byte)
                        stopped[b] = any(map(made[b].endswith, until))
                if all(stopped):
                    break
        return [cut(bytes(text), until).decode(errors="replace") for text in made]


def cut(text: bytes, until: list[bytes]) -> bytes:
    """A text before the first of some others in it."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
