"""Muon against PyTorch's, and steps of several optimizers against a plain loop."""

import copy

import pytest
import torch
from helpers import DEVICE
from training import LR, adamw, assert_same_parameters, build, draw, replay_a_step

from shtx import TrainStep
from shtx.muon import Muon
from shtx.optimizers import Optimizers

SHAPES = [(16, 8), (8, 16), (16, 8), (12, 12), (1, 5)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    make = lambda shape: torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE))
    return [make(shape) for shape in SHAPES]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("is_tensor", [True, False])
def test_steps_of_pytorch(adjust_lr_fn, nesterov, is_tensor):
    ours, theirs = matrices(), matrices()
    options = dict(weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    optimizer = Muon(ours, lr=torch.tensor(LR, device=DEVICE) if is_tensor else LR, **options)
    other = torch.optim.Muon(theirs, lr=LR, **options)
    for n in range(5):
        for parameters in (ours, theirs):
            give_gradients(parameters, n)
        kept = [p.grad.clone() for p in ours]
        optimizer.step()
        other.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True))
    for p, q, start in zip(ours, theirs, matrices(), strict=True):
        assert (p - q).norm() <= 1e-5 * (q - start).norm()
    states = [o.state_dict()["state"] for o in (optimizer, other)]
    for index, values in states[1].items():
        assert torch.equal(states[0][index]["momentum_buffer"], values["momentum_buffer"])


@pytest.mark.parametrize("kind, waits", [(Muon, False), (torch.optim.Muon, True)])
def test_nothing_waits_for_the_learning_rate(kind, waits):
    """A tensor on meta has no value that could be asked for, as a captured one has none yet."""
    parameters = [torch.nn.Parameter(p.to("meta")) for p in matrices()]
    optimizer = kind(parameters, lr=LR)
    optimizer.param_groups[0]["lr"] = torch.tensor(LR, device="meta")
    for p in parameters:
        p.grad = torch.empty_like(p)
    if waits:
        with pytest.raises(RuntimeError, match="meta"):
            optimizer.step()
    else:
        optimizer.step()


