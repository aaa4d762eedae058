"""A model and its optimizer: a step, a validation, a sample."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shtx import TrainStep
from shtx.model import Trunk
from shtx.train import TrainError
from shtx.train.checkpoint import Checkpoint, load
from shtx.train.config import Config, of
from shtx.train.data import Corpus
from shtx.train_step import AUTOCAST

CLIP = 1.0  # gradient norm
WARMUP, DECAY = 0.05, 0.2  # of the steps
MINIMUM = 0.02  # of the peak learning rate
PROMPT, SAMPLE = 64, 256  # bytes


def build(config: Config, device: torch.device, copies: int = 1) -> Trunk:
    """The model of the settings, with the initial weights of their seed.

    Args:
        config: the settings.
        device: where it will be.
        copies: fp32 numbers a weight that have to fit there; 4 to train.

    Raises:
        TrainError: there is no such model, or it cannot fit.
    """
    torch.manual_seed(config.seed)
    make = lambda: config.model.kind(impl=config.impl, **config.model.arguments())
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again
            parameters = sum(p.numel() for p in make().parameters())
        need, there = 4 * copies * parameters, memory_of(device)
        if need > there:
            raise TrainError(
                f"out of memory: {parameters:,} parameters need {need / 1e9:,.1f} GB,"
                f" {device} has {there / 1e9:,.1f} GB: lower --dim, --depth or --heads"
            )
        torch.manual_seed(config.seed)
        model = make()
        model.ops_for(device)
    except (ValueError, TypeError, OverflowError) as error:
        raise TrainError(" ".join(str(error).split())) from error
    model.checkpointing = config.activation_checkpointing
    return model.to(device)


def load_model(path: Path, device: torch.device) -> tuple[Trunk, Checkpoint]:
    """The model of a checkpoint, with impl="auto", and the checkpoint.

    Args:
        path: the directory of a run, for its newest checkpoint, or that of a checkpoint.
        device: where the model will be.

    Raises:
        TrainError: in one line why there is none.
    """
    checkpoint = load(path)
    model = build(replace(of(checkpoint), impl="auto"), device)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise TrainError(f"{checkpoint.path}: does not fit its settings: {what}") from error
    return model, checkpoint


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
    """Of update `step`, counted from 0: a linear warmup, then what --schedule says."""
    steps = config.curve or config.steps
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        decay = max(1, round(DECAY * steps))
        done = max(0.0, (step + 1 - (steps - decay)) / decay)
        return config.lr * (1 - (1 - MINIMUM) * min(1.0, done))
    angle = math.pi * min(1.0, (step - warmup) / (steps - warmup)) if steps > warmup else math.pi
    return config.lr * ((1 + MINIMUM) / 2 + (1 - MINIMUM) / 2 * math.cos(angle))


class Trainer:
    """A model, its optimizer, and what is done with them, by one of `world` processes.

    Args:
        config: the settings.
        corpus: the data.
        model: from `build`, on the device of this process.
        rank, world: of torch.distributed, which is initialized if world > 1.
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
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.train_step = TrainStep(
            *(model, self.optimizer),
            precision="fp32" if config.precision == "tf32" else config.precision,
            grad_clip=CLIP,
            accumulate=config.accumulate,
            shard_optimizer=config.shard == "optimizer",
        )
        self.scaler = self.train_step.scaler

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
            (3,) on the device: loss, cross entropy in nats, gradient norm.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, (ce, *_) = self.train_step(self.ids(self.batch(step)))
        return torch.stack((loss, ce, self.train_step.grad_norm))

    @torch.no_grad()
    def evaluate(self, stopped: Callable[[], int] = lambda: 0) -> float | None:
        """Bits per byte of the validation sequences; None where one process was `stopped`."""
        self.model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        count = self.config.eval_sequences
        share = self.config.batch_size // (self.world * self.config.accumulate)
        for start in range(self.rank * share, count, self.world * share):
            if self.world == 1 and stopped():
                self.model.train()
                return None
            ids = self.ids(self.corpus.windows(count, slice(start, start + share)))
            with self.autocast():
                logits = self.model(ids[:, :-1])
            nats += F.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
        if self.world > 1:
            dist.all_reduce(nats)
        self.model.train()
        return nats.item() / (count * self.config.model.seq_len) / math.log(2)

    def sample(self) -> tuple[bytes, bytes]:
        """The start of the validation data, and how the model goes on."""
        prompt = self.corpus.val[: min(PROMPT, self.config.model.seq_len)]
        torch.manual_seed(self.config.seed)
        with self.autocast():
            ids = self.model.generate(self.ids(prompt.copy())[None], SAMPLE)
        return prompt.tobytes(), bytes(ids[0].tolist())

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
        """What a checkpoint keeps besides the weights; all processes have to call this, and the
        first has it.
        """
        optimizer = self.train_step.optimizer_state_dict()
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; a TrainError if it is not one of these settings."""
        groups = self.optimizer.param_groups
        ours = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            self.model.load_state_dict(checkpoint.weights)
            self.train_step.load_optimizer_state_dict(checkpoint.state["optimizer"])
            self.scaler.load_state_dict(checkpoint.state["scaler"])
            for p, state in self.optimizer.state.items():
                if not state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape:
                    raise ValueError("moments that are not of the weights' shape")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = " ".join(str(error).split())[:300]
            raise TrainError(f"{checkpoint.path}: does not fit its settings: {what}") from error
        for group, options in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(options)  # those of another device are no good here
