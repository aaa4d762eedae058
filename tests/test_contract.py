"""The laws of the house, as assertions."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICE, ROOT, child_environment
from torch.compiler import assume_constant_result

import shtx_kernels
from shtx import HierarchicalTransformer, __version__, ops
from shtx.internals import constant_result
from shtx.plan import is_sharded
from shtx_kernels import decode, reference
from shtx_kernels.reference import decode as reference_decode

KERNELS = ROOT / "shtx_kernels"
KERNEL_FILES = sorted(KERNELS.rglob("*.py"))


def files(op: str) -> list[Path]:
    """An op is a file or a package."""
    return sorted((KERNELS / op).glob("*.py")) or [KERNELS / f"{op}.py"]


# the doors for `shtx`, tests and benchmarks: all other pages that are not ops begin with "_"
DOORS = ("ahead", "decode_arguments", "internals", "launch", "products", "reference")
SHARED_FILES = sorted(KERNELS.glob("_[a-z]*.py"))
SHARED_FILES += [KERNELS / f"{door}.py" for door in DOORS if door != "reference"]
OP_FILES = [path for op in (*shtx_kernels.__all__, "decode") for path in files(op)] + SHARED_FILES


def name(path: Path) -> str:
    return path.relative_to(KERNELS).as_posix()


def imports(path: Path) -> set[str]:
    """Top-level names of what a file imports; relative imports start with dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {dots + (m if dots else m.split(".")[0]) for m in modules}
    return names


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", code], child_environment(ROOT, **variables)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("op", shtx_kernels.__all__)
def test_op_is_file_twin_test_benchmark_and_registered_name(op):
    fused, twin = getattr(shtx_kernels, op), getattr(reference, op)
    assert inspect.signature(fused) == inspect.signature(twin)
    assert op in reference.__all__ and twin.__doc__
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in fused.__doc__
    for path in (*files(op), ROOT / f"tests/test_{op}.py", ROOT / f"benchmarks/bench_{op}.py"):
        assert path.is_file(), path
    assert Path(inspect.getfile(fused)) == files(op)[0]
    registered = {"reconstruction_loss": "linear_cross_entropy"}.get(op, op)  # one, of many targets
    assert getattr(torch.ops.shtx, registered).default


@pytest.mark.parametrize("op", decode.__all__)
def test_op_of_a_token_is_file_and_twin(op):
    """They write into a state, in a graph: nothing is registered; bench_generate measures all."""
    fused, twin = getattr(decode, op), getattr(reference_decode, op)
    assert inspect.signature(fused) == inspect.signature(twin)
    assert Path(inspect.getfile(fused)) == KERNELS / f"decode/{op}.py"
    assert twin.__doc__ and "Args:" in fused.__doc__ and "Source:" in fused.__doc__
    tests = (ROOT / "tests/test_decode_ops.py").read_text()
    assert f'yield "{op}", ' in tests or f"decode.{op}(" in tests


@pytest.mark.parametrize("path", OP_FILES, ids=name)
def test_an_op_imports_no_other_op_and_not_the_reference(path):
    package = path.parent != KERNELS
    own = {f".{file.stem}" for file in path.parent.glob("*.py")} if package else set()
    shared = {f".{'.' * package}{file.stem}" for file in SHARED_FILES}
    allowed = {"torch", "triton", "einops"} | shared | own
    assert imports(path) - sys.stdlib_module_names <= allowed


def test_the_reference_imports_no_triton():
    pages = sorted((KERNELS / "reference").glob("*.py"))
    allowed = {"torch", "einops", "..decode_arguments", "..internals"}
    allowed |= {f".{page.stem}" for page in pages}
    for page in pages:
        assert imports(page) - sys.stdlib_module_names <= allowed


def test_the_kernels_know_no_model_and_the_model_no_kernel():
    for path in KERNEL_FILES:
        assert "shtx" not in imports(path)
    for path in (ROOT / "shtx").rglob("*.py"):
        name = path.relative_to(ROOT / "shtx").as_posix()
        assert name in ("ops.py", "internals.py") or "shtx_kernels" not in imports(path), path


