"""Compiling ahead, seen from the launches; tests/offline.py compiles every kernel that way."""

import threading

import pytest
import torch
import triton
from helpers import DEVICE

from shtx_kernels import launch as page
from shtx_kernels.ahead import compile_ahead


@pytest.fixture
def launches(monkeypatch):
    """The launches: each says if it only compiles, and if compilers run in other processes."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    SEEN.clear()
    return SEEN


SEEN = []


class Jitted:
    """A kernel of Triton that compiles nothing."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        return lambda x: self.run(x, grid, False)

    def warmup(self, x, grid):
        self.run(x, grid, True)

    def run(self, x, grid, warmup):
        aside = triton.runtime._async_compile.active_mode.get() is not None
        SEEN.append((self.name, warmup, aside))


def launch(name):
    page.launch(Jitted(name), (1,), torch.ones(3))


class Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        launch("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        launch("backward")
        return dy


def test_launches_compile_and_do_nothing_else(launches):
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    compile_ahead(lambda: torch.autograd.grad(Launch.apply(x).sum(), x))
    launch("later")
    expected = [("forward", True, True), ("backward", True, True), ("later", False, False)]
    assert launches == expected


def test_other_threads_launch_as_ever(launches):
    def both():
        other = threading.Thread(target=launch, args=["theirs"])
        other.start()
        other.join()
        launch("ours")

    compile_ahead(both)
    assert launches == [("theirs", False, False), ("ours", True, True)]


def test_what_fails_is_left_for_the_call_that_counts(launches):
    def fail():
        launch("before")
        raise torch.OutOfMemoryError

    compile_ahead(fail)
    launch("after")
    assert launches == [("before", True, True), ("after", False, False)]


def test_a_stop_is_not_lost(launches):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ahead(stop)
    launch("after")
    assert launches == [("after", False, False)]


def test_anomalies_of_garbage_are_none(launches):
    x = torch.full((3,), float("nan"), requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        compile_ahead(lambda: (torch.autograd.grad(x.sqrt().sum(), x), launch("reached")))
        assert torch.is_anomaly_enabled()
    assert launches == [("reached", True, True)]


def test_nothing_is_called_where_triton_interprets(launches, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    compile_ahead(lambda: launch("never"))
    assert not launches


def test_two_threads_that_compile_leave_launches_as_they_were(launches):
    def both():
        other = threading.Thread(target=compile_ahead, args=[lambda: launch("theirs")])
        other.start()
        other.join()
        launch("ours")

    compile_ahead(both)
    launch("later")
    assert launches == [("theirs", True, True), ("ours", True, True), ("later", False, False)]
