"""One call of TrainStep is one step of the loop that everybody writes, to the bit."""

from collections import Counter

import pytest
import torch
from helpers import DEVICE
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from training import LR, adamw, assert_same, assert_same_parameters, build, draw, pair

from shtx import TrainStep
from shtx_kernels import products


def autocast(precision):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16-mixed")


def plain_step(model, optimizer, ids, precision="fp32", grad_clip=None):
    with autocast(precision):
        loss, parts = model(ids, return_loss=True)
    loss.backward()
    norm = None
    if grad_clip is not None:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, parts, norm


# the step


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_steps_are_those_of_the_plain_loop(precision, grad_clip, cuda_graph):
    ours, plain = build(), build()
    optimizer, plain_optimizer = adamw(ours), adamw(plain)
    schedule = lambda n: 0.5**n
    schedulers = [LambdaLR(o, schedule) for o in (optimizer, plain_optimizer)]
    step = TrainStep(
        ours, optimizer, precision=precision, grad_clip=grad_clip, cuda_graph=cuda_graph
    )
    for n in range(5):
        loss, parts = step(draw(n))
        theirs = plain_step(plain, plain_optimizer, draw(n), precision, grad_clip)
        assert not loss.requires_grad and loss.shape == ()
        assert torch.equal(loss, theirs[0])
        assert all(torch.equal(a, b) for a, b in zip(parts, theirs[1], strict=True))
        assert (step.grad_norm is None) == (grad_clip is None)
        assert grad_clip is None or torch.equal(step.grad_norm, theirs[2])
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == LR * 0.5**5
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert_same((ours, optimizer), (plain, plain_optimizer))


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_scaled_steps(fused, cuda_graph):
    """Steps in fp16 are those of a loop with a scaler, which leaves out the ones that overflow."""
    ours, plain = build(), build()
    optimizer, plain_optimizer = (
        torch.optim.AdamW(model.parameters(), lr=LR, fused=fused) for model in (ours, plain)
    )
    options = dict(precision="fp16-mixed", grad_clip=0.5)
    if DEVICE == "cuda" and cuda_graph and not fused:
        with pytest.raises(ValueError, match='fused=True with precision="fp16-mixed"'):
            TrainStep(ours, optimizer, **options)
        return
    step = TrainStep(ours, optimizer, **options, cuda_graph=cuda_graph)
    scaler = torch.amp.GradScaler(DEVICE)
    for each in (scaler, step.scaler):
        each.load_state_dict({**scaler.state_dict(), "scale": 2.0**24, "growth_interval": 3})
    scales, norms = [], []
    for n in range(12):
        loss, _ = step(draw(n))
        with torch.autocast(DEVICE, torch.float16):
            other, _ = plain(draw(n), return_loss=True)
        scaler.scale(other).backward()
        scaler.unscale_(plain_optimizer)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        scaler.step(plain_optimizer)
        scaler.update()
        plain_optimizer.zero_grad()
        assert torch.equal(loss, other)
        assert norm.isfinite() == step.grad_norm.isfinite()
        scales.append(scaler.get_scale())
        norms.append(norm.isfinite())
        assert step.scaler.state_dict() == scaler.state_dict()
    assert min(scales) < scales[-1] and not all(norms) and any(norms)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("impl, accumulate", [("reference", 2), ("fused", 1)])
def test_checkpointing_changes_no_bit(impl, accumulate):
    ours, plain = build(impl=impl), build(impl=impl)
    ours.checkpointing = True
    options = dict(precision="bf16-mixed", grad_clip=0.5, accumulate=accumulate)
    step, optimizer = pair(ours, **options)
    plain_step, plain_optimizer = pair(plain, **options)
    for n in range(3):
        assert torch.equal(step(draw(n))[0], plain_step(draw(n))[0])
    assert_same((ours, optimizer), (plain, plain_optimizer))