def test_matrices_without_a_gradient_stay():
    ours = matrices()
    optimizer = Muon(ours, lr=LR)
    give_gradients(ours[:2], 0)
    before = [p.detach().clone() for p in ours]
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(ours, before, strict=True)]
    assert moved == [True, True, False, False, False]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr must be at least 0, got -1.0"),
        (dict(weight_decay=-1.0), "weight_decay must be at least 0, got -1.0"),
        (dict(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (dict(adjust_lr_fn="x"), "adjust_lr_fn must be 'original' or 'match_rms_adamw', got 'x'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(matrices(), **options)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="params must be matrices of floating point, got shape"):
        Muon([torch.nn.Parameter(torch.zeros(shape))])


# several optimizers of a step


def both(model):
    """Muon for the matrices of blocks, AdamW for the rest."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if name.startswith("layers.") and p.ndim == 2]
    rest = [p for _, p in named if not any(p is q for q in inner)]
    return [Muon(inner, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)]


def stepped(model, optimizers, ids, clip=0.5):
    loss, _ = model(ids, return_loss=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach(), norm


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_several_optimizers_step_as_in_the_plain_loop(cuda_graph):
    """One norm of all gradients clips them; each has learning rates of its own, which change."""
    ours, plain = build(), build()
    optimizers, others = both(ours), both(plain)
    options = dict(precision="fp32", grad_clip=0.5, cuda_graph=cuda_graph)
    step = TrainStep(ours, optimizers, **options)
    for n in range(5):
        for pair in (optimizers, others):
            for k, optimizer in enumerate(pair):
                optimizer.param_groups[0]["lr"] = LR * 0.5 ** (n + k)
        loss, norm = stepped(plain, others, draw(n))
        assert torch.equal(step(draw(n))[0], loss) and torch.equal(step.grad_norm, norm)
    assert_same_parameters(ours, plain)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [LR * 0.5**4, LR * 0.5**5]


@pytest.mark.parametrize("kind", ["replayed steps", pytest.param("graphs", marks=pytest.mark.gpu)])
def test_several_optimizers_are_in_one_graph(kind, monkeypatch):
    """The graph is given up if the state of one of them is replaced, or a group changes."""
    from helpers import without_a_gpu

    shapes, capture = [], TrainStep._capture

    def note(step, ids, labels):
        shapes.append(tuple(ids.shape))
        return (capture if kind == "graphs" else replay_a_step)(step, ids, labels)

    monkeypatch.setattr(TrainStep, "_capture", note)
    ours, plain = build(), build()
    optimizers, others = both(ours), both(plain)
    step = TrainStep(ours, optimizers, precision="fp32", grad_clip=0.5)
    if kind == "replayed steps":
        monkeypatch.setattr("shtx.train_step.run_aside", lambda function, stream: function())
        step._graphs = without_a_gpu(4)
    other = TrainStep(plain, others, precision="fp32", grad_clip=0.5, cuda_graph=False)
    for n in range(9):
        if n == 3:
            step.load_optimizer_state_dict(step.optimizer_state_dict())
        if n == 6:
            for optimizer in (optimizers[0], others[0]):
                optimizer.param_groups[0]["momentum"] = 0.5
        assert torch.equal(step(draw(n))[0], other(draw(n))[0])
    assert len(shapes) == 3
    assert_same_parameters(ours, plain)


def test_state_is_as_of_one_optimizer():
    """The groups of all stand in a row, and a step with a loaded state is the same to the bit."""
    ours, theirs = build(), build()
    step = TrainStep(ours, both(ours), precision="fp32", cuda_graph=False)
    for n in range(2):
        step(draw(n))
    state = step.optimizer_state_dict()
    first, second = (group["params"] for group in state["param_groups"])
    assert [*first, *second] == list(range(len(list(ours.parameters()))))
    assert state["state"].keys() == {*first, *second}
    assert state["state"][0].keys() == {"momentum_buffer"} != state["state"][second[0]].keys()
    theirs.load_state_dict(ours.state_dict())
    other = TrainStep(theirs, both(theirs), precision="fp32", cuda_graph=False)
    other.load_optimizer_state_dict(copy.deepcopy(state))
    for n in range(2, 4):
        assert torch.equal(step(draw(n))[0], other(draw(n))[0])
    assert_same_parameters(ours, theirs)
    state["param_groups"].pop()
    with pytest.raises(ValueError, match=r"state_dict must have groups of \[\d+, \d+\] parameters"):
        other.load_optimizer_state_dict(state)


def test_state_of_one_optimizer_is_its_own():
    model = build()
    optimizer = adamw(model)
    step = TrainStep(model, optimizer, precision="fp32", cuda_graph=False)
    step(draw(0))
    ours, plain = step.optimizer_state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == plain["param_groups"]
    assert ours["state"].keys() == plain["state"].keys()


@pytest.mark.parametrize(
    "optimizers, error, message",
    [
        (lambda m: [], ValueError, "optimizer must be an optimizer or several, got none"),
        (lambda m: [adamw(m), 3], TypeError, "in this order, got int for an optimizer"),
        (lambda m: m, TypeError, "got HierarchicalTransformer for an optimizer"),
        (lambda m: [adamw(m), adamw(m)], ValueError, r"got \d+ that are in two of them"),
    ],
)
def test_wrong_optimizers(optimizers, error, message):
    model = build()
    with pytest.raises(error, match=message):
        TrainStep(model, optimizers(model), precision="fp32")


def test_several_optimizers_would_not_overflow_together():
    model = build()
    with pytest.raises(ValueError, match='must not be "fp16-mixed" with several optimizers, got 2'):
        TrainStep(model, both(model), precision="fp16-mixed")


@pytest.mark.gpu  # a graph is refused where there could be one
def test_an_optimizer_that_waits_for_the_device():
    model = build()
    muon, rest = both(model)
    waiting = torch.optim.Muon(muon.param_groups[0]["params"], lr=LR)
    with pytest.raises(ValueError, match="for a CUDA graph, got Muon without"):
        TrainStep(model, [waiting, rest], precision="fp32")
    TrainStep(model, [waiting, rest], precision="fp32", cuda_graph=False)(draw(0))


def test_groups_of_several_are_seen_as_they_are():
    model = build()
    optimizers = both(model)
    groups = Optimizers(optimizers).param_groups
    assert groups[1] is optimizers[1].param_groups[0]
