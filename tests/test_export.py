"""A model that is exported, by torch.export or as ONNX, and one without values, on meta."""

import warnings

import pytest
import torch
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream
from torch import nn
from torch.export import Dim, export
from training import OPTIONS

from shtx import HierarchicalTransformer, TrainStep
from shtx.next_latent import HierarchicalTransformer as NextLatentTransformer

IMPLS = ["reference", "fused"]
LENGTHS = 8, 16, 24  # upstream exports lengths that the window divides


def draw(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, 31, (2, tokens), generator=generator)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HierarchicalTransformer(**OPTIONS, impl="reference").eval()


@pytest.fixture(scope="module")
def exported(model):
    length = 4 * Dim("n", min=2, max=6)
    return export(model, (draw(16),), dynamic_shapes={"ids": {1: length}})


def test_a_dynamic_length(model, exported):
    targets = [str(node.target) for node in exported.graph.nodes]
    assert not [target for target in targets if "shtx" in target]  # it runs without this package
    program = exported.module()
    for tokens in LENGTHS:
        torch.testing.assert_close(program(draw(tokens)), model(draw(tokens)))
    with pytest.raises(IndexError, match="out of range"):
        program(draw(16) + 31)


def test_strict_export_and_compiled_code(model):
    """Dynamo makes both; of an exported graph alone no op of this package is part."""
    names = lambda graph: {str(node.target) for node in graph.nodes}
    strict = export(model, (draw(16),), strict=True)
    assert not [name for name in names(strict.graph) if "shtx" in name]
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module

    torch.compile(model, backend=keep, fullgraph=True)(draw(16))
    assert [name for name in names(*graphs) if "checked_ids" in name]


def test_onnx(model, exported):
    pytest.importorskip("onnxscript", reason="needs the extra clients")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
    for tokens in LENGTHS:
        (logits,) = program.call_reference(draw(tokens))
        torch.testing.assert_close(logits, model(draw(tokens)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_values(impl):
    """Shapes on meta are upstream's; a call that needs values says so."""
    with torch.device("meta"):
        theirs, ours = Upstream(**OPTIONS), HierarchicalTransformer(**OPTIONS, impl=impl)
    ids = draw(17).to("meta")
    assert ours(ids).shape == theirs(ids).shape and ours(ids).is_meta
    loss, _ = ours(ids, return_loss=True)
    loss.backward()
    assert loss.shape == () and all(p.grad.shape == p.shape for p in ours.parameters())
    for refused in (
        lambda: ours.generate(ids, 1),
        lambda: TrainStep(ours, torch.optim.SGD(ours.parameters(), 0.1), precision="fp32"),
    ):
        with pytest.raises(ValueError, match="must be in memory, got token_emb.weight on meta"):
            refused()


@pytest.mark.parametrize("assign", [False, True])
def test_values_that_are_loaded(model, assign):
    with torch.device("meta"):
        loaded = HierarchicalTransformer(**OPTIONS, impl="reference")
    if not assign:
        loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(loaded(draw(17)), model(draw(17)))
    prompt = draw(9)
    tokens = loaded.generate(prompt, 4, temperature=0)
    assert torch.equal(tokens, model.generate(prompt, 4, temperature=0))


@pytest.mark.parametrize("kind", [HierarchicalTransformer, NextLatentTransformer])
@pytest.mark.parametrize("like", ["depth 2", "one level", "merge all"])
def test_initial_values_are_those_of_a_constructor(kind, like):
    options = {
        "depth 2": dict(depth=2),
        "one level": dict(hierarchies=1, hierarchical_stride=1, dim=16, window_sizes=4),
        "merge all": dict(hierarchy_merge_all=True, recon_loss_weight=0.0),
    }[like]
    torch.manual_seed(3)
    made = kind(**OPTIONS | options)
    after = torch.rand(())
    with torch.device("meta"):
        model = kind(**OPTIONS | options)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    assert torch.equal(torch.rand(()), after)
    tensors = lambda m: dict([*m.named_parameters(), *m.named_buffers()])
    assert all(torch.equal(t, tensors(model)[name]) for name, t in tensors(made).items())


def test_initial_values_of_a_foreign_module_need_its_word():
    model = HierarchicalTransformer(**OPTIONS)
    model.token_emb.adaptor = nn.ParameterList([torch.zeros(2)])
    with pytest.raises(TypeError, match="modules with reset_parameters, .*got a ParameterList"):
        model.init_weights()
