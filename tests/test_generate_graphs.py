"""Sampling from a model by CUDA graphs; where there is no GPU, a replay is the ops of a run, done
again on the same tensors.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from generation import build, continued, draw
from helpers import DEVICE, PLANTS, without_a_gpu, without_launches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shtx.generation.decoder import Decoder
from shtx.generation.session import MAX_PROMPTS, Session
from shtx.generation.tokens import _sessions
from shtx.graphs import NEVER, ONCE


class Tape(TorchDispatchMode):
    def __init__(self, function):
        super().__init__()
        self.calls = []
        with self:
            function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, tree_leaves(outputs)))
        return outputs

    def replay(self):
        made = {}  # a tensor of the first run: its twin
        twin = lambda t: made.get(id(t), t)
        for function, *arguments, before in self.calls:
            args, kwargs = tree_map_only(Tensor, twin, arguments)
            made |= zip(map(id, before), tree_leaves(function(*args, **kwargs)), strict=True)


@pytest.fixture(params=["tapes", pytest.param("CUDA graphs", marks=pytest.mark.gpu)])
def captured(request, monkeypatch):
    """The names of all captures, in their order."""
    kept, init, capture, graphs = [], Session.__init__, Session._capture, without_a_gpu

    def note(session, what, function):
        kept.append(what)
        if request.param == "CUDA graphs":
            return capture(session, what, function)
        # recording a step would take it
        return SimpleNamespace(replay=function) if what == "step" else Tape(function)

    monkeypatch.setattr(Session, "_capture", note)
    if request.param == "tapes":
        monkeypatch.setattr(Session, "_run_aside", lambda session, function: function())
        monkeypatch.setattr(
            Session, "__init__", lambda s, *args: init(s, *args) or setattr(s, "graphs", graphs())
        )
    return kept


def cropped(rows):
    return [row[-8:] for row in rows] if len(rows[0]) > 16 else rows


def test_all_has_a_graph_from_its_second_turn_on(captured):
    model = build()
    model.checked = True
    for n in range(4):
        prompt = (draw(5) + n) % 31
        expected = continued(model, list(prompt), 40, cropped)
        assert torch.equal(model.generate(prompt, 40, temperature=0), expected)
        assert captured == ["step", 8] if n == 0 else ["step", 8, "refresh", 5]
    model.generate(prompt, 40, top_k=3)  # which a graph of the step has in it
    assert captured == ["step", 8, "refresh", 5, "step"]
    (session,) = _sessions[model].values()
    assert NEVER not in session.graphs.kept.values() and model.checked


def test_a_call_that_only_compiles_leaves_no_trace(captured, monkeypatch):
    ahead = []
    if DEVICE == "cpu":
        monkeypatch.setattr(
            "shtx.generation.session.compile_ahead", lambda f: ahead.append(without_launches(f))
        )
    model, reference = build(impl="fused", depth=1), build(impl="reference", depth=1)
    expected = continued(reference, list(draw()), 3, cropped)
    for _ in range(2):
        assert torch.equal(model.generate(draw(), 3, temperature=0), expected)
        assert DEVICE == "cuda" or len(ahead) == 1


def negate(model):
    for p in model.parameters():
        p.data.neg_()


def load_others(model):
    state = {name: -p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.fill_(float("nan"))  # a graph that still reads it would show
    model.load_state_dict(state, assign=True, strict=False)  # buffers stay


def move_parameters(model):
    for p in model.parameters():
        p.data = -p.data


def halve(model):
    model.half()


@pytest.mark.parametrize(
    "change, again",
    [(negate, False), (load_others, True), (move_parameters, True), (halve, True)],
    ids=["negate", "load_others", "move_parameters", "halve"],
)
def test_what_a_graph_reads_may_change(captured, change, again):
    model = build()
    generate = lambda model: model.generate(draw(), 6, temperature=0, dtype=torch.bfloat16)
    for n in range(6):
        if n == 3:
            before = generate(model)
            change(model)
        out = generate(model)
        assert torch.equal(out, generate(copy.deepcopy(model)))
        assert n != 3 or change is halve or not torch.equal(out, before)
    # copies capture a step each
    assert [what for what in captured if what != "step"] == ["refresh", 5] * (1 + again)


def test_weights_may_be_replaced_in_a_stream(captured):
    model = build()
    for _ in range(3):
        model.generate(draw(), 16, temperature=0)
    assert 8 in captured
    outs = []
    for m in (model, copy.deepcopy(model)):
        stream = m.generate(draw(), 16, temperature=0, stream=True)
        tokens = [next(stream) for _ in range(12)]
        load_others(m)
        outs.append(torch.stack([*tokens, *stream], dim=1))
    assert torch.equal(*outs)


def test_a_model_with_hooks_runs_whole_for_every_token(captured):
    model, lengths = build(), []
    model.generate(draw(), 30)
    captured.clear()
    expected = model.generate(draw(), 8, temperature=0, use_cache=False)
    model.layers[0][0].register_forward_hook(lambda _, args, __: lengths.append(len(args[0][0])))
    with pytest.warns(UserWarning, match=r"without a cache, as layers\.0\.0 has forward hooks"):
        tokens = model.generate(draw(), 8, temperature=0)
    assert torch.equal(tokens, expected) and lengths == list(range(5, 13)) and not captured


def test_prompts_of_unequal_length_have_no_graph(captured):
    model = build()
    prompts = [draw(tokens, 1)[0] for tokens in (7, 1)]
    outs = [model.generate(prompts, 9, temperature=0) for _ in range(3)]
    assert torch.equal(outs[0], outs[2]) and captured == ["step", "refresh"]


def test_few_lengths_have_a_graph(captured):
    model = build()
    for tokens in [1, 2, 3, 1, 2, 3, 3, 4, 3]:
        model.generate(draw(tokens), 2)
    (session,) = _sessions[model].values()
    kept = {what: graph for what, graph in session.graphs.kept.items() if isinstance(what, int)}
    assert list(kept) == [4, 3] and len(kept) == MAX_PROMPTS
    assert kept[4] == ONCE and kept[3] != ONCE
    assert captured == ["refresh", "step", 3]


def test_an_open_region_of_autocast_keeps_no_weights(captured):
    """Such a region may keep the cast of a parameter, which would be stale after a change."""
    model = build()
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            for _ in range(2):
                out = model.generate(draw(), 6, temperature=0)
                assert torch.equal(out, copy.deepcopy(model).generate(draw(), 6, temperature=0))
                negate(model)


@pytest.mark.gpu  # captures
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_p=0.9), dict(top_k=5)], ids=str)
def test_graphs_sample_what_runs_without_them_do(options, dtype):
    model = build(impl="fused")
    options = options | dict(dtype=dtype)
    tokens = [model.generate(draw(), 30, seed=seed, **options) for seed in (1, 2, 1)]
    assert torch.equal(tokens[0], tokens[2])
    (session,) = _sessions[model].values()
    assert session.graphs.kept.keys() == {"step", "refresh", 5, 8}
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in session.graphs.kept.values())
    session.graphs = None
    assert torch.equal(model.generate(draw(), 30, seed=1, **options), tokens[0])


@pytest.mark.gpu  # captures
def test_replays_wait_for_nothing():
    model = build(impl="fused")
    for _ in range(2):
        model.generate(draw(), 30)
    (session,) = _sessions[model].values()
    prompts = [list(draw(tokens)) for tokens in (5, 8)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for prompt in prompts:
            session.prefill(model, prompt, refresh=True)
            session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu  # captures
@pytest.mark.parametrize("what", ["prefill", "refresh", "step"])
def test_a_capture_that_fails_loses_nothing(monkeypatch, what):
    model = build(impl="fused")
    expected = [model.generate(draw(), 30, seed=seed) for seed in range(4)]
    method = getattr(Decoder, what)

    def fail(decoder, *args):
        method(decoder, *args)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("as asked")

    monkeypatch.setattr(Decoder, what, fail)
    _sessions.clear()
    with pytest.warns(UserWarning, match="without a CUDA graph: as asked"):
        tokens = [model.generate(draw(), 30, seed=seed) for seed in range(4)]
    assert all(map(torch.equal, tokens, expected))
    (session,) = _sessions[model].values()
    captured = {n for n, g in session.graphs.kept.items() if isinstance(g, torch.cuda.CUDAGraph)}
    failed = {5, 8} if what == "prefill" else {what}
    assert captured == {"step", "refresh", 5, 8} - failed


@pytest.mark.gpu  # captures
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_step_that_cannot_be_captured(monkeypatch, plant):
    """One warning; later tokens run eagerly, and all else goes on."""
    model, step = build(impl="fused"), Decoder.step
    expected = [model.generate(draw(), 30, seed=seed) for seed in range(3)]
    monkeypatch.setattr(Decoder, "step", lambda decoder: (step(decoder), plant())[0])
    _sessions.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = [model.generate(draw(), 30, seed=seed) for seed in range(3)]
    told = [str(w.message) for w in caught if "without a CUDA graph" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("generate's step")
    assert all(map(torch.equal, tokens, expected))
    assert torch.randint(5, (3,), device="cuda").max() < 5
