"""The scripts in examples/ run as they stand, and learn."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT, child_environment

EXAMPLES = {
    "plain_loop": "torch",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "lightning_trainer": "lightning",
}


@pytest.mark.parametrize("name, package", EXAMPLES.items())
def test_example(name, package):
    pytest.importorskip(package, reason="needs the extra clients")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "examples" / f"{name}.py", "12"],
        env=child_environment(ROOT),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    pattern = r"loss ([\d.]+) to ([\d.]+) in 12 steps of [\d.]+ ms\nTrainStep: steps of [\d.]+ ms"
    first, last = map(float, re.search(pattern, run.stdout).groups())
    assert last < first - 0.5


def test_every_example_is_tested():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts - {"common"} == EXAMPLES.keys()
