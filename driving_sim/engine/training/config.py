"""The options of a training run."""

from typing import Literal

from driving_sim.engine.config import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    config,
)


@config
class TrainingConfig:
    """How a model is trained. Give exactly one of `steps` and `minutes`."""

    steps: Count | None = None
    """Optimiser steps to take."""
    minutes: Positive | None = None
    """Minutes to train instead; validation, saving and start-up do not count."""
    min_steps: Count | None = None
    """With `minutes`: go on until so many steps are taken, even if it takes longer."""
    accumulate: Count = 1
    """Batches whose gradients are averaged into one step, on each device. A tokenizer's
    discriminator is weighed anew for each of them."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """What steps kernels of 32 channels or more on both sides, but a discriminator's; all else is
    AdamW's."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    min_learning_rate_ratio: Share = 0.05
    """Share of the peak that the cosine ends at."""
    warmup_steps: Natural = 200
    """Steps of linear warm-up, cut to a tenth of the run where that is shorter."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay of matrices and kernels."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    grad_clip: Positive | None = 1.0
    """Largest L2 norm of each player's gradients (a GAN has two); None: not clipped."""
    ema_decay: ShareBelowOne = 0.999
    """Decay of the averaged weights, which are what is validated and kept; 0: no averaging."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of the autocast passes; auto: bf16 where it is faster."""
    log_every: Count = 20
    """Steps between logged training metrics."""
    validate_every: Count = 500
    """Steps between validations; one more comes at the end."""
    save_every: Count = 500
    """Steps between checkpoints; more come at each new best score and at the end."""
    keep_last: Count = 2
    """Newest checkpoints that are kept, beside the best."""
    patience: Count | None = None
    """Validations without a new best score before the run stops; None: never."""
    seed: Natural = 0
    """Decides all randomness of the training steps."""
    workers: Natural = 2
    """Processes that make batches ahead; 0: made by the training process."""
    threads: Count | None = None
    """CPU threads of a training process. None: torch's choice; in commands, as many as other
    programs leave cores for, and the last bits of the weights can vary with them."""
    gradient_checkpointing: bool = False
    """Keep blocks' inputs only and compute the rest again backwards: less memory, more time."""
    compile: bool = False
    """Compile the blocks (torch.compile): minutes at the start, faster steps after it."""
    shard: bool = False
    """Spread weights, gradients and optimiser state over the ranks of `torchrun` (FSDP2)."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            found = f"found steps={self.steps}, minutes={self.minutes}"
            raise ValueError(f"steps: exactly one of steps and minutes must be given, {found}")
