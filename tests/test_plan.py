"""A model that tools have changed: whatever is not as its layer made it is called, on any device,
and computes what upstream's modules would.
"""

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream
from torch import nn
from torch.nn.utils import parametrizations, prune
from training import OPTIONS

from shtx import HierarchicalTransformer, TrainStep
from shtx.internals import modules_below, parameters_below
from shtx.plan import look, unfused

IMPLS = ["reference", "fused"]
LINEAR = [
    "compressors.0.compress_fn",
    "compressors.1.to_recon",
    "to_hierarchical_preds.1",
    "layers.0.0.attn.to_qkv",
    "layers.0.1.attn.to_out",
    "layers.0.0.ff.net.1",
    "layers.0.1.ff.net.3",
    "hierarchical_merges.0.net.1",
    "to_logits",
]
# the widest level is the first, so that its compressor is the identity where widths are equal
NARROW_FIRST = dict(dim=(8, 16))


def pair(impl, **options):
    """Ours and upstream's, of the same weights."""
    torch.manual_seed(0)
    theirs = Upstream(**OPTIONS | options).to(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = HierarchicalTransformer(**OPTIONS | options, impl=impl).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(batch=2, tokens=22):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 31, (batch, tokens), generator=generator).to(DEVICE)


def run(model):
    """The loss, its parts, logits, and the gradient of every parameter that gets one."""
    model.zero_grad()
    loss, parts = model(draw(), return_loss=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [loss.detach(), *(p.detach() for p in parts), model(draw()).detach()], gradients


def assert_same(ours, theirs, tolerance=2e-5):
    """Compare all that `run` returns; return the loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (values, gradients), (expected, expected_gradients) = run(ours), run(theirs)
    for a, b in zip(values, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, b in expected_gradients.items():
        error = (gradients[name] - b).abs().max()
        assert error <= 1e-4 * b.abs().max() + 1e-7, f"{name}: {error}"
    return values[0]


class Scaled(nn.Module):
    """A wrapper, as adaptors are, with a parameter of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.gain = nn.Parameter(torch.full((), 2.0, device=DEVICE))

    def forward(self, *args):
        return self.module(*args).tanh() * self.gain


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh() * 1.5


def replace(model, name, make):
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    new = make(getattr(parent, last))
    if last.isdigit():
        parent[int(last)] = new
    else:
        setattr(parent, last, new)


def subclass(module):
    new = Subclass(module.in_features, module.out_features, bias=module.bias is not None)
    new.load_state_dict(module.state_dict())
    return new.to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_plain_model_calls_nothing(impl):
    ours, theirs = pair(impl)
    assert not look(ours).called and not unfused(ours)
    assert_same(ours, theirs)
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert not look(same).called


@pytest.mark.parametrize("impl", IMPLS)
def test_every_module_runs_its_hooks(impl):
    """Their inputs and outputs are upstream's: the same shapes, values and gradients."""
    seen = {}
    ours, theirs = pair(impl, **NARROW_FIRST)
    for who, model in (("ours", ours), ("theirs", theirs)):
        seen[who] = {}
        for name, module in model.named_modules():
            if name:

                def note(module, args, output, name=name, kept=seen[who]):
                    tensors = [*args[0]] if isinstance(args[0], (list, tuple)) else [*args[:1]]
                    tensors = [t for t in [*tensors, output] if isinstance(t, torch.Tensor)]
                    kept.setdefault(name, []).append([t.detach() for t in tensors])

                module.register_forward_hook(note)
    for model in (ours, theirs):  # no level is padded in them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(draw(tokens=25), return_loss=True)
    missing = seen["theirs"].keys() - seen["ours"].keys()
    # upstream's own attention, which has no parameters, is an op here
    assert all(name.endswith(".attend") or ".attend." in name for name in missing), missing
    for name, calls in seen["theirs"].items():
        for kept, expected in zip(seen["ours"].get(name, calls), calls, strict=True):
            for a, b in zip(kept, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "name", ["token_emb", "layers.0.1.attn.to_qkv", "layers.0.0.ff", "norms.0"]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_hooks_change_values_and_gradients(impl, name):
    ours, theirs = pair(impl)
    for model in (ours, theirs):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, output: output * 3)
        if name != "token_emb":
            module.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 0.5, *dx[1:]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_global_hooks_see_every_module(impl):
    counts = []
    for model in pair(impl):
        names = set()
        note = lambda m, *_, names=names: names.add(id(m))
        hook = nn.modules.module.register_module_forward_hook(note)
        try:
            model(draw(), return_loss=True)
        finally:
            hook.remove()
        with_parameters = [m for m in model.modules() if m._parameters]
        counts.append(sum(id(m) in names for m in with_parameters))
        assert counts[-1] == len(with_parameters)


@pytest.mark.parametrize(
    "make, names",
    [*((Scaled, [name]) for name in LINEAR), (subclass, LINEAR)],
    ids=[*LINEAR, "all"],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_module_in_the_place_of_another(impl, make, names):
    ours, theirs = pair(impl, **NARROW_FIRST)
    before = run(theirs)[0][0]
    for model in (ours, theirs):
        for name in names:
            replace(model, name, make)
    assert unfused(ours).keys() >= set(names)
    assert abs(assert_same(ours, theirs) - before) > 5e-5
    if impl == "fused" and DEVICE == "cpu":
        return  # interpreted, whole models take long for a token
    prompt = draw(tokens=9)
    with pytest.warns(UserWarning, match="without a cache"):
        tokens = ours.generate(prompt, 4, temperature=0)
    assert torch.equal(tokens, theirs.generate(prompt, 4, temperature=0.0))


@pytest.mark.parametrize(
    "name",
    ["layers.0.0.attn", "layers.0.1.attn", "layers.0.1.ff", "layers.0.1", "hierarchical_merges.0"]
    + ["compressors.1", "norms.1", "layers.0.1.ff.net", "layers.0.1.attn.norm"],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_in_a_wrapper(impl, name):
    """This holds, too, with a dilation, where upstream's layout is another."""
    ours, theirs = pair(impl)
    for model in (ours, theirs):
        if name == "compressors.1":  # a wrapper hides `recon`, upstream's too
            model.get_submodule(name).register_forward_hook(lambda m, args, output: output * 2)
        else:
            replace(model, name, Scaled)
    assert_same(ours, theirs)


def test_the_reason_tells_classes_of_one_name_apart():
    ours, _ = pair("reference")
    namesake = type("Linear", (nn.Linear,), {"__module__": "tool"})
    ours.to_logits = namesake(16, 16)
    reason = "is a tool.Linear, not the torch.nn.modules.linear.Linear that it was made"
    assert unfused(ours)["to_logits"] == reason


@pytest.mark.parametrize("impl", IMPLS)
def test_other_options(impl):
    def change(model):
        model.token_emb.padding_idx = 5
        model.norms[0].eps = 0.1
        model.layers[0][0].ff.net[2].approximate = "tanh"
        model.layers[0][1].ff.net[2] = nn.SiLU()
        model.layers[0][0].attn.to_out = nn.Linear(16, 16, device=DEVICE)
        nn.init.constant_(model.layers[0][0].attn.to_out.weight, 0.01)
        nn.init.constant_(model.layers[0][0].attn.to_out.bias, 0.5)

    ours, theirs = pair(impl)
    for model in (ours, theirs):
        change(model)
    assert_same(ours, theirs)
    assert ours.token_emb.weight.grad[5].abs().sum() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: nn.utils.weight_norm(m),
        lambda m: parametrizations.weight_norm(m),
        lambda m: parametrizations.weight_norm(m, dim=1),
        lambda m: torch.manual_seed(3) and parametrizations.spectral_norm(m),
        lambda m: parametrizations.orthogonal(m),
    ],
    ids=["prune", "old weight_norm", "weight_norm", "weight_norm of columns"]
    + ["spectral_norm", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed(impl, change):
    """Three steps of training, and tokens, are upstream's."""
    ours, theirs = pair(impl)
    losses = []
    for model in (ours, theirs):
        for name in ("layers.0.0.ff.net.1", "layers.0.1.attn.to_qkv", "to_logits"):
            change(model.get_submodule(name))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses.append([])
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss, _ = model(draw(), return_loss=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    prompt = draw(tokens=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = ours.generate(prompt, 4, temperature=0)
    assert torch.equal(tokens, theirs.generate(prompt, 4, temperature=0.0))


def test_parametrized_weights_stay_fused_and_cached():
    ours, _ = pair("fused")
    parametrizations.weight_norm(ours.layers[0][0].ff.net[1])
    assert not look(ours).called
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.generate(draw(tokens=9), 2)


def test_one_warning_a_model():
    ours, _ = pair("fused")
    replace(ours, "to_logits", Scaled)
    with pytest.warns(UserWarning, match="1 modules run by themselves.*to_logits is a Scaled"):
        ours(draw(), return_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours(draw(), return_loss=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_layers_by_themselves_are_upstreams(impl):
    ours, theirs = pair(impl)
    x = torch.randn(2, 12, 8, device=DEVICE)
    for name in ("layers.0.1", "layers.0.1.attn", "layers.0.1.ff", "norms.1"):
        out, expected = (model.get_submodule(name)(x) for model in (ours, theirs))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, msg=name)


# Triton's interpreter is one for all threads
@pytest.mark.parametrize("impl", ["reference", pytest.param("fused", marks=pytest.mark.gpu)])
def test_threads_share_a_model(impl):
    """Generate, generate, train and forward at once: all get what they get alone."""
    shared, _ = pair(impl, depth=1)
    trained, alone = (pair(impl, depth=1)[0] for _ in range(2))
    prompt = draw(tokens=9)

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        step = TrainStep(model, optimizer, precision="bf16-mixed")
        return torch.stack([step(draw())[0] for _ in range(3)])

    def forward():
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            return shared(draw(), return_loss=True)[0]

    jobs = [
        lambda: shared.generate(prompt, 6, temperature=0),
        lambda: shared.generate(prompt, 6, temperature=0),
        forward,
        lambda: shared(draw()).detach(),
    ] * 2
    expected = [job() for job in jobs] + [train(alone)]
    jobs.append(lambda: train(trained))
    results = [None] * len(jobs)

    def work(i):
        results[i] = jobs[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, right in zip(results, expected, strict=True):
        assert result is not None and torch.equal(result, right)


def test_the_buffers_of_a_rotation_that_was_replaced_count():
    class Slower(nn.Module):
        def forward(self, n):
            angles = torch.arange(n, device=DEVICE)[:, None] * torch.full((8,), 0.01, device=DEVICE)
            return angles, torch.ones_like(angles)

    ours, theirs = pair("reference")
    for model in (ours, theirs):
        model.layers[0][1].attn.rotary_emb = Slower()
    assert_same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_buffers_of_rotations_that_were_edited(impl):
    """They are edited in place or replaced; moving or rounding a model is no edit."""
    ours, theirs = pair(impl)
    for same in (copy.deepcopy(ours), copy.deepcopy(ours).bfloat16(), copy.deepcopy(ours).double()):
        assert not look(same).called
    for model in (ours, theirs):
        full, window = model.layers[0][1].attn.rotary_emb, model.layers[0][0].attn.attn_fn.rel_pos
        full.inv_freq *= 0.5
        full.scale = full.scale * 0.9
        window.inv_freq *= 0.25
    names = {"layers.0.1.attn.rotary_emb", "layers.0.0.attn.attn_fn.rel_pos"}
    assert unfused(ours).keys() == names
    assert_same(ours, theirs)
    fresh, _ = pair(impl)
    fresh.load_state_dict(ours.state_dict())
    assert unfused(fresh).keys() == names
    # the edits are undone
    full, window = ours.layers[0][1].attn.rotary_emb, ours.layers[0][0].attn.attn_fn.rel_pos
    full.inv_freq *= 2
    full.scale = full.scale / 0.9
    window.inv_freq.data = window.inv_freq.data * 4
    assert not unfused(ours)


def test_compiled_code_calls_what_has_to_be_called():
    ours, theirs = pair("reference")
    for model in (ours, theirs):
        model.layers[0][1].attn.rotary_emb.inv_freq *= 0.5
        replace(model, "layers.0.0.ff.net.1", Scaled)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(draw()), theirs(draw()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_in_the_place_of_others(impl):
    """Modules stay plain when their weights are swapped, assigned or tied."""
    ours, theirs = pair(impl, dim=16)
    ours(draw(), return_loss=True)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    for model in (ours, theirs):
        weight = model.layers[0][0].ff.net[1].weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.5))
        values = {name: state[name] * 0.8 for name in state if name.startswith("layers.0.1.attn.t")}
        assert len(values) == 2
        model.load_state_dict(values, strict=False, assign=True)
        model.requires_grad_(True)
        model.to_logits.weight = model.token_emb.weight
    assert not unfused(ours)
    assert_same(ours, theirs)
    if impl == "fused" and DEVICE == "cpu":
        return  # interpreted, whole models take long for a token
    prompt = draw(tokens=9)
    for factor in (1.0, -1.3):
        with torch.no_grad():
            for model in (ours, theirs):
                model.token_emb.weight *= factor
        tokens = ours.generate(prompt, 4, temperature=0)
        assert torch.equal(tokens, theirs.generate(prompt, 4, temperature=0.0))


def test_hooks_of_the_model_itself():
    ours, theirs = pair("reference")
    seen = []
    for model in (ours, theirs):
        kept = []
        model.register_forward_pre_hook(lambda m, args: (args[0].flip(0), *args[1:]))
        model.register_forward_hook(lambda m, args, out, kept=kept: kept.append(type(out)))
        model.register_full_backward_hook(lambda m, dx, dy, kept=kept: kept.append(len(dy)))
        seen.append(kept)
    assert_same(ours, theirs)
    assert seen[0] == seen[1] and len(seen[0]) > 2
    assert not unfused(ours)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_class_whose_forward_was_replaced(impl, monkeypatch):
    ours, theirs = pair(impl)
    assert not unfused(ours)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 1.5)
    assert "Linear, whose forward was replaced" in unfused(ours)["to_logits"]
    assert_same(ours, theirs)


def test_a_head_that_is_no_layer():
    ours, theirs = pair("reference", num_tokens=8)
    for model in (ours, theirs):
        model.to_logits = nn.Identity()
    ids = draw() % 8
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-4, atol=1e-5)
    losses = [model(ids, return_loss=True)[0] for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_what_is_below_a_model_is_what_pytorch_lists():
    model = HierarchicalTransformer(**OPTIONS | dict(depth=2))
    model.layers[1][0] = model.layers[0][0]  # shared
    model.compressors[0] = parametrizations.weight_norm(nn.Linear(3, 3))
    model.post_token_emb_norms[0].bias = None
    assert modules_below(model) == list(model.modules())
    theirs = list(model.parameters())
    assert list(map(id, parameters_below(model))) == list(map(id, theirs))


def test_layers_that_were_taken_out_or_shared():
    for change in (
        lambda m: (m.layers.pop(1), m.hierarchical_merges.pop(1)),
        lambda m: m.layers.__setitem__(1, m.layers[0]),
    ):
        ours, theirs = pair("reference", depth=2)
        for model in (ours, theirs):
            change(model)
        assert_same(ours, theirs)
        prompt = draw(tokens=9)
        tokens = ours.generate(prompt, 3, temperature=0)
        assert torch.equal(tokens, theirs.generate(prompt, 3, temperature=0.0))


def test_attributes_that_scripts_read():
    ours, theirs = pair("reference")
    for name in (
        "seq_len hierarchies h_strides dims predict_hierarchy_index hierarchy_merge_all"
        " need_hierarchical_merge should_recon recon_loss_weight hierarchical_ar_loss_weight"
        " has_hierarchical_ar_loss predict_use_all_hierarchy ignore_index device"
    ).split():
        assert getattr(ours, name) == getattr(theirs, name), name


def test_predictions_of_a_strided_level():
    options = dict(dim=(16,), hierarchies=(4,), hierarchical_stride=(2,), window_sizes=(None,))
    ours, theirs = pair("reference", **options, hierarchy_merge_all=True)
    for tokens in (8, 9):
        prompt = draw(tokens=tokens)
        expected = theirs.generate(prompt, 4, temperature=0.0)
        for use_cache in (True, False):
            out = ours.generate(prompt, 4, temperature=0, use_cache=use_cache)
            assert torch.equal(out, expected)


def test_a_vocabulary_that_grew_after_generating():
    ours, theirs = pair("reference")
    ours.generate(draw(tokens=9), 2)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.token_emb = nn.Embedding(40, 16).to(DEVICE)
        model.to_logits = nn.Linear(16, 40, bias=False).to(DEVICE)
    prompt = draw(tokens=9) + 9
    expected = theirs.generate(prompt, 4, temperature=0.0)
    assert torch.equal(ours.generate(prompt, 4, temperature=0), expected)


def test_unsigned_prompts():
    ours, _ = pair("reference")
    expected = ours.generate(draw(tokens=9), 3, temperature=0)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(ours.generate(draw(tokens=9).to(dtype), 3, temperature=0), expected)


def test_mistyped_arguments_of_generate():
    ours, _ = pair("reference")
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        ours.generate(draw(), 1, temprature=0.5)
    for name in ("temperature", "top_p", "filter_thres"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got 'a'"):
            ours.generate(draw(), 1, **{name: "a"})


def test_what_a_step_refuses():
    model, other = (pair("reference")[0] for _ in range(2))
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer must have parameters of the model"):
        TrainStep(model, optimizer, precision="fp32")
    with pytest.raises(
        TypeError, match="a model and its optimizer or several of them, in this order"
    ):
        TrainStep(optimizer, model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), precision="fp32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_others(dtype):
    ours, _ = pair("reference")
    expected = ours.generate(draw(tokens=9), 4, seed=1), run(ours)[0][0]
    torch.set_default_dtype(dtype)
    try:
        fresh = copy.deepcopy(ours)
        assert torch.equal(fresh.generate(draw(tokens=9), 4, seed=1), expected[0])
        assert torch.equal(run(fresh)[0][0], expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_logits_of_a_wrapped_head_are_those_of_the_loss():
    """Training and inference agree on what predicts."""
    for impl in IMPLS:
        ours, _ = pair(impl, recon_loss_weight=0.0, hierarchical_ar_loss_weight=0.0)
        replace(ours, "to_logits", Scaled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, _ = ours(draw(), return_loss=True)
            logits = ours(draw()[:, :-1])
        expected = F.cross_entropy(logits.mT, draw()[:, 1:], ignore_index=0)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
