"""The tables and charts of results."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from benchmarks import __main__ as cli
from benchmarks import report
from benchmarks.bench_gpus import share_of_one
from benchmarks.benchmark import benchmarks
from benchmarks.cells import key, number

RESULTS = {
    "commit": "abc",
    "date": "2030-01-02",
    "small_shapes": False,
    "machine": {"gpu": "GPU X", "cpu": "x86_64", "driver": "1.2", "torch": "9", "triton": "8"},
    "copy_gb_per_s": 4000.0,
    "matmul_tflop_per_s": 700.0,
    "rows": [
        {"bench": "model", "config": "B", "provider": "upstream", "commit": "abc", "ms": 200.0}
        | {"tokens_per_s": 163840.0, "peak_gib": 22.16, "first_steps_s": 1.5, "caches": "cold"},
        {"bench": "model", "config": "B", "provider": "fused", "commit": "def", "ms": 25.0}
        | {"tokens_per_s": 1310720.0, "peak_gib": 9.5, "caches": "warm"}
        | {"first_step_s": 29.0, "first_steps_s": 31.0, "host_ms": 3.5}
        | {"parts_ms": {"attention": 4.0, "cuBLAS": 20.5}},
        {"bench": "model", "config": "B", "provider": "floor", "commit": "abc", "ms": 40.0},
        {"bench": "model", "config": "B", "provider": "floor-folded", "commit": "abc", "ms": 20.0}
        | {"gemm_tflop_per_s": 600.0},
        {"bench": "model", "config": "A", "provider": "fused", "commit": "abc"}
        | {"error": "OutOfMemoryError: much"},
        *(
            {"bench": "next_latent", "config": "B", "provider": provider, "commit": "abc", "ms": ms}
            for provider, ms in (("fused", 21.0), ("fused-without", 20.0), ("upstream", 210.0))
        ),
        {"bench": "scaling", "config": "C", "provider": "fused", "commit": "abc"}
        | {"shape": "16 x 2048", "ms": 65.536, "tokens_per_s": 5e5, "peak_gib": 4.0}
        | {"batch": 16, "seq_len": 2048},
        {"bench": "scaling", "config": "C", "provider": "fused", "commit": "abc"}
        | {"shape": "4 x 2048", "ms": 16.384, "tokens_per_s": 5e5, "peak_gib": 2.0}
        | {"batch": 4, "seq_len": 2048},
        {"bench": "scaling", "config": "C", "provider": "reference", "commit": "abc"}
        | {"shape": "16 x 2048", "error": "Failed: out of memory: much"},
        {"bench": "gpus", "config": "C", "provider": "fused", "commit": "abc"}
        | {"shape": "weak", "variant": "GPUs: 1", "gpus": 1, "batch": 8, "seq_len": 2048}
        | {"ms": 40.0, "tokens_per_s": 400_000.0, "peak_gib": 4.0},
        {"bench": "gpus", "config": "C", "provider": "fused", "commit": "abc"}
        | {"shape": "weak", "variant": "GPUs: 2", "gpus": 2, "batch": 16, "seq_len": 2048}
        | {"ms": 42.0, "tokens_per_s": 760_000.0, "peak_gib": 4.5},
        {"bench": "gpus", "config": "C", "provider": "fused", "commit": "abc"}
        | {"shape": "strong", "variant": "GPUs: 2", "error": "ValueError: other weights"},
        {"bench": "generate", "config": "C", "provider": "fused", "commit": "abc"}
        | {"variant": "batch 64", "us_per_token": 200.0, "tokens_per_s": 320_000.0}
        | {"prompt_tokens": 128, "new_tokens": 1024, "first_us": 3000.0}
        | {"weight_bytes": 400_000_000.0, "state_bytes": 3 * 2**19},
        {"bench": "generate", "config": "C", "provider": "upstream", "commit": "abc"}
        | {"variant": "batch 64", "us_per_token": 50_000.0, "tokens_per_s": 1280.0}
        | {"prompt_tokens": 624, "new_tokens": 32, "first_us": 48_000.0}
        | {"weight_bytes": 400_000_000.0},
        {"bench": "causal_compress", "provider": "fused", "commit": "abc"}
        | {"shape": "1 x 2 x 3 x 4 x 5 x 6 x 7", "ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "causal_compress", "provider": "cublas", "commit": "abc"}
        | {"shape": "1 x 2 x 3 x 4 x 5 x 6 x 7", "ms": 0.25, "flops": 200_000_000}
        | {"second_ms": 0.1},
        {"bench": "chunk_summary", "config": "B", "provider": "fused", "commit": "abc"}
        | {"ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "next_latent_loss", "provider": "fused", "commit": "abc"}
        | {"shape": "1 x 2 x 3", "ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "feed_forward", "provider": "fused", "commit": "abc"}
        | {"shape": "1 x 2 x 3", "ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {
            "bench": "hierarchical_ar_loss",
            "provider": "copy",
            "commit": "abc",
            "shape": "1 x 2 x 3",
        },
        {"bench": "hierarchical_merge", "config": "B", "provider": "fused", "commit": "abc"}
        | {"ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "linear", "provider": "fused", "commit": "abc"}
        | {"shape": "1 x 2 x 3", "ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "token_embedding", "config": "B", "provider": "fused", "commit": "abc"}
        | {"ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "linear_cross_entropy", "provider": "fused", "commit": "abc"}
        | {"shape": "64 x 16 x 50 x 1", "ms": 0.4, "flops": 100_000_000, "extra_mib": 12.0},
        {"bench": "linear_cross_entropy", "provider": "cublas", "commit": "abc"}
        | {"shape": "64 x 16 x 50 x 1", "ms": 0.2, "flops": 100_000_000},
        {"bench": "reconstruction_loss", "provider": "fused", "commit": "abc"}
        | {"shape": "64 x 16 x 50 x 2", "ms": 0.5, "flops": 200_000_000, "extra_mib": 0.0},
        {"bench": "norm_token_shift", "config": "C", "provider": "fused", "commit": "abc"}
        | {"shape": "8 x 2048 x 1024", "variant": "rms", "forward_ms": 0.05, "backward_ms": 0.1}
        | {"forward_bytes": 100_000_000, "backward_bytes": 300_000_000},
        {"bench": "norm_token_shift", "config": "C", "provider": "copy", "commit": "abc"}
        | {"shape": "8 x 2048 x 1024", "variant": "rms", "forward_ms": 0.04, "backward_ms": 0.08}
        | {"forward_bytes": 100_000_000, "backward_bytes": 300_000_000},
        {"bench": "rotary_attention", "provider": "fused", "commit": "abc"}
        | {"shape": "1 x 16384 x 8 x 64", "variant": "w 128", "forward_ms": 0.1}
        | {"backward_ms": 0.3, "forward_bytes": 200_000_000, "backward_bytes": 900_000_000},
        {"bench": "rotary_attention", "provider": "flex", "commit": "abc"}
        | {"shape": "1 x 16384 x 8 x 64", "variant": "w 128", "forward_ms": 0.2}
        | {"backward_ms": 0.6, "forward_bytes": 200_000_000, "backward_bytes": 900_000_000},
        {"bench": "rotary_attention", "provider": "flex", "commit": "abc"}
        | {"shape": "1 x 16384 x 8 x 64", "variant": "w 64", "error": "ValueError: off"},
    ],
}

TITLE = "GPU X, driver 1.2, torch 9, triton 8; copy 4,000 GB/s, matrix product 700 TFLOP/s"
# the tables of ops around products, whose rows have a configuration, or a shape
BY_CONFIG = """
    config | provider | fwd + bwd (us) | rate (TFLOP/s) | of the rate of cublas (%) |
        extra memory (MiB) | over fused (x)
    B | fused | 500 | 0.400 | - | 0.000 | 1.00
