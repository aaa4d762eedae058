"""Steps of two processes together are those of one process on the whole batch.

RANKS=8 in the environment starts eight in their place.
"""

import json
import os
import traceback
import warnings
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import without_a_gpu, without_launches
from test_graphed_loss import emulate
from test_muon import both
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from training import OPTIONS, adamw, replay_a_step

from shtx import HierarchicalTransformer, TrainStep, parallel
from shtx.fsdp import fully_shard_model
from shtx.graphs import NEVER, Graphs, Structure
from shtx.muon import Muon
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer
from shtx.ops import why_not_fused
from shtx.parallel import Replicas, Summing
from shtx.plan import is_sharded
from shtx.train_step import MAX_GRAPHS

RANKS = int(os.environ.get("RANKS", 2))


def build(seed=0, kind=HierarchicalTransformer, **options):
    torch.manual_seed(seed)
    return kind(**OPTIONS | options)


def draw(rank, batch=2):
    return torch.randint(1, 31, (batch, 17), generator=torch.Generator().manual_seed(rank))


def uneven(rank, batch=4):
    """Return ids of which hardly a label counts on the first rank."""
    ids = draw(rank, batch)
    if rank == 0:
        ids[:, 3:] = 0
    return ids


def whole(share=uneven):
    return torch.cat([share(rank) for rank in range(RANKS)])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def take(model, ids, labels=None, **options):
    """One step, and what it made: loss, parts, norm and gradients."""
    optimizer, gradients = sgd(model), []

    def read(*_):
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in trained]
        gradients.extend(grad.flatten() for grad in grads)

    optimizer.register_step_pre_hook(read)
    step = TrainStep(model, optimizer, **dict(precision="fp32", grad_clip=0.1) | options)
    loss, parts = step(ids, labels)
    numbers = torch.stack((loss, *tree_leaves(parts), step.grad_norm))
    return numbers, torch.cat(gradients)


def assert_close(ours, theirs):
    (numbers, gradient), (expected_numbers, expected) = ours, theirs
    torch.testing.assert_close(numbers, expected_numbers, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def agree(model):
    """Return whether all ranks have the same weights, to the bit."""
    mine = weights_of(model)
    of_all = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(of_all, mine)
    return all(torch.equal(mine, theirs) for theirs in of_all)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# the work of the processes, each with its rank


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


def muon_takes_whole_matrices(rank):
    model = shard(build())
    with pytest.raises(ValueError, match="params must be whole, got one of which this process has"):
        Muon([model.layers[0][0].ff.net[1].weight])


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


def shard(model):
    mesh = init_device_mesh(model.device.type, (RANKS,))
    for layer in model.layers:
        for block in layer:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_trains_and_generates(rank):
    alone, model = build(), shard(build())
    prompt = draw(9)
    tokens = model.generate(prompt, 3, temperature=0)  # upstream: mixed torch.Tensor and DTensor
    assert torch.equal(tokens, alone.generate(prompt, 3, temperature=0))
    model(draw(rank), return_loss=True)[0].backward()
    sum(alone(draw(r), return_loss=True)[0] for r in range(RANKS)).div(RANKS).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-7)


LEAVES = {
    "the embedding": lambda model: [model.token_emb],
    "the head": lambda model: [model.to_logits],
    "each linear": lambda model: [m for m in model.modules() if type(m) is nn.Linear],
    "each convolution": lambda model: [m for m in model.modules() if type(m) is nn.Conv1d],
    "attention": lambda model: [block.attn for layer in model.layers for block in layer],
    "feed-forward": lambda model: [block.ff for layer in model.layers for block in layer],
    "merges": lambda model: [*model.hierarchical_merges],
}