def test_weights_are_cast_once_a_step(monkeypatch):
    """One call casts them, whatever the number of micro-batches."""
    lists, cast = [], products.copy_all
    monkeypatch.setattr(products, "copy_all", lambda *args: lists.append(args[1]) or cast(*args))
    model = build(impl="fused")
    step = TrainStep(model, adamw(model), accumulate=2, cuda_graph=False)
    step.compile(draw(0))
    lists.clear()
    for n in range(2):
        step(draw(n))
    names = {p: name for name, p in model.named_parameters()}
    read = [[names[w] for w in weights] for weights in lists]
    assert len(read) == 2 and read[0] == read[1]
    assert {"token_emb.weight", "layers.0.0.ff.net.1.weight"} <= set(read[0])
    assert not any("to_logits" in name or "to_recon" in name for name in read[0])


def test_bf16_parameters():
    ours, plain = build().bfloat16(), build().bfloat16()
    optimizer, plain_optimizer = adamw(ours), adamw(plain)
    step = TrainStep(ours, optimizer, precision="bf16")
    for n in range(3):
        step(draw(n))
        plain_step(plain, plain_optimizer, draw(n))
    assert_same((ours, optimizer), (plain, plain_optimizer))


def test_a_learning_rate_that_is_a_tensor():
    ours, plain = build(), build()
    rate = torch.tensor(LR)
    optimizer, plain_optimizer = adamw(ours, lr=rate), adamw(plain)
    step = TrainStep(ours, optimizer, precision="fp32")
    for n in range(4):
        rate.fill_(LR * 0.5**n)
        plain_optimizer.param_groups[0]["lr"] = LR * 0.5**n
        step(draw(n))
        plain_step(plain, plain_optimizer, draw(n))
    assert optimizer.param_groups[0]["lr"] is rate
    assert_same_parameters(ours, plain)


def test_gradients_from_before_are_dropped():
    ours, plain = build(), build()
    step, optimizer = pair(ours)
    plain_optimizer = adamw(plain)
    for n in range(3):
        ours(draw(9), return_loss=True)[0].backward()
        step(draw(n))
        plain_step(plain, plain_optimizer, draw(n))
    assert_same((ours, optimizer), (plain, plain_optimizer))


def test_within_the_autocast_of_the_caller():
    """The caller's cache of narrow weights would outlive the step."""
    ours, plain = build(), build()
    step, optimizer = pair(ours, precision="bf16-mixed")
    plain_optimizer = adamw(plain)

    def evaluate(model):
        with autocast("bf16-mixed"):
            return model(draw(9, 1, 8)).detach()

    with autocast("bf16-mixed"):
        evaluate(ours)
        for model in (ours, plain):
            model.to_logits.weight.data *= 2
        logits = [(step(draw(n)), evaluate(ours))[1] for n in range(4)]
    for n in range(4):
        plain_step(plain, plain_optimizer, draw(n), "bf16-mixed")
        assert torch.equal(logits[n], evaluate(plain))
    assert_same((ours, optimizer), (plain, plain_optimizer))


def test_an_optimizer_of_any_kind_without_a_graph():
    ours, plain = build(), build()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9) for m in (ours, plain))
    step = TrainStep(ours, optimizer, precision="fp32", cuda_graph=False)
    for n in range(3):
        step(draw(n))
        plain_step(plain, other, draw(n))
    assert_same_parameters(ours, plain)


# micro-batches


