"""Runs the benchmarks for the configurations and providers asked for, and writes down their rows.

A row is what a benchmark leaves in `benchmark.extra_info`, or the reason why it failed.
"""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import CONFIGS, level_shapes
from benchmarks.spaces import set_constants
from benchmarks.timing import DEVICE


def pytest_addoption(parser):
    names = lambda text: text.split(",")
    parser.addoption("--config", type=names, default=list(CONFIGS), help="names, with commas")
    parser.addoption("--provider", type=names, default=["reference"], help="names, with commas")
    parser.addoption("--rows", type=Path, help="file that gets a line of JSON for each result")
    parser.addoption("--constants", type=json.loads, help="arguments of set_constants, as JSON")
    parser.addoption("--ready", type=Path, help="file to make once compiled; then wait for a line")


def pytest_configure(config):
    if arguments := config.getoption("--constants"):
        set_constants(**arguments)


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", option("--provider"))
    if "config" in metafunc.fixturenames:
        metafunc.parametrize("config", option("--config"))
    if "shape" in metafunc.fixturenames:
        shapes = level_shapes(option("--config"), DEVICE)
        metafunc.parametrize("shape", shapes, ids=lambda s: f"{s.B}x{s.M}x{s.D}")


@pytest.fixture(autouse=True)
def compiles_afresh():
    """Shapes that differ from benchmark to benchmark must not become dynamic ones."""
    torch.compiler.reset()


@pytest.fixture
def wait_for_turn(pytestconfig):
    """Wait, when all is compiled, until no other process is at work."""
    ready = pytestconfig.getoption("--ready")

    def wait():
        if ready is None:
            return
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        ready.touch()
        if not sys.stdin.readline():
            raise RuntimeError("the process that started this one is gone")

    return wait


def identity(params: dict) -> dict:
    """The parameters of a benchmark as its row names them."""
    row = {}
    for name, value in params.items():
        row |= value.labels() if hasattr(value, "labels") else {name: value}
    return row


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    path = item.config.getoption("--rows")
    if path and (report.failed or report.passed and report.when == "call"):
        row = {"bench": item.path.stem.removeprefix("bench_")}
        row |= identity(item.callspec.params if hasattr(item, "callspec") else {})
        if report.failed:
            reason = f"{call.excinfo.typename}: {call.excinfo.value}"
            row["error"] = " ".join(reason.split())[:300]
        else:
            row |= item.funcargs["benchmark"].extra_info
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return report
