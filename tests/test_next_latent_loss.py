from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_as_accurate, assert_replays, forward_backward
from helpers import DEVICE, DTYPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shtx_kernels import _register, next_latent_loss, reference

KINDS = ("mse_and_cosine_sim", "mse", "smooth_l1")
CASES = [  # B, M, D, R, widths inside the MLP, decay
    (1, 2, 1, 1, (3,), 1.0),  # for fp64: its gradients are all but 0, and in eager 0 by luck
    (2, 18, 16, 1, (16, 16), 1.0),
    (3, 9, 37, 2, (11, 50), 0.7),  # several rows a program, odd widths
    (2, 8, 24, 3, (40, 24, 32), 2.0),
    (2, 9, 8, 3, (), None),  # one layer
    (2, 21, 16, 2, (24,), 0.0),
    (1, 5, 1000, 2, (8,), 1.0),  # rounds of a row
]


def draw(B, M, D, R, widths, decay, kind="mse_and_cosine_sim"):
    """Inputs with gradients: h, summaries, gamma, beta, and a weight and a bias for each layer; and
    `call`, of an op with them.
    """
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(shape, device=DEVICE)
    sizes = [2 * D, *widths, D]
    layers = [
        t for i, o in zip(sizes, sizes[1:], strict=False) for t in (new(o, i) / i**0.5, new(o))
    ]
    inputs = [new(B, M, D), new(B, M, D), 1 + 0.3 * new(2 * D), new(2 * D), *layers]
    valid, steps = torch.rand(B, M, device=DEVICE) > 0.3, torch.rand(R, device=DEVICE)

    def call(op, h, summaries, gamma, beta, *layers):
        layers = list(zip(layers[::2], layers[1::2], strict=True))
        args = h, summaries, valid, (gamma, beta), layers, steps
        return op(*args, distance=kind, decay=decay)

    return inputs, call, SimpleNamespace(valid=valid, steps=steps)


def both(call):
    ops = next_latent_loss, reference.next_latent_loss
    return [lambda *inputs, op=op: call(op, *inputs) for op in ops]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_matches_reference(case, dtype, kind):
    inputs, call, _ = draw(*case, kind)
    assert_as_accurate(*both(call), inputs, dtype, gradient_slack=3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference_in_fp64(case, kind):
    inputs, call, _ = draw(*case, kind)
    pairs = [forward_backward(op, inputs, torch.float64) for op in both(call)]
    for ours, twin in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    """All inputs but h are checked: h stands for targets, too, which have no gradient."""
    inputs, call, _ = draw(2, 5, 4, 1, (3,), 1.0, kind)
    h, *others = (t.double().requires_grad_() for t in inputs)
    fn = lambda *others: call(next_latent_loss, h.detach(), *others)[0]
    assert torch.autograd.gradcheck(fn, others)


def test_counts():
    inputs, call, given = draw(*CASES[2])
    (sums, counts), twin = (op(*inputs) for op in both(call))
    assert torch.equal(counts, twin[1]) and counts.dtype == torch.int64
    assert counts.tolist() == [given.valid[:, r : r + 7].sum() for r in (1, 2)]
    given.valid.zero_()
    sums, counts = both(call)[0](*inputs)
    assert not sums.any() and not counts.any()


@pytest.mark.parametrize("B, M, R", [(0, 4, 1), (2, 0, 1), (2, 1, 1), (2, 3, 3), (2, 2, 5)])
@pytest.mark.parametrize("widths", [(), (6, 5)], ids=str)
def test_no_token_with_so_many_after_it(B, M, R, widths):
    inputs, call, _ = draw(B, M, 8, R, widths, 1.0)
    sums, *gradients = forward_backward(both(call)[0], inputs, torch.float32)
    assert sums.shape == (R,) and not sums.any()
    assert not call(next_latent_loss, *inputs)[1].any()
    for gradient, t in zip(gradients, inputs, strict=True):
        assert gradient.shape == t.shape and not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_zero_or_foretold_exactly(kind):
    """A row of zeros has a gradient of zero, as F.cosine_similarity clamps lengths."""
    inputs, call, _ = draw(2, 6, 8, 2, (8,), 1.0, kind)
    inputs[0][0, 2] = 0
    inputs[0][1, 3] *= 1e-12
    inputs[-2:] = [t * 0 for t in inputs[-2:]]  # what is foretold is what is there
    inputs[0][1, 4] = inputs[0][1, 5]
    pairs = [forward_backward(op, inputs, torch.float64) for op in both(call)]
    for ours, twin in zip(*pairs, strict=True):
        assert (ours - twin).norm() <= 1e-10 * twin.norm()


def test_what_does_not_count_may_be_anything():
    inputs, call, given = draw(2, 9, 8, 2, (8,), 1.0)
    given.valid[:] = True
    given.valid[0, 5:] = False
    inputs[1][0, 5:] = float("nan")
    given.valid[0, 3:] = False  # these reach the garbage in two steps
    sums, _ = call(next_latent_loss, *inputs)
    assert sums.isfinite().all()
    torch.testing.assert_close(sums, call(reference.next_latent_loss, *inputs)[0])


@pytest.mark.parametrize("wanted", [0, 1, 2, 4, 7])
def test_one_gradient_alone(wanted):
    inputs, call, _ = draw(*CASES[2])
    _, *gradients = forward_backward(both(call)[1], inputs, torch.float32)
    inputs[wanted].requires_grad_()
    sums, _ = call(next_latent_loss, *inputs)
    torch.manual_seed(1)
    dsums = torch.randn_like(sums, dtype=torch.float64).to(sums.dtype)
    (ours,) = torch.autograd.grad(sums, inputs[wanted], dsums)
    torch.testing.assert_close(ours.double(), gradients[wanted], rtol=1e-4, atol=1e-5)


def test_the_graph_can_be_walked_twice_and_writes_over_nothing():
    inputs, call, _ = draw(*CASES[3])
    inputs = [t.requires_grad_() for t in inputs]
    before = [t.detach().clone() for t in inputs]
    sums, _ = call(next_latent_loss, *inputs)
    dsums = torch.rand_like(sums)
    kept = dsums.clone()
    first = torch.autograd.grad(sums, inputs, dsums, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(sums, inputs, dsums), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, before, inputs)) and torch.equal(dsums, kept)


