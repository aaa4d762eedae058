import pytest
import torch
from accuracy import assert_as_accurate, forward_backward
from helpers import DEVICE, DTYPES
from torch.utils._pytree import tree_leaves

from shtx_kernels import hierarchical_merge, reference

ONE = [(23, 7, 1)]
SAME = [(9, 8, 1), (9, 5, 1)]
CUT = [(13, 16, 1), (7, 8, 2), (4, 5, 4), (2, 24, 8)]
STRIDED = [(5, 6, 2), (9, 4, 4), (3, 3, 4)]  # 10 tokens: of the second level three count
APART = [(17, 3, 1), (9, 4, 2), (20, 300, 1)]  # two of one stride are apart; past a tile
MEET = [(17, 3, 1), (9, 4, 2), (17, 8, 1)]  # two of one stride and length are apart
LONG = [(40, 4, 1), (1, 6, 64)]
CASES = [  # levels (M, D, stride), with branches, J, D_out
    (ONE, True, 9, 1),
    (SAME, False, 10, 5),
    (SAME, True, 10, 5),
    (CUT, True, 12, 6),
    (CUT, False, 300, 4),  # past a tile
    (STRIDED, True, 7, 3),
    (APART, True, 8, 64),
    (LONG, False, 16, 8),
    (MEET, True, 8, 5),
]


def draw(levels, branches, J, D_out, batch=2):
    """gamma, w_in, b_in, w_out, b_out, levels and, where the case has them, branches."""
    torch.manual_seed(0)
    D = sum(d for _, d, _ in levels)
    shapes = [(batch, M, d) for M, d, _ in levels] * (1 + branches)
    weights = torch.randn(D), torch.randn(J, D) * D**-0.5, torch.randn(J)
    weights += torch.randn(D_out, J) * J**-0.5, torch.randn(D_out)
    return [t.to(DEVICE) for t in (*weights, *map(torch.randn, shapes))]


def call(op, levels):
    """The op as a function of the tensors that `draw` makes."""
    strides = [stride for _, _, stride in levels]

    def fn(*tensors):
        weights, xs = tensors[:5], list(tensors[5:])
        xs, branches = xs[: len(strides)], xs[len(strides) :]
        return op(xs, strides, *weights, branches or None)

    return fn


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype):
    fused, twin = (call(op, case[0]) for op in (hierarchical_merge, reference.hierarchical_merge))
    assert_as_accurate(fused, twin, draw(*case), dtype, gradient_slack=3.0)


@pytest.mark.parametrize("low", [t for t in DTYPES if t != torch.float32], ids=str)
def test_autocast_keeps_the_stream_and_the_weights_wide(low):
    inputs = draw(CUT, True, 12, 6)
    inputs[9:] = [t.to(low).float() for t in inputs[9:]]

    def mixed(op):
        def fn(*tensors):
            wide = tensors[0].dtype == torch.float64
            branches = [t if wide else t.to(low) for t in tensors[9:]]
            with torch.autocast(DEVICE, low, enabled=not wide):
                rs, merged = call(op, CUT)(*tensors[:9], *branches)
            assert merged.dtype == (torch.float64 if wide else low)
            assert all(r.dtype == tensors[5].dtype for r in rs)
            return rs, merged

        return fn

    fused, twin = mixed(hierarchical_merge), mixed(reference.hierarchical_merge)
    assert_as_accurate(fused, twin, inputs, torch.float32, gradient_slack=3.0)


def test_gamma_wider_than_the_levels():
    gamma, *rest = draw(CUT, True, 12, 6)
    gamma, rest = gamma.requires_grad_(), [t.half().requires_grad_() for t in rest]
    rs, merged = call(hierarchical_merge, CUT)(gamma, *rest)
    grads = torch.autograd.grad([*rs, merged], [gamma, *rest], [*map(torch.ones_like, rs), merged])
    assert all(t.dtype == torch.half for t in (*rs, merged, *grads[1:]))
    assert grads[0].dtype == torch.float


@pytest.mark.parametrize("case", [*CASES[:4], *CASES[5:6]], ids=str)
def test_gradcheck(case):
    levels, branches, _, _ = case
    small = [(min(M, 5), min(d, 2), stride) for M, d, stride in levels]
    inputs = [t.double().requires_grad_() for t in draw(small, branches, 3, 2, batch=1)]
    fn = call(hierarchical_merge, small)
    assert torch.autograd.gradcheck(lambda *tensors: tree_leaves(fn(*tensors)), inputs)