"""
BY_SHAPE = """
    shape B x M x D | provider | fwd + bwd (us) | rate (TFLOP/s) | of the rate of cublas (%) |
        extra memory (MiB) | over fused (x)
    1 x 2 x 3 | fused | 500 | 0.400 | - | 0.000 | 1.00
"""
TABLES = [
    """
    config | provider | step (ms) | of the host (ms) | over floor (x) | over bound (x) |
        over TrainStep (x) | speed-up over upstream (x) | throughput (tokens/s) |
        peak memory (GiB) | first step (s) | first two steps (s)
    A | fused | - | - | - | - | - | - | - | - | - | -
    B | floor-folded | 20.0 | - | 1.00 | 0.952 | 0.800 | 10.0 | - | - | - | -
    B | fused | 25.0 | 3.50 | 1.25 | 1.19 | 1.00 | 8.00 | 1,310,720 | 9.50 | 29.0 | 31.0 warm
    B | floor | 40.0 | - | 2.00 | 1.90 | 1.60 | 5.00 | - | - | - | -
    B | upstream | 200 | - | 10.0 | 9.52 | 8.00 | 1.00 | 163,840 | 22.2 | - | 1.50 cold
    """,
    """
    config | bound (ms) | products (ms) | AdamW (ms) | narrow weights (ms) | attention (ms) |
        norms (ms) | GELU (ms) | merge (ms) | compress (ms) | losses (ms)
    B | 21.0 | 16.3 | 1.56 | 0.112 | 1.16 | 0.805 | 0.217 | 0.403 | 0.285 | 0.126
    """,
    """
    config | all kernels (ms) | attention (ms) | cuBLAS (ms)
    B | 24.5 | 4.00 | 20.5
    """,
    """
    config | provider | step (ms) | over TrainStep without the loss (x) | over TrainStep (x) |
        speed-up over upstream (x) | throughput (tokens/s) | peak memory (GiB)
    B | fused-without | 20.0 | 1.00 | 0.952 | 10.5 | - | -
    B | fused | 21.0 | 1.05 | 1.00 | 10.0 | - | -
    B | upstream | 210 | 10.5 | 10.0 | 1.00 | - | -
    """,
    """
    config | batch x length | provider | step (ms) | time a token (us) | peak memory (GiB)
    C | 4 x 2048 | fused | 16.4 | 2.00 | 2.00
    C | 16 x 2048 | fused | 65.5 | 2.00 | 4.00
    C | 16 x 2048 | reference | - | - | -
    """,
    """
    config | scaling | GPUs | provider | batch x length | step (ms) | throughput (tokens/s) |
        of as many alone (%) | peak memory of one (GiB)
    C | strong | - | fused | - x - | - | - | - | -
    C | weak | 1 | fused | 8 x 2048 | 40.0 | 400,000 | 100 | 4.00
    C | weak | 2 | fused | 16 x 2048 | 42.0 | 760,000 | 95.0 | 4.50
    """,
    """
    config | variant | provider | prompt + new | first token (ms) | per token (us) |
        rate (tokens/s) | of the floor (%) | speed-up over upstream (x) |
        state of a sequence (MiB)
    C | batch 64 | fused | 128 + 1024 | 3.00 | 200 | 320,000 | 50.0 | 250 | 1.50
    C | batch 64 | upstream | 624 + 32 | 48.0 | 50,000 | 1,280 | 0.200 | 1.00 | -
    """,
    """
    shape B x N x V x D x D_out x C x stride | provider | fwd + bwd (us) | rate (TFLOP/s) |
        of the rate of cublas (%) | extra memory (MiB) | over fused (x) |
        less cublas's second product (us)
    1 x 2 x 3 x 4 x 5 x 6 x 7 | cublas | 250 | 0.800 | 100 | - | 0.500 | 150
    1 x 2 x 3 x 4 x 5 x 6 x 7 | fused | 500 | 0.400 | 50.0 | 0.000 | 1.00 | 400
    """,
    BY_CONFIG,
    BY_SHAPE,
    """
    shape B x M x D | variant | provider | forward (us) | forward (GB/s) |
        forward (% of copy) | backward (us) | backward (GB/s) | backward (% of copy) |
        fwd + bwd over fused (x)
    1 x 2 x 3 | - | copy | - | - | - | - | - | - | -
    """,
    BY_CONFIG,
    BY_SHAPE,
    """
    shape T x D x V x C | provider | fwd + bwd (us) | rate (TFLOP/s) | of the rate of cublas (%) |
        extra memory (MiB) | over fused (x)
    64 x 16 x 50 x 1 | cublas | 200 | 0.500 | 100 | - | 0.500
    64 x 16 x 50 x 1 | fused | 400 | 0.250 | 50.0 | 12.0 | 1.00
    """,
    BY_SHAPE,
    """
    shape B x M x D | variant | provider | forward (us) | forward (GB/s) |
        forward (% of copy) | backward (us) | backward (GB/s) | backward (% of copy) |
        fwd + bwd over fused (x)
    8 x 2048 x 1024 | rms | copy | 40.0 | 2,500 | 100 | 80.0 | 3,750 | 100 | 0.800
    8 x 2048 x 1024 | rms | fused | 50.0 | 2,000 | 80.0 | 100 | 3,000 | 80.0 | 1.00
    """,
    """
    shape T x D x V x C | provider | fwd + bwd (us) | rate (TFLOP/s) | of the rate of cublas (%) |
        extra memory (MiB) | over fused (x)
    64 x 16 x 50 x 2 | fused | 500 | 0.400 | - | 0.000 | 1.00
    """,
    """
    shape B x M x H x E | variant | provider | forward (us) | forward (GB/s) |
        forward (% of copy) | backward (us) | backward (GB/s) | backward (% of copy) |
        fwd + bwd over fused (x)
    1 x 16384 x 8 x 64 | w 64 | flex | - | - | - | - | - | - | -
    1 x 16384 x 8 x 64 | w 128 | fused | 100 | 2,000 | 50.0 | 300 | 3,000 | 75.0 | 1.00
    1 x 16384 x 8 x 64 | w 128 | flex | 200 | 1,000 | 25.0 | 600 | 1,500 | 37.5 | 2.00
    """,
    BY_CONFIG,
]


def cells(text: str) -> list[list[list[str]]]:
    """The tables in a text, as lists of lines of cells; the rule below a head is left out."""
    text = re.sub(r"\|\n {8}", "| ", text)
    groups = [group.splitlines() for group in re.split(r"\n\s*\n", text) if " | " in group]
    split = lambda line: [cell.strip() for cell in line.strip("| ").split(" | ")]
    return [
        [split(line) for line in group if " | " in line and "---" not in line] for group in groups
    ]


def full(table: list[list[str]]) -> list[list[str]]:
    """The table without columns that are all dashes."""
    columns = [c for c in zip(*table, strict=True) if set(c[1:]) != {"-"}]
    return [list(line) for line in zip(*columns, strict=True)]


@pytest.fixture
def results_file(tmp_path) -> Path:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RESULTS))
    return path


BENCHES = {row["bench"] for row in RESULTS["rows"]}


def test_tables(results_file, capsys):
    cli.main(["table", str(results_file)])
    text = capsys.readouterr().out
    assert text.startswith(f"{TITLE} (2030-01-02)\n\n**Train step; ")
    headings = [line for line in text.splitlines() if line.startswith("**")]
    bound, profile = headings.pop(1), headings.pop(1)
    assert bound.startswith("**What the bound of a train step is made of, at")
    assert bound.endswith(" (commit abc)**")
    assert profile == "**What the kernels of the fused train step take (commit def)**"
    benches = [bench for bench in benchmarks() if bench in BENCHES]
    for bench, heading in zip(benches, headings, strict=True):
        commits = sorted({row["commit"] for row in RESULTS["rows"] if row["bench"] == bench})
        assert heading.endswith(f" (commit {', '.join(commits)})**")
    assert any("commit abc, def" in heading for heading in headings)
    assert cells(text) == [full(cells(table)[0]) for table in TABLES]
    assert "\n\n- A fused: OutOfMemoryError: much\n\n" in text
    assert "\n\n- 1 x 16384 x 8 x 64 w 64 flex: ValueError: off\n" in text
    assert "\n\n**norm_token_shift; copy: the row of that name, which moves as many bytes," in text


def test_rows_that_no_benchmark_can_show_are_named():
    with pytest.raises(SystemExit, match="bench_wheat.py does not say how to show its rows"):
        report.tables(RESULTS | {"rows": [{"bench": "wheat", "commit": "abc"}]})


def test_a_table_is_aligned_markdown():
    lines = [{"name": "long", "time (ms)": "1.00"}, {"name": "x", "time (ms)": "20.0"}]
    assert report.aligned(lines).splitlines() == [
        "| name | time (ms) |",
        "| ---- | --------: |",
        "| long |      1.00 |",
        "| x    |      20.0 |",
    ]


def test_a_table_has_no_column_of_nothing():
    lines = [{"name": "x", "time (ms)": "-"}, {"name": "y", "time (ms)": "-"}]
    assert report.aligned(lines).splitlines()[0] == "| name |"


def test_tables_go_between_the_markers_of_two_pages(results_file, tmp_path, capsys):
    pages = tmp_path / "README.md", tmp_path / "rest.md"
    write = ["table", str(results_file), "--write", *map(str, pages)]
    for page in pages:
        page.write_text(f"# shtx\n{report.BEGIN}\nformer\n{report.END}\nend\n")
    for _ in range(2):
        cli.main(write)
        assert capsys.readouterr().out == report.tables(RESULTS) + "\n"
        texts = [page.read_text() for page in pages]
        for text in texts:
            assert text.startswith(f"# shtx\n{report.BEGIN}\nGPU X, driver 1.2")
            assert text.endswith(f"\n{report.END}\nend\n") and "former" not in text
        assert texts[1].count(report.tables(RESULTS)) == 1
        ((head, line),) = cells(texts[0])
        shown = dict(zip(head, line, strict=True))
        step = next(r for r in RESULTS["rows"] if key(r)[::4] == ("model", "fused"))
        assert shown["config"] == step["config"] and float(shown["shtx (ms)"]) == step["ms"]
    pages[1].write_text("# shtx\n")
    with pytest.raises(SystemExit, match="lacks <!-- benchmarks:begin -->"):
        cli.main(write)
    assert pages[1].read_text() == "# shtx\n"


def test_results_are_joined(results_file, tmp_path):
    later = RESULTS | {"rows": [RESULTS["rows"][1] | {"ms": 24.0, "commit": "new"}]}
    (tmp_path / "later.json").write_text(json.dumps(later))
    files = [str(results_file), str(tmp_path / "later.json")]
    cli.main(["table", *files, "--out", str(tmp_path / "both")])
    joined = report.read(tmp_path / "both" / "results.json")
    assert len(joined["rows"]) == len(RESULTS["rows"])
    models = [r for r in joined["rows"] if r["bench"] == "model" and r["provider"] == "fused"]
    assert [r["ms"] for r in models if "ms" in r] == [24.0]
    assert {file.name for file in (tmp_path / "both").iterdir()} == {
        "results.json",
        "model.png",
        "gpus.png",
        "scaling.png",
        "generate.png",
    }


def test_results_of_two_machines_have_tables_each(results_file, tmp_path, capsys):
    other = RESULTS | {"machine": RESULTS["machine"] | {"gpu": "GPU Y"}}
    other |= {"rows": [row for row in RESULTS["rows"] if row["bench"] == "model"]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    pages = tmp_path / "README.md", tmp_path / "rest.md"
    for page in pages:
        page.write_text(f"{report.BEGIN}{report.END}")
    files = [str(results_file), str(tmp_path / "other.json")]
    cli.main(["table", *files, "--write", *map(str, pages)])
    assert capsys.readouterr().out == f"{report.tables(RESULTS)}\n\n{report.tables(other)}\n"
    titles = [re.findall(r"^GPU (\w)", page.read_text(), re.M) for page in pages]
    assert titles == [["X"], ["X", "Y"]]
    with pytest.raises(SystemExit, match="--out takes results of one machine, got those of 2"):
        cli.main(["table", *files, "--out", str(tmp_path / "both")])
    with pytest.raises(SystemExit, match="two machines .* gpu was GPU X, is GPU Y"):
        report.join(RESULTS, other)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}'])
def test_damaged_results_are_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="x.json does not hold benchmark results"):
        cli.main(["table", str(path)])
    with pytest.raises(SystemExit, match="missing.json: No such file"):
        cli.main(["table", str(tmp_path / "missing.json")])


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0.0123, "0.012"), (0.5, "0.500"), (4.254, "4.25"), (78.04, "78.0")]
    + [(211.4, "211"), (65536.2, "65,536")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_the_pages_show_the_committed_results(tmp_path):
    committed = ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md"
    pages = tmp_path / "README.md", tmp_path / "rest.md"
    for page, source in zip(pages, committed, strict=True):
        page.write_text(source.read_text())
    cli.main(["table", "--write", *map(str, pages)])
    assert [page.read_text() for page in pages] == [page.read_text() for page in committed]


def test_the_commits_of_results_are_commits():
    files = (ROOT / "benchmarks" / "results").rglob("*.json")
    named = {c for file in files for c in re.findall(r'"commit": "([^"+]+)', file.read_text())}
    exists = {}
    for commit in named:
        command = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
        exists[commit] = subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    if not any(exists.values()):
        pytest.skip("the history of the project is not here")
    assert [commit for commit in named if not exists[commit]] == []


def test_the_campaigns_page_shows_its_file():
    from tests.campaign.__main__ import table

    folder = ROOT / "benchmarks" / "results" / "campaign"
    parts = json.loads((folder / "campaign.json").read_text())
    assert f"\n\n{table(parts)}\n\n" in (folder / "README.md").read_text()


def test_gpus_of_more_layers_are_compared_by_flops():
    rows = [
        dict(bench="gpus", config="E", shape="weak", provider="fused", variant=f"GPUs: {n}")
        | dict(gpus=n, tokens_per_s=speed, flop_per_token=flops)
        for n, speed, flops in ((1, 100.0, 6.0), (2, 60.0, 18.0))
    ]
    assert share_of_one(rows[1], rows) == pytest.approx(0.9)
