"""Products on Hopper, finished while the tensor cores multiply for other tiles.

    forward:   u = x w^T,  out = gelu(u),  kept = gelu's slope at u
    backward:  out = (x w) kept

One warp copies tiles of both factors into a ring of stages. Two groups of four warps take turns at
the tensor cores, each with tiles of its own: while one multiplies, the other finishes its last
product and leaves the results to the copy engine. So GELU takes no time of its own where it takes
less than a product.

This is written in Gluon, which has no interpreter and compiles for no other target than Hopper.
`_gelu` says where it runs, and has its twin, `_product_gelu_kernel`, for everything else.
"""

from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._gelu import finish, multiprocessors, place
from .launch import Kernel, cdiv

mbarrier, tma = hopper.mbarrier, hopper.tma
if hasattr(tma, "async_load"):  # Triton 3.9
    copy_in, copy_out, meet = tma.async_load, tma.async_store, gl.barrier
else:
    copy_in, copy_out = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    meet = gl.thread_barrier

# The fastest of 15 on one H200: larger tiles, tiles of one group of eight warps, fewer stages, more
# buffers, and results that threads write themselves took up to 30% longer.
BLOCK_M, BLOCK_N, BLOCK_K, STAGES = 128, 128, 64, 5
GROUP = 8  # as of the twin
# 384 threads of 168 registers: the copying warp gives most of its own to those that multiply
REGISTERS, COPYING, MULTIPLYING = 168, 24, 240


@gluon.jit
def _copy(p, BACKWARD: gl.constexpr, GROUP: gl.constexpr):
    """Fill the ring with tiles of both factors, in the order in which they are multiplied."""
    descs, counts, bufs, bars = p
    x_desc, w_desc, kept_desc, out_desc = descs
    tiles_m, tiles_n, steps = counts
    x_bufs, w_bufs, part_bufs = bufs
    ready, free, turn, fetched = bars
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = kept_desc.block_type.shape[1] * 4
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, GROUP)
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
def _multiply(p, WHICH: gl.constexpr, BACKWARD: gl.constexpr, GROUP: gl.constexpr):
    """Multiply every other tile, and finish it by quarters of its columns."""
    descs, counts, bufs, bars = p
    x_desc, w_desc, kept_desc, out_desc = descs
    tiles_m, tiles_n, steps = counts
    x_bufs, w_bufs, part_bufs = bufs
    ready, free, turn, fetched = bars
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = kept_desc.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS * 4, 16])
    acc = gl.zeros((BLOCK_M, COLUMNS * 4), dtype=gl.float32, layout=layout)
    mine = 0
    start = gl.program_id(0) + WHICH * gl.num_programs(0)
    for tile in range(start, tiles_m * tiles_n, 2 * gl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, GROUP)
        m, n = m * BLOCK_M, n * (COLUMNS * 4)
        if BACKWARD:  # what was kept arrives while the tensor cores work
            tma.store_wait(0)
            meet()
            bar = fetched.index(WHICH)
            mbarrier.expect(bar, 4 * kept_desc.block_type.nbytes)
            for j in gl.static_range(4):
                copy_in(kept_desc, [m, n + j * COLUMNS], bar, part_bufs.index(4 * WHICH + j))

        step = (2 * mine + WHICH) * steps
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
        mbarrier.arrive(turn.index(1 - WHICH), count=1)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)

        if BACKWARD:
            mbarrier.wait(fetched.index(WHICH), mine & 1)
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = first, second, third, fourth
        for j in gl.static_range(4):
            # in backward, results take the place of what was kept
            out_buf = part_bufs.index(4 * WHICH + j if BACKWARD else 2 * WHICH)
            if BACKWARD:
                kept = out_buf.load(first.type.layout).to(gl.float32)
                out, _ = finish(parts[j], kept, gl.float32, True, True, True)
            else:
                kept, out = finish(parts[j], parts[j], gl.float32, True, False, True)
                tma.store_wait(0)
            meet()  # every thread has read what was kept, or sees that the buffers are free
            out_buf.store(out.to(out_desc.dtype))
            if not BACKWARD:
                part_bufs.index(2 * WHICH + 1).store(kept.to(kept_desc.dtype))
            hopper.fence_async_shared()
            meet()
            at = [m, n + j * COLUMNS]
            copy_out(out_desc, at, out_buf)
            if not BACKWARD:
                copy_out(kept_desc, at, part_bufs.index(2 * WHICH + 1))
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
    x_desc, w_desc, kept_desc, out_desc, M, N, K,
    BACKWARD: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    COPYING: gl.constexpr, MULTIPLYING: gl.constexpr,
):  # fmt: skip
    """kept and out (M, N), or in backward out alone."""
    # a part of each of two results of a group, or in backward all parts of what was kept
    bufs = _tiles(x_desc, STAGES), _tiles(w_desc, STAGES), _tiles(kept_desc, 8 if BACKWARD else 4)
    ready, free, turn, fetched = _barriers(STAGES), _barriers(STAGES), _barriers(2), _barriers(2)
    mbarrier.arrive(turn.index(0), count=1)  # the first group multiplies first

    steps = gl.cdiv(K, x_desc.block_type.shape[1])
    tiles_m = gl.cdiv(M, x_desc.block_type.shape[0])
    tiles_n = gl.cdiv(N, kept_desc.block_type.shape[1] * 4)
    descs, counts = (x_desc, w_desc, kept_desc, out_desc), (tiles_m, tiles_n, steps)
    p = descs, counts, bufs, (ready, free, turn, fetched)
    gl.warp_specialize([
        (_multiply, (p, 0, BACKWARD, GROUP)),
        (_multiply, (p, 1, BACKWARD, GROUP)),
        (_copy, (p, BACKWARD, GROUP)),
    ], [4, 1], [MULTIPLYING, COPYING])  # fmt: skip


@lru_cache
def _kernel_of(backward: bool) -> Kernel:
    return Kernel(
        _product_gelu_hopper_kernel,
        BACKWARD=backward, GROUP=GROUP, STAGES=STAGES, COPYING=COPYING, MULTIPLYING=MULTIPLYING,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def _descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [*block], layout)


def within_product(x: Tensor, w: Tensor, kept: Tensor, out: Tensor, backward: bool):
    """Fill `kept` and `out` (M, N), or in backward `out` alone.

    Args:
        x: (M, K).
        w: (N, K); in backward (K, N).
    """
    (M, K), N = x.shape, out.shape[1]
    programs = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    if x.is_cuda:
        programs = min(programs, multiprocessors(x.device))
    descriptors = (
        _descriptor(x, BLOCK_M, BLOCK_K),
        _descriptor(w, *((BLOCK_K, BLOCK_N) if backward else (BLOCK_N, BLOCK_K))),
        *(_descriptor(t, BLOCK_M, BLOCK_N // 4) for t in (kept, out)),
    )
    _kernel_of(backward)((programs,), (), M, N, K, descriptors=descriptors)
