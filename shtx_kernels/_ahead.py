"""Kernels that compile side by side, ahead of the launches that need them."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

_one_at_a_time = threading.Lock()


def compile_ahead(function: Callable) -> None:
    """Compile the kernels that a call of `function` launches, in a thread for each core.

    It is called with launches that do nothing, so that what it makes or writes is garbage. What
    fails, in it or in a compiler, is left for the call that counts. Where Triton interprets, there
    is nothing to compile, and no call.
    """
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        return
    caller, run = threading.get_ident(), None

    def compile_alone(kernel, *args, warmup, **options):
        warmup = warmup or threading.get_ident() == caller
        return run(kernel, *args, warmup=warmup, **options)

    with (
        _one_at_a_time,
        torch.autograd.set_multithreading_enabled(False),  # backward is in this thread, too
        torch.autograd.set_detect_anomaly(False),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
    ):
        run = JITFunction.run  # once no other thread has its own in this place
        JITFunction.run = compile_alone
        try:
            with suppress(Exception):
                function()
        finally:
            JITFunction.run = run
