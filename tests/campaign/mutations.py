"""Mutations: changes of the code that some test must notice.

Those that are listed are mistakes that were made, or that tests once let through. Others are drawn:
a comparison, an operator, a number or a call is replaced by its neighbour. A mutation that survives
is either a test that is missing, or is told in UNSEEN, with the reason why nobody can notice it.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from helpers import ROOT

from tests.campaign import Case

PATIENCE = 600  # seconds, after which tests count as failed: a mutation may loop for ever
COPIED = ("shtx", "shtx_kernels", "tests", "benchmarks", "pyproject.toml", "README.md")


class Mutation(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str


LISTED = [
    # sampling
    Mutation(
        "shtx/generation/session.py",
        "if self.drawn % NOISE == 0 and",
        "if self.drawn == 0 and",
        "tests/test_generate.py::test_noise_is_never_used_twice",
    ),
    Mutation(
        "shtx_kernels/decode/sample.py",
        "tl.min(ids, axis=0)",
        "tl.max(ids, axis=0)",
        "tests/test_decode_ops.py::test_sample_takes_the_first_of_the_best",
    ),
    Mutation(
        "shtx_kernels/decode/sample.py",
        "tl.maximum(e, 1e-20)",
        "e",
        "tests/test_decode_ops.py::test_sample_where_noise_is_zero",
    ),
    # the merge
    Mutation(
        "shtx_kernels/hierarchical_merge/forward.py",
        "level == group.levels[0])",
        "True)",
        "tests/test_hierarchical_merge.py::test_matches_reference",
    ),
    Mutation(
        "shtx_kernels/hierarchical_merge/forward.py",
        "kind = lambda i: (strides[i], shapes[i][1])",
        "kind = lambda i: strides[i]",
        "tests/test_hierarchical_merge.py::test_matches_reference",
    ),
    Mutation(
        "shtx_kernels/hierarchical_merge/forward.py",
        "if levels[-1] - levels[0] + 1 == len(levels):",
        "if True:",
        "tests/test_hierarchical_merge.py::test_matches_reference",
    ),
    Mutation(
        "shtx_kernels/hierarchical_merge/forward.py",
        "least = tl.full(norm.shape, 1e-12,",
        "least = tl.full(norm.shape, 0.0,",
        "tests/test_hierarchical_merge.py::test_rows_at_and_below_the_clamp",
    ),
    Mutation(
        "shtx_kernels/hierarchical_merge/backward.py",
        "slope = tl.where(live, ",
        "slope = tl.where(live | True, ",
        "tests/test_hierarchical_merge.py::test_rows_at_and_below_the_clamp",
    ),
    # levels
    Mutation(
        "shtx/levels.py",
        "if value & (value - 1):",
        "if value % 2 and value > 1:",
        "tests/test_bad_input.py::test_constructor",
    ),
    Mutation(
        "shtx/levels.py",
        "if level.window != 0 and level.dim_head % 2:",
        "if level.dim_head % 2:",
        "tests/test_bad_input.py::test_odd_heads_where_nothing_rotates",
    ),
    Mutation(
        "shtx/levels.py",
        "if level.window != 0 and level.dim_head % 2:",
        "if False:",
        "tests/test_bad_input.py::test_constructor",
    ),
    Mutation(
        "shtx/levels.py",
        "if window <= seq_len // compress:",
        "if window < seq_len // compress:",
        "tests/test_bad_input.py::test_windows_as_long_as_the_level",
    ),
    # the schedule
    Mutation(
        "shtx/train/trainer.py",
        "min(1.0, (step - warmup) / (steps - warmup))",
        "min(1.0, step / steps)",
        "tests/test_train.py::test_learning_rate",
    ),
    Mutation(
        "shtx/train/trainer.py",
        "return config.lr * (step + 1) / warmup",
        "return config.lr * step / warmup",
        "tests/test_train.py::test_learning_rate",
    ),
    Mutation(
        "shtx/train/trainer.py",
        "torch.manual_seed(self.config.seed)\n        with self.averaged(), self.autocast():",
        "with self.averaged(), self.autocast():",
        "tests/test_train.py::test_sample_repeats",
    ),
    # the flags of a run
    Mutation(
        "shtx/train/optimizers.py",
        'is_matrix or config.decayed == "all"',
        "True",
        "tests/test_train.py::test_matrices_alone_decay",
    ),
    Mutation(
        "shtx/train/trainer.py",
        "        with self.averaged():\n            return self._evaluate",
        "        if True:\n            return self._evaluate",
        "tests/test_train_flags.py::test_validations_and_samples_are_of_the_average_and_leave_the_weights",
    ),
    Mutation(
        "shtx/train/loop.py",
        "done > 0 and bits < least",
        "done > 0",
        "tests/test_train_flags.py::test_the_best_is_kept_beside_the_newest",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        " + [path for path in before if step_of(path) == best]",
        "",
        "tests/test_train_flags.py::test_the_best_is_kept_beside_the_newest",
    ),
    Mutation(
        "shtx/muon.py",
        '1 - lr * group["weight_decay"]',
        "1.0",
        "tests/test_muon.py::test_steps_of_pytorch",
    ),
    # runs and their files
    Mutation(
        "shtx/train/checkpoint.py",
        "    doomed = _temporary(path)\n    path.rename(doomed)\n    shutil.rmtree(doomed)",
        "    shutil.rmtree(path)",
        "tests/test_checkpoint.py::test_removal_that_was_interrupted",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "        sync(temporary / name)\n",
        "",
        "tests/test_checkpoint.py::test_synced_before_it_is_named",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "        folder.mkdir()\n        sync(run)",
        "        folder.mkdir()",
        "tests/test_checkpoint.py::test_directory_of_the_first_checkpoint_is_synced_too",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "    if path.is_symlink() or not path.is_dir():",
        "    if not path.is_dir():",
        "tests/test_home.py::test_files_of_others_stay",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "if not all(map(shards.NAME.fullmatch, names)):",
        "if False:",
        "tests/test_home.py::test_files_of_others_stay",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        'written.get("id") == id and',
        "True and",
        "tests/test_home.py::test_files_of_others_stay",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "before = ours[: ours.index(newest) + 1]",
        "before = ours",
        "tests/test_checkpoint.py::test_resuming_an_older_step_gives_up_the_later_ones",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "with suppress(OSError):  # what cannot",
        "with suppress(KeyError):  # what cannot",
        "tests/test_checkpoint.py::test_what_cannot_be_removed_ends_nothing",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "if step_of(other) < step_of(path)] + [path]",
        "] + [path]",
        "tests/test_checkpoint.py::test_fallback_never_goes_ahead",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "if listed != _fingerprint(contents[name]):",
        "if False:",
        "tests/test_checkpoint.py::test_damage_is_named_and_nothing_is_deleted",
    ),
    Mutation(
        "shtx/train/checkpoint.py",
        "weights_only=True, map",
        "weights_only=False, map",
        "tests/test_hostile.py::test_one_line",
    ),
    Mutation(
        "shtx/train/files.py",
        "    sync(path.parent)\n\n\ndef read(",
        "\n\ndef read(",
        "tests/test_checkpoint.py::test_synced_before_it_is_named",
    ),
    Mutation(
        "shtx/train/home.py",
        "            if _same(lock, file):\n",
        "            if True:\n",
        "tests/test_home.py::test_lock_that_was_removed_before_it_was_held",
    ),
    Mutation(
        "shtx/train/home.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/test_home.py::test_lock_is_of_one",
    ),
    Mutation(
        "shtx/train/home.py",
        'return home if written["id"] == id else None',
        "return home",
        "tests/test_home.py::test_checkpoint_of_another_run",
    ),
    Mutation(
        "shtx/train/home.py",
        '("", *(f"-{n}" for n in range(2, 1000))):\n            with suppress',
        '("",):\n            with suppress',
        "tests/test_home.py::test_names_of_one_second",
    ),
    Mutation(
        "shtx/train/home.py",
        "                sync(folder)\n",
        "",
        "tests/test_checkpoint.py::test_directory_of_the_first_checkpoint_is_synced_too",
    ),
    Mutation(
        "shtx/train/home.py",
        "if need > free:",
        "if need > 2 * free:",
        "tests/test_train.py::test_disk_is_looked_at_before_training",
    ),
    Mutation(
        "shtx/train/loop.py",
        "            home.check()\n",
        "",
        "tests/test_home.py::test_directory_that_is_removed_meanwhile",
    ),
    Mutation(
        "shtx/train/loop.py",
        "return signum or trainer.agree(ended())",
        "return signum",
        "tests/test_ends.py::test_signal",
    ),
    Mutation(
        "shtx/train/loop.py",
        "if trainer.world == 1 and losses:",
        "if False:",
        "tests/test_train.py::test_data_that_changes_meanwhile_costs_no_step",
    ),
    Mutation(
        "shtx/train/metrics.py",
        "_step(row) is None or _step(row) <= step]",
        "_step(row) is None or _step(row) < step]",
        "tests/test_train.py::test_resume_of_an_older_step",
    ),
    Mutation(
        "shtx/train/stop.py",
        "caught = SIGNALS[:-1] if ignored else SIGNALS",
        "caught = SIGNALS",
        "tests/test_ends.py::test_hangup_that_nohup_ignores",
    ),
    Mutation(
        "shtx/train/progress.py",
        "self.console.print(visible(text))",
        "self.console.print(text)",
        "tests/test_ends.py::test_control_characters_stay_off_the_terminal",
    ),
    Mutation(
        "shtx/train/progress.py",
        "            self.signum = int(signal.SIGPIPE)",
        "            pass",
        "tests/test_ends.py::test_reader_that_leaves",
    ),
    Mutation(
        "shtx/cli.py",
        'stream.reconfigure(errors="backslashreplace")',
        "pass",
        "tests/test_ends.py::test_locale_without_characters",
    ),
    Mutation(
        "shtx/cli.py",
        "getattr(error, \"signum\", stop.signum) or",
        'getattr(error, "signum", 0) or',
        "tests/test_ends.py::test_signal_that_somebody_swallows",
    ),
    # data
    Mutation(
        "shtx/train/store.py",
        "or self._identify() != self.identity:",
        "or False:",
        "tests/test_data.py::test_data_that_changes_meanwhile",
    ),
    Mutation(
        "shtx/train/store.py",
        "bisect_right(self.starts, at) - 1",
        "max(0, bisect_right(self.starts, at) - 2)",
        "tests/test_sources.py::test_files_are_read_where_they_lie",
    ),
    Mutation(
        "shtx/train/sources.py",
        'if head[257:262] == b"ustar":',
        "if False:",
        "tests/test_sources.py::test_members_are_documents",
    ),
    Mutation(
        "shtx/train/sources.py",
        'head = re.sub(b"^BZh[1-8]", b"BZh9", head)  # the size of its blocks\n',
        "\n",
        "tests/test_data.py::test_blocks_of_bz2_are_of_any_size",
    ),
    Mutation(
        "shtx/train/sources.py",
        "        if not frame.eof:\n",
        "        if False:\n",
        "tests/test_sources.py::test_damaged_archives",
    ),
    Mutation(
        "shtx/train/sources.py",
        'mode="r|", tarinfo=_Member)',
        'mode="r|")',
        "tests/test_sources.py::test_damaged_archives",
    ),
    Mutation(
        "shtx/train/data.py",
        "np.uint64(len(self.train) - self.seq_len)",
        "np.uint64(len(self.train) - self.seq_len - 1)",
        "tests/test_data.py::test_data_order_never_changes",
    ),
    Mutation(
        "shtx/train/tokens.py",
        "(ids >= tokens.num_tokens)",
        "(ids > tokens.num_tokens)",
        "tests/test_tokens.py::test_bad_files",
    ),
    Mutation(
        "shtx/train/describe.py",
        "known = max(0, len(rest) - len(self.separator) + 1)",
        "known = len(rest)",
        "tests/test_describe.py::test_documents",
    ),
    Mutation(
        "shtx/train/stream.py",
        "((step >= before) | (starts == 0))",
        "((step > before) | (starts == 0))",
        "tests/test_stream.py::test_as_one_long_forward",
    ),
]  # fmt: skip

# the tests that must notice drawn mutations of a file; for others, all of tests/test_<name>.py
TESTS = {
    "shtx/levels.py": "test_bad_input test_model",
    "shtx/generation/arguments.py": "test_generate test_bad_input",
    "shtx/generation/__init__.py": "test_generate test_bad_input",
    "shtx/generation/decoder.py": "test_decode test_generate",
    "shtx/generation/session.py": "test_generate test_generate_graphs",
    "shtx/generation/stages.py": "test_decode",
    "shtx/generation/state.py": "test_decode",
    "shtx/generation/tokens.py": "test_generate",
    "shtx/layers.py": "test_model test_upstream",
    "shtx/train/checkpoint.py": (
        "test_checkpoint test_home test_hostile test_loading test_train_processes"
    ),
    "shtx/train/home.py": "test_home test_train",
    "shtx/train/files.py": "test_checkpoint test_home test_hostile",
    "shtx/train/metrics.py": "test_train test_hostile",
    "shtx/train/data.py": "test_data test_sources",
    "shtx/train/sources.py": "test_data test_sources",
    "shtx/train/store.py": "test_data test_sources test_tokens",
    "shtx/train/encode.py": "test_describe",
    "shtx/train/evaluate.py": "test_eval test_stream test_tokens",
    "shtx/train/score.py": "test_eval",
    "shtx/train/loop.py": "test_train test_ends test_home",
    "shtx/train/trainer.py": "test_train test_hostile",
    "shtx/train/stop.py": "test_ends",
    "shtx_kernels/decode_arguments.py": "test_decode_ops",
    "shtx/train/optimizers.py": "test_train test_train_flags",
    "shtx/train/speed.py": "test_train_flags",
    "shtx/train/loggers.py": "test_train_flags",
    "shtx/optimizers.py": "test_muon",
    "shtx/muon.py": "test_muon",
    "shtx/loading.py": "test_loading",
    "shtx_kernels/_cross_entropy.py": "test_linear_cross_entropy test_reconstruction_loss",
    "shtx_kernels/_gelu.py": "test_feed_forward test_next_latent_loss",
    "shtx_kernels/_gelu_hopper.py": "test_gelu_hopper",
    "shtx_kernels/_one_hot.py": "test_token_embedding test_causal_compress test_chunk_summary",
    "shtx_kernels/norm_token_shift.py": "test_norm_token_shift",
    "shtx_kernels/token_embedding.py": "test_token_embedding",
    "shtx_kernels/hierarchical_ar_loss.py": "test_hierarchical_ar_loss",
    "shtx_kernels/next_latent_loss/__init__.py": "test_next_latent_loss",
    "shtx_kernels/next_latent_loss/kernels.py": "test_next_latent_loss",
    "shtx_kernels/next_latent_loss/mlp.py": "test_next_latent_loss",
    "shtx_kernels/causal_compress/kernels.py": "test_causal_compress",
    "shtx_kernels/causal_compress/table.py": "test_causal_compress",
    "shtx_kernels/causal_compress/windows.py": "test_causal_compress",
    "shtx_kernels/hierarchical_merge/forward.py": "test_hierarchical_merge",
    "shtx_kernels/hierarchical_merge/backward.py": "test_hierarchical_merge",
    "shtx_kernels/rotary_attention/tiles.py": "test_rotary_attention",
    "shtx_kernels/rotary_attention/forward.py": "test_rotary_attention",
    "shtx_kernels/rotary_attention/backward.py": "test_rotary_attention",
    "shtx_kernels/rotary_attention/tokens.py": "test_rotary_attention",
    "shtx_kernels/decode/sample.py": "test_decode_ops",
    "shtx_kernels/decode/attend.py": "test_decode_ops",
    "shtx_kernels/decode/project.py": "test_decode_ops",
    "shtx_kernels/decode/_many.py": "test_decode_ops",
}

# drawn mutations that nobody can notice: (file, line as it is mutated) -> why
UNSEEN = {
    ("shtx/train/data.py", "SPLIT = (1.9, 0.1)"): "the first share is what the others leave",
    (
        "shtx/train/optimizers.py",
        "scales = config.level_lr * (1 if len(config.level_lr) > 2 else len(model.levels))",
    ): "scales beyond the levels are not read",
    ("shtx/train/files.py", "BLOCK = 1 << 21  # bytes"): "how much is read at a time",
    (
        "shtx_kernels/hierarchical_ar_loss.py",
        "dh = h.new_empty(h.shape if backward else 1,"
        " dtype=h.dtype if h.dtype == p.dtype else acc)",
    ): "a number that is not written or read",
    (
        "shtx/train/home.py",
        'for suffix in ("", *(f"-{n}" for n in range(2, 1001))):',
    ): "after a thousand runs of one second",
    ("shtx/train/encode.py", "if num_tokens <= 1:"): "a tokenizer of one token",
    (
        "shtx/train/speed.py",
        'unit = 1 if sys.platform != "darwin" else 1024',
    ): "the other system's unit is seen on that system",
    ("shtx/train/sources.py", "count += 2"): "only whether it is 0 is asked",
    (
        "shtx/train/store.py",
        "while len(content) <= count:  # one read returns at most 2 GiB",
    ): "one read more, of nothing, ends it",
    (
        "shtx_kernels/hierarchical_merge/forward.py",
        "square += tl.load(square_ptr + row, mask=offs_m < kept, other=1.0)",
    ): "rows that are not stored",
}

NEIGHBOURS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "*", ast.And: "or",
    ast.Or: "and", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
CALLS = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "any": "all"}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those in f-strings, whose places Python 3.11 does not tell, and but those that
    decide about speed alone, about what zip checks, or about the line that a warning names."""
    yield node
    for child in ast.iter_child_nodes(node):
        keyword = child.arg if isinstance(child, ast.keyword) else None
        checks = keyword == "strict" and getattr(node.func, "id", None) == "zip"
        passed = checks or keyword in ("num_warps", "num_stages", "stacklevel")
        if not passed and not isinstance(child, ast.JoinedStr):
            yield from walk(child)


