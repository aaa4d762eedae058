"""CUDA graphs: the one life of a captured function, and what a capture freezes.

A graph replays the same kernels on the same memory. A function of tensors that stay where they are
runs eagerly in its first turn, is captured at its second, which computes nothing, and is replayed
from then on. What a capture has frozen is compared at every turn, and graphs that no longer hold
are given up. A function that cannot be captured stays eager.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from shtx.internals import (
    HOOKS,
    KEPT,
    PARAMETER_HOOKS,
    any_global_hooks,
    end_allocations,
    modules_below,
    modules_of,
    parameters_below,
)
from shtx.ops import matmul_precision
from shtx.plan import FORWARDS, OPTIONS, look

# These stand in place of a graph. ONCE: the call ran eagerly, and is captured at its next turn.
# NEVER: its capture failed, so it stays eager.
ONCE, NEVER = "once", "never"

MAX_GRAPHS = 4  # shapes of ids; a whole batch and a last smaller one are two


def run_aside(function: Callable, stream: torch.cuda.Stream) -> Any:
    """Call a function on `stream`, after the current stream's earlier work and before its later."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = function()
    current.wait_stream(stream)
    return outputs


class Graphs:
    """The graphs of one owner, by key.

    They share memory: a replay of one may write over what another has left.

    Args:
        device: on which they run.
        limit: how many keys may have a graph; further ones run eagerly.
    """

    def __init__(self, device: torch.device, limit: int | None = None):
        self.limit = limit
        self.stream = torch.cuda.Stream(device)  # on which first turns and captures run
        self.pool = None  # the memory that all graphs share
        self.replayed = torch.cuda.Event()
        self.kept, self.structure, self.more, self._warned = {}, None, None, False

    def hold(self, model: Module, more: object = None) -> bool:
        """Return whether all that the graphs froze is as it was; if not, give them up.

        Args:
            model: of which graphs are.
            more: what else of their owner they froze, to be compared by ==.
        """
        structure = self.structure
        if structure is not None and structure.holds() and more == self.more:
            return True
        self.structure, self.more = Structure(model), more
        self.kept.clear()
        self.pool = None  # what is in use still, as gradients, keeps it from taking other graphs
        return False

    def get(self, key: Hashable, make: Callable[[], Any], name: str) -> Any:
        """Return what `make` has captured for the key; None if the function has to run eagerly.

        Args:
            key: of the function.
            make: captures it, by `capture`, and returns what is to be kept.
            name: of the function, for warnings.
        """
        state = self.kept.get(key)
        if state is None:
            if self.limit is None or len(self.kept) < self.limit:
                self.kept[key] = ONCE
            elif not self._warned:
                self._warned = True
                warnings.warn(
                    f"{name}: {self.limit} others have a CUDA graph each, further ones run eagerly",
                    stacklevel=4,
                )
            return None
        if state == ONCE:
            try:
                state = make()
            except RuntimeError as error:
                warnings.warn(f"{name} goes on without a CUDA graph: {error}", stacklevel=4)
                state = NEVER
            self.kept[key] = state
        return None if state == NEVER else state

    def capture(self, function: Callable) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of a call, and what the call returned, which a replay writes.

        Args:
            function: has run aside on `stream`.
        """
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        # a loader's thread may pin memory meanwhile
        options = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            # the outer context leaves the stream even where the end of a failed capture raises
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, **options):
                outputs = function()
        except BaseException:
            self._put_right()
            raise
        return graph, outputs

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Replay on the current stream, after what was replayed here before, on whatever stream."""
        stream = torch.cuda.current_stream(self.stream.device)
        stream.wait_event(self.replayed)
        graph.replay()
        self.replayed.record(stream)

    def _put_right(self):
        """A capture that CUDA itself breaks off leaves the allocator and the generator of random
        numbers as if it went on; the end of one that succeeds is what the generator waits for.
        """
        with suppress(RuntimeError):
            end_allocations(self.stream.device_index, self.pool)
        self.pool = None
        with suppress(RuntimeError), torch.cuda.stream(self.stream):
            spare = torch.zeros(1, device=self.stream.device)
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"
            ):
                spare.add_(1)


def comparable(value: Any) -> Any:
    """Put a value so that == neither waits for a device nor raises: numbers, names and what is made
    of them as they are, all else by identity.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, Tensor):
        return "tensor", id(value), value.data_ptr()
    if isinstance(value, dict):
        return [(name, comparable(v)) for name, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [comparable(v) for v in value]
    return "object", id(value)


def changeable(model: Module) -> Iterator[Module]:
    """Yield the modules that are a tool's: their attributes may change in any way."""
    for module in model.modules():
        if (tools := modules_of(module).get("parametrizations")) is not None:
            yield from tools.modules()
    for module in look(model).called:
        yield from module.modules()


class Structure:
    """Knows what a graph of a model's forward and backward has frozen of the model and of PyTorch's
    modes. A step compares it each time, so it is read by few calls for all modules together.
    """

    def __init__(self, model: Module):
        # owners of graphs may be kept by model, so that it must not be kept by them
        self.model, self.of_model = weakref.ref(model), vars(model)
        everything = modules_below(model)
        self.modules, self.states = everything[1:], [vars(module) for module in everything]
        self.parameters = parameters_below(model)
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.changeable = [vars(module) for module in changeable(model)]
        self.options = [(OPTIONS[type(m)], m) for m in self.modules if type(m) in OPTIONS]
        self.alive = list(self.children())  # so that no other takes the place of one that went
        self.seen = self.read()

    def read(self) -> list:
        model, matmul = self.model(), torch.backends.cuda.matmul
        return [
            list(map(type, self.modules)),
            list(map(itemgetter("training"), self.states)),
            list(map(id, self.children())),
            [*map(Tensor.data_ptr, self.parameters)],
            [*map(attrgetter("requires_grad", "dtype"), self.parameters)],
            [get(module) for get, module in self.options],
            ["forward" in state for state in self.states],
            list(map(comparable, self.changeable)),
            model.options,
            [kind.forward for kind in FORWARDS],
            matmul_precision(),
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
        ]

    def children(self) -> Iterator:
        """Yield all modules, parameters and buffers below the model."""
        dicts = (map(itemgetter(kind), self.states) for kind in KEPT)
        return chain.from_iterable(map(dict.values, chain.from_iterable(dicts)))

    def holds(self) -> bool:
        return self.read() == self.seen

    def hooked(self, parameters: bool = True) -> str | None:
        """Say what runs Python that a replay would leave out; None if nothing does.

        Args:
            parameters: whether a replay leaves out hooks of parameters.
        """
        if any_global_hooks():
            return "there are global hooks of modules"
        for kind in HOOKS:
            if any(map(itemgetter(kind), self.states)):
                return f"the model has {kind[1:].replace('_', ' ')}"
        for kind in PARAMETER_HOOKS * parameters:
            if any(map(attrgetter(kind), self.parameters)):
                return "a parameter has hooks"
        return None
