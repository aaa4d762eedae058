from typing import NamedTuple

import pytest
import torch
from accuracy import assert_as_accurate, assert_compiles_whole, forward_backward, layouts
from einops import rearrange
from helpers import DEVICE, DTYPES
from torch.nn.functional import pad

from shtx_kernels import reference, rotary_attention
from shtx_kernels.reference import attention as by_formula
from shtx_kernels.rotary_attention import library, rotations, tiles

LOW = [torch.float16, torch.bfloat16]


class Case(NamedTuple):
    B: int
    M: int
    heads: int
    E: int
    window: int | None = None
    dilation: int = 1
    xpos: bool = False
    scale: float | None = None
    interleaved: bool = False


CASES = [
    Case(2, 1, 2, 16),  # one token (of two channels, eager is exact)
    Case(2, 3, 1, 2),
    Case(1, 9, 2, 16, xpos=True),  # less than a tile
    Case(2, 70, 1, 20, scale=0.3),
    Case(1, 200, 2, 32, xpos=True),
    Case(1, 131, 1, 64, dilation=2, scale=0.7),
    Case(1, 150, 1, 128, dilation=3, xpos=True),
    Case(1, 7, 1, 16, dilation=20, xpos=True),  # everyone alone
    Case(2, 50, 3, 16, window=1),
    Case(1, 130, 1, 64, window=7, xpos=True),
    Case(1, 150, 1, 64, window=16),
    Case(1, 150, 1, 2, window=16, dilation=2),
    Case(2, 41, 1, 32, window=7, dilation=5, xpos=True, scale=0.3),
    Case(1, 140, 2, 32, window=33, xpos=True, scale=0.3),
    Case(1, 128, 1, 64, window=64, xpos=True),  # whole tiles
    Case(1, 150, 1, 128, window=64),
    Case(2, 150, 1, 20, window=65, xpos=True),
    Case(1, 200, 1, 32, window=65, dilation=3),
    Case(1, 300, 1, 16, window=128, xpos=True),  # the widest that tiles have halos for
    Case(1, 300, 1, 16, window=140),
    Case(1, 70, 1, 256, window=16),
    Case(1, 40, 2, 16, window=39),  # full, just
    Case(1, 40, 2, 16, window=38),  # not full, just
    Case(1, 140, 2, 20, dilation=2, xpos=True, interleaved=True),
    Case(2, 50, 1, 16, window=7, xpos=True, interleaved=True),
    Case(1, 200, 1, 32, window=65, interleaved=True),
]
FEW = [
    Case(2, 37, 2, 4, dilation=2, xpos=True),
    Case(2, 37, 2, 4, window=7, dilation=2),
    Case(2, 80, 1, 4, window=70, xpos=True),
]