def test_any_layout():
    inputs, call, given = draw(*CASES[1])
    h, summaries, gamma, beta, *layers = inputs
    plain, _ = call(next_latent_loss, *inputs)
    wide = torch.randn(2, 37, 32, device=DEVICE)
    wide[:, 1::2, 8:24] = h
    for same in (wide[:, 1::2, 8:24], h.mT.contiguous().mT):
        assert torch.equal(call(next_latent_loss, same, *inputs[1:])[0], plain)
    other = torch.randn(18, 2, 16, device=DEVICE).transpose(0, 1)
    other.copy_(summaries)
    assert torch.equal(call(next_latent_loss, h, other, *inputs[2:])[0], plain)
    layers = [t.T.contiguous().T if t.ndim == 2 else torch.stack([t, t], 1)[:, 0] for t in layers]
    norm = (torch.stack([t, t], 1)[:, 0] for t in (gamma, beta))
    strided, _ = call(next_latent_loss, h, summaries, *norm, *layers)
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=0)  # other products of cuBLAS


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [1, 3])
def test_autocast_narrows_products_alone(R, low, h_dtype):
    inputs, call, _ = draw(2, 30, 32, R, (48, 32), 1.0)
    inputs = [t.to(h_dtype) if i < 2 else t for i, t in enumerate(inputs)]
    inputs = [t.requires_grad_() for t in inputs]
    results = []
    for op in both(call):
        with torch.autocast(DEVICE, low):
            sums, _ = op(*inputs)
        assert sums.dtype == torch.float32
        results.append([sums, *torch.autograd.grad(sums.sum(), inputs)])
    for ours, twin, like in zip(*results, [sums, *inputs], strict=True):
        assert ours.dtype == twin.dtype == like.dtype
        assert (ours - twin).norm() < 3e-2 * twin.norm()


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found.update(t.shape for t in tree_leaves(out) if torch.is_tensor(t))
        return out


