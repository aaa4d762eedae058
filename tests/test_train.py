import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, child_environment
from running import TINY, change_config, change_state, resume, rows, train

from shtx import HierarchicalTransformer
from shtx.train import TrainError
from shtx.train.arguments import parse
from shtx.train.checkpoint import load
from shtx.train.config import Config, Model
from shtx.train.data import Corpus
from shtx.train.metrics import BYTE, Metrics, read
from shtx.train.presets import PRESETS
from shtx.train.run import place
from shtx.train.stop import Stop
from shtx.train.store import Store
from shtx.train.trainer import Trainer, build, learning_rate

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def assert_same_end(run, other):
    """Assert that two runs have the same weights, state and rows, to the last bit."""
    for name in ("model.safetensors", "optimizer.pt"):
        a, b = (load(path).path / name for path in (run, other))
        assert a.read_bytes() == b.read_bytes(), name
    assert load(run).step == load(other).step
    assert rows(run) == rows(other)


# the course of a run


def test_metrics(run):
    metrics = read(run / "metrics.jsonl")
    losses = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 13))
    told = {"step", "lr", "loss", "bits_per_byte", "tokens_per_second", "tokens", "grad_norm"}
    assert losses[0].keys() == told | {"reconstruction_loss", "hierarchical_ar_loss", "peak_memory"}
    for row in losses:
        auxiliary = 0.1 * row["reconstruction_loss"] + 0.25 * row["hierarchical_ar_loss"]
        assert row["bits_per_byte"] * math.log(2) + auxiliary == pytest.approx(row["loss"])
        assert row["tokens"] == row["step"] * 4 * 32 and row["grad_norm"] > 0
        assert 1e7 < row["peak_memory"] < 1e11
    assert all(0 < row["bits_per_byte"] * math.log(2) < row["loss"] for row in losses)
    validations = {
        row["step"]: row["val_bits_per_byte"] for row in metrics if "val_bits_per_byte" in row
    }
    assert list(validations) == [0, 6, 12]
    assert 7.5 < validations[0] < 9.5
    assert validations[12] < validations[6] < validations[0]


def test_plot(run):
    from matplotlib.image import imread

    picture = imread(run / "loss.png")
    assert picture.shape == (600, 1050, 4)
    assert picture[..., :3].std() > 0.05


def test_raw_data_is_not_copied(run):
    names = ["checkpoints", "loss.png", "metrics.jsonl", "run.json", "shtx.lock"]
    assert sorted(p.name for p in run.iterdir()) == names
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000008", "step-000012"]


def test_output(text, tmp_path, capsys):
    outputs = []
    for out in ("a", "b"):
        assert train(text, tmp_path / out) == 0
        outputs.append(capsys.readouterr().out)
    lines = outputs[0].splitlines()
    assert lines[0].startswith("shtx 0.1.0, torch ") and "fp32, reference ops" in lines[0]
    assert lines[3].startswith("step 0/12: validation ") and lines[3].endswith(" bits per byte")
    step = lines[5]
    assert step.startswith("step 5/12: loss ") and " tokens/s, 0:0" in step
    assert " nats, " in step and " bits per byte, " in step
    sample = [output[output.index("sample after a prompt of 32 bytes:") :] for output in outputs]
    assert sample[0].replace("/a", "/b") == sample[1]
    assert len(sample[0]) > 256


def test_seed_changes_weights_and_data(text, run, tmp_path):
    assert train(text, tmp_path / "other", "--seed", "1") == 0
    assert rows(run)[0] != rows(tmp_path / "other")[0]


def test_learning_rate():
    config = PRESETS["cpu"]
    rates = [learning_rate(config, step) for step in range(config.steps)]
    peak = max(rates)
    assert peak == config.lr and 0 < rates[0] <= config.lr / 2
    assert rates.index(peak) == round(0.05 * config.steps) - 1
    assert rates[rates.index(peak) :] == sorted(rates[rates.index(peak) :], reverse=True)
    assert 0 < rates[-1] < 0.03 * config.lr
    warmup = round(0.05 * config.steps)  # a cosine over the later steps follows
    assert rates[warmup] == pytest.approx(config.lr, rel=1e-12)
    middle = warmup + (config.steps - warmup) // 2
    angle = math.pi * (middle - warmup) / (config.steps - warmup)
    assert rates[middle] == pytest.approx(config.lr * (0.51 + 0.49 * math.cos(angle)), rel=1e-12)
    angle = math.pi * (config.steps - 1 - warmup) / (config.steps - warmup)
    assert rates[-1] == pytest.approx(config.lr * (0.51 + 0.49 * math.cos(angle)), rel=1e-12)


