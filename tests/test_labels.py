"""Labels of a user's own: the next-token loss is of them, and leaves out what they mask."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, without_a_gpu
from ranks import RANKS, assert_close, assert_passed, sgd, spawn, take
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream
from test_bad_input import assert_raises
from test_graphed_loss import emulate
from training import OPTIONS, adamw, assert_same, build, draw, pair, replay_a_step

from shtx import TrainStep
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer
from shtx.train_step import MAX_GRAPHS


def build_next_latent(**options):
    torch.manual_seed(0)
    return NextLatentTransformer(**OPTIONS | options).to(DEVICE)


BUILDS = [build, build_next_latent]


def masked(ids, value=-100):
    """Labels without prompts, which differ in length from row to row."""
    labels = ids.clone()
    for b, row in enumerate(labels):
        row[: 3 + 4 * b] = value
    return labels


def gradients(loss, model):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten() for gradient in found])


def assert_same_gradients(ours, theirs, times=1e-5):
    assert (ours - theirs).norm() <= times * theirs.norm()


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_the_loss_is_of_the_labels_that_count(impl):
    """The other losses are as without labels; those, and logits, are upstream's."""
    model, upstream = build(impl=impl), Upstream(**OPTIONS).to(DEVICE)
    upstream.load_state_dict(model.state_dict())
    ids, labels = draw(0, batch=2), masked(draw(1, batch=2))
    loss, parts = model(ids, labels=labels)
    _, (_, recon, ar) = upstream(ids, return_loss=True)
    logits = upstream(ids[:, :-1])
    labels = torch.where(labels == 0, -100, labels)  # ignore_index
    next_token = F.cross_entropy(logits.mT, labels[:, 1:])
    expected = next_token + 0.1 * recon + 0.25 * ar
    torch.testing.assert_close(torch.stack(parts), torch.stack((next_token, recon, ar)))
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(loss, model), gradients(expected, upstream))


@pytest.mark.parametrize("build", BUILDS)
def test_ids_are_the_labels_by_default(build):
    model, ids = build(), draw(0)
    loss, expected = model(ids, labels=ids.to(torch.uint8))[0], model(ids, True)[0]
    assert loss == expected
    assert torch.equal(gradients(loss, model), gradients(expected, model))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("ignore_index", [0, -1, -100])
def test_what_is_left_out(build, ignore_index):
    model, ids = build(ignore_index=ignore_index), draw(0)
    outputs = [model(ids, labels=masked(ids, value)) for value in (-100, ignore_index)]
    assert outputs[0][0] == outputs[1][0]
    count = (masked(ids)[:, 1:] >= (1 if ignore_index == 0 else 0)).sum()
    assert model.loss_counts(ids, masked(ids))[0] == count
    loss, (next_token, *_) = model(ids, labels=torch.full_like(ids, -100))
    assert next_token == 0 and loss > 0 and loss.isfinite()


@pytest.mark.parametrize("build", BUILDS)
def test_sums_of_unequal_counts_add_up(build):
    """The micro-batches of a step add up, too."""
    model, ids = build(), draw(0)
    labels = masked(ids)
    whole, counts = model(ids, labels=labels, loss_reduction="sum")
    assert torch.equal(counts, model.loss_counts(ids, labels))
    rows = zip(ids.split(1), labels.split(1), strict=True)
    each = [model(row, labels=own, loss_reduction="sum") for row, own in rows]
    torch.testing.assert_close(sum(sums for sums, _ in each), whole)
    assert torch.equal(sum(counts for _, counts in each), counts)

    ours, theirs = build(), build()
    step, plain = (
        TrainStep(m, sgd(m), precision="fp32", cuda_graph=False, accumulate=count)
        for m, count in ((ours, 4), (theirs, 1))
    )
    torch.testing.assert_close(step(ids, labels)[0], plain(ids, labels)[0])
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_is_that_of_a_plain_loop():
    ours, theirs = build(), build()
    (step, optimizer), other = pair(ours), adamw(theirs)
    for n in range(3):
        labels = masked(draw(n)) if n else None
        loss, _ = theirs(draw(n), return_loss=True, labels=labels)
        loss.backward()
        other.step()
        other.zero_grad()
        assert torch.equal(step(draw(n), labels)[0], loss.detach())
    assert_same((ours, optimizer), (theirs, other))


LABELS = [None, -100, -100, None, None, 0, -100]  # calls one after the other


