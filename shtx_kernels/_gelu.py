"""GELU of a product: in a pass over memory, or within the product before it.

On Hopper, GELU of 16-bit numbers is a part of the product that makes its argument or the gradient
of its result; elsewhere it is a pass over memory after a product of cuBLAS. Backward needs gelu(u)
and the slope of gelu at u. Forward keeps both, or u alone, of which backward makes them again.
"""

from functools import lru_cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ._dot import dot
from ._target import capability
from .internals import gluon_is_known
from .launch import KINDS, Kernel, cdiv

PASS = dict(TILE=2048, num_warps=4)  # TILE numbers for each program
# Two programs share a multiprocessor: one multiplies while the other is busy with its GELU.
PRODUCT = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, maxnreg=128)
RESIDENT = 2
# Numbers of a row of x from which on a slope is kept: at narrower ones it saved 0.5 us for a MiB of
# memory, at wider ones 0.7 to 0.9 (forward and backward on one H200).
WIDE = 512
# numbers of a row of x from which on Gluon is faster forward; backward it always was, by 18 to 30%
DEEP = 1024
GROUP = 8  # rows of tiles that programs go through column by column


@triton.jit
def _constant(VALUE: tl.constexpr, ACC: tl.constexpr):
    """VALUE in ACC; a bare constant is fp32 in Triton 3.6, and the only one in Gluon."""
    if ACC == tl.float64:
        return tl.full([1], VALUE, ACC)
    else:
        return VALUE


@triton.jit
def tail(u, ACC: tl.constexpr, NARROW: tl.constexpr):
    """w = |u|, at most 13, and Q(w), the probability of a standard normal variable above w.

    For 16-bit numbers log2 Q is a minimax polynomial of degree 8, which leaves Q with a relative
    error of 1e-5 up to w = 6: erf would take longer than reading and writing the numbers.
    """
    w = tl.minimum(tl.abs(u), 13.0, propagate_nan=tl.PropagateNan.ALL)
    if NARROW:
        p = w * 6.630474302937728e-08 - 3.4069560115312925e-06
        p = p * w + 7.647260645171627e-05
        p = p * w - 0.001001944998279214
        p = p * w + 0.008690348826348782
        p = p * w - 0.05419512838125229
        p = p * w - 0.4583406150341034
        p = p * w - 1.1512579917907715
        return w, tl.exp2(p * w - 1.0)
    return w, 0.5 - 0.5 * tl.erf(w * _constant(0.7071067811865476, ACC))


@triton.jit
def gelu(u, w, q):
    """u Phi(u), where Phi is the standard normal distribution, given what `tail` returns."""
    return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) - w * q


@triton.jit
def slope(u, w, q, ACC: tl.constexpr):
    """The derivative of gelu at u: Phi(u) + u phi(u), where phi is the density of Phi."""
    bell = tl.exp2(_constant(-0.7213475204444817, ACC) * w * w)
    density = _constant(0.3989422804014327, ACC) * bell
    below = q - w * density
    return tl.where(u < 0, below, 1.0 - below)


@triton.jit
def finish(part, kept, ACC: tl.constexpr, NARROW: tl.constexpr, BACKWARD: tl.constexpr,
           SLOPE: tl.constexpr):  # fmt: skip
    """Return u, or gelu's slope there, and gelu(u), of the forward's product u. Of the backward's,
    the gradient of gelu(u), return that of u, and gelu(u) unless the slope was kept.
    """
    if BACKWARD and SLOPE:
        first, a = part * kept, part
    elif BACKWARD:
        w, q = tail(kept, ACC, NARROW)
        first, a = part * slope(kept, w, q, ACC), gelu(kept, w, q)
    else:
        w, q = tail(part, ACC, NARROW)
        a = gelu(part, w, q)
        if SLOPE:
            first = slope(part, w, q, ACC)
        else:
            first = part
    return first, a


