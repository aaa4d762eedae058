"""Bad input gets an error of at most two lines: the argument, what it got, what is allowed."""

import warnings

import pytest
import torch
from helpers import DEVICE

from shtx import HierarchicalTransformer

OPTIONS = dict(
    num_tokens=7, dim=8, depth=1, dim_head=4, heads=1, seq_len=6, hierarchies=(1, 2), window_sizes=2
)


def assert_raises(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert str(raised.value).count("\n") < 2


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": 7.0}, TypeError, "num_tokens must be an integer, got 7.0"),
        ({"num_tokens": None}, TypeError, "num_tokens must be an integer, got None"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": "wide"}, TypeError, "dim must be an integer, got 'wide'"),
        ({"dim": (8, 8, 8)}, ValueError, "dim must be one value or 2 (one for each of hier"),
        ({"dim": (8, 8.5)}, TypeError, "dim must be an integer, got 8.5"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"depth": True}, TypeError, "depth must be an integer, got True"),
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
        ({"dim_head": 0}, ValueError, "dim_head must be at least 1, got 0"),
        ({"dim_head": 5}, ValueError, "dim_head must be even, as rotary pairs its channels, got 5"),
        ({"dim_head": (4,)}, ValueError, "dim_head must be one value or 2"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"heads": [1, 1, 1]}, ValueError, "heads must be one value or 2"),
        ({"ff_mult": -1}, ValueError, "ff_mult must be at least 0 and finite, got -1"),
        ({"ff_mult": "4"}, TypeError, "ff_mult must be a number, got '4'"),
        ({"ff_mult": 0.1}, ValueError, "ff_mult must leave dim 8 at least one channel, got 0.1"),
        ({"ff_mult": (4, 4, 4)}, ValueError, "ff_mult must be one value or 2"),
        ({"hierarchies": ()}, ValueError, "hierarchies must be one or more different powers"),
        ({"hierarchies": (1, 0)}, ValueError, "hierarchies must be at least 1, got 0"),
        ({"hierarchies": (1, -2)}, ValueError, "hierarchies must be at least 1, got -2"),
        ({"hierarchies": (1, 3)}, ValueError, "hierarchies must be a power of two, got 3"),
        ({"hierarchies": (1, 6)}, ValueError, "hierarchies must be a power of two, got 6"),
        ({"hierarchies": (2, 2)}, ValueError, "different powers of two, got (2, 2)"),
        ({"hierarchies": (1, 2.0)}, TypeError, "hierarchies must be an integer, got 2.0"),
        ({"hierarchical_stride": 0}, ValueError, "hierarchical_stride must be at least 1, got 0"),
        ({"hierarchical_stride": (1, 3)}, ValueError, "hierarchical_stride must be a power of two"),
        (
            {"hierarchical_stride": (1, 4)},
            ValueError,
            "at most the hierarchy it belongs to, 2, got 4",
        ),
        ({"hierarchical_stride": (1,)}, ValueError, "hierarchical_stride must be one value or 2"),
        ({"window_sizes": -1}, ValueError, "window_sizes must be at least 0, got -1"),
        ({"window_sizes": 2.5}, TypeError, "window_sizes must be an integer, got 2.5"),
        ({"window_sizes": (2, 2, 2)}, ValueError, "window_sizes must be one value or 2"),
        (
            {"predict_hierarchy": 8},
            ValueError,
            "predict_hierarchy must be one of hierarchies, [1, 2]",
        ),
        (
            {"predict_hierarchy": 2, "hierarchical_stride": (1, 2)},
            ValueError,
            "hierarchical_stride must be 1 for the predicting hierarchy, 2,",
        ),
        ({"recon_loss_weight": -0.1}, ValueError, "recon_loss_weight must be at least 0"),
        ({"recon_loss_weight": None}, TypeError, "recon_loss_weight must be a number, got None"),
        (
            {"hierarchical_ar_loss_weight": float("nan")},
            ValueError,
            "must be at least 0 and finite",
        ),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
        ({"impl": "triton"}, ValueError, "impl must be one of 'auto', 'fused', 'reference', got"),
        ({"windows": 2}, TypeError, "unexpected keyword argument 'windows'"),
    ],
    ids=str,
)
def test_constructor(options, error, message):
    assert_raises(error, message, lambda: HierarchicalTransformer(**OPTIONS | options))


