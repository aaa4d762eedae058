"""The models in the hands of transformers: Trainer, generate, files. Without it, skipped."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import training
from helpers import DEVICE

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from shtx import HierarchicalTransformer, hf  # noqa: E402
from shtx.cli import main  # noqa: E402
from shtx.hf import HierarchicalConfig, HierarchicalTransformerForCausalLM  # noqa: E402
from shtx.plan import unfused  # noqa: E402
from shtx.train.trainer import load_model  # noqa: E402

VERSIONS = list(hf.KINDS)


def build(version="0.2.0", **options):
    torch.manual_seed(0)
    config = HierarchicalConfig(version, **training.OPTIONS | options)
    model = HierarchicalTransformerForCausalLM(config).to(DEVICE)
    for p in model.parameters():  # so that greedy tokens vary
        p.data += 0.3 * torch.randn_like(p) * (p.ndim > 1)
    return model


def draw(seed=0, batch=4, tokens=17):
    return training.draw(seed, batch, tokens)


def masked(ids):
    """Return labels whose rows differ much in how many of them count."""
    labels = ids.clone()
    for b, row in enumerate(labels):
        row[: 1 + 5 * b] = -100
    return labels


def perplexity_loss(model, ids, labels):
    return F.cross_entropy(model.model(ids)[:, :-1].mT, labels[:, 1:])


# the model


@pytest.mark.parametrize("version", VERSIONS)
def test_losses_and_logits(version):
    """Training has the loss of all parts and no logits; eval mode has that of the next token."""
    model, ids, labels = build(version), draw(), masked(draw())
    output = model(ids, labels=labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, model.model(ids, labels=labels)[0])
    assert torch.equal(model(ids).logits, model.model(ids))
    model.eval()
    output = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    torch.testing.assert_close(output.loss, perplexity_loss(model, ids, labels))
    torch.testing.assert_close(output.logits, model.model(ids))
    loss, logits = model(ids, labels=labels, return_dict=False)
    assert loss == output.loss and torch.equal(logits, output.logits)
    longest = draw(tokens=25)
    for mode in (True, False):
        model.train(mode)
        assert model(longest, labels=longest).loss.isfinite()
        nothing = torch.full_like(ids, -100)
        assert model(ids, labels=nothing, num_items_in_batch=0).loss == 0
        with pytest.raises(ValueError, match="ids must have 2 to 25 tokens .*, got 26"):
            model(draw(tokens=26), labels=draw(tokens=26))


def test_a_seed_gives_the_weights_of_the_model():
    torch.manual_seed(3)
    ours = HierarchicalTransformerForCausalLM(HierarchicalConfig(**training.OPTIONS))
    torch.manual_seed(3)
    theirs = HierarchicalTransformer(**training.OPTIONS)
    for (name, t), s in zip(
        ours.model.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(t, s), name


@pytest.mark.parametrize("training_mode", [True, False])
def test_losses_of_micro_batches_add_up(training_mode):
    """The next-token loss does so exactly, over any number of ranks and micro-batches."""
    model = build(recon_loss_weight=0.0, hierarchical_ar_loss_weight=0.0).train(training_mode)
    ids, labels = draw(), masked(draw())
    count = int((labels[:, 1:] != -100).sum())
    rows = zip(ids.split(1), labels.split(1), strict=True)
    for items in (count, torch.tensor(count), torch.tensor([count])):
        parts = [model(row, labels=own, num_items_in_batch=items).loss for row, own in rows]
        rows = zip(ids.split(1), labels.split(1), strict=True)
        torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)
    whole = build().train(training_mode)
    loss = whole(ids, labels=labels, num_items_in_batch=count).loss
    torch.testing.assert_close(loss, whole(ids, labels=labels).loss)


@pytest.mark.parametrize("version", VERSIONS)
def test_saved_and_loaded(version, tmp_path):
    weights = dict(next_latent_loss_weight=(0.0, 0.3)) if version == "0.4.0" else {}
    model = build(version, **weights).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["version"] == version
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert type(loaded) is HierarchicalTransformerForCausalLM and not unfused(loaded.model)
    assert type(loaded.model) is hf.KINDS[version]
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(model, kind)(), getattr(loaded, kind)(), strict=True)
        for (name, t), (other, s) in pairs:
            assert name == other and torch.equal(t, s) and t.requires_grad == s.requires_grad
    ids = draw()
    assert loaded(ids, labels=ids).loss == model(ids, labels=ids).loss
    assert loaded.train()(ids, labels=ids).loss.isfinite()
    half, info = HierarchicalTransformerForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    dtypes = {p.dtype for p in half.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16} and not info["missing_keys"]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (31, 16, 1)


def test_a_config_has_the_arguments_of_a_model():
    config = HierarchicalConfig(version="0.4.0", vocab_size=7, num_rollouts=2)
    assert config.num_tokens == 7 and config.num_rollouts == 2 and config.ignore_index == -100
    assert HierarchicalConfig().to_dict().keys() >= hf.options_of("0.2.0").keys()
    with pytest.raises(ValueError, match="version must be '0.2.0' or '0.4.0', got '0.3.0'"):
        HierarchicalConfig("0.3.0")
    with pytest.raises(ValueError, match="chunk_summarizers must be what a file can keep, got"):
        HierarchicalConfig("0.4.0", chunk_summarizers=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="num_tokens must stay"):
        build().resize_token_embeddings(40)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(attention_mask=torch.tensor([[0] * 5 + [1] * 12] * 4)), "zeros at the end of rows"),
        (dict(attention_mask=torch.ones(4, 3)), r"shape of input_ids, \(4, 17\), got \(4, 3\)"),
        (dict(position_ids=torch.arange(17)), "position_ids must be None"),
        (dict(labels=draw()[:, 1:]), "labels must have the shape of ids"),
        (dict(output_hidden_states=True), "output_hidden_states must be None"),
    ],
)
def test_what_forward_refuses(arguments, message):
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        build()(draw(), **arguments)


def test_labels_that_trainer_would_count():
    model, ids = build(ignore_index=0), draw()
    assert model(ids, labels=ids).loss.isfinite()
    with pytest.raises(
        ValueError, match="ignore_index must be -100 with num_items_in_batch.*got 0"
    ):
        model(ids, labels=ids, num_items_in_batch=64)


# Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=8):
        self.ids = draw(5, count)
        self.labels = masked(self.ids[:, :]) if count == 4 else self.ids.clone()
        for b, row in enumerate(self.labels):
            row[: 1 + 2 * b] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return dict(
            input_ids=self.ids[i],
            labels=self.labels[i],
            attention_mask=torch.ones_like(self.ids[i]),
        )


class InOrder(transformers.Trainer):
    """Its steps take the rows as they come."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(folder, model, **options):
    arguments = transformers.TrainingArguments(
        folder,
        **dict(
            max_steps=2,
            learning_rate=0.2,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.1,
            per_device_eval_batch_size=8,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,  # rows are on the device already
            use_cpu=DEVICE == "cpu",
        )
        | options,
    )
    trainer = InOrder(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return trainer


def test_trainer_accumulates_exactly(tmp_path):
    """Rows of unequal counts, one at a time, are the step of all of them; of a loop, too."""
    alone = dict(recon_loss_weight=0.0, hierarchical_ar_loss_weight=0.0)
    models = [build(**alone) for _ in range(3)]
    trained(tmp_path, models[0], per_device_train_batch_size=4)
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer = trained(tmp_path, models[1], **options)
    plain, rows = models[2], Rows()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2)
    for which in (slice(0, 4), slice(4, 8)):
        plain.model(rows.ids[which], labels=rows.labels[which])[0].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), *others in zip(*(m.named_parameters() for m in models), strict=True):
        for _, q in others:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    expected = perplexity_loss(plain.eval(), rows.ids, rows.labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_trainer_learns_with_all_losses(tmp_path):
    """Saves, checkpoints its activations, and goes on from what it saved."""
    model = build("0.4.0")
    options = dict(optim="adamw_torch", learning_rate=0.01, per_device_train_batch_size=4)
    before = perplexity_loss(model, Rows().ids, Rows().labels)
    trainer = trained(
        tmp_path, model, **options, max_steps=12, gradient_checkpointing=True, save_strategy="steps"
    )
    assert model.is_gradient_checkpointing and model.model.checkpointing
    trainer.save_model(tmp_path / "end")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "end").to(DEVICE)
    after = perplexity_loss(loaded.eval(), Rows().ids, Rows().labels)
    assert after < before - 0.3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(after), rel=1e-4)


