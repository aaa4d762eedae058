"""The loop of a run: steps, records, checkpoints, and how it stops."""

import math
import time
from collections.abc import Callable

import torch

from shtx import __version__
from shtx.train import TrainError
from shtx.train.checkpoint import save, save_shards
from shtx.train.home import Home
from shtx.train.loggers import logger_of
from shtx.train.metrics import Metrics
from shtx.train.progress import Display, clock_of
from shtx.train.speed import flops_of, peak_memory, peak_of
from shtx.train.stop import Stop
from shtx.train.store import DataChanged
from shtx.train.trainer import Trainer, learning_rate


def fit(trainer: Trainer, done: int, display: Display, home: Home | None) -> int:
    """Train from step `done` to the end, or to a signal; record and save on the way.

    Args:
        trainer: as it is after `done` steps.
        display: what the user sees.
        home: where the first process records and saves; None for the others.

    Returns:
        the number of the signal, 0 at the end.

    Raises:
        TrainError: the loss or a gradient is not finite any more. Checkpoints are from before.
        OSError: something cannot be written. The checkpoints before are whole.
    """
    loop = _Loop(trainer, done, display, home)
    trainer.compile()
    loop.catch_up()
    with Stop() as stop:
        ended = lambda: stop.signum or display.output.signum
        signum = loop.run(ended)
        loop.logger.close()
        return signum or trainer.agree(ended())  # one that came with the last save counts, too


