"""`shtx train`, from its arguments to what a run leaves."""

import os
import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from shtx import __version__, ops
from shtx.model import Trunk
from shtx.train import TrainError
from shtx.train.arguments import look, parse
from shtx.train.checkpoint import Checkpoint, best_of, set_aside
from shtx.train.config import Config, settings_of
from shtx.train.data import Corpus, prepare
from shtx.train.home import METRICS, Home, home_of, new_id, origin
from shtx.train.loggers import refuse_what_is_not_installed
from shtx.train.loop import fit
from shtx.train.metrics import plot
from shtx.train.presets import PRESETS
from shtx.train.progress import Display
from shtx.train.stop import Stop, Stopped
from shtx.train.trainer import (
    Trainer,
    build,
    learning_rate,
    refuse_untrainable,
    take_weights,
)


def main(argv: list[str]) -> int:
    """Train as the arguments say.

    Returns:
        the exit status: 0, or 128 and the number of the signal that stopped it.
    """
    with ExitStack() as stack:
        home, path = None, resumed_home(argv)
        first = int(os.environ.get("RANK", 0)) == 0
        if first and path:
            home = stack.enter_context(Home(path, "--resume"))
        config, checkpoint = parse(argv)
        if first:
            refuse_what_is_not_installed(config.log)
        device, rank, world = place(config)
        model = build(config, device, copies=4 + (config.ema is not None), world=world)
        refuse_untrainable(model)
        if config.init_from and checkpoint is None:
            take_weights(model, config.init_from)
        if first and home is None:
            home = stack.enter_context(Home(config.out))
            home.refuse_what_is_not_ours()
        try:
            return run(config, checkpoint, home, model, rank, world)
        except KeyboardInterrupt as stopped:
            if home and home.kept and isinstance(stopped, Stopped):
                stopped.advice = f"; to go on: {command(home)}"
            raise


def command(home: Home) -> str:
    return f"shtx train --resume {shlex.quote(str(home.path))}"


def resumed_home(argv: list[str]) -> Path | None:
    """The directory of a run that the arguments continue there: it is locked, then read."""
    asked = look(argv)
    home = asked.resume and home_of(asked.resume)
    if not home or not home.is_dir() or {"-h", "--help"} & {*argv}:
        return None
    return home if asked.out in (None, home) else None


def run(
    config: Config,
    checkpoint: Checkpoint | None,
    home: Home | None,
    model: Trunk,
    rank: int,
    world: int,
) -> int:
    """Train into `home`, which the first process has; see `main`."""
    done = checkpoint.step if checkpoint else 0
    display = Display(config.steps, done, quiet=rank > 0)
    display.say(summary(config, model, world))
    corpus = None
    if home:
        corpus = open_run(config, checkpoint, home, model, display)
    if world > 1:
        given = [corpus]
        dist.broadcast_object_list(given)
        corpus = corpus or given[0]
    trainer = Trainer(config, corpus, model, rank, world)
    if checkpoint:
        trainer.restore(checkpoint)
    display.say(f"{sizes(corpus)} for validation; results go to {home and home.path}")
    if checkpoint and (jump := jump_of(config, settings_of(checkpoint), done)):
        display.say(jump)
    try:
        with display:
            signum = fit(trainer, done, display, home)
    except OSError as error:
        if error.filename is None and home:
            raise TrainError(
                f"{home.path}: cannot be written: {error.strerror}; what was saved before is whole,"
                f" and goes on with {command(home)}"
            ) from error
        raise
    if not signum and (home or trainer.sharded):
        prompt, text = trainer.sample()
    if signum and home:
        display.say(f"stopped and saved; to go on: {command(home)}")
    elif home:
        home.check()
        with Stop() as stop:  # it imports: see shtx.cli
            plot(home.metrics, home.plot)
        if stop.signum:
            raise Stopped(stop.signum)
        display.say(
            f"\nsample after a prompt of {len(prompt)} {config.unit.name}s:\n"
            f"{config.unit.show(prompt + text)}\n"
        )
        display.say(f"metrics, checkpoints and loss.png: {home.path}")
    trainer.close()
    return 128 + signum if signum else 0


