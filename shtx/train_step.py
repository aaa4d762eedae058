"""One optimizer step as one call; on a GPU, all of it is one CUDA graph for each shape of ids.

A graph replays the same kernels on the same memory. What may differ from step to step lies in
tensors that are written before a replay: the ids and the learning rates. Everything else that a
graph took in is compared at every call, and graphs that no longer hold are given up. The first step
of a shape runs eagerly, once its kernels are compiled, and creates the optimizer's state. The
second is captured, which computes nothing, and replayed. So every call is exactly one step.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map_only

from shtx.graphs import MAX_GRAPHS, Graphs, comparable, run_aside
from shtx.levels import integer
from shtx.ops import FUSED, compile_ahead
from shtx.plan import Layer, Plan, check_in_memory, is_sharded

PARAMETERS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


@dataclass
class Step:
    """A captured step of one shape of ids: where a replay reads them, and the outputs that it
    overwrites.
    """

    ids: Tensor
    graph: torch.cuda.CUDAGraph
    outputs: tuple


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
            change, of a group, of the model, of an attribute of this object or of PyTorch's modes,
            costs an eager step and a capture.
        precision: "bf16-mixed" (autocast; fp32 parameters), "fp16-mixed" (the same; gradients are
            scaled, and a step in which one overflows changes nothing but the scale), "fp32", or
            "bf16" (bf16 parameters).
        grad_clip: greatest norm of all gradients together; None: any.
        accumulate: micro-batches that the batch of ids is split into, for less memory. Loss and
            gradients are those of the whole batch, whatever labels each of them ignores.
        cuda_graph: on CUDA, replay a CUDA graph from the second call with a shape of ids on. Hooks
            of the optimizer's step do not run in a replay. Of a model that has hooks, or that
            cannot be captured, steps run eagerly, with a warning.

    Attributes:
        grad_norm: 0-dim, of the last step, before clipping; None without grad_clip.
        scaler: the torch.amp.GradScaler of precision="fp16-mixed", whose state belongs in a
            checkpoint; of other precisions it does nothing.

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
        if not isinstance(model, Module) or not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "TrainStep takes a model and its optimizer, in this order, got"
                f" {type(model).__name__} and {type(optimizer).__name__}"
            )
        check_in_memory(model)
        if precision not in PARAMETERS:
            allowed = ", ".join(map(repr, PARAMETERS))
            raise ValueError(f"precision must be one of {allowed}, got {precision!r}")
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.dtype != PARAMETERS[precision]:
                raise ValueError(
                    f"precision={precision!r} takes parameters of {PARAMETERS[precision]},"
                    f" got {p.dtype}: {name}"
                )
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip must be above 0 or None, got {grad_clip}")
        trained = {p for p in model.parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        if not any(p in trained for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer must have parameters of the model that require a gradient, got none of"
                f" the {len(trained)}: it was made of another model's, or before they were replaced"
            )
        self.model, self.optimizer = model, optimizer
        self.precision, self.grad_clip = precision, grad_clip
        self.accumulate = integer("accumulate", accumulate, at_least=1)
        self.grad_norm = None
        self._core = getattr(model, "module", model)  # what a wrapper wraps
        self._device = self._core.device
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16-mixed")
        self._learning_rates = []  # a tensor a group, on CUDA
        self._warned = False  # of hooks
        self._compiled = False
        self._sharded = any(map(is_sharded, self._parameters))
        self._distributed = self._sharded or self._core is not model
        self._graphs = None
        if cuda_graph and self._device.type == "cuda" and self._can_be_captured():
            self._graphs = Graphs(self._device, MAX_GRAPHS)

    @property
    def _parameters(self) -> list[Parameter]:
        return list(self.model.parameters())

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
            step = self._step if self._graphs is None else self._graphed_step
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
                loss, _ = self._core(micro, return_loss=True, **self._plan())
                with torch.autocast(self._device.type, enabled=False):
                    torch.autograd.grad(loss, trained, allow_unused=True)

        with torch.cuda.device_of(ids):
            if self._graphs is None:
                compile_ahead(gradients)
            else:
                run_aside(lambda: compile_ahead(gradients), self._graphs.stream)
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
            self.scaler.unscale_(self.optimizer)
            norm = None
            if self.grad_clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.grad_clip)
            with self._tensors_in_groups():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        finally:
            self.model.zero_grad()
        return loss, parts, norm

    def _forward_backward(self, ids: Tensor) -> tuple[Tensor, tuple]:
        with self._autocast():
            plan = self._plan()
            if self.accumulate == 1:
                loss, parts = self.model(ids, return_loss=True, **plan)
                self._backward(loss)
                return loss.detach(), tuple(part.detach() for part in parts)
            weights, counts = self._core.loss_weights, self._core.loss_counts(ids).clamp(min=1)
            weighted = lambda losses: sum(w * x for w, x in zip(weights, losses, strict=True))
            totals = 0
            for micro in ids.unflatten(0, (self.accumulate, len(ids) // self.accumulate)):
                sums, _ = self.model(micro, return_loss=True, loss_reduction="sum", **plan)
                losses = sums / counts
                self._backward(weighted(losses))
                totals = totals + losses.detach()
            compressed = sum(level.compress > 1 for level in self._core.levels)
            split = len(totals) - compressed
            parts = totals[0], totals[1:split].sum(), totals[split:].sum()
            return weighted(totals), parts

    def _plan(self) -> dict[str, Plan]:
        """Plan once for all micro-batches, so that weights are cast once; what is compiled or
        sharded plans its own forwards.
        """
        compiled = self._core._compiled_call_impl or not isinstance(self._core, Layer)
        return {} if compiled or self._sharded else dict(plan=self._core.plan(checked=True))

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """One region, whose casts of weights are of this step alone."""
        torch.clear_autocast_cache()  # the caller's own region may be open
        dtype = AUTOCAST.get(self.precision)
        try:
            with torch.autocast(self._device.type, dtype, enabled=dtype is not None):
                yield
        finally:
            torch.clear_autocast_cache()

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self.scaler.scale(loss).backward()

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
        needed = "fused=True or capturable=True"
        fits = all(map(_reads_tensors, self.optimizer.param_groups))
        if self.scaler.is_enabled():  # only a fused update finds out for itself what overflowed
            needed = 'fused=True with precision="fp16-mixed"'
            fits = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if not fits:
            raise ValueError(
                f"optimizer must have {needed} for a CUDA graph, got"
                f" {type(self.optimizer).__name__} without; cuda_graph=False takes any"
            )
        return True

    # the graphs

    def _graphed_step(self, ids: Tensor) -> tuple[Tensor, tuple, Tensor | None]:
        graphs = self._graphs
        graphs.hold(self._core, self._frozen())
        if reason := graphs.structure.hooked():
            if not self._warned:
                self._warned = True
                warnings.warn(f"steps run without a CUDA graph: {reason}", stacklevel=3)
            graphs.kept.clear()
            return self._step(ids)
        name = f"a step of ids of shape {tuple(ids.shape)}"
        step = graphs.get(ids.shape, lambda: self._capture(ids), name)
        if step is None:
            return run_aside(lambda: self._step(ids), graphs.stream)
        step.ids.copy_(ids)
        self.model.zero_grad()
        step.graph.replay()
        torch.clear_autocast_cache()  # a caller's region has the weights of before
        return tree_map_only(Tensor, torch.clone, step.outputs)

    def _capture(self, ids: Tensor) -> Step:
        ids = ids.clone(memory_format=torch.contiguous_format)
        return Step(ids, *self._graphs.capture(lambda: self._step(ids)))

    def _frozen(self) -> list:
        """What a graph of a step has frozen besides the model."""
        varying = ("params", "lr", "initial_lr")
        groups = [
            {name: comparable(value) for name, value in group.items() if name not in varying}
            for group in self.optimizer.param_groups
        ]
        stepped = [list(map(id, group["params"])) for group in self.optimizer.param_groups]
        # load_state_dict puts another state in the place of the one whose memory graphs update
        options = self.precision, self.grad_clip, self.accumulate, id(self.optimizer.state)
        scaler = self.scaler
        if scaler.is_enabled():
            growth = scaler.get_growth_factor(), scaler.get_backoff_factor()
            options = *options, *growth, scaler.get_growth_interval()
        return [groups, stepped, options]