@pytest.mark.parametrize("R", [1, 2])
def test_nothing_has_halves_side_by_side(R, monkeypatch):
    """Forward and backward make no rows of 2 D numbers; only weights are 2 D wide."""
    B, M, D = 2, 40, 16
    inputs, call, _ = draw(B, M, D, R, (24, 24), 1.0)
    inputs = [t.requires_grad_() for t in inputs]
    monkeypatch.setattr(_register, "is_plain", lambda *args: True)  # look into the op
    for op, expected in zip(both(call), (False, True), strict=True):
        with Shapes() as shapes:
            op(*inputs)[0].sum().backward()
        wide = [s for s in shapes.found if s.numel() >= B * (M - R) * 2 * D and s[-1] == 2 * D]
        assert bool(wide) == expected, wide


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(h=torch.randn(2, 8)), r"h must be \(B, M, D\), got \(2, 8\)"),
        (dict(h=torch.randn(1, 2, 8193)), "h must have a width D of 1 to 8192, got 8193"),
        (dict(summaries=torch.randn(2, 3, 4)), r"summaries must be \(2, 3, 8\) on .*\(2, 3, 4\)"),
        (dict(valid=torch.ones(2, 4).bool()), r"valid must be \(2, 3\) on .*, got \(2, 4\)"),
        (dict(valid=torch.ones(2, 3)), "valid must be bool, got torch.float32"),
        (dict(norm=(torch.ones(8), torch.ones(16))), r"gamma of norm must be \(16,\)"),
        (dict(norm=(torch.ones(16), torch.ones(8))), r"beta of norm must be \(16,\)"),
        (dict(layers=[]), "layers must be at least one weight and bias, got none"),
        (
            dict(layers=[(torch.ones(8, 8), torch.ones(8))]),
            r"weight of layer 0 must be \(8, 16\) on .*, got \(8, 8\)",
        ),
        (
            dict(layers=[(torch.ones(4, 16), torch.ones(4)), (torch.ones(4, 4), torch.ones(4))]),
            r"weight of layer 1 must be \(8, 4\) on .*, got \(4, 4\)",
        ),
        (
            dict(layers=[(torch.ones(8, 16), torch.ones(1))]),
            r"bias of layer 0 must be \(8,\) on .*, got \(1,\)",
        ),
        (dict(layers=[(torch.ones(8), torch.ones(8))]), r"layer 0 must be \(out, 16\), got \(8,\)"),
        (dict(steps=torch.ones(0)), r"steps must be \(R,\) .*, R at least 1, .* got \(0,\)"),
        (dict(steps=torch.ones(1).requires_grad_()), "steps must be .* requires_grad=True"),
        (dict(distance="l1"), "distance must be one of 'mse', .*, got 'l1'"),
    ],
)
def test_bad_input(change, message):
    good = dict(
        h=torch.randn(2, 3, 8),
        summaries=torch.randn(2, 3, 8),
        valid=torch.ones(2, 3).bool(),
        norm=(torch.ones(16), torch.ones(16)),
        layers=[(torch.ones(8, 16), torch.ones(8))],
        steps=torch.ones(1),
    )
    move = lambda t: t.detach().to(DEVICE).requires_grad_(t.requires_grad)
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, move, good | change)
    with pytest.raises(ValueError, match=message):
        next_latent_loss(**arguments)


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_compiles_whole(case):
    inputs, call, _ = draw(*case)
    inputs = [t.requires_grad_() for t in inputs]
    fn = lambda *inputs: call(next_latent_loss, *inputs)[0].sum()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs),
        torch.autograd.grad(fn(*inputs), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4]], ids=str)
def test_opcheck(case):
    (h, summaries, gamma, beta, *layers), _, given = draw(*case)
    weights, inputs = layers[::2], (gamma, beta, h, summaries, given.valid, given.steps)
    options, ops = (0, case[-1]), torch.ops.shtx
    forward, backward = ops.next_latent_loss.default, ops.next_latent_loss_bwd.default
    args = weights, layers[1::2], *inputs, *options, torch.float32
    torch.library.opcheck(forward, args)
    sums, *kept = forward(*args)
    for needs in (True, False):
        torch.library.opcheck(backward, (weights, sums, *inputs, *options, *kept, needs))


@pytest.mark.gpu  # a graph is the GPU's; other bits would come of the order that programs end in
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_to_the_bit_in_a_cuda_graph(kind):
    inputs, call, _ = draw(4, 700, 256, 2, (256, 512), 1.0, kind)
    inputs = [t.requires_grad_() for t in inputs]

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            sums, counts = call(next_latent_loss, *inputs)
        return [sums, counts, *torch.autograd.grad(sums.sum(), inputs)]

    assert_replays(run, lambda: inputs[0].mul_(1.5))
