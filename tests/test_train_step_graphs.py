"""Steps by CUDA graphs; where there is no GPU, a replay is a step on the ids that a graph reads."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICE, PLANTS, without_a_gpu, without_launches
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from training import LR, adamw, assert_same, build, draw, pair, replay_a_step

from shtx import TrainStep
from shtx.train_step import MAX_GRAPHS


@pytest.fixture(params=["replayed steps", pytest.param("CUDA graphs", marks=pytest.mark.gpu)])
def captured(request, monkeypatch):
    """The shapes of ids that were captured, in their order."""
    shapes, capture = [], TrainStep._capture

    def note(step, ids, labels):
        shapes.append(tuple(ids.shape))
        return (capture if request.param == "CUDA graphs" else replay_a_step)(step, ids, labels)

    monkeypatch.setattr(TrainStep, "_capture", note)
    if request.param == "replayed steps":
        monkeypatch.setattr("shtx.train_step.run_aside", lambda function, stream: function())
    return shapes


def graphed(model, **options):
    step, optimizer = pair(model, **options)
    if step._graphs is None:
        step._graphs = without_a_gpu(MAX_GRAPHS)
    return step, optimizer


def eager(model, **options):
    return pair(model, cuda_graph=False, **options)


def test_every_shape_has_a_graph_from_its_second_step_on(captured):
    ours, theirs = build(), build()
    step, optimizer = graphed(ours)
    other_step, other_optimizer = eager(theirs)
    batches = [draw(n, batch) for n, batch in enumerate([4, 3, 4, 3, 3, 4, 2, 4])]
    losses, expected = ([s(ids)[0] for ids in batches] for s in (step, other_step))
    assert captured == [(4, 17), (3, 17)]
    assert torch.equal(torch.stack(losses), torch.stack(expected))  # no replay wrote over another's
    assert_same((ours, optimizer), (theirs, other_optimizer))


def test_a_call_that_only_compiles_leaves_no_trace(captured, monkeypatch):
    ahead = []
    if DEVICE == "cpu":
        monkeypatch.setattr(
            "shtx.train_step.compile_ahead", lambda f: ahead.append(without_launches(f))
        )
    ours, theirs = build(impl="fused"), build(impl="fused")
    step, optimizer = graphed(ours, precision="bf16-mixed" if DEVICE == "cuda" else "fp32")
    other_step, other_optimizer = eager(theirs, precision=step.precision)
    step.compile(draw(0, batch=2, tokens=9))
    assert DEVICE == "cuda" or len(ahead) == 1
    for n in range(2):
        ids = draw(n, batch=2, tokens=9)
        assert torch.equal(step(ids)[0], other_step(ids)[0])
        assert DEVICE == "cuda" or len(ahead) == 2
    assert_same((ours, optimizer), (theirs, other_optimizer))


def test_shapes_past_the_limit_run_eagerly(captured):
    ours, theirs = build(), build()
    step, optimizer = graphed(ours)
    other_step, other_optimizer = eager(theirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, tokens in enumerate([*range(5, 7 + MAX_GRAPHS)] * 3):
            step(draw(n, 2, tokens))
            other_step(draw(n, 2, tokens))
    told = [str(w.message) for w in caught if "have a CUDA graph" in str(w.message)]
    assert told == [
        f"a step of ids of shape (2, {5 + MAX_GRAPHS}): {MAX_GRAPHS} others have a CUDA graph"
        " each, further ones run eagerly"
    ]
    assert captured == [(2, tokens) for tokens in range(5, 5 + MAX_GRAPHS)]
    assert_same((ours, optimizer), (theirs, other_optimizer))


def change_weight_decay(step):
    step.optimizer.param_groups[0]["weight_decay"] = 0.25


def change_weight_of_a_loss(step):
    step.model.hierarchical_ar_loss_weight = 2.0


def freeze(step):
    step.model.token_emb.weight.requires_grad_(False)


def move_parameters(step):
    for p in step.model.parameters():
        p.data = p.data.clone()


def load_from_a_file(step):
    file = io.BytesIO()
    torch.save(step.optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    assert state["param_groups"][0]["lr"] == LR
    for values in step.optimizer.state.values():
        values["exp_avg"].fill_(float("nan"))  # a graph that still updates it would show
    step.optimizer.load_state_dict(state)


def checkpoint_blocks(step):
    step.model.checkpointing = True


def keep_no_slopes(step):
    step.model.kept_slopes = 0


def allow_tf32(step):
    torch.set_float32_matmul_precision("high")


def clip(step):
    step.grad_clip = 0.01


def split(step):
    step.accumulate = 2


def use_autocast(step):
    step.precision = "bf16-mixed"


def evaluate_a_block(step):
    step.model.layers[0][0].eval()


def change_an_option(step):
    step.model.norms[0].eps = 0.5


def edit_a_buffer(step):
    step.model.layers[0][1].attn.rotary_emb.inv_freq *= 0.5


def replace_a_forward(step):
    module = step.model.layers[0][0].ff.net[1]
    module.forward = lambda x: torch.nn.functional.linear(x, module.weight * 2)


def leave_merges_out(step):
    step.model.need_hierarchical_merge = False


CHANGES = [
    *(checkpoint_blocks, change_weight_decay, change_weight_of_a_loss, freeze, move_parameters),
    *(load_from_a_file, keep_no_slopes, allow_tf32, clip, split, use_autocast, evaluate_a_block),
    *(change_an_option, edit_a_buffer, replace_a_forward, leave_merges_out),
]


@pytest.mark.filterwarnings("ignore:.*modules run by themselves")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_graph_took_in_may_change(captured, change):
    ours, theirs = build(), build()
    step, optimizer = graphed(ours)
    other_step, other_optimizer = eager(theirs)
    try:
        for n in range(6):
            if n == 3:
                change(step)
                change(other_step)
            step(draw(n))
            other_step(draw(n))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert captured == [(4, 17)] * 2
    assert_same((ours, optimizer), (theirs, other_optimizer))


@pytest.mark.filterwarnings("ignore:.*modules run by themselves")
def test_a_class_whose_forward_is_replaced(captured, monkeypatch):
    ours, theirs = build(), build()
    step, optimizer = graphed(ours)
    other_step, other_optimizer = eager(theirs)
    forward = torch.nn.Linear.forward
    for n in range(6):
        if n == 3:
            monkeypatch.setattr(torch.nn.Linear, "forward", lambda m, x: forward(m, x) * 1.5)
        assert torch.equal(step(draw(n))[0], other_step(draw(n))[0])
    assert captured == [(4, 17)] * 2
    assert_same((ours, optimizer), (theirs, other_optimizer))


def test_hooks_run(captured):
    """Hooks of modules and of parameters run from the next step on, until they are removed."""
    model, seen = build(), []
    step, _ = graphed(model)
    note = lambda *args: seen.append(1)
    weight = model.to_logits.weight
    registers = [
        model.register_forward_hook,
        model.layers[0][0].ff.register_forward_pre_hook,
        model.norms[0].register_full_backward_hook,
        weight.register_hook,
        weight.register_post_accumulate_grad_hook,
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count, register in enumerate(registers, start=1):
            for n in range(3):
                step(draw(n))
            assert len(captured) == count
            handle = register(note)
            step(draw(3))
            step(draw(4))
            handle.remove()
            assert seen == [1, 1], register
            seen.clear()
    told = [str(w.message) for w in caught if "without a CUDA graph" in str(w.message)]
    assert told == ["steps run without a CUDA graph: the model has forward hooks"]


# tests on a GPU


@pytest.mark.gpu  # captures
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replay_is_the_eager_step_and_waits_for_nothing(impl, precision, accumulate):
    ours, theirs = build(impl=impl), build(impl=impl)
    options = dict(precision=precision, accumulate=accumulate, grad_clip=0.5)
    step, optimizer = pair(ours, **options)
    other_step, other_optimizer = eager(theirs, **options)
    schedulers = [LambdaLR(o, lambda n: 0.9**n) for o in (optimizer, other_optimizer)]
    batches = [draw(n) for n in range(6)]
    for n, ids in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if n > 1 else "default")
        try:
            loss, _ = step(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(loss, other_step(ids)[0])
        assert torch.equal(step.grad_norm, other_step.grad_norm)
        for scheduler in schedulers:
            scheduler.step()
    assert step._graphs.kept[batches[0].shape, False].graph
    assert_same((ours, optimizer), (theirs, other_optimizer))


@pytest.mark.gpu  # captures
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_capture_that_fails(plant):
    """The step runs once, later ones run eagerly, after one warning; all else can go on."""
    ours, theirs = build(), build()
    step, optimizer = pair(ours)
    other_step, other_optimizer = eager(theirs)
    ours.combine = lambda losses, combine=ours.combine: plant() or combine(losses)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(5):
            assert torch.equal(step(draw(n))[0], other_step(draw(n))[0])
    told = [str(w.message) for w in caught if "goes on without a CUDA graph" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("a step of ids of shape (4, 17)")
    assert torch.randint(5, (3,), device="cuda").max() < 5
    del ours.combine
    for n in range(3):
        assert torch.equal(step(draw(n, 2))[0], other_step(draw(n, 2))[0])
    assert step._graphs.kept[draw(0, 2).shape, False].graph
    assert_same((ours, optimizer), (theirs, other_optimizer))


@pytest.mark.gpu  # captures
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_cannot_be_captured(optimizer):
    model = build()
    optimizer = optimizer(model.parameters(), lr=LR)
    message = f"optimizer must have fused=True or capturable=True .* got {type(optimizer).__name__}"
    with pytest.raises(ValueError, match=message):
        TrainStep(model, optimizer, precision="fp32")


@pytest.mark.gpu  # captures
def test_an_optimizer_that_is_capturable_and_not_fused():
    ours, theirs = build(), build()
    optimizers = [adamw(m, fused=False, capturable=True) for m in (ours, theirs)]
    step, other_step = (
        TrainStep(m, o, precision="fp32", cuda_graph=graph)
        for m, o, graph in zip((ours, theirs), optimizers, (True, False), strict=True)
    )
    for n in range(4):
        step(draw(n))
        other_step(draw(n))
    assert_same((ours, optimizers[0]), (theirs, optimizers[1]))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    dist.destroy_process_group()  # after the test's model: see Trainer.close


@pytest.mark.gpu  # captures
def test_a_wrapper_of_one_process_changes_nothing(process_group):
    plain = build()
    model = DistributedDataParallel(copy.deepcopy(plain))
    step, optimizer = pair(model)
    other_step, other_optimizer = eager(plain)
    for n in range(3):
        step(draw(n))
        other_step(draw(n))
    assert step._graphs.kept[draw(0).shape, False].graph
    assert_same((model, optimizer), (plain, other_optimizer))


@pytest.mark.gpu  # FullyShardedDataParallel needs one
def test_fsdp1_is_refused(process_group):
    model = FullyShardedDataParallel(build(), use_orig_params=True)
    with pytest.raises(ValueError, match="must be sharded by fully_shard .* FullyShardedData"):
        pair(model)