@pytest.mark.parametrize("how", ["emulated", pytest.param("CUDA graphs", marks=pytest.mark.gpu)])
def test_graphs_of_steps_read_labels(how, monkeypatch):
    if how == "emulated":
        monkeypatch.setattr(TrainStep, "_capture", replay_a_step)
        monkeypatch.setattr("shtx.train_step.run_aside", lambda function, stream: function())
    ours, theirs = build(), build()
    (step, optimizer), (other, other_optimizer) = pair(ours), pair(theirs, cuda_graph=False)
    step._graphs = step._graphs or without_a_gpu(MAX_GRAPHS)
    for n, value in enumerate(LABELS):
        labels = None if value is None else masked(draw(n + 9), value)
        assert torch.equal(step(draw(n), labels)[0], other(draw(n), labels)[0])
    assert all(kept.graph for kept in step._graphs.kept.values()) and len(step._graphs.kept) == 2
    assert_same((ours, optimizer), (theirs, other_optimizer))


@pytest.mark.parametrize("how", ["emulated", pytest.param("CUDA graphs", marks=pytest.mark.gpu)])
def test_graphs_of_a_loss_read_labels(how, monkeypatch):
    from shtx import graphed_loss

    if how == "emulated":
        emulate(monkeypatch)
    ours, theirs = build(), build()
    ours.graphs = True
    for n, value in enumerate(LABELS):
        labels = None if value is None else masked(draw(n + 9), value)
        losses = [m(draw(n), return_loss=True, labels=labels)[0] for m in (ours, theirs)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    kept = graphed_loss._graphed[ours].graphs.kept
    assert len(kept) == 2 and all(isinstance(k, graphed_loss.Captured) for k in kept.values())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with pytest.raises(ValueError, match="labels must have the shape of ids"):
        ours(draw(0), labels=draw(0)[:, 1:])


def test_compiled():
    torch.compiler.reset()
    model, ids = build(), draw(0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for n in range(2):
        labels = masked(draw(n))
        loss, _ = compiled(ids, labels=labels)
        torch.testing.assert_close(loss, model(ids, labels=labels)[0])
        assert_same_gradients(
            gradients(loss, model), gradients(model(ids, labels=labels)[0], model)
        )
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="labels must be in .*, got 31"):
            compiled(ids, labels=torch.full_like(ids, 31))


@pytest.mark.parametrize(
    "labels, error, message",
    [
        ([[1]], TypeError, "labels must be a tensor of integers, got list"),
        (draw(0).float(), TypeError, "labels must be a tensor of integers, got torch.float32"),
        (draw(0) > 3, TypeError, "labels must be a tensor of integers, got torch.bool"),
        (draw(0)[:, 1:], ValueError, "labels must have the shape of ids, (4, 17), one for each"),
        (draw(0)[0], ValueError, "one for each, got (17,)"),
        (draw(0).to("meta"), ValueError, f"labels must be on the model's {DEVICE}"),
        (draw(0) * 0 + 31, ValueError, "labels must be in [0, num_tokens) = [0, 31), -100 or ign"),
        (draw(0) * 0 - 1, ValueError, "or ignore_index, 0, got -1"),
    ],
)
def test_bad_labels(labels, error, message):
    model = build()
    model.checked = True
    step, _ = pair(model)
    before = model.to_logits.weight.clone()
    assert_raises(error, message, lambda: model(draw(0), labels=labels))
    assert_raises(error, message, lambda: step(draw(0), labels))
    assert torch.equal(model.to_logits.weight, before)


def test_generate_takes_no_labels():
    message = "generate() got an unexpected keyword argument 'labels'"
    ids = draw(0)
    assert_raises(TypeError, message, lambda: build().generate(ids, 1, labels=ids))


# two processes


def steps_equal_those_of_one_process(rank):
    """The first rank has hardly a label that counts."""
    ids = [draw(n) for n in range(RANKS)]
    labels = [masked(ids[0]), *ids[1:]]
    labels[0][:, :15] = -100
    for new in BUILDS:
        for accumulate in (1, 2):
            ours = take(new(), ids[rank], labels[rank], accumulate=accumulate)
            alone = take(new(), torch.cat(ids), torch.cat(labels), process_group=False)
            assert_close(ours, alone)


@pytest.mark.skipif(DEVICE == "cuda", reason="of processes on a CPU")
def test_processes(tmp_path):
    case = steps_equal_those_of_one_process
    assert_passed(case, spawn(tmp_path, "gloo", [case]))
