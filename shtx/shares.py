"""Optimizers of which each rank has a share: the state of some parameters, which it updates.

Every parameter belongs to one rank, the largest first to the rank that has least so far. Parameters
of a rank lie side by side in its row of one tensor, so that one call gathers what all have updated.
A gradient is summed where its parameter belongs, so that sums and what is gathered have as many
bytes together as sums on all ranks.
"""

from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from shtx.internals import norms_of
from shtx.optimizers import Optimizers
from shtx.parallel import Replicas

ALIGNED = 64  # elements: where the next parameter may begin


class Shares:
    """Takes the parameters of optimizers apart, and puts together what became of them.

    Args:
        optimizer: one or several, which keep the share of this rank, in the groups that they had;
            parameters move.
        replicas: who has a share; they sum gradients where these belong from then on.
    """

    def __init__(self, optimizer: Optimizers, replicas: Replicas):
        self.optimizer, self.replicas = optimizer, replicas
        self.rank, size = replicas.group.rank(), len(replicas.ranks)
        self.parameters = [list(group["params"]) for group in optimizer.param_groups]
        trained = [p for p in chain(*self.parameters) if p.requires_grad]
        self.owner, begins, filled = {}, {}, [0] * size
        for p in sorted(trained, key=torch.numel, reverse=True):
            owner = min(range(size), key=filled.__getitem__)
            self.owner[p], begins[p] = owner, filled[owner]
            filled[owner] += -(-p.numel() // ALIGNED) * ALIGNED
        replicas.owner = self.owner
        self.rows = trained[0].new_zeros(size, max(filled), requires_grad=False)
        for p, begin in begins.items():
            place = self.rows[self.owner[p], begin : begin + p.numel()].view(p.shape)
            p.data = place.copy_(p.detach())
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if self.owner.get(p) == self.rank]
        for state in optimizer.states:
            for p in self.owner.keys() & state.keys():
                if self.owner[p] != self.rank:
                    del state[p]

    def clip(self, parameters: list[Parameter], largest: float) -> Tensor:
        """Clip gradients that are where they belong, as clip_grad_norm_ does where all are; return
        the norm of all.

        Args:
            parameters: the model's.
            largest: norm.
        """
        # all ranks have a gradient that belongs to nobody: the first counts it
        own = [p for p in parameters if p.grad is not None]
        counted = [p for p in own if self.owner.get(p, 0) == self.rank]
        norms = norms_of([p.grad for p in counted]) if counted else []
        norm_of = dict(zip(counted, norms, strict=True))
        none = self.rows.new_zeros(())
        norms = torch.stack([norm_of.get(p, none) for p in parameters if p.requires_grad])
        dist.all_reduce(norms, group=self.replicas.group)
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(own, largest, norm)
        return norm

    def gather(self) -> None:
        """Fetch what the other ranks have updated."""
        # the name that it has from PyTorch 2.13 on
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(self.rows, self.rows[self.rank : self.rank + 1], group=self.replicas.group)

    def state_dict(self) -> dict | None:
        """The state of the whole optimizer, on the CPU of the first rank; None on the others."""
        own = self.optimizer.state_dict()
        to_cpu = lambda value: value.cpu() if isinstance(value, Tensor) else value
        state = {
            index: {name: to_cpu(value) for name, value in own["state"][i].items()}
            for i, index in enumerate(self._own_indices())
            if i in own["state"]
        }
        states = [None] * len(self.replicas.ranks) if self.rank == 0 else None
        dist.gather_object(state, states, group=self.replicas.hosts, group_dst=0)
        if states is None:
            return None
        begins = [0]
        for parameters in self.parameters:
            begins.append(begins[-1] + len(parameters))
        groups = [
            group | {"params": list(range(begins[i], begins[i + 1]))}
            for i, group in enumerate(own["param_groups"])
        ]
        whole = {index: values for state in states for index, values in state.items()}
        return {"state": dict(sorted(whole.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a share of the state of a whole optimizer, which every rank has."""
        state, groups = state_dict["state"], state_dict["param_groups"]
        sizes, given = list(map(len, self.parameters)), [len(g["params"]) for g in groups]
        if given != sizes:
            raise ValueError(f"state_dict must have groups of {sizes} parameters, got {given}")
        indices = self._own_indices()
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {
                "state": {i: state[index] for i, index in enumerate(indices) if index in state},
                "param_groups": [
                    theirs | {"params": ours["params"]}
                    for theirs, ours in zip(groups, own, strict=True)
                ],
            }
        )

    def _own_indices(self) -> list[int]:
        """Return the indices of the parameters that belong to this rank."""
        everything = enumerate(chain(*self.parameters))
        return [i for i, p in everything if self.owner.get(p) == self.rank]