def sizes(corpus: Corpus) -> str:
    unit = "MB" if corpus.store.tokens is None else "million tokens"
    return f"{len(corpus.train) / 1e6:.1f} {unit} to train on, {len(corpus.val) / 1e6:.1f} {unit}"


def jump_of(config: Config, before: Config, done: int) -> str | None:
    """Return a warning if the learning rate jumps where the run goes on; None if it does not."""
    same = (config.steps, config.schedule) == (before.steps, before.schedule)
    if done == 0 or done >= config.steps or same:
        return None
    was, now = learning_rate(before, done - 1), learning_rate(config, done)
    if now < 1.5 * was:
        return None
    return (
        f"the learning rate jumps from {was:.2e} to {now:.2e}, as --schedule {config.schedule} ends"
        f" at step {config.steps:,} and that of the run ended at {before.steps:,}; --schedule"
        " minimum goes on with the end of the run's own"
    )


def place(config: Config) -> tuple[torch.device, int, int]:
    """Device, rank, number of processes; torch.distributed is initialized if these are several."""
    rank, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    device = find_device(config.device, "--device cpu needs none")
    if config.batch_size % (world * config.accumulate):
        raise TrainError(
            f"--batch-size must be a multiple of the {world} processes times --accumulate"
            f" {config.accumulate}, got {config.batch_size}"
        )
    if world > 1 and config.shard == "full" and config.optimizer == "muon":
        raise TrainError(
            "--optimizer muon steps whole matrices: --shard must be none or optimizer, got full;"
            " --optimizer adamw takes all three"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    return device, rank, world


def find_device(name: str, hint: str) -> torch.device:
    """Return the device that --device names; each process of torchrun gets its own. Raise a
    TrainError with the hint if there is no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise TrainError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", device.index or 0))
    if index >= torch.cuda.device_count():
        raise TrainError(
            f"--device {device}: {torch.cuda.device_count()} GPUs that PyTorch can use; {hint}"
        )
    return torch.device("cuda", index)


def open_run(
    config: Config,
    checkpoint: Checkpoint | None,
    home: Home,
    model: Trunk,
    display: Display,
) -> Corpus:
    """The data of a run, whose directory from here on is `home`."""
    expected = former = None
    if checkpoint:
        expected, former = checkpoint.config["data"], origin(config.resume, checkpoint)
    here = former == home.path  # the run goes on where it was
    former = None if here else former
    copies = 3 + (config.ema is not None)  # weights, AdamW's moments and averages
    numbers = copies * sum(p.numel() for p in model.parameters())
    home.need_room(4 * numbers, config.keep + config.keep_best)
    data = config.source, home.path, config.model.seq_len
    corpus = prepare(*data, expected, former, display.say)
    most = max(corpus.different_windows, PRESETS[config.preset].eval_sequences)
    if checkpoint:  # whatever an earlier version let it begin with
        most = max(most, checkpoint.config["run"].get("eval_sequences", 0))
    if config.eval_sequences > most:
        raise TrainError(
            f"--eval-sequences {config.eval_sequences}: the validation data has"
            f" {corpus.different_windows:,} different sequences"
        )
    for path, what in checkpoint.damaged.items() if checkpoint else ():
        kept = f"; kept as {set_aside(path, 'damaged').name}" if here else ""
        display.say(f"{what}{kept}; going on from step {checkpoint.step}")
    if former and (former / METRICS).is_file():
        shutil.copyfile(former / METRICS, home.metrics)
    id = checkpoint.config.get("id") if here else new_id()
    home.begin(config.to_json(), id, checkpoint.path if checkpoint and not here else None)
    home.best = best_of(checkpoint.config) if here else None
    return corpus


def summary(config: Config, model: Trunk, world: int) -> str:
    device = model.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    kind = "fused" if model.ops_for(device) is ops.FUSED else "reference"
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"shtx {__version__}, torch {torch.__version__}, {world} x {device.type} ({name}),"
        f" {config.precision}, {kind} ops\n"
        f"{parameters / 1e6:.2f}M parameters, {config.batch_size} sequences of"
        f" {config.model.seq_len} {config.unit.name}s a step"
    )
