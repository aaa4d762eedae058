"""Scripts may change a model without replacing modules: the layout of its weights, the dtype of
what modules return, its embedding, its buffers. Numbers stay upstream's.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICE
from test_plan import IMPLS, assert_same, draw, pair, replace
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import fusion, parametrizations

from shtx.plan import unfused

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def weights_of_any_layout(model):
    for p in model.parameters():
        p.data = torch.stack((p.data, p.data), dim=-1)[..., 0]
    torch.manual_seed(4)
    parametrizations.orthogonal(model.hierarchical_merges[0].net[3])  # returns a transposed one
    parametrizations.orthogonal(model.layers[0][0].attn.to_out)


def norms_that_were_folded(model):
    merge, norm = model.hierarchical_merges[0].net, nn.BatchNorm1d(32, device=DEVICE).eval()
    norm.running_mean.fill_(0.1)
    merge[1] = fusion.fuse_linear_bn_eval(merge[1].eval(), norm)


def modules_that_are_gone(model):
    model.layers[0][0].attn = None
    model.layers[0][1].ff.net[0] = nn.Identity()
    model.hierarchical_merges[0].net[1].bias = None


def an_embedding_of_several_modules(model):
    model.token_emb = nn.Sequential(model.token_emb, nn.Dropout(0.0), nn.LayerNorm(16).to(DEVICE))


def another_window(model):
    model.layers[0][0].attn.attn_fn.window_size = 8


def fewer_heads_and_inner_channels(model):
    """Leave a head and half of the inner channels of each block, as structured pruning does."""
    for block in model.layers[0]:
        attn, net = block.attn, block.ff.net
        rows = attn.to_qkv.weight.detach().unflatten(0, (3, 2, 8))[:, :1].flatten(0, 2)
        attn.to_qkv.weight, attn.heads = nn.Parameter(rows.clone()), 1
        attn.to_out.weight = nn.Parameter(attn.to_out.weight.detach()[:, :8].clone())
        net[1].weight = nn.Parameter(net[1].weight.detach()[:20].clone())
        net[3].weight = nn.Parameter(net[3].weight.detach()[:, :20].clone())


def other_attributes(model):
    model.generate(draw(tokens=9), 1)  # what it leaves for later calls has to go
    model.need_hierarchical_merge = model.should_recon = False


def a_larger_vocabulary(model):
    model.should_recon = False  # whose vocabulary stays
    for module in (model.token_emb, model.to_logits):
        module.weight = nn.Parameter(torch.cat((module.weight.detach(), module.weight.detach())))


CHANGES = [
    *(weights_of_any_layout, norms_that_were_folded, modules_that_are_gone),
    *(an_embedding_of_several_modules, another_window, fewer_heads_and_inner_channels),
    *(other_attributes, a_larger_vocabulary),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_models(change):
    ours, theirs = pair("reference")
    for model in (ours, theirs):
        change(model)
    assert_same(ours, theirs)
    prompt = draw(tokens=9) + 31 * (change is a_larger_vocabulary)
    expected = theirs.generate(prompt, 3, temperature=0.0)
    assert torch.equal(ours.generate(prompt, 3, temperature=0), expected)


def test_weights_of_any_layout_stay_fused():
    ours, theirs = pair("fused")
    for model in (ours, theirs):
        weights_of_any_layout(model)
    assert not unfused(ours)
    assert_same(ours, theirs)


class Wide(nn.Module):
    """Leaves autocast, as is done for what overflows."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with torch.autocast(DEVICE, enabled=False):
            return self.module([t.float() for t in x] if isinstance(x, list) else x.float())


WIDE = ["layers.0.0 hierarchical_merges.0", "layers.0.1.ff layers.0.0.attn.to_out norms.0"]


@pytest.mark.parametrize("names", WIDE)
@pytest.mark.parametrize("impl", IMPLS)
def test_modules_that_leave_autocast(impl, names):
    """The modules around them take whatever dtype they return."""
    losses = []
    for model in pair(impl):
        for name in names.split():
            replace(model, name, Wide)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, _ = model(draw(tokens=9), return_loss=True)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


@pytest.mark.gpu  # where auto is fused
def test_torch_func_takes_the_reference_where_impl_is_auto():
    ids, logits = draw(), []
    for model in pair("auto"):
        weights, _ = stack_module_state([model, copy.deepcopy(model)])
        logits.append(vmap(lambda p, m=model: functional_call(m, p, (ids,)))(weights))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_buffers_are_not_written_by_every_step_of_ddp(tmp_path):
    """A buffer that was written has to be read again, and reading it waits for the GPU."""
    ours, _ = pair("reference")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(ours)
        versions = [[b._version for b in ours.buffers()]]
        for _ in range(2):
            model(draw(), return_loss=True)[0].backward()
            versions.append([b._version for b in ours.buffers()])
        del model
    finally:
        dist.destroy_process_group()
    assert versions[0] == versions[1] == versions[2]
