"""CUDA graphs: a function runs eagerly once, and is captured later."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def run_aside(function: Callable, stream: torch.cuda.Stream) -> Any:
    """What a call on `stream` returns, in its turn among what the current stream does."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = function()
    current.wait_stream(stream)
    return outputs


def capture(
    function: Callable, stream: torch.cuda.Stream, others: Iterable[torch.cuda.CUDAGraph]
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and what the call returned, which a replay writes.

    Args:
        function: has run aside on `stream`.
        stream: of the capture.
        others: captured on it before; the graph takes memory from their pool, so that a replay of
            one may write over what another has left.
    """
    graph, others = torch.cuda.CUDAGraph(), list(others)
    # the outer context leaves the stream even where the end of a failed capture raises
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(
            graph,
            pool=others[0].pool() if others else None,
            stream=stream,
            capture_error_mode="thread_local",  # a loader's thread may pin memory meanwhile
        ),
    ):
        outputs = function()
    return graph, outputs
