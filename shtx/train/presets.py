"""Settings to begin with."""

from pathlib import Path

from shtx.train.config import Config, Model


def enwik8() -> Config:
    """A model of 40M parameters for enwik8, meant for at most 1.06 bits per byte of its test part,
    which Transformer-XL has with 41M (Dai et al., 2019). It has not been measured yet.

    Data: 90, 5 and 5 million bytes in the order of the file, as everybody divides it.

    Model: 12 layers, as many as there, of 384 in place of 512, which pays for the second level and
    the merges. Bytes look back 256 bytes: about what heads choose that may choose their span
    (Sukhbaatar et al., 2019, have 245 in the mean at 12 layers). A level token of 4 bytes, 256
    wide, carries what is further away, all 2,048 bytes back at a sixteenth of the pairs.

    Training: 65,536 bytes a step, 30,000 steps, so that the training part is seen 22 times. More
    would ask for dropout, which the model does not have. Every 1,500 steps a tenth of the
    validation part is looked at.
    """
    return Config(
        preset="enwik8",
        data=(Path("enwik8.zip"),),
        split=(0.9, 0.05, 0.05),
        device="cuda",
        precision="bf16-mixed",
        steps=30_000,
        batch_size=32,
        lr=1e-3,
        eval_every=1500,
        eval_sequences=256,
        save_every=1500,
        model=Model(
            dim=(384, 256),
            depth=12,
            seq_len=2048,
            dim_head=(64,),
            heads=(6, 4),
            ff_mult=(4, 2),
            hierarchies=(1, 4),
            hierarchical_stride=(1, 4),
            window_sizes=(256, None),
        ),
    )


PRESETS = {
    "enwik8": enwik8(),
    "cpu": Config(
        preset="cpu",
        device="cpu",
        precision="fp32",
        steps=650,
        batch_size=8,
        lr=9e-3,
        optimizer="muon",
        eval_every=325,
        eval_sequences=256,
        save_every=325,
        model=Model(
            dim=(128,),
            depth=2,
            seq_len=128,
            dim_head=(32,),
            heads=(4,),
            ff_mult=(2,),
            hierarchies=(1, 4),
            hierarchical_stride=(1, 4),
            window_sizes=(32, None),
        ),
    ),
    "gpu": Config(
        preset="gpu",
        device="cuda",
        precision="bf16-mixed",
        steps=2000,
        batch_size=8,
        lr=3e-4,
        eval_every=250,
        eval_sequences=64,
        save_every=500,
        model=Model(dim=(1024,), depth=8, seq_len=2048, hierarchies=(1, 2), window_sizes=(32, 64)),
    ),
}
