"""The campaign knows the code that it changes, and the tests that must notice."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, ROOT, child_environment

from shtx import HierarchicalTransformer
from tests.campaign import configurations, sanitizers
from tests.campaign.mutations import LISTED, TESTS, UNSEEN, mutants


@pytest.mark.parametrize("mutation", LISTED, ids=lambda m: f"{m.file}-{m.old[:40]!r}")
def test_listed_mutation_stands_once_and_has_its_test(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_files_of_drawn_mutations_and_their_tests_are_there():
    for file, tests in TESTS.items():
        assert (ROOT / file).is_file()
        assert all((ROOT / "tests" / f"{name}.py").is_file() for name in tests.split()), file


def test_explained_mutations_can_be_drawn():
    for file, line in UNSEEN:
        assert line in [mutated for _, mutated in mutants((ROOT / file).read_text())]


def test_importing_the_campaign_changes_nothing():
    code = """
import torch
from shtx.train import trainer
before = trainer.SAMPLE, torch.get_num_threads()
import tests.campaign.__main__
assert (trainer.SAMPLE, torch.get_num_threads()) == before
"""
    command = [sys.executable, "-c", code]
    environment = child_environment(ROOT, ROOT / "tests", OMP_NUM_THREADS="2")
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b,
        lambda a, b: F.linear(a, b.T, b[0]),
        lambda a, b: torch.einsum("mk,kn->nm", a, b),
        lambda a, b: torch.einsum("mk,kna->amn", a, b[..., None] * b[0, :3]),
        lambda a, b: torch.stack([a, a]) @ torch.stack([b, b]),
    ],
    ids=["mm", "linear", "einsum", "einsum of three", "bmm"],
)
def test_initcheck_sees_no_product_of_bf16(product):
    a, b = torch.randn(2, 5, 4).bfloat16()
    b = b.T.contiguous()
    expected = product(a.float(), b.float()).bfloat16()
    kept = sanitizers.multiply_in_fp32("cpu")
    with torch.profiler.profile() as profile:
        ours = product(a, b)
    del kept
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    assert "aten::baddbmm" in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("wrong", [0.0, 1e-3])
def test_nudges_excuse_no_gradient_that_is_wrong(wrong):
    def models(drawn):
        torch.manual_seed(0)
        options = dict(num_tokens=40, dim=16, depth=1, seq_len=48, heads=2)
        theirs = HierarchicalTransformer(**options, impl="reference").to(DEVICE)
        ours = deepcopy(theirs)
        ours.to_logits.weight.register_hook(lambda g: g * (1 + wrong))
        return ours, deepcopy(theirs).double(), theirs

    (case,) = configurations.compare(models, range(1), "any")
    assert (case.finding is not None) == (wrong > 0)
    assert not wrong or "gradient of to_logits.weight is off by 1.0e-03" in case.finding