@pytest.mark.parametrize("levels", [SAME, CUT], ids=str)
def test_rows_at_and_below_the_clamp(levels):
    """Zero rows, rows shorter than 1e-12 (whose norm is a constant) and huge ones."""
    inputs = draw(levels, False, 12, 6)
    scale = torch.tensor([0.0, 1e-14, 1e-10, 1.0, 1e4], dtype=torch.float64, device=DEVICE)
    inputs = [t.double() for t in inputs]
    for t, (M, _, stride) in zip(inputs[5:], levels, strict=True):
        t *= scale[torch.arange(M, device=DEVICE) * stride // 8 % 5][:, None]
    inputs[2] *= 0.1
    ours, twin = (
        forward_backward(call(op, levels), inputs, torch.float64)
        for op in (hierarchical_merge, reference.hierarchical_merge)
    )
    for o, t in zip(ours, twin, strict=True):
        size = t.abs().amax(dim=-1, keepdim=True)  # a row's, as its numbers cancel
        torch.testing.assert_close(o / size, t / size, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_spreads_as_in_the_reference(bad):
    inputs = draw(CUT, True, 12, 6)
    inputs[6][1, 2, 3] = bad
    (rs, ours), (twins, twin) = (
        call(op, CUT)(*inputs) for op in (hierarchical_merge, reference.hierarchical_merge)
    )
    assert torch.equal(ours.isfinite(), twin.isfinite()) and not twin.isfinite().all()
    assert all(torch.equal(r.isfinite(), t.isfinite()) for r, t in zip(rs, twins, strict=True))


@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=str)
def test_one_gradient_at_a_time(case):
    levels, *_ = case
    inputs = [t.requires_grad_() for t in draw(*case)]
    fn = call(hierarchical_merge, levels)
    merged = lambda *tensors: fn(*tensors)[1].square().sum()
    every = torch.autograd.grad(merged(*inputs), inputs)
    for i, (t, expected) in enumerate(zip(inputs, every, strict=True)):
        alone = [u if j == i else u.detach() for j, u in enumerate(inputs)]
        assert torch.equal(torch.autograd.grad(merged(*alone), t)[0], expected)


@pytest.mark.parametrize("branches", [False, True])
def test_gradients_of_one_output_at_a_time(branches):
    """An r alone, merged alone, and all of them, from the expanded gradient of a sum."""
    case = CUT, branches, 12, 6
    for used in (slice(1, 3), slice(4, 5), slice(0, 5)):
        grads = []
        for op in (hierarchical_merge, reference.hierarchical_merge):
            inputs = [t.requires_grad_() for t in draw(*case)]
            rs, merged = call(op, CUT)(*inputs)
            loss = sum((t * t.detach()).sum() + t.sum() for t in [*rs, merged][used])
            grads.append(torch.autograd.grad(loss, inputs, allow_unused=True))
        for ours, twin in zip(*grads, strict=True):
            zero = lambda t, other: torch.zeros_like(other) if t is None else t
            if ours is not None or twin is not None:
                ours, twin = zero(ours, twin), zero(twin, ours)
                torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)


def test_only_some_levels_have_a_branch():
    inputs = draw(CUT, True, 12, 6)
    strides = [stride for _, _, stride in CUT]

    def some(op):
        def fn(*tensors):
            return op(tensors[5:9], strides, *tensors[:5], [None, tensors[9], None, tensors[10]])

        return fn

    inputs = [*inputs[:9], inputs[10], inputs[12]]
    fused, twin = some(hierarchical_merge), some(reference.hierarchical_merge)
    assert_as_accurate(fused, twin, inputs, torch.float32, gradient_slack=3.0)


def test_tokens_past_the_cut_get_no_gradient():
    inputs = [t.requires_grad_() for t in draw(STRIDED, False, 7, 3)]
    merged = call(hierarchical_merge, STRIDED)(*inputs)[1]
    assert merged.shape == (2, 10, 3)
    dx = torch.autograd.grad(merged.sum(), inputs[6])[0]
    assert dx[:, :3].all() and not dx[:, 3:].any()


def layouts(x):
    """The values of x, laid out in the ways an op may be handed them."""
    B, M, D = x.shape
    arena = lambda *size: torch.full(size, float("nan"), device=DEVICE)
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield arena(B, M, D + 5)[..., 3 : D + 3].copy_(x)
    yield arena(B, 2 * M, D)[:, ::2].copy_(x)
    yield arena(B * M * D + 1)[1:].view(B, M, D).copy_(x)


