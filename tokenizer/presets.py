"""Ready-made settings for training a tokenizer: demo, tiny, base, large."""

from dataclasses import replace

from driving_sim.engine.training.config import TrainingConfig
from driving_sim.tokenizer.autoencoder import AutoencoderConfig
from driving_sim.tokenizer.discriminator import DiscriminatorConfig
from driving_sim.tokenizer.objective import TokenizerObjectiveConfig
from driving_sim.tokenizer.training import TokenizerDataConfig, TokenizerRunConfig

DEMO = TokenizerRunConfig(
    model=AutoencoderConfig(
        height=64, width=128, widths=(32, 64, 128), blocks=(1, 1, 1), attention_blocks=1
    ),
    objective=TokenizerObjectiveConfig(mse_weight=4.0, lpips_weight=0.0, gan_weight=0.0),
    data=TokenizerDataConfig(batch_size=4, validation_frames=64),
    training=TrainingConfig(
        minutes=2.5,
        min_steps=1500,
        learning_rate=5e-3,
        warmup_steps=100,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        validate_every=500,
        save_every=1000,
    ),
)
"""For the synthetic world: trains in minutes on a CPU, without a discriminator or LPIPS."""

TINY = TokenizerRunConfig(
    model=AutoencoderConfig(
        height=128, width=256, widths=(64, 128, 256), blocks=(1, 1, 1), attention_blocks=2
    ),
    objective=TokenizerObjectiveConfig(
        mse_weight=24.0,
        lpips_weight=0.0,
        gan_weight=0.05,
        gan_start=0.85,
        discriminator=DiscriminatorConfig(width=32),
        discriminator_lr_scale=0.1,
    ),
    data=TokenizerDataConfig(batch_size=8, shift=8, gain=0.1, cutmix=0.3),
    training=TrainingConfig(
        minutes=29,
        learning_rate=5e-3,
        warmup_steps=200,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        validate_every=1000,
        save_every=1000,
        workers=1,
    ),
)
"""For frames of 128x256 pixels (8x16 tokens): trains in half an hour on two CPU cores with bf16."""

BASE = TokenizerRunConfig(
    model=AutoencoderConfig(
        height=256, width=512, widths=(96, 192, 384), blocks=(2, 2, 3), attention_blocks=3
    ),
    data=TokenizerDataConfig(batch_size=16, cache_gigabytes=16.0),
    training=TrainingConfig(
        steps=100_000,
        learning_rate=4e-4,
        warmup_steps=1000,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema_decay=0.9995,
        validate_every=2000,
        save_every=2000,
        workers=8,
    ),
)
"""For frames of 256x512 pixels (16x32 tokens) and one GPU. The default on CUDA."""

LARGE = replace(
    BASE,
    model=replace(
        BASE.model,
        levels=(8, 8, 8, 6, 5),
        widths=(128, 256, 512),
        blocks=(2, 4, 4),
        attention_blocks=6,
    ),
    data=replace(BASE.data, batch_size=32),
    training=replace(
        BASE.training,
        steps=300_000,
        learning_rate=3e-4,
        warmup_steps=2000,
        ema_decay=0.9999,
        validate_every=5000,
        save_every=5000,
        workers=16,
    ),
)
"""For frames of 256x512 pixels (16x32 tokens) and several GPUs, with a codebook of 15,360 codes."""

PRESETS = {"demo": DEMO, "tiny": TINY, "base": BASE, "large": LARGE}
"""All presets by name."""
