"""Models must be more than equal to upstream: causal, and sound where upstream is not."""

import copy
import pickle
import warnings

import pytest
import torch
from covering import ROWS
from helpers import DEVICE, DTYPES, TWO_LEVELS
from torch._dynamo.testing import CompileCounter

from shtx import HierarchicalTransformer, Level, ops
from shtx_kernels._target import capability

OPTIONS = TWO_LEVELS | dict(dim=(32, 17), depth=2, dim_head=8, seq_len=48, window_sizes=(8, None))
ONE_LEVEL = dict(dim=32, hierarchies=1, hierarchical_stride=1, window_sizes=8)


def build(options=OPTIONS, **more):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows larger than the sequence
        return HierarchicalTransformer(**options | more).to(DEVICE)


def draw(tokens=33, batch=2, vocabulary=31):
    torch.manual_seed(1)
    return torch.randint(0, vocabulary, (batch, tokens), device=DEVICE)


def train(model, ids, **options):
    model.zero_grad()
    loss, parts = model(ids, return_loss=True, **options)
    loss.backward()
    return loss, parts


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_causal_at_every_position(row):
    """Tokens from t on change no prediction before t, and a prefix gives what the whole gives."""
    options, _, ablate = ROWS[row]
    model = build(options).eval()
    (ids,) = draw(33, 1, options["num_tokens"])
    others = (ids + 1 + torch.arange(33, device=DEVICE) % 7) % options["num_tokens"]
    before = torch.arange(33, device=DEVICE) < torch.arange(33, device=DEVICE)[:, None]
    variants = torch.where(before, ids, others)  # variant t is changed from t on
    with torch.no_grad():
        whole = model(ids[None], ablate_hierarchical_merge=ablate)[0]
        changed = model(variants, ablate_hierarchical_merge=ablate)
        for t in range(1, 33):
            torch.testing.assert_close(changed[t, :t], whole[:t], rtol=1e-5, atol=1e-5)
            prefix = model(ids[None, :t], ablate_hierarchical_merge=ablate)[0, :t]
            torch.testing.assert_close(prefix, whole[:t], rtol=1e-5, atol=1e-5)
        assert (changed[0] - whole).abs().max() > 1e-3


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("row", [1, 12, 30])
def test_sequences_of_a_batch_do_not_mix(row, impl):
    options, _, _ = ROWS[row]
    model = build(options, impl=impl).eval()
    ids = draw(20, 3, options["num_tokens"])
    together = model(ids)
    for b in range(3):
        torch.testing.assert_close(model(ids[b : b + 1])[0], together[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("row", [2, 13, 25])
def test_compiles_whole(row, impl):
    """0 graph breaks, forward and backward, and the same numbers."""
    options, _, _ = ROWS[row]
    model = build(options, impl=impl, depth=1)
    ids = draw(25, vocabulary=options["num_tokens"])
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for m in (model, compiled):
        loss, _ = train(m, ids)
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("dtype", [None, *([torch.bfloat16] * (DEVICE == "cuda"))])
def test_checkpointing_runs_blocks_again_for_the_same_gradients(impl, dtype, compiled):
    model = build(depth=1, impl=impl)
    runs, results = [], []
    if not compiled:
        for block in model.layers[0]:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
    for model.checkpointing in (False, True):
        torch._dynamo.reset()
        backend = "inductor" if DEVICE == "cuda" else "aot_eager"
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            loss, _ = run(draw(), return_loss=True)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    if compiled:  # Inductor may fuse what runs again in another way
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= (1e-2 if dtype else 1e-4) * b.abs().max()
    else:
        assert all(map(torch.equal, *results))
        assert len(runs) == 2 + 2 * 2  # two levels
        with torch.no_grad():
            model(draw())
        model.eval()(draw())
        assert len(runs) == 6 + 2 * 2


def test_checkpointing_keeps_no_more_of_a_block_than_what_enters_it():
    kept = {}
    for checkpointing in (False, True):
        for depth in (1, 2):
            model = build(OPTIONS | ONE_LEVEL, depth=depth, impl="reference")
            model.checkpointing = checkpointing
            sizes = {}
            pack = lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                model(draw(), return_loss=True)
            kept[checkpointing, depth] = sum(sizes.values())
    entering = 2 * 2 * 32 * 32  # the stream and its branch, (B, N, D) each
    assert kept[True, 2] - kept[True, 1] <= entering < (kept[False, 2] - kept[False, 1]) / 5


@pytest.mark.parametrize("share, layers", [(0, 0), (0.4, 1), (0.7, 2), (1, 3)])
def test_a_share_of_the_layers_keeps_slopes(share, layers):
    model = build(depth=3)
    model.kept_slopes = share
    keeps = [[block.ff.keeps_slope for block in blocks] for blocks in copy.deepcopy(model).layers]
    assert keeps == [[True] * 2] * layers + [[False] * 2] * (3 - layers)
    assert model.kept_slopes == share


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_kept_slopes_are_a_share(share):
    with pytest.raises(ValueError, match=f"kept_slopes must be at (least 0|most 1).*, got {share}"):
        build(depth=1).kept_slopes = share


@pytest.mark.skipif(
    capability(torch.device(DEVICE)) != 90, reason="elsewhere slopes are not kept, whatever is set"
)
def test_kept_slopes_take_memory_and_change_no_loss():
    wide, losses, kept = dict(dim=512, ff_mult=1 / 16), [], []
    for share in (0, 0.5, 1):
        model = build(OPTIONS | ONE_LEVEL | wide, impl="fused")
        model.kept_slopes = share
        sizes = {}
        pack = lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.nbytes}) or t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast(DEVICE, torch.bfloat16):
                losses.append(model(draw(17), return_loss=True)[0].item())
        kept.append(sum(sizes.values()))
    slope = 2 * 16 * 32 * 2  # bytes of (B, N, F)
    assert [more - kept[0] for more in kept] == [0, slope, 2 * slope]
    assert losses[1:] == losses[:1] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="ids are checked on a CPU, or in checked mode")
