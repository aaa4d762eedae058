"""A step of several processes together: what each of them sums with the others, and when.

Replicas have a copy of the model each, and a share of the batch. Gradients are summed a bucket at a
time while the backward goes on: a bucket starts when the last of its gradients is there and all
buckets before it have started, so that every rank starts them in the same order, whatever part of
the model it left out. Gradients are summed where they lie; small ones are put side by side before.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from shtx.internals import communication_hooks, count_holders, storage_of
from shtx.plan import is_sharded

# bytes of gradients; on two H200s buckets of 64 MB were fastest, of 8 MB to one for all
BUCKET = 64 << 20  # a bucket is full
PACKED = 1 << 20  # below this, a gradient is put side by side with others


class Alone:
    """One process, which has nothing to sum.

    Attributes:
        why_not_captured: what keeps a step out of a CUDA graph; None if nothing does.
    """

    why_not_captured: str | None = None

    def together(self, settings: Callable[[], dict]) -> AbstractContextManager:
        """Return a context in which a failure on one rank, or other settings, raises on all.

        Args:
            settings: returns those of this rank, by name.
        """
        return nullcontext()

    def same(self, value: Hashable) -> bool:
        """Return whether a value, of numbers, is the same on all ranks; waits for them."""
        return True

    def copy_first(self) -> None:
        """Make all copies of the model those of the first rank."""

    def sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor, in place, over all ranks; the result waits for it."""
        return lambda: tensor

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; those of all ranks are in after the last one."""
        loss.backward()


class Shards(Alone):
    """The ranks of a model under FSDP2, which sums gradients itself, and divides them."""

    why_not_captured = "the model is sharded"

    def __init__(self, model: Module):
        self.modules = [m for m in model.modules() if hasattr(m, "set_requires_gradient_sync")]
        for module in self.modules:
            module.reshard()  # after a forward the outermost one is whole
        parameters = dict(model.named_parameters())
        whole = [name for name, p in parameters.items() if not is_sharded(p)]
        if whole:
            raise ValueError(
                f"fully_shard must shard all parameters of a model or none, got {len(whole)} that"
                f" are whole: {whole[0]}; fully_shard(model) takes those that its parts left"
            )
        mesh = next(iter(parameters.values())).device_mesh
        self.groups, self.size = mesh.get_all_groups(), mesh.size()

    def sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        for group in self.groups:
            dist.all_reduce(tensor, group=group)
        return lambda: tensor

    def backward(self, loss: Tensor, last: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(last, recurse=False)
        (loss * self.size).backward()


class Replicas(Alone):
    """The ranks of a group, with a copy of the model each.

    Args:
        model: the copy of this process.
        group: of more than one.

    Attributes:
        owner: the rank that alone gets the sum of a parameter's gradient; all get those of others.
    """

    def __init__(self, model: Module, group: "dist.ProcessGroup"):
        self.model, self.ranks = model, dist.get_process_group_ranks(group)
        self.owner: dict[Parameter, int] = {}
        gloo = dict(backend="gloo", use_local_synchronization=True)
        is_gloo = dist.get_backend(group) == "gloo"
        hosts = group if is_gloo else dist.new_group(self.ranks, **gloo)
        # the last owner of a group of Gloo's ends it with Python's lock held, waiting for a thread
        # that may wait for the lock: that must not be this object
        self._groups = weakref.ref(group), weakref.ref(hosts)
        self.trained = []  # in the order of the model, when buckets were last made of them
        self.buckets: list[list[Parameter]] = []
        self.bucket_of: dict[Parameter, int] = {}

    @property
    def group(self) -> "dist.ProcessGroup":
        return self._groups[0]()

    @property
    def hosts(self) -> "dist.ProcessGroup":
        """The group of the same ranks for tensors in the memory of their hosts."""
        return self._groups[1]()

    @property
    def why_not_captured(self) -> str | None:
        backends = dist.get_backend_config(self.group)
        return None if "cuda:nccl" in backends else f"the process group is of {backends}"

    @contextmanager
    def together(self, settings: Callable[[], dict]) -> Iterator[None]:
        error, mine = None, {}
        try:
            yield
            mine = settings()
        except Exception as raised:
            error = raised
        told = None if error is None else f"{type(error).__name__}: {error}"
        told_by_all = self.gather((mine, told))
        if error is not None:
            raise error
        for rank, (_, told) in zip(self.ranks, told_by_all, strict=True):
            if told is not None:
                raise RuntimeError(f"rank {rank} failed: {told}")
        first, _ = told_by_all[0]
        for rank, (theirs, _) in zip(self.ranks, told_by_all, strict=True):
            for name in first | theirs:
                if (a := first.get(name)) != (b := theirs.get(name)):
                    raise ValueError(
                        f"{name} must be the same on all ranks,"
                        f" got {a} on rank {self.ranks[0]} and {b} on rank {rank}"
                    )

    def gather(self, value: object) -> list:
        """The values of all ranks; waits for them."""
        values = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def same(self, value: Hashable) -> bool:
        number = hash(value)
        most = torch.tensor([number, -number])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.hosts)
        return bool(most[0] == -most[1])

    @torch.no_grad()
    def copy_first(self) -> None:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            copy = tensor.contiguous()
            dist.broadcast(copy, group=self.group, group_src=0)
            tensor.copy_(copy)

    def sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return lambda: (work.wait(), tensor)[1]

    def backward(self, loss: Tensor, last: bool) -> None:
        if not last:
            return loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if list(map(id, trained)) != list(map(id, self.trained)):
            self.trained, self.buckets, self.bucket_of = trained, [], {}
        summing = Summing(self)
        handles = [p.register_post_accumulate_grad_hook(summing.ready) for p in trained]
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        summing.end()

    def add_buckets(self, parameters: Iterable[Parameter]) -> None:
        size = BUCKET
        for p in parameters:
            if size >= BUCKET:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            self.bucket_of[p] = len(self.buckets) - 1
            size += p.nbytes


class Summing:
    """Sums the gradients of one backward."""

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.missing = list(map(set, replicas.buckets))
        self.started = 0  # buckets
        self.late = []  # parameters without a bucket, in the order of their gradients
        self.work = []

    def ready(self, p: Parameter) -> None:
        """Note that a gradient is there. It is a hook of its parameter."""
        bucket = self.replicas.bucket_of.get(p)
        if bucket is None:
            self.late.append(p)
            return
        if p not in self.missing[bucket]:
            raise RuntimeError(
                "a parameter got a gradient twice in one backward, as under"
                " checkpoint(use_reentrant=True), which processes cannot sum meanwhile"
            )
        self.missing[bucket].remove(p)
        while self.started < len(self.missing) and not self.missing[self.started]:
            self.start()

    def start(self) -> None:
        """Start the next bucket."""
        bucket = self.replicas.buckets[self.started]
        self.started += 1
        for p in bucket:
            if p.grad is None:  # another rank may have one
                p.grad = torch.zeros_like(p)
        small = [p for p in bucket if p.grad.nbytes < PACKED]
        large = [p for p in bucket if p.grad.nbytes >= PACKED]
        gradients, group, owner = [], self.replicas.group, self.replicas.owner
        for p in large:
            if _is_shared(p.grad):
                p.grad = p.grad.clone()
            if p in owner:
                to_owner = dict(group=group, group_dst=owner[p], async_op=True)
                self.work.append(dist.reduce(p.grad, **to_owner))
            else:
                gradients.append(p.grad)
        if small:
            side_by_side = torch.cat([p.grad.flatten() for p in small])
            for p, part in zip(small, side_by_side.split([p.numel() for p in small]), strict=True):
                p.grad = part.view(p.shape)
            gradients.append(side_by_side)
        if gradients:
            self.work.append(group.allreduce_coalesced(gradients))

    def end(self) -> None:
        """Start what has not been, and wait for all."""
        while self.started < len(self.replicas.buckets):
            self.start()
        self.add_late()
        for work in self.work:
            work.wait()
        rank = self.replicas.group.rank()
        for p, owner in self.replicas.owner.items():
            if owner != rank:  # it is no sum, or another rank has it
                p.grad = None

    def add_late(self) -> None:
        """Give parameters that got their first gradients their buckets: on each rank those of all.

        In the first backward these are all of them, in the order of the first rank.
        """
        replicas = self.replicas
        trained, bucket_of = replicas.trained, replicas.bucket_of
        if len(bucket_of) == len(trained):
            return
        earlier = [p for p in trained if p.grad is not None and p not in bucket_of]
        late = list(dict.fromkeys([*self.late, *earlier]))
        if trained[0].is_cuda and torch.cuda.is_current_stream_capturing():
            if late:
                raise RuntimeError(f"{len(late)} parameters got gradients that had none before")
            return
        index = {p: i for i, p in enumerate(trained)}
        of_all = replicas.gather([index[p] for p in late])
        replicas.add_buckets(trained[i] for i in dict.fromkeys(chain(*of_all)))
        while self.started < len(replicas.buckets):
            self.start()


def _is_shared(tensor: Tensor) -> bool:
    """Return whether something else may read the memory of a gradient while it is summed."""
    return count_holders(storage_of(tensor)) > 2


class Taken:
    """Stands where DistributedDataParallel had its reducer, whose hooks would sum gradients, too,
    and which holds on to nodes of the stream that it was made on, which no CUDA graph can take in.
    """

    def __getattr__(self, name):
        raise AttributeError(
            "TrainStep sums the gradients of this DistributedDataParallel model: for a backward of"
            " your own, wrap model.module anew"
        )


def ranks_of(model: Module, process_group: "dist.ProcessGroup | Literal[False] | None") -> Alone:
    """The ranks that step together: a group's; None: those that the model or PyTorch names."""
    if any(map(is_sharded, model.parameters())):
        if process_group is not None:
            raise ValueError(
                f"process_group must be None for a model that is sharded, got {process_group}"
            )
        return Shards(model)
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return Alone()
        process_group = getattr(model, "process_group", dist.group.WORLD)
    elif process_group is False:
        return Alone()
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a ProcessGroup that this process is in, None or False,"
            f" got {process_group!r}"
        )
    return Replicas(model, process_group) if process_group.size() > 1 else Alone()


def unwrap(model: Module) -> Module:
    """The module that DistributedDataParallel has wrapped; any other as it is.

    Raises:
        ValueError: TrainStep does not do what the wrapper does.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model must be sharded by fully_shard of torch.distributed.fsdp, got a"
                " FullyShardedDataParallel"
            )
        if isinstance(module, DistributedDataParallel) and module is not model:
            raise ValueError(
                "model must have DistributedDataParallel around all else, got one within"
                f" {type(model).__name__}: wrap or compile what is in it"
            )
    if not isinstance(model, DistributedDataParallel):
        return model
    parameters = dict(model.module.named_parameters())
    ignored = sorted(model.parameters_to_ignore & parameters.keys())
    more = dict(
        comm_hooks=communication_hooks(model),
        parameters_to_ignore=ignored,
        mixed_precision=model.mixed_precision,
    )
    for what, found in more.items():
        if found:
            raise ValueError(
                "model must be in a DistributedDataParallel that does nothing but to sum gradients,"
                f" got one with {what}: {found}"
            )
    return model.module


def take_over(model: Module) -> None:
    """Let DistributedDataParallel sum gradients no more."""
    if isinstance(model, DistributedDataParallel):
        model.reducer = model.logger = Taken()
