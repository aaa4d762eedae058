"""Loops of one's own under model.graphs; where there is no GPU, a replay runs the function again
and writes what it returns where the capture's went."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICE
from training import adamw, assert_same, build, draw, pair

from shtx import graphed_loss
from shtx.graphs import MAX_GRAPHS, Graphs

pytestmark = pytest.mark.filterwarnings("error:.*(model.graphs|CUDA graph)")


class Emulated(Graphs):
    """Graphs of a device that has none."""

    def __init__(self, device, limit):
        self.limit, self.kept = limit, {}
        self.structure, self.more, self._warned = None, None, False

    def capture(self, function):
        outputs = function()

        def replay():
            for written, output in zip(outputs, function(), strict=True):
                assert (written is None and output is None) or written.copy_(output) is written

        return SimpleNamespace(replay=replay), outputs

    def replay(self, graph):
        with torch.enable_grad():  # off in a function of autograd
            graph.replay()


def emulate(monkeypatch):
    monkeypatch.setattr(graphed_loss, "Graphs", Emulated)
    monkeypatch.setattr(graphed_loss, "runs_graphs", lambda device: True)


@pytest.fixture(params=["emulated", pytest.param("CUDA graphs", marks=pytest.mark.gpu)])
def captured(request, monkeypatch):
    """The shapes of ids that were captured, in their order."""
    if request.param == "emulated":
        emulate(monkeypatch)
    shapes, capture = [], graphed_loss.GraphedLoss._capture

    def note(owner, model, ids, *rest):
        shapes.append(tuple(ids.shape))
        return capture(owner, model, ids, *rest)

    monkeypatch.setattr(graphed_loss.GraphedLoss, "_capture", note)
    return shapes


def both(**options):
    """A model whose forwards are replayed, and the same one without, each with its optimizer."""
    ours, theirs = build(**options), build(**options)
    ours.graphs = True
    return (ours, adamw(ours)), (theirs, adamw(theirs))


def plain(model, optimizer, batches, set_to_none=True):
    losses = []
    for ids in batches:
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        losses += [loss.detach(), *parts]
    return losses


def zeros(model, optimizer, batches):
    """Gradients stay where they are, as zeros."""
    losses = plain(model, optimizer, batches, set_to_none=False)
    optimizer.zero_grad()
    return losses


def cleared_late(model, optimizer, batches):
    """Train a loop that clears gradients after the forward, as Lightning does."""
    losses = []
    for ids in batches:
        loss, _ = model(ids, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    optimizer.zero_grad()
    return losses


def accumulated(model, optimizer, batches):
    losses = []
    for n, ids in enumerate(batches):
        loss, _ = model(ids, return_loss=True)
        (loss / 3).backward()
        losses.append(loss.detach())
        if n % 3 == 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    optimizer.zero_grad()
    return losses


def scaled(model, optimizer, batches):
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    losses = []
    for ids in batches:
        loss, _ = model(ids, return_loss=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def of_parts(model, optimizer, batches):
    """A loss of one's own, of sums and counts."""
    losses = []
    for ids in batches:
        sums, counts = model(ids, return_loss=True, loss_reduction="sum")
        assert not counts.requires_grad
        loss = (sums * torch.arange(1, len(sums) + 1, device=DEVICE) / counts).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.detach(), counts]
    return losses


def side_by_side(model, optimizer, batches):
    """Two forwards, then their backwards."""
    losses = []
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the second runs eagerly
            pending = [model(ids, return_loss=True)[0] for ids in (one, other)]
        for loss in reversed(pending):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.detach() for loss in pending]
    return losses


def by_hand(model, optimizer, batches):
    """Gradients that .grad does not have."""
    losses, held = [], []
    for ids in batches:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that those held make the next one run eagerly
            loss, _ = model(ids, return_loss=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        held = [*held[-40:], *gradients]
        losses.append(loss.detach())
    return [*losses, *(g for g in held if g is not None)]


def seen_by_hooks(model, optimizer, batches):
    seen = []
    first, *_, last = model.parameters()
    handles = [
        first.register_hook(lambda gradient: gradient * 2),
        last.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum())),
    ]
    losses = plain(model, optimizer, batches)
    assert len(seen) == len(batches)
    for handle in handles:
        handle.remove()
    return [*losses, *seen]