def kernel_modules(path: Path) -> set[str]:
    """Modules of shtx_kernels that a page imports, from the package on."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in found if module.startswith("shtx_kernels.")}


def test_doors_between_packages():
    """Pages that begin with "_" are the package's own; only tests may look into them."""
    pages = {path.stem for path in KERNELS.glob("[a-z]*") if path.suffix in ("", ".py")} - {
        "decode"
    }
    assert pages == {*shtx_kernels.__all__, *DOORS}
    for folder in ("shtx", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            private = [m for m in kernel_modules(path) if m.split(".")[1].startswith("_")]
            assert not private, path
            assert "sys.modules[" not in path.read_text(), path


TOLD = re.compile(r"(torch|triton)\._")


def private_names(path: Path, own: set[str]) -> set[str]:
    """Names of a page that begin with "_" and that the package does not define itself."""
    found, nodes = set(), list(ast.walk(ast.parse(path.read_text())))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if id(node) in parts:
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            if not getattr(node, "level", 0):
                names = [f"{module}.{alias.name}" for alias in node.names]
                names = {part for name in names for part in name.split(".")}
                found |= {name for name in names if name.startswith("_")}
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found |= {node.attr} - {"_exit"}  # that of os, which is documented
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            private = re.fullmatch(r"_[a-z]\w*", text) or (TOLD.search(text) and " " not in text)
            found |= {text} if private else set()
    return {name for name in found - own if not re.fullmatch(r"__\w+__", name)}


def own_names(package: Path) -> set[str]:
    """Names that the pages of a package define: functions, classes, variables and attributes of
    objects of theirs.
    """
    names = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
    return names


@pytest.mark.parametrize("package", ["shtx", "shtx_kernels"])
def test_private_interfaces_stand_on_one_page(package):
    own = own_names(ROOT / package)
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        private = private_names(path, own)
        if name == f"{package}/internals.py":
            assert private
        else:
            assert not private, name


def without(package: str, *absent: tuple[object, str]):
    """A fresh copy of a package's page of private interfaces, as made where these are absent."""
    path = ROOT / package / "internals.py"
    spec = importlib.util.spec_from_file_location(f"{package}.internals", path)
    page = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in absent:
            patch.delattr(owner, name)
        spec.loader.exec_module(page)
    return page


def test_pytorch_without_its_private_interfaces():
    c, autograd = torch._C, torch._C._autograd
    page = without(
        "shtx_kernels",
        (c, "_are_functorch_transforms_active"),
        (c, "_len_torch_dispatch_stack"),
        (c, "_get_tracing_state"),
        (autograd, "_get_current_graph_task_keep_graph"),
        (autograd, "_profiler_enabled"),
        (autograd, "_top_saved_tensors_default_hooks"),
        (torch, "_foreach_copy_"),
    )
    assert page.keeps_graph() and page.count_dispatch_modes() and page.is_recorded()
    assert page.packs_saved_tensors(True) and page.packs_saved_tensors(False)
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    page.copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources))
    with pytest.raises(NotImplementedError, match=r"PyTorch must have .* got \d"):
        page.transforms_active()
    page = without("shtx", (c, "_storage_Use_Count"))
    with pytest.raises(NotImplementedError, match="_storage_Use_Count"):
        page.count_holders(page.storage_of(torch.ones(1)))
    absent = [(torch, f"_foreach_{name}") for name in ("lerp_", "mul_", "add_", "norm")]
    page = without("shtx", *absent, (torch.compiler, "_is_exporting_flag"))
    page.lerp_all(targets, [torch.full((2,), 3.0), torch.full((3,), 5.0)], 0.5)
    page.scale_all(targets, 2.0)
    page.add_all(targets, sources)
    assert [t.tolist() for t in targets] == [[5.0] * 2, [7.0] * 3] and not page.is_exporting()
    assert page.norms_of([torch.tensor([3.0, 4.0]), torch.ones(4)]) == [5.0, 2.0]


