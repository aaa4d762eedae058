"""GELU of a product: in a pass over memory, or within the product before it.

On Hopper, GELU of 16-bit numbers is a part of the product that makes its argument or the gradient
of its result; elsewhere it is a pass over memory after a product of cuBLAS.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._dot import dot
from ._target import capability
from .launch import KINDS, Kernel, cdiv

PASS = dict(TILE=2048, num_warps=4)  # TILE numbers for each program
# Two programs share a multiprocessor: one multiplies while the other is busy with its GELU.
PRODUCT = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, maxnreg=128)
RESIDENT = 2
# rows of tiles that programs go through column by column, so that both factors stay in the L2 cache
GROUP = 8


@triton.jit
def tail(u, ACC: tl.constexpr, NARROW: tl.constexpr):
    """w = |u|, at most 13, and Q(w), the probability of a standard normal variable above w.

    For 16-bit numbers log2 Q is a minimax polynomial of degree 8, which leaves Q with a relative
    error of 1e-5 up to w = 6: erf would take longer than reading and writing the numbers.
    """
    w = tl.minimum(tl.abs(u), tl.full([1], 13.0, ACC), propagate_nan=tl.PropagateNan.ALL)
    if NARROW:
        p = w * 6.630474302937728e-08 - 3.4069560115312925e-06
        p = p * w + 7.647260645171627e-05
        p = p * w - 0.001001944998279214
        p = p * w + 0.008690348826348782
        p = p * w - 0.05419512838125229
        p = p * w - 0.4583406150341034
        p = p * w - 1.1512579917907715
        return w, tl.exp2(p * w - 1.0)
    half = tl.full([1], 0.5, ACC)  # a bare constant is fp32 in Triton 3.6
    return w, half - half * tl.erf(w * tl.full([1], 0.7071067811865476, ACC))


@triton.jit
def gelu(u, w, q):
    """u Phi(u), where Phi is the standard normal distribution, given what `tail` returns."""
    return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) - w * q


@triton.jit
def slope(u, w, q, ACC: tl.constexpr):
    """The derivative of gelu at u: Phi(u) + u phi(u), where phi is the density of Phi."""
    bell = tl.exp2(tl.full([1], -0.7213475204444817, ACC) * w * w)
    density = tl.full([1], 0.3989422804014327, ACC) * bell
    below = q - w * density
    return tl.where(u < 0, below, 1.0 - below)


@triton.jit
def _gelu_kernel(
    u_ptr, a_ptr, da_ptr, size,
    ACC: tl.constexpr, NARROW: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """a = gelu(u); in backward, the gradient of u takes the place of that of a as well."""
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offs < size
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC)
    w, q = tail(u, ACC, NARROW)
    tl.store(a_ptr + offs, gelu(u, w, q), mask=mask)
    if BACKWARD:
        da = tl.load(da_ptr + offs, mask=mask, other=0.0).to(ACC)
        tl.store(da_ptr + offs, da * slope(u, w, q, ACC), mask=mask)


@triton.jit
def quarters(t):
    """The four quarters of a matrix's columns, in order."""
    ROWS: tl.constexpr = t.shape[0]
    COLUMNS: tl.constexpr = t.shape[1] // 4
    pairs = tl.permute(tl.reshape(t, (ROWS, 2, 2, COLUMNS)), (0, 3, 1, 2))
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["M"])
def _product_gelu_kernel(
    x_desc, w_desc, u_ptr, a_ptr, da_ptr, bias_ptr, M, N, K,
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """u = x w^T + bias and a = gelu(u); in backward, a = gelu(u) and da = x w gelu'(u).

    After its product, a tile is finished by quarters, which leaves registers for two programs.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    start = tl.program_id(0).to(tl.int64).to(tl.int32)
    for tile in tl.range(start, tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * tiles_n)
        rows = tl.minimum(tiles_m - group * GROUP, GROUP)
        within = tile % (GROUP * tiles_n)
        m, n = (group * GROUP + within % rows) * BLOCK_M, within // rows * BLOCK_N

        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            if BACKWARD:
                acc = dot(x_desc.load([m, k]), w_desc.load([k, n]), acc, tl.float32, "ieee")
            else:
                acc = dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc, tl.float32, "ieee")

        offs_m = m + tl.arange(0, BLOCK_M)[:, None]
        offs_n = n + tl.arange(0, BLOCK_N // 4)[None, :]
        offs = offs_m.to(tl.int64) * N + offs_n
        if BACKWARD:
            following = tl.load(u_ptr + offs, mask=(offs_m < M) & (offs_n < N), other=0.0)
        parts = quarters(acc)
        for i in tl.static_range(4):
            part = parts[i]
            mask = (offs_m < M) & (offs_n < N - i * (BLOCK_N // 4))
            here = offs + i * (BLOCK_N // 4)
            if BACKWARD:
                u = following.to(tl.float32)
                if i < 3:
                    after = (offs_m < M) & (offs_n < N - (i + 1) * (BLOCK_N // 4))
                    following = tl.load(u_ptr + here + BLOCK_N // 4, mask=after, other=0.0)
                w, q = tail(u, tl.float32, True)
                tl.store(da_ptr + here, part * slope(u, w, q, tl.float32), mask=mask)
            else:
                u = part
                if HAS_BIAS:
                    here_n = offs_n + i * (BLOCK_N // 4)
                    u += tl.load(bias_ptr + here_n, mask=here_n < N, other=0.0).to(tl.float32)
                w, q = tail(u, tl.float32, True)
                tl.store(u_ptr + here, u, mask=mask)
            tl.store(a_ptr + here, gelu(u, w, q), mask=mask)


@lru_cache(KINDS)
def _kernel_of_pass(dtype: torch.dtype, backward: bool) -> Kernel:
    return Kernel(_gelu_kernel, dtype, NARROW=dtype.itemsize == 2, BACKWARD=backward, **PASS)


def gelu_pass(u: Tensor, da: Tensor | None = None) -> Tensor:
    """gelu(u); its gradient da, if there is one, becomes the gradient of u in place."""
    a, size = torch.empty_like(u), u.numel()
    if size:
        tensors = u, a, a if da is None else da
        kernel = _kernel_of_pass(u.dtype, da is not None)
        kernel((cdiv(size, PASS["TILE"]),), tensors, size)
    return a


@lru_cache
def _kernel_of_product(backward: bool, has_bias: bool) -> Kernel:
    constants = dict(BACKWARD=backward, HAS_BIAS=has_bias, GROUP=GROUP, **PRODUCT)
    return Kernel(_product_gelu_kernel, **constants)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _product_gelu(x: Tensor, w: Tensor, u: Tensor, bias=None, da=None) -> Tensor:
    """gelu(u), after u = x w^T + bias; or, if there is a da, after da = x w gelu'(u)."""
    (M, K), N, a = x.shape, u.shape[1], torch.empty_like(u)
    block_m, block_n, block_k = PRODUCT["BLOCK_M"], PRODUCT["BLOCK_N"], PRODUCT["BLOCK_K"]
    programs = cdiv(M, block_m) * cdiv(N, block_n)
    if u.is_cuda:
        programs = min(programs, RESIDENT * _multiprocessors(u.device))
    w_tile = [block_n, block_k] if da is None else [block_k, block_n]
    descriptors = (
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, w_tile),
    )
    tensors = u, a, a if da is None else da, u if bias is None else bias
    kernel = _kernel_of_product(da is not None, bias is not None)
    kernel((programs,), tensors, M, N, K, descriptors=descriptors)
    return a


def _within_product(x: Tensor, w: Tensor) -> bool:
    """Return whether GELU goes into the product: it is faster, and Hopper's copies take both."""
    rows, columns = w.shape
    return (
        (x.itemsize == 2 and capability(x.device) == 90)
        and (x.shape[0] > 0 and min(rows, columns) > 0 and rows % 8 == 0 and columns % 8 == 0)
        and (x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0)
    )


def product_gelu(x: Tensor, w: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write u = x w^T + bias, and return gelu(u)."""
    if _within_product(x, w):
        return _product_gelu(x, w, u, bias)
    if bias is None:
        torch.mm(x, w.T, out=u)
    else:
        torch.addmm(bias, x, w.T, out=u)
    return gelu_pass(u)


def product_gelu_bwd(dy: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u), and the gradient of u, where that of gelu(u) is dy w."""
    du = torch.empty_like(u)
    if _within_product(dy, w):
        return _product_gelu(dy, w, u, da=du), du
    torch.mm(dy, w, out=du)
    return gelu_pass(u, du), du
