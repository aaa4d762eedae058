"""Products with GELU on Hopper, finished while the tensor cores multiply for other tiles.

One warp copies tiles of both factors into a ring of stages. Two groups of four warps take turns at
the tensor cores, each with tiles of its own: while one multiplies, the other computes GELU of its
last product and leaves the results to the copy engine. So GELU takes no time of its own where it
takes less than a product. A single group of eight warps has larger tiles, and nothing that hides
its GELU.

This is written in Gluon, which has no interpreter and compiles for no other target than Hopper.
`_gelu` says where it runs, and has its twin, `_product_gelu_kernel`, for everything else.
"""

from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._gelu import GROUP, finish, multiprocessors
from .launch import Kernel, cdiv

mbarrier, tma = hopper.mbarrier, hopper.tma
if hasattr(tma, "async_load"):  # Triton 3.9
    copy_in, copy_out, meet = tma.async_load, tma.async_store, gl.barrier
else:
    copy_in, copy_out = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    meet = gl.thread_barrier

# A tile is finished in PARTS, of which BUFFERS at once are on their way to memory; with no buffers,
# threads write results themselves. One group has 8 warps, each of two has 4.
PAIR = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, STAGES=4, GROUPS=2, PARTS=4)
FORWARD = PAIR | dict(BUFFERS=1)
BACKWARD = PAIR | dict(BUFFERS=1)
# 384 threads of 168 registers: the copying warp gives most of its own to those that multiply
REGISTERS, COPYING, MULTIPLYING = 168, 24, 240


