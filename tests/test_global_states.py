"""Nothing that is set for the whole process changes what an op returns, unless it is meant to."""

import threading

import pytest
import torch
from helpers import DEVICE
from test_autograd import CALLS, NAMES
from torch.utils._pytree import tree_leaves

import shtx_kernels
from shtx_kernels import reference, rotary_attention
from shtx_kernels.products import matmul_precision
from shtx_kernels.rotary_attention import rotations


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def results(call, ops, x):
    outs = tree_leaves(call(ops))
    wanted = [t for t in outs if t.requires_grad]
    return [*outs, *torch.autograd.grad(sum(t.sum() for t in wanted), x)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("ops", [shtx_kernels, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("name, call, x", CALLS, ids=NAMES)
def test_default_dtype(name, call, x, ops, dtype, default_dtype, monkeypatch):
    expected = results(call, ops, x)
    monkeypatch.setattr(rotations, "_tables", {})
    default_dtype(dtype)
    for ours, theirs in zip(results(call, ops, x), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.fixture
def precision():
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_precision_of_either_api(precision):
    matmul = torch.backends.cuda.matmul
    assert matmul_precision() == "ieee"
    for name, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(name)
        assert matmul_precision() == expected
    for name in ("tf32", "ieee"):
        matmul.fp32_precision = name
        assert matmul_precision() == name
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):  # what a page must not call
        torch.get_float32_matmul_precision()
    qkv = torch.randn(2, 20, 24, device=DEVICE, requires_grad=True)
    rotary_attention(qkv, 2).sum().backward()


def test_threads_share_a_table(monkeypatch):
    monkeypatch.setattr(rotations, "_tables", {})
    qkv = torch.randn(1, 40, 24, device=DEVICE)
    tables, barrier = [], threading.Barrier(4)

    def make():
        barrier.wait()
        tables.append(rotations.make_table(qkv, 4, 40))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables) == 4 and len({id(t) for t in tables}) == len(rotations._tables) == 1


def test_a_table_of_inference_serves_training(monkeypatch):
    monkeypatch.setattr(rotations, "_tables", {})
    qkv = torch.randn(1, 40, 24, device=DEVICE)
    with torch.inference_mode():
        rotary_attention(qkv, 2)
    rotary_attention(qkv.requires_grad_(), 2).sum().backward()
    assert len(rotations._tables) == 1


def test_a_table_serves_all_lengths_up_to_a_power_of_two(monkeypatch):
    monkeypatch.setattr(rotations, "_tables", {})
    for n in (10, 100, 128, 300):
        rotary_attention(torch.randn(1, n, 24, device=DEVICE), 2)
    assert len(rotations._tables) == 2


def test_meta_and_fake_tensors_leave_no_table(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(rotations, "_tables", {})
    assert rotary_attention(torch.randn(1, 40, 24, device="meta"), 2).is_meta
    with FakeTensorMode():
        assert rotary_attention(torch.randn(1, 40, 24), 2).shape == (1, 40, 8)
    assert not rotations._tables


def test_autocast_around_the_backward_changes_nothing():
    """The autocast region of the forward decides the dtypes of the backward."""
    for name, call, x in CALLS:
        expected = results(call, shtx_kernels, x)[-1]
        wanted = [t for t in tree_leaves(call(shtx_kernels)) if t.requires_grad]
        with torch.autocast(DEVICE, torch.bfloat16):
            (gradient,) = torch.autograd.grad(sum(t.sum() for t in wanted), x)
        assert torch.equal(gradient, expected), name
