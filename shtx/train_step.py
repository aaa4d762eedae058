"""One optimizer step as one call; on a GPU, all of it is one CUDA graph for each shape of ids.

A graph replays the same kernels on the same memory. What may differ from step to step lies in
tensors that are written before a replay: the ids and the learning rates. Everything else that a
graph took in is compared at every call, and graphs that no longer hold are given up. The first step
of a shape runs eagerly, once its kernels are compiled, and creates the optimizer's state. The
second is captured, which computes nothing, and replayed. So every call is exactly one step.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map_only

from shtx.graphs import capture, run_aside
from shtx.levels import integer
from shtx.ops import FUSED, compile_ahead, narrow_weights_kept

MAX_GRAPHS = 4  # shapes of ids; a whole batch and a last smaller one are two
PARAMETERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32}


@dataclass
class Graph:
    """Of one shape of ids: where a replay reads them, and the outputs that it overwrites."""

    ids: Tensor
    cuda_graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple = ()


def _reads_tensors(group: dict) -> bool:
    """Whether an update by this group of an optimizer takes its numbers from the device."""
    return bool(group.get("fused") or group.get("capturable"))


class TrainStep:
    """Forward, backward, clipping and update of a HierarchicalTransformer, as a function of ids.

    Args:
        model: a HierarchicalTransformer, compiled or not, on its device; or one that
            DistributedDataParallel or FSDP has wrapped, whose steps run without a CUDA graph.
        optimizer: of the model's parameters. For a CUDA graph its groups must have fused=True or
            capturable=True. Learning rates may change between calls, in any way; fused and
            capturable groups read them in fp32 on CUDA, with a CUDA graph or without. Any other
            change to a group costs an eager step and a capture.
        precision: "bf16-mixed" (autocast; fp32 parameters), "fp32", or "bf16" (bf16 parameters).
        grad_clip: greatest norm of all gradients together; None: any.
        accumulate: micro-batches that the batch of ids is split into, for less memory. Loss and
            gradients are those of the whole batch, whatever labels each of them ignores.
        cuda_graph: on CUDA, replay a CUDA graph from the second call with a shape of ids on. Hooks
            of the optimizer's step do not run in a replay.

    Attributes:
        grad_norm: 0-dim, of the last step, before clipping; None without grad_clip.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """

    def __init__(
        self,
        model: Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "bf16-mixed",
        grad_clip: float | None = None,
        accumulate: int = 1,
        cuda_graph: bool = True,
    ):
        if precision not in PARAMETERS:
            allowed = ", ".join(map(repr, PARAMETERS))
            raise ValueError(f"precision must be one of {allowed}, got {precision!r}")
        for name, p in model.named_parameters():
            if p.dtype != PARAMETERS[precision]:
                raise ValueError(
                    f"precision={precision!r} takes parameters of {PARAMETERS[precision]},"
                    f" got {p.dtype}: {name}"
                )
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip must be above 0 or None, got {grad_clip}")
        self.model, self.optimizer = model, optimizer
        self.precision, self.grad_clip = precision, grad_clip
        self.accumulate = integer("accumulate", accumulate, at_least=1)
        self.grad_norm = None
        self._core = getattr(model, "module", model)  # what a wrapper wraps
        self._parameters = list(model.parameters())
        self._device = self._core.device
        self._learning_rates = []  # a tensor a group, on CUDA
        self._narrow_weights = {}  # all made anew at once, at the start of a step
        self._graphs, self._constants, self._state = {}, None, None
        self._warned = False
        self._compiled = False
        self._sharded = any(type(p) is not Parameter for p in self._parameters)
        self._distributed = self._sharded or self._core is not model
        self._stream = None  # of eager first steps and captures, which share its workspaces
        if cuda_graph and self._device.type == "cuda" and self._can_be_captured():
            self._stream = torch.cuda.Stream(self._device)

    def __call__(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One step, of fresh gradients, which are gone after it.

        The first one compiles before, as `compile` does.

        If forward or backward raises, parameters and optimizer are as they were.

        Args:
            ids: (B, N + 1) integers, as HierarchicalTransformer.forward takes with return_loss; B
                is a multiple of `accumulate`.

        Returns:
            the 0-dim loss and its parts, as of HierarchicalTransformer.forward, detached.

        Raises:
            TypeError, ValueError: for ids that are not as above.
        """
        ids = self._check_ids(ids)
        self.compile(ids)
        with torch.cuda.device_of(ids):
            self._write_learning_rates()
            step = self._step if self._stream is None else self._graphed_step
            loss, parts, self.grad_norm = step(ids)
        return loss, parts

    def compile(self, ids: Tensor) -> None:
        """Compile the kernels of the fused ops, side by side, unless that is done.

        Forward and backward run, and compute nothing but garbage, which no parameter sees.

        Args, Raises: as for a step.
        """
        # sharded parameters are whole within the wrapper alone
        if self._compiled or self._sharded or self._core.ops_for(self._device) is not FUSED:
            return
        ids = self._check_ids(ids)
        micro = ids[: len(ids) // self.accumulate]
        trained = [p for p in self._parameters if p.requires_grad]

        def gradients():
            with self._autocast():
                loss, _ = self._core(micro, return_loss=True)
                with torch.autocast(self._device.type, enabled=False):
                    torch.autograd.grad(loss, trained, allow_unused=True)

        with torch.cuda.device_of(ids):
            if self._stream is None:
                compile_ahead(gradients)
            else:
                run_aside(lambda: compile_ahead(gradients), self._stream)
        self._compiled = True

    def _check_ids(self, ids: Tensor) -> Tensor:
        ids = self._core.check_ids(ids, return_loss=True)
        if len(ids) % self.accumulate:
            raise ValueError(
                f"ids must have a batch that is a multiple of accumulate, {self.accumulate},"
                f" got {len(ids)}"
            )
        return ids

    # the step

    def _step(self, ids: Tensor) -> tuple[Tensor, tuple, Tensor | None]:
        """Loss, its parts and the norm of the gradients of one step: what a graph holds."""
        self.model.zero_grad()
        try:
            loss, parts = self._forward_backward(ids)
            norm = None
            if self.grad_clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.grad_clip)
            with self._tensors_in_groups():
                self.optimizer.step()
        finally:
            self.model.zero_grad()
        return loss, parts, norm

    def _forward_backward(self, ids: Tensor) -> tuple[Tensor, tuple]:
        with self._autocast():
            if self.accumulate == 1:
                loss, parts = self.model(ids, return_loss=True)
                self._backward(loss)
                return loss.detach(), tuple(part.detach() for part in parts)
            weights, counts = self._core.loss_weights, self._core.loss_counts(ids).clamp(min=1)
            weighted = lambda losses: sum(w * x for w, x in zip(weights, losses, strict=True))
            totals = 0
            for micro in ids.unflatten(0, (self.accumulate, len(ids) // self.accumulate)):
                sums, _ = self.model(micro, return_loss=True, loss_reduction="sum")
                losses = sums / counts
                self._backward(weighted(losses))
                totals = totals + losses.detach()
            compressed = sum(level.compress > 1 for level in self._core.levels)
            split = len(totals) - compressed
            parts = totals[0], totals[1:split].sum(), totals[split:].sum()
            return weighted(totals), parts

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """One region, in which a weight is cast once; its casts are of this step alone."""
        torch.clear_autocast_cache()  # the caller's own region may be open
        mixed = self.precision == "bf16-mixed"
        # FSDP's weights come and go
        kept = nullcontext() if self._distributed else narrow_weights_kept(self._narrow_weights)
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=mixed), kept:
                yield
        finally:
            torch.clear_autocast_cache()

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()

    # the optimizer

    def _write_learning_rates(self) -> None:
        """To the device, ahead of the step: within a graph it would be the same number for ever."""
        if self._device.type != "cuda":
            return
        groups, tensors = self.optimizer.param_groups, self._learning_rates
        tensors += [torch.zeros((), device=self._device) for _ in groups[len(tensors) :]]
        for group, tensor in zip(groups, tensors, strict=True):
            tensor.fill_(group["lr"])

    @contextmanager
    def _tensors_in_groups(self) -> Iterator[None]:
        """Learning rates as tensors, for an update alone: schedulers and checkpoints see theirs."""
        before = []
        for group, tensor in zip(self.optimizer.param_groups, self._learning_rates, strict=False):
            if _reads_tensors(group):
                before.append((group, dict(group)))
                group["lr"] = tensor
                if "capturable" in group:  # fused ones are, whatever they say
                    group["capturable"] = True
        try:
            yield
        finally:
            for group, values in before:
                group |= values

    def _can_be_captured(self) -> bool:
        """False, with a warning, for a distributed model."""
        if self._distributed:
            warnings.warn(
                f"cuda_graph=True does nothing for a distributed model ({type(self.model).__name__}"
                " or its parameters): steps run eagerly",
                stacklevel=3,
            )
            return False
        if not all(map(_reads_tensors, self.optimizer.param_groups)):
            raise ValueError(
                "optimizer must have fused=True or capturable=True for a CUDA graph, got"
                f" {type(self.optimizer).__name__} without; cuda_graph=False takes any"
            )
        return True

    # the graphs

    def _graphed_step(self, ids: Tensor) -> tuple[Tensor, tuple, Tensor | None]:
        self._give_up_graphs_that_no_longer_hold()
        graph = self._graphs.get(ids.shape)
        if graph is None and len(self._graphs) == MAX_GRAPHS:
            if not self._warned:
                warnings.warn(
                    f"ids of shape {tuple(ids.shape)}: {MAX_GRAPHS} other shapes have a CUDA graph"
                    " each, further ones run eagerly",
                    stacklevel=3,
                )
                self._warned = True
            return self._step(ids)
        if graph is None:
            graph = Graph(ids.clone(memory_format=torch.contiguous_format))
            outputs = run_aside(lambda: self._step(graph.ids), self._stream)
            self._graphs[ids.shape] = graph
            return outputs
        graph.ids.copy_(ids)
        if graph.cuda_graph is None:
            self._capture(graph)
        self.model.zero_grad()
        graph.cuda_graph.replay()
        torch.clear_autocast_cache()  # a caller's region has the weights of before
        return tree_map_only(Tensor, torch.clone, graph.outputs)

    def _capture(self, graph: Graph) -> None:
        others = [g.cuda_graph for g in self._graphs.values() if g.cuda_graph]
        checked, self._core.checked = self._core.checked, False  # __call__ has, with a sync
        try:
            step = lambda: self._step(graph.ids)
            graph.cuda_graph, graph.outputs = capture(step, self._stream, others)
        finally:
            self._core.checked = checked

    def _give_up_graphs_that_no_longer_hold(self) -> None:
        core, varying = self._core, ("params", "lr", "initial_lr")
        constants = (
            [{k: v for k, v in g.items() if k not in varying} for g in self.optimizer.param_groups],
            [(p.data_ptr(), p.requires_grad) for p in self._parameters],
            (core.impl, core.ignore_index, core.loss_weights, core.checkpointing),
        )
        # load_state_dict puts another state in the place of the one whose memory graphs update
        if constants != self._constants or self.optimizer.state is not self._state:
            self._graphs.clear()
            self._constants, self._state = constants, self.optimizer.state
