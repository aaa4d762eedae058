"""The loop of a run: steps, records, checkpoints, and how it stops."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shtx import __version__
from shtx.train import TrainError
from shtx.train.checkpoint import save, save_shards
from shtx.train.home import Home
from shtx.train.metrics import Metrics
from shtx.train.progress import Display
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
    config, first = trainer.config, home is not None
    metrics = Metrics(home.metrics, done) if first else None
    description = {
        "id": home and home.id,
        "run": config.to_json(),
        "data": trainer.corpus.identity,
        "versions": {"shtx": __version__, "torch": torch.__version__},
    }
    tokens = config.batch_size * config.model.seq_len

    def record(losses: list[Tensor], seconds: float) -> None:
        speed = len(losses) * tokens / seconds
        start = done - len(losses)
        for step, (loss, ce, norm) in enumerate(torch.stack(losses).tolist(), start):
            # a gradient that overflows fp16 is the scaler's business
            if not math.isfinite(loss if trainer.scaler.is_enabled() else loss + norm):
                raise TrainError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}: stopped, nothing of it is"
                    " saved; a smaller --lr may help"
                )
            bits = ce / math.log(2)
            row = dict(loss=loss, **config.unit.figures(bits), tokens_per_second=speed)
            if first:
                metrics.append(step=step + 1, lr=learning_rate(config, step), **row)
        display.step(done, loss, config.unit.text(bits), speed)

    def validate(stopped: Callable[[], int] = lambda: 0) -> None:
        bits = trainer.evaluate(stopped)
        if bits is None:  # the resumed run begins with it
            return
        display.say(f"step {done}/{config.steps}: validation {config.unit.text(bits)}")
        if first:
            metrics.append(step=done, **config.unit.figures(bits, "val_"))

    def keep() -> None:
        if not trainer.is_finite():
            raise TrainError(
                f"step {done}: a weight is not finite: stopped, nothing of it is saved"
            )
        state = None if trainer.sharded else trainer.state()
        if first:
            home.check()
            metrics.sync()
        if trainer.sharded:
            tensors, groups = trainer.parts()
            save_shards(home and home.path, done, description | {"param_groups": groups}, tensors)
        elif first:
            save(home.path, done, description, trainer.model.state_dict(), state)

    trainer.compile()
    lacking = first and metrics.lacks_validation(done, config.eval_every)
    if done == 0 or trainer.agree(int(lacking)):
        validate()
    elsewhere = done > 0 and first and not home.holds_checkpoints()  # what is resumed
    if trainer.agree(int(elsewhere)):
        keep()
    with Stop() as stop:
        ended = lambda: stop.signum or display.output.signum
        losses, signum, clock = [], 0, time.perf_counter()
        while done < config.steps and not signum:
            try:
                losses.append(trainer.step(done))
            except DataChanged:
                if trainer.world == 1 and losses:  # what was done with the right bytes is good
                    record(losses, time.perf_counter() - clock)
                    keep()
                raise
            done += 1
            log, evaluate, checkpoint = (
                done == config.steps or done % every == 0
                for every in (config.log_every, config.eval_every, config.save_every)
            )
            if trainer.world == 1 or log:
                signum = trainer.agree(ended())
            if log or evaluate or checkpoint or signum:
                record(losses, time.perf_counter() - clock)
                if evaluate and not signum:
                    validate(ended)
                    signum = ended() if trainer.world == 1 else 0
                if checkpoint or signum:
                    keep()
                losses, clock = [], time.perf_counter()
        return signum or trainer.agree(ended())  # one that came with the last save counts, too
