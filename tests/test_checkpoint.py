import json
import os
import re
import resource
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers import flipped

from shtx.train import TrainError
from shtx.train.checkpoint import FILES, load, save
from shtx.train.files import make
from shtx.train.home import Home

CONFIG = {"run": {"lr": 0.1, "window_sizes": [8, None]}, "data": {"bytes": 3}}


def contents(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(7, 5, generator=generator), "b.c": torch.arange(3)}
    state = {
        "optimizer": {"exp_avg": torch.randn(35, generator=generator), "step": 4},
        "none": None,
    }
    return weights, state


def saved(run, *steps):
    for step in steps:
        save(run, step, CONFIG, *contents(step))
    return run


def tree(path):
    return {p: p.is_file() and p.read_bytes() for p in path.rglob("*")}


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_is(checkpoint, step):
    weights, state = contents(step)
    assert checkpoint.step == step and checkpoint.config == CONFIG
    assert checkpoint.weights.keys() == weights.keys()
    assert all(checkpoint.weights[name].equal(weights[name]) for name in weights)
    assert checkpoint.state["optimizer"]["exp_avg"].equal(state["optimizer"]["exp_avg"])
    assert checkpoint.state["optimizer"]["step"] == 4 and checkpoint.state["none"] is None


def test_round_trip(tmp_path):
    path = save(tmp_path, 123, CONFIG, *contents(123))
    assert path.stat().st_mode & 0o777 == tmp_path.joinpath("checkpoints").stat().st_mode & 0o777
    assert path == tmp_path / "checkpoints" / "step-000123"
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert_is(load(path), 123)


def test_run_directory_stands_for_its_newest(tmp_path):
    saved(tmp_path, 999_999, 1_000_000)
    assert_is(load(tmp_path), 1_000_000)
    assert_is(load(tmp_path / "checkpoints" / "step-999999"), 999_999)


def test_keeps_the_newest_two(tmp_path):
    assert names(saved(tmp_path, 1, 2, 3, 4)) == ["step-000003", "step-000004"]


