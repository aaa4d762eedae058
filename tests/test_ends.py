"""Commands end well after signals in every phase, and where output cannot be written."""

import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
from pkgutil import resolve_name

import pytest
from helpers import ROOT, child_environment
from running import TINY, resume, rows, train

from shtx.cli import EndAtOnce, main
from shtx.train.checkpoint import load
from shtx.train.loop import Metrics
from shtx.train.stop import Stop
from shtx.train.trainer import Trainer

PHASES = {
    "settings": ("shtx.train.run.parse", 1),
    "building": ("shtx.train.run.build", 1),
    "data": ("shtx.train.store.Store._identify", 1),
    "compiling": ("shtx.train.trainer.Trainer.compile", 1),
    "first validation": ("shtx.train.trainer.Corpus.windows", 1),
    "validation": ("shtx.train.trainer.Corpus.windows", 3),
    "a step": ("shtx.train.trainer.Trainer.step", 7),
    "a save": ("shtx.train.loop.save", 1),
    "the last save": ("shtx.train.loop.save", 3),
    "plot": ("shtx.train.run.plot", 1),
    "sample": ("shtx.train.trainer.Trainer.sample", 1),
}


SIGNALS = itertools.cycle([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


@pytest.mark.parametrize("phase, signum", zip(PHASES, SIGNALS, strict=False))
def test_signal(text, run, tmp_path, monkeypatch, capsys, phase, signum):
    """One line, 128 and its number, and a run that goes on to the same end."""
    place, turn = PHASES[phase]
    module, name = place.rsplit(".", 1)
    owner = resolve_name(module)
    function, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(None)
        if len(calls) == turn:
            signal.raise_signal(signum)
        return function(*args, **kwargs)

    out, before = tmp_path / "run", signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert train(text, out) == 128 + signum
    output = capsys.readouterr()
    assert len(calls) >= turn
    assert signal.getsignal(signum) is before
    if phase in ("settings", "building", "data"):
        assert not out.exists()
        end = ""
    else:
        end = f"; to go on: shtx train --resume {out}"
    if "validation" == phase or "save" in phase or "step" in phase:
        assert output.out.endswith(f"stopped and saved{end}\n") and output.err == ""
    else:
        how = "interrupted" if signum == signal.SIGINT else f"stopped by {signum.name}"
        assert output.err == f"shtx train: {how}{end}\n"
    if end:
        assert resume(out) == 0
        assert rows(out) == rows(run)
        weights = "checkpoints/step-000012/model.safetensors"
        assert (out / weights).read_bytes() == (run / weights).read_bytes()


def test_a_signal_waits_for_no_record(text, tmp_path, monkeypatch):
    """A process alone ends after the step; only several have to agree first."""
    step, out = Trainer.step, tmp_path / "run"

    def signalled(self, number):
        if number == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", signalled)
    never = "--log-every", "100", "--eval-every", "100", "--save-every", "100"
    assert train(text, out, *never) == 128 + signal.SIGTERM
    assert load(out).step == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_while_modules_are_imported(signum):
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        try:
            with EndAtOnce("train"):
                signal.raise_signal(signum)
        finally:
            os._exit(0)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signum
    said = os.read(read, 100).decode()
    os.close(read)
    assert said.startswith("shtx train: ") and said.endswith(" before it began\n")


def test_hangup_that_nohup_ignores(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop, EndAtOnce("train"):
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupts_that_torchrun_repeats(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Stop() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT


def test_signal_that_somebody_swallows(text, tmp_path, monkeypatch, capsys):
    """Code of others may turn what a signal raised into an exception of its own."""

    def swallow(self):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(Trainer, "compile", swallow)
    assert train(text, tmp_path / "run") == 143
    assert capsys.readouterr().err.startswith("shtx train: stopped by SIGTERM")


# output


def test_reader_that_leaves(text, tmp_path):
    """`shtx train | head`: what was trained is saved."""
    arguments = [*TINY, "--data", str(text), "--steps", "3000", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "shtx", "train", *arguments, "--log-every", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(ROOT, OMP_NUM_THREADS="1"),
    ) as process:
        while not process.stdout.readline().startswith(b"step 3/"):
            pass
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert load(tmp_path / "run").step >= 3


def test_log_on_a_full_disk(text, run, tmp_path, monkeypatch, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert train(text, tmp_path / "run") == 1
    assert capfd.readouterr().err == "shtx: error: output: No space left on device\n"
    assert rows(tmp_path / "run") == rows(run)


def test_locale_without_characters(run, tmp_path, monkeypatch):
    """A character that the encoding does not have becomes an escape."""
    for status, command in enumerate(
        (
            ["generate", "--checkpoint", str(run), "--prompt", "caf\xe9", "--length", "20"],
            ["generate", "--checkpoint", "caf\xe9", "--prompt", "x"],
        )
    ):
        written = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(written, "ascii", write_through=True))
        assert main(command) == status
        assert rb"caf\xe9" in written.getvalue()


def test_control_characters_stay_off_the_terminal(text, tmp_path, capsys):
    out = tmp_path / "run\x1b]0;evil\x07\u202e"
    assert train(text, out, "--steps", "1") == 0
    assert train(text, out) == 1
    output = capsys.readouterr()
    for said in output:
        assert "evil" in said and not {"\x1b", "\x07", "\u202e"} & {*said}
    assert output.err.count("\n") == 1


def test_text_is_shown_as_it_is(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "sample", lambda self: (b"[b]:smile:", b" :warning:[/b]"))
    assert train(text, tmp_path / "run", "--steps", "1") == 0
    assert "[b]:smile: :warning:[/b]" in capsys.readouterr().out


def test_command_to_go_on_is_quoted(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a run"
    monkeypatch.setattr(Trainer, "compile", lambda self: signal.raise_signal(signal.SIGTERM))
    assert train(text, out) == 143
    command = capsys.readouterr().err.split("to go on: ")[1]
    assert shlex.split(command) == ["shtx", "train", "--resume", str(out)]


def test_rows_that_cannot_be_written(text, tmp_path, monkeypatch, capsys):
    append = Metrics.append

    def fail(self, **row):
        if row["step"] == 9:
            raise OSError(28, "No space left on device")
        append(self, **row)

    monkeypatch.setattr(Metrics, "append", fail)
    out = tmp_path / "run"
    assert train(text, out) == 1
    assert capsys.readouterr().err == (
        f"shtx train: error: {out}: cannot be written: No space left on device; what was saved"
        f" before is whole, and goes on with shtx train --resume {out}\n"
    )
    assert load(out).step == 8
