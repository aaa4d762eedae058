"""The settings that arguments ask for: flags over a preset, a file of settings, or a run."""

import argparse
import json
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import tyro

from shtx.train import TrainError
from shtx.train.checkpoint import CHECKPOINTS, Checkpoint, find, find_steps, load, peek, step_of
from shtx.train.config import OTHERS, Config, Model, flag, settings_of
from shtx.train.files import parse_json, read
from shtx.train.home import RUN, origin, settings
from shtx.train.presets import PRESETS
from shtx.train.tokens import description_of

# settings that a resumed run may change: they change nothing that it learns, or it is told
FREE = (
    *("steps", "schedule", "curve", "data", "val_data", "test_data", "separator", "raw"),
    *("out", "resume", "resume_fallback", "device"),
    *("impl", "model", "log_every", "eval_every", "eval_sequences", "save_every"),
    *("activation_checkpointing", "accumulate", "shard", "config"),
    *("keep", "keep_best", "sample_every", "log"),
)
DESCRIPTION = """\
Train a byte-level hierarchical transformer, measured in bits per byte on held-out data.

Examples:
  shtx train
  shtx train --data enwik8.zip --steps 20000 --out runs/enwik8
  shtx train --data books/ 'more/*.txt' --separator '\\0' --val-data held-out.txt.gz
  shtx train --data enwik8.zip --split 0.9 0.05 0.05
  shtx train --preset gpu --precision bf16-mixed --batch-size 4
  shtx train --hierarchies 1 2 8 --hierarchical-stride 1 2 8 --window-sizes 32 64 None
  shtx train --objective next-latent --num-rollouts 2
  shtx train --schedule wsd --warmup 200 --min-lr 1e-5
  shtx train --optimizer muon --level-lr 1 0.5
  shtx train --ema 0.999 --log tensorboard
  shtx train --init-from runs/enwik8 --data other.txt --lr 1e-4
  shtx train --config runs/enwik8/run.json --seed 1
  shtx train --resume runs/enwik8 --steps 40000
  torchrun --nproc-per-node 8 -m shtx train --batch-size 64
"""


@dataclass(frozen=True)
class Asked:
    """The arguments that decide where settings come from. They are read before all others."""

    preset: str | None
    resume: Path | None
    out: Path | None
    config: Path | None
    init_from: Path | None
    resume_fallback: bool