def test_ids_are_checked_in_compiled_code():
    model = build(depth=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(draw())
    with pytest.raises(ValueError, match=r"ids must be in \[0, num_tokens\) = \[0, 31\), got 31"):
        compiled(draw() + 31 - draw().max())


def test_few_recompilations_over_lengths():
    model = build(depth=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in (9, 12, 17, 24, 31, 33, 40, 48):
            compiled(draw(tokens))
    assert counter.frame_count <= 4


LOW = [torch.bfloat16, torch.float16]
LOW_CASES = [(dtype, "reference") for dtype in LOW] + [
    (dtype, "fused") for dtype in LOW if dtype in DTYPES
]


@pytest.mark.parametrize("dtype, impl", LOW_CASES)
def test_low_precision_weights(dtype, impl):
    """.bfloat16() and .half() train (upstream: RuntimeError) and use no rounded buffer."""
    exact, low = build(impl="reference"), build(impl=impl).to(dtype)
    expected, _ = train(exact, draw())
    loss, _ = train(low, draw())
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in low.parameters())
    assert abs(loss.item() - expected.item()) < 0.02 * expected.item()
    for buffer, made in zip(low.buffers(), exact.buffers(), strict=True):
        buffer.data = made.clone()
    assert torch.equal(low(draw(), return_loss=True)[0], loss)


@pytest.mark.parametrize("dtype, impl", LOW_CASES)
def test_autocast(dtype, impl):
    """Weights and their gradients stay fp32; the residual streams are in the dtype of products."""
    model = build(impl=impl)
    expected, _ = train(model, draw())
    with torch.autocast(DEVICE, dtype):
        loss, _ = model(draw(), return_loss=True)
        logits = model(draw())
        embeds = model(draw(), return_hierarchical_embeds=True)
    model.zero_grad()
    loss.backward()
    assert logits.dtype == dtype and all(e.dtype == dtype for e in embeds)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    assert abs(loss.item() - expected.item()) < 0.02 * expected.item()


def test_fused_and_reference_agree_on_one_model():
    model, ids = build(), draw()
    gradients = []
    for impl in ("reference", "fused"):
        model.impl = impl
        train(model, ids)
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_steps_are_bitwise_repeatable(impl):
    model, ids = build(impl=impl), draw()
    first = None
    for _ in range(20 if DEVICE == "cuda" else 3):
        loss, _ = train(model, ids)
        again = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        first = first or again
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_copies_and_pickles():
    """EMA, spawning and torch.save of a module need them; also after a step was taken."""
    model, ids = build(impl="fused"), draw()
    train(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.impl == "fused" and torch.equal(twin(ids), model(ids))
        twin.impl = "reference"
        assert model.impl == "fused"


def test_inference_mode_then_training():
    model, ids = build().eval(), draw()
    with torch.inference_mode():
        model(ids, return_loss=True)
    train(model.train(), ids)
    assert all(p.grad is not None for p in model.parameters())


def test_buffers_collect_no_gradient():
    model = build()
    for _ in range(2):
        train(model, draw())
    assert all(not b.requires_grad and b.grad is None for b in model.buffers())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_ids_of_any_integer_type(dtype):
    model, ids = build(), draw()
    assert torch.equal(model(ids.to(dtype)), model(ids))
    assert torch.equal(*(model(t, return_loss=True)[0] for t in (ids.to(dtype), ids)))
    assert model.generate(ids.to(dtype), 2).dtype == torch.long


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_shortest_sequences(impl):
    """One token; two with a loss, where upstream gives NaN: a level of one token adds 0."""
    model = build(impl=impl)
    assert model(draw(1)).shape == (2, 1, 31)
    loss, (ce, _, hierarchical_ar) = train(model, draw(2))
    assert hierarchical_ar == 0 and loss.isfinite() and ce > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_empty_batch():
    model = build()
    assert model(draw(5, 0)).shape == (0, 5, 31)
    loss, parts = train(model, draw(5, 0))
    assert loss == 0 and not any(parts)


def test_all_labels_ignored():
    """Loss 0 with zero gradients (upstream: NaN)."""
    model = build(hierarchical_ar_loss_weight=0.0)
    loss, (ce, recon, _) = train(model, torch.zeros(2, 9, dtype=torch.long, device=DEVICE))
    assert loss == 0 and ce == 0 and recon == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_sums_and_counts_of_uneven_batches_add_up(impl):
    """They add up to the loss of all rows, and to its gradients."""
    model, ids = build(impl=impl), draw(17, 4)
    ids[:3, 5:] = 0  # does not count
    loss, _ = train(model, ids)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    weights = ids.new_tensor(model.loss_weights, dtype=torch.float32)
    batches = [model(part, return_loss=True, loss_reduction="sum") for part in (ids[:3], ids[3:])]
    counts = sum(count for _, count in batches)
    total = sum((weights * sums / counts).sum() for sums, _ in batches)
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=0)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_the_largest_loss_comes_first(monkeypatch):
    """The memory that its gradient takes is then free before the others need theirs."""
    compressions, right = [], ops.REFERENCE.reconstruction_loss

    def note(*args, compress, **options):
        compressions.append(compress)
        return right(*args, compress=compress, **options)

    monkeypatch.setattr(ops.REFERENCE, "reconstruction_loss", note)
    three = dict(dim=16, hierarchies=(1, 2, 4), hierarchical_stride=1, window_sizes=8)
    train(build(impl="reference", **three), draw())
    assert compressions == [4, 2]


def test_losses_that_weigh_nothing_still_reach_every_parameter():
    """DistributedDataParallel must not find an unused parameter."""
    model = build(recon_loss_weight=0.0, hierarchical_ar_loss_weight=0.0)
    train(model, draw())
    assert all(p.grad is not None for p in model.parameters())


def test_lists_are_tuples():
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in OPTIONS.items()}
    assert torch.equal(build(lists)(draw()), build()(draw()))


