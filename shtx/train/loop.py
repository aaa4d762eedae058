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
    config, first = trainer.config, home is not None
    metrics = Metrics(home.metrics, done) if first else None
    logger = logger_of(config.log, home, config.to_json(), done)
    best = home.best if first else None
    peak = peak_of(trainer.device, config.precision)
    flops = flops_of(config) if peak else 0
    description = {
        "id": home and home.id,
        "run": config.to_json(),
        "data": trainer.corpus.identity,
        "versions": {"shtx": __version__, "torch": torch.__version__},
    }
    tokens = config.batch_size * config.model.seq_len

    def append(step: int, **row: float) -> None:
        metrics.append(step=step, **row)
        logger.append(step, **row)

    def record(losses: list[Tensor], seconds: float) -> None:
        speed = len(losses) * tokens / seconds
        means = {"peak_memory": peak_memory(trainer.device)}
        if peak:
            means["mfu"] = flops * len(losses) / seconds / (peak * trainer.world)
        start = done - len(losses)
        for step, (loss, ce, norm, *parts) in enumerate(torch.stack(losses).tolist(), start):
            # a gradient that overflows fp16 is the scaler's business
            if not math.isfinite(loss if trainer.scaler.is_enabled() else loss + norm):
                raise TrainError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}: stopped, nothing of it is"
                    " saved; a smaller --lr may help"
                )
            bits = ce / math.log(2)
            row = dict(loss=loss, **config.unit.figures(bits), tokens_per_second=speed)
            if first:
                more = dict(zip(trainer.part_names, parts, strict=True)) | means
                if math.isfinite(norm):
                    more["grad_norm"] = norm
                more["tokens"] = tokens * (step + 1)
                append(step + 1, lr=learning_rate(config, step), **row, **more)
        display.step(done, loss, config.unit.text(bits), speed)

    def validate(stopped: Callable[[], int] = lambda: 0) -> bool:
        """Whether the weights are the best so far, and are to be kept."""
        nonlocal best
        began = time.monotonic()

        def progress(count: int) -> None:
            left = (time.monotonic() - began) / count * (config.eval_sequences - count)
            display.note(f"validation {count}/{config.eval_sequences}, {clock_of(left)} left")

        bits = trainer.evaluate(stopped, progress)
        if bits is None:  # the resumed run begins with it
            return False
        display.say(f"step {done}/{config.steps}: validation {config.unit.text(bits)}")
        better = False
        if first:
            append(done, **config.unit.figures(bits, "val_"))
            least = math.inf if best is None else best[1]
            better = config.keep_best and done > 0 and bits < least
            best = (done, bits) if better else best
        return bool(trainer.agree(int(better)))

    def sample() -> None:
        if first or trainer.sharded:
            prompt, text = trainer.sample()
            display.say(f"step {done}/{config.steps}: sample: {config.unit.show(prompt + text)}")

    def keep() -> None:
        if not trainer.is_finite():
            raise TrainError(
                f"step {done}: a weight is not finite: stopped, nothing of it is saved"
            )
        state = None if trainer.sharded else trainer.state()
        if first:
            home.check()
            metrics.sync()
            logger.sync()
        told = description
        if best is not None:
            told = told | {"best": {"step": best[0], "val_bits": best[1]}}
        if trainer.sharded:
            tensors, groups = trainer.parts()
            told = told | {"param_groups": groups}
            save_shards(home and home.path, done, told, tensors, config.keep)
        elif first:
            save(home.path, done, told, trainer.model.state_dict(), state, config.keep)

    trainer.compile()
    lacking = first and metrics.lacks_validation(done, config.eval_every)
    if done == 0 or trainer.agree(int(lacking)):
        validate()  # if it is the best, it is saved already, and stays
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
            show = config.sample_every and done % config.sample_every == 0 and done < config.steps
            if trainer.world == 1 or log:
                signum = trainer.agree(ended())
            if log or evaluate or checkpoint or show or signum:
                record(losses, time.perf_counter() - clock)
                better = False
                if evaluate and not signum:
                    better = validate(ended)
                    signum = ended() if trainer.world == 1 else 0
                if checkpoint or better or signum:
                    keep()
                if show and not signum:
                    sample()
                losses, clock = [], time.perf_counter()
        logger.close()
        return signum or trainer.agree(ended())  # one that came with the last save counts, too