def mutants(source: str) -> list[tuple[str, str]]:
    """All mutations of a file: the file with one, and the line of it."""
    found = []
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    content = source.encode()
    position = lambda line, column: starts[line - 1] + column

    def put(start: int, end: int, text: str):
        mutated = (content[:start] + text.encode() + content[end:]).decode()
        found.append((mutated, mutated.splitlines()[content[:start].count(b"\n")].strip()))

    def between(left: ast.expr, right: ast.expr, operator: ast.AST):
        """Replace the operator, which is all that stands between two operands but brackets."""
        start = position(left.end_lineno, left.end_col_offset)
        end = position(right.lineno, right.col_offset)
        text = content[start:end].decode()
        old = text.strip(" ()\n")
        if type(operator) in NEIGHBOURS and old and "#" not in text:
            put(start, end, text.replace(old, NEIGHBOURS[type(operator)]))

    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BinOp):
            between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            start, end = (
                position(node.lineno, node.col_offset),
                position(node.end_lineno, node.end_col_offset),
            )
            put(start, end, str(not node.value if type(node.value) is bool else node.value + 1))
        elif isinstance(node, ast.Call):
            name = node.func
            word = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
            if word in CALLS:
                end = position(name.end_lineno, name.end_col_offset)
                put(end - len(word), end, CALLS[word])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start = position(node.lineno, node.col_offset)
            put(start, start + len("not"), "")
    return found


