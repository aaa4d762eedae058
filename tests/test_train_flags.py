"""Flags of a run besides those of its model and data, each as its user meets it."""

import copy
import json
import shutil
import signal
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from running import TINY, change_config, change_state, resume, rows, train

from shtx.cli import main
from shtx.train import TrainError, speed, trainer
from shtx.train.arguments import parse
from shtx.train.checkpoint import best_of, find, load
from shtx.train.config import Config
from shtx.train.data import Corpus
from shtx.train.metrics import read
from shtx.train.progress import clock_of
from shtx.train.store import Store
from shtx.train.trainer import Trainer, build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(trainer, "SAMPLE", 4)


@pytest.fixture(scope="module")
def averaged_run(text, tmp_path_factory):
    """A run with all that it can keep, trained by Muon and AdamW."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    assert train(text, out, "--optimizer", "muon", "--ema", "0.9", "--keep", "3") == 0
    return out


def error_of(capsys):
    error = capsys.readouterr().err
    assert error.startswith("shtx train: error: ") and error.count("\n") == 1
    return error.removeprefix("shtx train: error: ")


def steps_of(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# averaged weights


def test_average_is_of_the_weights_of_all_steps(text):
    config, _ = parse([*TINY, "--ema", "0.6"])
    one = Trainer(config, Corpus(Store([text]), 32), build(config, CPU))
    expected = copy.deepcopy(dict(one.model.named_parameters()))
    for step in range(6):
        one.step(step)
        kept = min(0.6, (1 + step) / (10 + step))
        for name, p in one.model.named_parameters():
            expected[name] = expected[name].detach() * kept + p.detach() * (1 - kept)
    for name, average in one.average.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)


def test_validations_and_samples_are_of_the_average_and_leave_the_weights(text):
    config, _ = parse([*TINY, "--ema", "0.9"])
    one = Trainer(config, Corpus(Store([text]), 32), build(config, CPU))
    for step in range(3):
        one.step(step)
    before = copy.deepcopy(one.model.state_dict())
    bits, sample = one.evaluate(), one.sample()
    assert all(torch.equal(t, before[name]) for name, t in one.model.state_dict().items())
    plain = Trainer(replace(config, ema=None), one.corpus, copy.deepcopy(one.model))
    assert plain.evaluate() != bits
    plain.model.load_state_dict(one.model.state_dict() | one.average)
    assert plain.evaluate() == bits and plain.sample() == sample


def test_average_goes_on_to_the_bit(averaged_run, tmp_path):
    part = shutil.copytree(averaged_run, tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / "step-000012")
    assert resume(part) == 0
    for name in ("model.safetensors", "optimizer.pt"):
        a, b = (run / "checkpoints" / "step-000012" / name for run in (part, averaged_run))
        assert a.read_bytes() == b.read_bytes()
    assert rows(part) == rows(averaged_run)


def test_average_of_other_shapes(averaged_run, tmp_path, capsys):
    part = shutil.copytree(averaged_run, tmp_path / "part")
    step = find(part)
    change_state(step, lambda state: state["ema"].update({"token_emb.weight": torch.ones(1)}))
    assert resume(part) == 1
    assert "averages that are not of the weights' shape" in error_of(capsys)
    change_state(step, lambda state: state.pop("ema"))
    assert resume(part) == 1
    assert "does not fit its settings" in error_of(capsys)


def test_text_of_the_average(averaged_run, run, capsys):
    command = ["generate", "--prompt", "line", "--length", "60", "--seed", "0", "--device", "cpu"]
    texts = []
    for flags in ([], ["--ema"]):
        assert main([*command, "--checkpoint", str(averaged_run), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert main([*command, "--checkpoint", str(run), "--ema"]) == 1
    assert "has no averaged weights: its run had no --ema" in capsys.readouterr().err


# the weights of another run


def test_beginning_with_the_weights_of_a_run(text, run, tmp_path):
    """The model is the run's; steps, schedule and optimizer are its own."""
    more = ["--steps", "3", "--eval-sequences", "8", "--batch-size", "2", "--lr", "1e-9"]
    command = ["train", "--preset", "cpu", "--data", str(text), *more]
    assert main([*command, "--init-from", str(run), "--out", str(tmp_path / "new")]) == 0
    ours, theirs = load(tmp_path / "new"), load(run)
    assert ours.step == 3 and ours.config["run"]["model"] == theirs.config["run"]["model"]
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=0, atol=1e-6)
    bits = [r["val_bits_per_byte"] for r in rows(tmp_path / "new") if "val_bits_per_byte" in r]
    assert bits[0] == pytest.approx(rows(run)[-1]["val_bits_per_byte"], rel=1e-6)
    shutil.rmtree(tmp_path / "new" / "checkpoints")  # killed before its first checkpoint
    assert resume(tmp_path / "new") == 0
    assert (
        load(tmp_path / "new").weights["to_logits.weight"].equal(ours.weights["to_logits.weight"])
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dim 32", "token_emb.weight is (256, 16) there and (256, 32) here"),
        ("--depth 2", "layers.1.0.attn.norm.weight is missing there and (16,) here"),
    ],
)
def test_weights_that_do_not_fit(text, run, tmp_path, capsys, flags, message):
    arguments = ["--init-from", str(run), *flags.split()]
    assert train(text, tmp_path / "new", *arguments) == 1
    error = error_of(capsys)
    assert error.startswith(f"--init-from {run}: ") and "weights are others: " in error
    assert message in error
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_there(text, tmp_path, capsys):
    assert train(text, tmp_path / "new", "--init-from", str(tmp_path / "missing")) == 1
    assert error_of(capsys) == f"{tmp_path / 'missing'}: no checkpoint there\n"


