"""A model and its optimizer: a step, a validation, a sample."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shtx import HierarchicalTransformer, TrainStep
from shtx.fsdp import fully_shard_model
from shtx.initial import fill
from shtx.internals import lerp_all, tree_leaves
from shtx.model import Trunk
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer
from shtx.plan import is_sharded
from shtx.train import TrainError, shards
from shtx.train.checkpoint import Checkpoint, find, load, whole
from shtx.train.config import Config, settings_of
from shtx.train.data import Corpus
from shtx.train.optimizers import MOMENTS, optimizers_of
from shtx.train_step import AUTOCAST

WARMUP, DECAY = 0.05, 0.2  # shares of the steps
MINIMUM = 0.02  # share of the peak learning rate
PROMPT, SAMPLE = 64, 256  # bytes or tokens
# the parts of a model's loss besides the cross entropy of the next byte
PARTS = {
    HierarchicalTransformer: ("reconstruction_loss", "hierarchical_ar_loss"),
    NextLatentTransformer: ("next_latent_loss", "reconstruction_loss"),
}


def build(config: Config, device: torch.device, copies: int = 1, world: int = 1) -> Trunk:
    """The model of the settings, with the initial weights of their seed.

    Args:
        config: the settings.
        device: where it will be.
        copies: fp32 numbers a weight that have to fit there; 4 to train.
        world: processes that train it together, each of which has a part under `--shard full`.

    Raises:
        TrainError: there is no such model, or it cannot fit.
    """
    sharded = config.shard == "full" and world > 1
    make = lambda: config.model.kind(impl=config.impl, **config.model.arguments())
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again
            model = make()
        parameters = sum(p.numel() for p in model.parameters())
        need, there = 4 * copies * parameters / (world if sharded else 1), memory_of(device)
        if need > there:
            raise TrainError(
                f"out of memory: {parameters:,} parameters need {need / 1e9:,.1f} GB,"
                f" {device} has {there / 1e9:,.1f} GB: lower --dim, --depth or --heads"
            )
        torch.manual_seed(config.seed)
        model = model if sharded else make()
        model.ops_for(device)
    except (ValueError, TypeError, OverflowError) as error:
        raise TrainError(" ".join(str(error).split())) from error
    model.checkpointing = config.activation_checkpointing
    return fully_shard_model(model) if sharded else model.to(device)


def load_model(
    path: Path, device: torch.device, step: int | str | None = None, ema: bool = False
) -> tuple[Trunk, Checkpoint]:
    """The model of a checkpoint, with impl="auto", and the checkpoint.

    Args:
        path: the directory of a run, or that of a checkpoint.
        device: where the model will be.
        step: which checkpoint of a run, see `find`; None: the newest.
        ema: take the averaged weights, of a run with --ema.

    Raises:
        TrainError: in one line why there is none.
    """
    checkpoint = whole(load(path if step is None else find(path, step)))
    weights = checkpoint.weights
    if ema:
        if not (average := checkpoint.state.get("ema")):
            raise TrainError(f"{checkpoint.path}: has no averaged weights: its run had no --ema")
        weights = weights | average
    model = build(replace(settings_of(checkpoint), impl="auto"), device)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise TrainError(f"{checkpoint.path}: does not fit its settings: {what}") from error
    return model, checkpoint


@torch.no_grad()
def take_weights(model: Trunk, path: Path) -> None:
    """Give a model that begins the weights of a checkpoint.

    Args:
        model: from `build`.
        path: the directory of a run, for its newest checkpoint, or that of a checkpoint.

    Raises:
        TrainError: it has other weights; the first one is named.
    """
    weights, ours = whole(load(path)).weights, model.state_dict()
    shapes = [{k: tuple(t.shape) for k, t in tensors.items()} for tensors in (weights, ours)]
    different = [n for n in shapes[1] | shapes[0] if shapes[0].get(n) != shapes[1].get(n)]
    if different:
        there, here = (given.get(different[0], "missing") for given in shapes)
        raise TrainError(
            f"--init-from {path}: {len(different)} weights are others: {different[0]} is {there}"
            f" there and {here} here"
        )
    for name, place in ours.items():
        fill(place, weights[name])


def memory_of(device: torch.device) -> int:
    """Bytes of memory, used and free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_untrainable(model: Trunk) -> None:
    """Raise a TrainError for a model that has no prediction for every byte."""
    levels = (
        model.levels
        if model.predict_use_all_hierarchy
        else [model.levels[model.predict_hierarchy_index]]
    )
    if 1 not in [level.stride for level in levels]:
        stride = min(level.stride for level in levels)
        raise TrainError(
            f"--hierarchical-stride must be 1 for a level that predicts, got {stride}: a model that"
            " trains predicts every byte"
        )


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of update `step`, counted from 0: a warmup, then what --schedule says."""
    steps = config.curve or config.steps
    warmup = max(1, round(WARMUP * steps)) if config.warmup is None else config.warmup
    least = MINIMUM if config.min_lr is None else config.min_lr / config.lr
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(1, round(DECAY * steps))
        done = max(0.0, (step + 1 - (steps - decay)) / decay)
        return config.lr * (1 - (1 - least) * min(1.0, done))
    angle = math.pi * min(1.0, (step - warmup) / (steps - warmup)) if steps > warmup else math.pi
    return config.lr * ((1 + least) / 2 + (1 - least) / 2 * math.cos(angle))


class Trainer:
    """A model, its optimizer, and what is done with them, by one of `world` processes.

    Args:
        config: the settings.
        corpus: the data.
        model: from `build`, on the device of this process.
        rank, world: of torch.distributed, which is initialized if world > 1.

    Attributes:
        sharded: whether this process has a part of the model.
        average: by name, the averaged weights of --ema, or this process's parts; else nothing.
        part_names: of what `step` returns besides loss, cross entropy and gradient norm.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        model: Trunk,
        rank: int = 0,
        world: int = 1,
    ):
        self.config, self.corpus, self.model = config, corpus, model
        self.rank, self.world, self.device = rank, world, model.device
        self.sharded = any(map(is_sharded, model.parameters()))
        self.train_step = TrainStep(
            *(model, optimizers_of(config, model)),
            precision="fp32" if config.precision == "tf32" else config.precision,
            grad_clip=config.grad_clip or math.inf,  # the norm is told either way
            accumulate=config.accumulate,
            shard_optimizer=config.shard == "optimizer",
        )
        named = model.named_parameters() if config.ema is not None else ()
        self.average = {name: p.detach().clone() for name, p in named}
        self.part_names = PARTS[config.model.kind]
        if config.model.objective == "next-latent":
            levels = config.model.hierarchies
            self.part_names += tuple(f"next_latent_loss_{compression}" for compression in levels)
        self.optimizers, self.scaler = self.train_step.optimizers, self.train_step.scaler

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def ids(self, sequences: np.ndarray) -> Tensor:
        return torch.from_numpy(sequences).to(self.device).long()

    def compile(self) -> None:
        """Kernels of a step, side by side; others compile when they are first launched."""
        self.train_step.compile(self.ids(self.batch(0)))

    def batch(self, step: int) -> np.ndarray:
        config = self.config
        return self.corpus.batch(config.seed, step, config.batch_size, self.rank, self.world)

    def step(self, step: int) -> Tensor:
        """One update, number `step`, counted from 0.

        Returns:
            (3 + parts,) on the device: loss, cross entropy in nats, gradient norm, and the other
            parts of the loss, see `part_names`.
        """
        config = self.config
        for group in self.optimizers.param_groups:
            group["lr"] = learning_rate(config, step) * group["lr_scale"]
        loss, (ce, *parts) = self.train_step(self.ids(self.batch(step)))
        if self.average:
            # The average would remember the first steps for long, so it forgets them faster.
            kept = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                lerp_all(*self._averages_and_weights(), 1 - kept)
        return torch.stack((loss, ce, self.train_step.grad_norm, *tree_leaves(parts)))

    def _averages_and_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this process's parts of the averages and of the weights."""
        mine = lambda t: t.to_local() if is_sharded(t) else t
        weights = dict(self.model.named_parameters())
        return [mine(t) for t in self.average.values()], [mine(weights[n]) for n in self.average]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Return a context in which the model has the averaged weights, if there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Weights and averages change places, where CUDA graphs have them."""
        for average, weight in zip(*self._averages_and_weights(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def evaluate(
        self,
        stopped: Callable[[], int] = lambda: 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> float | None:
        """Bits per byte (or token) of the validation sequences; None if a process was `stopped`.

        Args:
            stopped: whether a signal came.
            progress: is told how many of --eval-sequences are done.
        """
        with self.averaged():
            return self._evaluate(stopped, progress)

    @torch.no_grad()
    def _evaluate(
        self, stopped: Callable[[], int], progress: Callable[[int], None]
    ) -> float | None:
        self.model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        count = self.config.eval_sequences
        share = self.config.batch_size // (self.world * self.config.accumulate)
        for first in range(0, count, self.world * share):
            if self.world == 1 and stopped():
                self.model.train()
                return None
            start = first + self.rank * share
            if start >= count and not self.sharded:
                break
            # All processes have to call each forward of a sharded model.
            last = slice(count - 1, count)
            which = slice(start, start + share) if start < count else last
            ids = self.ids(self.corpus.windows(count, which))
            with self.autocast():
                logits = self.model(ids[:, :-1])
            if which is not last:
                nats += F.cross_entropy(
                    logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                )
            progress(min(count, first + self.world * share))
        if self.world > 1:
            dist.all_reduce(nats)
        self.model.train()
        return nats.item() / (count * self.config.model.seq_len) / math.log(2)

    def sample(self) -> tuple[list[int], list[int]]:
        """The start of the validation data, and how the model goes on: bytes or token ids."""
        prompt = self.corpus.val[: min(PROMPT, self.config.model.seq_len)]
        torch.manual_seed(self.config.seed)
        with self.averaged(), self.autocast():
            ids = self.model.generate(self.ids(prompt.copy())[None], SAMPLE)
        return prompt.tolist(), ids[0].tolist()

    def agree(self, signum: int) -> int:
        """The number of the signal that any process got, 0 if none did."""
        if self.world > 1:
            most = torch.tensor(signum, device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            signum = int(most)
        return signum

    def close(self) -> None:
        """Leaves the other processes; no more steps after this.

        CUDA graphs go first, which NCCL would wait for.
        """
        if self.train_step is not None:
            self.train_step.close()
        self.train_step = None
        if self.world > 1:
            dist.destroy_process_group()

    def state(self) -> dict:
        """Return what a checkpoint keeps besides the weights. All processes have to call this, and
        the first gets it.
        """
        optimizer = self.train_step.optimizer_state_dict()
        state = {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
        return state | ({"ema": self.average} if self.average else {})

    def parts(self) -> tuple[dict[str, Tensor], list[dict]]:
        """Return the tensors of a sharded model that a checkpoint keeps, of which this process has
        parts, and the optimizer's groups.
        """
        state = self.optimizers.state_dict()
        tensors = shards.flat(self.model.state_dict(), state["state"], self.average)
        return tensors, state["param_groups"]

    def is_finite(self) -> bool:
        """Return whether all weights are finite, on all processes."""
        weights = self.model.state_dict().values()
        mine = (weight.to_local() if is_sharded(weight) else weight for weight in weights)
        return not self.agree(int(not all(weight.isfinite().all() for weight in mine)))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; a TrainError if it is not one of these settings."""
        groups = self.optimizers.param_groups
        ours = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        if not self.sharded:
            checkpoint = whole(checkpoint)
        try:
            if self.sharded:
                checkpoint = self._with_parts(checkpoint)
            self.model.load_state_dict(checkpoint.weights)
            self.train_step.load_optimizer_state_dict(checkpoint.state["optimizer"])
            self.scaler.load_state_dict(checkpoint.state["scaler"])
            for name, average in self.average.items():
                kept = checkpoint.state["ema"][name]
                if kept.shape != average.shape:
                    raise ValueError("averages that are not of the weights' shape")
                average.copy_(kept)
            for optimizer in self.optimizers.all:
                for p, state in optimizer.state.items():
                    if any(state[name].shape != p.shape for name in MOMENTS[type(optimizer)]):
                        raise ValueError("moments that are not of the weights' shape")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = " ".join(str(error).split())[:300]
            raise TrainError(f"{checkpoint.path}: does not fit its settings: {what}") from error
        for group, options in zip(self.optimizers.param_groups, ours, strict=True):
            group.update(options)  # those of another device are no good here

    def _with_parts(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint whose tensors are as the sharded model has them."""
        state = self.model.state_dict()
        parameters = [p for group in self.optimizers.param_groups for p in group["params"]]
        if checkpoint.weights is None:
            given, sizes = None, shards.sizes(checkpoint.path)
            groups = checkpoint.config["param_groups"]
        else:
            optimizer = checkpoint.state["optimizer"]
            groups, average = optimizer["param_groups"], checkpoint.state.get("ema", {})
            given = shards.flat(checkpoint.weights, optimizer["state"], average)
            sizes = {name: (t.shape, t.dtype) for name, t in given.items()}
        parts = {}
        for name, (size, dtype) in sizes.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                like = parameters[int(rest.partition(".")[0])]
            else:
                like = (state if kind == "model" else self.average)[rest]
            if size == like.shape:
                parts[name] = torch.empty_like(like, dtype=dtype)
            else:  # the number of steps
                parts[name] = torch.empty(size, dtype=dtype, device=self.device)
        if given is None:
            shards.read_into(checkpoint.path, parts)
        else:
            for name, part in parts.items():
                fill(part, given[name])
        weights, values, average = shards.nested(parts)
        optimizer = {"state": values, "param_groups": groups}
        state = {"optimizer": optimizer, "scaler": {}, "ema": average}
        return replace(checkpoint, weights=weights, state=state)
