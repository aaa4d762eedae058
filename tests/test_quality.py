"""The study of quality, at the size of a toy."""

import json
import subprocess

import pytest
import torch
from running import write_text

from benchmarks.studies.quality import __main__ as study
from benchmarks.studies.quality import report, runs
from benchmarks.studies.quality.runs import RUNS, SHAPES, Run, Shape
from shtx import HierarchicalTransformer
from shtx.train.config import Model


@pytest.mark.parametrize("size", SHAPES)
def test_models_are_as_large_as_their_size(size):
    for shape in SHAPES[size].values():
        with torch.device("meta"):
            model = HierarchicalTransformer(
                num_tokens=256, impl="reference", dim_head=64, **shape.arguments()
            )
        count = sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(float(size[:-1]) * 1e6, rel=0.04), shape


def test_runs_have_names_of_their_own_and_settings_that_training_takes():
    assert len({run.name for run in RUNS}) == len(RUNS) >= 16
    for run in RUNS:
        model = run.settings(1000)["model"]
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
        assert Model(**tuples).without_effect() == [], run


def row(shape, bits, flop_per_byte, size=100, **fields):
    curve = [(0, 0.0, 8.0), (5, 1.0, 4.0), (10, 2.0, bits)]
    own = dict(Run("python", shape=shape)._asdict(), parameters=25e6, steps=10, bytes=size)
    return own | dict(curve=curve, flop_per_byte=flop_per_byte, test_bits_per_byte=bits, **fields)


def test_equal_flops_are_read_off_the_curves():
    rows = [row("flat", 2.0, 10), row("1, 4 by 4", 1.5, 5)]
    budget = report.equal_flops(rows)
    assert budget == 0.8 * 500  # what the cheaper one had done before its learning rate fell
    assert report.at_flops(rows[0], budget) == pytest.approx(8 - 4 * 0.8)
    assert report.at_flops(rows[1], budget) == pytest.approx(4 - 2.5 * 0.6)
    with pytest.raises(ValueError, match="budget must be within"):
        report.at_flops(rows[1], 501)


def test_the_table_has_differences_to_the_flat_model_and_spreads_of_seeds(tmp_path):
    rows = [row("1, 4 by 4", 1.5, 5), row("flat", 2.0, 10), row("flat", 2.2, 10) | {"seed": 1}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    found = report.joined([tmp_path])
    assert len(found) == 3
    (tmp_path / "README.md").write_text(f"Found:\n{report.BEGIN}\nold\n{report.END}\nSo.\n")
    report.save(found, tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "2.1000 ± 0.1000" in lines[4] and "+0.0000" in lines[4]
    assert "1.5000 " in lines[5] and "-0.6000" in lines[5]
    assert (lines[0], lines[-1]) == ("Found:", "So.") and (tmp_path / "curves.png").stat().st_size


def test_no_results(tmp_path):
    with pytest.raises(SystemExit, match="no results there"):
        report.joined([tmp_path])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--report", "x"], "--report needs --page"),
        (["x"], "CORPORA and OUT must be given"),
        (["x", "y", "--minutes", "0"], "--minutes must be above 0, got 0"),
        (["x", "y", "--runs", "z"], "--runs: 'z' is unknown"),
        (["x", "y"], ".bin does not exist"),
    ],
)
def test_errors(arguments, message, capsys):
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def any_commit(monkeypatch):
    """Runs of changed files would be refused."""
    monkeypatch.setattr(study, "resolve", lambda stamp: stamp)


def test_a_run(tmp_path, monkeypatch, capsys):
    for module in (runs, study):
        monkeypatch.setattr(module, "SEQ_LEN", 32)
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(runs, "WINDOW", 8)
    monkeypatch.setattr(study, "PROBE", 2)
    monkeypatch.setitem(SHAPES["25M"], "flat", Shape((64,), 1))
    write_text(tmp_path / "python.bin")
    run, out = Run("python"), tmp_path / "out"
    command = [str(tmp_path), str(out), "--minutes", "0.001", "--runs", run.name, "--commit", "c"]
    assert study.main(command) == 0
    found = json.loads((out / f"{run.name}.json").read_text())
    assert run == report.run_of(found)
    assert (found["minutes"], found["commit"]) == (0.001, "c")
    assert found["steps"] == found["curve"][-1][0] >= 3 and found["bytes"] == found["steps"] * 128
    assert 0 < found["curve"][-1][1] == pytest.approx(found["seconds"])
    assert 0 < found["test_bits_per_byte"] < 9 and len(found["sha256"]) == 64
    capsys.readouterr()
    assert study.main(command) == 0 and not capsys.readouterr().out  # it is there


def test_a_run_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def shtx(folder, gpu, *arguments):
        (folder / "log.txt").write_text("no luck")
        raise subprocess.CalledProcessError(1, "shtx")

    monkeypatch.setattr(study, "shtx", shtx)
    write_text(tmp_path / "python.bin")
    run = Run("python")
    assert study.main([str(tmp_path), str(tmp_path), "--runs", run.name]) == 1
    assert f"{run.name}/log.txt" in capsys.readouterr().out