def test_a_run_that_goes_on_has_begun(run, averaged_run, capsys):
    assert resume(run, "--init-from", str(averaged_run)) == 1
    assert error_of(capsys).endswith("is not the run's None: resuming keeps it\n")


# checkpoints that are kept


def bits_that(monkeypatch, values):
    """Validations come to these, by step."""
    seen = iter(values)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: next(seen))


def test_the_best_is_kept_beside_the_newest(text, tmp_path, monkeypatch):
    bits_that(monkeypatch, [8.0, 5.0, 3.0, 4.0, 6.0])
    every = ["--eval-every", "3", "--save-every", "4", "--keep", "1"]
    assert train(text, tmp_path / "run", *every) == 0
    assert steps_of(tmp_path / "run") == ["step-000006", "step-000012"]
    assert best_of(load(tmp_path / "run").config) == (6, 3.0)
    assert find(tmp_path / "run", "best").name == "step-000006"


def test_a_validation_that_is_no_number_is_not_the_best(text, tmp_path, monkeypatch):
    bits_that(monkeypatch, [8.0, float("nan"), 4.0])
    assert train(text, tmp_path / "run") == 0
    assert best_of(load(tmp_path / "run").config) == (12, 4.0)


def test_without_the_best(text, tmp_path, monkeypatch):
    bits_that(monkeypatch, [8.0, 3.0, 4.0])
    assert train(text, tmp_path / "run", "--no-keep-best", "--keep", "1") == 0
    assert steps_of(tmp_path / "run") == ["step-000012"]
    with pytest.raises(TrainError, match="has no best checkpoint"):
        find(tmp_path / "run", "best")


def test_a_resumed_run_knows_its_best(text, tmp_path, monkeypatch):
    bits_that(monkeypatch, [8.0, 3.0, 4.0, 5.0, 2.0])
    assert train(text, tmp_path / "run", "--keep", "1") == 0
    assert resume(tmp_path / "run", "--steps", "18") == 0
    assert steps_of(tmp_path / "run") == ["step-000006", "step-000018"]
    assert resume(tmp_path / "run", "--steps", "24") == 0
    assert steps_of(tmp_path / "run") == ["step-000024"]


def test_the_best_is_what_a_run_was_stopped_at(text, tmp_path, monkeypatch):
    """Its validation is made up for when the run goes on, which saves no step twice."""
    bits_that(monkeypatch, [8.0, None])
    step = Trainer.step

    def stop(self, number):
        if number == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        assert train(text, tmp_path / "run", "--save-every", "12") == 128 + signal.SIGTERM
    assert steps_of(tmp_path / "run") == ["step-000006"]
    written = (find(tmp_path / "run") / "config.json").stat().st_mtime_ns
    bits_that(monkeypatch, [3.0, 4.0])
    assert resume(tmp_path / "run", "--keep", "1") == 0
    assert find(tmp_path / "run", "best").name == "step-000006"
    kept = tmp_path / "run" / "checkpoints" / "step-000006" / "config.json"
    assert kept.stat().st_mtime_ns == written


