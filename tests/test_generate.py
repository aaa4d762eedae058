"""Sampling, alone and from a model."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from covering import ROWS, TOKENS
from generation import WINDOWED, build, continued, draw
from helpers import DEVICE
from simple_hierarchical_transformer import HierarchicalTransformer as Upstream
from simple_hierarchical_transformer.simple_hierarchical_transformer import top_k as upstream_top_k

from shtx import ops
from shtx.generation import CHECK_EVERY
from shtx.generation.arguments import make_sampling
from shtx.generation.decoder import Decoder
from shtx.generation.session import Session
from shtx.generation.tokens import MAX_SESSIONS, _sessions

# sampling


def sample(logits, noise, *options):
    """Sample a token for each row; on a CPU by the reference: test_decode_ops has the other."""
    out = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
    ops.resolve("auto", out.device).decode.sample(out, logits, noise[:, None], *options, out)
    return out


def kept_ids(probabilities, draws=4000, **options):
    """The ids that are ever sampled, and how often."""
    logits = torch.tensor(probabilities, device=DEVICE).log().expand(draws, -1)
    arguments = dict(temperature=1.0, filter_thres=0.0, top_k=None, top_p=None) | options
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator(DEVICE).manual_seed(0))
    ids = sample(logits, noise, *make_sampling(len(probabilities), **arguments))
    counts = ids.bincount(minlength=len(probabilities)) / draws
    return counts.nonzero().flatten().tolist(), counts


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [0, 1, 2, 3]),
        ({"temperature": 0}, [2]),
        ({"filter_thres": 0.9}, [2]),  # 0.4 of an id is one
        ({"filter_thres": 0.5}, [0, 2]),
        ({"filter_thres": 0.5, "top_k": 3}, [0, 1, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.01}, [2]),
        ({"top_p": 0.49}, [2]),
        ({"top_p": 0.51}, [0, 2]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 0.51, "temperature": 0.5}, [2]),  # the best id has 0.73
        ({"top_p": 0.8, "temperature": 4.0}, [0, 1, 2, 3]),  # the best three have 0.79
        ({"top_p": 0.6, "top_k": 2}, [2]),  # the best id has 0.67
        ({"top_p": 0.7, "top_k": 2}, [0, 2]),
    ],
    ids=str,
)
def test_what_may_be_sampled(options, kept):
    assert kept_ids([0.25, 0.15, 0.5, 0.1], **options)[0] == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_how_often_it_is(options, temperature):
    p = torch.tensor([0.25, 0.15, 0.5, 0.1])
    kept, counts = kept_ids(p.tolist(), draws=40000, temperature=temperature, **options)
    expected = torch.zeros(4)
    expected[kept] = p[kept] ** (1 / temperature)
    torch.testing.assert_close(counts.cpu(), expected / expected.sum(), rtol=0, atol=0.01)


@pytest.mark.parametrize("thres", [0.0, 0.3, 0.9, 0.95])
def test_filter_thres_keeps_what_upstream_keeps(thres):
    logits = torch.randn(1, 40, device=DEVICE).expand(5000, -1)
    ids = sample(
        logits, torch.empty_like(logits).exponential_(), *make_sampling(40, 9.0, thres, None, None)
    )
    kept = upstream_top_k(logits[:1], thres)[0] > -1e30
    assert kept[ids].all() and len(ids.unique()) == kept.sum()


def test_a_row_without_noise_is_its_best_id_at_any_temperature():
    """This holds, too, where the softmax is one or zero in fp32 or the noise rounds to zero."""
    logits = torch.randn(3, 50, device=DEVICE) * 100
    noise = torch.ones_like(logits)
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        for top_p in (0.5, 1.0):
            ids = sample(logits, noise, temperature, 20, top_p)
            assert temperature == 1e30 or torch.equal(ids, logits.argmax(-1))
    assert torch.equal(sample(logits, noise * 0, 1.0, 50, 1.0), logits.argmax(-1))


# tokens


@pytest.mark.parametrize("row", range(0, len(ROWS), 4))
def test_greedy_tokens_are_upstreams(row):
    """The last of them sampled from model.seq_len tokens."""
    options, _, _ = ROWS[row]
    ours = build(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Upstream(**options).to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    prompt = draw(7, vocabulary=options["num_tokens"])
    greedy = [m.generate(prompt, TOKENS - 6, temperature=0) for m in (ours, theirs)]
    assert torch.equal(*greedy) and greedy[0].shape == (2, TOKENS - 6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_unequal_length(use_cache):
    """Each gets the tokens that it gets alone."""
    model = build()
    prompts = [draw(tokens, 1)[0] for tokens in (7, 1, 4)]
    together = model.generate(prompts, 9, temperature=0, use_cache=use_cache)
    assert together.shape == (3, 9) and together.dtype == torch.long
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], 9, temperature=0, use_cache=use_cache)
        assert torch.equal(alone[0], tokens)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_sample(shape):
    batch, count = shape
    model = build()
    assert model.generate(draw(3, batch), count).shape == shape
    assert not list(model.generate(draw(3, batch), count, stream=True))
    assert model.generate(draw(3, 1), 1).shape == (1, 1)


def test_arguments_of_forward_do_without_the_cache():
    model = build()
    kwargs = dict(temperature=0, ablate_hierarchical_merge=True)
    out = draw()
    for _ in range(6):
        best = model(out, ablate_hierarchical_merge=True)[:, -1:].argmax(-1)
        out = torch.cat((out, best), dim=1)
    assert torch.equal(model.generate(draw(), 6, **kwargs), out[:, 5:])


def test_dtype():
    model = build()
    expected = model.generate(draw(), 6, temperature=0)
    low = model.generate(draw(), 6, temperature=0, dtype=torch.bfloat16)
    assert (low == expected).float().mean() > 0.5
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(model.generate(draw(), 6, temperature=0), low)
    assert all(p.dtype == torch.float32 for p in model.parameters())


# seeds


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_seed_repeats_tokens(use_cache):
    model = build()

    def generate(seed):
        return model.generate(draw(), 10, filter_thres=0.0, seed=seed, use_cache=use_cache)

    state = torch.get_rng_state()
    first = generate(3)
    assert torch.equal(generate(3), first) and not torch.equal(generate(4), first)
    assert torch.equal(torch.get_rng_state(), state)

    generators = [torch.Generator(DEVICE).manual_seed(5) for _ in range(2)]
    twice = [[generate(g) for _ in range(2)] for g in generators]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    assert not torch.equal(*twice[0])  # a generator moves on

    samples = []
    for seed in (6, 6, 7):
        torch.manual_seed(seed)
        samples.append(generate(None))
    assert torch.equal(*samples[:2]) and not torch.equal(*samples[1:])


def test_rows_are_sampled_independently():
    tokens = build().generate(draw(batch=1).expand(8, -1), 6, filter_thres=0.0, seed=0)
    assert len(tokens.unique(dim=0)) == 8


# stopping and streaming


def stopped(tokens, stop_token):
    """Cut tokens at stop_token, by hand."""
    rows = [row[: row.index(stop_token)] if stop_token in row else row for row in tokens.tolist()]
    longest = min(1 + max(map(len, rows)), tokens.shape[1])
    rows = [row + [stop_token] * (longest - len(row)) for row in rows]
    return torch.tensor(rows, device=tokens.device)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_stop_token(batch, count, stream):
    model = build(num_tokens=5)
    options = dict(filter_thres=0.0, seed=1)
    prompt = draw(4, batch, 5)
    free = model.generate(prompt, count, **options)
    for stop_token in range(5):
        out = model.generate(prompt, count, stop_token=stop_token, stream=stream, **options)
        out = torch.stack(list(out), dim=1) if stream else out
        assert torch.equal(out, stopped(free, stop_token))


def test_nothing_is_sampled_long_after_the_stop(monkeypatch):
    model = build(num_tokens=5)
    taken, step = [], Session.step
    monkeypatch.setattr(Session, "step", lambda self: taken.append(1) or step(self))
    free = model.generate(draw(4, 1, 5), 8, temperature=0)
    taken.clear()
    model.generate(draw(4, 1, 5), 10000, temperature=0, stop_token=int(free[0, 3]))
    assert len(taken) < CHECK_EVERY


@pytest.mark.parametrize("use_cache", [True, False])
def test_stream(use_cache):
    model = build()
    options = dict(seed=2, use_cache=use_cache)
    expected = model.generate(draw(), 30, **options)
    stream = model.generate(draw(), 30, stream=True, **options)
    assert isinstance(stream, Iterator)
    first = next(stream)
    assert first.shape == (2,) and first.dtype == torch.long
    other = model.generate(draw(), 30, **options)  # while the first one is at work
    assert torch.equal(other, expected)
    assert torch.equal(torch.stack([first, *stream], dim=1), expected)
    stream = model.generate(draw(), 30, stream=True, **options)
    next(stream)
    stream.close()
    assert torch.equal(model.generate(draw(), 30, **options), expected)


# past the window


@pytest.mark.parametrize("seq_len", [16, 15, 1])
@pytest.mark.parametrize("lengths", [(5, 5), (5, 2), (16, 1)], ids=str)
def test_rebuilds_on_the_last_half_of_the_window(lengths, seq_len):
    model = build(seq_len=seq_len, window_sizes=None)
    prompts = [draw(tokens, 1)[0][-seq_len:] for tokens in lengths]

    def crop(rows):
        full = max(map(len, rows)) > seq_len
        return [row[-max(1, seq_len // 2) :] for row in rows] if full else rows

    expected = continued(model, prompts, 40, crop)
    assert torch.equal(model.generate(prompts, 40, temperature=0), expected)


@pytest.mark.parametrize("seq_len", [16, 15, 64])  # shorter than its tokens, longer than noise
def test_noise_is_never_used_twice(seq_len):
    model = build(seq_len=seq_len)
    model.to_logits.weight.data.zero_()  # the noise alone decides
    tokens = model.generate(draw(batch=64), 40, filter_thres=0.0, seed=0).T
    for i, row in enumerate(tokens):
        assert ((tokens[:i] == row).float().mean(dim=1) < 0.5).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_noise_chooses_all_ids_alike(use_cache):
    model = build()
    model.to_logits.weight.data.zero_()
    options = dict(filter_thres=0.0, seed=0, use_cache=use_cache)
    ids = model.generate(draw(batch=200), 8, **options)[:, -8:]
    shares = ids.flatten().bincount(minlength=model.num_tokens) / ids.numel()
    assert (shares - 1 / len(shares)).abs().max() < 6 * (len(shares) * ids.numel()) ** -0.5


@pytest.mark.parametrize("everything", [False, True])
def test_without_the_cache_the_window_moves_with_every_token(everything):
    model = build(predict_use_all_hierarchy=everything)
    rows = list(draw(9))
    expected = continued(model, rows, 20, lambda rows: [row[-16:] for row in rows])
    assert torch.equal(model.generate(draw(9), 20, temperature=0, use_cache=False), expected)


def test_overflow_is_an_error_before_anything_is_sampled():
    model = build()
    assert model.generate(draw(9), 7, overflow="error").shape == (2, 7)
    with pytest.raises(ValueError, match='for overflow="error", 16, got 17'):
        model.generate(draw(9), 8, overflow="error", stream=True)


def test_windowed_levels_go_on_for_ever():
    """The tokens are those of a model that sees more of them."""
    model, longer = build(WINDOWED), build(WINDOWED, seq_len=64)
    longer.load_state_dict(model.state_dict())
    expected = longer.generate(draw(9), 55, temperature=0)
    assert torch.equal(model.generate(draw(9), 55, temperature=0, overflow="stream"), expected)
    assert not torch.equal(model.generate(draw(9), 55, temperature=0), expected)
    assert len(_sessions[model]) == 1
    shapes = (1, 16), (1, 1_000_000), (3, 16)
    sizes = [Decoder(model, batch, length).state_bytes for batch, length in shapes]
    assert sizes[0] == sizes[1] == sizes[2] > 0


# the model is left as it was


def test_changed_weights_are_seen():
    model = build()
    expected = build()
    for _ in range(2):
        for m in (model, expected):
            for p in m.parameters():
                p.data.neg_()
        out = model.generate(draw(), 8, temperature=0)
        assert torch.equal(out, expected.generate(draw(), 8, temperature=0, use_cache=False))


@pytest.mark.parametrize("use_cache", [True, False])
def test_training_goes_on_as_if_nothing_had_been_sampled(use_cache):
    models = build(), build()
    ids = draw(13)
    for i, model in enumerate(models):
        model(ids, return_loss=True)[0].backward()
        if i:
            model.generate(draw(), 4, use_cache=use_cache)
            assert model.training and torch.is_grad_enabled()
            next(model.generate(draw(), 4, stream=True, use_cache=use_cache))
            assert model.training and torch.is_grad_enabled()
        model(ids, return_loss=True)[0].backward()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p.grad, q.grad)
    models[1].eval().generate(draw(), 2, use_cache=use_cache)
    assert not models[1].training


def test_modes_of_the_caller_do_not_matter():
    """A decoder made in one of them serves in all; the tokens can be trained on."""
    model = build()
    tokens = []
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            tokens.append(model.generate(draw(), 6, temperature=0))
    assert all(torch.equal(t, tokens[0]) for t in tokens)
    model(tokens[1], return_loss=True)[0].backward()


def test_copies_of_a_model_that_has_generated():
    model = build()
    expected = model.generate(draw(), 6, temperature=0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(draw(), 6, temperature=0), expected)
        twin.to_logits.weight.data.neg_()
        assert torch.equal(model.generate(draw(), 6, temperature=0), expected)


def test_few_sessions_are_kept_and_none_without_its_model():
    model = build()
    for batch in range(1, 5):
        model.generate(draw(batch=batch), 2)
    kept = weakref.ref(next(iter(_sessions[model].values())))
    assert len(_sessions[model]) == MAX_SESSIONS
    assert [key[0] for key in _sessions[model]] == [3, 4]
    del model
    gc.collect()
    assert kept() is None
