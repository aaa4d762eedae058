"""FSDP2: steps of processes that have parts of a model are those of one that has all of it."""

import os
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import without_launches
from ranks import (
    RANKS,
    assert_close,
    build,
    draw,
    in_processes,
    sgd,
    take,
    uneven,
    whole,
)
from test_graphed_loss import emulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import adamw

from shtx import HierarchicalTransformer, TrainStep
from shtx.fsdp import fully_shard_model
from shtx.muon import Muon
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer
from shtx.ops import why_not_fused
from shtx.plan import is_sharded


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


def muon_takes_whole_matrices(rank):
    model = shard(build())
    with pytest.raises(ValueError, match="params must be whole, got one of which this process has"):
        Muon([model.layers[0][0].ff.net[1].weight])


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


# on GPUs


def fsdp_steps_on_gpus_equal_those_of_one_process(rank):
    options = dict(accumulate=2, cuda_graph=False)
    numbers, gradient = take(shard(build().cuda()), uneven(rank).cuda(), **options)
    alone = take(build().cuda(), whole().cuda(), process_group=False, cuda_graph=False)
    torch.testing.assert_close(numbers, alone[0], rtol=1e-5, atol=0)
    assert (gradient - alone[1]).norm() <= 1e-5 * alone[1].norm()


def full_sharding_trains_on_gpus(rank):
    full_sharding_trains_in_bf16(rank, "cuda")


CPU_CASES = [
    fsdp_trains_and_generates,
    fsdp_of_parts_alone,
    a_model_on_meta_gets_the_weights_of_its_seed,
    full_sharding_steps_as_one_process,
    full_sharding_trains_in_bf16,
    what_cannot_be_sharded_is_refused,
    muon_takes_whole_matrices,
    graphs_are_refused_under_fsdp,
    fsdp_steps_equal_those_of_one_process,
    fsdp_compiles_ahead_without_a_trace,
    fsdp_may_have_gone_forward_before,
]
GPU_CASES = [
    fsdp_steps_on_gpus_equal_those_of_one_process,
    full_sharding_trains_on_gpus,
]
gloo, test_on_cpus = in_processes(CPU_CASES, "gloo")
nccl, test_on_gpus = in_processes(GPU_CASES, "nccl")
