"""Hugging Face Trainer: `python examples/hf_trainer.py [STEPS]`."""

import tempfile

import torch
from common import BATCH, DEVICE, STEPS, Clock, Windows, build_model
from transformers import Trainer, TrainingArguments


class WithLoss(torch.nn.Module):
    """A model that returns what Trainer asks for: a dict with the loss."""

    def __init__(self):
        super().__init__()
        self.model = build_model()
        self.model.graphs = True

    def forward(self, ids):
        loss, parts = self.model(ids, return_loss=True)
        clock.step(loss)
        return {"loss": loss}


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu",
        optim="adamw_torch_fused",
        logging_nan_inf_filter=False,  # it would wait for the device in every step
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    collate = lambda windows: {"ids": torch.stack(windows)}
    Trainer(WithLoss(), arguments, data_collator=collate, train_dataset=Windows()).train()

clock.report("HF Trainer")
