"""Steps of processes with a model each are together those of one process on the whole batch."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import without_a_gpu
from ranks import (
    RANKS,
    agree,
    assert_close,
    build,
    draw,
    in_processes,
    sgd,
    take,
    uneven,
    weights_of,
    whole,
)
from test_graphed_loss import emulate
from test_muon import both
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import adamw, replay_a_step

from shtx import TrainStep
from shtx.graphs import NEVER, Graphs, Structure
from shtx.parallel import Replicas, Summing
from shtx.train_step import MAX_GRAPHS


def steps_equal_those_of_one_process(rank):
    for accumulate, group in ((1, None), (2, dist.new_group())):
        options = dict(accumulate=accumulate, process_group=group)
        ours = take(build(seed=rank), uneven(rank), **options)
        alone = take(build(), whole(), process_group=False)
        assert alone[0][-1] > 0.1  # so that clipping does something
        assert_close(ours, alone)


def shares_may_be_of_unequal_size(rank):
    share = lambda rank: uneven(rank, batch=1 + 2 * rank)
    assert_close(take(build(), share(rank)), take(build(), whole(share), process_group=False))


def ranks_agree_to_the_bit(rank):
    for precision in ("bf16-mixed", "fp16-mixed"):
        model = build(seed=rank)
        step = TrainStep(model, adamw(model), precision=precision, grad_clip=0.5, accumulate=2)
        before = model.token_emb.weight.clone()
        for n in range(10):
            step(draw(RANKS * n + rank))
        assert agree(model) and not torch.equal(before, model.token_emb.weight)
    assert Structure(model).hooked() is None  # its own hooks are gone, so that graphs see a user's


def an_optimizer_may_be_sharded(rank):
    models = [build(), build(), build()]
    ours, theirs, later = (adamw(m) for m in models)
    options = dict(precision="fp32", grad_clip=0.5)
    step = TrainStep(models[0], ours, shard_optimizer=True, **options)
    other_step = TrainStep(models[1], theirs, **options)
    for _ in range(3):
        assert torch.equal(step(uneven(rank))[0], other_step(uneven(rank))[0])
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    kept = sum(state["exp_avg"].numel() for state in ours.state.values())
    assert kept <= 0.6 * sum(p.numel() for p in models[0].parameters())

    state, expected = [step.optimizer_state_dict()], theirs.state_dict()
    assert (state[0] is None) == (rank > 0)
    dist.broadcast_object_list(state)
    assert state[0]["param_groups"] == expected["param_groups"]
    assert state[0]["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert all(torch.equal(state[0]["state"][index][name], v) for name, v in values.items())

    models[2].load_state_dict(models[0].state_dict())
    last_step = TrainStep(models[2], later, shard_optimizer=True, **options)
    last_step.load_optimizer_state_dict(state[0])
    for s in (step, other_step, last_step):
        s(uneven(rank))
    with pytest.raises(ValueError, match="group .* of the optimizer on rank 0 and .* group"):
        TrainStep(models[0], ours, **options)  # a rank has only a share of it
    for model in models[1:]:
        assert all(map(torch.equal, models[0].parameters(), model.parameters()))


def several_optimizers_may_be_sharded(rank):
    """A matrix of Muon's is whole where it belongs; its products with others may be in one call."""
    models = [build(), build(), build()]
    options = dict(precision="fp32", grad_clip=0.5)
    step = TrainStep(models[0], both(models[0]), shard_optimizer=True, **options)
    other_step = TrainStep(models[1], both(models[1]), **options)
    for _ in range(3):
        loss, expected = step(uneven(rank))[0], other_step(uneven(rank))[0]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert agree(models[0])
    kept = sum(
        t.numel() for state in step.optimizers.states for v in state.values() for t in v.values()
    )
    all_of_it = [other_step.optimizer_state_dict(), step.optimizer_state_dict()]
    numbers = sum(t.numel() for v in all_of_it[0]["state"].values() for t in v.values())
    assert kept <= 0.7 * numbers
    dist.broadcast_object_list(all_of_it)
    assert all_of_it[0]["param_groups"] == all_of_it[1]["param_groups"]
    assert all_of_it[0]["state"].keys() == all_of_it[1]["state"].keys()

    models[2].load_state_dict(models[0].state_dict())
    later = TrainStep(models[2], both(models[2]), shard_optimizer=True, **options)
    later.load_optimizer_state_dict(all_of_it[1])
    assert torch.equal(later(uneven(rank))[0], step(uneven(rank))[0])
    assert all(map(torch.equal, models[0].parameters(), models[2].parameters()))