def uneven(batch=8):
    """Return ids of which hardly a label counts in the first micro-batches."""
    ids = draw(3, batch)
    ids[: batch // 2, 2:] = 0
    ids[0] = 0
    return ids


@pytest.mark.parametrize(
    "options",
    [{}, dict(recon_loss_weight=0.0), dict(ignore_index=-1), dict(hierarchies=1, dim=16)],
    ids=str,
)
def test_micro_batches_make_the_step_of_the_whole_batch(options):
    if "dim" in options:
        options = options | dict(hierarchical_stride=1, window_sizes=4)
    results = []
    for accumulate in (1, 4):
        model, gradients = build(**options), []
        step, optimizer = pair(model, accumulate=accumulate, grad_clip=1e9)
        read = lambda *_, p=gradients, m=model: p.extend(q.grad.flatten() for q in m.parameters())
        optimizer.register_step_pre_hook(read)
        loss, parts = step(uneven())
        results.append((torch.stack((loss, *parts, step.grad_norm)), torch.cat(gradients)))
    (whole, expected), (ours, gradient) = results
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


THREE = dict(hierarchies=(2, 1, 4), hierarchical_stride=(2, 1, 4), dim=16, window_sizes=4)


@pytest.mark.parametrize("shape", [(4, 17), (4, 2), (0, 9), (1, 25)])
@pytest.mark.parametrize("options", [{}, dict(recon_loss_weight=0.0), THREE], ids=str)
def test_counts_are_known_from_ids(shape, options):
    model, ids = build(**options), draw(0, *shape)
    ids[:1, 3:] = 0
    counts = model.loss_counts(ids)
    assert torch.equal(counts, model(ids, return_loss=True, loss_reduction="sum")[1])
    assert len(counts) == len(model.loss_weights)


def test_an_empty_batch_of_micro_batches():
    step, _ = pair(build(), accumulate=2)
    loss, parts = step(draw(0, 0))
    assert loss == 0 and not any(parts)


class CountCasts(TorchDispatchMode):
    """Counts how often each tensor is narrowed to bf16."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **kwargs or {})


def test_the_weight_of_a_layer_is_narrowed_once_for_all_micro_batches():
    model = build(impl="reference")
    step, _ = pair(model, precision="bf16-mixed", accumulate=4, cuda_graph=False)
    with CountCasts() as casts:
        step(draw(0))
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {casts.counts[weight.data_ptr()] for weight in weights} == {1}


# input that is refused


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"precision": "fp16-mixed", "shard_optimizer": True},
            ValueError,
            'precision must not be "fp16-mixed" where a rank has a part of the parameters',
        ),
        (
            {"precision": "fp8"},
            ValueError,
            "precision must be one of 'fp32', 'bf16', 'bf16-mixed', 'fp16-mixed', got 'fp8'",
        ),
        (
            {"precision": "bf16"},
            ValueError,
            "precision='bf16' takes parameters of torch.bfloat16, got torch.float32: token_emb",
        ),
        ({"grad_clip": 0.0}, ValueError, "grad_clip must be above 0 or None, got 0.0"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an integer, got 1.5"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error) as raised:
        pair(build(), **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([1, 2], TypeError, "ids must be a tensor of integers, got list"),
        (torch.ones(4, 9, device=DEVICE), TypeError, "integers, got torch.float32"),
        (draw(0)[0], ValueError, "ids must be (batch, tokens), got shape (17,)"),
        (draw(0).to("meta"), ValueError, f"ids must be on the model's {DEVICE}"),
        (draw(0, 4, 26), ValueError, "ids must have 2 to 25 tokens"),
        (draw(0, 3), ValueError, "a batch that is a multiple of accumulate, 2, got 3"),
        (draw(0) + 40, ValueError, "ids must be in [0, num_tokens) = [0, 31), got "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_ids_lose_nothing(ids, error, message):
    model, other = build(), build()
    model.checked = True
    step, optimizer = pair(model, accumulate=2)
    other_step, other_optimizer = pair(other, accumulate=2)
    for n in range(4):
        with pytest.raises(error) as raised:
            step(ids)
        assert message in str(raised.value)
        step(draw(n))
        other_step(draw(n))
    assert_same((model, optimizer), (other, other_optimizer))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_fails_loses_nothing(where):
    model, other = build(), build()
    step, optimizer = pair(model, grad_clip=1.0)
    other_step, other_optimizer = pair(other, grad_clip=1.0)

    def fail(*_):
        raise RuntimeError("as asked")

    for n in range(2):
        if where == "forward":
            hook = model.norms[0].register_forward_pre_hook(fail)
        else:
            hook = model.token_emb.weight.register_hook(fail)  # the last gradient
        with pytest.raises(RuntimeError, match="as asked"):
            step(draw(9, batch=2 + n))
        hook.remove()
        step(draw(n))
        other_step(draw(n))
        assert_same((model, optimizer), (other, other_optimizer))