def test_trainer_smooths_labels(tmp_path):
    """The labels of next tokens are smoothed; there are no other losses then."""
    model = build()
    trainer = trained(tmp_path, model, per_device_train_batch_size=4, label_smoothing_factor=0.1)
    rows = Rows()
    with torch.no_grad():
        logits, targets = model.eval()(rows.ids).logits[:, :-1], rows.labels[:, 1:]
        expected = F.cross_entropy(logits.mT, targets, label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_adaptors_of_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra clients")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["to_qkv", "to_out"], init_lora_weights=False
    )
    base = build().eval()
    model = peft.get_peft_model(copy.deepcopy(base), config)
    expected = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained(tmp_path, model, per_device_train_batch_size=4)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if n in expected)
    model.eval().save_pretrained(tmp_path / "adaptor")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adaptor")
    ids = draw()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.warns(UserWarning, match="generate runs without a cache"):
        assert again.generate(input_ids=ids, max_new_tokens=2).shape == (4, 19)


# generate


def test_greedy_tokens_of_prompts_of_unequal_length():
    model = build()
    prompts = [draw(1, 1, n)[0] for n in (7, 3, 5)]
    ids = torch.full((3, 7), 30, device=DEVICE)
    for row, prompt in zip(ids, prompts, strict=True):
        row[7 - len(prompt) :] = prompt
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    expected = torch.cat((ids, model.model.generate(prompts, 9, temperature=0)), dim=1)
    options = dict(attention_mask=mask, max_new_tokens=9)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(input_ids=ids, **options, use_cache=False), expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_length=16), expected)
    for ours, prompt in zip(expected, prompts, strict=True):  # what transformers itself computes
        row = prompt[None]
        for _ in range(9):
            row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(ours[7 - len(prompt) :], row[0])
    options = dict(pad_token_id=30, eos_token_id=29, max_new_tokens=1)
    assert torch.equal(model.generate(ids, **options), expected[:, :8])