def test_odd_heads_where_nothing_rotates():
    model = HierarchicalTransformer(**OPTIONS | dict(dim_head=(5, 4), window_sizes=(0, 2)))
    assert [level.dim_head for level in model.levels] == [5, 4]
    message = "dim_head must be even, as rotary pairs its channels, got 5"
    odd = OPTIONS | dict(dim_head=(4, 5), window_sizes=(0, 2))
    assert_raises(ValueError, message, lambda: HierarchicalTransformer(**odd))


def test_windows_as_long_as_the_level():
    """Level 2 has 3 tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = HierarchicalTransformer(**OPTIONS | dict(window_sizes=(6, 3)))
    assert [level.window for level in model.levels] == [6, 3]
    with pytest.warns(UserWarning, match="window_sizes: 4 is more than the 3 tokens"):
        model = HierarchicalTransformer(**OPTIONS | dict(window_sizes=(6, 4)))
    assert [level.window for level in model.levels] == [6, None]


@pytest.fixture(scope="module")
def model():
    return HierarchicalTransformer(**OPTIONS).to(DEVICE)


def ones(*shape, **options):
    return torch.ones(*shape, **{"dtype": torch.long, "device": DEVICE} | options)


@pytest.mark.parametrize(
    "ids, options, error, message",
    [
        ([1, 2], {}, TypeError, "ids must be a tensor of integers, got list"),
        (ones(1, 3, dtype=torch.float32), {}, TypeError, "integers, got torch.float32"),
        (ones(1, 3, dtype=torch.bool), {}, TypeError, "integers, got torch.bool"),
        (ones(3), {}, ValueError, "ids must be (batch, tokens), got shape (3,)"),
        (ones(1, 3, 1), {}, ValueError, "ids must be (batch, tokens), got shape (1, 3, 1)"),
        (ones(1, 3, device="meta"), {}, ValueError, f"the model's {DEVICE}"),
        (
            ones(1, 3),
            {"return_loss": True, "loss_reduction": "none"},
            ValueError,
            'loss_reduction must be "mean" or "sum", got \'none\'',
        ),
        (ones(1, 0), {}, ValueError, "ids must have 1 to 6 tokens (seq_len 6), got 0"),
        (ones(1, 7), {}, ValueError, "ids must have 1 to 6 tokens (seq_len 6), got 7"),
        (
            ones(1, 1),
            {"return_loss": True},
            ValueError,
            "2 to 7 tokens (seq_len 6 with return_loss)",
        ),
        (
            ones(1, 8),
            {"return_loss": True},
            ValueError,
            "2 to 7 tokens (seq_len 6 with return_loss)",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_forward(model, ids, options, error, message):
    assert_raises(error, message, lambda: model(ids, **options))


@pytest.mark.parametrize("bad", [-1, 7, 1000])
def test_ids_out_of_range(model, bad):
    model.checked = True
    ids = ones(2, 4)
    ids[1, 2] = bad
    message = f"ids must be in [0, num_tokens) = [0, 7), got {bad}"
    assert_raises(ValueError, message, lambda: model(ids))
    assert_raises(ValueError, message, lambda: model(ids, return_loss=True))
    assert_raises(ValueError, message, lambda: model.generate(ids, 1))


def test_a_loss_without_a_prediction_for_every_token():
    strided = dict(hierarchies=(2, 4), hierarchical_stride=2, hierarchy_merge_all=True)
    model = HierarchicalTransformer(**OPTIONS | strided).to(DEVICE)
    message = "got 2 predictions for 4 tokens: hierarchical_stride must be 1 for some hierarchy"
    assert_raises(ValueError, message, lambda: model(ones(1, 5), return_loss=True))


def test_impl_of_a_built_model(model):
    def set_impl():
        model.impl = "fast"

    assert_raises(ValueError, "impl must be one of", set_impl)
    assert model.impl == "auto"


PROMPT = "prompt must be (batch, tokens) with at least one token, or a list of (tokens,), got "
CASES_OF_GENERATE = [
    (ones(1, 0), {}, ValueError, PROMPT + "(1, 0)"),
    (ones(3), {}, ValueError, PROMPT + "(3,)"),
    (ones(1, 3, 1), {}, ValueError, PROMPT + "(1, 3, 1)"),
    (1, {}, ValueError, PROMPT + "int"),
    ([[1]], {}, ValueError, PROMPT + "list"),
    ([ones(2), ones(0)], {}, ValueError, PROMPT + "(2,), (0,)"),
    ([ones(1, 2)], {}, ValueError, PROMPT + "(1, 2)"),
    (ones(1, 2).float(), {}, TypeError, "prompt must have integers, got torch.float32"),
    (ones(1, 2, device="meta"), {}, ValueError, f"prompt must be on the model's {DEVICE}"),
    (ones(1, 2) * 7, {}, ValueError, "prompt: ids must be in [0, num_tokens) = [0, 7), got 7"),
    ([ones(3), ones(2) - 2], {}, ValueError, "prompt: ids must be in [0, num_tokens) = [0, 7), go"),
    (ones(1, 2), {"seq_len": -1}, ValueError, "seq_len must be at least 0, got -1"),
    (ones(1, 2), {"seq_len": 1.5}, TypeError, "seq_len must be an integer, got 1.5"),
    (ones(1, 2), {"temperature": -0.5}, ValueError, "temperature must be at least 0, got -0.5"),
    (ones(1, 2), {"temperature": float("nan")}, ValueError, "temperature must be at least 0, got"),
    (ones(1, 2), {"filter_thres": 1.0}, ValueError, "filter_thres must be in [0, 1), got 1.0"),
    (ones(1, 2), {"filter_thres": -0.1}, ValueError, "filter_thres must be in [0, 1), got -0.1"),
    (ones(1, 2), {"top_p": 0}, ValueError, "top_p must be in (0, 1], got 0"),
    (ones(1, 2), {"top_p": 1.5}, ValueError, "top_p must be in (0, 1], got 1.5"),
    (ones(1, 2), {"top_p": float("nan")}, ValueError, "top_p must be in (0, 1], got nan"),
    (ones(1, 2), {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    (ones(1, 2), {"top_k": 0.5}, TypeError, "top_k must be an integer, got 0.5"),
    (ones(1, 2), {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    (ones(1, 2), {"seed": 2**63}, ValueError, "seed must be below 2^63, got"),
    (ones(1, 2), {"seed": "x"}, TypeError, "seed must be an integer, got 'x'"),
    (ones(1, 2), {"stop_token": 7}, ValueError, "stop_token must be in [0, num_tokens) = [0, 7), "),
    (ones(1, 2), {"stop_token": "e"}, TypeError, "stop_token must be an integer, got 'e'"),
    (ones(1, 2), {"dtype": torch.int8}, TypeError, "dtype must be a floating torch.dtype, got tor"),
    (ones(1, 2), {"dtype": "bf16"}, TypeError, "dtype must be a floating torch.dtype, got bf16"),
    (
        ones(1, 2),
        {"dtype": torch.float32, "use_cache": False},
        ValueError,
        "dtype takes use_cache=True",
    ),
    (
        ones(1, 2),
        {"overflow": "wrap"},
        ValueError,
        "overflow must be one of 'rebuild', 'error', 'stream', got 'wrap'",
    ),
    (
        ones(1, 2),
        {"overflow": "error", "seq_len": 5},
        ValueError,
        'at most model.seq_len tokens for overflow="error", 6, got 7',
    ),
    (
        ones(1, 2),
        {"overflow": "stream", "use_cache": False},
        ValueError,
        'overflow="stream" takes use_cache=True',
    ),
    (ones(1, 2), {"topk": 3}, TypeError, "unexpected keyword argument 'topk'"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt, options, error, message",
    CASES_OF_GENERATE,
    ids=lambda value: str(value)[:20],
)
def test_generate(model, prompt, options, error, message, stream):
    options = {"seq_len": 1, "stream": stream} | options
    assert_raises(error, message, lambda: list(model.generate(prompt, **options)))
    assert model.training


def test_a_stream_of_a_model_with_full_attention():
    model = HierarchicalTransformer(**OPTIONS | dict(window_sizes=(2, None))).to(DEVICE)
    message = 'overflow="stream" takes a window for every hierarchy, got full attention for 2'
    assert_raises(
        ValueError, message, lambda: model.generate(ones(1, 2), 1, overflow="stream", stream=True)
    )


def test_a_prompt_longer_than_the_model_sees(model):
    with pytest.warns(UserWarning, match=r"prompt has 9 tokens, its last 6 \(seq_len\) count"):
        cropped = model.generate(ones(2, 9), 3, temperature=0)
    assert torch.equal(cropped, model.generate(ones(2, 6), 3, temperature=0))