def test_window_larger_than_the_sequence_is_full_attention():
    with pytest.warns(UserWarning, match="window_sizes: 13 is more than the 12 tokens"):
        model = HierarchicalTransformer(**OPTIONS | dict(window_sizes=(8, 13)))
    assert model.levels[1] == Level(4, 2, 17, 8, 2, None, 4)
    assert model.levels[1].dilation == 2


@pytest.mark.parametrize("vocabulary", [31, 2])  # a tenth of 2 is still 1
def test_generate_is_greedy_at_temperature_0_and_restores_training(vocabulary):
    model = build(num_tokens=vocabulary)
    model.to_logits.weight.data.neg_()  # or 0, which an empty choice gives, wins all the time
    prompt = draw(7, vocabulary=vocabulary)
    greedy = model.generate(prompt, 6, temperature=0)
    assert model.training and greedy.shape == (2, 6)
    out = prompt
    for _ in range(6):
        out = torch.cat((out, model(out)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out[:, 7:], greedy) and greedy.any()
    assert model.generate(prompt, 0).shape == (2, 0)


def test_checked_mode_finds_ids_out_of_range():
    model = build()
    model.checked = True
    for bad in (-1, 31):
        ids = draw()
        ids[1, 3] = bad
        with pytest.raises(ValueError, match=rf"\[0, num_tokens\) = \[0, 31\), got {bad}"):
            model(ids)


def test_exports():
    model, ids = build(impl="reference").eval(), draw()
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), model(ids))


@pytest.mark.gpu  # current device and stream are CUDA's
def test_runs_on_a_side_stream():
    model, ids = build(impl="fused"), draw()
    expected = model(ids)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = model(ids)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu  # a graph is the GPU's
def test_a_training_step_is_captured_in_a_cuda_graph():
    model, ids = build(impl="fused"), draw()
    eager = build(impl="fused")
    expected, _ = train(eager, ids)
    stream = torch.cuda.Stream()  # gradients are accumulated on the stream that first made them
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(model, ids)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = model(ids, return_loss=True)
        loss.backward()
    graph.replay()
    assert torch.equal(loss, expected)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
