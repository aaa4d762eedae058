"""The model of lm-evaluation-harness, in the harness. Without it, skipped."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from training import OPTIONS

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from shtx import HierarchicalTransformer  # noqa: E402
from shtx.lm_eval import ByteLM  # noqa: E402
from shtx.train.evaluate import score  # noqa: E402

TEXTS = ["", "a", "Grüße, \n world", "one two three four five six seven eight nine ten " * 3]


def build():
    torch.manual_seed(0)
    model = HierarchicalTransformer(**OPTIONS | dict(num_tokens=256)).to(DEVICE)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p) * (p.ndim > 1)
    return model


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.mark.parametrize("stride, batch_size", [(None, "auto"), (6, 1), (24, 2)])
def test_bits_of_texts_are_those_of_shtx_eval(stride, batch_size):
    lm = ByteLM(model=build(), stride=stride, batch_size=batch_size)
    scored = lm.loglikelihood_rolling(requests(*((text,) for text in TEXTS)))
    assert scored[:2] == [0.0, -math.log(256)]
    for text, nats in zip(TEXTS[2:], scored[2:], strict=True):
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        expected = score(lm.model, data, lm.model.seq_len, stride or lm.model.seq_len)
        assert nats == pytest.approx(-expected.bits * math.log(2), rel=1e-5)


def test_continuations():
    """Contexts may be empty, and contexts and continuations longer than the model sees."""
    lm, limit = ByteLM(model=build(), batch_size=3), 24
    greedy = lm.model.generate(torch.tensor([list(b"ab")], device=DEVICE), 4, temperature=0)
    greedy = bytes(greedy[0].tolist()).decode("latin-1")
    pairs = [("ab", "cd"), ("", "xyz"), (TEXTS[3], " end"), ("a", TEXTS[3]), ("ab", greedy)]
    results = lm.loglikelihood(requests(*pairs))
    for (context, new), (nats, is_greedy) in zip(pairs[:3], results[:3], strict=True):
        text, count = (context + new).encode()[-limit - 1 :], len(new.encode())
        ids = torch.tensor([list(text)], device=DEVICE)
        each = F.cross_entropy(lm.model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")[0]
        expected = -float(each[-count:].sum()) if context else -float(each.sum()) - math.log(256)
        assert nats == pytest.approx(expected, rel=1e-5) and not is_greedy
    whole = lm.loglikelihood_rolling(requests(("a" + TEXTS[3],)))
    assert results[3][0] == pytest.approx(whole[0] + math.log(256), rel=1e-5)
    if greedy.isascii():
        assert results[4][1]


def test_texts_end_where_a_task_says():
    lm = ByteLM(model=build(), batch_size=2)
    contexts = ["ab", "", "three " * 9]
    free = lm.generate_until(requests(*((c, dict(max_gen_toks=12)) for c in contexts)))
    for context, text in zip(contexts, free, strict=True):
        prompt = torch.tensor([list((context or "\n").encode()[-24:])], device=DEVICE)
        tokens = lm.model.generate(prompt, 12, temperature=0)[0].tolist()
        assert text == bytes(tokens).decode(errors="replace")
    stops = [next(c for c in reversed(text) if c != "�") for text in free]
    options = [dict(max_gen_toks=12, until=[stop, "never"]) for stop in stops]
    ended = lm.generate_until(requests(*zip(contexts, options, strict=True)))
    for text, stop, cut in zip(free, stops, ended, strict=True):
        assert cut == text[: text.index(stop)]
    sampled = dict(do_sample=True, temperature=5.0, max_gen_toks=20)
    torch.manual_seed(1)
    texts = lm.generate_until(requests(*[("ab", sampled)] * 3))
    assert len(set(texts)) == 3


def test_the_harness_evaluates_a_local_file(tmp_path):
    """Words, bytes and bits as its task wikitext counts them."""
    pages = ["= Title =\n\nA page of some words , and more of them .\n" * n for n in (1, 3)]
    data = tmp_path / "pages.jsonl"
    data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    task = dict(
        task="pages",
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(data)), cache_dir=str(tmp_path)),
        output_type="loglikelihood_rolling",
        test_split="test",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[
            dict(metric=name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    )
    lm = ByteLM(model=build())
    results = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)["results"]["pages"]
    size, words = sum(map(len, pages)), sum(len(re.split(r"\s+", page)) for page in pages)
    arrays = [np.frombuffer(page.encode(), dtype=np.uint8) for page in pages]
    bits = sum(score(lm.model, a, 24, 24).bits for a in arrays)
    assert results["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-5)
    assert results["byte_perplexity,none"] == pytest.approx(2 ** (bits / size), rel=1e-5)
    assert math.log2(results["word_perplexity,none"]) == pytest.approx(bits / words, rel=1e-5)


def test_a_run_by_the_name_of_the_model(run):
    kind = lm_eval.api.registry.get_model("shtx")
    lm = kind.create_from_arg_string(f"checkpoint={run}", dict(batch_size=2, device="cpu"))
    nats = lm.loglikelihood_rolling(requests(("line 7 is followed by 8\n",)))[0]
    assert -8 < nats / 24 / math.log(2) < -1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "checkpoint or model must be given"),
        (dict(model=build(), stride=25), "stride must be at most seq_len, 24, got 25"),
        (dict(model=build(), batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(model=build(), dtype="int8"), "dtype must be 'bf16', 'fp16', 'fp32', got 'int8'"),
        (dict(model=HierarchicalTransformer(**OPTIONS)), "256 tokens of bytes, got 31"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ByteLM(**arguments)
    if "stride" in arguments:
        with pytest.raises(ValueError, match="num_beams must be left out"):
            ByteLM(model=build()).generate_until(requests(("a", dict(num_beams=2))))
