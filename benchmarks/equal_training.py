"""Does the fused model train as its reference does? Same seed, same bytes, side by side.

    python -m benchmarks.equal_training --out DIR

fp32    the loss of every one of the first steps, relative to the reference's
bf16    the bits per byte of held-out data after all steps, several seeds: the means over seeds may
        differ by less than half of what the reference's own differ from seed to seed
repeat  one step from the same state, again and again, without and with its CUDA graph: the same
        loss and parameters to the bit

Steps are those of `shtx train` on its default data, with its clipping and schedule. Prints a table,
writes DIR/equal_training.json and .png; the exit status is 1 if a check fails. Checks that an older
file in DIR has besides are kept. Needs shtx[train].
"""

import argparse
import gc
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from benchmarks import report, shapes
from benchmarks.__main__ import STAMP_HELP, check, make_folder
from benchmarks.bench_ceilings import machine
from benchmarks.commit import resolve
from benchmarks.timing import DEVICE
from shtx import TrainStep
from shtx.ops import why_not_fused
from shtx.train import TrainError
from shtx.train.config import Config, Model
from shtx.train.data import Source, prepare
from shtx.train.presets import PRESETS
from shtx.train.run import place
from shtx.train.trainer import Trainer, build

FIRST_STEPS, FIRST_BOUND = 32, 1e-4
HELD_OUT = 8  # batches
IMPLS = ("fused", "reference")
CHANGES = {"C": {"depth": 4}, "B": {}}
HALF = "bf16-mixed" if DEVICE == "cuda" else "fp32"  # the interpreter's bf16 is wrong


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.equal_training", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--only", nargs="+", default=list(CHECKS), metavar="CHECK", help=f"of {' '.join(CHECKS)}")
    add("--config", nargs="+", default=list(CHANGES), metavar="NAME", help="of C (at depth 4) B")
    add("--steps", type=int, default=300, metavar="N")
    add("--seeds", type=int, default=3, metavar="N", help="of the check bf16; 2 at least")
    add("--batch", type=int, default=8, metavar="N", help="sequences a step")
    add("--repeats", type=int, default=20, metavar="N", help="of the check repeat")
    add("--data", type=Path, metavar="FILE", help="default: that of shtx train")
    add("--out", type=Path, default=Path("runs/equal_training"), metavar="DIR")
    add("--commit", metavar="STAMP", help=STAMP_HELP)
    options = parser.parse_args(argv)
    options.only = check("--only", options.only, CHECKS)
    options.config = check("--config", options.config, CHANGES)
    for name, least in dict(steps=1, seeds=2, batch=1, repeats=2).items():
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    return options


def model_of(name: str) -> Model:
    given = shapes.configs(DEVICE)[name].model | CHANGES[name]
    whole = ("depth", "seq_len")
    return Model(
        **{
            key: value if key in whole or isinstance(value, tuple) else (value,)
            for key, value in given.items()
            if key != "num_tokens"
        }
    )


def title_of(name: str) -> str:
    return ", ".join([name, *(f"{key} {value}" for key, value in CHANGES[name].items())])


class Runs:
    """Trainers of one configuration, and the curves of those that ran."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path):
        self.name, self.options, self.curves = name, options, []
        self.model = model_of(name)
        self.corpus = prepare(
            Source((options.data,) if options.data else ()), folder, self.model.seq_len
        )

    def trainer(self, impl: str, precision: str, seed: int = 0) -> Trainer:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        run = dict(
            vars(PRESETS["gpu"]),
            device=DEVICE,
            model=self.model,
            impl=impl,
            precision=precision,
            seed=seed,
            steps=self.options.steps,
            batch_size=self.options.batch,
            eval_sequences=HELD_OUT * self.options.batch,
        )
        config = Config(**run)
        device, *_ = place(config)
        return Trainer(config, self.corpus, build(config, device))

    def train(self, kind: str, impl: str, precision: str, steps: int, seed: int = 0) -> Trainer:
        trainer = self.trainer(impl, precision, seed)
        rows = torch.stack([trainer.step(step) for step in range(steps)]).tolist()
        self.curves.append(
            {
                "check": kind,
                "config": title_of(self.name),
                "impl": impl,
                "precision": precision,
                "seed": seed,
                "loss": [loss for loss, *_ in rows],
                "bits_per_byte": [ce / math.log(2) for _, ce, *_ in rows],
            }
        )
        return trainer


def apart(fused: dict, expected: dict) -> list[float]:
    """Relative differences of the losses of two curves."""
    losses = zip(fused["loss"], expected["loss"], strict=True)
    return [abs(a - b) / abs(b) for a, b in losses]


def first_steps(runs: Runs) -> dict:
    """fp32: how far a loss is off the reference's, at most."""
    steps = min(FIRST_STEPS, runs.options.steps)
    for impl in IMPLS:
        runs.train("fp32", impl, "fp32", steps)
    off = apart(*runs.curves)
    return {
        "what": f"loss of the first {steps} steps, relative difference",
        "measured": max(off),
        "allowed": FIRST_BOUND,
        "passed": all(difference <= FIRST_BOUND for difference in off),  # not NaN either
    }


def last_bits(runs: Runs) -> dict:
    """bf16: how far the final bits per byte are off, beside how far seeds are apart."""
    ends = {
        impl: [
            runs.train("bf16", impl, HALF, runs.options.steps, seed).evaluate()
            for seed in range(runs.options.seeds)
        ]
        for impl in IMPLS
    }
    fused, expected = ends.values()
    off, spread = abs(mean(fused) - mean(expected)), max(expected) - min(expected)
    return {
        "what": f"bits per byte after {runs.options.steps} steps, difference of the means",
        "measured": off,
        "allowed": spread / 2,
        "passed": off < spread / 2,
        "most_of_a_seed": max(abs(a - b) for a, b in zip(fused, expected, strict=True)),
        "fused": fused,
        "reference": expected,
    }