def test_ops_without_the_private_interfaces_of_pytorch(monkeypatch):
    """They go through the dispatcher and make no use of what nobody else may need."""
    from shtx_kernels import _autograd, _cross_entropy, _register, internals

    x, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    targets = torch.randint(0, 5, (2, 3), device=DEVICE)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    loss = lambda: shtx_kernels.linear_cross_entropy(*inputs, targets)
    expected = torch.autograd.grad(loss(), inputs)
    monkeypatch.setattr(internals, "_untransformed", None)
    monkeypatch.setattr(_register, "count_dispatch_modes", lambda: 1)
    monkeypatch.setattr(_cross_entropy, "keeps_graph", lambda: True)
    assert all(map(torch.equal, torch.autograd.grad(loss(), inputs), expected))
    assert _autograd.apply_untransformed is internals.apply_untransformed


def test_a_pytorch_without_the_trees_is_refused():
    with pytest.raises(ImportError, match=r"torch.utils._pytree .* got PyTorch \d"):
        without("shtx", (torch.utils._pytree, "tree_map_only"))


def test_triton_without_its_private_interfaces():
    code = """
import sys
import triton
sys.modules["triton.runtime._async_compile"] = None
from shtx_kernels import internals
assert internals.active_mode is None and not internals.launches_are_known()
import torch
import shtx_kernels
x, weight = torch.ones(2, 3, 4), torch.ones(4)
r, y = shtx_kernels.norm_token_shift(x, weight)
assert torch.equal(r, x) and torch.allclose(y, torch.ones_like(y))
"""
    assert run(code, TRITON_INTERPRET="1").returncode == 0


def test_attention_without_the_cores_of_pytorch(monkeypatch):
    from shtx_kernels.rotary_attention import library

    class Cuda(torch.Tensor):
        is_cuda = True

    qkv = torch.empty(1, 600, 48, dtype=torch.float16).as_subclass(Cuda)
    assert library.takes(qkv, 16, -1, 600, False) == library.HAS_ATTENTION_CORES
    monkeypatch.setattr(library, "HAS_ATTENTION_CORES", False)
    assert not library.takes(qkv, 16, -1, 600, False)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name)
def test_kernels_use_no_atomics_and_64_bit_program_ids(path):
    source = path.read_text()
    assert "tl.atomic" not in source
    assert not re.findall(r"tl\.program_id\(\d\)(?!\.to\(tl\.int64\))", source)
    assert "make_block_ptr" not in source and "autotune" not in source


# mistakes of PyTorch, Triton or its interpreter, each with the one page that puts it right
ONE_PAGE = {
    "torch.library.": "_register.py",
    "once_differentiable": None,
    "tl.dot(": "_dot.py",
    "fp32_precision": "products.py",
    "get_float32_matmul_precision": None,
    "cuda.device_of": "launch.py",
    "[grid](": "launch.py",
    "CudaLauncher": "internals.py",
    "pre_run_hooks": "internals.py",
    "triton.cdiv": None,
    "triton.next_power_of_2": None,
}


@pytest.mark.parametrize("text, page", ONE_PAGE.items())
def test_what_stands_on_one_page_alone(text, page):
    users = [name(path) for path in KERNEL_FILES if text in path.read_text()]
    assert users == [page] * (page is not None)


def tiny(**options):
    return HierarchicalTransformer(num_tokens=7, dim=8, depth=1, dim_head=4, heads=1, **options)


def test_fused_without_a_gpu_or_the_interpreter_raises():
    code = """
import torch
from shtx import HierarchicalTransformer
model = HierarchicalTransformer(num_tokens=7, dim=8, depth=1, dim_head=4, heads=1)
model(torch.ones(1, 4, dtype=torch.long))  # auto on a CPU is the reference
model.impl = "fused"
model(torch.ones(1, 4, dtype=torch.long))
"""
    result = run(code)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ValueError: ")
    assert 'impl="fused" cannot run: tensors on cpu need TRITON_INTERPRET=1' in last