class Copy:
    """The project, to be changed."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder = folder
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, folder / name)

    def passes(self, tests: str) -> bool:
        paths = os.pathsep.join((str(self.folder), os.environ.get("PYTHONPATH", "")))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # that of a file of the same second is stale
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        with subprocess.Popen(
            [*command, *tests.split()],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                return process.wait(PATIENCE) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return False

    def survives(self, file: str, content: str, tests: str) -> bool:
        """Return whether the tests do not notice."""
        path = self.folder / file
        before = path.read_text()
        path.write_text(content)
        try:
            return self.passes(tests)
        finally:
            path.write_text(before)


def unchanged(tests: list[str], numbers: range, copy: Copy) -> None:
    """Each job's share of the tests has to pass without a mutation."""
    for share in tests[numbers.start :: numbers.step]:
        if not copy.passes(share):
            raise RuntimeError(f"{share} fail without a mutation, or take {PATIENCE} seconds")


def listed(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Mistakes that were made, or that tests once let through."""
    copy = Copy(folder)
    unchanged(sorted({mutation.tests for mutation in LISTED[: numbers.stop]}), numbers, copy)
    for file, old, new, tests in LISTED[numbers.start : numbers.stop : numbers.step]:
        source = (ROOT / file).read_text()
        if source.count(old) != 1:
            raise RuntimeError(f"{file}: {old!r} stands there {source.count(old)} times")
        survives = copy.survives(file, source.replace(old, new), tests)
        finding = f"{file}: {old!r} -> {new!r}: {tests} pass" if survives else None
        yield Case(finding, {"caught": int(not survives)})


def drawn(numbers: range, seed: str, folder: Path) -> Iterator[Case]:
    """Draw mutations, as many of every file that has tests of its own."""
    pool = {file: mutants((ROOT / file).read_text()) for file in TESTS}
    for file, mutations in pool.items():
        Random(f"{seed} {file}").shuffle(mutations)
    chosen = []  # file, what it becomes, the line of it
    while len(chosen) < numbers.stop and any(pool.values()):
        for file in [file for file in pool if pool[file]][: numbers.stop - len(chosen)]:
            chosen.append((file, *pool[file].pop()))
    copy = Copy(folder)
    tests = {f: " ".join(f"tests/{name}.py" for name in n.split()) for f, n in TESTS.items()}
    unchanged(sorted({tests[file] for file, *_ in chosen}), numbers, copy)
    for file, content, line in chosen[numbers.start :: numbers.step]:
        survives = copy.survives(file, content, tests[file])
        explained = survives and (file, line) in UNSEEN
        finding = f"{file}: {line!r}: {tests[file]} pass" if survives and not explained else None
        yield Case(finding, {"caught": int(not survives), "explained": int(explained)})