def test_a_run_elsewhere_has_no_best_yet(text, tmp_path, monkeypatch):
    bits_that(monkeypatch, [8.0, 3.0, 4.0])
    assert train(text, tmp_path / "run") == 0
    bits_that(monkeypatch, [5.0])
    arguments = ("--steps", "18", "--out", str(tmp_path / "new"))
    assert resume(tmp_path / "run", *arguments) == 0
    assert best_of(load(tmp_path / "new").config) == (18, 5.0)
    assert find(tmp_path / "run", "best").name == "step-000006"


@pytest.mark.parametrize("best", [3, {"step": "6"}, {"step": 6}, {"step": 6, "val_bits": []}])
def test_a_best_that_is_none(run, tmp_path, best):
    part = shutil.copytree(run, tmp_path / "part")
    change_config(find(part), lambda config: config.update(best=best))
    assert resume(part, "--steps", "14") == 0
    assert best_of(load(part).config)[0] == 14


def test_only_the_runs_own_goes(text, run, tmp_path):
    part = shutil.copytree(run, tmp_path / "part")
    other = shutil.copytree(find(part), part / "checkpoints" / "step-000003")
    change_config(other, lambda config: config.update(step=3, id="another"))
    assert resume(part, "--steps", "24", "--keep", "1") == 0
    assert "step-000003" in steps_of(part) and "step-000012" not in steps_of(part)


