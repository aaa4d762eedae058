"""What N-GPU steps of TrainStep cost, by the way gradients are summed. Run from the root of a tree:

    python probe_sums.py --gpus 2 --config A [--clip] [--variants alone now none ...]

Each variant runs in processes of its own; a variant that cannot run prints its error and the next
one begins. A row: median step in ms of the slowest rank, of the fastest rank, peak GiB, a number
made of all weights after the steps (equal numbers mean equal bits, nearly surely), and whether
ranks have the same weights.
"""

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import shapes
from shtx import HierarchicalTransformer, TrainStep, parallel
from shtx.graphs import Graphs
from shtx.parallel import Summing

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
VARIANTS = {
    "alone": "every GPU by itself, at the same time (process_group=False)",
    "now": "all-reduce of buckets, fp32",
    "none": "all of it but the sums",
    "legacy": "now, NCCL_LEGACY_CUDA_REGISTER=1: NCCL may read gradients where they are",
    "pool": "now, graphs in memory that NCCL has allocated and registered",
    "pool_once": "the same, registered as it is allocated",
    "single": "now, a call a tensor in place of one a bucket",
    "symm": "single, graphs in memory registered as symmetric windows (NCCL 2.27 on)",
    "two_shot": "copies into symmetric memory, torch's two_shot_all_reduce_",
    "bf16": "rounded to bf16, summed by NCCL in bf16, widened",
    "shard": "shard_optimizer",
    "shard_grouped": "shard_optimizer, the sums of a bucket in one launch",
    "shard_before": "shard_optimizer, sums on all ranks (as before that branch)",
}
ENV = {"legacy": {"NCCL_LEGACY_CUDA_REGISTER": "1"}}


class Done:
    def __init__(self, wait):
        self.wait = wait


def all_at_once(group, gradients, bucket):
    return group.allreduce_coalesced(gradients)


def none(group, gradients, bucket):
    return Done(lambda: None)


def single(group, gradients, bucket):
    works = [dist.all_reduce(g, group=group, async_op=True) for g in gradients]
    return Done(lambda: [work.wait() for work in works])


def bf16(group, gradients, bucket):
    halves = [torch.empty_like(g, dtype=torch.bfloat16) for g in gradients]
    torch._foreach_copy_(halves, gradients)
    work = group.allreduce_coalesced(halves)
    return Done(lambda: (work.wait(), torch._foreach_copy_(gradients, halves)))


buffers = {}  # of two_shot, by bucket
side = None


