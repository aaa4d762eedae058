"""Checkpoints of other versions, of other makers, and of nobody's good will: one line each."""

import io
import json
import os
import shutil
import struct

import pytest
import torch
from running import change_config, change_state, resume, rows, write

from shtx.cli import main

GIGANTIC = {"a": {"dtype": "F32", "shape": [1 << 42], "data_offsets": [0, 1 << 44]}}


@pytest.fixture
def step(run, tmp_path):
    """The only checkpoint of a run that goes on from it."""
    part = tmp_path / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints" / "step-000012")
    return part / "checkpoints" / "step-000008"


def one_line(capsys, status, verb="train"):
    output = capsys.readouterr()
    assert status == 1 and output.err.startswith(f"shtx {verb}: error: "), output.err
    assert output.err.count("\n") == 1 and output.err[:-1].isprintable()
    return output.err


def header(tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def fifo(step):
    (step / "config.json").unlink()
    os.mkfifo(step / "config.json")


def sparse(step):
    os.truncate(step / "model.safetensors", 1 << 40)


def setting(**values):
    return lambda step: change_config(step, lambda config: config["run"].update(values))


def of_model(**values):
    return lambda step: change_config(step, lambda config: config["run"]["model"].update(values))


def moment(step):
    state = lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))
    change_state(step, state)


def manifest(content):
    return lambda step: (step / "manifest.json").write_bytes(content)


