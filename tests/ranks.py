"""Steps in several processes side by side: two, or as RANKS in the environment says.

Processes take seconds to start, so those of a page share all of its cases: functions that every
process calls with its rank, and that raise where something is wrong.
"""

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._pytree import tree_leaves
from training import OPTIONS

from shtx import HierarchicalTransformer, TrainStep, parallel

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


# the processes


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


def assert_passed(case, folder):
    for rank in range(RANKS):
        path = folder / f"{case.__name__}.{rank}"
        assert path.exists(), "another case failed before"
        assert (error := json.loads(path.read_text())) is None, f"rank {rank}: {error}"


def in_processes(cases: list[Callable], backend: str):
    """Return what a page needs to test its cases: a fixture, which starts the processes, and a test
    of each case. NCCL takes a GPU for each process.
    """

    @pytest.fixture(scope="module", name=backend)
    def folder(tmp_path_factory):
        return spawn(tmp_path_factory.mktemp(backend), backend, cases)

    @pytest.mark.parametrize("case", cases, ids=lambda case: case.__name__)
    def test(case, request):
        assert_passed(case, request.getfixturevalue(backend))

    if backend == "nccl":
        enough = torch.cuda.device_count() >= RANKS
        test = pytest.mark.skipif(not enough, reason="needs a GPU for each process")(test)
        test = pytest.mark.gpu(test)  # NCCL
    return folder, test