class _Loop:
    """The loop of `fit`, whose arguments it has.

    Attributes:
        done: the number of steps so far.
        losses: the results of the steps since the last record, which were begun at `clock`.
        best: step and bits of the best validation, on the first process; None before it.
    """

    def __init__(self, trainer: Trainer, done: int, display: Display, home: Home | None):
        config = trainer.config
        self.trainer, self.done, self.display, self.home = trainer, done, display, home
        self.config = config
        self.metrics = Metrics(home.metrics, done) if home else None
        self.logger = logger_of(config.log, home, config.to_json(), done)
        self.best = home.best if home else None
        self.peak = peak_of(trainer.device, config.precision)
        self.flops = flops_of(config) if self.peak else 0
        self.tokens = config.batch_size * config.model.seq_len
        self.losses, self.clock = [], 0.0

    def catch_up(self) -> None:
        """Make the validation and the checkpoint that are missing where the run begins."""
        home = self.home
        lacking = home and self.metrics.lacks_validation(self.done, self.config.eval_every)
        if self.done == 0 or self.trainer.agree(int(bool(lacking))):
            self.validate()  # if it is the best, it is saved already, and stays
        elsewhere = self.done > 0 and home and not home.holds_checkpoints()  # what is resumed
        if self.trainer.agree(int(bool(elsewhere))):
            self.keep()

    def run(self, ended: Callable[[], int]) -> int:
        """Train until the end or a signal, which `ended` tells; return the signal, or 0."""
        trainer, signum = self.trainer, 0
        self.clock = time.perf_counter()
        while self.done < self.config.steps and not signum:
            self.step()
            due = self.due()
            if trainer.world == 1 or "record" in due:
                signum = trainer.agree(ended())
            if due or signum:
                self.record()
                better = False
                if "validation" in due and not signum:
                    better = self.validate(ended)
                    signum = ended() if trainer.world == 1 else 0
                if "checkpoint" in due or better or signum:
                    self.keep()
                if "sample" in due and not signum:
                    self.sample()
                self.losses, self.clock = [], time.perf_counter()
        return signum

    def step(self) -> None:
        trainer, losses = self.trainer, self.losses
        try:
            losses.append(trainer.step(self.done))
        except DataChanged:
            if trainer.world == 1 and losses:  # what was done with the right bytes is good
                self.record()
                self.keep()
            raise
        self.done += 1

    def due(self) -> set[str]:
        """Name what comes after this step. The last one has all but a sample, which `run` shows."""
        config, last = self.config, self.done == self.config.steps
        every = {"record": config.log_every, "validation": config.eval_every}
        every["checkpoint"] = config.save_every
        due = {what for what, steps in every.items() if last or self.done % steps == 0}
        if config.sample_every and self.done % config.sample_every == 0 and not last:
            due.add("sample")
        return due

    def record(self) -> None:
        """Record and show the steps since the last record."""
        config, trainer, losses = self.config, self.trainer, self.losses
        seconds = time.perf_counter() - self.clock
        speed = len(losses) * self.tokens / seconds
        means = {"peak_memory": peak_memory(trainer.device)}
        if self.peak:
            means["mfu"] = self.flops * len(losses) / seconds / (self.peak * trainer.world)
        start = self.done - len(losses)
        for step, (loss, ce, norm, *parts) in enumerate(torch.stack(losses).tolist(), start):
            # a gradient that overflows fp16 is the scaler's business
            if not math.isfinite(loss if trainer.scaler.is_enabled() else loss + norm):
                raise TrainError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}: stopped, nothing of it is"
                    " saved; a smaller --lr may help"
                )
            bits = ce / math.log(2)
            row = dict(loss=loss, **config.unit.figures(bits), tokens_per_second=speed)
            if self.home:
                more = dict(zip(trainer.part_names, parts, strict=True)) | means
                if math.isfinite(norm):
                    more["grad_norm"] = norm
                more["tokens"] = self.tokens * (step + 1)
                self.append(step + 1, lr=learning_rate(config, step), **row, **more)
        self.display.step(self.done, loss, config.unit.text(bits), speed)

    def append(self, step: int, **row: float) -> None:
        self.metrics.append(step=step, **row)
        self.logger.append(step, **row)

    def validate(self, stopped: Callable[[], int] = lambda: 0) -> bool:
        """Validate; return whether the weights are the best so far and are to be kept."""
        config, display = self.config, self.display
        began = time.monotonic()

        def progress(count: int) -> None:
            left = (time.monotonic() - began) / count * (config.eval_sequences - count)
            display.note(f"validation {count}/{config.eval_sequences}, {clock_of(left)} left")

        bits = self.trainer.evaluate(stopped, progress)
        if bits is None:  # the resumed run begins with it
            return False
        display.say(f"step {self.done}/{config.steps}: validation {config.unit.text(bits)}")
        better = False
        if self.home:
            self.append(self.done, **config.unit.figures(bits, "val_"))
            least = math.inf if self.best is None else self.best[1]
            better = config.keep_best and self.done > 0 and bits < least
            self.best = (self.done, bits) if better else self.best
        return bool(self.trainer.agree(int(better)))

    def sample(self) -> None:
        if self.home or self.trainer.sharded:
            prompt, text = self.trainer.sample()
            text = self.config.unit.show(prompt + text)
            self.display.say(f"step {self.done}/{self.config.steps}: sample: {text}")

    def keep(self) -> None:
        """Save a checkpoint."""
        trainer, home, config = self.trainer, self.home, self.config
        if not trainer.is_finite():
            raise TrainError(
                f"step {self.done}: a weight is not finite: stopped, nothing of it is saved"
            )
        state = None if trainer.sharded else trainer.state()
        if home:
            home.check()
            self.metrics.sync()
            self.logger.sync()
        if trainer.sharded:
            tensors, groups = trainer.parts()
            told = self.description() | {"param_groups": groups}
            save_shards(home and home.path, self.done, told, tensors, config.keep)
        elif home:
            weights = trainer.model.state_dict()
            save(home.path, self.done, self.description(), weights, state, config.keep)

    def description(self) -> dict:
        """Describe a checkpoint for those that will read it."""
        description = {
            "id": self.home and self.home.id,
            "run": self.config.to_json(),
            "data": self.trainer.corpus.identity,
            "versions": {"shtx": __version__, "torch": torch.__version__},
        }
        if self.best is not None:
            step, bits = self.best
            description["best"] = {"step": step, "val_bits": bits}
        return description