def two_shot(group, gradients, bucket):
    import torch.distributed._symmetric_memory as symm_mem

    global side
    side = side or torch.cuda.Stream()
    sizes = [-(-g.numel() // 64) * 64 for g in gradients]
    if bucket not in buffers:
        size = -(-sum(sizes) // 1024) * 1024
        buffer = symm_mem.empty(size, dtype=torch.float32, device=gradients[0].device)
        symm_mem.rendezvous(buffer, group.group_name)
        buffers[bucket] = buffer.zero_()
    parts, begin = [], 0
    for g, size in zip(gradients, sizes, strict=True):
        parts.append(buffers[bucket][begin : begin + g.numel()].view(g.shape))
        begin += size
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch._foreach_copy_(parts, gradients)
        torch.ops.symm_mem.two_shot_all_reduce_(buffers[bucket], "sum", group.group_name)
    kept = list(gradients)  # until the copies are over
    gradients[:] = parts

    def wait():
        torch.cuda.current_stream().wait_stream(side)
        kept.clear()

    return Done(wait)


def start_by(reduce):
    """Summing.start, with another way to sum."""

    def start(self):
        number = self.started
        bucket = self.replicas.buckets[number]
        self.started += 1
        for p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        small = [p for p in bucket if p.grad.nbytes < parallel.PACKED]
        large = [p for p in bucket if p.grad.nbytes >= parallel.PACKED]
        for p in large:
            if parallel._is_shared(p.grad):
                p.grad = p.grad.clone()
        gradients = [p.grad for p in large]
        if small:
            gradients.append(torch.cat([p.grad.flatten() for p in small]))
        work = reduce(self.replicas.group, gradients, number)
        for p, g in zip(large, gradients):
            p.grad = g
        if small:
            for p, part in zip(small, gradients[-1].split([p.numel() for p in small])):
                p.grad = part.view(p.shape)
        self.work.append(work)

    return start


def grouped(start):
    """Have NCCL launch all sums of a bucket together."""

    def together(self):
        group, device = self.replicas.group, torch.device("cuda", torch.cuda.current_device())
        before, self.work = self.work, []
        group._start_coalescing(device)
        start(self)
        work = group._end_coalescing(device)
        self.work = [*before, work]

    return together


def registered_graphs(twice=True, **options):
    """Graphs whose memory NCCL knows: a first capture allocates it, a second one uses it; or, not
    twice, it is registered as it is allocated.
    """
    capture = Graphs.capture

    def captured(self, function):
        if not hasattr(self, "memory"):
            backend = dist.group.WORLD._get_backend(torch.device("cuda"))
            self.memory = torch.cuda.MemPool(backend.mem_allocator)
            self.pool = self.memory.id
            if twice:
                first = capture(self, function)
                torch.cuda.synchronize()
                del first
                gc.collect()
            dist.barrier()
            backend.register_mem_pool(self.memory, **options)
            torch.cuda.synchronize()
        return capture(self, function)

    Graphs.capture = captured


def prepare(variant):
    ways = dict(none=none, single=single, symm=single, bf16=bf16, two_shot=two_shot)
    if variant in ways:
        Summing.start = start_by(ways[variant])
    if variant == "shard_grouped":
        Summing.start = grouped(Summing.start)
    if variant == "shard_before":
        Summing.start = start_by(all_at_once)
    if variant == "pool":
        registered_graphs()
    if variant == "pool_once":
        registered_graphs(twice=False)
    if variant == "symm":
        registered_graphs(symm=True)


def work(rank, args, rendezvous):
    if CUDA:
        torch.cuda.set_device(rank)
    backend = "nccl" if CUDA else "gloo"
    dist.init_process_group(backend, rendezvous, world_size=args.gpus, rank=rank)
    prepare(args.variant)
    config = shapes.configs(DEVICE)[args.config]
    torch.manual_seed(0)
    model = HierarchicalTransformer(**config.model, impl="auto").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    options = dict(shard_optimizer=args.variant.startswith("shard"))
    if args.variant == "alone":
        options = dict(process_group=False)
    step = TrainStep(model, optimizer, grad_clip=0.5 if args.clip else None, **options)
    torch.manual_seed(1 + rank)
    size = config.batch, config.model["seq_len"] + 1
    ids = torch.randint(1, config.model["num_tokens"], size, device=DEVICE)
    if CUDA:
        mark = lambda: (event := torch.cuda.Event(enable_timing=True), event.record())[0]
        between = lambda a, b: a.elapsed_time(b)
        synchronize = torch.cuda.synchronize
    else:
        from time import perf_counter as mark

        between, synchronize = (lambda a, b: 1e3 * (b - a)), (lambda: None)
    for _ in range(args.warmup):
        step(ids)
    synchronize()
    dist.barrier()
    marks = [mark()]
    for _ in range(args.steps):
        step(ids)
        marks.append(mark())
    synchronize()
    if CUDA and not (step._graphs and any(hasattr(k, "graph") for k in step._graphs.kept.values())):
        raise RuntimeError("there is no CUDA graph")
    ms = median(between(*pair) for pair in pairwise(marks))
    number = sum(p.detach().double().abs().sum() for p in model.parameters())
    mine = torch.tensor([ms, -ms, float(number), -float(number)], dtype=torch.float64)
    mine = mine.to(DEVICE)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    slow, fast, most, least = mine.tolist()
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
        same = most == -least
        print(
            f"{args.config} x{args.gpus} clip={args.clip} {args.variant:14} {slow:8.3f} ms"
            f" (fastest rank {-fast:8.3f}) {peak:6.2f} GiB {most!r} ranks same: {same}",
            flush=True,
        )
    step.close()
    dist.barrier()
    os._exit(0)  # registered memory and captured NCCL calls need no order in which they end


def guarded(rank, *args):
    try:
        work(rank, *args)
    except BaseException:
        if rank == 0:
            print(f"{args[0].variant}: {traceback.format_exc().strip().splitlines()[-1]}")
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--config", default="A")
    parser.add_argument("--clip", action="store_true")
    parser.add_argument("--steps", type=int, default=40 if CUDA else 3)
    parser.add_argument("--warmup", type=int, default=10 if CUDA else 1)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--variant")
    args = parser.parse_args()
    if args.variant is None:
        for variant in args.variants:
            own = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            env = os.environ | ENV.get(variant, {})
            process = subprocess.Popen(own, env=env, start_new_session=True)
            try:
                process.wait(args.seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                print(f"{variant}: took more than {args.seconds} s", flush=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(guarded, (args, f"file://{folder}/rendezvous"), args.gpus)
