"""The directory of a run: who may write there, and whose the files are."""

import fcntl
import os
import re
import shutil
import signal
import time

import pytest
from running import change_config, resume, rows, train

from shtx.cli import main
from shtx.train import TrainError
from shtx.train.checkpoint import load
from shtx.train.home import Home

HELD = r"another process trains into it: pid {} on \S+ since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\S+; "


def tree(path):
    """Every file and link below, with what is in it."""
    below = (p for p in path.rglob("*") if p.is_symlink() or p.is_file())
    return {p: os.readlink(p) if p.is_symlink() else p.read_bytes() for p in below}


def copied(run, path):
    shutil.copytree(run, path)
    return path


def of_an_older_version(run):
    """Remove from a run all that older versions did not write."""
    for name in ("shtx.lock", "run.json"):
        (run / name).unlink()
    for step in (run / "checkpoints").iterdir():
        change_config(step, lambda config: config.pop("id"))
    return run


# one process


def test_lock_is_of_one(tmp_path):
    with Home(tmp_path / "run"):
        with pytest.raises(TrainError, match=HELD.format(os.getpid())) as raised:
            Home(tmp_path / "run")
        assert str(raised.value).startswith(f"--out {tmp_path / 'run'}: ")
    assert not (tmp_path / "run").exists()  # nothing began
    with Home(tmp_path / "run") as home:
        home.begin({}, None)
    with Home(tmp_path / "run") as home:
        assert home.begun
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json", "shtx.lock"]


def test_one_of_many_that_start_together(tmp_path):
    """One gets the lock, and it is free once that one is killed."""
    for _ in range(5):
        read, write = os.pipe()
        starters = []
        for _ in range(8):
            if not (child := os.fork()):
                try:
                    os.kill(os.getpid(), signal.SIGSTOP)
                    Home(tmp_path / "run")
                    os.write(write, b"%d\n" % os.getpid())
                    time.sleep(60)
                finally:
                    os._exit(0)
            starters.append(child)
        for child in starters:
            os.waitpid(child, os.WUNTRACED)
        for child in starters:
            os.kill(child, signal.SIGCONT)
        winner = int(os.read(read, 20))
        for child in starters:
            if child != winner:
                os.waitpid(child, 0)
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 20)
        with pytest.raises(TrainError, match=HELD.format(winner)):
            Home(tmp_path / "run")
        os.kill(winner, signal.SIGKILL)
        os.waitpid(winner, 0)
        os.close(read), os.close(write)
    with Home(tmp_path / "run") as home:
        assert home.begun


@pytest.mark.parametrize("arguments", ["--out", "--resume"])
def test_a_run_that_is_trained_is_left_alone(text, run, tmp_path, capsys, arguments):
    part = copied(run, tmp_path / "part")
    with Home(part):
        before = tree(part)
        assert (train(text, part) if arguments == "--out" else resume(part)) == 1
        error = capsys.readouterr().err
        assert re.match(f"shtx train: error: {arguments} {part}: {HELD.format(os.getpid())}", error)
        assert error.count("\n") == 1 and tree(part) == before
        assert main(["warmup", "--resume", str(part)]) == 0  # reads
    assert resume(part) == 0


def test_lock_that_was_removed_before_it_was_held(tmp_path, monkeypatch):
    """A process that fails removes it while another one starts."""
    flock, removed = fcntl.flock, []

    def remove_and_lock(*args):
        if not removed:
            removed.append((tmp_path / "run" / "shtx.lock").unlink())
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with Home(tmp_path / "run"), pytest.raises(TrainError, match="another process trains into it"):
        Home(tmp_path / "run")


