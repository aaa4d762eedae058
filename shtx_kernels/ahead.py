"""Kernels are compiled side by side, ahead of the launches that need them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch


def compile_ahead(function: Callable) -> None:
    """Compile the kernels that a call of `function` launches, in one thread for each core.

    `function` is called with launches that do nothing, so what it makes or writes is garbage. An
    error in it or in a compiler is left to the call whose results count. Triton's interpreter
    compiles nothing, so under it `function` is not called.
    """
    import triton

    from .launch import compile_only

    if triton.knobs.runtime.interpret:
        return
    with (
        compile_only(),
        torch.autograd.set_multithreading_enabled(False),  # backward is in this thread, too
        torch.autograd.set_detect_anomaly(False),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        suppress(Exception),
    ):
        function()
