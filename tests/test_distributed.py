"""Two processes on CPUs: DistributedDataParallel and FSDP2 around the model."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import OPTIONS

from shtx import HierarchicalTransformer, TrainStep

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


def worker(rank, case, rendezvous):
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    case(rank)
    dist.barrier()  # none leaves while the other is at work
    dist.destroy_process_group()


def test_ddp_without_auxiliary_losses(tmp_path):
    mp.spawn(worker, (ddp_without_auxiliary_losses, tmp_path / "rendezvous"), RANKS)


def test_fsdp_trains_and_generates(tmp_path):
    mp.spawn(worker, (fsdp_trains_and_generates, tmp_path / "rendezvous"), RANKS)
