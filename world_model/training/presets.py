"""Presets for training a world model: demo, tiny, base and large."""

from driving_sim.engine.training.config import TrainingConfig
from driving_sim.world_model.training.objective import InputNoiseConfig
from driving_sim.world_model.training.train import WorldModelDataConfig, WorldModelRunConfig
from driving_sim.world_model.transformer import TransformerConfig

DEMO = WorldModelRunConfig(
    model=TransformerConfig(layers=4, width=192, heads=6, kv_heads=3, context_frames=6),
    objective=InputNoiseConfig(token_noise=0.05),
    data=WorldModelDataConfig(batch_size=4, validation_windows=32, preview=False),
    training=TrainingConfig(
        minutes=5.0,
        min_steps=3000,
        learning_rate=3e-3,
        warmup_steps=50,
        ema_decay=0.99,
        validate_every=200,
        save_every=400,
        workers=0,
    ),
)
"""For the synthetic world; trains in a few minutes on a CPU."""

TINY = WorldModelRunConfig(
    model=TransformerConfig(
        layers=6, width=192, heads=6, kv_heads=3, context_frames=8, dropout=0.1
    ),
    data=WorldModelDataConfig(batch_size=2),
    training=TrainingConfig(
        steps=1000,  # on a few minutes of video, more steps only overfit
        learning_rate=3e-3,
        warmup_steps=100,
        weight_decay=0.1,
        ema_decay=0.995,
        validate_every=200,
        save_every=400,
        patience=3,
        workers=0,
    ),
)
"""3 M parameters, for frames of 8x16 tokens; trains in at most half an hour on two CPU cores."""

BASE = WorldModelRunConfig(
    model=TransformerConfig(
        layers=12, width=768, heads=12, kv_heads=4, context_frames=12, dropout=0.1
    ),
    training=TrainingConfig(
        steps=100_000,
        learning_rate=4e-4,
        warmup_steps=1000,
        weight_decay=0.1,
        ema_decay=0.9995,
        validate_every=2000,
        save_every=2000,
        workers=4,
    ),
)
"""As large as GPT-2 small, for frames of 16x32 tokens; trains on one GPU."""

LARGE = WorldModelRunConfig(
    model=TransformerConfig(layers=24, width=1536, heads=16, kv_heads=4, context_frames=20),
    data=WorldModelDataConfig(batch_size=4, validation_windows=256),
    training=TrainingConfig(
        steps=300_000,
        learning_rate=2e-4,
        warmup_steps=2000,
        weight_decay=0.1,
        ema_decay=0.9999,
        validate_every=5000,
        save_every=5000,
        workers=4,
    ),
)
"""0.6 B parameters, for frames of 16x32 tokens; trains on several GPUs."""

PRESETS = {"demo": DEMO, "tiny": TINY, "base": BASE, "large": LARGE}
"""All presets by name."""
