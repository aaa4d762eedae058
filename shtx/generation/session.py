"""A decoder with the sampling after it, on a GPU as CUDA graphs.

The host takes far longer than the device to launch the kernels of a step, of the pass over a prompt
or of the copy of the weights. Each runs eagerly at first, once its kernels are compiled, is
captured at its second turn, which computes nothing, and replayed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shtx.generation.arguments import Sampling
from shtx.generation.decoder import Decoder
from shtx.graphs import Graphs, run_aside
from shtx.ops import FUSED, compile_ahead
from shtx.plan import is_sharded

MAX_PROMPTS = 2  # lengths of a prompt, the latest, that a decoder has a graph for
NOISE = 16  # tokens that noise is drawn for at once


class Session:
    """A decoder that samples what it takes next. After `start`, `prefill` and `step`, `ids` (B,)
    are the sampled tokens, which the next call writes over."""

    def __init__(self, model, batch: int, room: int, dtype: torch.dtype):
        device = model.device
        with _plain(device):
            self.decoder = Decoder(model, batch, room, dtype)
            self.noise = torch.empty(
                batch, NOISE, model.num_tokens, dtype=torch.float32, device=device
            )
            self.prompt = torch.empty(batch * room, dtype=torch.long, device=device)
        self.ids = self.decoder.ids
        self.generator = torch.Generator(device)
        self.sampling, self.drawn = None, 0
        self.compiled = False
        self.graphs = None  # keys: "step", "refresh", and lengths of a prompt, the latest last
        # the reference is for reading, not for speed
        if device.type == "cuda" and model.ops_for(device) is FUSED:
            self.graphs = Graphs(device)

    def start(self, model, rows: list[Tensor], sampling: Sampling, seed: int):
        """Take the prompts, of the weights that the model has, and sample their next tokens."""
        if sampling != self.sampling:
            self.sampling = sampling
            if self.graphs is not None:
                self.graphs.kept.pop("step", None)
        self.generator.manual_seed(seed)
        self.prefill(model, rows, refresh=True)

    def prefill(self, model, rows: list[Tensor], refresh: bool = False):
        in_graphs = False
        if self.graphs is not None:
            step = self.graphs.kept.get("step")  # it reads the decoder's copies alone
            if not self.graphs.hold(model) and step is not None:
                self.graphs.kept["step"] = step
            structure = self.graphs.structure
            in_graphs = not (structure.hooked() or any(map(is_sharded, structure.parameters)))
        with _plain(self.ids.device):
            if refresh:
                self._run("refresh", lambda: self.decoder.refresh(model), in_graphs)
            if in_graphs and not self.compiled:
                self._compile(model, pad_sequence(rows, batch_first=True))
            self._take(model, rows, in_graphs)
            self.drawn = 0  # the slots of the tokens to come may have been used
            self._draw()
            self._sample()

    def _compile(self, model, prompt: Tensor):
        """All kernels side by side; the garbage that it leaves is gone with the prompt's pass."""

        def prompt_and_step():
            self._prefill(model, prompt)
            self._step()

        self._run_aside(lambda: compile_ahead(prompt_and_step))
        self.compiled = True

    def _take(self, model, rows: list[Tensor], in_graphs: bool):
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        if min(lengths) < longest:
            lengths = torch.tensor(lengths, device=self.ids.device)
            self._prefill(model, pad_sequence(rows, batch_first=True), lengths)
            return
        prompt = self.prompt[: len(rows) * longest].view(len(rows), longest)
        torch.stack(rows, out=prompt)
        self._run(longest, lambda: self._prefill(model, prompt), in_graphs)
        if in_graphs:
            kept = self.graphs.kept
            kept[longest] = kept.pop(longest)
            for length in [what for what in kept if isinstance(what, int)][:-MAX_PROMPTS]:
                del kept[length]

    def _prefill(self, model, prompt: Tensor, lengths: Tensor | None = None):
        self.decoder.prefill(model, prompt, lengths)

    def _draw(self):
        """Noise of the next tokens: every row takes a slot a token, whichever its position is."""
        if self.drawn % NOISE == 0 and self.sampling.temperature > 0:
            self.noise.exponential_(generator=self.generator)
        self.drawn += 1

    def step(self):
        self._draw()
        self._run("step", self._step, self.graphs is not None)

    def _step(self):
        self.decoder.step()
        self._sample()

    def _sample(self):
        decoder = self.decoder
        decoder.ops.decode.sample(
            decoder.position, decoder.logits, self.noise, *self.sampling, self.ids
        )

    def _run(self, what: str | int, function: Callable, in_graphs: bool):
        """A function of tensors that stay where they are: eagerly, then captured and replayed."""
        if not in_graphs:
            with _plain(self.ids.device):
                function()
            return
        name = f"generate's {what}" if isinstance(what, str) else f"a prompt of {what} tokens"
        graph = self.graphs.get(what, lambda: self._capture(what, function), name)
        if graph is None:
            self._run_aside(function)
            return
        with torch.cuda.device_of(self.ids):
            graph.replay()

    def _run_aside(self, function: Callable):
        with _plain(self.ids.device):
            run_aside(function, self.graphs.stream)

    def _capture(self, what: str | int, function: Callable) -> torch.cuda.CUDAGraph:
        with _plain(self.ids.device):  # what a graph leaves behind is in tensors made before
            return self.graphs.capture(function)[0]


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Leave the caller's modes: tensors of a decoder outlive them, and narrow weights that autocast
    keeps would outlive the weights in a graph.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False, cache_enabled=False),
        torch.cuda.device(device if device.type == "cuda" else -1),
    ):
        yield