def draw(case, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(case.B, case.M, 3 * case.heads * case.E).to(DEVICE, dtype)


def call(attention, case):
    """The op as a function of the tensor that `draw` makes."""
    return lambda qkv: attention(qkv, case.heads, **dict(list(case._asdict().items())[4:]))


def off(case, dtype):
    """Errors of the output and the gradient, by norms, against the reference in fp64."""
    qkv = draw(case, dtype)
    ours = forward_backward(call(rotary_attention, case), [qkv], dtype)
    truth = forward_backward(call(reference.rotary_attention, case), [qkv], torch.float64)
    return [((o - t).norm() / t.norm()).item() for o, t in zip(ours, truth, strict=True)]


def assert_repeats(case, dtype, repeats):
    fn, qkv = call(rotary_attention, case), draw(case)
    first = forward_backward(fn, [qkv], dtype)
    for _ in range(repeats):
        again = forward_backward(fn, [qkv], dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype):
    fused, twin = (call(fn, case) for fn in (rotary_attention, reference.rotary_attention))
    assert_as_accurate(fused, twin, [draw(case)], dtype, gradient_slack=3.0)


def by_tiles(monkeypatch, BLOCK, HALO, window):
    """Set these tiles for every dtype. Forward holds one halo alone."""
    sizes = dict(BLOCK=BLOCK, HALO=HALO, num_warps=4, num_stages=1)
    monkeypatch.setattr(tiles, "backward_by_tiles", lambda *_: sizes)
    monkeypatch.setattr(tiles, "forward_by_tiles", lambda *_: sizes if window <= HALO else None)


@pytest.mark.parametrize(
    "BLOCK, HALO, window",
    [(16, 16, 16), (16, 32, 1), (16, 32, 32), (64, 16, 7), (32, 16, 17), (32, 32, 127)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_and_halos(BLOCK, HALO, window, dtype, monkeypatch):
    by_tiles(monkeypatch, BLOCK, HALO, window)
    case = Case(1, 307, 1, 16, window, dilation=2, xpos=True)
    fused, twin = (call(fn, case) for fn in (rotary_attention, reference.rotary_attention))
    assert_as_accurate(fused, twin, [draw(case)], dtype, gradient_slack=3.0)


@pytest.mark.parametrize("BLOCK_M, BLOCK_N", [(16, 32), (64, 16)])
@pytest.mark.parametrize("window", [140, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_queries_and_of_keys_may_differ(BLOCK_M, BLOCK_N, window, dtype, monkeypatch):
    sizes = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4, num_stages=1)
    for kernel in ("forward", "backward_by_keys", "backward_by_queries"):
        monkeypatch.setattr(tiles, kernel, lambda *_: sizes)
    monkeypatch.setattr(library, "takes", lambda *_: False)
    case = Case(1, 307, 1, 16, window, xpos=True)
    fused, twin = (call(fn, case) for fn in (rotary_attention, reference.rotary_attention))
    assert_as_accurate(fused, twin, [draw(case)], dtype, gradient_slack=3.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="products in fp64 do not compile for every GPU")
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 7, 1, 4, xpos=True),
        Case(2, 7, 1, 4, dilation=2, scale=0.3),
        Case(1, 8, 2, 2, window=2, xpos=True),
        Case(1, 40, 1, 2, window=35),
    ],
    ids=str,
)
def test_gradcheck(case):
    qkv = draw(case, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call(rotary_attention, case), qkv, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="products in fp64 do not compile for every GPU")
@pytest.mark.parametrize("window", [1, 16, 35])
def test_gradcheck_of_tiles(window, monkeypatch):
    by_tiles(monkeypatch, 16, 16, window)
    test_gradcheck(Case(1, 75, 1, 4, window, dilation=2, xpos=True))


def seen_by(case, t):
    """Return two masks [M]: the tokens that see token t, and those that it sees."""
    distance = torch.arange(case.M, device=DEVICE) - t
    window = case.M if case.window is None else case.window
    near = (distance % case.dilation == 0) & (distance.abs() <= window * case.dilation)
    return near & (distance >= 0), near & (distance <= 0)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("t", [0, 17, 36])
def test_a_token_reaches_those_who_see_it_alone(case, t):
    """No bit comes from the future, from beyond the window or from other classes."""
    fn, qkv = call(rotary_attention, case), draw(case)
    after, before = seen_by(case, t)
    other = qkv.clone()
    other[1, t] += 1
    changed = (fn(qkv) != fn(other)).any(dim=-1)
    assert not changed[0].any() and torch.equal(changed[1], after)

    qkv.requires_grad_()
    (dqkv,) = torch.autograd.grad(fn(qkv)[1, t].square().sum(), qkv)
    used = (dqkv != 0).any(dim=-1)
    assert not used[0].any() and torch.equal(used[1], before)


@pytest.mark.parametrize("part", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_not_a_number_reaches_those_who_see_it(case, part):
    """A NaN of v may reach neighbours, too, as in PyTorch: zero times NaN is NaN."""
    qkv, t = draw(case), 17
    K = case.heads * case.E
    qkv[1, t, part * K] = float("nan")
    bad = call(rotary_attention, case)(qkv).isnan().any(dim=-1)
    after, _ = seen_by(case, t)
    after &= torch.arange(case.M, device=DEVICE) == t if part == 0 else True
    assert not bad[0].any() and bad[1, after].all()
    strangers = (torch.arange(case.M, device=DEVICE) - t) % case.dilation != 0
    assert not bad[1, strangers if part == 2 else ~after].any()
    assert not call(rotary_attention, case)(qkv)[..., case.E :].isnan().any()


@pytest.mark.parametrize("case", FEW[:2], ids=str)
@pytest.mark.parametrize("layout", range(6))
def test_layouts_of_inputs_and_gradients(layout, case):
    """Strided inputs and gradients give bitwise what contiguous ones do, and are not written to."""
    name, qkv = list(layouts(draw(case)))[layout]
    _, dout = list(layouts(torch.randn(case.B, case.M, case.heads * case.E, device=DEVICE)))[layout]

    def run(qkv, dout):
        qkv = qkv.detach().requires_grad_()
        before = qkv.detach().clone(), dout.clone(), qkv._version, dout._version
        out = call(rotary_attention, case)(qkv)
        (dqkv,) = torch.autograd.grad(out, qkv, dout)
        assert torch.equal(qkv, before[0]) and torch.equal(dout, before[1])
        assert (qkv._version, dout._version) == before[2:] and out.is_contiguous()
        return out, dqkv

    strided, contiguous = run(qkv, dout), run(*(t.contiguous().clone() for t in (qkv, dout)))
    for s, c in zip(strided, contiguous, strict=True):
        assert s.isfinite().all() and torch.equal(s, c), name


@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradient_of_a_sum(case):
    """It is expanded from one number."""
    qkv = draw(case).requires_grad_()
    out = call(rotary_attention, case)(qkv)
    (of_sum,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    (of_ones,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(of_sum, of_ones) and of_sum.any()


@pytest.mark.parametrize("dilation, xpos", [(1, False), (2, True)])
def test_positions_matter_by_their_difference_alone(dilation, xpos):
    """The same tokens, at the start and 803 tokens later, are all but bitwise the same."""
    n, later, window = 40, 803, 7
    case = Case(1, (later + n) * dilation, 1, 16, window=window, dilation=dilation, xpos=xpos)
    qkv = draw(case)
    qkv[:, later * dilation :] = qkv[:, : n * dilation]
    qkv.requires_grad_()
    out = call(rotary_attention, case)(qkv)
    dout = torch.zeros_like(out)
    for t in (0, later * dilation):
        rows = slice(t + window * dilation, t + n * dilation)
        dout[:, rows] = torch.randn(
            out[:, rows].shape, generator=torch.Generator().manual_seed(2)
        ).to(DEVICE)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    for t, first in ((out, window * dilation), (dqkv, 0)):
        start = t[:, first : n * dilation]
        end = t[:, later * dilation + first :]
        assert start.any()
        torch.testing.assert_close(end, start, rtol=0, atol=4e-6)


@pytest.mark.gpu  # long
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float16, 4e-3)], ids=str)
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("window, dilation", [(64, 1), (None, 256)])
def test_long_sequences(window, dilation, xpos, dtype, bound):
    """NaN and inf are above any bound: `off` is then NaN or inf."""
    errors = off(Case(1, 131072, 2, 64, window, dilation, xpos), dtype)
    assert all(error < bound for error in errors), errors


@pytest.mark.parametrize("case", CASES if DEVICE == "cuda" else FEW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(case, dtype):
    assert_repeats(case, dtype, 50 if DEVICE == "cuda" else 3)


@pytest.mark.parametrize("window", [2, None])
@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24)], ids=str)
def test_empty(shape, window):
    qkv = torch.randn(shape, device=DEVICE, requires_grad=True)
    out = rotary_attention(qkv, 2, window=window, dilation=3)
    out.sum().backward()
    assert out.shape == (*shape[:2], 8) and qkv.grad.shape == shape


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 12), (0, 3, 12)], ids=str)
def test_registration(shape, transposed):
    qkv = torch.randn(shape, device=DEVICE)
    qkv = qkv.transpose(0, 1) if transposed else qkv
    for window in (-1, 1):
        options = 1, window, 2, True, True, 0.5
        inputs = qkv, rotations.make_table(qkv, 4, 19)
        torch.library.opcheck(torch.ops.shtx.rotary_attention, (*inputs, *options))
        out, lse, _ = torch.ops.shtx.rotary_attention(*inputs, *options)
        saved = *inputs, out, lse, out
        torch.library.opcheck(torch.ops.shtx.rotary_attention_bwd, (*saved, *options))


