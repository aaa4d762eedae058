"""The products with GELU in Gluon: on a CPU what overlaps in them, on Hopper their results."""

import random
import re
from itertools import product

import pytest
import torch
from gluon import Descriptor, Pointer, Program
from helpers import DEVICE, ROOT

from shtx_kernels import _gelu
from shtx_kernels._target import capability
from shtx_kernels.internals import gluon_is_known

PAGE = (ROOT / "shtx_kernels/_gelu_hopper.py").read_text()
M, N, K, BLOCK_M, PART, BLOCK_K = 29, 21, 19, 8, 4, 8
OPTIONS = {
    "forward": dict(BACKWARD=False, SLOPE=False, HAS_BIAS=True),
    "forward, slope": dict(BACKWARD=False, SLOPE=True, HAS_BIAS=False),
    "backward": dict(BACKWARD=True, SLOPE=False, HAS_BIAS=False),
    "backward, slope": dict(BACKWARD=True, SLOPE=True, HAS_BIAS=False),
}


def finish(part, kept, ACC, NARROW, BACKWARD, SLOPE):
    """`_gelu.finish` without GELU, which is tested with the op."""
    if BACKWARD:
        return part * kept, kept + 1
    return (part - 1 if SLOPE else part), part + 1


def run(source, seed, BACKWARD, SLOPE, HAS_BIAS, STAGES, GROUPS, PARTS, BUFFERS, programs=2):
    """Run the page's kernel in a random order, and compare what it fills with what it should."""
    begin, end = source.index("@gluon.jit"), source.index("@lru_cache")
    code = re.sub(r"@gluon\.\w+(\(.*\))?\n", "", source[begin:end])
    torch.manual_seed(0)
    new = lambda *shape: torch.randint(-3, 4, shape).float()
    x, w, bias, kept = new(M, K), new(N, K), new(N), new(M, N)
    first, a = torch.full((2, M, N), torch.nan)
    block_n = PART * PARTS
    for pid in range(programs):
        program = Program(pid, programs, seed)
        space = dict(program.globals, finish=finish)
        exec(code, space)
        descriptors = (
            Descriptor(x, BLOCK_M, BLOCK_K),
            Descriptor(w.T.contiguous(), BLOCK_K, block_n)
            if BACKWARD
            else Descriptor(w, block_n, BLOCK_K),
            *(Descriptor(t, BLOCK_M, PART) for t in (kept if BACKWARD else first, first, a)),
        )
        space["_product_gelu_hopper_kernel"](
            *descriptors, *map(Pointer, (first, a, bias)), M, N, K,
            BACKWARD, SLOPE, HAS_BIAS, 2, STAGES, GROUPS, PARTS, BUFFERS, 24, 240,
        )  # fmt: skip
    expected = finish(x @ w.T + bias * HAS_BIAS, kept, None, None, BACKWARD, SLOPE)
    assert torch.equal(first, expected[0])
    assert (BACKWARD and SLOPE) or torch.equal(a, expected[1])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_any_order(options):
    """Several tiles for each group of each program, of three steps, some of them cut off."""
    sizes = (1, 1), (2, 1), (2, 2), (4, 2), (2, 0)
    for seed, (stages, (parts, buffers)) in enumerate(product((2, 3, 5), sizes)):
        groups = 1 if seed % 4 == 3 else 2
        run(PAGE, seed, **options, STAGES=stages, GROUPS=groups, PARTS=parts, BUFFERS=buffers)


WAITS = "tma.store_wait(2 * (BUFFERS - 1))"
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
    "the last tile's copies": ("    tma.store_wait(0)\n            meet()", "    meet()"),
    "a buffer's copies": (WAITS, "pass"),
    "too few copies waited for": (WAITS, "tma.store_wait(2 * BUFFERS)"),
    "threads that meet before": ("meet()  # every", "pass  # every"),
    "threads that meet after": ("_shared()\n                meet()", "_shared()"),
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
            options = dict(OPTIONS["forward"] if seed % 2 else OPTIONS["backward"])
            parts, buffers = choice.choice(((1, 1), (2, 1), (2, 2)))
            options |= dict(STAGES=choice.choice((2, 3)), PARTS=parts, BUFFERS=buffers)
            run(broken, seed, **options, GROUPS=2)


ON_HOPPER = pytest.mark.skipif(
    DEVICE != "cuda" or capability(torch.device("cuda")) != 90 or not gluon_is_known(),
    reason="needs Hopper and a version of Triton whose Gluon is known",
)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [9, 700, 20000])  # from one tile to several of each program
def test_makes_what_its_twin_makes(rows, options, dtype):
    """Each is off what fp64 makes of the same numbers by rounding alone, and repeats to the bit."""
    from shtx_kernels import _gelu_hopper

    torch.manual_seed(0)
    width, inner = 520, 136
    new = lambda *shape: torch.randn(shape, device=DEVICE, dtype=dtype)
    x, bias = new(rows, inner), new(width) if options["HAS_BIAS"] else None
    kept = new(rows, width) if options["BACKWARD"] else None
    w = new(*((inner, width) if options["BACKWARD"] else (width, inner))) * inner**-0.5
    slope = options["SLOPE"]

    def made(page):
        first, a = torch.full((2, rows, width), torch.nan, device=DEVICE, dtype=dtype)
        page.within_product(x, w, first, a, bias, kept, slope)
        return [first] if kept is not None and slope else [first, a]

    def truth():
        part = x.double() @ (w.double() if kept is not None else w.double().T)
        u = (part + bias if bias is not None else part) if kept is None else kept.double()
        if kept is not None and slope:
            return [part * u]
        u = u.detach().requires_grad_()
        (s,) = torch.autograd.grad(torch.nn.functional.gelu(u).sum(), u)
        first = part * s if kept is not None else s if slope else u
        return [first.detach(), torch.nn.functional.gelu(u).detach()]

    ours = made(_gelu_hopper)
    for got, twin, true in zip(ours, made(_gelu), truth(), strict=True):
        budget = 2 * (twin - true).abs().max() + torch.finfo(dtype).eps
        assert (got - true).abs().max() <= budget
    for _ in range(5):
        assert all(map(torch.equal, made(_gelu_hopper), ours))