@gluon.jit
def _place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Row and column of a tile: columns of GROUP tiles, so that factors stay in the L2 cache."""
    group = tile // (GROUP * tiles_n)
    rows = gl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@gluon.jit
def _copy(p, BACKWARD: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr):
    """Fill the ring with tiles of both factors, in the order in which they are multiplied."""
    tensors, sizes, bufs, bars = p
    x_desc, w_desc, kept_desc, first_desc, a_desc, first_ptr, a_ptr, bias_ptr = tensors
    M, N, tiles_m, tiles_n, steps = sizes
    x_bufs, w_bufs, kept_bufs, out_bufs = bufs
    ready, free, turn, fetched = bars
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = first_desc.block_type.shape[1] * PARTS
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        for i in range(steps):
            stage, bar = step % STAGES, ready.index(step % STAGES)
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            copy_in(x_desc, [m * BLOCK_M, i * BLOCK_K], bar, x_bufs.index(stage))
            if BACKWARD:
                copy_in(w_desc, [i * BLOCK_K, n * BLOCK_N], bar, w_bufs.index(stage))
            else:
                copy_in(w_desc, [n * BLOCK_N, i * BLOCK_K], bar, w_bufs.index(stage))
            step += 1


@gluon.jit
def _halves(t):
    ROWS: gl.constexpr = t.shape[0]
    HALF: gl.constexpr = t.shape[1] // 2
    return t.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()


@gluon.jit
def _split(acc, PARTS: gl.constexpr):
    """The parts of a tile, which are columns next to each other, in order."""
    if PARTS == 1:
        return (acc,)
    elif PARTS == 2:
        return _halves(acc)
    else:
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        return first, second, third, fourth


@gluon.constexpr_function
def _rows_in_threads(ROWS, COLUMNS, WARPS):
    """A thread has 8 numbers of a row next to each other, and its warp the rows that it has after a
    product: so numbers change places among four threads alone.
    """
    columns = [[0, 2**i] for i in range(5, COLUMNS.bit_length() - 1)]
    rows = [[16 * WARPS * 2**i, 0] for i in range((ROWS // (16 * WARPS)).bit_length() - 1)]
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], *columns, *rows]
    threads = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    warps = [[16 * 2**i, 0] for i in range(WARPS.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, threads, warps, [], [ROWS, COLUMNS])


@gluon.jit
def _write(t, ptr, m, n, M, N, WARPS: gl.constexpr):
    """Write a part without the copy engine."""
    ROWS: gl.constexpr = t.shape[0]
    COLUMNS: gl.constexpr = t.shape[1]
    layout: gl.constexpr = _rows_in_threads(ROWS, COLUMNS, WARPS)
    t = gl.convert_layout(t, layout)
    offs_m = (m + gl.arange(0, ROWS, gl.SliceLayout(1, layout))).expand_dims(1)
    offs_n = (n + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))).expand_dims(0)
    gl.store(ptr + offs_m.to(gl.int64) * N + offs_n, t, mask=(offs_m < M) & (offs_n < N))


@gluon.jit
def _consume(
    p, WHICH: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, BACKWARD: gl.constexpr,
    SLOPE: gl.constexpr, HAS_BIAS: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """Multiply every GROUPS-th tile, and finish it."""
    tensors, sizes, bufs, bars = p
    x_desc, w_desc, kept_desc, first_desc, a_desc, first_ptr, a_ptr, bias_ptr = tensors
    M, N, tiles_m, tiles_n, steps = sizes
    x_bufs, w_bufs, kept_bufs, out_bufs = bufs
    ready, free, turn, fetched = bars
    HAS_A: gl.constexpr = not (BACKWARD and SLOPE)
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = first_desc.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS * PARTS, 16])
    acc = gl.zeros((BLOCK_M, COLUMNS * PARTS), dtype=gl.float32, layout=layout)
    mine = 0
    start = gl.program_id(0) + WHICH * gl.num_programs(0)
    for tile in range(start, tiles_m * tiles_n, GROUPS * gl.num_programs(0)):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        m, n = m * BLOCK_M, n * (COLUMNS * PARTS)
        if BACKWARD:  # what was kept arrives while the tensor cores work
            tma.store_wait(0)
            meet()
            bar = fetched.index(WHICH)
            mbarrier.expect(bar, PARTS * kept_desc.block_type.nbytes)
            for j in gl.static_range(PARTS):
                copy_in(kept_desc, [m, n + j * COLUMNS], bar, kept_bufs.index(WHICH * PARTS + j))

        step = (mine * GROUPS + WHICH) * steps
        if GROUPS == 2:
            mbarrier.wait(turn.index(WHICH), mine & 1)
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            w = w_bufs.index(stage) if BACKWARD else w_bufs.index(stage).permute((1, 0))
            acc = hopper.warpgroup_mma(x_bufs.index(stage), w, acc, use_acc=i > 0, is_async=True)
            # the product before has ended, and with it what reads its stage
            acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        if GROUPS == 2:
            mbarrier.arrive(turn.index(1 - WHICH), count=1)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)

        if BACKWARD:
            mbarrier.wait(fetched.index(WHICH), mine & 1)
        parts = _split(acc, PARTS)
        of_part: gl.constexpr = parts[0].type.layout
        for j in gl.static_range(PARTS):
            part = parts[j]
            column = n + j * COLUMNS
            first_buf = kept_bufs.index(WHICH * PARTS + j if BACKWARD else 0)
            kept = part
            if BACKWARD:
                kept = first_buf.load(of_part).to(gl.float32)
            if HAS_BIAS:
                offs_n = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, of_part))
                bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
                part += bias.to(gl.float32).expand_dims(0)
            first, a = finish(part, kept, gl.float32, True, BACKWARD, SLOPE)
            first, a = first.to(first_desc.dtype), a.to(first_desc.dtype)
            if BUFFERS == 0:
                _write(first, first_ptr, m, column, M, N, WARPS)
                if HAS_A:
                    _write(a, a_ptr, m, column, M, N, WARPS)
            else:
                slot = WHICH * BUFFERS + j % BUFFERS
                if HAS_A:
                    tma.store_wait(2 * (BUFFERS - 1))
                meet()  # every thread has read what was kept, and sees that buffers are free
                if not BACKWARD:
                    first_buf = out_bufs.index(GROUPS * BUFFERS + slot)
                first_buf.store(first)
                if HAS_A:
                    out_bufs.index(slot).store(a)
                hopper.fence_async_shared()
                meet()
                copy_out(first_desc, [m, column], first_buf)
                if HAS_A:
                    copy_out(a_desc, [m, column], out_bufs.index(slot))
        mine += 1
    tma.store_wait(0)


@gluon.jit
def _barriers(NUMBER: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _tiles(desc, NUMBER: gl.constexpr):
    shape: gl.constexpr = [NUMBER] + desc.block_type.shape
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit(do_not_specialize=["M"])
def _product_gelu_hopper_kernel(
    x_desc, w_desc, kept_desc, first_desc, a_desc, first_ptr, a_ptr, bias_ptr, M, N, K,
    BACKWARD: gl.constexpr, SLOPE: gl.constexpr, HAS_BIAS: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr, BUFFERS: gl.constexpr,
    COPYING: gl.constexpr, MULTIPLYING: gl.constexpr,
):  # fmt: skip
    """What `finish` makes of x w^T + bias, and in backward of x w and what was kept."""
    x_bufs, w_bufs = _tiles(x_desc, STAGES), _tiles(w_desc, STAGES)
    kept_bufs, out_bufs = x_bufs, x_bufs
    if BACKWARD:
        kept_bufs = _tiles(kept_desc, GROUPS * PARTS)
    OUTPUTS: gl.constexpr = 2 - BACKWARD - (BACKWARD and SLOPE)  # that have buffers of their own
    if OUTPUTS * BUFFERS > 0:
        out_bufs = _tiles(first_desc, OUTPUTS * GROUPS * BUFFERS)
    ready, free, turn, fetched = _barriers(STAGES), _barriers(STAGES), _barriers(2), _barriers(2)
    mbarrier.arrive(turn.index(0), count=1)  # the first group multiplies first

    steps = gl.cdiv(K, x_desc.block_type.shape[1])
    tiles_m = gl.cdiv(M, x_desc.block_type.shape[0])
    tiles_n = gl.cdiv(N, first_desc.block_type.shape[1] * PARTS)
    tensors = x_desc, w_desc, kept_desc, first_desc, a_desc, first_ptr, a_ptr, bias_ptr
    sizes, bufs = (M, N, tiles_m, tiles_n, steps), (x_bufs, w_bufs, kept_bufs, out_bufs)
    p = tensors, sizes, bufs, (ready, free, turn, fetched)
    # a tuple of constants that had a name would be one of numbers
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (p, 0, 2, 4, BACKWARD, SLOPE, HAS_BIAS, GROUP, PARTS, BUFFERS)),
            (_consume, (p, 1, 2, 4, BACKWARD, SLOPE, HAS_BIAS, GROUP, PARTS, BUFFERS)),
            (_copy, (p, BACKWARD, GROUP, PARTS)),
        ], [4, 1], [MULTIPLYING, COPYING])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (p, 0, 1, 8, BACKWARD, SLOPE, HAS_BIAS, GROUP, PARTS, BUFFERS)),
            (_copy, (p, BACKWARD, GROUP, PARTS)),
        ], [1], [COPYING])  # fmt: skip


@lru_cache
def _kernel_of(sizes: tuple, **constants) -> Kernel:
    sizes = {name: size for name, size in sizes if not name.startswith("BLOCK")}
    warps = 4 if sizes["GROUPS"] == 2 else 8
    return Kernel(
        _product_gelu_hopper_kernel,
        **constants, **sizes, num_warps=warps,
        GROUP=GROUP, COPYING=COPYING, MULTIPLYING=MULTIPLYING, maxnreg=REGISTERS,
    )  # fmt: skip


def _descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [*block], layout)


def within_product(
    x: Tensor, w: Tensor, first: Tensor, a: Tensor, bias: Tensor | None = None,
    kept: Tensor | None = None, slope: bool = False,
):  # fmt: skip
    """What `_gelu.within_product` does, with the same arguments."""
    (M, K), N, backward = x.shape, first.shape[1], kept is not None
    sizes = BACKWARD if backward else FORWARD
    block_m, block_n, block_k = (sizes[f"BLOCK_{axis}"] for axis in "MNK")
    programs = cdiv(M, block_m) * cdiv(N, block_n)
    if x.is_cuda:
        programs = min(programs, multiprocessors(x.device))
    part = block_m, block_n // sizes["PARTS"]
    descriptors = (
        _descriptor(x, block_m, block_k),
        _descriptor(w, *((block_k, block_n) if backward else (block_n, block_k))),
        *(_descriptor(t, *part) for t in (kept if backward else first, first, a)),
    )
    kernel = _kernel_of(
        tuple(sizes.items()), BACKWARD=backward, SLOPE=slope, HAS_BIAS=bias is not None
    )
    tensors = first, a, first if bias is None else bias
    kernel((programs,), tensors, M, N, K, descriptors=descriptors)
