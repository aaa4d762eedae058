import io
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from helpers import DEVICE, ROOT, child_environment
from running import write

from shtx import __version__, info, ops
from shtx.cli import TRAIN_EXTRA, main
from shtx.train import visible
from shtx.train.checkpoint import load
from shtx.train.config import Config
from shtx.train.generate import Sample
from shtx.train.trainer import build

TOKEN_OPS = [f"decode.{name}" for name in ops.TOKEN_OPS]
CORE_ALONE = f"""
import sys
for name in {(*TRAIN_EXTRA, "triton")}:
    sys.modules[name] = None  # as if it were not installed
import shtx
assert not [name for name in sys.modules if f"{{name}}.".startswith(("shtx.train.", "shtx.cli."))]
from shtx.cli import main
assert main(["info", "--check"]) == 0
assert main(["train"]) == main(["generate"]) == main(["info", "--checkpoint", "x"]) == 1
"""


def test_core_alone_imports_and_informs():
    done = subprocess.run([sys.executable, "-c", CORE_ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
    assert done.stderr.splitlines()[-3:] == [
        f"shtx {verb}: error: tyro, rich, safetensors, matplotlib, numpy not installed:"
        ' pip install "shtx[train]"'
        for verb in ("train", "generate", "info")
    ]


def test_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shtx", "fly"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("shtx", run_name="__main__")
    assert capsys.readouterr().err == (
        "shtx: error: unknown verb 'fly'; the verbs are train, warmup, generate, eval, data,"
        " convert and info\n"
    )


def test_output_that_nobody_reads():
    command = [sys.executable, "-m", "shtx", "info"]
    read, write = os.pipe()
    os.close(read)
    environment = child_environment(ROOT)
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "shtx train --data enwik8.zip" in text and "shtx info --check" in text
    assert "shtx generate --checkpoint runs/enwik8" in text and "compile ahead" in text


def test_train_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "shtx train --resume runs/enwik8" in text and "torchrun" in text
    for flag in (
        "--data --preset --steps --batch-size --lr --precision --impl --seed --out --resume"
        " --device --activation-checkpointing --accumulate --shard"
        " --dim --depth --seq-len --dim-head --heads --ff-mult --hierarchies --window-sizes"
        " --hierarchical-stride --hierarchy-merge-all --predict-hierarchy"
        " --predict-use-all-hierarchy --recon-loss-weight --hierarchical-ar-loss-weight"
        " --schedule --warmup --min-lr --weight-decay --betas --grad-clip --optimizer --level-lr"
        " --ema --init-from --keep --keep-best --sample-every --config --log"
    ).split():
        assert f"{flag} " in text or f"{flag}," in text, flag


def test_warmup_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["warmup", "--help"])
    text = capsys.readouterr().out
    assert (
        "usage: shtx warmup" in text and "--precision " in text and "shtx warmup --resume" in text
    )


def test_warmup_where_nothing_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["warmup", "--preset", "cpu", "--depth", "1"]) == 0
    assert capsys.readouterr().out.startswith("nothing to compile: PyTorch on a CPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--preset cpu --device cuda:99", "--device cuda:99: "),
        ("--preset cpu --steps 0", "--steps must be at least 1, got 0"),
        ("--preset cpu --hierarchies 1 3", "hierarchies must be a power of two, got 3"),
        ("--resume nowhere", f"{Path('nowhere').absolute()}: no checkpoint there"),
    ],
)
def test_warmup_that_cannot_run(arguments, message, capsys):
    assert main(["warmup", *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shtx warmup: error: {message}") and error.count("\n") == 1


def test_warmup_takes_each_part_of_a_run_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    from shtx.train import warmup
    from shtx.train.trainer import Trainer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(warmup, "nothing_to_compile", lambda model: None)
    monkeypatch.setattr("shtx.train.trainer.SAMPLE", 2)
    calls = []
    for name in ("step", "evaluate", "sample"):
        original = getattr(Trainer, name)
        wrapped = lambda *args, name=name, original=original: calls.append(name) or original(*args)
        monkeypatch.setattr(Trainer, name, wrapped)
    sizes = "--dim 8 --depth 1 --heads 1 --dim-head 8 --seq-len 16 --window-sizes 4 None"
    sizes += " --batch-size 2 --eval-sequences 2 --impl fused --device " + DEVICE
    assert main(["warmup", "--preset", "cpu", *sizes.split()]) == 0
    assert calls == ["step", "step", "evaluate", "sample"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("first step", "second step", "validation", "sample"),
    ]
    assert all(float(line.split()[-2]) >= 0 and line.endswith(" s") for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--precision fp8", "fp8"),
        ("--steps many", "many"),
        ("--stepz 3", "--stepz"),
        ("--preset huge", "huge"),
        ("extra", "extra"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", *arguments.split()])
    assert message in capsys.readouterr().err


def test_interrupt_before_the_first_step(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("shtx.train.run.main", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "shtx train: interrupted\n"


def test_info(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == "shtx Python torch Triton CUDA device".split()
    assert lines[2].split()[1] == torch.__version__
    table = {line.split()[0]: line for line in lines[8:]}
    assert table.keys() == {*ops.REFERENCE_OPS, *TOKEN_OPS}
    for name, line in table.items():
        assert ("has no fused form" in line) == (name not in (*ops.FUSED_OPS, *TOKEN_OPS))


def test_info_of_a_checkpoint(run, tmp_path, capsys):
    capsys.readouterr()
    assert main(["info", "--checkpoint", str(run)]) == 0
    path, told = capsys.readouterr().out.splitlines()[-2:]
    model = build(Config.from_json(load(run).config["run"]), torch.device("cpu"))
    parameters = sum(p.numel() for p in model.parameters())
    assert path.endswith(f'step-000060: {parameters:,} parameters, trained with impl="auto"')
    assert told == "every module is as it was made: the ops above are all that runs"
    step = tmp_path / "step-000060"
    shutil.copytree(path.split(":")[0], step)
    weights = load(run).weights
    name = next(name for name in weights if name.endswith("rotary_emb.inv_freq"))
    weights[name] *= 0.5
    write(step, "model.safetensors", safetensors.torch.save(weights))
    assert main(["info", "--checkpoint", str(step)]) == 0
    module, _, reason = capsys.readouterr().out.splitlines()[-1].partition("  ")
    assert module == name.removesuffix(".inv_freq") and "other options or buffers" in reason
    assert main(["info", "--checkpoint", "nowhere"]) == 1
    assert "nowhere: no checkpoint there" in capsys.readouterr().err


def test_check_agrees(capsys):
    assert main(["info", "--check"]) == 0
    table = capsys.readouterr().out.split("relative error", 1)[1].splitlines()[1:]
    assert {line.split()[0] for line in table} == {*ops.FUSED_OPS, *TOKEN_OPS}
    assert all(line.endswith("ok") for line in table)


@pytest.fixture
def one_model(monkeypatch):
    """The least that has all of what is made wrong."""
    monkeypatch.setattr(info, "MODELS", info.MODELS[1:2])


def test_check_finds_a_wrong_op_of_a_token(one_model, monkeypatch, capsys):
    right = ops.FUSED.decode.norm

    def wrong(position, norms):
        right(position, norms)
        norms[0].out.mul_(1.001)

    monkeypatch.setattr(ops.FUSED.decode, "norm", wrong)
    assert main(["info", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if "DISAGREES" in line} == {"decode.norm"}


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize("gradients_alone", [False, True])
def test_check_finds_a_wrong_op(factor, gradients_alone, one_model, monkeypatch, capsys):
    class Wrong(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone() if gradients_alone else x * factor)
        backward = staticmethod(lambda ctx, dx: dx * factor)

    right = ops.FUSED.norm_token_shift

    def wrong(x, *args, **kwargs):
        r, y = right(x, *args, **kwargs)
        return r, Wrong.apply(y)

    monkeypatch.setattr(ops.FUSED, "norm_token_shift", wrong)
    assert main(["info", "--check"]) == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_check_where_fused_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(ops, "why_not_fused", lambda device: "it is too cold")
    assert main(["info", "--check"]) == 0
    text = capsys.readouterr().out
    assert text.count("it is too cold") == len(ops.FUSED_OPS) + len(TOKEN_OPS) + 1
    assert text.endswith("nothing to check: it is too cold\n")


# generate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained on text of more than one byte a character."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_text("naïve café, déjà vu\n" * 400)
    arguments = "--preset cpu --dim 32 --depth 1 --heads 2 --dim-head 8 --seq-len 32 --steps 60"
    arguments += " --window-sizes 8 None --batch-size 8 --eval-sequences 8"
    files = ["--data", str(folder / "text"), "--out", str(folder / "run")]
    assert main(["train", *arguments.split(), *files]) == 0
    return folder / "run"


def generated(capsys, run, *arguments):
    command = ["generate", "--checkpoint", str(run), "--device", "cpu", *arguments]
    status = main(command)
    done = capsys.readouterr()
    return status, done.out, done.err


def test_generate_goes_on_with_the_prompt(run, capsys):
    capsys.readouterr()
    arguments = ["--prompt", "naïve café", "--length", "60", "--temperature", "0"]
    status, text, _ = generated(capsys, run, *arguments)
    assert status == 0 and text.endswith("\n")
    config = Config.from_json(load(run).config["run"])
    model = build(config, torch.device("cpu"))
    model.load_state_dict(load(run).weights)
    prompt = torch.tensor([list("naïve café".encode())])
    ids = model.generate(prompt, 60, temperature=0)
    whole = bytes(prompt[0].tolist() + ids[0].tolist()).decode(errors="replace")
    assert text == visible(whole) + "\n"
    assert "é" in text[10:]  # its two bytes came one by one


def test_generate_repeats_with_a_seed(run, capsys):
    arguments = ["--prompt", "n", "--length", "40", "--top-k", "200", "--temperature", "3"]
    first, second, other, third, fourth = (
        generated(capsys, run, *arguments, *seed)[1]
        for seed in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], [], [])
    )
    assert first == second and len({first, other, third, fourth}) == 4
    assert all(c.isprintable() or c in "\t\n" for c in first + other)
    likely = generated(capsys, run, *arguments[:4], "--top-p", "0.001", "--dtype", "bf16")[1]
    assert likely == generated(capsys, run, *arguments[:4], "--top-k", "1", "--dtype", "bf16")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "--prompt must have at least one byte"),
        ([], "either --prompt or --prompt-file must say how the text begins"),
        (["--prompt", "x", "--prompt-file", "y"], "either --prompt or --prompt-file"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt-file", os.devnull], f"{os.devnull} must have at least one byte"),
        (["--prompt", "x", "--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--prompt", "x", "--stop", "y", ""], "--stop must have at least one byte"),
        (["--prompt", "x", "--out", os.curdir], "must name a new file in a directory"),
        (["--prompt", "x", "--out", "no/where"], "must name a new file in a directory"),
        (["--prompt", "x", "--out", __file__], "is there already"),
        (["--prompt", "x", "--length", "-1"], "--length must be at least 0, got -1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["--prompt", "x", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--prompt", "x", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["--prompt", "x", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["--prompt", "x", "--device", "cuda:99"], "GPUs that PyTorch can use; --device cpu needs"),
        (["--prompt", "x", "--checkpoint", "nowhere"], "nowhere: no checkpoint there"),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_generate_says_what_is_wrong(run, arguments, message, capsys):
    capsys.readouterr()
    status, out, err = generated(capsys, run, *arguments)
    assert status == 1 and out == ""
    assert err.startswith("shtx generate: error: ") and message in err and err.count("\n") == 1


def test_generate_of_a_file_writes_bytes_of_several_samples(run, capsys, tmp_path, monkeypatch):
    capsys.readouterr()
    prompt = "naïve\xff café".encode("latin-1")  # no UTF-8
    (tmp_path / "start").write_bytes(prompt)
    arguments = ["--prompt-file", str(tmp_path / "start"), "--length", "50", "--seed", "3"]
    arguments += ["--num-samples", "3", "--top-k", "200", "--temperature", "2"]
    status, text, _ = generated(capsys, run, *arguments, "--out", str(tmp_path / "song.bin"))
    files = [tmp_path / f"song-{i}.bin" for i in (1, 2, 3)]
    contents = [file.read_bytes() for file in files]
    assert status == 0 and text == "".join(f"{file}: 61 bytes\n" for file in files)
    assert len(set(contents)) == 3 and all(c.startswith(prompt) for c in contents)
    assert {path.name for path in tmp_path.iterdir()} == {"start", *(f.name for f in files)}
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(prompt)))
    arguments[1] = "-"
    status, text, _ = generated(capsys, run, *arguments)
    shown = (visible(content.decode(errors="replace")) for content in contents)
    assert text == "".join(f"[{i}]\n{content}\n" for i, content in enumerate(shown, 1))


def test_generate_ends_before_a_stop_text(run, capsys):
    capsys.readouterr()
    arguments = ["--prompt", "naïve café", "--length", "60", "--temperature", "0"]
    _, whole, _ = generated(capsys, run, *arguments)
    new = whole.removeprefix("naïve café").encode()
    stop = new[20:24].decode(errors="ignore")
    before = new[: new.index(stop.encode())]
    assert len(stop) >= 2 and before
    _, text, _ = generated(capsys, run, *arguments, "--stop", "nowhere to be found", stop)
    assert text == "naïve café" + before.decode() + "\n"


def test_a_stop_text_is_never_shown_in_part():
    sample = Sample([list(stop) for stop in (b"abc", b"bd", b"ab" * 3)])
    assert [bytes(sample.add(byte)) for byte in b"xababa"] == [b"x", *[b""] * 5]
    assert bytes(sample.add(ord("d"))) == b"ababad" and sample.rest() == []
    assert bytes(sample.add(ord("y"))) == b"y" and not sample.ended
    assert [sample.add(byte) for byte in b"ababc"] == [[], [], [], [], list(b"ab")]
    assert sample.ended and bytes(sample.ids) == b"xababadyab" and sample.add(ord("z")) == []


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shtx {__version__}\n"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_does_not_wait_for_pytorch(argument):
    code = f"""
import sys
from shtx.cli import main
assert main([{argument!r}]) == 0 and "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], env=child_environment(ROOT), cwd=ROOT)
    assert result.returncode == 0


def test_generate_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    flags = "checkpoint prompt prompt-file length num-samples stop out temperature top-k top-p seed"
    for flag in f"{flags} device dtype".split():
        assert f"--{flag} " in text, flag