def fsdp_of_parts_alone(rank):
    """Each kind of part by itself, and what is around it whole; then all of them, and the rest
    fused.
    """
    alone = build()
    sum(alone(draw(r), return_loss=True)[0] for r in range(RANKS)).div(RANKS).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    expected_loss, _ = alone(draw(rank), return_loss=True)
    prompt = draw(9)
    expected_tokens = alone.generate(prompt, 2, temperature=0)
    mesh = init_device_mesh("cpu", (RANKS,))
    everything = lambda model: dict.fromkeys(p for parts in LEAVES.values() for p in parts(model))
    cases = [(*leaf, "reference") for leaf in LEAVES.items()]
    if "TRITON_INTERPRET" in os.environ:
        cases.append(("everything", everything, "fused"))
    for name, parts, impl in cases:
        model = build(impl=impl)
        for part in parts(model):
            fully_shard(part, mesh=mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is sharded by itself runs by itself
            if impl == "reference":
                tokens = model.generate(prompt, 2, temperature=0)
                assert torch.equal(tokens, expected_tokens), name
            loss, _ = model(draw(rank), return_loss=True)
            loss.backward()
        tell = lambda text, name=name: f"{name}: {text}"
        torch.testing.assert_close(loss, expected_loss, msg=tell)
        assert any(map(is_sharded, model.parameters())), name
        for parameter, p in model.named_parameters():
            tell = lambda text, where=f"{name}, {parameter}": f"{where}: {text}"
            grad = p.grad.full_tensor() if is_sharded(p) else p.grad
            if grad is p.grad:  # FSDP reduces what it has sharded, and nothing else
                dist.all_reduce(grad)
                grad /= RANKS
            torch.testing.assert_close(grad, expected[parameter], rtol=1e-5, atol=1e-7, msg=tell)


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


def a_model_on_meta_gets_the_weights_of_its_seed(rank):
    options = dict(depth=2, dim=(18, 7))  # parts of unequal size
    for kind in (HierarchicalTransformer, NextLatentTransformer):
        alone = build(kind=kind, **options)
        with torch.device("meta"):
            model = build(kind=kind, **options)
        torch.manual_seed(0)
        assert fully_shard_model(model) is model and all(map(is_sharded, model.parameters()))
        expected = {**alone.state_dict(), **dict(alone.named_buffers())}
        found = {**model.state_dict(), **dict(model.named_buffers())}
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            whole = tensor.full_tensor() if is_sharded(tensor) else tensor
            assert torch.equal(whole, expected[name]), name


def test_full_sharding_without_processes_says_how_they_begin():
    with pytest.raises(ValueError, match=r"init_process_group\(\) first \(torchrun starts"):
        fully_shard_model(build())


def full_sharding_steps_as_one_process(rank):
    alone = take(build(depth=2), whole(), process_group=False)
    for options in (
        dict(),
        dict(prefetch=0),
        dict(prefetch=3, reshard_after_forward=False),
        dict(mesh=init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("copies", "parts"))),
    ):
        for checkpointing, accumulate in ((False, 1), (True, 2)):
            model = fully_shard_model(build(depth=2), **options)
            if options.get("reshard_after_forward", True):
                with torch.no_grad():
                    model(draw(rank))
                assert all(map(is_sharded, model.parameters()))
            model.checkpointing = checkpointing
            assert_close(take(model, uneven(rank), accumulate=accumulate), alone)


def full_sharding_trains_in_bf16(rank, device="cpu"):
    """Three steps of weights that are gathered in bf16, as close as those of bf16-mixed."""
    losses = []
    for shard_it in (
        lambda model: fully_shard_model(model, param_dtype=torch.bfloat16),
        fully_shard_model,
    ):
        model = shard_it(build().to(device))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        model.checkpointing = device == "cuda"
        options = dict(precision="bf16-mixed", grad_clip=0.5, cuda_graph=False)
        step = TrainStep(model, adamw(model), **options)
        losses.append(torch.stack([step(uneven(rank).to(device))[0] for _ in range(3)]))
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)


def what_cannot_be_sharded_is_refused(rank):
    def refused(error, message, model, **options):
        with pytest.raises(error, match=message):
            fully_shard_model(model, **options)

    refused(TypeError, "model must be a HierarchicalTransformer, got Linear", nn.Linear(2, 2))
    refused(ValueError, "model must not be sharded yet, got .* that is", shard(build()))
    refused(ValueError, "param_dtype must be .* got torch.float16", build(), param_dtype=torch.half)
    refused(ValueError, "prefetch must be at least 0, got -1", build(), prefetch=-1)
    partly = build()
    partly.to_logits = partly.to_logits.to("meta")
    refused(ValueError, "model must be on meta as a whole .* got to_logits.weight", partly)


def graphs_are_refused_under_fsdp(rank):
    model = shard(build())
    model.graphs = True
    with pytest.MonkeyPatch.context() as patched:
        emulate(patched)
        for _ in range(2):
            with pytest.raises(ValueError, match="model.graphs must be False under FSDP"):
                model(draw(rank), return_loss=True)


def fsdp_steps_equal_those_of_one_process(rank):
    for accumulate in (1, 2):
        ours = take(shard(build()), uneven(rank), accumulate=accumulate)
        assert_close(ours, take(build(), whole(), process_group=False))