def test_leftovers_are_ignored_then_removed(tmp_path):
    saved(tmp_path, 1)
    for name in (".step-000002.01234567.tmp", ".step-000009.89abcdef.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / FILES[0]).write_bytes(b"half")
    assert_is(load(tmp_path), 1)
    assert names(saved(tmp_path, 2)) == ["step-000001", "step-000002"]
    assert_is(load(tmp_path), 2)


def test_resuming_an_older_step_gives_up_the_later_ones(tmp_path):
    saved(tmp_path, 1, 2)
    assert_is(load(tmp_path / "checkpoints" / "step-000001"), 1)
    save(tmp_path, 2, CONFIG, *contents(77))
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert load(tmp_path).weights["a"].equal(contents(77)[0]["a"])
    saved(tmp_path, 5)
    assert names(saved(tmp_path, 3)) == ["step-000002", "step-000003"]


def test_synced_before_it_is_named(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    events, fsync, replace = [], os.fsync, os.replace
    where = lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}"))
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(where(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((a, b)), replace(a, b)))
    path = save(tmp_path, 2, CONFIG, *contents(2))
    temporary = events[0].parent
    assert re.fullmatch(r"\.step-000002\.[0-9a-f]{8}\.tmp", temporary.name)
    files = [temporary / name for name in (*FILES, "manifest.json")]
    assert events == [*files, temporary, (temporary, path), path.parent]


@pytest.mark.parametrize("out", ["a/run", None])
def test_directory_of_the_first_checkpoint_is_synced_too(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    with Home(out and tmp_path / out) as home:
        save(home.path, 1, CONFIG, *contents(1))
    run = home.path.absolute()
    assert synced[:3] == [str(tmp_path), str(run.parent), str(run)]


def test_a_directory_that_another_process_makes_meanwhile(tmp_path, monkeypatch):
    path = tmp_path / "new"
    path.mkdir()
    answers = iter([False])  # as it was when it was asked first
    monkeypatch.setattr(Path, "is_dir", lambda path: next(answers, True))
    make(path)
    assert next(answers, None) is None


def test_removal_that_was_interrupted(tmp_path, monkeypatch):
    """The rest of a removed checkpoint does not count as one, and the next save removes it."""
    saved(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 3)
    left = [name for name in names(tmp_path) if name.startswith(".")]
    assert len(left) == 1 and names(tmp_path)[1:] == ["step-000002", "step-000003"]
    assert_is(load(tmp_path), 3)
    assert names(saved(tmp_path, 4)) == ["step-000003", "step-000004"]


def test_what_cannot_be_removed_ends_nothing(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    rename = Path.rename

    def refuse(path, target):
        if path.name == "step-000001":
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    saved(tmp_path, 3, 4)
    assert [n for n in names(tmp_path) if n[0] != "."] == [
        *("step-000001", "step-000003", "step-000004"),
    ]


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def truncated(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [missing, empty, truncated, flipped])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_named_and_nothing_is_deleted(tmp_path, name, damage):
    saved(tmp_path, 1, 2)
    older, file = (
        tmp_path / "checkpoints" / step for step in ("step-000001", f"step-000002/{name}")
    )
    damage(file)
    before = tree(tmp_path)
    with pytest.raises(TrainError) as raised:
        load(tmp_path)
    message = str(raised.value)
    assert ("missing" if damage is missing else "damaged") in message and "\n" not in message
    assert f"an older step is {older}" in message
    # a flip in the manifest shows as a file that is not what it says
    assert str(file) in message or (name, damage) == ("manifest.json", flipped)
    assert tree(tmp_path) == before
    assert_is(load(older), 1)


def test_damage_of_the_only_step(tmp_path):
    saved(tmp_path, 1)
    empty(tmp_path / "checkpoints" / "step-000001" / FILES[0])
    with pytest.raises(
        TrainError, match="its size is not that in manifest.json; no older step is left"
    ):
        load(tmp_path)


def test_fallback_never_goes_ahead(tmp_path):
    saved(tmp_path, 1, 2)
    damaged = tmp_path / "checkpoints" / "step-000001"
    empty(damaged / FILES[0])
    with pytest.raises(TrainError, match="no older step is left"):
        load(damaged, fallback=True)
    assert_is(load(tmp_path, fallback=True), 2)


@pytest.mark.parametrize("name", ["", "checkpoints", "nothing"])
def test_no_checkpoint(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(TrainError, match=f"{tmp_path / name}: no checkpoint there"):
        load(tmp_path / name)


def test_pickled_code_is_refused(tmp_path):
    path = save(tmp_path, 1, CONFIG, contents(1)[0], {"optimizer": 0})
    forged = {"optimizer": pytest.raises}
    torch.save(forged, path / "optimizer.pt")
    fingerprints = json.loads((path / "manifest.json").read_text())
    content = (path / "optimizer.pt").read_bytes()
    fingerprints["optimizer.pt"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(fingerprints))
    with pytest.raises(TrainError, match="optimizer.pt: refused: it has more in it than tensors"):
        load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file sizes is a signal elsewhere")
def test_full_disk_loses_nothing(tmp_path):
    saved(tmp_path, 1)
    weights, state = contents(2)
    weights["large"] = torch.zeros(1 << 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, 2, CONFIG, weights, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-000001"]
    assert_is(load(tmp_path), 1)


CAMPAIGN = """
import os, signal, sys, time
from hashlib import sha256
from pathlib import Path
import torch
from shtx.train.checkpoint import load, save

torch.set_num_threads(1)
run, trials = Path(sys.argv[1]), int(sys.argv[2])
announced = lost = 0
for trial in range(trials):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(announced + 1, announced + 100_000):
            weights = {"a": torch.full((100_000,), step), "b": torch.full((3,), step)}
            save(run, step, {}, weights, {"step": torch.tensor(step)})
            os.write(write, step.to_bytes(8, "little"))
    os.close(write)
    announced = int.from_bytes(os.read(read, 8), "little")  # one is there
    time.sleep(trial * 0.0017)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while said := os.read(read, 8):
        announced = int.from_bytes(said, "little")
    os.close(read)
    checkpoint = load(run)
    assert checkpoint.step in (announced, announced + 1), (checkpoint.step, announced)
    assert checkpoint.weights["a"].eq(checkpoint.step).all()
    assert checkpoint.state["step"] == checkpoint.step
    announced = checkpoint.step
print(trials, "killed,", announced, "saved")
"""


def test_kill_at_any_time(tmp_path):
    """kill -9 of a process that only saves: the last finished checkpoint always loads."""
    done = subprocess.run(
        [sys.executable, "-c", CAMPAIGN, tmp_path, "40"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("40 killed, ")