def test_room_for_all_that_is_kept(text, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    assert train(text, tmp_path / "run", "--keep", "100") == 1
    assert "checkpoints need 0.0" in error_of(capsys)


# samples, time


def test_samples_on_the_way(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", "--sample-every", "4", "--log-every", "12") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split(":")[0] for line in lines if ": sample: " in line]
    assert shown == ["step 4/12", "step 8/12"]
    assert sum("sample after a prompt" in line for line in lines) == 1


def test_samples_change_no_step(text, run, tmp_path):
    assert train(text, tmp_path / "run", "--sample-every", "1") == 0
    assert rows(tmp_path / "run") == rows(run)


def test_time_left(text, tmp_path, capsys):
    assert train(text, tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert lines[-1].endswith(" tokens/s, 0:00 left")
    assert [clock_of(s) for s in (0.4, 61, 3600, 36061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]


def test_a_validation_tells_how_far_it_is(text):
    config, _ = parse(TINY)
    one, told = Trainer(config, Corpus(Store([text]), 32), build(config, CPU)), []
    one.evaluate(progress=told.append)
    assert told == [4, 8]


# settings in a file


def test_settings_that_a_run_wrote(text, run, tmp_path):
    """A run with the settings of another does the same."""
    new = tmp_path / "new"
    assert main(["train", "--config", str(run / "run.json"), "--out", str(new)]) == 0
    assert rows(new) == rows(run)
    weights = [load(path).path / "model.safetensors" for path in (new, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    config, _ = parse(["--config", str(find(run) / "config.json"), "--lr", "1e-3", "--dim", "8"])
    assert (config.lr, config.model.dim, config.steps) == (1e-3, (8,), 12)


def test_settings_by_hand(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"preset": "cpu", "steps": 7, "betas": [0.8, 0.9], "model": {"depth": 3}}')
    config, _ = parse(["--config", str(file), "--lr", "0.5"])
    assert (config.steps, config.betas, config.model.depth, config.lr) == (7, (0.8, 0.9), 3, 0.5)
    assert config.model.dim == (128,) and config.decayed == "matrices"
    assert config.to_json()["config"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "must be a file of a JSON object"),
        ("[]", "must be a file of a JSON object"),
        (None, "no such file"),
        ('{"steps": "many"}', "steps cannot be 'many'"),
        ('{"betas": [1]}', "betas cannot be [1]"),
        ('{"model": 3}', "not the settings of a run"),
        ('{"stepps": 3, "model": {"width": 4}}', "there is no setting stepps, width"),
    ],
)
def test_a_file_of_something_else(tmp_path, capsys, content, message):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    command = ["train", "--preset", "cpu", "--config", str(file), "--out", str(tmp_path / "new")]
    assert main(command) == 1
    error = error_of(capsys)
    assert error.startswith(f"--config {file}: ") and message in error
    assert not (tmp_path / "new").exists()


def test_settings_of_a_run_that_goes_on_are_its_own(run, capsys):
    assert resume(run, "--config", str(run / "run.json")) == 1
    assert "is for a run that begins; --resume has the run's settings" in error_of(capsys)


def test_all_flags_survive_json():
    flags = (
        "--schedule wsd --warmup 3 --min-lr 0 --weight-decay 0.2 --betas 0.8 0.9 --grad-clip None"
        " --optimizer muon --level-lr 1 0.5 --ema 0.9 --keep 4 --no-keep-best --sample-every 5"
        " --log wandb"
    )
    config, _ = parse([*TINY, *flags.split()])
    written = json.loads(json.dumps(config.to_json()))
    assert Config.from_json(written) == config
    assert "decayed" not in written["defaults"]  # what an older version would do otherwise


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ema 1", "--ema must be in [0, 1) or None, got 1.0"),
        ("--keep 0", "--keep must be at least 1, got 0"),
        ("--sample-every 0", "--sample-every must be at least 1, got 0"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(TrainError) as raised:
        parse([*TINY, *flags.split()])
    assert str(raised.value) == message


# loggers


def test_tensorboard_has_the_rows(text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert train(text, out, "--log", "tensorboard", "--steps", "8") == 0
    assert resume(out / "checkpoints" / "step-000006", "--steps", "12") == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "val_bits_per_byte", "grad_norm", "lr"):
        there = {event.step: event.value for event in events.Scalars(name)}
        expected = {row["step"]: row[name] for row in read(out / "metrics.jsonl") if name in row}
        assert there == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def tools(monkeypatch):
    """Stand-ins for loggers that are not installed: they write down what they are told."""
    calls, here = [], lambda name: name in ("tensorboard", "wandb")

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, step, value))

        flush = lambda self: calls.append("flush")
        close = lambda self: calls.append("close")

    modules = {"torch.utils.tensorboard": ModuleType("tb"), "wandb": ModuleType("wandb")}
    modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    run = SimpleNamespace(
        log=lambda row, step: calls.extend((name, step, value) for name, value in row.items()),
        finish=lambda: calls.append("close"),
    )
    modules["wandb"].init = lambda **options: calls.append(("open", options)) or run
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("shtx.train.loggers.find_spec", here)
    return calls


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_tools_are_told_the_rows(text, tmp_path, tools, kind):
    out = tmp_path / "run"
    assert train(text, out, "--log", kind) == 0
    opened, *calls = tools
    if kind == "tensorboard":
        assert opened == ("open", str(out / "tensorboard"), 0)
    else:
        options = opened[1]
        assert options["id"] == load(out).config["id"] and options["resume"] == "allow"
        assert options["dir"] == str(out) and options["config"]["lr"] == 6e-3
    assert calls[-1] == "close"
    told = {call for call in calls if isinstance(call, tuple)}
    expected = {(n, r["step"], v) for r in read(out / "metrics.jsonl") for n, v in r.items()}
    assert told == {(name, step, value) for name, step, value in expected if name != "step"}
    tools.clear()
    assert resume(out, "--steps", "14") == 0
    assert all(call[1] > 12 for call in tools[1:] if isinstance(call, tuple))
    assert kind == "wandb" or tools[0][2] == 13


def test_a_tool_that_is_not_installed(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shtx.train.loggers.find_spec", lambda name: None)
    assert train(text, tmp_path / "run", "--log", "wandb") == 1
    assert error_of(capsys) == '--log wandb: not installed: pip install "shtx[wandb]"\n'
    assert not (tmp_path / "run").exists()


def test_event_files_of_others(text, tmp_path, capsys):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    assert train(text, tmp_path / "run") == 1
    assert "holds tensorboard, which the run would replace" in error_of(capsys)


# speed


def test_operations_of_a_step():
    """They are those of forward and backward over a batch: at most about six a weight and byte."""
    config, _ = parse(TINY)
    model = build(config, CPU)
    ids = torch.randint(0, 256, (config.batch_size, 33))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(ids, return_loss=True)[0].backward()
    assert speed.flops_of(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_utilization(text, tmp_path, monkeypatch):
    monkeypatch.setattr("shtx.train.loop.peak_of", lambda device, precision: 1e9)
    assert train(text, tmp_path / "run") == 0
    config = Config.from_json(load(tmp_path / "run").config["run"])
    for row in read(tmp_path / "run" / "metrics.jsonl"):
        if "mfu" in row:
            steps_per_second = row["tokens_per_second"] / (4 * 32)
            assert row["mfu"] == pytest.approx(speed.flops_of(config) * steps_per_second / 1e9)
    assert sum("mfu" in row for row in read(tmp_path / "run" / "metrics.jsonl")) == 12


@pytest.mark.parametrize(
    "name, precision, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "tf32", 378e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("GeForce 8800", "bf16-mixed", None),
    ],
)
def test_peaks(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert speed.peak_of(torch.device("cuda"), precision) == peak
    assert speed.peak_of(CPU, precision) is None
