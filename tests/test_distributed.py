"""Two processes on CPUs: DistributedDataParallel and FSDP2 around the model."""

import os
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import OPTIONS

from shtx import HierarchicalTransformer, TrainStep
from shtx.plan import is_sharded

RANKS = 2


def build(**options):
    torch.manual_seed(0)
    return HierarchicalTransformer(**OPTIONS | options)


def draw(rank):
    return torch.randint(1, 31, (2, 17), generator=torch.Generator().manual_seed(rank))


def gradients_of_both_ranks(**options):
    """The mean gradient that one process has for both ranks' batches."""
    model = build(**options)
    sum(model(draw(rank), return_loss=True)[0] for rank in range(RANKS)).div(RANKS).backward()
    return model, {name: p.grad for name, p in model.named_parameters()}


def ddp_without_auxiliary_losses(rank):
    off = dict(recon_loss_weight=0.0, hierarchical_ar_loss_weight=0.0)
    model = DistributedDataParallel(build(**off))
    for _ in range(2):  # the second forward is the one that finds unfinished reductions
        model.zero_grad()
        model(draw(rank), return_loss=True)[0].backward()
    _, expected = gradients_of_both_ranks(**off)
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-7)


def fsdp_trains_and_generates(rank):
    alone, expected = gradients_of_both_ranks()
    model = build()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        for block in layer:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    prompt = draw(9)
    tokens = model.generate(prompt, 3, temperature=0)  # upstream: mixed torch.Tensor and DTensor
    assert torch.equal(tokens, alone.generate(prompt, 3, temperature=0))
    model(draw(rank), return_loss=True)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-5, atol=1e-7)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = TrainStep(model, optimizer, precision="fp32", grad_clip=1e9, accumulate=2)
    step(draw(rank))
    for name, p in alone.named_parameters():
        p.data -= 0.5 * expected[name]
    for name, p in model.named_parameters():
        stepped = alone.get_parameter(name)
        torch.testing.assert_close(p.full_tensor(), stepped, rtol=1e-5, atol=1e-6)


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
    alone, expected = gradients_of_both_ranks()
    expected_loss, _ = alone(draw(rank), return_loss=True)
    prompt = draw(9)
    expected_tokens = alone.generate(prompt, 2, temperature=0)
    mesh = init_device_mesh("cpu", (RANKS,))
    everything = lambda model: dict.fromkeys(p for parts in LEAVES.values() for p in parts(model))
    cases = [(*leaf, "reference") for leaf in LEAVES.items()]
    for name, parts, impl in [*cases, ("everything", everything, "fused")]:
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


CASES = ddp_without_auxiliary_losses, fsdp_trains_and_generates, fsdp_of_parts_alone


def worker(rank, rendezvous):
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for case in CASES:
        case(rank)
        dist.barrier()  # none leaves while the other is at work
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """All cases in one pair, which takes longer to start than they to run."""
    mp.spawn(worker, (tmp_path / "rendezvous",), RANKS)