def test_schedule_that_falls_in_the_end():
    config = replace(PRESETS["cpu"], schedule="wsd", steps=100)
    rates = [learning_rate(config, step) / config.lr for step in range(100)]
    assert rates[4:80] == [1] * 76
    assert rates[80:] == pytest.approx([1 - 0.98 * (n + 1) / 20 for n in range(20)])
    longer = replace(config, steps=150)
    assert [learning_rate(longer, step) / config.lr for step in range(7, 120)] == [1] * 113


def test_schedule_that_is_constant():
    config = replace(PRESETS["cpu"], schedule="constant", steps=100, warmup=10)
    rates = [learning_rate(config, step) / config.lr for step in range(100)]
    assert rates == pytest.approx([(n + 1) / 10 for n in range(10)] + [1] * 90)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "minimum"])
def test_warmup_and_the_least_learning_rate(schedule):
    options = dict(schedule=schedule, steps=100, lr=0.5, warmup=0, min_lr=0.25)
    config = replace(PRESETS["cpu"], **options)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.5 and rates == sorted(rates, reverse=True)
    assert 0.25 <= rates[-1] < 0.2501
    late = replace(config, warmup=200)  # it never gets there
    assert [learning_rate(late, step) for step in (0, 99)] == [0.5 / 200, 0.25]
    with pytest.raises(TrainError, match="--min-lr must be 0 to --lr 0.5, got 1.0"):
        replace(config, min_lr=1.0)