def ddp_is_the_same(rank):
    plain, wrapped = build(), build()
    wrapped = DistributedDataParallel(wrapped)
    wrapped(draw(rank), return_loss=True)  # its reducer waits for a backward of its own
    ours, theirs = take(wrapped, uneven(rank)), take(plain, uneven(rank))
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():
        wrapped(draw(rank))
    with pytest.raises(AttributeError, match="TrainStep sums the gradients of this"):
        wrapped(draw(rank), return_loss=True)
    again = DistributedDataParallel(wrapped.module)
    again(draw(rank), return_loss=True)[0].backward()


def ddp_alone_without_auxiliary_losses(rank):
    off = dict(recon_loss_weight=0.0, hierarchical_ar_loss_weight=0.0)
    model, alone = DistributedDataParallel(build(**off)), build(**off)
    for _ in range(2):  # the second forward is the one that finds unfinished reductions
        model.zero_grad()
        model(draw(rank), return_loss=True)[0].backward()
    sum(alone(draw(r), return_loss=True)[0] for r in range(RANKS)).div(RANKS).backward()
    for p, q in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def micro_batches_are_summed_once(rank):
    started, start = [], Summing.start
    note = lambda summing: (started.append(summing.started), start(summing))
    with patch.object(Summing, "start", note):
        model = build()
        step = TrainStep(model, sgd(model), precision="fp32", accumulate=4)
        for _ in range(2):
            step(uneven(rank))
    buckets = list(range(len(step._ranks.buckets)))
    assert started == buckets * 2 and len(buckets) > 5


class Branches(nn.Module):
    """A module with parts, of which each rank runs those that it is asked to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, parts):
        for part in parts:
            x = self.parts[part](x).tanh()
        return x.square().sum()


def ranks_may_leave_parts_out(rank):
    model, alone = Branches(), Branches()
    replicas = Replicas(model, dist.group.WORLD)
    x = torch.randn(RANKS, 3, 8)
    for two in [([0, 1], [1]), ([0, 1], [1, 0]), ([3], [0, 1]), ([1], [0]), ([0, 3, 1], [1])]:
        run = [two[min(r, 1)] for r in range(RANKS)]
        model.zero_grad()
        alone.zero_grad()
        replicas.backward(model(x[rank], run[rank]), last=True)
        for share, parts in zip(x, run, strict=True):
            alone(share, parts).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            expected = torch.zeros_like(q) if q.grad is None else q.grad
            torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, expected)
        assert all(p.grad is None for p in model.parts[2].parameters())
    model.parts[0].requires_grad_(False)
    model.zero_grad()
    replicas.backward(model(x[rank], [1, 0]), last=True)
    assert model.parts[0].weight.grad is None and model.parts[1].weight.grad is not None


class Position(nn.Module):
    """Its gradient lies in the memory of that of `x`, in a batch of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.position = nn.Linear(8, 32), nn.Parameter(torch.randn(16, 32))

    def forward(self, x):
        return (self.first(x) + self.position[None]).square().sum()


def gradients_may_share_memory(rank):
    model, alone = Position(), Position()
    replicas = Replicas(model, dist.group.WORLD)
    x = torch.randn(RANKS, 1, 16, 8)
    start = Summing.start
    at_once = lambda summing: (start(summing), summing.work[-1].wait())
    with patch.object(Summing, "start", at_once):
        for _ in range(2):
            model.zero_grad()
            replicas.backward(model(x[rank]), last=True)
    sum(map(alone, x)).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def large_gradients_are_summed_where_they_are(rank):
    model = Branches()
    replicas = Replicas(model, dist.group.WORLD)
    places = {}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: places.update({p: p.grad.data_ptr()}))
    replicas.backward(model(torch.randn(3, 8), [0, 1, 2, 3]), last=True)
    for part in model.parts:
        assert part.weight.nbytes == 256 and places[part.weight] == part.weight.grad.data_ptr()
        assert places[part.bias] != part.bias.grad.data_ptr()