def look(argv: list[str]) -> Asked:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    for name in ("resume", "out", "config", "init_from"):
        names = dict.fromkeys((flag(name), f"--{name}"))
        first.add_argument(*names, nargs="?", type=lambda path: Path(os.path.abspath(path)))
    first.add_argument("--resume-fallback", "--resume_fallback", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    return Asked(**vars(chosen))


def parse(
    argv: list[str], prog: str = "shtx train", description: str = DESCRIPTION
) -> tuple[Config, Checkpoint | None]:
    """The settings the arguments ask for, and the checkpoint to start from if they name one.

    Args:
        argv: the arguments.
        prog, description: for the help.

    Returns:
        a resumed run without a checkpoint yet has none here, either: it starts again.

    Raises:
        TrainError: no such checkpoint, or a setting that a resumed run cannot change.
        SystemExit: wrong usage, or help.
    """
    asked = look(argv)
    cli = partial(tyro.cli, Config, args=argv, prog=prog, description=description)

    if asked.resume is None:
        return described(cli(default=_base(asked))), None
    if asked.config is not None:
        raise TrainError(
            f"--config {asked.config}: is for a run that begins; --resume has the run's settings"
        )

    begun = settings(asked.resume) if step_of(asked.resume) is None else None
    if begun and not find_steps(asked.resume / CHECKPOINTS):  # it ended before its first one
        checkpoint, home = None, asked.resume
        if start := begun.get("start"):
            raise TrainError(
                f"--resume {home}: was stopped before its first checkpoint; start it again with"
                f" --resume {start} --out {home}"
            )
        run = Config.from_json(begun["run"], home / RUN)
    else:
        checkpoint = load(asked.resume, asked.resume_fallback)
        run, home = settings_of(checkpoint), origin(asked.resume, checkpoint)
        if home is None and asked.out is None:
            raise TrainError(
                f"--resume {asked.resume}: {checkpoint.path.name} is a copy, not among the"
                " checkpoints of its run: name where it is to go on with --out DIR"
            )
    run = replace(run, out=home)
    config = replace(cli(default=run), resume=asked.resume)
    _refuse_changes(run, config)
    if config.schedule == "minimum" and config.steps > run.steps:
        config = replace(config, curve=run.curve or run.steps)
    elif config.schedule != "minimum":
        config = replace(config, curve=None)
    return config, checkpoint


def described(config: Config) -> Config:
    """Return the settings with what `shtx data prepare` has left beside the token ids of --data."""
    found = None if config.raw else description_of(config.data, "--data")
    if found is None:
        return config
    tokens = found.tokens
    asked = (config.model.num_tokens, tokens.num_tokens), (config.token_dtype, tokens.dtype)
    for name, (given, described) in zip(("num_tokens", "token_dtype"), asked, strict=True):
        if given not in (None, described):
            raise TrainError(f"{flag(name)} {given}: the file beside --data says {described}")
    return replace(
        config,
        model=replace(config.model, num_tokens=tokens.num_tokens),
        token_dtype=tokens.dtype,
        bytes_per_token=found.bytes / found.count,
        tokenizer=found.tokenizer,
    )


def _base(asked: Asked) -> Config:
    """Return the settings that a run begins with where flags do not say."""
    given = read_settings(asked.config) if asked.config else {}
    preset = asked.preset or given.get("preset")
    default = "gpu" if torch.cuda.is_available() else "cpu"
    base = PRESETS.get(preset if isinstance(preset, str) else default) or PRESETS[default]
    if asked.init_from is not None:
        base = replace(base, model=settings_of(peek(find(asked.init_from))).model)
    if not given:
        return base
    source = f"--config {asked.config}"
    if "defaults" not in given:  # some settings, by hand
        model = given.get("model", {})
        whole = json.loads(json.dumps(base.to_json()))
        known = {f.name for f in (*fields(Model), *fields(Config))}
        unknown = [n for n in (*given, *model) if n not in known] if isinstance(model, dict) else []
        if unknown:
            raise TrainError(f"{source}: there is no setting {', '.join(unknown)}")
        inner = whole["model"] | model if isinstance(model, dict) else model
        given = whole | given | {"model": inner, "preset": base.preset}
    return Config.from_json(given, source, fault="")


def read_settings(path: Path) -> dict:
    """The settings in a file that a run has written, or somebody by hand."""
    try:
        given = parse_json(path, read(path))
    except FileNotFoundError:
        raise TrainError(f"--config {path}: no such file") from None
    except (TrainError, OSError) as error:
        raise TrainError(f"--config {path}: must be a file of a JSON object") from error
    return given["run"] if isinstance(given.get("run"), dict) else given


def _refuse_changes(run: Config, config: Config) -> None:
    """Refuse settings that a resumed run may not change. Its data may have moved: its content is
    checked later.
    """
    if config.steps < run.steps:
        raise TrainError(f"--steps {config.steps} is less than the run's {run.steps}")
    for name in OTHERS.values():
        if bool(getattr(run, name)) != bool(getattr(config, name)):
            raise TrainError(
                f"{flag(name)}: the run has {'some' if getattr(run, name) else 'none'}:"
                " resuming keeps it"
            )
    was, asked = ({**vars(c), **vars(c.model)} for c in (run, config))
    for name in was.keys() - FREE:
        if asked[name] != was[name]:
            raise TrainError(
                f"{flag(name)} {asked[name]} is not the run's {was[name]}: resuming keeps it"
            )