def test_matrices_alone_decay(text):
    config, _ = parse([*TINY, "--weight-decay", "0.5", "--betas", "0.8", "0.9"])
    model = build(config, torch.device("cpu"))
    trainer = Trainer(config, Corpus(Store([text]), 32), model)
    name_of = {p: name for name, p in model.named_parameters()}
    others, matrices = trainer.optimizers.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0)
    assert matrices["betas"] == others["betas"] == (0.8, 0.9)
    kinds = {"token_emb.weight", "norms.0.bias", "layers.0.0.attn.norm.weight"}
    assert kinds <= {name_of[p] for p in others["params"]}
    assert all(p.ndim == 1 or name_of[p] == "token_emb.weight" for p in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(name_of)


def test_learning_rates_of_levels(text):
    """Muon has them, too; a weight that belongs to no level alone keeps the whole rate."""
    config, _ = parse([*TINY, "--optimizer", "muon", "--level-lr", "1", "0.5"])
    model = build(config, torch.device("cpu"))
    trainer = Trainer(config, Corpus(Store([text]), 32), model)
    trainer.step(0)
    rates = {}
    for optimizer in trainer.optimizers.all:
        for group in optimizer.param_groups:
            rate = type(optimizer).__name__, group["lr"] / learning_rate(config, 0)
            rates |= dict.fromkeys(group["params"], rate)
    weight = lambda name: rates[model.get_parameter(name)]
    assert weight("layers.0.0.ff.net.1.weight") == ("Muon", 1)
    assert weight("layers.0.1.ff.net.1.weight") == ("Muon", 0.5)
    assert weight("layers.0.1.ff.net.0.gamma") == ("AdamW", 0.5)
    for name in ("compressors.1.to_recon", "norms.1", "to_hierarchical_preds.1"):
        assert weight(f"{name}.weight") == ("AdamW", 0.5)
    for name in ("token_emb", "norms.0", "hierarchical_merges.0.net.1", "to_logits"):
        assert weight(f"{name}.weight") == ("AdamW", 1)
    assert len(rates) == len(list(model.parameters()))


def test_gradients_that_are_not_clipped(text, run, tmp_path):
    for clip in ("None", "1e9", "1e-3"):
        assert train(text, tmp_path / clip, "--grad-clip", clip) == 0
    curves = [[r["loss"] for r in rows(tmp_path / clip) if "loss" in r] for clip in ("None", "1e9")]
    assert curves[0] == curves[1]
    assert rows(tmp_path / "1e-3") != rows(tmp_path / "None")


def test_schedule_that_ends_at_its_minimum():
    config = replace(PRESETS["cpu"], schedule="minimum", steps=150, curve=100)
    cosine = replace(config, schedule="cosine", steps=100, curve=None)
    assert [learning_rate(config, step) for step in range(100)] == [
        learning_rate(cosine, step) for step in range(100)
    ]
    assert [learning_rate(config, s) for s in range(100, 150)] == pytest.approx(
        [0.02 * config.lr] * 50
    )


def test_bits_per_byte(text):
    """Mean cross entropy of every byte after the first of every window, over ln 2."""
    config, _ = parse([*TINY, "--batch-size", "3"])  # 8 windows: the last share is a smaller one
    corpus = Corpus(Store([text]), config.model.seq_len)
    model = build(config, torch.device("cpu"))
    windows = torch.from_numpy(corpus.windows(8)).long()
    with torch.no_grad():
        nats = F.cross_entropy(model(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
    assert Trainer(config, corpus, model).evaluate() == pytest.approx(
        nats.item() / math.log(2), rel=1e-6
    )


def test_sample_repeats(text):
    config, _ = parse(TINY)
    model = build(config, torch.device("cpu"))
    trainer = Trainer(config, Corpus(Store([text]), config.model.seq_len), model)
    assert trainer.sample() == trainer.sample()


def test_byte_0_counts(text):
    config, _ = parse(TINY)
    model = build(config, torch.device("cpu"))
    with torch.no_grad():
        _, (ce, *_) = model(torch.zeros(1, 9, dtype=torch.long), return_loss=True)
    assert ce > 1


@pytest.mark.parametrize("precision", ["tf32", "bf16-mixed", "fp16-mixed"])
def test_precisions(text, run, tmp_path, precision):
    before = torch.get_float32_matmul_precision()
    try:
        assert train(text, tmp_path / "run", "--precision", precision) == 0
        assert torch.get_float32_matmul_precision() == (
            "high" if precision == "tf32" else "highest"
        )
    finally:
        torch.set_float32_matmul_precision(before)
    ours, fp32 = ([row.get("loss", 0) for row in rows(path)] for path in (tmp_path / "run", run))
    assert ours == pytest.approx(fp32, rel=2e-2)
    assert (ours == fp32) == (precision == "tf32")  # on a CPU


def test_bytes_are_shown_as_text_or_escapes():
    show = lambda text: BYTE.show([*text])
    assert show("naïve [b]\tx\n".encode()) == "naïve [b]\tx\n"
    assert show(b"\xff\x00\x1b[2J\r\x7f\xc3") == r"\xff\x00\x1b[2J\r\x7f\xc3"


# resuming


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--precision {precision}" for precision in ("fp32", "bf16-mixed", "fp16-mixed")),
        "--optimizer muon --level-lr 1 0.5 --accumulate 2 --schedule wsd",
    ],
)
def test_resume_is_bit_identical(text, tmp_path, flags):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(text, whole, *flags.split()) == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000012")  # killed at step 11, metrics and all
    assert resume(part) == 0
    assert_same_end(whole, part)


def test_resume_of_an_older_step(text, run, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # killed while it wrote
    assert resume(part / "checkpoints" / "step-000008") == 0
    assert_same_end(run, part)


def test_resume_with_the_scaler_where_it_was(text, tmp_path):
    assert train(text, tmp_path / "run", "--precision", "fp16-mixed") == 0
    scale = load(tmp_path / "run").state["scaler"]
    assert scale["scale"] == 65536.0 and scale["_growth_tracker"] == 12


@pytest.mark.parametrize("schedule", ["cosine", "minimum"])
def test_more_steps(text, tmp_path, run, capsys, schedule):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    assert resume(part, "--steps", "14", "--schedule", schedule) == 0
    output, last = capsys.readouterr().out, rows(part)[-2]["lr"]
    assert ("learning rate jumps from 2.39e-04 to 4.57e-04" in output) == (schedule == "cosine")
    if schedule == "minimum":
        assert last == pytest.approx(0.02 * 0.006)
        assert resume(part, "--steps", "20") == 0  # as it goes on from there
        assert {r["lr"] for r in rows(part) if r["step"] > 12 and "lr" in r} == {last}
        return
    assert load(part).step == 14
    assert [row["step"] for row in rows(part) if "loss" in row] == list(range(1, 15))
    assert rows(part)[: len(rows(run))] == rows(run)


def test_learning_rate_that_jumps_is_told_before_the_first_step(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "part")
    assert resume(tmp_path / "part", "--steps", "40") == 0
    output = capsys.readouterr().out
    told = output.index("the learning rate jumps from 2.39e-04 to 5.05e-03, as")
    assert told < output.index("step 15/40") and "; --schedule minimum goes on" in output


def test_resume_of_a_finished_run_changes_nothing(run, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    assert resume(part) == 0
    assert "sample after" in capsys.readouterr().out
    assert_same_end(run, part)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--lr 0.5", "--lr 0.5 is not the run's 0.006"),
        ("--dim 32", "--dim (32,) is not the run's (16,)"),
        ("--window-sizes None", "--window-sizes (None,) is not the run's (8, None)"),
        ("--seed 3", "--seed 3 is not the run's 0"),
        ("--optimizer muon", "--optimizer muon is not the run's adamw"),
        ("--level-lr 2", "--level-lr (2.0,) is not the run's (1.0,)"),
        ("--betas 0.8 0.9", "--betas (0.8, 0.9) is not the run's (0.9, 0.95)"),
        ("--weight-decay 0", "--weight-decay 0.0 is not the run's 0.1"),
        ("--steps 11", "--steps 11 is less than the run's 12"),
        ("--data missing", "--data missing: no such file"),
        ("--eval-sequences 100000", "--eval-sequences 100000: the validation data has 5,527 diff"),
    ],
)  # fmt: skip
def test_resume_refuses_changes(run, capsys, arguments, message):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert resume(run, *arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shtx train: error: {message}") and error.count("\n") == 1
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_resume_takes_flags_that_say_the_same(run, tmp_path, text):
    shutil.copytree(run, tmp_path / "part")
    assert resume(tmp_path / "part", *TINY, "--data", str(text)) == 0


def test_resume_on_another_machine(run, tmp_path, capsys):
    """Neither these flags nor the options of a GPU's optimizer change what a run learns."""
    part = tmp_path / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints" / "step-000012")
    step = part / "checkpoints" / "step-000008"
    change_config(step, lambda config: config["run"].update(device="cuda:7", impl="fused"))
    change_state(step, lambda state: state["optimizer"]["param_groups"][0].update(capturable=True))
    assert resume(part) == 1
    error = capsys.readouterr().err
    assert "--device cuda:7: " in error and "; --device cpu needs none" in error
    free = "--device cpu --impl reference --log-every 1 --eval-every 3 --save-every 2"
    assert resume(part, *free.split(), "--eval-sequences", "4") == 0
    assert load(part).path.name == "step-000012"
    for name in ("model.safetensors", "optimizer.pt"):
        ours, theirs = (path / "checkpoints/step-000012" / name for path in (part, run))
        assert ours.read_bytes() == theirs.read_bytes()


def test_resume_of_a_run_from_before_all_of_these_settings(text, tmp_path, monkeypatch):
    """All of its weights decay, and its schedule that falls in the end is called constant."""
    settings = replace(PRESETS["cpu"], decayed="all")
    monkeypatch.setitem(PRESETS, "cpu", settings)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(text, whole, "--schedule", "wsd") == 0
    assert len(load(whole).state["optimizer"]["param_groups"]) == 1
    monkeypatch.undo()
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000012")

    def earlier(config):
        for name in ("warmup", "min_lr", "weight_decay", "decayed", "betas", "grad_clip"):
            del config["run"][name]
        config["run"]["schedule"] = "constant"

    change_config(part / "checkpoints" / "step-000008", earlier)
    assert resume(part) == 0
    assert_same_end(whole, part)
    assert load(part).config["run"]["schedule"] == "wsd"


def test_resume_refuses_other_data(run, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"x" * 5000)
    assert resume(run, "--data", str(tmp_path / "text")) == 1
    assert "the bytes changed since the run began" in capsys.readouterr().err


def test_resume_of_a_damaged_checkpoint(run, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    older, newer = sorted((part / "checkpoints").iterdir())
    (newer / "optimizer.pt").write_bytes(b"")
    assert resume(part) == 1
    error = capsys.readouterr().err
    assert f"{newer / 'optimizer.pt'}: damaged" in error and f"an older step is {older}" in error
    shutil.copytree(part, tmp_path / "again")
    assert resume(older) == 0
    assert_same_end(run, part)

    part = tmp_path / "again"
    assert resume(part, "--resume-fallback") == 0
    output = capsys.readouterr().out
    assert "optimizer.pt: damaged: " in output and "; kept as step-000012.damaged; going" in output
    assert_same_end(run, part)
    kept = part / "checkpoints" / "step-000012.damaged"
    assert (kept / "optimizer.pt").read_bytes() == b""
    assert load(part).config["run"]["resume_fallback"] is False
    for step in part.glob("checkpoints/step-0000??"):
        (step / "manifest.json").unlink()
    assert resume(part, "--resume-fallback") == 1
    assert "step-000008/manifest.json: missing; no older step" in capsys.readouterr().err


# stopping


@pytest.fixture
def one_thread():
    """Train with one thread, as ENVIRONMENT does: sums in another order have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_a_resumed_run_goes_on(text, tmp_path, one_thread, signum):
    arguments = [*TINY, "--data", str(text), "--steps", "100", "--log-every", "1"]
    command = [sys.executable, "-m", "shtx", "train", *arguments, "--out", str(tmp_path / "part")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        for line in process.stdout:
            if line.startswith("step 6/100: loss"):
                process.send_signal(signum)
                break
        output = process.stdout.read()
    assert process.returncode == 128 + signum
    assert output.endswith(
        f"stopped and saved; to go on: shtx train --resume {tmp_path / 'part'}\n"
    )
    assert 6 <= load(tmp_path / "part").step < 100
    assert resume(tmp_path / "part") == 0
    assert train(text, tmp_path / "whole", "--steps", "100", "--log-every", "1") == 0
    assert_same_end(tmp_path / "whole", tmp_path / "part")


def test_second_interrupt_is_not_held_back():
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    "poisoned, complaint", [("loss", "loss nan"), ("norm", "gradient norm inf")]
)
def test_not_finite(text, tmp_path, monkeypatch, capsys, poisoned, complaint):
    step = Trainer.step

    def poison(self, number):
        loss, ce, norm, *parts = step(self, number)
        if number == 7:  # the eighth, after which a checkpoint is due
            loss, norm = (loss * math.nan, norm) if poisoned == "loss" else (loss, norm * math.inf)
        return torch.stack((loss, ce, norm, *parts))

    monkeypatch.setattr(Trainer, "step", poison)
    assert train(text, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("shtx train: error: step 8: loss ") and complaint in error
    assert error.count("\n") == 1
    assert load(tmp_path / "run").step == 6  # the best validation's
    assert rows(tmp_path / "run")[-1]["step"] == 7


def test_weights_that_are_not_finite_are_not_saved(text, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def poison(self, number):
        losses = step(self, number)
        if number == 7:
            self.model.to_logits.weight.data[0, 0] = math.inf
        return losses

    monkeypatch.setattr(Trainer, "step", poison)
    assert train(text, tmp_path / "run") == 1
    assert "step 8: a weight is not finite: stopped" in capsys.readouterr().err
    assert load(tmp_path / "run").step == 6  # the best validation's


def test_overflow_in_fp16_is_skipped(text, tmp_path, monkeypatch):
    config, _ = parse([*TINY, "--precision", "fp16-mixed"])
    trainer = Trainer(config, Corpus(Store([text]), 32), build(config, torch.device("cpu")))
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    before = trainer.model.to_logits.weight.clone()
    loss, _, norm, *_ = trainer.step(0)
    assert loss.isfinite() and not norm.isfinite()
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.model.to_logits.weight.equal(before)


# wrong settings


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--batch-size -1", "--batch-size must be at least 1, got -1"),
        ("--lr 0", "--lr must be positive and finite, got 0.0"),
        ("--lr nan", "--lr must be positive and finite, got nan"),
        ("--warmup -1", "--warmup must be at least 0 or None, got -1"),
        ("--min-lr 0.1", "--min-lr must be 0 to --lr 0.006, got 0.1"),
        ("--weight-decay -1", "--weight-decay must be at least 0 and finite, got -1.0"),
        ("--level-lr 1 2 3", "--level-lr must be one number, or 2, one for each of --hierarchies"),
        ("--level-lr 1 -1", "--level-lr must be one number, or 2, one for each of --hierarchies"),
        ("--optimizer muon --precision fp16-mixed", "--optimizer must be adamw for fp16-mixed"),
        ("--betas 0.9 1", "--betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        ("--grad-clip 0", "--grad-clip must be above 0 or None, got 0.0"),
        ("--seed -1", "--seed must be in [0, 2^63), got -1"),
        ("--device tpu9", "--device must be cpu, cuda or cuda:N, got tpu9"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--depth 10001", "--depth must be at most 10,000, got 10001"),
        ("--dim 1000000", "out of memory: 35,001,688,000,000 parameters need 560,0"),
        ("--hierarchical-stride 2 4 --hierarchies 2 4 --hierarchy-merge-all", "--hierarchical-str"),
        ("--eval-sequences 100000", "--eval-sequences 100000: the validation data has 5,527 diff"),
        ("--hierarchies 1 3", "hierarchies must be a power of two, got 3"),
        ("--dim 16 16 16", "dim must be one value or 2 (one for each of hierarchies), got 3"),
        ("--seq-len 100000", "--data: "),
        ("--data missing", "--data missing: no such file"),
        ("--resume missing", f"{Path('missing').absolute()}: no checkpoint there"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line_and_leave_nothing(text, tmp_path, capsys, arguments, message):
    assert train(text, tmp_path / "run", *arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shtx train: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fused_where_it_cannot_run(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shtx.ops.why_not_fused", lambda device: "there is no such thing")
    assert train(text, tmp_path / "run", "--impl", "fused") == 1
    assert 'impl="fused" cannot run: there is no such thing' in capsys.readouterr().err


def test_out_that_holds_a_run(text, run, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert train(text, run) == 1
    assert f"--out {run}: holds a run; continue it with --resume {run}" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("out, message", [("file", "File exists"), ("file/run", "Not a directory")])
def test_out_that_cannot_be_made(text, tmp_path, capsys, out, message):
    (tmp_path / "file").write_text("mine")
    assert train(text, tmp_path / out) == 1
    assert f"--out {tmp_path / out}: {message}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_out_that_is_not_writable(text, tmp_path, capsys, monkeypatch):
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert train(text, tmp_path / "run") == 1
    assert f"--out {tmp_path / 'run'}: not writable" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_survive_json():
    for config in PRESETS.values():
        config = replace(config, data=tuple(path.resolve() for path in config.data))
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("objective", ["hierarchical-ar", "next-latent"])
def test_model_has_every_argument_of_the_transformer(objective):
    model = replace(PRESETS["cpu"].model, objective=objective)
    accepted = inspect.signature(model.kind.__init__).parameters
    given = model.arguments().keys()
    assert accepted.keys() - given <= {"self", "use_flash_attn", "impl", "chunk_summarizers"}
    assert given <= accepted.keys()
    defaults = {f.name: f.default for f in Model.__dataclass_fields__.values()}
    required = ("num_tokens", "dim", "depth", "seq_len", "hierarchies")
    for name, parameter in accepted.items():
        if name in defaults and name not in required:
            ours = defaults[name]
            assert (ours[0] if isinstance(ours, tuple) else ours) == parameter.default, name


def test_objective_of_nothing_weighs_nothing():
    model = replace(PRESETS["cpu"].model, objective="none")
    assert model.arguments()["hierarchical_ar_loss_weight"] == 0
    assert model.kind is HierarchicalTransformer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--num-rollouts", "2"],
            "--num-rollouts has no effect with --objective hierarchical-ar: it takes next-latent",
        ),
        (
            ["--objective", "none", "--hierarchical-ar-loss-weight", "0.5"],
            "--hierarchical-ar-loss-weight has no effect with --objective none: it takes hier",
        ),
    ],
)
def test_settings_of_another_objective(arguments, message):
    with pytest.raises(TrainError, match=message):
        parse(["--preset", "cpu", *arguments])


def test_metrics_drop_later_rows(tmp_path):
    metrics = Metrics(tmp_path / "m", 0)
    for step in range(5):
        metrics.append(step=step)
    Metrics(tmp_path / "m", 2).append(step=9)
    assert [row["step"] for row in read(tmp_path / "m")] == [0, 1, 2, 9]


def test_first_word_is_before_the_data_is_read(text, tmp_path, monkeypatch, capsys):
    identify, seen = Store._identify, []
    monkeypatch.setattr("shtx.train.data.LARGE", 1)

    def spy(corpus):
        seen.append(capsys.readouterr().out)
        return identify(corpus)

    monkeypatch.setattr(Store, "_identify", spy)
    assert train(text, tmp_path / "run", "--steps", "1") == 0
    lines = seen[0].splitlines()
    assert len(seen) == 1 and lines[0].startswith("shtx ")
    assert lines[2] == f"reading 0.0 GB of {text}"


def test_disk_is_looked_at_before_training(text, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert train(text, tmp_path / "run") == 1
    assert capsys.readouterr().err == (
        f"shtx train: error: --out {tmp_path / 'run'}: checkpoints need 0.002 GB more, 0.001 GB"
        " are free on its disk\n"
    )
    assert not (tmp_path / "run").exists()


def test_data_that_changes_meanwhile_costs_no_step(text, run, tmp_path, monkeypatch, capsys):
    data = tmp_path / "text"
    shutil.copyfile(text, data)
    step = Trainer.step

    def change(self, number):
        if number == 7:
            data.write_bytes(data.read_bytes()[:-9])
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", change)
        assert train(data, tmp_path / "part") == 1
    error = capsys.readouterr().err
    assert "the bytes changed while the run went on" in error and error.count("\n") == 1
    assert load(tmp_path / "part").step == 7
    assert resume(tmp_path / "part", "--data", str(text)) == 0
    assert rows(tmp_path / "part") == rows(run)


# several processes

WORKER = """
import sys, weakref, torch
from shtx.cli import main
from shtx.train import run

fit, leave = run.fit, torch.distributed.destroy_process_group

def fit_and_keep(trainer, *rest):
    global step
    step = weakref.ref(trainer.train_step)
    signum = fit(trainer, *rest)
    torch.save(trainer.model.state_dict(), f"{sys.argv[1]}-{trainer.rank}")
    return signum

def leave_after_it():
    assert step() is None, "NCCL would wait for its graphs"
    leave()

run.fit, torch.distributed.destroy_process_group = fit_and_keep, leave_after_it
sys.exit(main(sys.argv[2:]))
"""


def test_two_processes_are_one(text, tmp_path):
    """Two processes with half the batch each make the steps of one with all of it, in halves."""
    one = tmp_path / "one"
    assert train(text, one, "--accumulate", "2") == 0
    (tmp_path / "worker.py").write_text(WORKER)
    weights, out = tmp_path / "weights", tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    arguments = ["train", *TINY, "--data", str(text), "--out", str(out), "--shard", "optimizer"]
    done = subprocess.run(
        [*command, tmp_path / "worker.py", weights, *arguments],
        capture_output=True, text=True, env=child_environment(ROOT, OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample after") == 1

    first, second = (torch.load(f"{weights}-{rank}") for rank in (0, 1))
    assert all(first[name].equal(second[name]) for name in first)
    weights = load(one).weights
    for name in weights:
        assert (first[name] - weights[name]).norm() <= 1e-6 * weights[name].norm(), name
    for ours, row in zip(rows(out), rows(one), strict=True):
        assert ours == pytest.approx(row, rel=1e-6)

    # its checkpoint is as one process writes it
    states = [load(run).state["optimizer"] for run in (out, one)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[1]["state"].items():
        for name, value in state.items():
            assert (states[0]["state"][index][name] - value).norm() <= 1e-5 * value.norm(), name


def test_what_fp16_has_not():
    with pytest.raises(TrainError, match="--shard must be none for fp16-mixed, got optimizer"):
        parse([*TINY, "--precision", "fp16-mixed", "--shard", "optimizer"])


def test_muon_has_no_parts(monkeypatch):
    flags = ("--optimizer", "muon", "--shard", "full")
    place(parse([*TINY, *flags])[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="got full; --optimizer adamw takes all three"):
        place(parse([*TINY, *flags])[0])


def test_batch_that_the_processes_cannot_share(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        TrainError, match="--batch-size must be a multiple of the 3 processes times .* 1, got 4"
    ):
        place(parse(TINY)[0])