@pytest.mark.gpu  # PyTorch's cores are not called elsewhere
@pytest.mark.parametrize("dilation", [1, 3])
def test_registration_of_the_library(dilation):
    qkv = draw(Case(2, 1601, 2, 16), torch.bfloat16)
    options = 2, -1, dilation, True, False, 0.25
    table = rotations.make_table(qkv, 16, -(-1601 // dilation))
    torch.library.opcheck(torch.ops.shtx.rotary_attention, (qkv, table, *options))
    out, lse, (rotated,) = torch.ops.shtx.rotary_attention(qkv, table, *options)
    assert rotated.ndim == 5
    saved = rotated, table, out, lse, out
    torch.library.opcheck(torch.ops.shtx.rotary_attention_bwd, (*saved, *options))


@pytest.mark.parametrize("case", FEW[:2], ids=str)
def test_compiles_without_graph_break(case):
    fn = call(rotary_attention, case)
    assert_compiles_whole(fn, [draw(case)])


@pytest.mark.gpu  # a graph is the GPU's
@pytest.mark.parametrize("table", ["made before", "made in the graph"])
@pytest.mark.parametrize(
    "case",
    [Case(2, 129, 2, 48, window=16, xpos=True), Case(2, 129, 2, 48), Case(1, 700, 2, 48)],
    ids=str,
)
def test_captured_in_a_cuda_graph(case, table, monkeypatch):
    fn, dtype = call(rotary_attention, case), torch.bfloat16
    eager = forward_backward(fn, [draw(case)], dtype)
    if table == "made in the graph":
        monkeypatch.setattr(rotations, "_tables", {})
    qkv = draw(case, dtype).requires_grad_()
    torch.manual_seed(1)
    dout = torch.randn_like(eager[0]).to(dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn(qkv)
        (dqkv,) = torch.autograd.grad(out, qkv, dout)
    for _ in range(2):
        out.detach().fill_(float("nan"))
        dqkv.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out.double(), eager[0]) and torch.equal(dqkv.double(), eager[1])
    if table == "made in the graph":
        assert not rotations._tables  # memory of a graph is nobody else's


@pytest.mark.gpu  # 25 GiB
@pytest.mark.parametrize("window", [16, 140])
def test_more_than_2_31_elements(window):
    """The last sequence, past 2^31 elements from the start, gives what it gives alone."""
    qkv = torch.randn(4, 2_000_001, 384, device=DEVICE, dtype=torch.bfloat16)
    outs = []
    for t in (qkv, qkv[-1:].clone()):
        t = t.requires_grad_()
        out = rotary_attention(t, 2, window=window, dilation=2)
        (dqkv,) = torch.autograd.grad(out, t, out.detach())
        outs.append([o[-1].clone() for o in (out, dqkv)])
        del out, dqkv
    for many, alone in zip(*outs, strict=True):
        assert torch.equal(many, alone) and alone.isfinite().all()


@pytest.mark.gpu  # what is compiled there
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("window", [1, 16, 32, 33, 64, 65, 128, 200, None])
@pytest.mark.parametrize("E", [16, 32, 64, 128])
def test_shipped_tiles(E, window, dilation, dtype):
    """Outputs are NaN before: see conftest.py."""
    case = Case(2, 517, 2, E, window, dilation, xpos=dilation > 1)
    fused, twin = (call(fn, case) for fn in (rotary_attention, reference.rotary_attention))
    assert_as_accurate(fused, twin, [draw(case)], dtype, gradient_slack=3.0)
    assert_repeats(case, dtype, 50)


@pytest.mark.gpu  # PyTorch's cores are not called elsewhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("M, dilation", [(512, 1), (1000, 1), (1601, 3)])
def test_full_attention_by_the_library(M, dilation, xpos, dtype):
    case = Case(2, M, 2, 64, None, dilation, xpos)
    assert library.takes(draw(case, dtype), case.E, -1, -(-M // dilation), xpos)
    errors = off(case, dtype)
    assert all(error < 4 * torch.finfo(dtype).eps for error in errors), errors
    assert_repeats(case, dtype, 50)


@pytest.mark.parametrize("M, dilation", [(64, 1), (131, 3)])
@pytest.mark.parametrize("xpos, interleaved", [(False, False), (True, False), (True, True)])
def test_rotation_for_the_library(M, dilation, xpos, interleaved):
    """Scores are those of the reference, padding is zero, and `back` is the adjoint."""
    B, H, E, dtype = 2, 2, 16, torch.float64
    n = -(-M // dilation)
    qkv = draw(Case(B, M, H, E), dtype)
    table = rotations.make_table(qkv, E, n)
    classes = torch.full((3, B * dilation, n, H, E), float("nan"), dtype=dtype, device=DEVICE)
    options = table, dilation, xpos, interleaved
    library.rotate_classes(qkv, classes, *options, back=False)

    by_class = "b (n a) (qkv h e) -> qkv (b a) n h e"
    q, k, v = rearrange(pad(qkv, (0, 0, 0, -M % dilation)), by_class, qkv=3, h=H, a=dilation)
    if interleaved:
        q, k = reference.halves(q), reference.halves(k)
    cos, sin, decay = (t[:, None] for t in by_formula._rotation(n, E, xpos, qkv))
    q, k = (
        by_formula._rotate(q, cos, sin, decay),
        by_formula._rotate(k, cos, sin, 1 / decay),
    )
    score = lambda q, k: torch.einsum("bihe,bjhe->bhij", q, k)
    torch.testing.assert_close(score(*classes[:2]), score(q, k), rtol=0, atol=1e-10)
    assert torch.equal(classes[2], v)
    padding = rearrange(classes, "qkv (b a) n h e -> qkv b (n a) h e", a=dilation)[:, :, M:]
    assert not padding.any()

    d = torch.randn_like(classes)
    back = torch.full_like(qkv, float("nan"))
    library.rotate_classes(back, d, *options, back=True)
    torch.testing.assert_close((classes * d).sum(), (qkv * back).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("M, dilation", [(64, 1), (131, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regrouping_for_the_library(M, dilation, dtype):
    """Whoever reads the tokens from a wider tensor, class by class and padded with zeros."""
    tokens = draw(Case(2, M, 2, 20), dtype)[..., 40:80]
    classes = library.by_class(tokens, dilation, 2)
    padded = rearrange(classes, "(b a) n h e -> b (n a) (h e)", a=dilation)
    assert torch.equal(padded[:, :M], tokens) and not padded[:, M:].any()

    back = torch.full((2, M, 40), float("nan")).to(tokens)
    library.regroup(back, classes.contiguous(), dilation, back=True)
    assert torch.equal(back, tokens)


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("fill", [False, True])
def test_determinism_is_asked_for_and_given_back(before, fill, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    state = lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    with pytest.raises(KeyError), library.deterministic():
        assert state() == (True, False, False)
        raise KeyError
    assert state() == (*before, fill)


X = torch.randn(2, 4, 24)
FAR = torch.empty_strided((1, 300, 24), (1, 2**24, 1), device="meta")


@pytest.mark.parametrize(
    "qkv, heads, options, message",
    [
        (X[0], 2, {}, "qkv must be (B, M, 3 H E)"),
        (X.transpose(1, 2), 2, {}, "contiguous last dimension, got (2, 24, 4)"),
        (X, 0, {}, "got heads=0"),
        (X, -2, {}, "got heads=-2"),
        (X, 3, {}, "heads must divide the last dimension of qkv into 3 heads of even width E"),
        (torch.randn(1, 2, 9), 1, {}, "got heads=1 and qkv (1, 2, 9)"),
        (torch.randn(1, 2, 0), 1, {}, "of 2 to 256, got heads=1 and qkv (1, 2, 0)"),
        (torch.randn(1, 2, 774), 1, {}, "of 2 to 256, got heads=1 and qkv (1, 2, 774)"),
        (X, 2, {"window": 0}, "window must be None or at least 1, got 0"),
        (X, 2, {"dilation": 0}, "dilation must be at least 1, got 0"),
        (FAR, 2, {}, "dilation must keep"),
        (X, 2, {"scale": 0.0}, "scale must be positive, got 0.0"),
        (X, 2, {"scale": float("nan")}, "scale must be positive, got nan"),
    ],
)
def test_bad_input(qkv, heads, options, message):
    with pytest.raises(ValueError) as error:
        rotary_attention(qkv, heads, **options)
    assert message in str(error.value) and str(error.value).count("\n") < 2


def test_factors_of_xpos_are_in_range_at_any_length():
    for n in (131_072, 2**20):
        _, _, decay = by_formula._rotation(n, 8, True, torch.empty(0), anchor=n - by_formula.SPAN)
        of_queries, of_keys = decay[n - by_formula.SPAN :], 1 / decay
        assert of_queries.isfinite().all() and of_queries.min() > 0 and of_keys.isfinite().all()


def test_reference_with_xpos_at_any_length():
    """Its factors leave the range of fp32; rows are compared with the formula by distances."""
    n = by_formula.MOST_FP32 + 2_500  # the last of its spans is a part of one
    qkv = draw(Case(1, n, 1, 2))
    with torch.no_grad():
        out = reference.rotary_attention(qkv, 1, xpos=True, scale=3.0)
    assert out.isfinite().all() and out.dtype == torch.float32
    q, k, v = torch.view_as_complex(qkv[0].double().view(n, 3, 2)).unbind(1)
    for i in (5, 40_000, n - 1):
        distance = i - torch.arange(i + 1, device=DEVICE, dtype=torch.float64)
        turn = torch.polar((0.4 * 2 / (1.4 * 2)) ** (distance / 512), distance)
        scores = 3.0 * (q[i] * k[: i + 1].conj() * turn).real
        row = torch.view_as_real(scores.softmax(0).to(v) @ v[: i + 1])
        torch.testing.assert_close(out[0, i].double(), row, rtol=1e-5, atol=1e-6)