def test_sampling():
    model, ids = build(), draw(0, 2, 5)
    settings = dict(temperature=0.8, top_k=9, top_p=0.9)
    torch.manual_seed(1)
    expected = model.model.generate(ids, 8, **settings)
    torch.manual_seed(1)
    config = transformers.GenerationConfig(do_sample=True, max_new_tokens=8, **settings)
    assert torch.equal(model.generate(ids, config)[:, 5:], expected)
    model.generation_config = config
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids)[:, 5:], expected)
    several = model.generate(ids, num_return_sequences=3)
    assert several.shape == (6, 13) and torch.equal(several[:3, :5], ids[:1].expand(3, 5))
    assert len({tuple(row.tolist()) for row in several}) > 2
    every = model.generate(draw(0, 64, 5), top_k=0, top_p=1.0, temperature=100.0, max_new_tokens=8)
    assert len(every[:, 5:].unique()) > 25


def test_a_row_ends_at_its_end():
    model, ids = build(), draw(0, 3, 5)
    free = model.generate(ids, max_new_tokens=12)
    eos = int(free[0, 8])
    length = lambda row: (row[5:] == eos).nonzero()[0, 0] + 6 if eos in row[5:] else 17
    ends = [int(length(row)) for row in free]
    assert len(set(ends)) > 1
    for pad, fill in ((30, 30), (None, eos)):
        out = model.generate(ids, max_new_tokens=12, eos_token_id=[eos], pad_token_id=pad)
        assert out.shape[1] == max(ends)
        for row, all_of_it, end in zip(out, free, ends, strict=True):
            assert torch.equal(row[:end], all_of_it[:end]) and (row[end:] == fill).all()


