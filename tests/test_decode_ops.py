"""The ops of one token against their specification: of a batch whose sequences are at different
positions, so that some of its rows are due and some are not.
"""

import itertools
from importlib import import_module

import pytest
import torch
from accuracy import graphed
from helpers import DEVICE, DTYPES
from torch.utils._pytree import tree_leaves, tree_map_only

from shtx.ops import FUSED, REFERENCE, Attention, Lookup, Norm, Part, Projection
from shtx_kernels._target import capability
from shtx_kernels.decode import _device, _many

BATCHES = [[7], [8], [0, 7, 8]]  # positions; one sequence is a kernel of its own


def ring(B, slots, *shape):
    return torch.randn(B, slots, *shape)


def projections(B):
    """Two levels of every kind of stage, of odd and unequal widths."""
    vector, rows = lambda n: torch.randn(n), lambda o, k: torch.randn(o, k) / k**0.5
    rms, layer = dict(norm="rms", gamma=vector(24)), dict(norm="layer")
    layer |= dict(gamma=vector(17), beta=vector(17))
    yield [
        Projection(ring(B, 4, 24), rows(40, 24), ring(B, 1, 40), 1, dilation=2, **rms),
        Projection(ring(B, 8, 17), rows(9, 17), ring(B, 1, 9), 2, dilation=4, **layer),
    ]
    yield [
        Projection(ring(B, 2, 24), rows(70, 24), ring(B, 1, 70), 4, 1, **rms, activation="gelu"),
        Projection(ring(B, 2, 17), rows(9, 17), ring(B, 4, 9), 1, **layer),
    ]
    residual = ring(B, 4, 20)
    yield [
        Projection(ring(B, 1, 33), rows(20, 33), ring(B, 2, 20), 2, residual=ring(B, 4, 20)),
        Projection(ring(B, 1, 8), rows(20, 8), residual, 1, bias=vector(20), residual=residual),
    ]
    conv = ring(B, 8, 5)
    yield [
        Projection(
            conv, rows(12, 40), ring(B, 1, 12), 4, bias=vector(12), activation="silu", taps=8
        ),
        Projection(
            conv, rows(12, 10), ring(B, 1, 12), 1, bias=vector(12), activation="silu", taps=2
        ),
    ]


