import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_near_gradients,
    assert_replays,
    forward_backward,
)
from helpers import DEVICE, DTYPES

from shtx_kernels import _cross_entropy, linear_cross_entropy, reference

CASES = [  # B, N, D, V
    (1, 1, 1, 2),
    (2, 70, 16, 257),  # a row past a vector
    (3, 43, 8, 16),  # several rows a program
    (2, 9, 8, 5000),  # several blocks a row
]


def draw(B, N, D, V, ignored=0.2):
    """x, weight and targets, of which some are 0, which does not count."""
    torch.manual_seed(0)
    x, weight = torch.randn(B, N, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    targets = torch.randint(1, V, (B, N), device=DEVICE)
    targets[torch.rand(B, N, device=DEVICE) < ignored] = 0
    targets[0, 0] = 1
    return x, weight, targets


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows."""
    monkeypatch.setattr(_cross_entropy, "ROUND", 16)
    monkeypatch.setattr(_cross_entropy, "WORKSPACE", (1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunks", [False, True], ids=["one chunk", "chunks"])
def test_matches_reference(case, dtype, chunks, request):
    if chunks:
        request.getfixturevalue("small_chunks")
    *inputs, targets = draw(*case)
    fused, twin = (
        lambda x, w, op=op: op(x, w, targets)
        for op in (linear_cross_entropy, reference.linear_cross_entropy)
    )
    assert_as_accurate(fused, twin, inputs, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction, small_chunks):
    x, weight, targets = draw(3, 7, 4, 11)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    fn = lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction)
    assert torch.autograd.gradcheck(lambda *t: fn(*t)[0] if reduction == "sum" else fn(*t), inputs)


def test_sum_and_count():
    x, weight, targets = draw(2, 30, 8, 50)
    total, count = linear_cross_entropy(x, weight, targets, reduction="sum")
    twin = reference.linear_cross_entropy(x, weight, targets, reduction="sum")
    assert count == twin[1] == (targets != 0).sum() and count.dtype == torch.int64
    torch.testing.assert_close(total, twin[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("ignore_index", [0, -100, 7])
def test_one_label_that_counts(ignore_index):
    x, weight, targets = draw(2, 20, 8, 30)
    targets.fill_(ignore_index)
    targets[1, 3] = 5
    ours, twin = (
        forward_backward(lambda x, w, op=op: op(x, w, targets, ignore_index), (x, weight), x.dtype)
        for op in (linear_cross_entropy, reference.linear_cross_entropy)
    )
    for o, t in zip(ours, twin, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-5, atol=1e-6)
    dx = ours[1]
    dx[1, 3] = 0
    assert not dx.any()  # rows that do not count get no gradient at all


def test_no_label_that_counts():
    x, weight, targets = draw(2, 20, 8, 30)
    loss = lambda x, w: linear_cross_entropy(x, w, targets * 0)
    for out in forward_backward(loss, (x, weight), x.dtype):
        assert (out == 0).all()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted(needs, monkeypatch):
    x, weight, targets = draw(2, 20, 8, 30)
    asked = []
    op = _cross_entropy._forward
    spy = lambda *args: asked.append(args[-2:]) or op(*args)
    monkeypatch.setattr(_cross_entropy, "_forward", spy)
    both = torch.autograd.grad(
        reference.linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets),
        (x, weight),
    )
    for t, need in zip((x, weight), needs, strict=True):
        t.requires_grad_(need)
    loss = linear_cross_entropy(x, weight, targets)
    assert asked == [needs] and loss.requires_grad == any(needs)
    if any(needs):
        (ours,) = torch.autograd.grad(loss, (x, weight)[needs[1]])
        torch.testing.assert_close(ours, both[needs[1]], rtol=1e-5, atol=1e-6)


def test_without_grad_no_gradients_are_made(monkeypatch):
    x, weight, targets = draw(2, 20, 8, 30)
    op, made = _cross_entropy._forward, []
    spy = lambda *args: made.append(op(*args)) or made[-1]
    monkeypatch.setattr(_cross_entropy, "_forward", spy)
    with torch.no_grad():
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    assert [t.numel() for t in made[0]] == [1, 1, 0, 0]


def test_the_graph_can_be_walked_twice():
    x, weight, targets = draw(2, 20, 8, 30)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets) * 3
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    copies = [t.clone() for t in first]
    second = torch.autograd.grad(loss, (x, weight))
    for a, b, c in zip(first, copies, second, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_a_target_outside_of_the_vocabulary_makes_the_loss_nan():
    x, weight, targets = draw(2, 20, 8, 30)
    for bad in (-1, 30, 2**40):
        targets[1, 1] = bad
        assert linear_cross_entropy(x, weight, targets).isnan()


def test_strided_inputs():
    x, weight, targets = draw(2, 20, 8, 30)
    wide = torch.randn(2, 41, 8, device=DEVICE)
    wide[:, 1::2] = x
    labels = torch.zeros(2, 21, dtype=torch.int32, device=DEVICE)
    labels[:, 1:] = targets
    plain = linear_cross_entropy(x, weight, targets)
    assert torch.equal(linear_cross_entropy(wide[:, 1::2], weight, labels[:, 1:]), plain)
    assert torch.equal(linear_cross_entropy(x, weight.T.contiguous().T, targets), plain)


def test_no_tokens():
    x, weight, targets = draw(2, 1, 8, 30)
    x, targets = x[:, :0].requires_grad_(), targets[:, :0]
    loss = linear_cross_entropy(x, weight.requires_grad_(), targets)
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and grads[0].shape == x.shape and not grads[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_the_products_alone(dtype):
    x, weight, targets = draw(2, 40, 8, 50)
    with torch.autocast(DEVICE, dtype):
        loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
        twin = reference.linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, twin, rtol=1e-2, atol=0)
    assert_near_gradients(loss, twin, (x, weight))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(2, 3)), r"x must be \(B, N, D\), got \(2, 3\)"),
        (dict(weight=torch.randn(5, 4)), r"weight must be \(1 V, 8\) with V at least 1, got"),
        (dict(weight=torch.randn(0, 8)), r"weight must be .* got \(0, 8\)"),
        (dict(targets=torch.ones(2, 4).long()), r"targets must be \(2, 3\), got \(2, 4\)"),
        (dict(targets=torch.ones(2, 3)), "targets must be integers, got torch.float32"),
        (dict(reduction="none"), 'reduction must be "mean" or "sum", got \'none\''),
    ],
)
def test_bad_input(change, message):
    good = dict(x=torch.randn(2, 3, 8), weight=torch.randn(5, 8), targets=torch.ones(2, 3).long())
    tensors = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**tensors)


def test_compiles_whole():
    x, weight, targets = draw(2, 20, 8, 30)
    fn = lambda x, weight: linear_cross_entropy(x, weight, targets)
    assert_compiles_whole(fn, (x, weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("V", [32, 37])  # a padded one, too
@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=str)
def test_opcheck(V, needs):
    x, weight, targets = draw(2, 20, 8, V)
    op = torch.ops.shtx.linear_cross_entropy.default
    torch.library.opcheck(op, (x, weight, targets[..., None], 0, *needs))


@pytest.mark.gpu  # memory is counted there
@pytest.mark.parametrize("V", [2, 257, 20000, 50257])
def test_repeats_to_the_bit_and_in_bounded_memory(V):
    x, weight, targets = draw(4, 700, 64, V)
    x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    first = run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = run()
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in second)
    assert extra <= 64 * 2**20 + x.nbytes
    for _ in range(50):
        assert all(map(torch.equal, first, run()))


@pytest.mark.gpu  # hours in the interpreter
def test_more_logits_than_32_bits_count():
    B, N, D, V = 2, 33_000, 16, 50257
    x, weight, targets = draw(B, N, D, V)
    assert B * N * V > 2**31
    with torch.no_grad():
        loss, count = linear_cross_entropy(x, weight, targets, reduction="sum")
        parts = [
            reference.linear_cross_entropy(
                x[:, i : i + 1000], weight, targets[:, i : i + 1000], reduction="sum"
            )
            for i in range(0, N, 1000)
        ]
    assert count == sum(c for _, c in parts)
    torch.testing.assert_close(loss, sum(t for t, _ in parts), rtol=1e-5, atol=0)


@pytest.mark.gpu  # a graph is the GPU's
def test_runs_in_a_cuda_graph():
    x, weight, targets = draw(2, 300, 32, 1000)
    inputs = x.requires_grad_(), weight.requires_grad_()

    def run():
        return torch.autograd.grad(linear_cross_entropy(*inputs, targets), inputs)

    assert_replays(run, lambda: (x.mul_(2), targets.random_(0, 1000)))
