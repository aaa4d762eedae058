"""The pages of docs/ say what is so."""

import importlib
import inspect
import re

import pytest
import torch
from helpers import ROOT

import shtx
import shtx_kernels

DOCS = ROOT / "docs"
NAMES = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def named(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = sorted(page.name for page in DOCS.glob("*.md") if BLOCK.search(page.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_pages_runs(page, capsys, tmp_path, monkeypatch):
    if page == "tools.md":
        pytest.importorskip("peft", reason="needs the extra clients")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    variables = {}
    for code in BLOCK.findall((DOCS / page).read_text()):
        exec(code, variables)
        for comment in re.findall(r"^print\(.*\)  # (\[.*)$", code, re.MULTILINE):
            assert comment in capsys.readouterr().out


def test_pages_have_code():
    assert {"idea.md", "index.md", "tools.md"} <= {*PAGES}


def test_messages_of_troubleshooting_are_in_the_code():
    files = [
        path for package in ("shtx", "shtx_kernels") for path in (ROOT / package).rglob("*.py")
    ]
    code = "\n".join(path.read_text() for path in files)
    code = re.sub(r"""["']\n\s*f?["']""", "", code)  # strings that go on in the next line
    text = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    assert len(messages) > 15
    assert [message for message in messages if message not in code] == []


def test_public_names_are_in_the_reference():
    listed = {path.rpartition(".")[2] for path in NAMES}
    assert {*shtx.__all__, *shtx_kernels.__all__} <= listed


@pytest.mark.parametrize("path", NAMES)
def test_names_of_the_reference_are_documented(path):
    thing = named(path)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        doc = thing.__doc__
        assert "Args:" in doc and ("Returns:" in doc or "Yields:" in doc)
        for name in inspect.signature(thing).parameters:
            assert re.search(rf"^ +\*{{0,2}}{name}\b.*:", doc, re.MULTILINE), name


def test_all_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}\n" in navigation for page in DOCS.glob("*.md"))
