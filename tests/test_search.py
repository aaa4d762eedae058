"""The search of tile sizes covers what ships."""

import ast
import json
import subprocess
import sys
from importlib import import_module

import pytest
from helpers import ROOT, child_environment

from benchmarks import search
from benchmarks.spaces import SPACES, UNTIMED, set_constants

KERNELS = ROOT / "shtx_kernels"


def pages() -> dict[str, ast.Module]:
    """The pages of kernels, by their names within the package."""
    parsed = {}
    for path in KERNELS.rglob("*.py"):
        parts = path.relative_to(KERNELS).with_suffix("").parts
        if parts[0] != "reference":
            name = ".".join(part for part in parts if part != "__init__")
            parsed[name] = ast.parse(path.read_text())
    return parsed


def constants_of(page: ast.Module) -> set[str]:
    """Names in capitals that a page gives values with a number in it."""
    found = set()
    for node in page.body:
        if isinstance(node, ast.Assign):
            numbers = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            names = [n.id for target in node.targets for n in ast.walk(target) if hasattr(n, "id")]
            if any(type(n.value) in (int, float) for n in numbers):
                found |= {name for name in names if name.isupper() and not name.startswith("_")}
    return found


def test_every_constant_that_ships_is_searched_or_said_not_to_be():
    """One that is missing goes into SPACES or UNTIMED of benchmarks/spaces.py."""
    shipped = {(page, name) for page, tree in pages().items() for name in constants_of(tree)}
    searched = {(page, name) for page, space in SPACES.items() for name in space.constants}
    untimed = {(page, name) for page, names in UNTIMED.items() for name in names}
    assert ("_sums", "FEW") in shipped and ("decode.project", "PROGRAMS") in shipped
    assert not searched & untimed
    assert shipped == searched | untimed


def test_every_tile_of_attention_is_searched():
    page = pages()["rotary_attention.tiles"]
    functions = {node.name for node in page.body if isinstance(node, ast.FunctionDef)}
    functions |= {"backward_by_queries"}  # another name of one of them
    public = {name for name in functions if not name.startswith("_")}
    assert {kernel for kernel, _, _ in search.jobs()} == public
    assert all(hasattr(search.tiles, name) for name in public)


UNEQUAL = """
from benchmarks.search import BY_KEYS, BY_QUERIES, FORWARD, Case, compile_only, without_a_gpu

without_a_gpu(90)
case = Case(E=128, window=256, B=1, M=512, H=1)
for kernel in (FORWARD, BY_KEYS, BY_QUERIES):
    for BLOCK_M, BLOCK_N in ((64, 32), (32, 64)):
        sizes = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4, num_stages=1)
        problem = compile_only((kernel, case, sizes))
        assert problem is None, (kernel, sizes, problem)
"""


def test_tiles_of_queries_and_of_keys_may_differ():
    command = [sys.executable, "-c", UNEQUAL]
    done = subprocess.run(command, env=child_environment(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_numbers_that_are_searched_stay_on_their_pages():
    """A page that imported one would keep what ships."""
    imported = {
        ((node.module or "").rpartition(".")[2], alias.name)
        for tree in pages().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for page, space in SPACES.items():
        module = import_module(f"shtx_kernels.{page}")
        for name in space.constants:
            if (page.rpartition(".")[2], name) in imported:
                assert isinstance(getattr(module, name), dict | tuple), (page, name)


def test_a_table_is_changed_on_all_pages_that_import_it(monkeypatch):
    forward, backward = (
        import_module(f"shtx_kernels.hierarchical_merge.{way}") for way in ("forward", "backward")
    )
    for module in (forward, backward):  # and is put back at the end
        monkeypatch.setattr(module, "LEVEL_TILE", forward.LEVEL_TILE)
    monkeypatch.setattr(backward, "STEP", backward.STEP)
    tile = dict(columns=128, elements=1024, num_warps=4)
    set_constants("hierarchical_merge.forward", {"LEVEL_TILE": tile})
    set_constants("hierarchical_merge.backward", {"STEP": 8})
    assert forward.LEVEL_TILE == backward.LEVEL_TILE == tile and backward.STEP == 8


def test_a_benchmark_runs_with_the_choice(tmp_path, monkeypatch):
    """One that no kernel can have, whose failure is a row."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = "hierarchical_ar_loss", "hierarchical_ar_loss", {"TILE": "none"}, ("C",), tmp_path
    rows = search.try_choice(*arguments)
    assert rows and all(row["constants"] == {"TILE": "none"} for row in rows)
    failed = [row for row in rows if "unsupported operand" in row.get("error", "")]
    assert len(failed) == len(rows)
    assert search.time_of(failed[0]) == float("inf")


def test_the_fastest_of_each_case_is_printed_and_all_are_kept(tmp_path, monkeypatch, capsys):
    """The constants that ship take 2.5 ms, the choices 2 ms and more."""
    choices = SPACES["hierarchical_ar_loss"].choices

    def try_choice(bench, page, choice, configs, cache):
        ms = 2 + choices.index(choice) if choice else 2.5
        row = {"bench": bench, "provider": "fused", "page": page, "constants": choice}
        return [row | {"shape": "1 x 2 x 3", "forward_ms": ms / 2, "backward_ms": ms / 2}]

    monkeypatch.setattr(search, "try_choice", try_choice)
    monkeypatch.setattr(search, "resolve", lambda stamp: "0123456789")
    search.main(["hierarchical_ar_loss", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hierarchical_ar_loss hierarchical_ar_loss 1 x 2 x 3 fused"
    assert lines[1].split() == ["2.5000", "as", "shipped"]
    assert lines[2].split(maxsplit=1) == ["2.0000", str(choices[0])]
    assert lines[3].split() == ["2.5000", "as", "shipped"] and len(lines) == 5
    results = json.loads((tmp_path / "search.json").read_text())
    assert len(results["rows"]) == 1 + len(choices) and results["commit"] == "0123456789"
    assert results["machine"]["torch"]


def test_a_page_without_a_search_is_said_in_one_line():
    with pytest.raises(SystemExit, match="^PAGE: 'linear' is unknown, choose from rotary_att"):
        search.main(["linear"])