LOOPS = [
    *(plain, zeros, cleared_late, accumulated, scaled, of_parts, side_by_side, by_hand),
    seen_by_hooks,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(captured, loop):
    ours, theirs = both()
    batches = [draw(n) for n in range(6)]
    losses, expected = loop(*ours, batches), loop(*theirs, batches)
    assert captured == [(4, 17)]
    for loss, other in zip(losses, expected, strict=True):
        assert torch.equal(loss, other)
    assert_same(ours, theirs)


def test_shapes_in_turn(captured):
    """Each has a graph; gradients of one add up with those of another."""
    ours, theirs = both()
    batches = [draw(n, batch) for n, batch in enumerate([4, 3, 4, 3, 3, 4, 4, 2, 3])]
    losses, expected = (accumulated(*each, batches) for each in (ours, theirs))
    assert captured == [(4, 17), (3, 17)]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(ours, theirs)


def test_fused_with_checkpoints(captured):
    ours, theirs = both(impl="fused")
    ours[0].checkpointing = theirs[0].checkpointing = True
    batches = [draw(n, 1, 9) for n in range(3)]
    losses, expected = (plain(*each, batches) for each in (ours, theirs))
    assert captured == [(1, 9)]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(ours, theirs)


def test_numbers_of_a_train_step(captured):
    ours, _ = both()
    other = build()
    step, optimizer = pair(other)
    batches = [draw(n) for n in range(10)]
    losses = plain(*ours, batches)[::4]
    assert torch.equal(torch.stack(losses), torch.stack([step(ids)[0] for ids in batches]))
    assert_same(ours, (other, optimizer))
    step = pair(ours[0])[0]  # which has graphs of its own
    step(batches[0])
    assert captured == [(4, 17)]


def test_autocast(captured):
    """A region of autocast keeps copies of weights, and each dtype has a region."""
    ours, theirs = both()

    def loop(model, optimizer):
        losses = []
        for n, dtype in enumerate([torch.bfloat16, torch.float16] * 3):
            with torch.autocast(DEVICE, dtype):
                with torch.no_grad():
                    model(draw(100 + n))
                loss, _ = model(draw(n), return_loss=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    assert torch.equal(loop(*ours), loop(*theirs))
    assert captured == [(4, 17)] * 2
    assert_same(ours, theirs)


def test_what_is_not_training_is_as_without(captured):
    model, other = build(), build()
    model.graphs = True
    ids = draw(0)
    for run in (
        lambda m: m(ids),
        lambda m: torch.stack(m(ids, return_loss=True)[1]),
        lambda m: m.generate(ids[:, :5], 4, temperature=0),
        lambda m: m(ids[:, :-1], return_hierarchical_embeds=True)[0],
    ):
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(run(model), run(other))
    model.eval()
    for _ in range(3):
        model(ids, return_loss=True)[0].backward()
    assert captured == []


def test_one_backward_and_no_gradients_of_it(captured):
    model = build()
    model.graphs = True
    for _ in range(2):
        model(draw(0), return_loss=True)[0].backward()
    model.zero_grad()
    loss, _ = model(draw(0), return_loss=True)
    with pytest.raises(RuntimeError, match="create_graph=True.*model.graphs = False"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward, got a second"):
        loss.backward()
    model.zero_grad()
    model(draw(0), return_loss=True)[0].backward()
    assert captured == [(4, 17)]


def test_a_loss_that_is_dropped_or_kept(captured):
    """A new forward may have the memory, unless a backward may still come."""
    (model, optimizer), (other, other_optimizer) = both()
    plain(model, optimizer, [draw(0), draw(1)])
    plain(other, other_optimizer, [draw(0), draw(1)])
    model(draw(2), return_loss=True)
    kept, _ = model(draw(3), return_loss=True)
    with pytest.warns(UserWarning, match="backward of the one before may still come"):
        loss, _ = model(draw(4), return_loss=True)
    assert "_ReplayBackward" in str(kept.grad_fn) and "_Replay" not in str(loss.grad_fn)
    for each in (kept, loss, *(other(draw(n), return_loss=True)[0] for n in (3, 4))):
        each.backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def swapped(model):
    p = model.token_emb.weight
    model.token_emb.weight = torch.nn.Parameter(p.detach() * 2)


def frozen(model):
    model.to_logits.weight.requires_grad_(False)


def thawed(model):
    model.to_logits.weight.requires_grad_(True)


def in_another_impl(model):
    model.impl = "reference"


def with_an_adaptor(model):
    class Adaptor(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.scaling = base, {"default": 1.0}

        def forward(self, x):
            return self.base(x) * self.scaling["default"]

    model.to_logits = Adaptor(model.to_logits)


def with_a_stronger_adaptor(model):
    model.to_logits.scaling["default"] = 3.0


def with_other_labels(model):
    model.ignore_index = 3


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.layers[0][0].attn.to_out)


def loaded(model):
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)


CHANGES = [
    *(swapped, frozen, thawed, with_an_adaptor, with_a_stronger_adaptor, with_other_labels),
    *(loaded, parametrized, in_another_impl),
]


def test_changes_give_graphs_up(captured):
    ours, theirs = build(), build()
    ours.graphs = True
    for change in [lambda model: None, *CHANGES]:
        for model in (ours, theirs):
            change(model)
        for n in range(3):
            losses = [model(draw(n), return_loss=True)[0] for model in (ours, theirs)]
            assert torch.equal(*losses), change
            for model, loss in zip((ours, theirs), losses, strict=True):
                model.zero_grad()
                loss.backward()
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), change
        del losses, loss
    # another impl is the same on a CPU, whose "auto" is the reference
    assert len(captured) == 1 + len(CHANGES)


def test_hooks_of_modules_run(captured):
    model = build()
    model.graphs, seen = True, []
    plain(model, adamw(model), [draw(0)] * 3)
    handle = model.to_logits.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="model.graphs has no effect: the model has forward hooks"):
        plain(model, adamw(model), [draw(0)] * 3)
    assert len(seen) == 3
    handle.remove()
    plain(model, adamw(model), [draw(0)] * 3)
    assert captured == [(4, 17)] * 2