def fsdp_may_have_gone_forward_before(rank):
    model = shard(build())
    optimizer = adamw(model)
    with torch.no_grad():
        model(draw(rank))  # which leaves what its parts left whole
    assert not is_sharded(model.token_emb.weight)
    TrainStep(model, optimizer, precision="fp32")(draw(rank))
    assert is_sharded(model.token_emb.weight)


# tests on GPUs


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


def fsdp_steps_on_gpus_equal_those_of_one_process(rank):
    options = dict(accumulate=2, cuda_graph=False)
    numbers, gradient = take(shard(build().cuda()), uneven(rank).cuda(), **options)
    alone = take(build().cuda(), whole().cuda(), process_group=False, cuda_graph=False)
    torch.testing.assert_close(numbers, alone[0], rtol=1e-5, atol=0)
    assert (gradient - alone[1]).norm() <= 1e-5 * alone[1].norm()


def full_sharding_trains_on_gpus(rank):
    full_sharding_trains_in_bf16(rank, "cuda")


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


def fsdp_compiles_ahead_without_a_trace(rank):
    if why_not_fused(torch.device("cpu")):
        return
    results = []
    for ahead in (without_launches, lambda function: None):
        model = shard(build(impl="fused"))
        step = TrainStep(model, sgd(model), precision="fp32")
        with patch("shtx.train_step.compile_ahead", ahead):
            step.compile(draw(rank, 1))
        assert all(p.grad is None for p in model.parameters())
        loss, _ = step(draw(rank, 1))
        results.append([loss, *(p.full_tensor() for p in model.parameters())])
    assert all(map(torch.equal, *results))


CPU_CASES = [
    steps_equal_those_of_one_process,
    shares_may_be_of_unequal_size,
    ranks_agree_to_the_bit,
    an_optimizer_may_be_sharded,
    several_optimizers_may_be_sharded,
    muon_takes_whole_matrices,
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
    fsdp_trains_and_generates,
    fsdp_of_parts_alone,
    a_model_on_meta_gets_the_weights_of_its_seed,
    full_sharding_steps_as_one_process,
    full_sharding_trains_in_bf16,
    what_cannot_be_sharded_is_refused,
    ddp_takes_the_gradients_of_graphs,
    graphs_are_refused_under_fsdp,
    fsdp_steps_equal_those_of_one_process,
    fsdp_compiles_ahead_without_a_trace,
    fsdp_may_have_gone_forward_before,
]
GPU_CASES = [
    graphs_are_the_eager_steps,
    graphs_are_those_of_ddp_and_of_a_sharded_optimizer,
    graphs_of_several_optimizers_are_the_eager_steps,
    graphs_equal_one_process,
    captured_shares_may_differ_in_shape,
    ddp_takes_the_gradients_of_cuda_graphs,
    fsdp_steps_on_gpus_equal_those_of_one_process,
    full_sharding_trains_on_gpus,
    a_capture_that_fails_on_one_rank_is_none_on_all,
]


def work(rank, folder, backend, cases):
    """Run all cases, down to one that fails on some rank; write what they came to."""
    torch.set_num_threads(1)
    parallel.BUCKET, parallel.PACKED = 2048, 256  # several buckets even here
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group(backend, rendezvous, limit, RANKS, rank)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    for case in cases:
        try:
            torch.manual_seed(0)
            case(rank)
            dist.barrier()  # none leaves while the other is at work
            result = None
        except Exception:
            result = traceback.format_exc()
        (folder / f"{case.__name__}.{rank}").write_text(json.dumps(result))
        if result is not None:
            os._exit(1)  # so that the other rank does not wait
    dist.destroy_process_group()


def spawn(folder, backend, cases):
    processes = mp.spawn(work, (folder, backend, cases), RANKS, join=False).processes
    for process in processes:
        process.join()
    return folder


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory):
    return spawn(tmp_path_factory.mktemp("cpus"), "gloo", CPU_CASES)


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    return spawn(tmp_path_factory.mktemp("gpus"), "nccl", GPU_CASES)


def assert_passed(case, results):
    for rank in range(RANKS):
        path = results / f"{case.__name__}.{rank}"
        assert path.exists(), "another case failed before"
        assert (error := json.loads(path.read_text())) is None, f"rank {rank}: {error}"


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.__name__)
def test_on_cpus(case, on_cpus):
    assert_passed(case, on_cpus)


@pytest.mark.gpu  # NCCL
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs a GPU for each process")
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.__name__)
def test_on_gpus(case, on_gpus):
    assert_passed(case, on_gpus)
