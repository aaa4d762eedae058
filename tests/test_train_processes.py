"""`shtx train` in several processes, which have a part of the model each."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from helpers import ROOT, child_environment, flipped
from running import TINY, rows, write_text

import shtx
from shtx.cli import main
from shtx.train import TrainError
from shtx.train.checkpoint import load, whole

SHARD = "shard-00002-model-00001-of-00001.safetensors"
CODE = """
import sys, torch
torch.set_num_threads(1)
from shtx.train import trainer
trainer.SAMPLE = 4
from shtx.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(world, *arguments):
    """The processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        subprocess.Popen(
            [sys.executable, "-c", CODE, *map(str, arguments)],
            env=child_environment(ROOT) | place | {"RANK": str(rank), "WORLD_SIZE": str(world)},
            **pipes,
        )
        for rank in range(world)
    ]


def run(world, *arguments):
    for process in start(world, *arguments):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors


def state_of(path):
    """Weights and moments of a checkpoint, whoever wrote it."""
    checkpoint = whole(load(path))
    tensors = {("weight", name): t for name, t in checkpoint.weights.items()}
    tensors |= {("average", name): t for name, t in checkpoint.state["ema"].items()}
    for index, values in checkpoint.state["optimizer"]["state"].items():
        tensors |= {(index, name): t for name, t in values.items()}
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process alone, of two, of one and of three after them, and of three after two."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*TINY, "--batch-size", "12", "--ema", "0.9", "--data", write_text(folder / "text")]
    run(1, "train", *options, "--out", folder / "alone")
    run(2, "train", *options, "--shard", "full", "--out", folder / "two")
    at = lambda name: ("train", "--resume", folder / name / "checkpoints" / "step-000008")
    run(1, *at("two"), "--out", folder / "one")
    run(3, *at("one"), "--out", folder / "three")
    run(3, *at("two"), "--activation-checkpointing", "--out", folder / "also three")
    return folder


@pytest.mark.parametrize("name", ["two", "one", "three", "also three"])
def test_any_number_of_processes_ends_alike(folder, name):
    ours, theirs = state_of(folder / name), state_of(folder / "alone")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
    for mine, other in zip(rows(folder / name), rows(folder / "alone"), strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


def test_who_writes_parts(folder):
    shards = [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2, 3)]
    for name, files in {
        "two": shards[:2],
        "three": shards,
        "one": ["model.safetensors", "optimizer.pt"],
    }.items():
        for step in ("step-000008", "step-000012"):
            if (name, step) != ("three", "step-000008"):
                found = {path.name for path in (folder / name / "checkpoints" / step).iterdir()}
                assert found == {*files, "config.json", "manifest.json"}
    sizes = [
        (folder / "two" / "checkpoints" / "step-000012" / s).stat().st_size for s in shards[:2]
    ]
    assert max(sizes) < 1.3 * min(sizes)


def test_commands_take_checkpoints_of_parts(folder, capsys):
    averages = [shtx.load(folder / name, device="cpu", ema=True) for name in ("two", "alone")]
    ours, theirs = (model.to_logits.weight for model in averages)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    texts = []
    for name in ("two", "alone"):
        checkpoint = str(folder / name)
        arguments = ("--prompt", "line 1", "--length", "9", "--temperature", "0")
        assert main(["generate", "--checkpoint", checkpoint, "--device", "cpu", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["info", "--checkpoint", str(folder / "two")]) == 0
    out = folder / "two.safetensors"
    assert main(["convert", str(folder / "two"), "--to", "0.2.0", "--out", str(out)]) == 0
    weights = whole(load(folder / "two")).weights
    found = safetensors.torch.load_file(out)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder / "two", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "a link"])
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_damage_is_named(copied, name, damage):
    file = copied / "checkpoints" / "step-000012" / name
    content = bytearray(file.read_bytes())
    if damage in ("missing", "a link"):
        file.unlink()
    if damage == "a link":
        file.symlink_to(copied.parent / "elsewhere")
        (copied.parent / "elsewhere").write_bytes(content)
    if damage == "truncated":
        file.write_bytes(content[:-1])
    if damage == "flipped":
        flipped(file)
    with pytest.raises(TrainError, match=f"{name}: (missing|damaged: its (size|sha256) is not)"):
        load(copied)
    assert load(copied, fallback=True).step == 8


@pytest.mark.parametrize("also", ["list", "parts"])
def test_a_part_that_nobody_lists_or_that_is_not_all(copied, also):
    step = copied / "checkpoints" / "step-000012"
    manifest = json.loads((step / "manifest.json").read_text())
    if also == "list":
        manifest.pop(SHARD)
        message = f"{SHARD}: damaged: its size is not that in manifest.json"
    else:
        first = SHARD.replace("2", "1", 1)
        manifest.pop(first)
        (step / first).unlink()
        message = "step-000012: damaged: of .* parts are missing"
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainError, match=message):
        whole(load(copied))


def test_newest_two_are_kept_and_leftovers_go(folder):
    names = sorted(path.name for path in (folder / "two" / "checkpoints").iterdir())
    assert names == ["step-000008", "step-000012"]


def test_killed(folder, tmp_path):
    """The other process ends by itself, says so in a line, and the run goes on from its steps."""
    options = (*TINY, "--data", folder / "text", "--steps", "100000", "--shard", "full")
    children = start(2, "train", *options, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoints" / "step-000004").exists():
        assert all(child.poll() is None for child in children)
        time.sleep(0.1)
    children[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = children[0].communicate(timeout=60)
    children[1].communicate()
    assert children[0].returncode == 1 and time.monotonic() - began < 60
    lines = [line for line in errors.splitlines() if "warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("shtx train: error: "), errors
    newest = load(tmp_path / "run")
    assert newest.step % 4 == 0 and newest.weights is None