@pytest.mark.parametrize("layout", range(4))
def test_layouts_of_inputs_and_gradients(layout):
    """Strided inputs and gradients give bitwise what contiguous ones do, and are not written to."""
    inputs = draw(CUT, True, 12, 6)
    douts = [torch.randn_like(t) for t in inputs[5:9]] + [torch.randn(2, 13, 6, device=DEVICE)]

    def run(lay):
        args = [*inputs[:5], *(lay(t) for t in inputs[5:])]
        leaves = [t.detach().requires_grad_() for t in args]
        gradients = [lay(t) for t in douts]
        before = [(t.clone(), t._version) for t in (*args, *gradients)]
        rs, merged = call(hierarchical_merge, CUT)(*leaves)
        grads = torch.autograd.grad([*rs, merged], leaves, gradients)
        for t, (value, version) in zip((*args, *gradients), before, strict=True):
            assert torch.equal(t, value) and t._version == version
        return [*rs, merged, *grads]

    strided, contiguous = run(lambda t: list(layouts(t))[layout]), run(lambda t: t)
    for a, b in zip(strided, contiguous, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(case, dtype):
    levels, *rest = case
    large = DEVICE == "cuda"
    levels = [(M * 64, d * 8, stride) for M, d, stride in levels] if large else levels
    inputs, fn = draw(levels, *rest), call(hierarchical_merge, levels)
    first = forward_backward(fn, inputs, dtype)
    for _ in range(50 if large else 3):
        again = forward_backward(fn, inputs, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_sequences_do_not_mix():
    inputs = draw(CUT, True, 12, 6, batch=3)
    rs, merged = call(hierarchical_merge, CUT)(*inputs)
    for b in range(3):
        alone = call(hierarchical_merge, CUT)(*inputs[:5], *(t[b : b + 1] for t in inputs[5:]))
        torch.testing.assert_close(alone[1][0], merged[b])
        assert all(torch.equal(r[0], t[b]) for r, t in zip(alone[0], rs, strict=True))


@pytest.mark.parametrize("levels, batch", [(CUT, 0), ([(4, 3, 1), (0, 5, 2)], 2)], ids=str)
def test_empty(levels, batch):
    inputs = [t.requires_grad_() for t in draw(levels, True, 6, 4, batch)]
    rs, merged = call(hierarchical_merge, levels)(*inputs)
    grads = torch.autograd.grad(sum(t.sum() for t in (*rs, merged)), inputs)
    assert merged.numel() == 0 and merged.shape[::2] == (batch, 4)
    assert not any(g.any() for g in grads[:5])
    assert all(
        (g == 1).all() and g.shape == t.shape for g, t in zip(grads[5:], rs + rs, strict=True)
    )


def test_the_graph_can_be_walked_twice():
    inputs = [t.requires_grad_() for t in draw(CUT, True, 12, 6)]
    _, merged = call(hierarchical_merge, CUT)(*inputs)
    twice = [torch.autograd.grad(merged.sum(), inputs, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


@pytest.mark.parametrize("levels, batch", [(CUT, 2), (APART, 1), (SAME, 0)], ids=str)
def test_registration(levels, batch):
    gamma, w_in, b_in, w_out, b_out, *xs = draw(levels, False, 12, 6, batch)
    strides, weights = [stride for _, _, stride in levels], (gamma, w_in, b_in, w_out)
    forward, backward = torch.ops.shtx.hierarchical_merge, torch.ops.shtx.hierarchical_merge_bwd
    branches = [xs[0], *[None] * (len(xs) - 1)]
    args = xs, strides, *weights, b_out, branches
    torch.library.opcheck(forward, args)
    side_by_side, w, z, norm, merged = forward(*args)
    args = xs, side_by_side, strides, gamma, w_in, w, b_in, w_out, z, norm, branches
    args = *args, merged.flatten(0, 1)
    for needs in [(True, True, True), (False, True, False)]:
        torch.library.opcheck(backward, (*args, torch.float16, needs[0], *needs))


@pytest.mark.parametrize("branches", [False, True])
def test_compiles_without_graph_break(branches):
    inputs, fn = draw(CUT, branches, 12, 6), call(hierarchical_merge, CUT)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    eager = forward_backward(fn, inputs, torch.float32)
    torch.testing.assert_close(forward_backward(compiled, inputs, torch.float32), eager)


@pytest.mark.gpu  # memory is counted there
def test_strided_levels_are_never_at_token_rate():
    levels, J, D_out, batch = [(4096, 32, 1), (64, 2048, 64)], 64, 32, 8
    inputs = [t.bfloat16().requires_grad_() for t in draw(levels, True, J, D_out, batch)]

    def run():
        rs, merged = call(hierarchical_merge, levels)(*inputs)
        return torch.autograd.grad([*rs, merged], inputs, [*rs, merged])

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    at_token_rate = batch * 4096 * (32 + 2048) * 2
    assert torch.cuda.max_memory_allocated() - before < at_token_rate / 2


@pytest.mark.gpu  # a graph is the GPU's
def test_captured_in_a_cuda_graph():
    inputs, fn = draw(CUT, True, 12, 6), call(hierarchical_merge, CUT)
    eager = forward_backward(fn, inputs, torch.bfloat16)
    args = [t.bfloat16().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    douts = [torch.randn_like(t, dtype=torch.float64).bfloat16() for t in args[5:9]]
    douts += [torch.randn(2, 13, 6, dtype=torch.float64, device=DEVICE).bfloat16()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rs, merged = fn(*args)
        grads = torch.autograd.grad([*rs, merged], args, douts)
    graph.replay()
    for captured, t in zip([*rs, merged, *grads], eager, strict=True):
        assert torch.equal(captured.double(), t)


@pytest.mark.gpu  # 25 GiB
def test_more_than_2_31_elements():
    """The last sequence, past 2^31 elements from the start, gives what it gives alone."""
    levels = [(700_001, 8, 1), (350_001, 8, 2)]
    inputs = [t.bfloat16() for t in draw(levels, False, 1024, 8, batch=3)]
    outs = []
    for last in (slice(None), slice(2, 3)):
        args = [*inputs[:5], *(t[last].clone().requires_grad_() for t in inputs[5:])]
        merged = call(hierarchical_merge, levels)(*args)[1]
        outs.append([merged[-1], *(g[-1] for g in torch.autograd.grad(merged.sum(), args[5:]))])
    for many, alone in zip(*outs, strict=True):
        assert many.isfinite().all() and (many - alone).norm() <= 1e-2 * alone.norm()


GOOD = dict(
    levels=[torch.randn(2, 4, 6), torch.randn(2, 2, 3)],
    strides=[1, 2],
    gamma=torch.randn(9),
    w_in=torch.randn(4, 9),
    b_in=torch.randn(4),
    w_out=torch.randn(5, 4),
    b_out=torch.randn(5),
)
X = GOOD["levels"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(levels=[], strides=[]), "strides must be one for each of levels, of which there"),
        (dict(strides=[1]), "strides must be one for each of levels"),
        (dict(strides=[1, 0]), "strides must be at least 1, got 0"),
        (dict(levels=[X, X[0]]), "levels must be (B, M, D) with contiguous D"),
        (dict(levels=[X, X.mT]), "strides (24, 1, 6) for level 1"),
        (dict(levels=[X, X.half()]), "torch.float16 on cpu"),
        (dict(levels=[X, X[:1]]), "got (1, 4, 6), torch.float32"),
        (dict(levels=[X, X[..., :0]]), "D of at least 1"),
        (dict(gamma=torch.randn(8)), "gamma must be (9,) on cpu"),
        (dict(gamma=torch.randn(9, device="meta")), "got (9,) on meta"),
        (dict(w_in=torch.randn(4, 8)), "w_in must be (4, 9)"),
        (dict(w_in=torch.randn(0, 9)), "w_in and w_out must have at least one row, got 0 and 5"),
        (dict(b_in=torch.randn(3)), "b_in must be (4,)"),
        (dict(w_out=torch.randn(5, 3)), "w_out must be (5, 4)"),
        (dict(b_out=torch.randn(1)), "b_out must be (5,)"),
        (dict(branches=[X]), "branches must be one for each of 2 levels, got 1"),
        (dict(branches=[X, X]), "branches[1] must be (2, 2, 3)"),
        (dict(branches=[X, GOOD["levels"][1].half()]), "branches must be of one dtype, got"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError) as error:
        hierarchical_merge(**GOOD | change)
    assert message in str(error.value) and str(error.value).count("\n") < 1
