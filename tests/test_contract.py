"""The laws of the house, as assertions."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICE, ROOT, child_environment

import shtx_kernels
from shtx import HierarchicalTransformer, __version__, ops
from shtx.plan import is_sharded
from shtx_kernels import decode, reference
from shtx_kernels.reference import decode as reference_decode

KERNELS = ROOT / "shtx_kernels"
KERNEL_FILES = sorted(KERNELS.rglob("*.py"))


def files(op: str) -> list[Path]:
    """An op is a file or a package."""
    return sorted((KERNELS / op).glob("*.py")) or [KERNELS / f"{op}.py"]


SHARED_FILES = sorted(KERNELS.glob("_[a-z]*.py"))
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


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=child_environment(ROOT), cwd=ROOT, capture_output=True, text=True
    )


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
    for path in (KERNELS / "reference").glob("*.py"):
        allowed = {"torch", "einops", ".._groups", "._widen", ".rms_norm"}
        assert imports(path) - sys.stdlib_module_names <= allowed


def test_the_kernels_know_no_model_and_the_model_no_kernel():
    for path in KERNEL_FILES:
        assert "shtx" not in imports(path)
    for path in (ROOT / "shtx").rglob("*.py"):
        assert path.name == "ops.py" or "shtx_kernels" not in imports(path), path


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name)
def test_kernels_use_no_atomics_and_64_bit_program_ids(path):
    source = path.read_text()
    assert "tl.atomic" not in source
    assert not re.findall(r"tl\.program_id\(\d\)(?!\.to\(tl\.int64\))", source)
    assert "make_block_ptr" not in source and "autotune" not in source


# what PyTorch, Triton or the interpreter gets wrong in places, and the one page that puts it right
ONE_PAGE = {
    "torch.library.": "_register.py",
    "once_differentiable": None,
    "tl.dot(": "_dot.py",
    "fp32_precision": "_products.py",
    "get_float32_matmul_precision": None,
    "cuda.device_of": "_launch.py",
    "[grid](": "_launch.py",
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


def test_sizes_of_the_pages():
    """An op past 450 lines is a package, and a kernel past 60 hides an idea."""
    for path in OP_FILES:
        assert len(path.read_text().splitlines()) <= 450, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert node.end_lineno - node.lineno <= 60, node.name