def turns(keys, E):
    """Draw a rotation and decay for each distance; there is none at distance 0."""
    table = torch.randn(keys, 2, E // 2)
    table[0] = torch.tensor([[1.0], [0.0]])
    return table


def attentions(B):
    """Attention within a window, with a window beyond the tokens there are, and in full."""
    for (H, E, keys, dilation, stride), (h, e, n, a, s) in itertools.pairwise(
        [(2, 8, 4, 2, 1), (1, 6, 3, 1, 4), (3, 16, 80, 1, 1), (2, 8, 4, 2, 1)]
    ):
        yield [
            Attention(
                ring(B, 1, 3 * H * E), ring(B, keys * dilation, 2, H, E), ring(B, 1, H * E),
                turns(keys, E), stride, dilation,
            ),
            Attention(
                ring(B, 1, 3 * h * e), ring(B, n * a, 2, h, e), ring(B, 1, h * e),
                turns(n, e), s, a,
            ),
        ]  # fmt: skip


def merges(B):
    widths, strides = (24, 7, 16), (1, 4, 2)
    kept = [None, torch.randn(B, 11).square(), torch.randn(B, 11).square()]
    return [Part(ring(B, 4, d), k, s) for d, k, s in zip(widths, kept, strides, strict=True)]


def cases(B):
    """Name of an op, and its arguments after the position."""
    for stage in projections(B):
        yield "project", [stage]
    for stage in attentions(B):
        yield "attend", [stage]
    yield "merge", [merges(B), torch.randn(10, 47) / 7, torch.randn(10), ring(B, 1, 10)]
    norms = [
        Norm(ring(B, 4, d), torch.randn(d), torch.randn(d), ring(B, 2, d + 3)[..., 3:], s)
        for d, s in ((24, 2), (7, 1))
    ]
    yield "norm", [norms]
    ids = lambda *shape: torch.randint(19, shape)
    lookups = [
        Lookup(torch.randn(4, 19, 24), torch.randn(24), "silu", ring(B, 1, 24), 2),
        Lookup(torch.randn(1, 19, 7), None, None, ring(B, 4, 7), 1),
    ]
    yield "embed", [ids(B), ids(B, 8), lookups]


COUNT = len(list(cases(1)))
BY_TILES = [i for i, (name, _) in enumerate(cases(1)) if name in ("project", "merge")]
FLOATS = torch.is_floating_point


def run(op, name, positions, arguments, dtype):
    """All tensors of the arguments after the op, in fp64. Views of one tensor stay views of it."""
    copies = {}

    def copy(t):
        base = t if t._base is None else t._base
        wide = dtype if dtype == torch.float64 else torch.float32
        # tensors that keep sums or angles are not narrowed
        kept = name == "merge" and t.ndim == 2 and t.shape[-1] == 11
        to = wide if kept or (name == "attend" and t.ndim == 3 and t.shape[1] == 2) else dtype
        if id(base) not in copies:
            copies[id(base)] = base.to(DEVICE, to if FLOATS(base) else base.dtype, copy=True)
        return copies[id(base)].as_strided(t.shape, t.stride(), t.storage_offset())

    arguments = tree_map_only(torch.Tensor, copy, arguments)
    op(torch.tensor(positions, device=DEVICE), *arguments)
    return [t.double() if FLOATS(t) else t for t in tree_leaves(arguments) if torch.is_tensor(t)]


def check_accuracy(name, arguments, positions, dtype):
    """Compare with fp64, of what the reference is off in the same dtype."""
    fused, reference = (getattr(impl.decode, name) for impl in (FUSED, REFERENCE))
    # all start from numbers that the dtype has
    arguments = tree_map_only(
        torch.Tensor, lambda t: t.copy_(t.to(dtype)) if FLOATS(t) else t, arguments
    )
    truth = run(reference, name, positions, arguments, torch.float64)
    theirs = run(reference, name, positions, arguments, dtype)
    ours = run(fused, name, positions, arguments, dtype)
    for t, r, o in zip(truth, theirs, ours, strict=True):
        if not FLOATS(t):
            assert torch.equal(o, t)
            continue
        budget = 2 * (r - t).abs().max() + torch.finfo(dtype).eps * t.abs().max()
        assert o.isfinite().all() and (o - t).abs().max() <= budget


@pytest.mark.parametrize("case", range(COUNT))
@pytest.mark.parametrize("positions", BATCHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_the_reference(case, positions, dtype):
    torch.manual_seed(case)
    check_accuracy(*list(cases(len(positions)))[case], positions, dtype)


@pytest.mark.parametrize("case", BY_TILES)
@pytest.mark.parametrize("B", [33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_sequences(case, B, dtype):
    """A tile of 64 rows, or two, each at a position of its own."""
    torch.manual_seed(B + case)
    check_accuracy(*list(cases(B))[case], torch.randint(0, 50, (B,)).tolist(), dtype)


@pytest.mark.parametrize("warps", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_takes_many_keys_step_by_step(warps, dtype, monkeypatch):
    monkeypatch.setattr(import_module("shtx_kernels.decode.attend"), "WARPS", ((0, warps),))
    torch.manual_seed(warps)
    B, H, E, keys = 3, 2, 8, 300
    qkv, past, out = ring(B, 1, 3 * H * E), ring(B, keys, 2, H, E), ring(B, 1, H * E)
    attention = Attention(qkv, past, out, turns(keys, E), 1, 1)
    check_accuracy("attend", [[attention]], [299, 130, 5], dtype)


def test_tiles_of_many_rows():
    """Deep ones take more shared memory than fp32, or a GPU before Hopper, has room for."""
    device = torch.device(DEVICE)
    tile = lambda rows, dtype: _device.options_of_rows(
        rows, torch.empty(2, 2, dtype=dtype, device=device), _many.DEEP, _many.SHALLOW
    )
    assert [tile(n, torch.bfloat16)["BLOCK_B"] for n in (2, 17, 64, 65)] == [16, 32, 64, 64]
    deep = _many.DEEP if capability(device) >= 90 else _many.SHALLOW
    assert tile(64, torch.bfloat16).items() >= deep.items()
    assert tile(64, torch.float32).items() >= _many.SHALLOW.items()
    assert not tile(32, torch.bfloat16)["AHEAD"]
    assert tile(33, torch.bfloat16)["AHEAD"] == _device.ahead(device)["AHEAD"]


@pytest.mark.parametrize("case", range(COUNT))
def test_fp64(case):
    torch.manual_seed(case)
    name, arguments = list(cases(3))[case]
    pair = (getattr(impl.decode, name) for impl in (FUSED, REFERENCE))
    ours, theirs = (run(op, name, [0, 7, 8], arguments, torch.float64) for op in pair)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", range(COUNT))
def test_bitwise_repeatable(case):
    torch.manual_seed(case)
    name, arguments = list(cases(3))[case]
    op = getattr(FUSED.decode, name)
    first = run(op, name, [0, 7, 8], arguments, DTYPES[-1])
    for _ in range(20 if DEVICE == "cuda" else 2):
        again = run(op, name, [0, 7, 8], arguments, DTYPES[-1])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["project", "attend", "norm"])
def test_nothing_to_do(name):
    getattr(FUSED.decode, name)(torch.zeros(2, dtype=torch.long, device=DEVICE), [])


SAMPLINGS = [(0, 5, 1.0), (1.0, 1, 1.0), (0.7, 5, 1.0), (2.0, 10**9, 0.6), (1.3, 7, 0.5)]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("V", [1, 2, 19, 257, 9000, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample(V, options, dtype):
    temperature, top_k, top_p = options
    torch.manual_seed(V)
    logits = (3 * torch.randn(8, V, device=DEVICE)).to(dtype)
    noise = torch.empty(8, 4, V, device=DEVICE).exponential_()
    position = torch.arange(8, device=DEVICE)
    ours, theirs = torch.empty(2, 8, dtype=torch.long, device=DEVICE)
    for impl, out in ((FUSED, ours), (REFERENCE, theirs)):
        impl.decode.sample(position, logits, noise, temperature, min(top_k, V), top_p, out)
    assert torch.equal(ours, theirs)


def sampled(impl, logits, noise, *options):
    ids = torch.full((len(logits),), -1, device=DEVICE)
    position = torch.zeros_like(ids)
    impl.decode.sample(position, logits, noise[:, None], *options, ids)
    return ids.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_takes_the_first_of_the_best(temperature):
    """Several ids are as good as each other, in one tile or in different ones."""
    best = [[3, 9, 39_999], [5, 32_768], [32_767, 32_768], [40, 35_000, 35_001]]
    logits = torch.randn(4, 40_000, device=DEVICE).clamp(max=4)
    for row, ids in enumerate(best):
        logits[row, ids] = 5.0
    noise = torch.full_like(logits, 0.5)
    for impl in (FUSED, REFERENCE):
        assert sampled(impl, logits, noise, temperature, 40_000, 1.0) == [ids[0] for ids in best]


def test_sample_takes_an_infinite_logit():
    logits = torch.randn(2, 40_000, device=DEVICE)
    logits[0, 17], logits[1, 39_000] = float("inf"), float("inf")
    for impl in (FUSED, REFERENCE):
        assert sampled(impl, logits, torch.ones_like(logits), 0.0, 40_000, 1.0) == [17, 39_000]


def test_sample_where_noise_is_zero():
    """It counts as tiny: the most likely of those ids wins, and never one that is not kept."""
    logits = torch.tensor([[1.0, 4.0, 3.0, 5.0, 2.0]] * 3, device=DEVICE)
    noise = torch.ones_like(logits)
    noise[0, [1, 2]] = noise[1] = 0.0
    noise[2, [0, 4]] = 0.0
    for impl in (FUSED, REFERENCE):
        assert sampled(impl, logits, noise, 1.0, 3, 1.0) == [1, 3, 3]


def test_sample_of_equal_logits_keeps_all():
    logits, ids = (
        torch.zeros(64, 5, device=DEVICE),
        torch.empty(64, dtype=torch.long, device=DEVICE),
    )
    noise = torch.empty_like(logits).exponential_()
    for top_k, top_p in ((1, 1.0), (5, 0.1)):
        position = torch.zeros_like(ids)
        FUSED.decode.sample(position, logits, noise[:, None], 1.0, top_k, top_p, ids)
        assert torch.equal(ids, noise.argmin(-1))


def long_rows(V):
    """Logits for which it is hard to tell the best from the rest."""
    x = torch.randn(V)
    yield torch.zeros(V)
    yield x.sign()  # half of them are best
    yield torch.where(torch.arange(V) % 3 == 0, x, float("-inf"))
    yield x * 10.0 ** torch.randint(-30, 30, (V,))
    yield -x.abs() - 100
    yield torch.where(torch.arange(V) < 3, x + 50, x)  # three are far from all others


@pytest.mark.parametrize("options", [(1.0, 4, 1.0), (0.7, 600, 0.6)], ids=str)
def test_sample_of_long_rows(options):
    torch.manual_seed(0)
    logits = torch.stack(list(long_rows(5000))).to(DEVICE)
    noise = torch.empty_like(logits).exponential_()
    assert sampled(FUSED, logits, noise, *options) == sampled(REFERENCE, logits, noise, *options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("B", [1, 64])
def test_in_a_graph(B):
    """Each op waits for the last, though launched before that ends, in a graph that repeats."""
    torch.manual_seed(0)
    x, w = torch.randn(B, 2, 512, device=DEVICE), torch.randn(512, 512, device=DEVICE) / 512**0.5
    streams = [x.clone(), torch.zeros_like(x)]
    position = torch.zeros(B, dtype=torch.long, device=DEVICE)
    stage = lambda a, b: [Projection(a, w, b, 1, norm="rms", gamma=torch.ones_like(w[0]))]
    stages = [stage(streams[i % 2], streams[(i + 1) % 2]) for i in range(40)]

    def step(decode):
        for projections in stages:
            decode.project(position, projections)

    graph, _ = graphed(lambda: step(FUSED.decode))
    streams[0].copy_(x)
    graph.replay()
    ours = streams[0].clone()
    streams[0].copy_(x)
    step(REFERENCE.decode)
    torch.testing.assert_close(ours, streams[0], rtol=1e-3, atol=1e-3)