@triton.jit
def _gelu_kernel(
    u_ptr, a_ptr, da_ptr, size,
    ACC: tl.constexpr, NARROW: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """a = gelu(u); in backward, the gradient of u takes the place of that of a as well."""
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offs < size
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC)
    part = tl.load(da_ptr + offs, mask=mask, other=0.0).to(ACC) if BACKWARD else u
    first, a = finish(part, u, ACC, NARROW, BACKWARD, False)
    tl.store(a_ptr + offs, a, mask=mask)
    if BACKWARD:
        tl.store(da_ptr + offs, first, mask=mask)


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: columns of GROUP tiles, so that factors stay in the L2 cache."""
    group = tile // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


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
    x_desc, w_desc, kept_ptr, first_ptr, a_ptr, bias_ptr, M, N, K,
    BACKWARD: tl.constexpr, SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store what `finish` makes of x w^T + bias, and in backward of x w and what was kept.

    After its product, a tile is finished by quarters, which leaves registers for two programs.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    start = tl.program_id(0).to(tl.int64).to(tl.int32)
    for tile in tl.range(start, tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = place(tile, tiles_m, tiles_n, GROUP)
        m, n = m * BLOCK_M, n * BLOCK_N
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
            following = tl.load(kept_ptr + offs, mask=(offs_m < M) & (offs_n < N), other=0.0)
        parts = quarters(acc)
        for i in tl.static_range(4):
            part = parts[i]
            mask = (offs_m < M) & (offs_n < N - i * (BLOCK_N // 4))
            here = offs + i * (BLOCK_N // 4)
            kept = part
            if BACKWARD:
                kept = following.to(tl.float32)
                if i < 3:
                    after = (offs_m < M) & (offs_n < N - (i + 1) * (BLOCK_N // 4))
                    following = tl.load(kept_ptr + here + BLOCK_N // 4, mask=after, other=0.0)
            if HAS_BIAS:
                here_n = offs_n + i * (BLOCK_N // 4)
                part += tl.load(bias_ptr + here_n, mask=here_n < N, other=0.0).to(tl.float32)
            first, a = finish(part, kept, tl.float32, True, BACKWARD, SLOPE)
            tl.store(first_ptr + here, first, mask=mask)
            if not (BACKWARD and SLOPE):
                tl.store(a_ptr + here, a, mask=mask)


@lru_cache(KINDS)
def _kernel_of_pass(dtype: torch.dtype, backward: bool) -> Kernel:
    return Kernel(_gelu_kernel, dtype, NARROW=dtype.itemsize == 2, BACKWARD=backward, **PASS)


def gelu_pass(u: Tensor, da: Tensor | None = None) -> Tensor:
    """gelu(u). If there is a da, the gradient of u takes the place of that of gelu(u)."""
    a = torch.empty_like(u)
    if size := u.numel():
        kernel = _kernel_of_pass(u.dtype, da is not None)
        kernel((cdiv(size, PASS["TILE"]),), (u, a, a if da is None else da), size)
    return a


@lru_cache
def _kernel_of_product(backward: bool, slope: bool, has_bias: bool) -> Kernel:
    constants = dict(BACKWARD=backward, SLOPE=slope, HAS_BIAS=has_bias, GROUP=GROUP)
    return Kernel(_product_gelu_kernel, **constants, **PRODUCT)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def within_product(
    x: Tensor, w: Tensor, first: Tensor, a: Tensor, bias: Tensor | None = None,
    kept: Tensor | None = None, slope: bool = False,
):  # fmt: skip
    """Fill `first` and `a` (M, N) with what `finish` says of a product.

    Args:
        x: (M, K).
        w: (N, K); in backward, which is where something was kept, (K, N).
        slope: whether the slope is what is kept.
    """
    (M, K), N, backward = x.shape, first.shape[1], kept is not None
    block_m, block_n, block_k = PRODUCT["BLOCK_M"], PRODUCT["BLOCK_N"], PRODUCT["BLOCK_K"]
    programs = cdiv(M, block_m) * cdiv(N, block_n)
    if x.is_cuda:
        programs = min(programs, RESIDENT * multiprocessors(x.device))
    w_tile = [block_k, block_n] if backward else [block_n, block_k]
    descriptors = (
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, w_tile),
    )
    tensors = kept if backward else first, first, a, first if bias is None else bias
    kernel = _kernel_of_product(backward, slope, bias is not None)
    kernel((programs,), tensors, M, N, K, descriptors=descriptors)


def _takes(x: Tensor, w: Tensor) -> bool:
    """Return whether GELU is a part of a product: it was faster on Hopper, whose copy engine takes
    such rows alone.
    """
    rows, columns = w.shape
    fits = min(rows, columns) > 0 and rows % 8 == 0 and columns % 8 == 0
    return fits and x.itemsize == 2 and capability(x.device) == 90


def _aligned(t: Tensor) -> Tensor:
    """The matrix, or a copy that the copy engine takes."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _gluon() -> ModuleType | None:
    """The page of products in Gluon, unless it is not known to run here."""
    if knobs.runtime.interpret or not gluon_is_known():
        return None
    from . import _gelu_hopper

    return _gelu_hopper


def new_kept(x: Tensor, w_in: Tensor, w_out: Tensor, slope: bool) -> Tensor:
    """Uninitialised, for what forward keeps of rows x (B, M, D): u (B M, F); or gelu's slope at u
    and gelu(u), (2, B M, F), if `slope` allows that and it is faster. Dtypes, shapes and the GPU
    alone decide, so that fake tensors and CUDA graphs decide alike.
    """
    B, M, D = x.shape
    both = slope and D >= WIDE and _takes(x, w_in) and _takes(x, w_out)
    return x.new_empty(*([2] if both else []), B * M, w_in.shape[0])


def _parts(kept: Tensor) -> tuple[Tensor, Tensor, bool]:
    """u or the slope, gelu(u) or memory for it, and whether it is the slope that is kept."""
    return (*kept, True) if kept.ndim == 3 else (kept, torch.empty_like(kept), False)


def product_gelu(x: Tensor, w: Tensor, kept: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fill `kept` for u = x w^T, or x w^T + bias where u is kept, and return gelu(u)."""
    if not (len(x) and _takes(x, w)):
        u = kept.flatten(0, -2)  # which has no rows if both are kept
        torch.mm(x, w.T, out=u) if bias is None else torch.addmm(bias, x, w.T, out=u)
        return gelu_pass(u)
    (first, a, slope), x, w = _parts(kept), _aligned(x), _aligned(w)
    if slope and x.shape[1] >= DEEP and (page := _gluon()):
        page.within_product(x, w, first, a, backward=False)
    else:
        within_product(x, w, first, a, bias, slope=slope)
    return a


def product_gelu_bwd(dy: Tensor, w: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u), and the gradient of u, where that of gelu(u) is dy w."""
    if not (len(dy) and _takes(dy, w)):
        u = kept.flatten(0, -2)
        du = torch.mm(dy, w, out=torch.empty_like(u))
        return gelu_pass(u, du), du
    (first, a, slope), dy, w = _parts(kept), _aligned(dy), _aligned(w)
    du = torch.empty_like(first)
    if slope and (page := _gluon()):
        page.within_product(dy, w, first, du, backward=True)
    else:
        within_product(dy, w, du, a, kept=first, slope=slope)
    return a, du
