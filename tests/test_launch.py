"""Launches: the kernel that Triton would find, and Triton's own way where others look."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from helpers import DEVICE, ROOT, child_environment
from triton import knobs

from shtx_kernels import launch as page
from shtx_kernels.launch import Kernel, cdiv, compile_only, launch, next_power_of_2

CURRENT = 3  # the device of the driver below
X = torch.empty(64)


class Compiled:
    """A compiled kernel that keeps the arguments of its launches."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


class Jitted:
    """A kernel of Triton, of a pointer, two numbers and a constant."""

    def __init__(self):
        self.pre_run_hooks, self.seen, self.compiled = [], [], Compiled()
        param = lambda name, is_constexpr=False, do_not_specialize=False: SimpleNamespace(
            name=name, is_constexpr=is_constexpr, do_not_specialize=do_not_specialize
        )
        self.params = [param("x_ptr"), param("n"), param("free", do_not_specialize=True)]
        self.params.append(param("BLOCK", is_constexpr=True))

    def __getitem__(self, grid):
        return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)

    def warmup(self, *args, grid, **options):
        return self.run(*args, grid=grid, warmup=True, **options)

    def run(self, *args, grid, warmup, **options):
        self.seen.append((args, grid, warmup, options))
        return self.compiled


@pytest.fixture
def jitted(monkeypatch):
    active = SimpleNamespace(
        get_current_device=lambda: CURRENT, get_current_stream=lambda device: 10 + device
    )
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(page, "launches_are_known", lambda: True)
    monkeypatch.setattr(page, "driver", SimpleNamespace(active=active))
    return Jitted()


def test_the_first_launch_of_a_kind_is_tritons_and_the_next_are_not(jitted):
    kernel = Kernel(jitted, BLOCK=8, num_warps=2)
    for _ in range(3):
        kernel((4, 2), (X,), 5, 6)
    assert jitted.seen == [((X, 5, 6), (4, 2), False, dict(BLOCK=8, num_warps=2))]
    arguments = None, None, None, X.data_ptr(), 5, 6, 8
    assert jitted.compiled.runs == [(4, 2, 1, 13, "function", "metadata", *arguments)] * 2


@pytest.mark.parametrize(
    "other",
    [
        dict(x=X.half()),
        dict(x=X[1:]),
        dict(n=16),
        dict(n=2**31),
        dict(free=2**31),
        dict(free=-(2**31) - 1),
    ],
    ids=["dtype", "alignment", "n", "wide n", "wide free", "wide negative"],
)
def test_kinds(jitted, other):
    kernel = Kernel(jitted, BLOCK=8)
    call = lambda x=X, n=5, free=6: kernel((4,), (x,), n, free)
    call()
    call(**other)
    assert len(jitted.seen) == 2
    call(**other, **({} if "free" in other else dict(free=7)))
    assert len(jitted.seen) == 2


def test_kinds_are_bounded(jitted):
    kernel = Kernel(jitted, BLOCK=8)
    for n in range(3 * page.KINDS):
        kernel((1,), (X,), n, 1)
        assert len(kernel.found) <= page.KINDS


def launched_tritons_way(kernel, jitted):
    kernel((1,), (X,), 5, 6)
    before = len(jitted.seen)
    kernel((1,), (X,), 5, 6)
    return len(jitted.seen) > before


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_profilers_see_launches(jitted, name, monkeypatch):
    kernel, hook = Kernel(jitted, BLOCK=8), lambda metadata: None
    assert not launched_tritons_way(kernel, jitted)
    chain = getattr(knobs.runtime, name)
    chain.add(hook)
    try:
        assert launched_tritons_way(kernel, jitted)
    finally:
        chain.remove(hook)
    assert not launched_tritons_way(kernel, jitted)
    monkeypatch.setattr(knobs.runtime, name, hook)
    assert launched_tritons_way(kernel, jitted)
    monkeypatch.setattr(knobs.runtime, name, None)
    assert not launched_tritons_way(kernel, jitted)


def test_hooks_of_a_kernel_see_launches(jitted):
    kernel = Kernel(jitted, BLOCK=8)
    jitted.pre_run_hooks.append(lambda *args, **options: None)
    assert launched_tritons_way(kernel, jitted)


def test_compiling_alone_launches_nothing(jitted):
    kernel = Kernel(jitted, BLOCK=8)
    kernel((1,), (X,), 5, 6)
    with compile_only():
        kernel((1,), (X,), 5, 6)
        launch(jitted, (1,), X, 5, 6, BLOCK=8)
    assert [warmup for _, _, warmup, _ in jitted.seen] == [False, True, True]
    assert not jitted.compiled.runs
    kernel((1,), (X,), 5, 6)
    assert len(jitted.compiled.runs) == 1


def test_other_versions_of_triton_launch_themselves(jitted, monkeypatch):
    monkeypatch.setattr(page, "launches_are_known", lambda: False)
    kernel = Kernel(jitted, BLOCK=8)
    assert launched_tritons_way(kernel, jitted)


def test_a_kernel_that_a_hook_kept_from_compiling_is_asked_for_again(jitted):
    jitted.compiled = None
    assert launched_tritons_way(Kernel(jitted, BLOCK=8), jitted)


class CudaLauncher:
    """Triton's, of a kernel that asks for some memory in each launch."""

    launch_cooperative_grid = launch_pdl = False

    def __init__(self, scratch):
        self.global_scratch_size, self.profile_scratch_size = scratch
        self.called, self.launched = [], []

    def __call__(self, *args):
        self.called.append(args)

    def launch(self, *args):
        self.launched.append(args)


@pytest.mark.parametrize("scratch", [(0, 0), (8, 0), (0, 8)])
def test_memory_of_a_kernel_is_for_tritons_launcher_to_allocate(jitted, scratch):
    jitted.compiled.run = launcher = CudaLauncher(scratch)
    kernel = Kernel(jitted, BLOCK=8)
    for _ in range(2):
        kernel((4,), (X,), 5, 6)
    assert len(launcher.called) == any(scratch) and len(launcher.launched) == (not any(scratch))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 127, 128, 129, 2**20])
def test_integers(n):
    assert next_power_of_2(n) == triton.next_power_of_2(n)
    assert [cdiv(n, k) for k in (1, 3, 128)] == [triton.cdiv(n, k) for k in (1, 3, 128)]


def test_finds_what_triton_does():
    command = [sys.executable, "tests/launches.py"]
    result = subprocess.run(
        command, cwd=ROOT, env=child_environment(ROOT), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    launches, tritons = map(int, result.stdout.split())
    assert launches == 300 and tritons <= 60  # kinds; the others found theirs


@pytest.mark.gpu  # two of them
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launches_on_the_device_of_the_tensors():
    from shtx_kernels import norm_token_shift

    x, gamma = torch.randn(2, 9, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    expected = norm_token_shift(x, gamma)[1]
    for _ in range(3):
        other = norm_token_shift(x.to("cuda:1"), gamma.to("cuda:1"))[1]
        assert other.device.index == 1 and torch.equal(other.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0