def a_step_that_fails_loses_nothing(rank):
    model, other = build(), build()
    step, other_step = (TrainStep(m, adamw(m), precision="fp32") for m in (model, other))

    def fail(*_):
        raise RuntimeError("as asked")

    for _ in range(2):
        hook = model.token_emb.weight.register_hook(fail)  # the last gradient
        with pytest.raises(RuntimeError, match="as asked"):
            step(draw(rank))
        hook.remove()
        step(draw(rank))
        other_step(draw(rank))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def what_differs_is_refused_on_all_ranks(rank):
    def refused(error, message, model=None, optimizer=adamw, **options):
        model = model or build()
        with pytest.raises(error) as raised:
            TrainStep(model, optimizer(model), **dict(precision="fp32") | options)
        assert message in str(raised.value), raised.value

    refused(
        *(ValueError, "accumulate must be the same on all ranks, got 1 on rank 0 and 2 on rank 1"),
        accumulate=1 + rank,
    )
    refused(ValueError, "grad_clip must be the same", grad_clip=1.0 if rank else None)
    refused(
        *(ValueError, "loss_weights must be the same on all ranks, got [1.0, 0.1, 0.25] on rank 0"),
        model=build(recon_loss_weight=0.1 + rank),
    )
    frozen = build()
    frozen.to_logits.requires_grad_(rank == 0)
    refused(ValueError, "parameter to_logits.weight must be the same", model=frozen)
    refused(ValueError, "parameter token_emb.weight must", model=build(num_tokens=31 + rank))
    refused(ValueError, "optimizer must be the same", optimizer=sgd if rank else adamw)
    decay = lambda model: adamw(model, weight_decay=0.1 * rank)
    refused(ValueError, "group 0 of the optimizer must be the same", optimizer=decay)
    if rank == 1:
        refused(ValueError, "grad_clip must be above 0 or None, got -1", grad_clip=-1)
    else:
        refused(RuntimeError, "rank 1 failed: ValueError: grad_clip must be above 0")

    refused(TypeError, "process_group must be a ProcessGroup that this", process_group="gloo")
    inner = nn.Module()
    inner.module = DistributedDataParallel(build())
    refused(ValueError, "model must have DistributedDataParallel around all else", model=inner)
    hooked = DistributedDataParallel(build())
    hooked.register_comm_hook(None, allreduce_hook)
    refused(ValueError, "does nothing but to sum gradients, got one with comm_hooks", model=hooked)
    some = build()
    fully_shard(some.layers[0][0], mesh=init_device_mesh("cpu", (RANKS,)))
    refused(ValueError, "fully_shard must shard all parameters of a model or none", model=some)


def ranks_know_what_they_have_in_common(rank):
    replicas = Replicas(build(), dist.group.WORLD)
    assert replicas.same((True, 4, 17)) and replicas.same((False, -1))
    assert not replicas.same((True, 4, 17 + rank)) and not replicas.same((rank == 0, 4))


def shares_may_differ_in_shape_now_and_then(rank, device="cpu"):
    model, other = build().to(device), build().to(device)
    step = TrainStep(model, adamw(model))
    other_step = TrainStep(other, adamw(other), cuda_graph=False)
    if device == "cpu":
        step._graphs = without_a_gpu(MAX_GRAPHS)
    batches = [2, 2, 2 + rank, 2, 2, 2, 2 + rank, 2 + rank, 2, 2]
    with pytest.warns(UserWarning, match="without a CUDA graph: of the ranks some have ids of"):
        for batch in batches:
            ids = uneven(rank, batch).to(device)
            assert torch.equal(step(ids)[0], other_step(ids)[0])
    assert step._graphs.kept[ids.shape, False].graph
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def replayed_shares_may_differ_in_shape(rank):
    with (
        patch.object(TrainStep, "_capture", replay_a_step),
        patch("shtx.train_step.run_aside", lambda function, stream: function()),
    ):
        shares_may_differ_in_shape_now_and_then(rank)


def captured_shares_may_differ_in_shape(rank):
    shares_may_differ_in_shape_now_and_then(rank, "cuda")


def a_process_may_step_alone(rank):
    if rank == 0:
        assert_close(*(take(build(), draw(0), process_group=False) for _ in range(2)))