def test_a_streamer_is_told():
    class Streamer:
        told, ended = [], False

        def put(self, value):
            self.told.append(value)

        def end(self):
            self.ended = True

    model, streamer = build(), Streamer()
    out = model.generate(draw(0, 1, 5), max_new_tokens=4, streamer=streamer)
    assert torch.equal(torch.cat([t.reshape(-1) for t in streamer.told]), out[0].cpu())
    assert streamer.ended and len(streamer.told) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_beams=4), "num_beams must be left out, got 4: generate takes max_new_tokens"),
        (dict(repetition_penalty=1.2), "repetition_penalty must be left out, got 1.2"),
        (dict(min_new_tokens=3), "min_new_tokens must be left out"),
        (dict(logits_processor=[lambda ids, scores: scores]), "logits_processor must be left out"),
        (dict(stopping_criteria=[lambda ids, scores: True]), "stopping_criteria must be left out"),
        (dict(return_dict_in_generate=True), "return_dict_in_generate must be left out"),
        (dict(assistant_model=3), "assistant_model must be left out"),
        (dict(num_return_sequences=2), "num_return_sequences. different than 1"),
        (dict(eos_token_id=[1, 2]), r"eos_token_id must be one token, got \[1, 2\]"),
        (dict(attention_mask=torch.tensor([[1, 1, 0, 0, 0]])), "shape of input_ids"),
        (dict(attention_mask=torch.tensor([[1, 1, 0, 0, 0]] * 2)), "padding_side='left'"),
        (dict(attention_mask=torch.zeros(2, 5)), "zeros at the left of prompts in generate, and"),
        (dict(do_sample=True, temperature=-1.0), "temperature must be"),
    ],
)
def test_what_generate_refuses(arguments, message):
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        build().generate(draw(0, 2, 5), **arguments)
    neutral = dict(num_beams=1, repetition_penalty=1.0, logits_processor=[], synced_gpus=False)
    if "num_beams" in arguments:
        assert build().generate(draw(0, 2, 5), max_new_tokens=1, **neutral).shape == (2, 6)
        with pytest.raises(ValueError, match="input_ids must be .*, got NoneType"):
            build().generate(max_new_tokens=1)


# files


def test_a_run_is_converted(run, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["convert", str(run), "--to", "hf", "--out", str(out)]) == 0
    assert "for transformers, after import shtx.hf" in capsys.readouterr().out
    ours, _ = load_model(run, torch.device("cpu"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = torch.tensor([list(b"line 7")])
    expected = ours.generate(prompt, 20, temperature=0)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=20)[:, 6:], expected)
    torch.manual_seed(2)
    expected = ours.generate(prompt, 20, top_k=30)
    torch.manual_seed(2)
    sampled = loaded.generate(prompt, max_new_tokens=20, do_sample=True, top_k=30)
    assert torch.equal(sampled[:, 6:], expected)
    assert loaded(prompt, labels=prompt, num_items_in_batch=5).loss.isfinite()

    weights = tmp_path / "weights.pt"
    torch.save(ours.state_dict(), weights)
    for source, target, message in (
        (run, out, f"--out {out}: is there already"),
        (weights, tmp_path / "other", "must be a run, or one of its checkpoints, for --to hf"),
    ):
        assert main(["convert", str(source), "--to", "hf", "--out", str(target)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_mixin_of_the_hub(tmp_path):
    """Three lines are enough for those who do not want transformers."""
    from huggingface_hub import PyTorchModelHubMixin

    class OnTheHub(HierarchicalTransformer, PyTorchModelHubMixin):
        pass

    model = OnTheHub(**training.OPTIONS)
    model.save_pretrained(tmp_path)
    loaded = OnTheHub.from_pretrained(tmp_path)
    ids = training.draw(0).cpu()
    assert torch.equal(loaded(ids), model.eval()(ids)) and not unfused(loaded)
    assert torch.equal(
        loaded.generate(ids, 3, temperature=0), model.generate(ids, 3, temperature=0)
    )
