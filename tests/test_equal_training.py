"""The script that trains fused and reference side by side, tiny."""

import json
from functools import partial

import pytest
import torch

from benchmarks import equal_training as script
from benchmarks import shapes
from shtx import ops

TINY = dict(num_tokens=256, dim=8, dim_head=8, heads=1, seq_len=16, hierarchies=(1, 2))
TINY |= dict(window_sizes=(4, None), ff_mult=(1, 2), depth=1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "configs", lambda device: {"B": shapes.Config(1, TINY)})
    monkeypatch.setattr(script, "resolve", lambda stamp: stamp)
    (tmp_path / "text").write_bytes(b"so it goes, again and again. " * 40)

    def run(*arguments) -> tuple[int, dict]:
        sizes = "--config B --steps 2 --seeds 2 --batch 2 --repeats 3 --commit cafe".split()
        places = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
        status = script.main([*sizes, *places, *arguments])
        results = json.loads((tmp_path / "out/equal_training.json").read_text())
        return status, results

    return run


def test_all_checks(run, tmp_path, capsys):
    status, results = run()
    checks = {row["check"]: row for row in results["checks"]}
    assert checks.keys() == script.CHECKS.keys()
    assert status == (0 if all(row["passed"] for row in checks.values()) else 1)
    assert checks["fp32"]["passed"] and 0 < checks["fp32"]["measured"] < 1e-5
    assert checks["repeat"]["passed"] and checks["repeat"]["measured"] == 0
    spread = max(checks["bf16"]["reference"]) - min(checks["bf16"]["reference"])
    assert checks["bf16"]["allowed"] == spread / 2 > 0
    assert checks["bf16"]["measured"] < 0.1
    runs = [(c["check"], c["impl"], c["seed"], len(c["loss"])) for c in results["curves"]]
    both = ("fused", "reference")
    assert sorted(runs) == sorted(
        [("fp32", impl, 0, 2) for impl in both]
        + [("bf16", impl, seed, 2) for impl in both for seed in (0, 1)]
    )
    assert results["machine"]["torch"] == torch.__version__
    assert all(row["commit"] == "cafe" for row in results["checks"])
    text = capsys.readouterr().out
    assert "repeat B: pass" in text and "| repeat | B      | repeats of a step, of 3, " in text
    assert (tmp_path / "out/equal_training.png").read_bytes()[:4] == b"\x89PNG"


def off_by(factor: float):
    right = ops.FUSED.feed_forward
    return lambda *args, **options: right(*args, **options) * factor


def test_a_model_that_computes_something_else_fails(run, monkeypatch):
    monkeypatch.setattr(ops.FUSED, "feed_forward", off_by(1.5))
    status, results = run("--only", "fp32")
    assert status == 1 and results["checks"][0]["measured"] > script.FIRST_BOUND


def test_a_step_that_differs_fails(run, monkeypatch):
    calls = []

    class Counted(script.TrainStep):
        def __call__(self, ids):
            calls.append(ids)
            return super().__call__(ids)

    right = ops.FUSED.feed_forward
    drifting = lambda *args, **options: right(*args, **options) * (1.0 if len(calls) == 1 else 1.1)
    monkeypatch.setattr(ops.FUSED, "feed_forward", drifting)
    monkeypatch.setattr(script, "TrainStep", partial(Counted, cuda_graph=False))
    status, results = run("--only", "repeat")
    assert status == 1 and results["checks"][0]["measured"] == 2  # three were asked for


def test_a_second_run_adds_to_the_first(run):
    _, results = run("--only", "repeat")
    older = results["checks"]
    _, results = run("--only", "fp32")
    assert [row["check"] for row in results["checks"]] == ["repeat", "fp32"]
    assert results["checks"][:1] == older and len(results["curves"]) == 2
    _, results = run("--only", "fp32")
    assert len(results["checks"]) == 2 and len(results["curves"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "fp8"], "--only: 'fp8' is unknown, choose from fp32 bf16 repeat"),
        (["--config", "A"], "--config: 'A' is unknown, choose from C B"),
        (["--data", "nowhere"], "--data nowhere: no such file"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(run, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert str(error.value) == message