def test_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(45 if os.uname().sysname == "Darwin" else 95, "not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="its file system has no locks"), Home(tmp_path / "run"):
        pass


def test_names_of_one_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    homes = [Home(None) for _ in range(3)]
    assert len({home.path for home in homes}) == 3
    assert all(re.fullmatch(r"\d{8}-\d{6}(-\d)?", home.path.name) for home in homes)
    for home in homes:
        home.__exit__()
    assert not list((tmp_path / "runs").iterdir())


def test_directory_that_is_removed_meanwhile(text, tmp_path, monkeypatch, capsys):
    from shtx.train.trainer import Trainer

    out, step = tmp_path / "run", Trainer.step

    def remove(self, number):
        if number == 2:
            shutil.rmtree(out)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", remove)
    assert train(text, out) == 1
    assert capsys.readouterr().err == (
        f"shtx train: error: {out}: was removed while the run went on: nothing can be saved\n"
    )
    assert not out.exists()


# a run's own


def test_copied_checkpoint_is_no_run(run, tmp_path, capsys):
    """It is none even in a directory that looks like its run's."""
    home = tmp_path / "home"
    shutil.copytree(run / "checkpoints" / "step-000008", home / "backup" / "step-000008")
    shutil.copytree(run / "checkpoints", home / "checkpoints")
    (home / "metrics.jsonl").write_text('{"step": 1, "mine": 1}\n')
    before = tree(tmp_path)
    for path in (home / "backup", home / "checkpoints"):
        assert resume(path / "step-000008") == 1
        assert capsys.readouterr().err == (
            f"shtx train: error: --resume {path / 'step-000008'}: step-000008 is a copy, not among"
            " the checkpoints of its run: name where it is to go on with --out DIR\n"
        )
    assert tree(tmp_path) == before


def test_checkpoint_of_another_run(text, run, tmp_path, capsys):
    part = copied(run, tmp_path / "part")
    other = tmp_path / "other"
    assert train(text, other, "--steps", "16") == 0
    shutil.copytree(other / "checkpoints" / "step-000016", part / "checkpoints" / "step-000016")
    before = tree(part)
    for path in (part, part / "checkpoints" / "step-000016"):
        assert resume(path) == 1
        assert "step-000016 is a copy, not among the checkpoints" in capsys.readouterr().err
    assert tree(part) == before


@pytest.mark.parametrize("copy", [False, True])
def test_going_on_elsewhere(run, tmp_path, copy):
    """The new run is whole from the first moment, and the one it comes from is as it was."""
    part = copied(run, tmp_path / "part")
    step = part / "checkpoints" / "step-000008"
    if copy:
        step = copied(step, tmp_path / "step-000008")
    before, branch = tree(part), tmp_path / "branch"
    assert resume(step, "--out", str(branch), "--save-every", "4") == 0
    assert tree(part) == before
    assert sorted(os.listdir(branch / "checkpoints")) == ["step-000008", "step-000012"]
    for name in ("model.safetensors", "optimizer.pt"):
        ours, theirs = (path / "checkpoints/step-000012" / name for path in (branch, part))
        assert ours.read_bytes() == theirs.read_bytes()
    assert rows(branch) == [r for r in rows(run) if r["step"] > 8] if copy else rows(run)
    assert load(branch).config["id"] != load(part).config["id"]
    assert resume(branch) == 0
    assert resume(step, "--out", str(branch)) == 1


def test_files_of_others_stay(run, tmp_path, capsys):
    """A file beside checkpoints, or in their place, stays and ends nothing."""
    part = copied(run, tmp_path / "part")
    checkpoints = part / "checkpoints"
    shutil.rmtree(checkpoints / "step-000012")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    for name in ("step-000002.best", "step-000002.old", "step-000002.tmp", "step-000004"):
        shutil.copytree(checkpoints / "step-000008", checkpoints / name)
    for name, values in (("moved", dict(step=12)), ("step-000006", dict(step=6, id="other"))):
        other = shutil.copytree(checkpoints / "step-000008", checkpoints / name)
        change_config(other, lambda config, values=values: config.update(values))
    moved = (checkpoints / "moved").rename(tmp_path / "moved")
    (checkpoints / "step-000001").symlink_to(mine)
    (checkpoints / "step-000012").symlink_to(moved)  # in the place of what will be saved
    (checkpoints / "step-000002.tar.gz").write_text("mine")
    (checkpoints / "step-000003").write_text("mine")
    (checkpoints / "step-000008" / "notes").write_text("mine")
    (checkpoints / ".step-000002.0123456.tmp").write_text("mine")
    (part / "notes").write_text("mine")
    before = tree(part)
    assert resume(checkpoints / "step-000008", "--steps", "20") == 0
    after = tree(part)
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed == {
        *(
            checkpoints / "step-000012",
            part / "run.json",
            part / "loss.png",
            part / "metrics.jsonl",
        ),
    }
    assert os.readlink(checkpoints / "step-000012.kept") == str(moved)
    assert sorted(path.name for path in checkpoints.glob("step-0000[12]?")) == [
        *("step-000018", "step-000020"),
    ]


def test_directory_with_files_of_others(text, tmp_path, capsys):
    for name in ("data.bin", "loss.png", "run.json", "metrics.jsonl"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("mine")
        assert train(text, out) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"shtx train: error: --out {out}: holds ")
        assert "name another directory" in error and error.count("\n") == 1
        assert tree(out) == {out / name: b"mine"}


def test_run_of_an_older_version(run, tmp_path, monkeypatch):
    part = of_an_older_version(copied(run, tmp_path / "part"))
    monkeypatch.chdir(tmp_path)
    assert resume("part/checkpoints/step-000008") == 0
    assert rows(part) == rows(run)
    for step in ("14", "20"):  # and as the run that it has become
        assert resume("part", "--steps", step) == 0
    assert sorted(os.listdir(part / "checkpoints")) == ["step-000018", "step-000020"]


def test_run_that_ended_before_its_first_checkpoint(text, run, tmp_path, monkeypatch):
    """It may be resumed or started again, and becomes the run that it was to be."""
    from shtx.train.trainer import Trainer

    class Killed(BaseException):
        pass

    def killed(self, number):
        raise Killed

    for again in ("resume", "train"):
        out = tmp_path / again
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", killed)
            with pytest.raises(Killed):
                train(text, out)
        assert sorted(os.listdir(out)) == ["metrics.jsonl", "run.json", "shtx.lock"]
        assert (resume(out) if again == "resume" else train(text, out)) == 0
        assert rows(out) == rows(run)