def test_without_triton_everything_but_fused_works():
    code = """
import sys
from importlib.util import find_spec
import importlib.util
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None
import torch
from shtx import HierarchicalTransformer, ops
assert ops.FUSED_OPS == () and ops.why_not_fused(torch.device("cpu")) == "Triton is not installed"
model = HierarchicalTransformer(num_tokens=7, dim=8, depth=1, dim_head=4, heads=1)
model(torch.ones(1, 4, dtype=torch.long), return_loss=True)[0].backward()
try:
    model.impl = "fused"
    model(torch.ones(1, 4, dtype=torch.long))
except ValueError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('impl="fused" cannot run: Triton is not installed')


def test_import_takes_no_extra():
    extras = ("tyro", "rich", "safetensors", "matplotlib", "simple_hierarchical_transformer")
    code = f"import shtx, sys; print([m for m in {extras} if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_import_takes_no_compiler():
    """torch._dynamo takes longer to import than torch does."""
    code = """
import sys
from shtx import HierarchicalTransformer, TrainStep
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""
    assert run(code).stdout.strip() == "[]"


def test_the_mark_of_a_constant_result_is_pytorchs():
    ours, theirs = (mark(lambda: 0) for mark in (constant_result, assume_constant_result))
    assert vars(ours) == vars(theirs) != {}


def test_one_version():
    assert f'\nversion = "{__version__}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_example_of_readme_runs(one_process):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    variables = {}
    for code in blocks:
        exec(code, variables)
    assert len(blocks) == 6 and variables["model"].to_logits.weight.grad is None  # stepped
    assert variables["loss"].isfinite() and variables["logits"].shape == (2, 100, 256)
    assert variables["sample"].shape == (2, 32) and variables["token"].shape == (2,)
    assert variables["tokens"].shape[1] <= 32
    assert all(map(is_sharded, variables["large"].parameters()))


def test_impl_is_a_string_that_adds_no_parameter():
    models = [tiny(impl=impl) for impl in ops.IMPLS]
    assert [model.impl for model in models] == list(ops.IMPLS)
    keys = [list(model.state_dict()) for model in models]
    assert keys[0] == keys[1] == keys[2]
    for module in models[0].modules():
        assert not any(inspect.ismodule(value) for value in vars(module).values())


def test_auto_is_decided_by_the_device_of_the_tensors():
    assert ops.resolve("auto", torch.device("cpu")) is ops.REFERENCE
    assert ops.resolve("auto", torch.device("cuda:0")) is ops.FUSED
    assert ops.resolve("reference", torch.device("cuda:0")) is ops.REFERENCE
    assert ops.resolve("fused", torch.device(DEVICE)) is ops.FUSED


FRAGMENTS = "Of As With Within Where Whose By For From Until To And Not Also".split()
FRAGMENTS += "What Whatever Which Whether Who How Why".split()


@pytest.mark.parametrize("folder", ["shtx", "shtx_kernels", "benchmarks", "examples", "tests"])
def test_docstrings_and_comments_are_no_fragments(folder):
    """They say what a thing is or does, in words that begin a sentence."""
    for path in (ROOT / folder).rglob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = (ast.get_docstring(node) or "It").split()[0]
                assert first not in FRAGMENTS, (path, getattr(node, "name", ""))
        lines = [line.strip() for line in source.splitlines()]
        begun = [b for a, b in zip(["", *lines], lines, strict=False) if not a.startswith("#")]
        words = "|".join(FRAGMENTS).lower()
        assert [line for line in begun if re.match(rf"# (?:{words}) ", line)] == [], path
        assert [line for line in lines if re.search(r"\s# of ", line)] == [], path


def test_sizes_of_the_pages():
    """A page past 300 lines has more than one idea, and a kernel past 60 hides one."""
    for path in KERNEL_FILES:
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert node.end_lineno - node.lineno <= 60, node.name


@pytest.mark.parametrize("path", files("decode"), ids=name)
def test_functions_on_a_device_have_few_parameters(path):
    """The fields of LEVELS tell what they are compiled for."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            assert len(node.args.args) < 16, node.name