def test_many_shapes(captured):
    model = build()
    model.graphs = True
    batches = [draw(n, 1 + n % (MAX_GRAPHS + 1)) for n in range(2 * MAX_GRAPHS + 2)]
    with pytest.warns(UserWarning, match="others have a CUDA graph each"):
        plain(model, adamw(model), batches)
    assert len(captured) == MAX_GRAPHS


def test_a_capture_that_fails_leaves_the_loop_eager(captured, monkeypatch):
    def fail(owner, function):
        raise torch.OutOfMemoryError("planted")

    ours, theirs = both()
    monkeypatch.setattr(graphed_loss.Graphs, "capture", fail)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph: planted"):
        losses = plain(*ours, [draw(n) for n in range(4)])
    assert captured == [(4, 17)]
    expected = plain(*theirs, [draw(n) for n in range(4)])
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(ours, theirs)


def test_a_weight_that_is_out_of_sight(captured):
    """A closure may hold it, say: a graph would lose its gradient."""
    ours, theirs = both()
    for model, _ in (ours, theirs):
        weight = model.token_emb.weight
        model.to_logits.forward = lambda x, w=weight: torch.nn.functional.linear(x, w)
    message = "goes on without a CUDA graph: it trains a tensor that no module"
    with pytest.warns(UserWarning, match=message):
        losses = plain(*ours, [draw(n) for n in range(4)])
    expected = plain(*theirs, [draw(n) for n in range(4)])
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(ours, theirs)


def test_copies_have_no_graphs(captured):
    (model, optimizer), _ = both()
    plain(model, optimizer, [draw(0)] * 3)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert model.state_dict().keys() == build().state_dict().keys()
    expected = plain(model, optimizer, [draw(0)])[0]
    for other in copies:
        assert other.graphs
        assert torch.equal(plain(other, adamw(other), [draw(0)])[0], expected)
    assert captured == [(4, 17)]


def test_memory_goes_with_the_model(monkeypatch):
    if DEVICE == "cpu":
        emulate(monkeypatch)
    model = build()
    model.graphs = True
    # a replay that is emulated needs the model
    plain(model, adamw(model), [draw(0)] * (3 if DEVICE == "cuda" else 1))
    alive, graphed = weakref.ref(model), weakref.ref(graphed_loss._graphed[model])
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None and graphed() is None
    finally:
        gc.enable()


def test_ids_are_checked_as_ever(captured):
    model = build()
    model.graphs = True
    plain(model, adamw(model), [draw(0)] * 3)
    with pytest.raises(ValueError, match="ids must be"):
        model(draw(0)[0], return_loss=True)
    model.checked = True
    with pytest.raises(ValueError, match=r"num_tokens\) = \[0, 31\), got 31"):
        model(draw(0) * 0 + 31, return_loss=True)
    plain(model, adamw(model), [draw(0).to(torch.uint8)])


def test_other_eyes(captured):
    """Tools that look at ops see them, and those that transform a forward get an eager one."""
    model, other = build(impl="reference"), build(impl="reference")
    model.graphs = True
    plain(model, adamw(model), [draw(0)] * 3)
    plain(other, adamw(other), [draw(0)] * 3)
    counts = []
    for each in (model, other):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            each(draw(0), return_loss=True)[0].backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    weights = {name: p.detach() * 2 for name, p in model.named_parameters()}
    keywords = dict(return_loss=True)
    losses = [torch.func.functional_call(m, weights, draw(0), keywords)[0] for m in (model, other)]
    assert torch.equal(*losses)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        model(draw(0), return_loss=True)
    assert packed


def test_threads(captured):
    """Forwards and backwards of two threads, each of which has the loss that it has alone."""
    model, other = build(), build()
    model.graphs = True
    plain(model, adamw(model), [draw(0)] * 3)
    plain(other, adamw(other), [draw(0)] * 3)
    with torch.no_grad():
        expected = {n: other(draw(n), return_loss=True)[0] for n in range(4)}
    wrong = []

    def work(n):
        for _ in range(5):
            loss, _ = model(draw(n), return_loss=True)
            wrong.append(not torch.equal(loss, expected[n]))
            loss.backward()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some run eagerly
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 20 and not any(wrong)