def loop_of_ones_own(rank, graphs, device):
    """Take ten steps under DistributedDataParallel; return the weights, the same on all ranks."""
    model = build(seed=rank).to(device)
    model.graphs = graphs
    wrapped, optimizer = DistributedDataParallel(model), adamw(model)
    for n in range(10):
        loss, _ = wrapped(uneven(rank).roll(n, 1).to(device), return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert agree(model)
    return weights_of(model)


def ddp_takes_the_gradients_of_graphs(rank, device="cpu"):
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patched:
            emulate(patched)
            weights = loop_of_ones_own(rank, True, device)
    else:
        weights = loop_of_ones_own(rank, True, device)
    assert torch.equal(weights, loop_of_ones_own(rank, False, device))


def ddp_takes_the_gradients_of_cuda_graphs(rank):
    ddp_takes_the_gradients_of_graphs(rank, "cuda")


# on GPUs


def trained(rank, accumulate=1, wrap=lambda model: model, optimizers=adamw, **options):
    """Take thirty steps; return the last loss, and the weights of both ranks."""
    model = build(seed=rank, impl="fused").cuda()
    options = dict(grad_clip=0.5, accumulate=accumulate) | options
    step = TrainStep(wrap(model), optimizers(model), **options)
    for n in range(30):
        ids = uneven(rank).roll(n, 1).cuda()
        torch.cuda.set_sync_debug_mode("error" if step._graphs and n > 1 else "default")
        try:
            loss, _ = step(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if step._graphs:
        assert step._graphs.kept[ids.shape, False].graph
    step.close()
    assert agree(model)
    return loss, weights_of(model)


def graphs_are_the_eager_steps(rank):
    for accumulate in (1, 2):
        ours = trained(rank, accumulate)
        assert all(map(torch.equal, ours, trained(rank, accumulate)))
        assert all(map(torch.equal, ours, trained(rank, accumulate, cuda_graph=False)))


def graphs_are_those_of_ddp_and_of_a_sharded_optimizer(rank):
    wrap = lambda model: DistributedDataParallel(model, device_ids=[rank])
    ours = trained(rank)
    assert all(map(torch.equal, ours, trained(rank, wrap=wrap)))
    assert all(map(torch.equal, ours, trained(rank, shard_optimizer=True)))


def graphs_of_several_optimizers_are_the_eager_steps(rank):
    for shard in (False, True):
        options = dict(optimizers=both, shard_optimizer=shard)
        ours = trained(rank, **options)
        assert all(map(torch.equal, ours, trained(rank, cuda_graph=False, **options)))


def graphs_equal_one_process(rank):
    models = build(seed=rank).cuda(), build().cuda()
    options = dict(precision="fp32", grad_clip=0.1)
    # a rate so low that the rounding of an update does not count
    step, step_alone = (
        TrainStep(model, adamw(model, lr=1e-7), process_group=group, **options)
        for model, group in zip(models, (None, False), strict=True)
    )
    for n in range(4):
        shares = [uneven(r).roll(n, 1).cuda() for r in range(RANKS)]
        loss, parts = step(shares[rank])
        expected, expected_parts = step_alone(torch.cat(shares))
        ours, alone = (
            (loss, *parts, step.grad_norm),
            (expected, *expected_parts, step_alone.grad_norm),
        )
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=0)


def a_capture_that_fails_on_one_rank_is_none_on_all(rank):
    model, capture = build().cuda(), Graphs.capture

    def fail(graphs, function):
        if rank == 1:
            raise RuntimeError("as asked")
        return capture(graphs, function)

    step = TrainStep(model, adamw(model))
    told = "as asked" if rank == 1 else "rank 1 failed: RuntimeError: as asked"
    with patch.object(Graphs, "capture", fail), pytest.warns(UserWarning, match=told):
        for _ in range(3):
            step(uneven(rank).cuda())
    assert list(step._graphs.kept.values()) == [NEVER]


CPU_CASES = [
    steps_equal_those_of_one_process,
    shares_may_be_of_unequal_size,
    ranks_agree_to_the_bit,
    an_optimizer_may_be_sharded,
    several_optimizers_may_be_sharded,
    ddp_is_the_same,
    ddp_alone_without_auxiliary_losses,
    micro_batches_are_summed_once,
    ranks_may_leave_parts_out,
    gradients_may_share_memory,
    large_gradients_are_summed_where_they_are,
    a_step_that_fails_loses_nothing,
    what_differs_is_refused_on_all_ranks,
    ranks_know_what_they_have_in_common,
    replayed_shares_may_differ_in_shape,
    a_process_may_step_alone,
    ddp_takes_the_gradients_of_graphs,
]
GPU_CASES = [
    graphs_are_the_eager_steps,
    graphs_are_those_of_ddp_and_of_a_sharded_optimizer,
    graphs_of_several_optimizers_are_the_eager_steps,
    graphs_equal_one_process,
    captured_shares_may_differ_in_shape,
    ddp_takes_the_gradients_of_cuda_graphs,
    a_capture_that_fails_on_one_rank_is_none_on_all,
]
gloo, test_on_cpus = in_processes(CPU_CASES, "gloo")
nccl, test_on_gpus = in_processes(GPU_CASES, "nccl")