def repeats(runs: Runs) -> dict:
    """Count the repeats of a step that differ from the first one in any bit."""
    trainer = runs.trainer("fused", HALF)
    trainer.step(0)  # makes the state of the optimizer
    state = [*trainer.model.parameters()]
    (optimizer,) = trainer.optimizers.all
    state += [t for values in optimizer.state.values() for t in values.values()]
    before = [t.detach().clone() for t in state]
    # anew: the first call is eager, the second one captures
    clip = trainer.config.grad_clip
    trainer.train_step = TrainStep(trainer.model, optimizer, precision=HALF, grad_clip=clip)
    different, first = 0, None
    for _ in range(runs.options.repeats):
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        outcome = [trainer.step(1), *(t.detach().clone() for t in state)]
        first = first or outcome
        different += not all(map(torch.equal, outcome, first))
    moved = not all(map(torch.equal, first[1:], before))
    return {
        "what": f"repeats of a step, of {runs.options.repeats}, that differ",
        "measured": different,
        "allowed": 0,
        "passed": different == 0 and moved,
    }


CHECKS = {"fp32": first_steps, "bf16": last_bits, "repeat": repeats}


def measure(options: argparse.Namespace, results: dict) -> Iterator[None]:
    """Adds one check after the other to the results, in place of an older one of that name."""
    stamp = {
        "commit": options.commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "batch": options.batch,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in options.config:
            runs = Runs(name, options, Path(folder))
            for kind in options.only:
                row = {"check": kind, "config": title_of(name), **CHECKS[kind](runs), **stamp}
                same = lambda other, row=row: all(other[k] == row[k] for k in ("check", "config"))
                results["checks"] = [c for c in results["checks"] if not same(c)] + [row]
                results["curves"] = [c for c in results["curves"] if not same(c)]
                results["curves"] += runs.curves
                runs.curves = []
                print(f"{kind} {name}: {'pass' if row['passed'] else 'FAIL'}", flush=True)
                yield


def table(results: dict) -> str:
    short = lambda value: "-" if value is None else f"{value:.2g}"
    lines = [
        {
            "check": row["check"],
            "config": row["config"],
            "what": row["what"],
            "measured (-)": short(row["measured"]),
            "allowed (-)": short(row["allowed"]),
            "one seed, at most (-)": short(row.get("most_of_a_seed")),
            "result": "pass" if row["passed"] else "FAIL",
        }
        for row in results["checks"]
    ]
    return report.aligned(lines)


def draw(results: dict, path: Path):
    """Bits per byte of all seeds, and how far fp32 losses are apart."""
    curves = results["curves"]
    kinds = [kind for kind in ("bf16", "fp32") if any(c["check"] == kind for c in curves)]
    configs = list(dict.fromkeys(curve["config"] for curve in curves))
    if not kinds:
        return
    figure = Figure((6 * len(configs), 0.6 + 3.6 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(configs), squeeze=False)
    for line, kind in zip(axes, kinds, strict=True):
        for axis, config in zip(line, configs, strict=True):
            found = [c for c in curves if (c["check"], c["config"]) == (kind, config)]
            if not found:
                axis.set_axis_off()
                continue
            axis.set(title=f"configuration {config}, {kind}", xlabel="step")
            axis.grid(alpha=0.3)
            if kind == "fp32":
                axis.plot(range(1, len(found[0]["loss"]) + 1), apart(*found))
                axis.axhline(FIRST_BOUND, color="gray", linestyle="--")
                axis.set(ylabel="relative difference of losses", ylim=(0, 10 * FIRST_BOUND))
                axis.set_yscale("symlog", linthresh=1e-8)  # 0: equal to the bit
            else:
                for curve in found:
                    bits = curve["bits_per_byte"]
                    dashed = "-" if curve["impl"] == "fused" else "--"
                    label = f"{curve['impl']}, seed {curve['seed']}"
                    style = dict(color=f"C{curve['seed']}", linestyle=dashed, linewidth=0.8)
                    axis.plot(range(1, len(bits) + 1), bits, label=label, **style)
                axis.set(ylabel="bits per byte of the batch")
                axis.legend(fontsize="small", ncols=2)
    figure.suptitle(report.title(results), fontsize="medium")
    figure.savefig(path, dpi=120)


def as_json(results: dict) -> str:
    """A line for each check and each curve."""
    rows = lambda values: "[\n" + ",\n".join(map(json.dumps, values)) + "\n]"
    dump = {key: rows(v) if isinstance(v, list) else json.dumps(v) for key, v in results.items()}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in dump.items()) + "\n}\n"


def main(argv: list[str]) -> int:
    options = parse(argv)
    if reason := why_not_fused(torch.device(DEVICE)):
        sys.exit(f"the fused model cannot run: {reason}")
    make_folder("--out", options.out)
    options.commit = resolve(options.commit)
    path = options.out / "equal_training.json"
    results = {"machine": machine(), "small_shapes": DEVICE == "cpu", "checks": [], "curves": []}
    if path.exists():
        older = json.loads(path.read_text())
        if older["machine"] != results["machine"]:
            sys.exit(f"--out: {path} is of another machine")
        results = older
    try:
        for _ in measure(options, results):
            report.write(path, as_json(results))
    except TrainError as error:
        sys.exit(str(error))
    finally:
        if results["checks"]:
            print(f"\n{report.title(results)}\n\n{table(results)}", flush=True)
            draw(results, path.with_suffix(".png"))
    return 0 if all(row["passed"] for row in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
