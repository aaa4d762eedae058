"""The products with GELU in Gluon: on a CPU what overlaps in them, on Hopper their results."""

import random
import re

import pytest
import torch
from gluon import Descriptor, Program
from helpers import DEVICE, ROOT

from shtx_kernels import _gelu
from shtx_kernels._target import capability
from shtx_kernels.internals import gluon_is_known

PAGE = (ROOT / "shtx_kernels/_gelu_hopper.py").read_text()
M, N, K, BLOCK_M, PART, BLOCK_K = 29, 21, 19, 8, 2, 8


def finish(part, kept, ACC, NARROW, BACKWARD, SLOPE):
    """`_gelu.finish` without GELU, which is tested with the op."""
    return (part * kept, part) if BACKWARD else (part - 1, part + 1)


def run(source, seed, backward, stages, programs=2):
    """Run the page's kernel in a random order, and compare what it fills with what it should."""
    begin, end = source.index("@gluon.jit"), source.index("@lru_cache")
    code = re.sub(r"@gluon\.\w+(\(.*\))?\n", "", source[begin:end])
    torch.manual_seed(0)
    new = lambda *shape: torch.randint(-3, 4, shape).float()
    x, w, kept = new(M, K), new(N, K), new(M, N) if backward else torch.full((M, N), torch.nan)
    expected = finish(x @ w.T, kept.clone(), None, None, backward, True)
    out, w = torch.full((M, N), torch.nan), w.T.contiguous() if backward else w
    w_tile = (BLOCK_K, 4 * PART) if backward else (4 * PART, BLOCK_K)
    for pid in range(programs):
        program = Program(pid, programs, seed)
        space = dict(program.globals, finish=finish, place=_gelu.place.fn)
        exec(code, space)
        space["_product_gelu_hopper_kernel"](
            Descriptor(x, BLOCK_M, BLOCK_K), Descriptor(w, *w_tile),
            *(Descriptor(t, BLOCK_M, PART) for t in (kept, out)),
            M, N, K, backward, 2, stages, 24, 240,
        )  # fmt: skip
    results = (out,) if backward else (kept, out)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("backward", [False, True])
def test_in_any_order(backward):
    """Several tiles for each group of each program, of three steps, some of them cut off."""
    for seed, stages in enumerate((2, 3, 5) * 4):
        run(PAGE, seed, backward, stages)


FREE = "                tma.store_wait(0)"
ARRIVED = "mbarrier.wait(fetched.index(WHICH), mine & 1)"
BROKEN = {  # a line of the page, and what stands there instead
    "a wait for a free stage": ("mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)", ""),
    "a wait for a filled stage": ("mbarrier.wait(ready.index(stage), (step // STAGES) & 1)", ""),
    "the phase of a stage": ("(step // STAGES) & 1)\n            w =", "0)\n            w ="),
    "a stage that is free too early": ("warpgroup_mma_wait(1", "warpgroup_mma_wait(2"),
    "the last stage's end": ("arrive(free.index((step + STAGES - 1) % STAGES), count=1)", "wait"),
    "the end of a product": ("acc = hopper.warpgroup_mma_wait(0, deps=(acc,))", ""),
    "a turn": ("mbarrier.arrive(turn.index(1 - WHICH), count=1)", "pass"),
    "the first turn": ("mbarrier.arrive(turn.index(0), count=1)", "pass"),
    "what was kept": (ARRIVED, "pass"),
    "its phase": (ARRIVED, ARRIVED.replace("mine & 1", "0")),
    "the last tile's copies": ("    tma.store_wait(0)\n            meet()\n", "    meet()\n"),
    "a buffer's copies": (FREE, ""),
    "too few copies waited for": (FREE, FREE.replace("0", "2")),
    "threads that meet before": ("meet()  # every", "pass  # every"),
    "threads that meet after": ("_shared()\n            meet()", "_shared()"),
    "a fence": ("hopper.fence_async_shared()", "pass"),
    "the end": ("        mine += 1\n    tma.store_wait(0)", "        mine += 1"),
}


@pytest.mark.parametrize("line, instead", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_found(line, instead):
    """In some order, forward or backward, so that the test above can fail."""
    assert PAGE.count(line) == 1
    broken, choice = PAGE.replace(line, instead), random.Random(0)
    with pytest.raises((AssertionError, AttributeError)):
        for seed in range(100):
            run(broken, seed, backward=seed % 2 == 0, stages=choice.choice((2, 3)))


ON_HOPPER = pytest.mark.skipif(
    DEVICE != "cuda" or capability(torch.device("cuda")) != 90 or not gluon_is_known(),
    reason="needs Hopper and a version of Triton whose Gluon is known",
)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", [9, 700, 20000])  # from one tile to several of each program
def test_makes_what_its_twin_makes(rows, backward, dtype):
    """Each is off what fp64 makes of the same numbers by rounding alone, and repeats to the bit."""
    from shtx_kernels import _gelu_hopper

    torch.manual_seed(0)
    width, inner = 520, 136
    new = lambda *shape: torch.randn(shape, device=DEVICE, dtype=dtype)
    x, kept = new(rows, inner), new(rows, width)
    w = new(*((inner, width) if backward else (width, inner))) * inner**-0.5

    def made(twin):
        slope, out = kept.clone(), torch.full_like(kept, torch.nan)
        if not twin:
            _gelu_hopper.within_product(x, w, slope, out, backward)
        elif backward:
            _gelu.within_product(x, w, out, torch.empty_like(out), kept=slope, slope=True)
        else:
            _gelu.within_product(x, w, slope, out, slope=True)
        return slope, out

    def truth():
        part = x.double() @ (w.double() if backward else w.double().T)
        if backward:
            return kept.double(), part * kept
        u = part.requires_grad_()
        a = torch.nn.functional.gelu(u)
        return torch.autograd.grad(a.sum(), u)[0], a.detach()

    ours = made(twin=False)
    for got, twin, true in zip(ours, made(twin=True), truth(), strict=True):
        budget = 2 * (twin - true).abs().max() + torch.finfo(dtype).eps
        assert (got - true).abs().max() <= budget
    for _ in range(5):
        assert all(map(torch.equal, made(twin=False), ours))