DAMAGE = {
    "a manifest that is a list": (manifest(b"[]"), "manifest.json: damaged: not the JSON"),
    "a manifest without end": (manifest(b"[" * 100_000), "manifest.json: damaged: not the JSON"),
    "a manifest of strings": (manifest(b'{"config.json": "x"}'), "damaged: its size is not"),
    "a manifest of other paths": (manifest(b'{"../../../etc/passwd": {}}'), "damaged: its size"),
    "a pipe": (fifo, "config.json: damaged: "),
    "a terabyte": (sparse, "model.safetensors: damaged: its size is not that in manifest.json"),
    "no header": (lambda s: write(s, "model.safetensors", b""), "model.safetensors: damaged: "),
    "a header of 16 TB": (
        lambda s: write(s, "model.safetensors", header(GIGANTIC)),
        "model.safetensors: damaged: ",
    ),
    "a header without end": (
        lambda s: write(s, "model.safetensors", b"\xff" * 8 + b"{}"),
        "model.safetensors: damaged: ",
    ),
    "other weights": (lambda s: write(s, "model.safetensors", header({})), "does not fit its"),
    "a pickle": (lambda s: write(s, "optimizer.pt", pickled(Evil())), "optimizer.pt: refused: "),
    "no pickle": (lambda s: write(s, "optimizer.pt", b"\x80\x04"), "optimizer.pt: "),
    "a list": (lambda s: write(s, "optimizer.pt", pickled([1])), "optimizer.pt: damaged: not"),
    "no optimizer": (lambda s: write(s, "optimizer.pt", pickled({})), "does not fit its settings"),
    "moments of others": (moment, "does not fit its settings: moments that"),
    "a list of settings": (
        lambda s: write(s, "config.json", b"[]"),
        "config.json: damaged: not the JSON",
    ),
    "another step": (
        lambda s: change_config(s, lambda c: c.update(step=9)),
        "config.json: damaged: its step is 9",
    ),
    "no settings": (lambda s: change_config(s, lambda c: c.pop("run")), "not the settings of a"),
    "no data": (lambda s: change_config(s, lambda c: c.pop("data")), "damaged: no identity"),
    "words for numbers": (setting(batch_size="many"), "damaged: batch_size cannot be 'many'"),
    "an escape": (setting(device="\x1b]0;evil\x07\n"), "\\x1b]0;evil\\x07"),
    "a precision of others": (setting(precision="fp8"), "damaged: precision cannot be 'fp8'"),
    "a width of lists": (of_model(dim=[[16]]), "damaged: dim cannot be [[16]]"),
    "a width beyond memory": (of_model(dim=[10**6]), "out of memory: "),
    "a width beyond numbers": (of_model(dim=[10**30]), "error: "),
    "a depth beyond patience": (of_model(depth=10**9), "--depth must be at most 10,000"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_one_line(step, tmp_path, monkeypatch, capsys, damage, message):
    monkeypatch.chdir(tmp_path)
    damage(step)
    before = sorted(tmp_path.rglob("*"))
    assert message in one_line(capsys, resume(step.parents[1]))
    assert sorted(tmp_path.rglob("*")) == before
    if "optimizer" in message or "precision" in message or "batch" in message:
        return
    generate = ["generate", "--checkpoint", str(step), "--prompt", "x", "--length", "1"]
    if (status := main(generate)) != 0:
        one_line(capsys, status, "generate")


def test_setting_of_a_later_version(step, capsys):
    def later(config):
        config["run"]["lr_floor"] = 0.1
        config["versions"]["shtx"] = "7.0.0"

    change_config(step, later)
    error = one_line(capsys, resume(step.parents[1]))
    assert "config.json: written by shtx 7.0.0, this is shtx " in error
    assert "settings that this one does not know: lr_floor=0.1\n" in error
    change_config(step, lambda config: config["run"]["defaults"].append("lr_floor"))
    assert resume(step.parents[1]) == 0


def test_setting_that_an_earlier_version_did_not_have(run, step, capsys):
    def earlier(config):
        for name in ("defaults", "schedule", "curve", "log_every", "resume_fallback"):
            config["run"].pop(name, None)
        del config["run"]["model"]["recon_loss_weight"]

    change_config(step, earlier)
    assert resume(step.parents[1]) == 0
    assert rows(step.parents[1]) == rows(run)


def test_setting_that_is_missing(step, capsys):
    change_config(step, lambda config: (config["run"].pop("lr"), config["run"]["model"].pop("dim")))
    error = one_line(capsys, resume(step.parents[1]))
    assert "settings that this one needs, and which are missing: dim, lr\n" in error


def test_lines_of_others_in_the_metrics_stay(run, step):
    part = step.parents[1]
    notes = ["null", "[]", '{"note": "mine"}', '{"step": "x"}', '{"step": 3, "loss": "x"}', "3"]
    with open(part / "metrics.jsonl", "a") as file:
        file.writelines(f"{note}\n" for note in notes)
        file.write('{"step": 9, "lo')  # not lived to be finished
    assert resume(part) == 0
    assert rows(part) == rows(run)
    assert [n for n in notes if n in (part / "metrics.jsonl").read_text().splitlines()] == notes


def test_metrics_that_are_a_pipe(step, capsys):
    """A pipe never ends, so it must not be read."""
    metrics = step.parents[1] / "metrics.jsonl"
    metrics.unlink()
    os.mkfifo(metrics)
    error = one_line(capsys, resume(step.parents[1]))
    assert f"error: {metrics}: damaged: not a regular file" in error


def test_what_nobody_thought_of(text, run, tmp_path, monkeypatch, capsys):
    """A line, and all of it with --traceback."""
    from running import train

    def fail(*_):
        raise ZeroDivisionError("by zero\x1b\nand more")

    monkeypatch.setattr("shtx.train.run.summary", fail)
    error = one_line(capsys, train(text, tmp_path / "run"))
    assert error.endswith("error: ZeroDivisionError: by zero\\x1b (--traceback shows where)\n")
    assert train(text, tmp_path / "run", "--traceback") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback ") and f"{lines[-1]}\n" == error
    assert main(["info", "--traceback"]) == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_wherever_it_is(run, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("shtx.train.run.build", fail)
    monkeypatch.setattr("shtx.train.trainer.build", fail)
    assert "out of memory: lower --batch-size" in one_line(capsys, resume(run))
    status = main(["generate", "--checkpoint", str(run), "--prompt", "x"])
    assert "out of memory: shorten --prompt" in one_line(capsys, status, "generate")


@pytest.mark.parametrize(
    "place",
    ["Trainer.restore", "Trainer.compile", "Trainer.evaluate", "Trainer.state", "Trainer.sample"],
)
def test_out_of_memory_at_any_time_of_a_run(step, monkeypatch, capsys, place):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"shtx.train.trainer.{place}", fail)
    assert "out of memory: lower --batch-size" in one_line(capsys, resume(step))


def test_warnings_are_lines(text, tmp_path, capsys):
    from running import train

    assert train(text, tmp_path / "run", "--window-sizes", "8", "99", "--steps", "1") == 0
    assert capsys.readouterr().err == (
        "shtx train: warning: window_sizes: 99 is more than the 8 tokens of hierarchy 4"
        " (seq_len 32); it gets full attention\n"
    )
